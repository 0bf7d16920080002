"""How far labels can be trusted, without a clean set, and whether a head has memorised them."""

from lip_jax.quality.left_out import leave_one_out_scores
from lip_jax.quality.memorisation import Memorisation, memorised
from lip_jax.quality.rules import PurifiedRows, purify
from lip_jax.quality.trust import LabelQuality, label_quality

__all__ = [
    "LabelQuality",
    "Memorisation",
    "PurifiedRows",
    "label_quality",
    "leave_one_out_scores",
    "memorised",
    "purify",
]
