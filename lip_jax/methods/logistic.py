"""Multinomial logistic readouts: `Σ w CE(y, Wᵀx + b) + λ/2 ‖W‖²` by preconditioned L-BFGS.

In the eigenbasis of the centred second moments, `G = Q diag(e) Qᵀ`, the objective's curvature is close to
diagonal, `κ e_i + λ` with `κ` the mean of `p(1 − p)` of the class. In the variables
`Θ = diag(√(κ e + λ)) Qᵀ W` it is close to the identity, so that L-BFGS needs tens of steps whatever the
conditioning of the features, and half the squared gradient estimates how far the objective is from its
minimum. `κ` falls as the fit becomes confident. The fit therefore runs in rounds: each computes `κ` again and
restarts L-BFGS. Convergence is tested with `κ` at the final point. Rows go through in chunks: a fit holds
neither `(n, l)` probabilities nor transformed features.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lip_jax._types import Scalar
from lip_jax.methods.protocol import Fit, Head, HeadPath, HeadStack, Needs, Readout, Settled, settled_readout
from lip_jax.numerics import linalg
from lip_jax.numerics.chunks import fold_rows, rows_used
from lip_jax.rows.labels import Rows, label_use, usable_rows
from lip_jax.rows.metrics import losses, row_weights, weighted_mean
from lip_jax.sums.ridge import RidgeFactors, ridge_factors, ridge_grid

# Strengths that are compared where none is given, a decade apart, the strongest first.
LOGISTIC_POINTS = 7
# The share of the log-loss of class frequencies below which features tell classes apart.
TELLS = 0.98
# While strengths are compared, a fit this close to its minimum is close enough.
COARSE = 1e-3
# Strengths on the path of candidates in mean eigenvalues; how closely and in how many steps each is fitted.
PATH_SHARES = (0.03, 0.003, 0.0003)
PATH_TOLERANCE = 1e-2
PATH_STEPS = 100
# Steps of the first round; later ones may take twice as many each.
ROUND_STEPS = 20


class _Fitted(NamedTuple):
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


def _look(
    rows: Rows,
    stop: jax.Array | None,
    factors: RidgeFactors,
    kernel: jax.Array,
    bias: jax.Array,
    ridge: jax.Array,
    *,
    intercept: bool,
) -> _Point:
    """The objective, its gradient and `Σ w p_c(1 − p_c)`, in one pass."""
    dtype = kernel.dtype
    l = kernel.shape[1]

    def step(sums: tuple, rows: Rows, fresh: jax.Array) -> tuple:
        x, y, w, _ = usable_rows(rows, fresh, l, dtype)
        x = jnp.where(w[:, None] > 0, x - factors.mean_x[None, :], 0)
        logits = linalg.matmul(x, kernel) + bias[None, :]
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
            linalg.matmul(residual.T, x).T,
            jnp.sum(residual, axis=0),
            jnp.sum((w * mass)[:, None] * p * (1 - p), axis=0),
        )
        return jax.tree.map(jnp.add, sums, added), None

    start = (jnp.zeros((), dtype), jnp.zeros_like(kernel), jnp.zeros_like(bias), jnp.zeros_like(bias))
    (loss, by_kernel, by_bias, curvature), _ = fold_rows(step, start, rows, stop=stop)
    loss = loss + ridge / 2 * jnp.sum(kernel**2)
    return _Point(kernel, bias, loss, by_kernel + ridge * kernel, int(intercept) * by_bias, curvature)


def _scales(factors: RidgeFactors, curvature: jax.Array, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a step of length 1 in the preconditioned variables is in kernel, `(q, l)`, and bias, `(l,)`."""
    q, l = factors.cross.shape
    total = jnp.where(factors.total > 0, factors.total, 1)
    # Rows that are sure of their labels have next to no curvature: a floor keeps steps in bounds.
    curvature = jnp.maximum(curvature / total, curvature.mean() / total / 10)
    curvature = jnp.maximum(curvature, 1e-4 / l)
    held = curvature[None, :] * factors.eigenvalues[:, None] + ridge
    held = jnp.maximum(held, q * jnp.finfo(held.dtype).eps * held.max())
    return jax.lax.rsqrt(held), jax.lax.rsqrt(curvature * total)


def fit_logistic(
    factors: RidgeFactors,
    rows: Rows,
    ridge: Scalar,
    init: tuple | None,
    tolerance: Scalar,
    max_steps: Scalar,
    *,
    intercept: bool,
) -> _Fitted:
    """Minimise from the better of `init` and the class frequencies, until `gap ≤ tolerance · objective`.

    Rows after the last that has weight cost nothing: put those first that count.
    """
    import optax

    dtype = factors.basis.dtype
    q, l = factors.cross.shape
    ridge = jnp.asarray(ridge, dtype)
    look = partial(_look, rows, rows_used(rows.weights), factors, ridge=ridge, intercept=intercept)
    frequencies = jax.nn.log_softmax(jnp.log(factors.mass + 0.5)) if intercept else jnp.zeros(l, dtype)
    start = look(jnp.zeros((q, l), dtype), frequencies)
    if init is not None:
        kernel = init[0].astype(dtype)
        bias = jnp.zeros(l, dtype) if init[1] is None or not intercept else init[1].astype(dtype)
        shift = linalg.matmul(factors.mean_x[None, :], kernel)[0] if intercept else jnp.zeros_like(bias)
        given = look(kernel, bias + shift)
        start = jax.tree.map(partial(jnp.where, given.loss < start.loss), given, start)

    # The scaling is the preconditioner: the first step is the gradient's own.
    search = optax.lbfgs(scale_init_precond=False)

    def gap_of(grad: tuple) -> jax.Array:
        return (jnp.sum(grad[0] ** 2) + jnp.sum(grad[1] ** 2)) / 2

    def scaled_grad(point: _Point, scales: tuple) -> tuple:
        return scales[0] * linalg.matmul(factors.basis.T, point.by_kernel), scales[1] * point.by_bias

    def search_on(carry: tuple) -> tuple:
        point, _, steps, length, _ = carry
        scales = _scales(factors, point.curvature, ridge)

        def moved(by: tuple) -> _Point:
            kernel = point.kernel + linalg.matmul(factors.basis, scales[0] * by[0])
            return look(kernel, point.bias + scales[1] * by[1])

        def value_and_grad(by: tuple) -> tuple:
            here = moved(by)
            return here.loss, scaled_grad(here, scales)

        @jax.custom_vjp
        def objective(by: tuple) -> jax.Array:
            return value_and_grad(by)[0]

        objective.defvjp(value_and_grad, lambda grad, scale: (jax.tree.map(lambda part: scale * part, grad),))
        last = jnp.minimum(steps + length, max_steps)

        def unfinished(inner: tuple) -> jax.Array:
            _, state, step, before = inner
            value, grad = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
            far = (gap_of(grad) > tolerance / 2 * value) & (value < before)
            return (step == steps) | (far & (step < last))

        def advance(inner: tuple) -> tuple:
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
        gap = gap_of(scaled_grad(point, _scales(factors, point.curvature, ridge)))
        return point, gap, steps, 2 * length, stalled

    def unfinished(carry: tuple) -> jax.Array:
        point, gap, steps, _, stalled = carry
        return (gap > tolerance * point.loss) & (steps < max_steps) & ~stalled

    gap = gap_of(scaled_grad(start, _scales(factors, start.curvature, ridge)))
    # optax mixes dtypes, which a user may have forbidden.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        none, length = jnp.zeros((), jnp.int32), jnp.asarray(ROUND_STEPS, jnp.int32)
        carry = start, gap, none, length, jnp.asarray(False)
        point, gap, steps, _, stalled = jax.lax.while_loop(unfinished, search_on, carry)
    bias = point.bias
    if intercept:
        bias = bias - linalg.matmul(factors.mean_x[None, :], point.kernel)[0]
        bias = bias - bias.mean()
    return _Fitted(point.kernel, bias, point.loss, gap, steps, stalled)


@dataclass(frozen=True)
class Logistic:
    """A logistic readout as a method: `linear_readout` with `solver="logistic"`, started from the head.

    Attributes:
        strength: `λ ≥ 0`; None: chosen by evidence, or without any by the log-loss on a fifth of the rows.
        tolerance: As in `linear_readout`, where no evidence chooses; candidates are fitted to 1e-2.
        max_steps: As in `linear_readout`, where no evidence chooses; candidates take 100 at most.
    """

    strength: Scalar | None = None
    tolerance: float = 1e-7
    max_steps: int = 500

    name: ClassVar[str] = "logistic"
    needs: ClassVar[Needs] = "factors"
    refits: ClassVar[bool] = False

    def path(self, head: Head, fit: Fit) -> HeadPath:
        """A readout at each of three strengths, or at the one that is given, each started from the last."""
        assert fit.factors is not None
        factors, intercept = fit.factors, head.bias is not None
        dtype = factors.total.dtype
        mean = jnp.where(factors.total > 0, factors.eigenvalues.mean(), 1)
        grid = mean * jnp.asarray(PATH_SHARES, dtype)
        if self.strength is not None:
            grid = jnp.asarray(self.strength, dtype).reshape(1)

        def at(start: Head, ridge: jax.Array) -> tuple[Head, Head]:
            limits = PATH_TOLERANCE, PATH_STEPS
            found = fit_logistic(factors, fit.rows, ridge, start, *limits, intercept=intercept)
            readout = Head(found.kernel, found.bias)
            return readout, readout

        bias = jnp.zeros(head.kernel.shape[1], dtype) if head.bias is None else head.bias.astype(dtype)
        _, heads = jax.lax.scan(at, Head(head.kernel.astype(dtype), bias), grid)
        stored = Head(heads.kernel.astype(head.kernel.dtype), None)
        if head.bias is not None and heads.bias is not None:
            stored = stored._replace(bias=heads.bias.astype(head.bias.dtype))
        return HeadStack(grid, stored, jnp.asarray(True))

    def settle(self, head: Head, fit: Fit) -> Settled:
        """The readout at the strength that is given, or at the one that held-out rows prefer."""
        assert fit.factors is not None
        intercept = head.bias is not None
        found = logistic_readout(
            fit.factors, fit.rows, self.strength, head, self.tolerance, self.max_steps, intercept=intercept
        )
        return settled_readout(found, head)


@partial(jax.jit, static_argnames=("intercept",))
def logistic_readout(
    factors: RidgeFactors,
    rows: Rows,
    ridge: Scalar | None,
    init: Head | None,
    tolerance: Scalar,
    max_steps: Scalar,
    *,
    intercept: bool,
) -> Readout:
    """Logistic regression on checked arguments."""
    l = factors.cross.shape[1]
    tolerance = jnp.asarray(tolerance, factors.total.dtype)
    if ridge is None:
        ridge, init = _held_out_strength(rows, max_steps, l=l, intercept=intercept)
    ridge = jnp.asarray(ridge, factors.total.dtype)
    fit = fit_logistic(factors, rows, ridge, init, tolerance, max_steps, intercept=intercept)
    return Readout(
        kernel=fit.kernel,
        bias=fit.bias if intercept else None,
        scale=jnp.ones_like(factors.total),
        ridge=ridge,
        objective=fit.objective,
        gap=fit.gap,
        steps=fit.steps,
        converged=(fit.gap <= tolerance * fit.objective) | fit.stalled,
        ignored=factors.ignored,
    )


def _held_out_strength(rows: Rows, max_steps: Scalar, *, l: int, intercept: bool) -> tuple[jax.Array, Head]:
    """The strength with the least log-loss on a fifth of the rows, and the readout of the others at it.

    From the strongest on, each fit starts from the last. Once features are seen to tell anything, the
    first fit that is worse than the one before ends the search: weaker ones take most steps, and only follow
    the fitted rows more closely.
    """
    feats, labels, weights = rows
    n, dtype = feats.shape[0], linalg.compute_dtype(feats)
    weights = jnp.ones(n, dtype) if weights is None else weights.astype(dtype)
    # Drawn at random, as rows may come ordered, but always the same; every fifth of those that count.
    place = jax.random.permutation(jax.random.key(0), n)
    counted = ~label_use(labels, l).unlabelled & (weights > 0)
    held = (jnp.cumsum(counted[jnp.argsort(place)], dtype=jnp.int32)[place] - 1) % 5 == 0
    part = Rows(feats, labels, jnp.where(held, 0, weights))
    factors = ridge_factors(*part, l, intercept=intercept)
    # From 10² to 10⁻⁴ of the mean eigenvalue.
    grid = ridge_grid(factors, LOGISTIC_POINTS)[::-1]

    def unfinished(state: tuple) -> jax.Array:
        point, *_, done = state
        return (point < LOGISTIC_POINTS) & ~done

    def advance(state: tuple) -> tuple:
        point, last, best, place, (first, before, least), _ = state
        fit = fit_logistic(factors, part, grid[point], last, COARSE, max_steps, intercept=intercept)
        logits = linalg.logits_of(feats, fit.kernel, fit.bias)
        use = jnp.where(held, row_weights(logits, labels, weights), 0)
        loss = weighted_mean(losses(logits, labels), use).astype(dtype)
        first = jnp.where(point == 0, loss, first)
        made, better = Head(fit.kernel, fit.bias), loss < least
        best = jax.tree.map(partial(jnp.where, better), made, best)
        least = jnp.minimum(loss, least)
        done = (loss > before) & (least < TELLS * first)
        return point + 1, made, best, jnp.where(better, point, place), (first, loss, least), done

    q = feats.shape[1]
    start = Head(jnp.zeros((q, l), factors.total.dtype), jnp.zeros(l, factors.total.dtype))
    point, none = jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, dtype)
    state = point, start, start, point, (none, none, none), jnp.asarray(False)
    _, _, best, place, *_ = jax.lax.while_loop(unfinished, advance, state)
    # The part has four fifths of the rows, and of what the strength is weighed against.
    return 1.25 * grid[place], best
