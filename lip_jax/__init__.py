"""Repair the head of a classifier trained on inaccurate labels, in closed form."""

from lip_jax.bounds import (
    SinThetaBound,
    feature_singular_values,
    feature_singular_values_from,
    mixed_gap,
    sin_theta_bound,
    wedin_bound,
)
from lip_jax.calibrate import CalibratedHead, fit_logit_scale, refine_calibrated, refine_calibrated_from
from lip_jax.capture import capture_features
from lip_jax.heads import HeadReport, apply, apply_from, apply_readout, apply_with_report, replace_head
from lip_jax.labels import Rows, candidate_targets
from lip_jax.layers import PredictivePower, predictive_power
from lip_jax.metrics import Metrics, head_metrics
from lip_jax.moments import Accumulator, Moments, moment_accumulator, tail_accumulator
from lip_jax.noise import (
    asymmetric_noise,
    candidate_sets,
    instance_noise,
    symmetric_noise,
    transition_noise,
)
from lip_jax.purify import (
    LabelQuality,
    Memorisation,
    Purified,
    PurifiedReadout,
    label_quality,
    memorised,
    purified_readout,
    purify,
)
from lip_jax.readout import Readout, linear_readout, linear_readout_from
from lip_jax.refit import refine, refine_from, solve_tail_sigma, solve_tail_sigma_from
from lip_jax.ridge import leave_one_out_scores
from lip_jax.selection import Candidate, Head, Selection, SelectionReport, select
from lip_jax.spectral import (
    EffectiveRank,
    SvdSplit,
    effective_rank,
    kernel_similarity,
    kernel_similarity_grid,
    principal_angles,
    rank_for_energy,
    recompose,
    subspace_similarity,
    subspace_similarity_grid,
    svd_split,
)
from lip_jax.stream import accumulate, array_batches, feature_batches, shard_batches
from lip_jax.tail import TailMoments
from lip_jax.truncate import Truncated, truncate_at

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "CalibratedHead",
    "Candidate",
    "EffectiveRank",
    "Head",
    "HeadReport",
    "LabelQuality",
    "Memorisation",
    "Metrics",
    "Moments",
    "PredictivePower",
    "Purified",
    "PurifiedReadout",
    "Readout",
    "Rows",
    "Selection",
    "SelectionReport",
    "SinThetaBound",
    "SvdSplit",
    "TailMoments",
    "Truncated",
    "accumulate",
    "apply",
    "apply_from",
    "apply_readout",
    "apply_with_report",
    "array_batches",
    "asymmetric_noise",
    "candidate_sets",
    "candidate_targets",
    "capture_features",
    "effective_rank",
    "feature_batches",
    "feature_singular_values",
    "feature_singular_values_from",
    "fit_logit_scale",
    "head_metrics",
    "instance_noise",
    "kernel_similarity",
    "kernel_similarity_grid",
    "label_quality",
    "leave_one_out_scores",
    "linear_readout",
    "linear_readout_from",
    "memorised",
    "mixed_gap",
    "moment_accumulator",
    "predictive_power",
    "principal_angles",
    "purified_readout",
    "purify",
    "rank_for_energy",
    "recompose",
    "refine",
    "refine_calibrated",
    "refine_calibrated_from",
    "refine_from",
    "replace_head",
    "select",
    "shard_batches",
    "sin_theta_bound",
    "solve_tail_sigma",
    "solve_tail_sigma_from",
    "subspace_similarity",
    "subspace_similarity_grid",
    "svd_split",
    "symmetric_noise",
    "tail_accumulator",
    "transition_noise",
    "truncate_at",
    "wedin_bound",
]
