"""The scale at which scores are logits: temperature scaling [guo2017]."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lip_jax._checks import check_floating
from lip_jax._types import Labels, Weights
from lip_jax.numerics import linalg
from lip_jax.rows.checks import check_labels, check_weights
from lip_jax.rows.labels import as_labels
from lip_jax.rows.metrics import Logits, corrected_losses, losses, row_weights, weighted_mean

# Steps to a logit scale: far more than Newton's method takes, and enough to halve the bracket to rounding.
SCALE_STEPS = 25
# Places at which the loss under label noise is compared first.
SCALE_GRID = 25


def fit_logit_scale(
    logits: Logits, labels: Labels, *, weights: Weights | None = None
) -> Float[jax.Array, ""]:
    """The scale `a > 0` that minimises the log-loss of `a · logits`: temperature scaling.

    Fold it into the head as `a · kernel`, `a · bias`. The loss is convex in `a`: Newton's method within a
    bracket that is bisected where a step leaves it. The bracket spans a factor 10⁴ either way of
    `a = 1/std(logits)`, where the answer is held for labels that are all right or all wrong. The loss is
    never above that of `a = 1`. Rows that cannot be used count for nothing even where they can be seen.

    Args:
        logits: `(n, l)`.
        labels: Class ids `(n,)` or targets `(n, l)`.
        weights: Weight of each row `(n,)`.

    Returns:
        A positive scalar; 1 where logits do not vary or no row counts.

    Raises:
        ValueError: If `logits` and `labels` do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> logits, labels = jnp.array([[1.0, 0.0]] * 4), jnp.array([0, 0, 0, 1])
        >>> round(float(lip_jax.fit_logit_scale(logits, labels)), 3)  # log(3/1)
        1.099

    Reference:
        [guo2017], temperature scaling.
    """
    check_floating(logits, "logits", "n l")
    check_labels(labels, *logits.shape)
    check_weights(weights, logits.shape[0])
    return logit_scale(
        jnp.asarray(logits), as_labels(labels), None if weights is None else jnp.asarray(weights)
    )


@jax.jit
def logit_scale(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None, transition: jax.Array | None = None
) -> jax.Array:
    """`fit_logit_scale` on checked arguments; with `P(given | true)` the labels are taken for noisy ones."""
    logits = logits.astype(linalg.compute_dtype(logits))
    weights = row_weights(logits, labels, weights)
    # Only differences between classes matter; so centred, the spread is that of the softmax. First less the
    # largest, so that equal logits become 0 exactly.
    centred = logits - jax.lax.stop_gradient(logits.max(axis=1, keepdims=True))
    centred = jnp.where(weights[:, None] > 0, centred - centred.mean(axis=1, keepdims=True), 0)
    square = weighted_mean(jnp.mean(centred**2, axis=1), weights)
    varies = (square > 0) & jnp.isfinite(square)
    spread = jnp.sqrt(jnp.where(varies, square, 1))
    unit = centred / spread

    def loss(log_scale: jax.Array) -> jax.Array:
        scaled = jnp.exp(log_scale) * unit
        if transition is None:
            return weighted_mean(losses(scaled, labels), weights)
        return weighted_mean(corrected_losses(scaled, labels, transition), weights)

    reach = jnp.log(jnp.asarray(1e4, unit.dtype))
    start, bracket = jnp.zeros_like(reach), (-reach, reach)
    if transition is not None:
        # Not convex: for the largest scales the loss may fall again. The least of a grid has a minimum near.
        grid = jnp.linspace(-reach, reach, SCALE_GRID)
        best = jnp.argmin(jax.lax.map(loss, jax.lax.stop_gradient(grid)))
        start = grid[best]
        bracket = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, SCALE_GRID - 1)]
    # Its derivative is that of the root, whatever the steps to it.
    log_scale = jax.lax.custom_root(
        jax.grad(loss), start, partial(_root_within, bracket=bracket), _divided_by
    )
    # An end of the bracket is no minimum: there, 1 may be better.
    better = varies & (loss(log_scale) <= loss(jnp.log(spread)))
    return jnp.where(better, jnp.exp(log_scale) / spread, 1)


def _root_within(slope: Callable, start: jax.Array, *, bracket: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Where a slope is 0, by Newton's method in a bracket; an end of it where that is nowhere."""
    settled = 4 * jnp.finfo(start.dtype).eps

    def moves(state: tuple) -> jax.Array:
        steps, _, _, moving = state
        return moving & (steps < SCALE_STEPS)

    def step(state: tuple) -> tuple:
        steps, at, (low, high), _ = state
        gradient, curvature = jax.jvp(slope, (at,), (jnp.ones_like(at),))
        low = jnp.where(gradient < 0, at, low)
        high = jnp.where(gradient > 0, at, high)
        convex = curvature > 0
        newton = at - gradient / jnp.where(convex, curvature, 1)
        # The ends count as inside: a converged iterate is one, and halving the bracket would throw it away.
        inside = convex & (newton >= low) & (newton <= high)
        to = jnp.where(gradient == 0, at, jnp.where(inside, newton, (low + high) / 2))
        return steps + 1, to, (low, high), jnp.abs(to - at) > settled * jnp.maximum(1, jnp.abs(at))

    state = jnp.zeros((), jnp.int32), start, bracket, jnp.asarray(True)
    return jax.lax.while_loop(moves, step, state)[1]


def _divided_by(slope_of: Callable, value: jax.Array) -> jax.Array:
    curvature = slope_of(jnp.ones_like(value))
    return value * linalg.reciprocal(curvature, curvature != 0)
