"""Ridge readouts in closed form: every strength, its generalisation error, and each row left out [li2020].

With weighted means `μ`, `ȳ`, deviations `x̃`, `ỹ` and `G = Σ w x̃x̃ᵀ = Q diag(e) Qᵀ`, the minimiser of
`Σ w ‖y − Wᵀx − b‖² + λ‖W‖²` is `W = Q diag(1/(e + λ)) Qᵀ Σ w x̃ỹᵀ`, `b = ȳ − Wᵀμ`: one eigendecomposition
serves all strengths. A row with leverage `h = w (1/Σw + x̃ᵀ(G + λI)⁻¹x̃)` is predicted by the fit without it
as `ŷ + h/(1 − h) (ŷ − y)`: no refit is needed to judge a row by the others.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lip_jax._types import Scalar
from lip_jax.numerics import linalg
from lip_jax.numerics.chunks import fold_rows, rows_used
from lip_jax.rows.labels import Rows, usable_rows
from lip_jax.sums.moments import Moments, centred, from_zero, moments_of

Criterion = Literal["gcv", "press"]

# Strengths tried where none is given, a factor 1.3 apart.
PATH_POINTS = 61


class RidgeFactors(NamedTuple):
    """The part that the ridge solutions of all strengths share.

    `cross = Qᵀ Σ w x̃ỹᵀ`; `spread = Σ w ‖ỹ‖²`; `mass = Σ w y`; `total = Σ w`;
    `effective_sample_size = (Σ w)²/Σ w²`. Without intercept the means are 0.
    """

    basis: jax.Array
    eigenvalues: jax.Array
    cross: jax.Array
    mean_x: jax.Array
    mean_y: jax.Array
    spread: jax.Array
    mass: jax.Array
    total: jax.Array
    effective_sample_size: jax.Array
    ignored: jax.Array


@partial(jax.jit, static_argnames=("l", "intercept"))
def ridge_factors(
    feats: jax.Array, labels: jax.Array, weights: jax.Array | None, l: int, *, intercept: bool
) -> RidgeFactors:
    """The factors of one set of rows, in one pass over them."""
    rows = Rows(feats, labels, weights)
    moments = moments_of(rows, l, linalg.compute_dtype(feats), stop=rows_used(weights))
    return factors_of_moments(moments, intercept=intercept)


def factors_of_moments(moments: Moments, *, intercept: bool) -> RidgeFactors:
    """The factors of the rows that the moments were taken of."""
    at = centred(moments) if intercept else from_zero(moments)
    eigenvalues, basis = linalg.eigh(at.gram)
    held = moments.squared > 0
    return RidgeFactors(
        basis=basis,
        eigenvalues=jnp.maximum(eigenvalues, 0),
        cross=linalg.matmul(basis.T, at.cross),
        mean_x=at.origin_x,
        mean_y=at.origin_y,
        spread=at.spread,
        mass=moments.sum_y + moments.total * moments.origin_y,
        total=moments.total,
        effective_sample_size=jnp.where(
            held, moments.total * (moments.total / jnp.where(held, moments.squared, 1)), 0
        ),
        ignored=moments.ignored,
    )


def ridge_grid(factors: RidgeFactors, points: int) -> jax.Array:
    """Strengths from 10⁻⁴ to 10² times the mean eigenvalue, evenly spaced in the logarithm."""
    mean = factors.eigenvalues.mean()
    span = jnp.logspace(-4, 2, points, dtype=factors.eigenvalues.dtype)
    return jnp.where(mean > 0, mean, 1) * span


def _inverse(factors: RidgeFactors, ridge: Scalar) -> jax.Array:
    """`1/(e + λ)`, and 0 in a direction that neither data nor penalty determine."""
    eigenvalues = factors.eigenvalues
    tolerance = eigenvalues.shape[0] * jnp.finfo(eigenvalues.dtype).eps * eigenvalues.max()
    held = eigenvalues + ridge
    return linalg.reciprocal(held, held > tolerance)


def ridge_solution(factors: RidgeFactors, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kernel `(q, l)` and intercept `(l,)` at one strength; the minimum-norm solution at 0."""
    kernel = linalg.matmul(factors.basis, factors.cross * _inverse(factors, ridge)[:, None])
    return kernel, factors.mean_y - linalg.matmul(factors.mean_x[None, :], kernel)[0]


def residual_sum(factors: RidgeFactors, ridge: jax.Array) -> jax.Array:
    """`Σ w ‖y − ŷ‖²` at one strength, from the sums."""
    inverse = _inverse(factors, ridge)
    # In this order: squares of `cross` alone may overflow.
    fitted = factors.cross * (factors.cross * inverse[:, None])
    explained = jnp.sum(fitted, axis=1) * (2 - factors.eigenvalues * inverse)
    return jnp.maximum(factors.spread - jnp.sum(explained), 0)


def gcv(factors: RidgeFactors, ridge: jax.Array, *, intercept: bool) -> jax.Array:
    """Generalised cross-validation, `n RSS(λ)/(n − df(λ))²`, `df = [intercept] + Σ e/(e + λ)`.

    `n = (Σ w)²/Σ w²` is the effective sample size. The result is infinite where less than a tenth of the
    degrees of freedom is left: with fewer rows than features, numerator and denominator vanish there, and
    rounding would decide.
    """
    n = factors.effective_sample_size
    freedom = n - int(intercept) - jnp.sum(factors.eigenvalues * _inverse(factors, ridge))
    judged = freedom > n / 10
    return jnp.where(judged, n * residual_sum(factors, ridge) / jnp.where(judged, freedom, 1) ** 2, jnp.inf)


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
    inverse = _inverse(factors, ridge)
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
