"""Ridge readouts as a method: `min Σ w ‖y − Wᵀx − b‖² + λ‖W‖²`, scaled to logits [li2020].

Scores of a ridge readout estimate class frequencies. As logits they would be far too timid, so they are
multiplied by one logit scale. It is fitted to leave-one-out scores, as those of fitted rows are too good to
judge by.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lip_jax._results import STATIC, ShortRepr
from lip_jax._types import Scalar
from lip_jax.methods.logit_scale import logit_scale
from lip_jax.methods.protocol import Fit, Head, HeadByHead, HeadPath, Needs, Readout, Settled, settled_readout
from lip_jax.numerics import linalg
from lip_jax.quality.left_out import Criterion, left_out, strength
from lip_jax.rows.labels import Rows, spread_over
from lip_jax.sums.moments import Moments
from lip_jax.sums.ridge import RidgeFactors, factors_of_moments, residual_sum, ridge_grid, ridge_solution

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class RidgeHeads(HeadByHead, ShortRepr):
    """The path of ridge readouts, each made where it is asked for.

    Attributes:
        strength: `λ`, `(p,)`.
        factors: The factors of the rows.
        dtype: Of the kernel.
        bias_dtype: Of the bias, or None where there is none.
    """

    strength: Float[jax.Array, "p"]
    factors: RidgeFactors
    dtype: Any = field(metadata=STATIC)
    bias_dtype: Any = field(metadata=STATIC)

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
def readout_from_moments(
    moments: Moments, rows: Rows | None, ridge: Scalar | None, *, intercept: bool
) -> Readout:
    """The readout at one strength, scaled by rows if there are any."""
    factors = factors_of_moments(moments, intercept=intercept)
    at = strength(factors, None, ridge, "gcv", intercept=intercept)
    if rows is None:
        return replace(_scaled(factors, at, jnp.ones_like(at), intercept=intercept), scale=None)
    kernel, bias = ridge_solution(factors, at)
    scores = linalg.logits_of(rows.feats, kernel, bias if intercept else None)
    return _scaled(factors, at, logit_scale(scores, rows.labels, rows.weights), intercept=intercept)


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
