"""Rules that say which rows to trust, by the quality of their labels."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from lip_jax._checks import check_fraction
from lip_jax._results import STATIC, ShortRepr
from lip_jax._types import Feats, Labels, Scalar, Weights
from lip_jax.quality.left_out import check_readout_rows
from lip_jax.quality.trust import LabelQuality, label_quality
from lip_jax.rows.labels import Rows

Rule = Literal["posterior", "top", "margin", "noise_rate"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class PurifiedRows(ShortRepr):
    """Which rows to trust.

    Attributes:
        trusted: `(n,)`.
        weights: The given weights where trusted, else 0, `(n,)`: for `linear_readout` and the refits.
        kept: Weight-bearing rows kept of each given class, `(l,)`.
        offered: Rows there were of each, `(l,)`.
        rescued: Rows kept only because their class would have had fewer than `min_per_class`, `(l,)`.
        quality: What the choice rests on.
        rule: Which rule was used.
    """

    trusted: Bool[jax.Array, "n"]
    weights: Float[jax.Array, "n"]
    kept: Int[jax.Array, "l"]
    offered: Int[jax.Array, "l"]
    rescued: Int[jax.Array, "l"]
    quality: LabelQuality
    rule: str = field(metadata=STATIC)

    def __str__(self) -> str:
        kept, offered = np.asarray(self.kept), np.asarray(self.offered)
        present = offered > 0
        kept, offered = (counts[present] if present.any() else np.zeros(1, int) for counts in (kept, offered))
        share = kept / np.maximum(offered, 1)
        return (
            f"{kept.sum()} of {offered.sum()} rows trusted ({kept.sum() / max(offered.sum(), 1):.1%}); of a "
            f"class {share.min():.0%} to {share.max():.0%}, {kept.min()} to {kept.max()} rows; "
            f"{int((np.asarray(self.rescued) > 0).sum())} classes hold rows kept only so as not to lose "
            f"the class\n{self.quality}"
        )


def purify(
    feats: Feats,
    labels: Labels,
    *,
    num_classes: int | None = None,
    weights: Weights | None = None,
    rule: Rule = "posterior",
    threshold: Scalar | None = None,
    top: int | None = None,
    min_per_class: int = 1,
    quality: LabelQuality | None = None,
) -> PurifiedRows:
    """Which rows to trust, by their `label_quality`.

    | rule | a row is trusted if |
    |---|---|
    | `"posterior"` | its label is right with a probability above `threshold`, default 0.5 |
    | `"top"` | fewer than `top` classes score above its label; default `t(l)`: 1 to 5, a fiftieth of `l` |
    | `"margin"` | its label scores above every other class by more than `threshold`, default 0 |
    | `"noise_rate"` | it is not among the `noise_rate · n` of its class with the least margin |

    No class is emptied: of each class that has labelled rows the best `min_per_class` are kept whatever the
    rule says, and counted in `rescued`. Purifying shifts the balance between classes, as hard ones lose more;
    `kept` and `offered` show it.

    Args:
        feats: Features `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`, as in `label_quality`.
        num_classes: `l`; None: the width of targets, or the largest id plus one.
        weights: Weight of each row `(n,)`, at least 0.
        rule: As above. On frozen features `"posterior"` was the best or near it under every kind of noise
            tried; `"top"` is nearly as good where errors fall anywhere, and fails under pair flips.
        threshold: For `"posterior"` and `"margin"`.
        top: For `"top"`.
        min_per_class: How many rows of each class to keep at least.
        quality: The result of `label_quality` on the same rows, to save computing it again.

    Returns:
        A `PurifiedRows`.

    Raises:
        ValueError: As `label_quality`, or if the rule or its options are unknown.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> true = jnp.arange(600) % 3
        >>> feats = jax.random.normal(jax.random.key(0), (600, 5)).at[jnp.arange(600), true].add(4.0)
        >>> given = lip_jax.noise.symmetric(jax.random.key(1), true, 0.3, num_classes=3)
        >>> purified = lip_jax.purify(feats, given)
        >>> bool((given == true)[purified.trusted].mean() > 0.98)
        True

    Reference:
        Pruning by noise rate: [northcutt2021]; the other rules are this package's.
    """
    l = check_readout_rows(feats, labels, num_classes, weights, None, "gcv")
    check_rule(rule, threshold, top, min_per_class)
    if quality is None:
        quality = label_quality(feats, labels, num_classes=l, weights=weights)
    elif (quality.trust.shape[0], quality.noise_rate.shape[0]) != (feats.shape[0], l):
        raise ValueError(
            f"quality must be that of the same rows and classes, (n, l) = ({feats.shape[0]}, {l}); got "
            f"({quality.trust.shape[0]}, {quality.noise_rate.shape[0]}). Pass num_classes= to both."
        )
    weights = None if weights is None else jnp.asarray(weights)
    return purified_rows(quality, weights, threshold, rule=rule, top=top, min_per_class=min_per_class)


def check_rule(rule: str, threshold: Scalar | None, top: int | None, min_per_class: int) -> None:
    """Require a known rule, and options that belong to it."""
    if rule not in ("posterior", "top", "margin", "noise_rate"):
        raise ValueError(f"rule must be 'posterior', 'top', 'margin' or 'noise_rate'; got {rule!r}.")
    if threshold is not None and rule not in ("posterior", "margin"):
        raise ValueError(f"threshold belongs to rule='posterior' and rule='margin'; got rule={rule!r}.")
    if rule == "posterior" and threshold is not None:
        check_fraction(threshold, "threshold")
    if top is not None and rule != "top":
        raise ValueError(f"top belongs to rule='top'; got rule={rule!r}.")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ValueError(f"top must be an integer of at least 1, a number of classes; got {top!r}.")
    if isinstance(min_per_class, bool) or not isinstance(min_per_class, int) or min_per_class < 0:
        raise ValueError(f"min_per_class must be an integer of at least 0; got {min_per_class!r}.")


@partial(jax.jit, static_argnames=("rule", "top", "min_per_class"))
def purified_rows(
    quality: LabelQuality,
    weights: jax.Array | None,
    threshold: Scalar | None,
    *,
    rule: Rule,
    top: int | None,
    min_per_class: int,
) -> PurifiedRows:
    """`purify` on checked arguments."""
    l = quality.noise_rate.shape[0]
    top = min(max(round(l / 50), 1), 5) if top is None else top
    counted = quality.given >= 0
    slot = jnp.where(counted, quality.given, l)
    key = quality.trust if rule == "posterior" else quality.margin
    count = lambda rows: jnp.zeros(l + 1, jnp.int32).at[slot].add(rows.astype(jnp.int32))  # noqa: E731
    offered = count(counted)
    n = slot.shape[0]

    def places() -> jax.Array:
        """Place of each row within its class, the best first."""
        order = jnp.lexsort((-key, slot))
        starts = jnp.cumsum(offered, dtype=jnp.int32) - offered
        return jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32) - starts[slot[order]])

    if rule == "posterior":
        passed = quality.trust > jnp.asarray(0.5 if threshold is None else threshold, key.dtype)
    elif rule == "margin":
        passed = quality.margin > jnp.asarray(0 if threshold is None else threshold, key.dtype)
    elif rule == "top":
        passed = quality.num_above < top
    else:
        wrong = jnp.append(quality.noise_rate, 0) * offered.astype(key.dtype)
        passed = places() < (offered - jnp.round(wrong).astype(jnp.int32))[slot]
    passed = passed & counted
    # Sorting is dear, and mostly no class needs it.
    short = jnp.any(count(passed)[:l] < jnp.minimum(offered[:l], min_per_class))
    nobody = lambda: jnp.zeros(n, bool)  # noqa: E731
    rescued = jax.lax.cond(short, lambda: counted & ~passed & (places() < min_per_class), nobody)
    trusted = passed | rescued
    given = jnp.ones(n, key.dtype) if weights is None else weights.astype(key.dtype)
    return PurifiedRows(
        trusted=trusted,
        weights=jnp.where(trusted, given, 0),
        kept=count(trusted)[:l],
        offered=offered[:l],
        rescued=count(rescued)[:l],
        quality=quality,
        rule=rule,
    )


@jax.jit
def trusted_rows(feats: jax.Array, purified: PurifiedRows) -> Rows:
    """The rows with the labels that were judged, the trusted ones first: the others then cost nothing."""
    order = jnp.argsort(~purified.trusted, stable=True)
    return Rows(feats[order], purified.quality.given[order], purified.weights[order])
