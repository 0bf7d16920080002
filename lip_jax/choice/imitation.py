"""Imitation: a stand-in for the head that can be judged on rows the head has seen.

A head cannot be judged on the rows it was trained on, but its recipe can. The stand-in is the logistic
readout of those rows at the L2 strength at which it has the norm of the head, both less their mean over
classes. Fitted without a fold, it is judged on that fold. It speaks for the head only where it resembles it:
the cosine of their logits on all rows, less their means over classes and rows, is .975 to 1 for heads trained
on these labels, and .36 to .77 for heads trained on others.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lip_jax._results import ShortRepr
from lip_jax.choice.evidence import logits_on
from lip_jax.methods.logistic import PATH_STEPS, PATH_TOLERANCE, fit_logistic
from lip_jax.methods.protocol import Head
from lip_jax.rows.labels import Rows
from lip_jax.rows.metrics import row_weights, weighted_mean
from lip_jax.sums.ridge import RidgeFactors, ridge_factors

RESEMBLES = 0.95
# Strengths that are tried, in mean eigenvalues, how many at most, with how many steps each, and how closely
# norms must agree.
LEAST_SHARE, MOST_SHARE = 1e-6, 1e3
FIRST_SHARE = 1e-3
SEARCHES = 8
SEARCH_STEPS = 50
CLOSE = 0.03


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Imitation(ShortRepr):
    """How closely a readout of the same rows resembles the head.

    Attributes:
        strength: The L2 strength at which it has the norm of the head.
        cosine: Of the logits of the two on all rows.
        agreement: Share of rows on which both predict one class.
        resembles: Whether the cosine is at least 0.95, so that the readout may stand for the head.
    """

    strength: Float[jax.Array, ""]
    cosine: Float[jax.Array, ""]
    agreement: Float[jax.Array, ""]
    resembles: Bool[jax.Array, ""]


def readout_at(
    factors: RidgeFactors, rows: Rows, strength: jax.Array, start: Head, max_steps: int = PATH_STEPS
) -> Head:
    """The logistic readout at one strength, in the dtypes of the head it starts from."""
    limits = PATH_TOLERANCE, max_steps
    found = fit_logistic(factors, rows, strength, start, *limits, intercept=start.bias is not None)
    bias = None if start.bias is None else found.bias.astype(start.bias.dtype)
    return Head(found.kernel.astype(start.kernel.dtype), bias)


def stand_in(head: Head, rows: Rows, strength: jax.Array, total: jax.Array) -> Head:
    """The readout of some of the rows; the strength counts for `total`, the weight of all of them."""
    factors = ridge_factors(*rows, head.kernel.shape[1], intercept=head.bias is not None)
    share = factors.total / jnp.where(total > 0, total, 1)
    # Not from the head, which has seen the rows that are left out.
    nothing = jax.tree.map(jnp.zeros_like, head)
    return readout_at(factors, rows, strength * share, nothing)


@jax.jit
def imitate(head: Head, rows: Rows) -> Imitation:
    """The readout with the norm of the head, and how far it resembles the head."""
    factors = ridge_factors(*rows, head.kernel.shape[1], intercept=head.bias is not None)
    dtype = factors.total.dtype
    target = _norm(head, dtype)
    unit = jnp.mean(factors.eigenvalues)
    unit = jnp.where(unit > 0, unit, 1)
    low, high = jnp.log(LEAST_SHARE * unit), jnp.log(MOST_SHARE * unit)

    def unfinished(state: tuple) -> jax.Array:
        step, _, _, miss, *_ = state
        return (step < SEARCHES) & (jnp.abs(miss) > CLOSE)

    def search(state: tuple) -> tuple:
        step, at, made, _, low, high, slope, before = state
        made = readout_at(factors, rows, jnp.exp(at), made, SEARCH_STEPS)
        norm = _norm(made, dtype)
        miss = jnp.log(norm / target)
        # The norm falls as the strength grows, about as a power of it.
        moved = at - before[0]
        seen = (miss - before[1]) / jnp.where(moved == 0, 1, moved)
        slope = jnp.where((step > 0) & (seen < -0.02), seen, slope)
        low, high = jnp.where(miss > 0, at, low), jnp.where(miss > 0, high, at)
        to = at - miss / slope
        inside = (to > low) & (to < high)
        to = jnp.where(inside, to, (low + high) / 2)
        return step + 1, to, made, miss, low, high, slope, (at, miss)

    start = jnp.log(FIRST_SHARE * unit)
    nothing = jnp.zeros((), dtype)
    state = (
        jnp.zeros((), jnp.int32), start, head, nothing + jnp.inf, low, high, nothing - 0.4, (start, nothing),
    )  # fmt: skip
    _, _, made, *_, (at, _) = jax.lax.while_loop(unfinished, search, state)
    mine, theirs = logits_on(head, rows), logits_on(made, rows)
    weights = row_weights(mine, rows.labels, rows.weights)
    agreement = weighted_mean((jnp.argmax(mine, axis=1) == jnp.argmax(theirs, axis=1)).astype(dtype), weights)
    cosine = _cosine(mine.astype(dtype), theirs.astype(dtype), weights)
    return Imitation(jnp.exp(at), cosine, agreement, (target > 0) & (cosine >= RESEMBLES))


def _norm(head: Head, dtype: jnp.dtype) -> jax.Array:
    kernel = head.kernel.astype(dtype)
    return jnp.sqrt(jnp.sum((kernel - kernel.mean(axis=1, keepdims=True)) ** 2))


def _cosine(first: jax.Array, second: jax.Array, weights: jax.Array) -> jax.Array:
    """Of logits less their means over classes and rows."""
    used = weights[:, None] > 0
    share = weights / jnp.where(jnp.sum(weights) > 0, jnp.sum(weights), 1)

    def centred(logits: jax.Array) -> jax.Array:
        logits = jnp.where(used, logits - logits.mean(axis=1, keepdims=True), 0)
        return jnp.where(used, logits - jnp.sum(share[:, None] * logits, axis=0)[None, :], 0)

    first, second = centred(first), centred(second)
    product = lambda a, b: jnp.sum(weights[:, None] * a * b)  # noqa: E731
    size = jnp.sqrt(product(first, first) * product(second, second))
    return jnp.where(size > 0, product(first, second) / jnp.where(size > 0, size, 1), 0)
