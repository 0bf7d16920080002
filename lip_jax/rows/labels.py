"""Rows with labels of every kind that `lip_jax.rows` lists, as arrays that may enter any sum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lip_jax._checks import describe, is_concrete, see
from lip_jax._results import short_repr
from lip_jax._types import Array, CandidateMask

# Rows tried at each sampled position before giving up.
REACH = 4


class Rows(NamedTuple):
    """Features `(n, q)`, labels of any kind, weights `(n,)` or None: arrays of JAX or NumPy."""

    feats: Any
    labels: Any
    weights: Any = None

    def __repr__(self) -> str:
        return short_repr(self, self._fields)


class RowUse(NamedTuple):
    """The weight each row is used with, and which rows are unusable."""

    weights: jax.Array
    bad: jax.Array

    @property
    def ignored(self) -> jax.Array:
        """The number of unusable rows."""
        return self.bad.sum(dtype=jnp.int32)


def candidate_targets(mask: CandidateMask) -> Float[jax.Array, "n l"]:
    """Float targets for partial labels: each candidate set becomes a uniform distribution.

    `targets[n, c] = mask[n, c] / Σ_c mask[n, c]`; an empty set gives a row of NaN, which every
    function of this package reads as unlabelled.

    Args:
        mask: Candidate sets `(n, l)`, boolean or zeros and ones of any dtype.

    Returns:
        Targets `(n, l)` in the mask's dtype if that is floating, else float32.

    Raises:
        ValueError: If `mask` has not two axes, or holds anything but zeros and ones (where visible).

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> lip_jax.candidate_targets(jnp.array([[True, False, True], [False, True, False]])).tolist()
        [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]

    Reference:
        [si2025], section on partial-label learning.
    """
    if not hasattr(mask, "shape") or len(mask.shape) != 2:
        got = describe(mask) if hasattr(mask, "shape") else type(mask).__name__
        raise ValueError(f"mask must have two axes (n, l), one row per candidate set; got {got}.")
    mask = jnp.asarray(mask)
    dtype = mask.dtype if jnp.issubdtype(mask.dtype, jnp.floating) else jnp.dtype(jnp.float32)
    if is_concrete(mask):
        values = see(lambda: jnp.asarray(mask, dtype))
        other = values[(values != 0) & (values != 1)]
        if other.size:
            raise ValueError(
                f"mask must hold only zeros and ones (or booleans); got {other[0]}. "
                f"Soft targets need no conversion: pass them as float labels (n, l)."
            )
    mask = mask.astype(dtype)
    size = mask.sum(axis=1, keepdims=True)
    return jnp.where(size > 0, mask / jnp.where(size > 0, size, 1), jnp.nan)


def as_array(array: Array) -> jax.Array:
    """As a JAX array. `jnp.asarray` is slow on one."""
    return array if isinstance(array, jax.Array) else jnp.asarray(array)


def as_labels(labels: Array) -> jax.Array:
    """Labels as a JAX array; ids become int32."""
    return as_array(int32_ids(labels))


def int32_ids(labels: Array) -> Array:
    """Ids as int32, clipped to its range; other labels unchanged."""
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == jnp.int32:
        return labels
    held, wanted = jnp.iinfo(labels.dtype), jnp.iinfo(jnp.int32)
    if held.max > wanted.max:
        numpy = np if isinstance(labels, np.ndarray) else jnp
        labels = numpy.clip(labels, max(held.min, wanted.min), wanted.max)
    return labels.astype(jnp.int32)


def as_rows(
    feats: Array, labels: Array, weights: Array | None, bias: Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """The checked arguments as JAX arrays."""
    return (
        as_array(feats),
        as_labels(labels),
        None if weights is None else as_array(weights),
        None if bias is None else as_array(bias),
    )


def usable_bias(bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The bias, 0 where it is not finite, which only `jit` lets through."""
    return jnp.where(jnp.isfinite(bias), bias, 0).astype(dtype)


def class_count(labels: Array, num_classes: int | None) -> int:
    """`l`: as given, or the width of targets, or the largest id plus one where it can be seen."""
    if num_classes is not None:
        return num_classes
    if labels.ndim == 2:
        return labels.shape[1]
    if not is_concrete(labels):
        raise ValueError(
            "num_classes is not given, and the largest class id cannot be seen under jit. Pass num_classes=."
        )
    # As int32: in an unsigned dtype -1 would be the largest id.
    largest = int(see(lambda: as_labels(labels).max(initial=-1)))
    if largest < 0:
        raise ValueError(
            f"num_classes is not given, and no row of labels, {describe(labels)}, names a class. Pass "
            f"num_classes=."
        )
    return largest + 1


class LabelUse(NamedTuple):
    """Which rows have no label, and which have an unusable one."""

    unlabelled: jax.Array
    bad: jax.Array


def label_use(labels: jax.Array, l: int) -> LabelUse:
    """The use of each label, by the table in `lip_jax.rows`."""
    if labels.ndim == 1:
        return LabelUse(labels < 0, labels >= l)
    unlabelled = jnp.isnan(labels).all(axis=1)
    return LabelUse(unlabelled, ~jnp.isfinite(labels).all(axis=1) & ~unlabelled)


def row_use(row_energy: jax.Array, labels: LabelUse, weights: jax.Array | None) -> RowUse:
    """Effective weights and unusable rows, as `lip_jax.rows` defines them.

    `row_energy` is `‖x_n‖²`, or any number that is finite exactly where the row's features are usable.
    """
    unlabelled, bad_label = labels
    bad = bad_label | ~(jnp.isfinite(row_energy) | unlabelled)
    if weights is None:
        used = ~(unlabelled | bad)
        return RowUse(used.astype(row_energy.dtype), bad)
    weights = weights.astype(row_energy.dtype)
    bad_weight = ~(jnp.isfinite(weights) & (weights >= 0))
    bad = bad_weight | (bad & (weights != 0))
    used = ~(unlabelled | bad)
    return RowUse(jnp.where(used, weights, 0), bad)


def spread_over(rows: Rows, l: int, size: int) -> jax.Array:
    """`size` positions spread evenly over the rows, each moved to the next row that counts, if one is near.

    Otherwise a sample could consist of rows that are held out at even distances. Only a few rows are tried at
    each position, because their labels and weights travel between devices. Whether targets are NaN is not
    tested, which would take a pass over all of them.
    """
    n = rows.labels.shape[0]
    counts = jnp.ones(n, bool)
    if rows.labels.ndim == 1:
        unlabelled, bad = label_use(rows.labels, l)
        counts = ~(unlabelled | bad)
    if rows.weights is not None:
        counts = counts & (rows.weights.astype(jnp.float32) > 0)
    # In NumPy, as the product exceeds int32 for millions of rows.
    starts = (np.arange(size, dtype=np.int64) * n // max(size, 1)).astype(np.int32)
    reach = max(min(n // max(size, 1), REACH), 1)
    near = starts[:, None] + np.arange(reach, dtype=np.int32)[None, :]
    return starts + jnp.argmax(counts[near], axis=1).astype(jnp.int32)


class UsableRows(NamedTuple):
    """Rows that may enter any sum, 0 where they do not count, and the number of unusable ones."""

    feats: jax.Array
    labels: jax.Array
    weights: jax.Array
    ignored: jax.Array


def usable_rows(rows: Rows, fresh: jax.Array, l: int, dtype: jnp.dtype) -> UsableRows:
    """Features, labels and weights of a chunk; rows that are not `fresh` have weight 0."""
    feats, labels, weights = rows
    feats = feats.astype(dtype)
    use = row_use(jnp.sum(feats**2, axis=1), label_use(labels, l), weights)
    used = use.weights > 0
    if labels.ndim == 1:
        labels = jnp.clip(labels, 0, l - 1)
    else:
        labels = jnp.where(used[:, None], labels.astype(dtype), 0)
    ignored = jnp.sum(use.bad & fresh, dtype=jnp.int32)
    return UsableRows(jnp.where(used[:, None], feats, 0), labels, jnp.where(fresh, use.weights, 0), ignored)
