"""Ridge readouts in closed form: every strength, its generalisation error, and each row left out [li2020].

With weighted means `μ`, `ȳ`, deviations `x̃`, `ỹ` and `G = Σ w x̃x̃ᵀ = Q diag(e) Qᵀ`, the minimiser of
`Σ w ‖y − Wᵀx − b‖² + λ‖W‖²` is `W = Q diag(1/(e + λ)) Qᵀ Σ w x̃ỹᵀ`, `b = ȳ − Wᵀμ`: one eigendecomposition
serves all strengths. Row n pulls its own prediction by the leverage `h = w (1/Σw + x̃ᵀ(G + λI)⁻¹x̃)`, and the
prediction of the fit without it is `ŷ + h/(1 − h) (ŷ − y)`: no refit is needed to judge a row by the others.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lip_jax import _linalg
from lip_jax._checks import check_floating, check_label_kind, check_num_classes
from lip_jax._chunks import fold_rows, rows_used
from lip_jax._types import Feats, Labels, Scalar, Weights
from lip_jax.labels import Rows, as_rows, class_count, usable_rows
from lip_jax.moments import Moments, centred, from_zero, moments_of
from lip_jax.refit import check_rows, raise_if_ignored

Criterion = Literal["gcv", "press"]

# Strengths that are tried where none is given: a factor 1.3 apart.
PATH_POINTS = 61


class RidgePath(NamedTuple):
    """Everything the ridge solutions of all strengths share.

    `cross = Qᵀ Σ w x̃ỹᵀ`; `spread = Σ w ‖ỹ‖²`; `mass = Σ w y`; `total = Σ w`; `used` is how many rows the
    weights amount to, `(Σ w)²/Σ w²`. Without intercept the means are 0.
    """

    basis: jax.Array
    eigenvalues: jax.Array
    cross: jax.Array
    mean_x: jax.Array
    mean_y: jax.Array
    spread: jax.Array
    mass: jax.Array
    total: jax.Array
    used: jax.Array
    ignored: jax.Array


def ridge_path(feats, labels, weights, l: int, *, intercept: bool) -> RidgePath:
    """The shared part of all ridge solutions on one set of rows, in one pass over them."""
    rows = Rows(feats, labels, weights)
    moments = moments_of(rows, l, _linalg.compute_dtype(feats), stop=rows_used(weights))
    return path_of(moments, intercept=intercept)


def path_of(moments: Moments, *, intercept: bool) -> RidgePath:
    """The shared part of all ridge solutions on the rows that moments stand for."""
    at = centred(moments) if intercept else from_zero(moments)
    eigenvalues, basis = _linalg.eigh(at.gram)
    held = moments.squared > 0
    return RidgePath(
        basis=basis,
        eigenvalues=jnp.maximum(eigenvalues, 0),
        cross=_linalg.matmul(basis.T, at.cross),
        mean_x=at.origin_x,
        mean_y=at.origin_y,
        spread=at.spread,
        mass=moments.sum_y + moments.total * moments.origin_y,
        total=moments.total,
        used=jnp.where(held, moments.total * (moments.total / jnp.where(held, moments.squared, 1)), 0),
        ignored=moments.ignored,
    )


def ridge_grid(path: RidgePath, points: int) -> jax.Array:
    """Strengths from 10⁻⁴ to 10² times the mean eigenvalue, evenly in the logarithm."""
    mean = path.eigenvalues.mean()
    span = jnp.logspace(-4, 2, points, dtype=path.eigenvalues.dtype)
    return jnp.where(mean > 0, mean, 1) * span


def _inverse(path: RidgePath, ridge) -> jax.Array:
    """`1/(e + λ)`, and 0 in a direction that neither data nor penalty determine."""
    tolerance = path.eigenvalues.shape[0] * jnp.finfo(path.eigenvalues.dtype).eps * path.eigenvalues.max()
    held = path.eigenvalues + ridge
    return _linalg.reciprocal(held, held > tolerance)


def ridge_solution(path: RidgePath, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kernel `(q, l)` and intercept `(l,)` at one strength; at 0 the solution of least norm."""
    kernel = _linalg.matmul(path.basis, path.cross * _inverse(path, ridge)[:, None])
    return kernel, path.mean_y - _linalg.matmul(path.mean_x[None, :], kernel)[0]


def residual_sum(path: RidgePath, ridge: jax.Array) -> jax.Array:
    """`Σ w ‖y − ŷ‖²` at one strength, from the sums."""
    inverse = _inverse(path, ridge)
    # Not squared first, which overflows before anything else does.
    fitted = path.cross * (path.cross * inverse[:, None])
    explained = jnp.sum(fitted, axis=1) * (2 - path.eigenvalues * inverse)
    return jnp.maximum(path.spread - jnp.sum(explained), 0)


def gcv(path: RidgePath, ridge: jax.Array, *, intercept: bool) -> jax.Array:
    """Generalised cross-validation, `n RSS(λ)/(n − df(λ))²`, `df = [intercept] + Σ e/(e + λ)`.

    `n = (Σ w)²/Σ w²` counts rows as far as they have weight, whatever its scale. Infinite where less than a
    tenth of the freedom is left: with fewer rows than features both sides go to 0 there, and rounding would
    decide.
    """
    freedom = path.used - int(intercept) - jnp.sum(path.eigenvalues * _inverse(path, ridge))
    judged = freedom > path.used / 10
    return jnp.where(
        judged, path.used * residual_sum(path, ridge) / jnp.where(judged, freedom, 1) ** 2, jnp.inf
    )


def best_ridge(path: RidgePath, rows: Rows | None, criterion: Criterion, *, intercept: bool) -> jax.Array:
    """The strength of the path that the criterion prefers; of equal ones the largest."""
    grid = ridge_grid(path, PATH_POINTS)[::-1]
    if criterion == "gcv":
        errors = jax.vmap(lambda ridge: gcv(path, ridge, intercept=intercept))(grid)
    else:
        assert rows is not None
        errors = press(path, rows, grid, intercept=intercept)
    return grid[jnp.argmin(errors)]


def press(path: RidgePath, rows: Rows, grid: jax.Array, *, intercept: bool) -> jax.Array:
    """`Σ w ‖y − ŷ_{−n}‖²` at each strength, exactly: one pass over the rows for each."""

    def at(ridge):
        def squares(scores, labels, weights):
            sizes = jnp.ones_like(weights) if labels.ndim == 1 else jnp.sum(labels**2, axis=1)
            chosen = _along_labels(scores, labels)
            return jnp.where(weights > 0, weights * (jnp.sum(scores**2, axis=1) - 2 * chosen + sizes), 0)

        return jnp.sum(left_out(path, rows, ridge, squares, intercept=intercept))

    return jax.lax.map(at, grid)


def _along_labels(scores, labels) -> jax.Array:
    if labels.ndim == 1:
        return jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    return jnp.sum(labels * scores, axis=1)


def left_out(path: RidgePath, rows: Rows, ridge, reduce: Callable, *, intercept: bool) -> Any:
    """`reduce(scores, labels, weights)` of the leave-one-out scores, chunk by chunk: `(n, l)` is not held.

    A row that the others do not bear on (`h → 1`, to `4 √q eps`) is scored by their mean target.
    """
    dtype = path.basis.dtype
    q, l = path.cross.shape
    inverse = _inverse(path, ridge)
    solution = path.cross * inverse[:, None]
    # Well above the rounding of h, a sum of q squares whose errors mostly cancel.
    smallest = 4 * math.sqrt(q) * float(jnp.finfo(dtype).eps)

    def step(carry, rows, fresh):
        # Rows seen before are judged again, and must come to the same.
        _, y, w, _ = usable_rows(rows, jnp.ones_like(fresh), l, dtype)
        # Unlabelled rows are scored too; they have no part in the fit, so theirs is its plain prediction.
        x = rows[0].astype(dtype)
        x = jnp.where(jnp.isfinite(jnp.sum(x**2, axis=1))[:, None], x - path.mean_x[None, :], 0)
        along = _linalg.matmul(x, path.basis)
        fitted = _linalg.matmul(along, solution) + path.mean_y[None, :]
        share = jnp.where(path.total > 0, w / jnp.where(path.total > 0, path.total, 1), 0)
        leverage = int(intercept) * share + w * jnp.sum(along**2 * inverse[None, :], axis=1)
        alone = 1 - leverage <= smallest
        pull = jnp.where(alone, 0, leverage / jnp.where(alone, 1, 1 - leverage))
        # The mean target, or 0 without intercept, is the fit of a row in whose direction there is no other.
        only = 1 - share <= smallest
        mean_pull = jnp.where(only, 0, int(intercept) * share / jnp.where(only, 1, 1 - share))
        pull = jnp.where(alone, mean_pull, pull)
        fitted = jnp.where(alone[:, None], path.mean_y[None, :], fitted)
        scores = _less_labels((1 + pull)[:, None] * fitted, y, pull)
        return carry, reduce(jnp.where((alone & only)[:, None], 0, scores), y, w)

    _, out = fold_rows(step, jnp.zeros((), jnp.int32), rows)
    return out


def _less_labels(scores, labels, share) -> jax.Array:
    """`scores − share · y`."""
    if labels.ndim == 1:
        return scores.at[jnp.arange(labels.shape[0]), labels].add(-share)
    return scores - share[:, None] * labels


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
        labels: Class ids `(n,)` or targets `(n, l)`; the kinds are told in `lip_jax.labels`.
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


def check_readout_rows(feats, labels, num_classes, weights, ridge, criterion) -> int:
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
def _scores(rows: Rows, ridge, *, l, criterion, intercept):
    path = ridge_path(*rows, l, intercept=intercept)
    ridge = strength(path, rows, ridge, criterion, intercept=intercept)
    scores = left_out(path, rows, ridge, lambda scores, y, w: scores, intercept=intercept)
    return scores, path.ignored


def strength(
    path: RidgePath, rows: Rows | None, ridge, criterion: Criterion, *, intercept: bool
) -> jax.Array:
    """The strength that was given, or else the best of the path."""
    if ridge is None:
        return best_ridge(path, rows, criterion, intercept=intercept)
    return jnp.asarray(ridge, path.eigenvalues.dtype)
