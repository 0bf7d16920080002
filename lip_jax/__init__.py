"""Repair the head of a classifier trained on inaccurate labels, in closed form."""

from lip_jax import bounds, choice, methods, models, networks, noise, quality, rows, spectrum, stream, sums
from lip_jax.bounds import sin_theta_bound
from lip_jax.choice import Choice, select
from lip_jax.methods import (
    Calibrated,
    Head,
    Logistic,
    Published,
    Purified,
    Ridge,
    fit_logit_scale,
    linear_readout,
    linear_readout_from,
    purified_readout,
    refine,
    refine_calibrated,
    refine_from,
    solve_tail_sigma,
)
from lip_jax.models import (
    apply,
    apply_from,
    apply_readout,
    apply_with_report,
    capture_features,
    predictive_power,
    replace_head,
    truncate_at,
)
from lip_jax.networks import repair
from lip_jax.quality import label_quality, leave_one_out_scores, memorised, purify
from lip_jax.rows import Rows, candidate_targets, head_metrics
from lip_jax.spectrum import subspace_similarity, svd_split
from lip_jax.stream import accumulate, array_batches, feature_batches
from lip_jax.sums import moment_accumulator, tail_accumulator

__version__ = "0.1.0"

__all__ = [
    "Calibrated",
    "Choice",
    "Head",
    "Logistic",
    "Published",
    "Purified",
    "Ridge",
    "Rows",
    "accumulate",
    "apply",
    "apply_from",
    "apply_readout",
    "apply_with_report",
    "array_batches",
    "bounds",
    "candidate_targets",
    "capture_features",
    "choice",
    "feature_batches",
    "fit_logit_scale",
    "head_metrics",
    "label_quality",
    "leave_one_out_scores",
    "linear_readout",
    "linear_readout_from",
    "memorised",
    "methods",
    "models",
    "moment_accumulator",
    "networks",
    "noise",
    "predictive_power",
    "purified_readout",
    "purify",
    "quality",
    "refine",
    "refine_calibrated",
    "refine_from",
    "repair",
    "replace_head",
    "rows",
    "select",
    "sin_theta_bound",
    "solve_tail_sigma",
    "spectrum",
    "stream",
    "subspace_similarity",
    "sums",
    "svd_split",
    "tail_accumulator",
    "truncate_at",
]
