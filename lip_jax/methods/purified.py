"""Readouts of the rows whose labels can be trusted: `lip_jax.purify`, then a readout of what is left."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from lip_jax._results import ShortRepr
from lip_jax._types import Bias, Feats, Kernel, Labels, Scalar, Weights
from lip_jax.methods.logistic import Logistic
from lip_jax.methods.protocol import Fit, Head, HeadPath, Needs, Readout, Settled, prepare
from lip_jax.methods.readout import Solver, check_solver, linear_readout
from lip_jax.methods.ridge import Ridge
from lip_jax.quality.rules import PurifiedRows, Rule, check_rule, purified_rows, trusted_rows
from lip_jax.quality.trust import label_quality

# How closely a logistic readout of trusted rows is fitted: the labels deserve no more.
TOLERANCE = 1e-2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class PurifiedReadout(ShortRepr):
    """A readout fitted to trusted rows.

    Attributes:
        readout: The readout.
        purified: The rows it was fitted to.
    """

    readout: Readout
    purified: PurifiedRows


def purified_readout(
    feats: Feats,
    labels: Labels,
    *,
    num_classes: int | None = None,
    weights: Weights | None = None,
    solver: Solver = "logistic",
    ridge: Scalar | None = None,
    intercept: bool = True,
    init: tuple[Kernel, Bias | None] | None = None,
    rule: Rule = "posterior",
    threshold: Scalar | None = None,
    top: int | None = None,
    min_per_class: int = 1,
) -> PurifiedReadout:
    """A readout of the rows whose labels can be trusted: `purify`, then `linear_readout` on what is left.

    Args:
        feats: Features `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`. Where targets hold several candidates, the readout is
            fitted to the best of them.
        num_classes: `l`; None: the width of targets, or the largest id plus one.
        weights: Weight of each row `(n,)`, at least 0.
        solver: `"logistic"` or `"ridge"`, as in `linear_readout`.
        ridge: `λ ≥ 0` of the readout, not of the purification; None: as in `linear_readout`.
        intercept: Whether to fit a bias.
        init: The head to start from, for logistic: `(kernel, bias)`.
        rule: As in `purify`, and so are the next three.
        threshold: For `"posterior"` and `"margin"`.
        top: For `"top"`.
        min_per_class: How many rows of each class to keep at least.

    Returns:
        A `PurifiedReadout`.

    Raises:
        ValueError: As `purify` and `linear_readout`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> true = jnp.arange(600) % 3
        >>> feats = jax.random.normal(jax.random.key(0), (600, 5)).at[jnp.arange(600), true].add(4.0)
        >>> given = lip_jax.noise.asymmetric(jax.random.key(1), true, 0.3, num_classes=3)
        >>> readout = lip_jax.purified_readout(feats, given, ridge=1.0).readout
        >>> bool(((feats @ readout.kernel + readout.bias[None, :]).argmax(axis=1) == true).mean() > 0.95)
        True

    Reference:
        [li2020] on a clean set; certifying one by leave-one-out is this package's.
    """
    check_solver(solver, init, "gcv")
    check_rule(rule, threshold, top, min_per_class)
    quality = label_quality(feats, labels, num_classes=num_classes, weights=weights, intercept=intercept)
    weights = None if weights is None else jnp.asarray(weights)
    purified = purified_rows(quality, weights, threshold, rule=rule, top=top, min_per_class=min_per_class)
    rows = trusted_rows(jnp.asarray(feats), purified)
    readout = linear_readout(
        rows.feats,
        rows.labels,
        num_classes=purified.kept.shape[0],
        solver=solver,
        ridge=ridge,
        weights=rows.weights,
        intercept=intercept,
        init=init,
        tolerance=TOLERANCE,
    )
    return PurifiedReadout(readout, purified)


@dataclass(frozen=True)
class Purified:
    """A readout of trusted rows as a method: `purified_readout`.

    Attributes:
        rule: As in `lip_jax.purify`, and so are the next three.
        threshold: For `"posterior"` and `"margin"`.
        top: For `"top"`.
        min_per_class: How many rows of each class to keep at least.
        solver: `"logistic"`, started from the head, or `"ridge"`.
        strength: `λ ≥ 0` of the readout; None: chosen by evidence, or without any as in `linear_readout`.
    """

    rule: Rule = "posterior"
    threshold: Scalar | None = None
    top: int | None = None
    min_per_class: int = 1
    solver: Solver = "logistic"
    strength: Scalar | None = None

    name: ClassVar[str] = "purified"
    needs: ClassVar[Needs] = "quality"
    refits: ClassVar[bool] = False

    def path(self, head: Head, fit: Fit) -> HeadPath:
        """Readouts of the trusted rows, at a few strengths or at the one that is given."""
        readout, trusted = self._trusted(head, fit)
        return readout.path(head, trusted)

    def settle(self, head: Head, fit: Fit) -> Settled:
        """The readout of the trusted rows at one strength."""
        readout, trusted = self._trusted(head, fit)
        return readout.settle(head, trusted)._replace(ignored=fit.ignored)

    def _trusted(self, head: Head, fit: Fit) -> tuple[Logistic | Ridge, Fit]:
        assert fit.quality is not None
        check_rule(self.rule, self.threshold, self.top, self.min_per_class)
        check_solver(self.solver, None, "gcv")
        purified = purified_rows(
            fit.quality,
            fit.rows.weights,
            self.threshold,
            rule=self.rule,
            top=self.top,
            min_per_class=self.min_per_class,
        )
        rows = trusted_rows(fit.rows.feats, purified)
        trusted = prepare(rows, head.kernel.shape[1], intercept=head.bias is not None, needs="factors")
        if self.solver == "ridge":
            return Ridge(self.strength), trusted
        return Logistic(self.strength, tolerance=TOLERANCE), trusted
