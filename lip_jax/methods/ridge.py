"""Ridge readouts as a method: `min Σ w ‖y − Wᵀx − b‖² + λ‖W‖²`, scaled to logits [li2020].

Scores of a ridge readout estimate class frequencies. As logits they would be far too timid, so they are
multiplied by one logit scale. It is fitted to leave-one-out scores, as those of fitted rows are too good to
judge by.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lip_jax._results import ShortRepr, static
from lip_jax._types import Scalar
from lip_jax.methods.logit_scale import logit_scale
from lip_jax.methods.protocol import Fit, Head, HeadPath, Needs, Readout, Settled, over_heads, settled_readout
from lip_jax.numerics import linalg
from lip_jax.rows.labels import Rows, spread_over
from lip_jax.spectrum.split import SvdSplit
from lip_jax.sums.moments import Moments
from lip_jax.sums.ridge import (
    Criterion,
    RidgeFactors,
    factors_of_moments,
    left_out,
    residual_sum,
    ridge_grid,
    ridge_solution,
    strength,
)
from lip_jax.sums.tail import TailMoments

# Strengths on the path of candidates.
RIDGE_POINTS = 13
# The logit scale is fitted to so many scores, and to so many rows at least.
SCALE_CELLS = 2**22
SCALE_ROWS = 4000


@dataclass(frozen=True)
class Ridge:
    """A ridge readout as a method: `linear_readout` with `solver="ridge"`.

    Attributes:
        strength: `λ ≥ 0`; None: chosen by evidence, or without any by `criterion`.
        criterion: `"gcv"` or `"press"`, as in `linear_readout`.
    """

    strength: Scalar | None = None
    criterion: Criterion = "gcv"

    name: ClassVar[str] = "ridge"
    needs: ClassVar[Needs] = "factors"
    refits: ClassVar[bool] = False

    def path(self, head: Head, fit: Fit) -> HeadPath:
        """A readout at each of 13 strengths, or at the one that is given; scores, not yet logits."""
        assert fit.factors is not None
        grid = ridge_grid(fit.factors, RIDGE_POINTS)
        if self.strength is not None:
            grid = jnp.asarray(self.strength, grid.dtype).reshape(1)
        bias_dtype = None if head.bias is None else head.bias.dtype
        return RidgeHeads(grid, fit.factors, head.kernel.dtype, bias_dtype)

    def settle(self, head: Head, fit: Fit) -> Settled:
        """The readout at the strength that is given, or at the one its criterion prefers."""
        assert fit.factors is not None
        intercept = head.bias is not None
        found = ridge_readout(
            fit.factors, fit.rows, self.strength, criterion=self.criterion, intercept=intercept
        )
        return settled_readout(found, head)

    def from_moments(self, head: Head, moments: Moments | TailMoments, split: SvdSplit | None) -> Settled:
        """The same from moments, of which the criterion is GCV."""
        if split is not None or not isinstance(moments, Moments):
            raise ValueError(
                "moments must be lip_jax.sums.Moments for a readout, and split be left out: TailMoments say "
                "nothing beyond one head's components. Take them with lip_jax.moment_accumulator."
            )
        found = readout_from_moments(moments, self.strength, intercept=head.bias is not None)
        return settled_readout(found, head)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class RidgeHeads(ShortRepr):
    """The path of ridge readouts, each made where it is asked for.

    Attributes:
        strength: `λ`, `(p,)`.
        factors: The factors of the rows.
        dtype: Of the kernel.
        bias_dtype: Of the bias, or None where there is none.
    """

    strength: Float[jax.Array, "p"]
    factors: RidgeFactors
    dtype: Any = static()
    bias_dtype: Any = static()

    @property
    def available(self) -> Bool[jax.Array, ""]:
        """Always."""
        return jnp.asarray(True)

    def head(self, index: jax.Array | int) -> Head:
        """The candidate at one place of the path."""
        kernel, bias = ridge_solution(self.factors, self.strength[index])
        return Head(
            kernel.astype(self.dtype), None if self.bias_dtype is None else bias.astype(self.bias_dtype)
        )

    def over_logits(
        self, feats: jax.Array, reduce: Callable[[jax.Array], jax.Array]
    ) -> Float[jax.Array, "p ..."]:
        """`reduce` of the logits of each candidate, one after the other."""
        return over_heads(self, feats, reduce)


@partial(jax.jit, static_argnames=("criterion", "intercept"))
def ridge_readout(
    factors: RidgeFactors, rows: Rows, ridge: Scalar | None, *, criterion: Criterion, intercept: bool
) -> Readout:
    """The readout at one strength, scaled by leave-one-out scores."""
    at = strength(factors, rows, ridge, criterion, intercept=intercept)
    n, l = rows.feats.shape[0], factors.cross.shape[1]
    few = rows
    size = max(SCALE_CELLS // l, SCALE_ROWS)
    if n > size:
        picked = spread_over(rows, l, size)
        few = jax.tree.map(lambda part: part[picked], rows)
    scores = left_out(factors, few, at, lambda scores, y, w: scores, intercept=intercept)
    return _scaled(factors, at, logit_scale(scores, few.labels, few.weights), intercept=intercept)


@partial(jax.jit, static_argnames=("intercept",))
def readout_from_moments(moments: Moments, ridge: Scalar | None, *, intercept: bool) -> Readout:
    """The readout at one strength, scaled as the sums tell."""
    factors = factors_of_moments(moments, intercept=intercept)
    at = strength(factors, None, ridge, "gcv", intercept=intercept)
    return _scaled(factors, at, _scale_of_normal_classes(factors, moments, at), intercept=intercept)


def _scaled(factors: RidgeFactors, ridge: jax.Array, scale: jax.Array, *, intercept: bool) -> Readout:
    kernel, bias = ridge_solution(factors, ridge)
    return Readout(
        kernel=scale * kernel,
        bias=scale * bias if intercept else None,
        scale=scale,
        ridge=ridge,
        objective=residual_sum(factors, ridge) + ridge * jnp.sum(kernel**2),
        gap=jnp.zeros_like(factors.total),
        steps=jnp.zeros((), jnp.int32),
        converged=jnp.asarray(True),
        ignored=factors.ignored,
    )


def _scale_of_normal_classes(factors: RidgeFactors, moments: Moments, ridge: jax.Array) -> jax.Array:
    """The logit scale for classes that are normal with one covariance, from sums.

    Of two such classes the log-likelihood ratio is linear, and the difference of its means in the two is its
    variance within one. So `a = Σ π_c π_d Δwᵀ(m_c − m_d)/Σ π_c π_d Δwᵀ S Δw`, with `Δw = w_c − w_d`, class
    means `m` and the covariance `S` within classes. The factor `(1 − df/n)²` takes back what the fit has
    gained on its own rows, as in GCV.
    """
    kernel, _ = ridge_solution(factors, ridge)
    total, mass = factors.total, jnp.maximum(factors.mass, 0)
    # Σ w x̃ỹᵀ is also Σ w x̃yᵀ, as the deviations sum to 0: by class the mean times its mass.
    cross = linalg.matmul(factors.basis, factors.cross)
    share = linalg.reciprocal(mass, mass > 0)
    between = linalg.matmul(cross * share[None, :], cross.T)
    gram = linalg.matmul(factors.basis * factors.eigenvalues[None, :], factors.basis.T)
    within = gram - between
    # Sums over pairs are twice those over classes, of deviations from the mean over classes.
    pi = mass * linalg.reciprocal(jnp.sum(mass), jnp.sum(mass) > 0)
    centred = kernel - linalg.matmul(kernel, pi)[:, None]
    apart = jnp.sum(pi[None, :] * centred * cross * share[None, :])
    spread = jnp.sum(centred * linalg.matmul(within, centred) * pi[None, :])
    spread = spread * linalg.reciprocal(total, total > 0)
    held = factors.eigenvalues + ridge
    freedom = jnp.sum(factors.eigenvalues * linalg.reciprocal(held, held > 0))
    left = jnp.maximum(1 - freedom * linalg.reciprocal(total, total > 0), 0.1)
    known = (apart > 0) & (spread > 0)
    return jnp.where(known, left**2 * apart * linalg.reciprocal(spread, known), 1)
