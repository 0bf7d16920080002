"""The clean readout: the head replaced by a linear model learned on its inputs [li2020].

A network trained on wrong labels often has good features under a bad last layer. A linear model fitted to
those features on a small clean set, or on rows certified by `lip_jax.purify`, mends it.
"""

from typing import Any, Literal

import jax.numpy as jnp

from lip_jax._checks import check_bias, check_kernel, check_ridge, describe
from lip_jax._types import Bias, Feats, Kernel, Labels, Scalar, Weights
from lip_jax.methods.logistic import logistic_readout
from lip_jax.methods.protocol import Head, Readout
from lip_jax.methods.ridge import readout_from_moments, ridge_readout
from lip_jax.quality.left_out import Criterion, check_readout_rows
from lip_jax.rows.checks import check_several_classes, check_validation, raise_if_ignored
from lip_jax.rows.labels import Rows, as_rows
from lip_jax.sums.moments import Moments
from lip_jax.sums.ridge import ridge_factors

Solver = Literal["ridge", "logistic"]


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

    Both give logits. `"ridge"`: `min Σ w ‖y − Wᵀx − b‖² + λ‖W‖²`, whose scores estimate class frequencies,
    times one logit scale: the `lip_jax.fit_logit_scale` of its leave-one-out scores. `"logistic"`:
    `min Σ w CE(y, Wᵀx + b) + λ/2 ‖W‖²`, scikit-learn's with `λ = 1/C`, by preconditioned L-BFGS. The
    intercept is not penalised.

    Args:
        feats: Features `(n, q)`, any real floating dtype.
        labels: Class ids `(n,)` or targets `(n, l)`; the kinds are told in `lip_jax.rows`.
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
            replaced, where they are better than the class frequencies. Without `ridge` the fit starts from
            the one that chose it.
        tolerance: For logistic: the share of the objective it may lie above its minimum, by the estimate
            `½ gᵀH⁻¹g` with `H` simplified.
        max_steps: For logistic: when to stop all the same.

    Returns:
        A `Readout`.

    Raises:
        ValueError: If shapes do not fit, `init` or `criterion` belongs to the other solver, or, where values
            can be seen, a row cannot be used. Under `jit` such rows count for nothing.

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
    check_several_classes(l)
    if init is not None:
        init = _check_init(init, feats.shape[1], l)
    rows = Rows(*as_rows(feats, labels, weights, None)[:3])
    factors = ridge_factors(*rows, l, intercept=intercept)
    if solver == "ridge":
        found = ridge_readout(factors, rows, ridge, criterion=criterion, intercept=intercept)
    else:
        found = logistic_readout(factors, rows, ridge, init, tolerance, max_steps, intercept=intercept)
    raise_if_ignored(found.ignored, feats, labels, weights, l)
    return found


def linear_readout_from(
    moments: Moments,
    *,
    validation: tuple | None = None,
    ridge: Scalar | None = None,
    intercept: bool = True,
) -> Readout:
    """A ridge readout from moments instead of rows: `linear_readout` with `solver="ridge"`.

    Moments determine the least-squares solution, but not the scale at which its scores are logits. A few rows
    do, best ones that are not in the moments.

    Args:
        moments: `Moments` of the rows.
        validation: `(feats, labels)` or `(feats, labels, weights)` to fit the logit scale to. None: scores
            are not scaled, `scale` is None, and `lip_jax.replace_head` refuses the readout.
        ridge: `λ ≥ 0`; None: by generalised cross-validation, which needs no rows either.
        intercept: Whether to fit a bias, which is not penalised.

    Returns:
        A `Readout`.

    Raises:
        ValueError: If `moments` are none, or along one split, `ridge` is negative, or rows cannot be used.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> feats, labels = jax.random.normal(jax.random.key(0), (200, 8)), jnp.arange(200) % 4
        >>> moments = lip_jax.accumulate(lip_jax.moment_accumulator(q=8, l=4), [(feats, labels)])
        >>> readout, of_rows = lip_jax.linear_readout_from(moments), lip_jax.linear_readout(feats, labels)
        >>> bool(jnp.allclose(readout.kernel, of_rows.kernel / of_rows.scale, atol=1e-5))
        True

    Reference:
        [li2020], the linear model on the learned representation; GCV: [golub1979].
    """
    if not isinstance(moments, Moments):
        raise ValueError(
            f"moments must be lip_jax.sums.Moments, as lip_jax.accumulate takes them with "
            f"lip_jax.moment_accumulator; got {type(moments).__name__}."
        )
    check_ridge(0.0 if ridge is None else ridge, "zero")
    q, l = moments.cross.shape
    check_several_classes(l)
    rows = None if validation is None else check_validation(validation, q, l)[0]
    return readout_from_moments(moments, rows, ridge, intercept=intercept)


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


def _check_init(init: Any, q: int, l: int) -> Head:
    if not isinstance(init, tuple) or len(init) != 2:
        raise ValueError(f"init must be a pair (kernel, bias), the bias or None; got {type(init).__name__}.")
    kernel, bias = init
    check_kernel(kernel, "init's kernel")
    check_bias(bias, l)
    if kernel.shape != (q, l):
        raise ValueError(f"init's kernel must have shape (q, l) = ({q}, {l}); got {describe(kernel)}.")
    return Head(jnp.asarray(kernel), None if bias is None else jnp.asarray(bias))
