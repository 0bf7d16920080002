"""The clean readout: the head replaced by a linear model learned on its inputs [li2020].

A network trained on wrong labels often has good features under a bad last layer. A linear model fitted to
those features on a small clean set, or on rows certified by `lip_jax.purify`, mends it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from lip_jax import _linalg
from lip_jax._checks import check_bias, check_kernel, check_ridge, describe
from lip_jax._types import Bias, Feats, Kernel, Labels, Scalar, Weights
from lip_jax.labels import Rows, as_rows, label_use
from lip_jax.logistic import fit_logistic
from lip_jax.metrics import losses, row_weights, weighted_mean
from lip_jax.moments import Moments
from lip_jax.refit import raise_if_ignored
from lip_jax.ridge import (
    Criterion,
    RidgePath,
    check_readout_rows,
    path_of,
    residual_sum,
    ridge_grid,
    ridge_path,
    ridge_solution,
    strength,
)

Solver = Literal["ridge", "logistic"]

# Logistic strengths that are tried where none is given, a decade apart, the strongest first.
LOGISTIC_POINTS = 7
# While strengths are compared, a fit this close to its minimum is close enough.
COARSE = 1e-3


@dataclass(frozen=True)
class Readout:
    """A linear readout, and how it was found.

    Attributes:
        kernel: `(q, l)`, float32 or float64 as the features.
        bias: `(l,)`, or None without intercept.
        ridge: `λ`, as given or as chosen.
        objective: What was minimised, at the solution.
        gap: An estimate of how far the objective is above its minimum; 0 for the closed form.
        steps: L-BFGS steps; 0 for the closed form.
        converged: Whether the gap is within the tolerance, or the objective as low as its precision can tell.
        ignored: How many rows could not be used.
    """

    kernel: Float[jax.Array, "q l"]
    bias: Float[jax.Array, "l"] | None
    ridge: Float[jax.Array, ""]
    objective: Float[jax.Array, ""]
    gap: Float[jax.Array, ""]
    steps: Int[jax.Array, ""]
    converged: Bool[jax.Array, ""]
    ignored: Int[jax.Array, ""]


jax.tree_util.register_dataclass(Readout, data_fields=tuple(Readout.__annotations__), meta_fields=())


def linear_readout(
    feats: Feats,
    labels: Labels,
    *,
    num_classes: int | None = None,
    solver: Solver = "ridge",
    ridge: Scalar | None = None,
    criterion: Criterion = "gcv",
    weights: Weights | None = None,
    intercept: bool = True,
    init: tuple[Kernel, Bias | None] | None = None,
    tolerance: float = 1e-7,
    max_steps: int = 500,
) -> Readout:
    """A linear model of the labels on features, by ridge in closed form or by logistic regression.

    `"ridge"`: `min Σ w ‖y − Wᵀx − b‖² + λ‖W‖²`; its scores estimate class frequencies and are no logits
    (fold in `lip_jax.fit_logit_scale`). `"logistic"`: `min Σ w CE(y, Wᵀx + b) + λ/2 ‖W‖²`, scikit-learn's
    with `λ = 1/C`, by preconditioned L-BFGS. The intercept is not penalised.

    Args:
        feats: Features `(n, q)`, any real floating dtype.
        labels: Class ids `(n,)` or targets `(n, l)`; the kinds are told in `lip_jax.labels`.
        num_classes: `l`; None: the width of targets, or the largest id plus one.
        solver: `"ridge"` or `"logistic"`.
        ridge: `λ ≥ 0`. None: for ridge by `criterion`, over six decades about the mean eigenvalue of the
            centred second moments; for logistic the strength, of seven a decade apart, with the least
            log-loss on a fifth of the rows, drawn by a fixed key, after fits to the others.
        criterion: For ridge: `"gcv"`, from the sums alone, or `"press"`, the exact leave-one-out error, which
            costs a pass over the rows for each of 61 strengths.
        weights: Weight of each row `(n,)`, at least 0.
        intercept: Whether to fit a bias.
        init: For logistic: a kernel `(q, l)` and bias `(l,)` or None to start from, such as the head that is
            replaced, where they are better than the class frequencies.
        tolerance: For logistic: the share of the objective it may lie above its minimum, by the estimate
            `½ gᵀH⁻¹g` with `H` simplified.
        max_steps: For logistic: when to stop all the same.

    Returns:
        A `Readout`.

    Raises:
        ValueError: If shapes do not fit, an option belongs to the other solver, or, where values can be seen,
            a row cannot be used. Under `jit` such rows count for nothing.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> labels = jnp.arange(300) % 3
        >>> feats = jax.random.normal(jax.random.key(0), (300, 5)).at[jnp.arange(300), labels].add(3.0)
        >>> readout = lip_jax.linear_readout(feats, labels)
        >>> float(lip_jax.head_metrics(feats @ readout.kernel + readout.bias[None, :], labels).accuracy) > 0.9
        True

    Reference:
        [li2020], the linear model on the learned representation; GCV: [golub1979]; L-BFGS: [liu1989].
    """
    check_solver(solver, init, criterion)
    l = check_readout_rows(feats, labels, num_classes, weights, ridge, criterion)
    if init is not None:
        init = _check_init(init, feats.shape[1], l)
    rows = Rows(*as_rows(feats, labels, weights, None)[:3])
    if solver == "ridge":
        found = ridge_readout(rows, ridge, l=l, criterion=criterion, intercept=intercept)
    else:
        found = logistic_readout(rows, ridge, init, tolerance, max_steps, l=l, intercept=intercept)
    raise_if_ignored(found.ignored, feats, labels, weights, l)
    return found


def linear_readout_from(moments: Moments, *, ridge: Scalar | None = None, intercept: bool = True) -> Readout:
    """A ridge readout from moments instead of rows: `linear_readout` with `solver="ridge"`.

    Args:
        moments: `Moments` of the rows.
        ridge: `λ ≥ 0`; None: by generalised cross-validation, which needs no rows either.
        intercept: Whether to fit a bias, which is not penalised.

    Returns:
        A `Readout`. Its scores are no logits.

    Raises:
        ValueError: If `moments` are none, or along one split, or `ridge` is negative.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> feats, labels = jax.random.normal(jax.random.key(0), (200, 8)), jnp.arange(200) % 4
        >>> moments = lip_jax.accumulate(lip_jax.moment_accumulator(q=8, l=4), [(feats, labels)])
        >>> readout, of_rows = lip_jax.linear_readout_from(moments), lip_jax.linear_readout(feats, labels)
        >>> bool(jnp.allclose(readout.kernel, of_rows.kernel, atol=1e-5))
        True

    Reference:
        [li2020], the linear model on the learned representation; GCV: [golub1979].
    """
    if not isinstance(moments, Moments):
        raise ValueError(
            f"moments must be lip_jax.Moments, as lip_jax.accumulate takes them with "
            f"lip_jax.moment_accumulator; got {type(moments).__name__}."
        )
    check_ridge(0.0 if ridge is None else ridge, "zero")
    return _readout_from(moments, ridge, intercept=intercept)


def check_solver(solver: str, init: Any, criterion: str) -> None:
    """Require a known solver, and no option that belongs to the other."""
    if solver not in ("ridge", "logistic"):
        raise ValueError(f"solver must be 'ridge' or 'logistic'; got {solver!r}.")
    if solver == "ridge" and init is not None:
        raise ValueError("init belongs to solver='logistic': a closed form starts nowhere. Leave it out.")
    if solver == "logistic" and criterion != "gcv":
        raise ValueError(
            f"criterion={criterion!r} belongs to solver='ridge': held-out rows choose the strength of a "
            f"logistic readout. Leave it out."
        )


def _check_init(init, q: int, l: int) -> tuple[jax.Array, jax.Array | None]:
    if not isinstance(init, tuple) or len(init) != 2:
        raise ValueError(f"init must be a pair (kernel, bias), the bias or None; got {type(init).__name__}.")
    kernel, bias = init
    check_kernel(kernel, "init's kernel")
    check_bias(bias, l)
    if kernel.shape != (q, l):
        raise ValueError(f"init's kernel must have shape (q, l) = ({q}, {l}); got {describe(kernel)}.")
    return jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)


@partial(jax.jit, static_argnames=("l", "criterion", "intercept"))
def ridge_readout(rows: Rows, ridge, *, l: int, criterion: Criterion, intercept: bool) -> Readout:
    """The closed form on checked arguments."""
    path = ridge_path(*rows, l, intercept=intercept)
    return _at_strength(
        path, strength(path, rows, ridge, criterion, intercept=intercept), intercept=intercept
    )


@partial(jax.jit, static_argnames=("intercept",))
def _readout_from(moments: Moments, ridge, *, intercept: bool) -> Readout:
    path = path_of(moments, intercept=intercept)
    return _at_strength(path, strength(path, None, ridge, "gcv", intercept=intercept), intercept=intercept)


def _at_strength(path: RidgePath, ridge: jax.Array, *, intercept: bool) -> Readout:
    kernel, bias = ridge_solution(path, ridge)
    zero = jnp.zeros_like(path.total)
    return Readout(
        kernel=kernel,
        bias=bias if intercept else None,
        ridge=ridge,
        objective=residual_sum(path, ridge) + ridge * jnp.sum(kernel**2),
        gap=zero,
        steps=jnp.zeros((), jnp.int32),
        converged=jnp.asarray(True),
        ignored=path.ignored,
    )


@partial(jax.jit, static_argnames=("l", "intercept"))
def logistic_readout(rows: Rows, ridge, init, tolerance, max_steps, *, l: int, intercept: bool) -> Readout:
    """Logistic regression on checked arguments."""
    path = ridge_path(*rows, l, intercept=intercept)
    tolerance = jnp.asarray(tolerance, path.total.dtype)
    if ridge is None:
        ridge = _held_out_strength(rows, max_steps, l=l, intercept=intercept)
    ridge = jnp.asarray(ridge, path.total.dtype)
    fit = fit_logistic(path, rows, ridge, init, tolerance, max_steps, intercept=intercept)
    return Readout(
        kernel=fit.kernel,
        bias=fit.bias if intercept else None,
        ridge=ridge,
        objective=fit.objective,
        gap=fit.gap,
        steps=fit.steps,
        converged=(fit.gap <= tolerance * fit.objective) | fit.stalled,
        ignored=path.ignored,
    )


def _held_out_strength(rows: Rows, max_steps, *, l: int, intercept: bool) -> jax.Array:
    """The strength of the path with the least log-loss on a fifth of the rows; a fit starts from the last."""
    feats, labels, weights = rows
    n, dtype = feats.shape[0], _linalg.compute_dtype(feats)
    weights = jnp.ones(n, dtype) if weights is None else weights.astype(dtype)
    # Drawn at random, as rows may come ordered, but always the same; every fifth of those that count.
    place = jax.random.permutation(jax.random.key(0), n)
    counted = ~label_use(labels, l).unlabelled & (weights > 0)
    held = (jnp.cumsum(counted[jnp.argsort(place)], dtype=jnp.int32)[place] - 1) % 5 == 0
    part = Rows(feats, labels, jnp.where(held, 0, weights))
    path = ridge_path(*part, l, intercept=intercept)

    def at(init, ridge):
        fit = fit_logistic(path, part, ridge, init, COARSE, max_steps, intercept=intercept)
        logits = _linalg.logits_of(feats, fit.kernel, fit.bias)
        use = jnp.where(held, row_weights(logits, labels, weights), 0)
        return (fit.kernel, fit.bias), weighted_mean(losses(logits, labels), use)

    # From 10² to 10⁻⁴ of the mean eigenvalue.
    grid = ridge_grid(path, LOGISTIC_POINTS)[::-1]
    q = feats.shape[1]
    start = jnp.zeros((q, l), path.total.dtype), jnp.zeros(l, path.total.dtype)
    _, losses_at = jax.lax.scan(at, start, grid)
    # The part has four fifths of the rows, and of what the strength is weighed against.
    return 1.25 * grid[jnp.argmin(losses_at)]
