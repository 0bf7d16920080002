"""The spectrum of a head: splitting it at a rank, and comparing the subspaces of two heads."""

from lip_jax.spectrum.similarity import (
    kernel_similarity,
    kernel_similarity_grid,
    principal_angles,
    subspace_similarity,
    subspace_similarity_grid,
)
from lip_jax.spectrum.split import (
    EffectiveRank,
    SvdSplit,
    effective_rank,
    rank_for_energy,
    recompose,
    svd_split,
)

__all__ = [
    "EffectiveRank",
    "SvdSplit",
    "effective_rank",
    "kernel_similarity",
    "kernel_similarity_grid",
    "principal_angles",
    "rank_for_energy",
    "recompose",
    "subspace_similarity",
    "subspace_similarity_grid",
    "svd_split",
]
