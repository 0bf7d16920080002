"""Angles between principal subspaces of a clean and a noisy head, and bounds on them."""

from lip_jax.bounds.angles import Angles, compare_heads
from lip_jax.bounds.sin_theta import (
    SinThetaBound,
    feature_singular_values,
    feature_singular_values_from,
    mixed_gap,
    sin_theta_bound,
    wedin_bound,
)

__all__ = [
    "Angles",
    "SinThetaBound",
    "compare_heads",
    "feature_singular_values",
    "feature_singular_values_from",
    "mixed_gap",
    "sin_theta_bound",
    "wedin_bound",
]
