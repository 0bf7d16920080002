"""Multinomial logistic readouts: `Σ w CE(y, Wᵀx + b) + λ/2 ‖W‖²` by preconditioned L-BFGS.

In the eigenbasis of the centred second moments, `G = Q diag(e) Qᵀ`, the objective's curvature is close to
diagonal, `κ e_i + λ` with `κ` the mean of `p(1 − p)` of the class. In the variables
`Θ = diag(√(κ e + λ)) Qᵀ W` it is close to the identity, so that L-BFGS needs tens of steps whatever the
conditioning of the features, and half the squared gradient estimates how far the objective is from its
minimum. As `κ` falls while the model grows sure of its labels, it is taken anew in each of a few rounds, and
the last word is that of a fresh one. Rows go through in chunks; neither `(n, l)` probabilities nor
transformed features are held.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lip_jax import _linalg
from lip_jax._chunks import fold_rows, rows_used
from lip_jax.labels import Rows, usable_rows
from lip_jax.ridge import RidgePath

# Steps of the first round; later ones may take twice as many each.
ROUND_STEPS = 20


class Fit(NamedTuple):
    """Kernel, bias, and how the search ended; `gap` estimates the distance to the minimum.

    `stalled`: the objective could not be lowered any further in its precision.
    """

    kernel: jax.Array
    bias: jax.Array
    objective: jax.Array
    gap: jax.Array
    steps: jax.Array
    stalled: jax.Array


class _Point(NamedTuple):
    """Kernel and bias of logits `(x − μ) W + b`, with what one pass over the rows says of them."""

    kernel: jax.Array
    bias: jax.Array
    loss: jax.Array
    by_kernel: jax.Array
    by_bias: jax.Array
    curvature: jax.Array


def _look(rows: Rows, stop, path: RidgePath, kernel, bias, ridge, *, intercept: bool) -> _Point:
    """The objective, its gradient and `Σ w p_c(1 − p_c)`, in one pass."""
    dtype = kernel.dtype
    l = kernel.shape[1]

    def step(sums, rows, fresh):
        x, y, w, _ = usable_rows(rows, fresh, l, dtype)
        x = jnp.where(w[:, None] > 0, x - path.mean_x[None, :], 0)
        logits = _linalg.matmul(x, kernel) + bias[None, :]
        log_z = jax.nn.logsumexp(logits, axis=1)
        p = jnp.exp(logits - log_z[:, None])
        if y.ndim == 1:
            at_label = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
            mass = jnp.ones_like(w)
            residual = p.at[jnp.arange(y.shape[0]), y].add(-1)
        else:
            at_label, mass = jnp.sum(y * logits, axis=1), jnp.sum(y, axis=1)
            residual = mass[:, None] * p - y
        residual = w[:, None] * residual
        added = (
            jnp.sum(w * (mass * log_z - at_label)),
            _linalg.matmul(residual.T, x).T,
            jnp.sum(residual, axis=0),
            jnp.sum((w * mass)[:, None] * p * (1 - p), axis=0),
        )
        return jax.tree.map(jnp.add, sums, added), None

    start = (jnp.zeros((), dtype), jnp.zeros_like(kernel), jnp.zeros_like(bias), jnp.zeros_like(bias))
    (loss, by_kernel, by_bias, curvature), _ = fold_rows(step, start, rows, stop=stop)
    loss = loss + ridge / 2 * jnp.sum(kernel**2)
    return _Point(kernel, bias, loss, by_kernel + ridge * kernel, int(intercept) * by_bias, curvature)


def _scales(path: RidgePath, curvature, ridge) -> tuple[jax.Array, jax.Array]:
    """What a step of length 1 in the preconditioned variables is in kernel, `(q, l)`, and bias, `(l,)`."""
    q, l = path.cross.shape
    total = jnp.where(path.total > 0, path.total, 1)
    # Rows that are sure of their labels have next to no curvature: a floor keeps steps in bounds.
    curvature = jnp.maximum(curvature / total, curvature.mean() / total / 10)
    curvature = jnp.maximum(curvature, 1e-4 / l)
    held = curvature[None, :] * path.eigenvalues[:, None] + ridge
    held = jnp.maximum(held, q * jnp.finfo(held.dtype).eps * held.max())
    return jax.lax.rsqrt(held), jax.lax.rsqrt(curvature * total)


def fit_logistic(
    path: RidgePath, rows: Rows, ridge, init: tuple | None, tolerance, max_steps, *, intercept: bool
) -> Fit:
    """Minimise from the better of `init` and the class frequencies, until `gap ≤ tolerance · objective`.

    Rows after the last that has weight cost nothing: put those first that count.
    """
    import optax

    dtype = path.basis.dtype
    q, l = path.cross.shape
    ridge = jnp.asarray(ridge, dtype)
    look = partial(_look, rows, rows_used(rows.weights), path, ridge=ridge, intercept=intercept)
    frequencies = jax.nn.log_softmax(jnp.log(path.mass + 0.5)) if intercept else jnp.zeros(l, dtype)
    start = look(jnp.zeros((q, l), dtype), frequencies)
    if init is not None:
        kernel = init[0].astype(dtype)
        bias = jnp.zeros(l, dtype) if init[1] is None or not intercept else init[1].astype(dtype)
        shift = _linalg.matmul(path.mean_x[None, :], kernel)[0] if intercept else jnp.zeros_like(bias)
        given = look(kernel, bias + shift)
        start = jax.tree.map(partial(jnp.where, given.loss < start.loss), given, start)

    # The scaling is the preconditioner: the first step is the gradient's own.
    search = optax.lbfgs(scale_init_precond=False)

    def gap_of(grad):
        return (jnp.sum(grad[0] ** 2) + jnp.sum(grad[1] ** 2)) / 2

    def scaled_grad(point: _Point, scales):
        return scales[0] * _linalg.matmul(path.basis.T, point.by_kernel), scales[1] * point.by_bias

    def search_on(carry):
        point, _, steps, length, _ = carry
        scales = _scales(path, point.curvature, ridge)

        def moved(by):
            kernel = point.kernel + _linalg.matmul(path.basis, scales[0] * by[0])
            return look(kernel, point.bias + scales[1] * by[1])

        def value_and_grad(by):
            here = moved(by)
            return here.loss, scaled_grad(here, scales)

        @jax.custom_vjp
        def objective(by):
            return value_and_grad(by)[0]

        objective.defvjp(value_and_grad, lambda grad, scale: (jax.tree.map(lambda part: scale * part, grad),))
        last = jnp.minimum(steps + length, max_steps)

        def unfinished(inner):
            _, state, step, before = inner
            value, grad = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
            far = (gap_of(grad) > tolerance / 2 * value) & (value < before)
            return (step == steps) | (far & (step < last))

        def advance(inner):
            by, state, step, _ = inner
            value, grad = optax.value_and_grad_from_state(objective)(by, state=state)
            updates, state = search.update(grad, state, by, value=value, grad=grad, value_fn=objective)
            return jax.tree.map(jnp.add, by, updates), state, step + 1, value

        by = jnp.zeros_like(point.kernel), jnp.zeros_like(point.bias)
        inner = by, search.init(by), steps, point.loss
        by, _, steps, _ = jax.lax.while_loop(unfinished, advance, inner)
        found = moved(by)
        stalled = ~(found.loss < point.loss)
        point = jax.tree.map(partial(jnp.where, stalled), point, found)
        gap = gap_of(scaled_grad(point, _scales(path, point.curvature, ridge)))
        return point, gap, steps, 2 * length, stalled

    def unfinished(carry):
        point, gap, steps, _, stalled = carry
        return (gap > tolerance * point.loss) & (steps < max_steps) & ~stalled

    gap = gap_of(scaled_grad(start, _scales(path, start.curvature, ridge)))
    # optax mixes dtypes, which a user may have forbidden.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        none, length = jnp.zeros((), jnp.int32), jnp.asarray(ROUND_STEPS, jnp.int32)
        carry = start, gap, none, length, jnp.asarray(False)
        point, gap, steps, _, stalled = jax.lax.while_loop(unfinished, search_on, carry)
    bias = point.bias
    if intercept:
        bias = bias - _linalg.matmul(path.mean_x[None, :], point.kernel)[0]
        bias = bias - bias.mean()
    return Fit(point.kernel, bias, point.loss, gap, steps, stalled)
