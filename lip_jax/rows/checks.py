"""Checks of rows. Errors name what came, what was expected and what to do, and the first unusable row."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lip_jax._checks import check_bias, check_floating, check_ridge, describe, is_concrete, is_floating
from lip_jax.numerics import linalg
from lip_jax.rows.labels import Rows, as_rows, label_use, row_use

# How far a row of targets may be from 1, as bfloat16 rounds.
SUM_TOLERANCE = 0.02


def check_feats(feats: Any, q: int) -> None:
    """Require floating `(n, q)` features for a kernel of input width `q`."""
    check_floating(feats, "feats", "n q")
    if feats.shape[1] != q:
        raise ValueError(
            f"feats must have as many columns as the kernel has rows, q = {q}; got "
            f"{describe(feats)}. feats are the inputs of the head (lip_jax.capture_features), "
            f"and a kernel stored as (outputs, inputs) must be transposed."
        )


def check_weights(weights: Any, n: int) -> None:
    """Require one real weight per sample, or None."""
    if weights is None:
        return
    if not hasattr(weights, "shape") or tuple(weights.shape) != (n,):
        got = describe(weights) if hasattr(weights, "shape") else type(weights).__name__
        raise ValueError(f"weights must have shape (n,) = ({n},), one per row of feats; got {got}.")
    if not any(jnp.issubdtype(weights.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise ValueError(f"weights must be real numbers or booleans; got {describe(weights)}.")


def check_label_kind(labels: Any) -> None:
    """Require integer class ids with one axis or float targets with two; see `lip_jax.rows`."""
    if not hasattr(labels, "shape"):
        raise ValueError(
            f"labels must be a JAX or NumPy array; got {type(labels).__name__}. "
            f"Convert it with jnp.asarray(labels)."
        )
    if len(labels.shape) == 2 and not is_floating(labels):
        raise ValueError(
            f"labels of two axes must be float targets (n, l); got {describe(labels)}. "
            f"For candidate sets (partial labels) pass lip_jax.candidate_targets(mask); for soft or "
            f"multi-label targets cast to float; for class ids pass one axis, (n,)."
        )
    if len(labels.shape) == 1 and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels of one axis must be integer class ids (n,); got {describe(labels)}. "
            f"Cast ids with labels.astype(jnp.int32); targets need two axes, (n, l)."
        )
    if len(labels.shape) not in (1, 2):
        raise ValueError(f"labels must be class ids (n,) or float targets (n, l); got {describe(labels)}.")


def check_labels(labels: Any, n: int, l: int) -> None:
    """Require class ids `(n,)` or float targets `(n, l)`, for `n` samples and `l` classes."""
    check_label_kind(labels)
    if labels.shape[0] != n:
        raise ValueError(f"labels must have one row per row of feats, n = {n}; got {describe(labels)}.")
    if len(labels.shape) == 2 and labels.shape[1] != l:
        raise ValueError(
            f"labels given as targets must have one column per class, l = {l}; got {describe(labels)}."
        )
    if len(labels.shape) == 1 and l == 1:
        raise ValueError(
            "labels are class ids, but the kernel has one output (a sigmoid head), for which an id "
            "names no class. Pass float targets of shape (n, 1): labels[:, None].astype(jnp.float32)."
        )


def check_several_classes(l: int) -> None:
    """Require at least two classes, for a softmax."""
    if l < 2:
        raise ValueError(
            "labels must name at least two classes; got one column or class. For a single output with labels "
            "y of 0 and 1 pass class ids and num_classes=2: the difference of the two columns of kernel and "
            "bias is the head of one output. lip_jax.refine refits a kernel of one output as published."
        )


def check_shares(labels: Any) -> None:
    """Require targets whose rows sum to 1, as a softmax needs, or are unlabelled; unseen under `jit`."""
    if len(labels.shape) != 2 or not is_concrete(labels):
        return
    if not getattr(labels, "is_fully_addressable", True):
        return
    sums = np.asarray(labels).astype(np.float32).sum(axis=1)
    off = np.isfinite(sums) & (np.abs(sums - 1) > SUM_TOLERANCE)
    if off.any():
        row = int(np.argmax(off))
        raise ValueError(
            f"targets of a softmax head must sum to 1 in each row; got {describe(labels)}, of which "
            f"{int(off.sum())} rows do not, the first being row {row}, of sum {sums[row]:.4g}. Divide counts "
            f"by their sums; for candidate sets pass lip_jax.candidate_targets(mask). Heads of several right "
            f"answers (sigmoid outputs) can only be refitted at a rank: lip_jax.apply(…, rank=k)."
        )


def check_num_classes(num_classes: Any) -> None:
    """Require a positive Python integer, or None."""
    valid = isinstance(num_classes, (int, np.integer)) and not isinstance(num_classes, bool)
    if num_classes is not None and not (valid and num_classes > 0):
        raise ValueError(
            f"num_classes must be a positive integer, as it sets a shape; got {num_classes!r}. "
            f"None takes the width of targets, or the largest id plus one."
        )


def raise_for_bad_rows(feats: Any, labels: Any, weights: Any, l: int) -> None:
    """Name the first unusable row and the reason; called after a pass has counted such rows."""
    double = jax.dtypes.canonicalize_dtype(np.float64)
    computed = double if np.dtype(feats.dtype) == np.float64 else np.dtype(np.float32)

    def as_computed(array: Any) -> np.ndarray:
        # Values that overflow in the dtype of the computation are unusable too.
        with np.errstate(over="ignore"):
            return np.asarray(array).astype(computed).astype(np.float64)

    feats = np.asarray(feats).astype(np.float64)
    labels = np.asarray(labels)
    counts = np.ones(len(feats), bool)
    if weights is not None:
        weights = as_computed(weights)
        bad = ~np.isfinite(weights) | (weights < 0)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"weights must be finite and at least 0; got {weights[row]} at row {row} "
                f"({int(bad.sum())} such rows). Give rows that must not count the weight 0."
            )
        counts = weights > 0
    if labels.ndim == 1:
        unlabelled = labels < 0
        bad = counts & (labels >= l)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"labels must be class ids below l = {l}; got {labels[row]} at row {row} "
                f"({int(bad.sum())} such rows). Mark unlabelled rows with -1; ids start at 0."
            )
    else:
        targets = as_computed(labels)
        unlabelled = np.isnan(targets).all(axis=1)
        bad = counts & ~np.isfinite(targets).all(axis=1) & ~unlabelled
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"labels given as targets must be finite; row {row} holds NaN or infinity "
                f"({int(bad.sum())} such rows). A row of NaN throughout marks an unlabelled sample."
            )
    with np.errstate(over="ignore"):
        bad = counts & ~unlabelled & ~np.isfinite(as_computed((feats**2).sum(axis=1)))
    if not bad.any():
        raise ValueError(
            f"some rows could not be used: their values are finite, but sums of them overflow {computed}. "
            f"Scale feats or weights down, or pass float64 with jax_enable_x64."
        )
    row = int(bad.argmax())
    raise ValueError(
        f"feats must be finite; row {row} holds NaN, infinity or values whose square overflows "
        f"({int(bad.sum())} such rows). Drop these rows or give them the weight 0."
    )


def raise_if_ignored(ignored: jax.Array, feats: Any, labels: Any, weights: Any, l: int) -> None:
    """Raise for the first unusable row where values can be seen, at the cost of reading one scalar."""
    if is_concrete(ignored, feats, labels, weights) and int(ignored) > 0:
        raise_for_bad_rows(feats, labels, weights, l)


def check_rows(
    q: int, l: int, feats: Any, labels: Any, weights: Any, bias: Any, ridge: Any, ridge_to: str
) -> None:
    """Require rows and options that fit a `(q, l)` kernel."""
    check_feats(feats, q)
    check_labels(labels, feats.shape[0], l)
    check_weights(weights, feats.shape[0])
    check_bias(bias, l)
    check_ridge(ridge, ridge_to)


def check_validation(validation: Any, q: int, l: int) -> tuple[Rows, jax.Array]:
    """Require usable validation rows; return them as arrays, and how many are unusable (under `jit`)."""
    if not isinstance(validation, (tuple, list)) or len(validation) not in (2, 3):
        length = f" of length {len(validation)}" if isinstance(validation, (tuple, list)) else ""
        raise ValueError(
            f"validation must be (feats, labels) or (feats, labels, weights); got a "
            f"{type(validation).__name__}{length}."
        )
    feats, labels = validation[:2]
    weights = validation[2] if len(validation) == 3 else None
    try:
        check_rows(q, l, feats, labels, weights, None, 0.0, "current")
        check_shares(labels)
        feats_array, labels_array, weights_array, _ = as_rows(feats, labels, weights, None)
        rows = Rows(feats_array, labels_array, weights_array)
        ignored = count_ignored(rows, l=l)
        raise_if_ignored(ignored, feats, labels, weights, l)
    except ValueError as error:
        raise ValueError(f"validation: {error}") from None
    if feats.shape[0] < 2:
        raise ValueError(f"validation must hold at least 2 rows; got {feats.shape[0]}.")
    return rows, ignored


@partial(jax.jit, static_argnames=("l",))
def count_ignored(rows: Rows, l: int) -> jax.Array:
    """The number of unusable rows, counted in a separate pass."""
    energy = jnp.sum(rows.feats.astype(linalg.compute_dtype(rows.feats)) ** 2, axis=1)
    return row_use(energy, label_use(rows.labels, l), rows.weights).ignored
