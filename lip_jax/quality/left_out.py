"""Leave-one-out scores of a ridge readout, and the strength that they prefer [allen1974].

Row n pulls its own prediction by the leverage `h = w (1/Σw + x̃ᵀ(G + λI)⁻¹x̃)`. The fit without it predicts
`ŷ + h/(1 − h) (ŷ − y)`: no refit is needed to judge a row by the others.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lip_jax._checks import check_floating
from lip_jax._types import Feats, Labels, Scalar, Weights
from lip_jax.numerics import linalg
from lip_jax.numerics.chunks import fold_rows
from lip_jax.rows.checks import check_label_kind, check_num_classes, check_rows, raise_if_ignored
from lip_jax.rows.labels import Rows, as_rows, class_count, usable_rows
from lip_jax.sums.ridge import PATH_POINTS, RidgeFactors, gcv, inverse_of, ridge_factors, ridge_grid

Criterion = Literal["gcv", "press"]


def leave_one_out_scores(
    feats: Feats,
    labels: Labels,
    *,
    num_classes: int | None = None,
    weights: Weights | None = None,
    ridge: Scalar | None = None,
    criterion: Criterion = "gcv",
    intercept: bool = True,
) -> Float[jax.Array, "n l"]:
    """What a ridge readout of all other rows predicts for each row, exactly and without refitting.

    `ŷ_n + h_n/(1 − h_n) (ŷ_n − y_n)`, `h_n = w_n (1/Σw + x̃_nᵀ(G + λI)⁻¹x̃_n)`; a row leaves with its whole
    weight. Rows go through in chunks: beside the result, memory does not grow with `n`.

    These scores are out of sample for the readout only. If the body that made the features was trained on
    these very labels long enough to memorise them, the features of a row carry its wrong label, and no
    linear model on top can tell: see `lip_jax.memorised`, or take features of a body stopped early.

    Args:
        feats: Features `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`; the kinds are told in `lip_jax.rows`.
        num_classes: `l`; None: the width of targets, or the largest id plus one.
        weights: Weight of each row `(n,)`, at least 0.
        ridge: `λ ≥ 0`; None: by `criterion`, over six decades about the mean eigenvalue of `G`.
        criterion: `"gcv"`, from the sums alone, or `"press"`, the exact leave-one-out error, which costs one
            more pass over the rows for each of the 61 strengths.
        intercept: Whether the readout has an intercept, which is not penalised.

    Returns:
        Scores `(n, l)`, on the scale of targets: no logits. An unlabelled row, and one of weight 0, gets the
        plain prediction; one in whose direction there is no other (`h = 1`) the mean target of the others.

    Raises:
        ValueError: If shapes do not fit, or, where values can be seen, a row cannot be used. Under `jit` such
            rows count for nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> feats = jnp.array([[-1.0], [-1.1], [1.0], [1.1], [0.9]])
        >>> scores = lip_jax.leave_one_out_scores(feats, jnp.array([0, 0, 1, 1, 0]), ridge=0.1)
        >>> jnp.argmax(scores, axis=1).tolist()  # the last label disagrees with its neighbours
        [0, 0, 1, 1, 1]

    Reference:
        [allen1974], the PRESS statistic; [golub1979] for GCV.
    """
    l = check_readout_rows(feats, labels, num_classes, weights, ridge, criterion)
    rows = Rows(*as_rows(feats, labels, weights, None)[:3])
    scores, ignored = _scores(rows, ridge, l=l, criterion=criterion, intercept=intercept)
    raise_if_ignored(ignored, feats, labels, weights, l)
    return scores


def check_readout_rows(
    feats: Any, labels: Any, num_classes: int | None, weights: Any, ridge: Scalar | None, criterion: str
) -> int:
    """Require rows and options a readout can be fitted to, and return `l`."""
    check_floating(feats, "feats", "n q")
    check_label_kind(labels)
    check_num_classes(num_classes)
    l = class_count(labels, num_classes)
    check_rows(feats.shape[1], l, feats, labels, weights, None, 0.0 if ridge is None else ridge, "zero")
    if criterion not in ("gcv", "press"):
        raise ValueError(f"criterion must be 'gcv' or 'press'; got {criterion!r}.")
    return l


@partial(jax.jit, static_argnames=("l", "criterion", "intercept"))
def _scores(
    rows: Rows, ridge: Scalar | None, *, l: int, criterion: Criterion, intercept: bool
) -> tuple[jax.Array, jax.Array]:
    factors = ridge_factors(*rows, l, intercept=intercept)
    ridge = strength(factors, rows, ridge, criterion, intercept=intercept)
    scores = left_out(factors, rows, ridge, lambda scores, y, w: scores, intercept=intercept)
    return scores, factors.ignored


def best_ridge(
    factors: RidgeFactors, rows: Rows | None, criterion: Criterion, *, intercept: bool
) -> jax.Array:
    """The strength that the criterion prefers, the largest of equal ones."""
    grid = ridge_grid(factors, PATH_POINTS)[::-1]
    if criterion == "gcv":
        errors = jax.vmap(lambda ridge: gcv(factors, ridge, intercept=intercept))(grid)
    else:
        assert rows is not None
        errors = press(factors, rows, grid, intercept=intercept)
    return grid[jnp.argmin(errors)]


def press(factors: RidgeFactors, rows: Rows, grid: jax.Array, *, intercept: bool) -> jax.Array:
    """`Σ w ‖y − ŷ_{−n}‖²` at each strength, exactly, by one pass over the rows for each."""

    def squares(scores: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
        sizes = jnp.ones_like(weights) if labels.ndim == 1 else jnp.sum(labels**2, axis=1)
        chosen = _along_labels(scores, labels)
        return jnp.where(weights > 0, weights * (jnp.sum(scores**2, axis=1) - 2 * chosen + sizes), 0)

    def at(ridge: jax.Array) -> jax.Array:
        return jnp.sum(left_out(factors, rows, ridge, squares, intercept=intercept))

    return jax.lax.map(at, grid)


def _along_labels(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """`scores · y` of each row."""
    if labels.ndim == 1:
        return jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    return jnp.sum(labels * scores, axis=1)


def left_out(factors: RidgeFactors, rows: Rows, ridge: Scalar, reduce: Callable, *, intercept: bool) -> Any:
    """`reduce(scores, labels, weights)` of the leave-one-out scores, chunk by chunk: `(n, l)` is not held.

    A row that the others say nothing about (`1 − h ≤ 4 √q eps`) is scored by their mean target.
    """
    dtype = factors.basis.dtype
    q, l = factors.cross.shape
    inverse = inverse_of(factors, ridge)
    solution = factors.cross * inverse[:, None]
    # Well above the rounding error of h, a sum of q squares whose errors mostly cancel.
    smallest = 4 * math.sqrt(q) * float(jnp.finfo(dtype).eps)

    def step(carry: None, rows: Rows, fresh: jax.Array) -> tuple[None, Any]:
        # Rows seen before are scored again, so that outputs agree.
        _, y, w, _ = usable_rows(rows, jnp.ones_like(fresh), l, dtype)
        # Unlabelled rows have no part in the fit, and are scored by its plain prediction.
        x = rows[0].astype(dtype)
        x = jnp.where(jnp.isfinite(jnp.sum(x**2, axis=1))[:, None], x - factors.mean_x[None, :], 0)
        coordinates = linalg.matmul(x, factors.basis)
        fitted = linalg.matmul(coordinates, solution) + factors.mean_y[None, :]
        share = jnp.where(factors.total > 0, w / jnp.where(factors.total > 0, factors.total, 1), 0)
        leverage = int(intercept) * share + w * jnp.sum(coordinates**2 * inverse[None, :], axis=1)
        alone = 1 - leverage <= smallest
        pull = jnp.where(alone, 0, leverage / jnp.where(alone, 1, 1 - leverage))
        # A row whose direction no other row has is fitted by the mean target, or 0 without intercept.
        only = 1 - share <= smallest
        mean_pull = jnp.where(only, 0, int(intercept) * share / jnp.where(only, 1, 1 - share))
        pull = jnp.where(alone, mean_pull, pull)
        fitted = jnp.where(alone[:, None], factors.mean_y[None, :], fitted)
        scores = _less_labels((1 + pull)[:, None] * fitted, y, pull)
        return carry, reduce(jnp.where((alone & only)[:, None], 0, scores), y, w)

    return fold_rows(step, None, rows)[1]


def _less_labels(scores: jax.Array, labels: jax.Array, share: jax.Array) -> jax.Array:
    """`scores − share · y`."""
    if labels.ndim == 1:
        return scores.at[jnp.arange(labels.shape[0]), labels].add(-share)
    return scores - share[:, None] * labels


def strength(
    factors: RidgeFactors, rows: Rows | None, ridge: Scalar | None, criterion: Criterion, *, intercept: bool
) -> jax.Array:
    """The given strength, or the one that the criterion prefers."""
    if ridge is None:
        return best_ridge(factors, rows, criterion, intercept=intercept)
    return jnp.asarray(ridge, factors.eigenvalues.dtype)
