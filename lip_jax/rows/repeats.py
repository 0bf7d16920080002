"""Equal rows: found by a hash of their features, so that rows that fit and rows that judge are independent.

Only where values can be seen: under `jit` every row counts as another.
"""

from typing import Any

import numpy as np

from lip_jax._checks import is_concrete
from lip_jax.numerics.chunks import CHUNK_ROWS


def first_places(feats: Any) -> np.ndarray | None:
    """For each row the place of the first equal to it, `(n,)`; None where all differ or cannot be seen."""
    keys = _keys(feats)
    if keys is None:
        return None
    unique, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return None if len(unique) == len(keys) else first[group].astype(np.int32)


def found_in(feats: Any, others: Any) -> np.ndarray | None:
    """Which rows are also among others, `(n,)`; None where they are unseen."""
    mine, theirs = _keys(feats), _keys(others)
    return None if mine is None or theirs is None else np.isin(mine, theirs)


def _keys(feats: Any) -> np.ndarray | None:
    """A hash of each row in float32: `Σ_i bits_i m_i` modulo 2⁶⁴, with odd random `m`."""
    if not is_concrete(feats) or not getattr(feats, "is_fully_addressable", True):
        return None
    values = np.asarray(feats)
    n, q = values.shape
    multipliers = np.random.default_rng(0).integers(2**63, size=q, dtype=np.uint64) * 2 + 1
    keys = np.empty(n, np.uint64)
    for start in range(0, n, CHUNK_ROWS):
        with np.errstate(over="ignore", invalid="ignore"):
            # 0 is added as −0 equals 0.
            part = values[start : start + CHUNK_ROWS].astype(np.float32) + np.float32(0)
            mixed = part.view(np.uint32).astype(np.uint64)
            mixed = (mixed ^ (mixed >> 15)) * np.uint64(0x9E3779B97F4A7C15)
            keys[start : start + CHUNK_ROWS] = (mixed * multipliers).sum(axis=1, dtype=np.uint64)
    return keys
