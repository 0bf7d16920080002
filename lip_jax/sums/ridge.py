"""Ridge readouts in closed form: the factors of the rows, every strength, its generalisation error [li2020].

With weighted means `μ`, `ȳ`, deviations `x̃`, `ỹ` and `G = Σ w x̃x̃ᵀ = Q diag(e) Qᵀ`, the minimiser of
`Σ w ‖y − Wᵀx − b‖² + λ‖W‖²` is `W = Q diag(1/(e + λ)) Qᵀ Σ w x̃ỹᵀ`, `b = ȳ − Wᵀμ`: one eigendecomposition
serves all strengths.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lip_jax._types import Scalar
from lip_jax.numerics import linalg
from lip_jax.numerics.chunks import rows_used
from lip_jax.rows.labels import Rows
from lip_jax.sums.moments import Moments, centred, from_zero, moments_of

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


def inverse_of(factors: RidgeFactors, ridge: Scalar) -> jax.Array:
    """`1/(e + λ)`, and 0 in a direction that neither data nor penalty determine."""
    eigenvalues = factors.eigenvalues
    tolerance = eigenvalues.shape[0] * jnp.finfo(eigenvalues.dtype).eps * eigenvalues.max()
    held = eigenvalues + ridge
    return linalg.reciprocal(held, held > tolerance)


def ridge_solution(factors: RidgeFactors, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kernel `(q, l)` and intercept `(l,)` at one strength; the minimum-norm solution at 0."""
    kernel = linalg.matmul(factors.basis, factors.cross * inverse_of(factors, ridge)[:, None])
    return kernel, factors.mean_y - linalg.matmul(factors.mean_x[None, :], kernel)[0]


def residual_sum(factors: RidgeFactors, ridge: jax.Array) -> jax.Array:
    """`Σ w ‖y − ŷ‖²` at one strength, from the sums."""
    inverse = inverse_of(factors, ridge)
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
    freedom = n - int(intercept) - jnp.sum(factors.eigenvalues * inverse_of(factors, ridge))
    judged = freedom > n / 10
    return jnp.where(judged, n * residual_sum(factors, ridge) / jnp.where(judged, freedom, 1) ** 2, jnp.inf)
