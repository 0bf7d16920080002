"""Which labels can be trusted, without a clean set and without cross-validation: beyond both papers.

A ridge readout scores every row as if it had not seen it (`lip_jax.leave_one_out_scores`), which puts a wrong
label in contradiction to its neighbours. How strong a contradiction must be depends on how labels err, so
both are estimated. Counts of confident disagreements say which classes are given for which: entries that are
3 standard errors above nothing count as structure, all else as errors spread evenly. Scores `s` become class
probabilities `p(i|x) = softmax(a s)_i`, with `a` of the greatest likelihood `Σ log Σ_i p(i|x) T[i, given]`,
and Bayes' rule gives the probability that a label is right, `p(j|x) T[j, j]/Σ_i p(i|x) T[i, j]`. An odd
example is kept where errors fall anywhere, as few fall on its very label; it is dropped where its label is
the one that its neighbours are known to be mistaken for.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from lip_jax import _linalg
from lip_jax._checks import check_fraction, check_kernel
from lip_jax._chunks import fold_rows
from lip_jax._types import Bias, Feats, Kernel, Labels, Scalar, Weights
from lip_jax.labels import Rows, as_rows, spread_over
from lip_jax.metrics import error_of_mean, hits, row_weights, weighted_mean
from lip_jax.readout import Readout, Solver, check_solver, linear_readout
from lip_jax.refit import check_rows, check_validation, count_ignored, raise_if_ignored
from lip_jax.ridge import (
    Criterion,
    RidgePath,
    check_readout_rows,
    left_out,
    ridge_path,
    strength,
)

Rule = Literal["posterior", "top", "margin", "noise_rate"]

# Standard errors above 0 at which a count of disagreements is structure.
STRUCTURE = 3
# What scores may be multiplied by, and on how many of them the factor is fitted.
SHARPNESS = np.geomspace(1, 1e4, 41)
SHARPNESS_CELLS = 2**18
SHARPNESS_ROWS = 1000, 2000

# Rows whose scores are summed by class before they are added to the sums of others.
SUMMED_ROWS = 2**16
# Up to so many scores are kept rather than computed again, 64 MiB in single precision.
KEPT_SCORES = 2**24

# How much more a head may agree with labels it has seen than a readout that has not, before they count as
# memorised: 0.06 to 0.08 on well regularised CLINC150 heads, 0.11 to 0.23 on overfitted ones.
MEMORISED_MARGIN = 0.1


@dataclass(frozen=True)
class LabelQuality:
    """How far each label can be trusted, and how labels err.

    Attributes:
        trust: The probability that the label is right, `(n,)`; 0 for unlabelled rows and those of weight 0.
        margin: Leave-one-out score of the label less the best of the other classes, `(n,)`.
        rank: How many classes score above the label, `(n,)`.
        given: The label that is judged, `(n,)`: the class id, or the best candidate where targets have
            several largest entries; −1 for rows that do not count.
        suggested: The most probable class given features and label, `(n,)`.
        noise_rate: Share of wrong labels among those given as each class, `(l,)`.
        transition: Estimate of `P(given = j | true = i)`, `(l, l)`: of the rows suggested as class i, the
            share given as j, with one row more for each class that errs as all do on average.
        sharpness: `a`, by which scores become log-probabilities.
        ridge: `λ` of the readout.
        ignored: How many rows could not be used.
    """

    trust: Float[jax.Array, "n"]
    margin: Float[jax.Array, "n"]
    rank: Int[jax.Array, "n"]
    given: Int[jax.Array, "n"]
    suggested: Int[jax.Array, "n"]
    noise_rate: Float[jax.Array, "l"]
    transition: Float[jax.Array, "l l"]
    sharpness: Float[jax.Array, ""]
    ridge: Float[jax.Array, ""]
    ignored: Int[jax.Array, ""]

    def __str__(self) -> str:
        counted = np.asarray(self.given) >= 0
        wrong = 1 - np.asarray(self.trust)[counted]
        share = wrong.mean() if counted.any() else 0.0
        rates = np.asarray(self.noise_rate)
        worst = ", ".join(f"{c}: {rates[c]:.0%}" for c in np.argsort(-rates)[:5])
        return (
            f"{int(counted.sum())} labels, about {share:.1%} wrong; {int((wrong > 0.5).sum())} more likely "
            f"wrong than right\nclasses with the largest shares of wrong labels: {worst}"
        )


jax.tree_util.register_dataclass(
    LabelQuality, data_fields=tuple(LabelQuality.__annotations__), meta_fields=()
)


@dataclass(frozen=True)
class Purified:
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
    rule: str

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


jax.tree_util.register_dataclass(
    Purified,
    data_fields=("trusted", "weights", "kept", "offered", "rescued", "quality"),
    meta_fields=("rule",),
)


def label_quality(
    feats: Feats,
    labels: Labels,
    *,
    num_classes: int | None = None,
    weights: Weights | None = None,
    ridge: Scalar | None = None,
    criterion: Criterion = "gcv",
    intercept: bool = True,
) -> LabelQuality:
    """How far each label can be trusted, by what a readout of all other rows says of it.

    `trust_n = p(j|x) T[j, j]/Σ_i p(i|x) T[i, j]`, `j` the given label; the module tells where `p` and `T`
    come from. Two passes over the rows; beside `(l, l)` and a chunk of scores nothing is held that grows
    with `l` or `n` but the results.

    It judges by the features. If the body that made them memorised these labels, it is fooled:
    `lip_jax.memorised` says whether that looks so.

    Args:
        feats: Features `(n, q)`.
        labels: Class ids `(n,)`, or targets `(n, l)`: of these the largest entry is the label, and where
            several are (candidate sets) the one of the best score.
        num_classes: `l`; None: the width of targets, or the largest id plus one.
        weights: Weight of each row `(n,)`, at least 0.
        ridge: `λ ≥ 0`; None: by `criterion`.
        criterion: `"gcv"` or `"press"`, as in `lip_jax.leave_one_out_scores`.
        intercept: Whether the readout has an intercept.

    Returns:
        A `LabelQuality`.

    Raises:
        ValueError: If shapes do not fit, or, where values can be seen, a row cannot be used. Under `jit` such
            rows count for nothing.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> true = jnp.arange(600) % 3
        >>> feats = jax.random.normal(jax.random.key(0), (600, 5)).at[jnp.arange(600), true].add(4.0)
        >>> given = lip_jax.symmetric_noise(jax.random.key(1), true, 0.3, num_classes=3)
        >>> quality = lip_jax.label_quality(feats, given)
        >>> bool(((quality.trust > 0.5) == (given == true)).mean() > 0.95)
        True

    Reference:
        Confident counts: [northcutt2021]; leave-one-out: [allen1974]; the rest is this package's.
    """
    l = check_readout_rows(feats, labels, num_classes, weights, ridge, criterion)
    rows = Rows(*as_rows(feats, labels, weights, None)[:3])
    quality = quality_of(rows, ridge, l=l, criterion=criterion, intercept=intercept)
    raise_if_ignored(quality.ignored, feats, labels, weights, l)
    return quality


class _Judged(NamedTuple):
    """What one pass says of each row."""

    given: jax.Array
    own: jax.Array
    best_other: jax.Array
    predicted: jax.Array
    best: jax.Array
    rank: jax.Array


@partial(jax.jit, static_argnames=("l", "criterion", "intercept"))
def quality_of(rows: Rows, ridge, *, l: int, criterion: Criterion, intercept: bool) -> LabelQuality:
    """`label_quality` on checked arguments."""
    path = ridge_path(*rows, l, intercept=intercept)
    ridge = strength(path, rows, ridge, criterion, intercept=intercept)

    def judge(scores, y, w):
        given = _given(scores, y)
        own = jnp.take_along_axis(scores, given[:, None], axis=1)[:, 0]
        at_given = jnp.arange(l, dtype=jnp.int32)[None, :] == given[:, None]
        best_other = jnp.max(jnp.where(at_given, -jnp.inf, scores), axis=1) if l > 1 else own
        rank = jnp.sum(scores > own[:, None], axis=1, dtype=jnp.int32)
        predicted = jnp.argmax(scores, axis=1).astype(jnp.int32)
        return _Judged(jnp.where(w > 0, given, -1), own, best_other, predicted, scores.max(axis=1), rank)

    n = rows.feats.shape[0]
    judging = partial(left_out, path, rows, ridge, intercept=intercept)
    if n * l <= KEPT_SCORES:
        kept = judging(lambda scores, y, w: (scores, y, w))
        judging = lambda reduce: reduce(*kept)  # noqa: E731
    judged = judging(judge)
    counted = judged.given >= 0
    transition = _structure(judged, l)
    sharpness = _sharpness(path, rows, ridge, transition, intercept=intercept)

    by_given = transition.T

    def weigh(scores, y, w):
        given = _given(scores, y)
        joint = jax.nn.softmax(sharpness * scores, axis=1) * by_given[given]
        total = jnp.sum(joint, axis=1, keepdims=True)
        posterior = jnp.where(w[:, None] > 0, joint / jnp.where(total > 0, total, 1), 0)
        trust = jnp.take_along_axis(posterior, given[:, None], axis=1)[:, 0]
        likely = jnp.argmax(jnp.where(w[:, None] > 0, joint, scores), axis=1).astype(jnp.int32)
        # Of several candidates one is right: the best is suggested, no class beside them.
        several = jnp.zeros_like(w, bool) if y.ndim == 1 else jnp.sum(_candidates(y), axis=1) > 1
        return trust, jnp.where(several & (w > 0), given, likely)

    trust, suggested = judging(weigh)
    slot = jnp.where(counted, judged.given, l)
    offered = jnp.zeros(l + 1, jnp.int32).at[slot].add(1)[:l].astype(trust.dtype)
    pairs = jnp.zeros((l, l + 1), jnp.int32).at[suggested, slot].add(1)[:, :l].astype(trust.dtype)
    right = _sums_by_class(trust, slot, l + 1)[:l]
    return LabelQuality(
        trust=trust,
        margin=jnp.where(counted, judged.own - judged.best_other, 0),
        rank=jnp.where(counted, judged.rank, 0),
        given=judged.given,
        suggested=suggested,
        noise_rate=jnp.where(offered > 0, 1 - right / jnp.where(offered > 0, offered, 1), 0),
        transition=_shares(pairs, _average_row(pairs)),
        sharpness=sharpness,
        ridge=ridge,
        ignored=path.ignored,
    )


def _given(scores, labels) -> jax.Array:
    """The label that is judged: the id, or the best scored of the largest targets."""
    if labels.ndim == 1:
        return labels.astype(jnp.int32)
    return jnp.argmax(jnp.where(_candidates(labels), scores, -jnp.inf), axis=1).astype(jnp.int32)


def _candidates(targets) -> jax.Array:
    return targets >= targets.max(axis=1, keepdims=True)


def _structure(judged: _Judged, l: int) -> jax.Array:
    """`P(given = j | true = i)` from predictions as sure as that class's labels are on average."""
    dtype = judged.own.dtype
    counted = judged.given >= 0
    slot = jnp.where(counted, judged.given, l)
    offered = jnp.zeros(l + 1, jnp.int32).at[slot].add(1).astype(dtype)
    average = _sums_by_class(judged.own, slot, l + 1) / jnp.maximum(offered, 1)
    sure = counted & (judged.best >= average[judged.predicted])
    of_pairs = jnp.zeros((l, l), jnp.int32)
    counts = of_pairs.at[judged.predicted, jnp.maximum(judged.given, 0)].add(sure.astype(jnp.int32))
    counts = counts.astype(dtype)
    right, mass, total = jnp.diagonal(counts), jnp.sum(counts, axis=1), jnp.sum(counts)
    elsewhere = 1 - jnp.eye(l, dtype=dtype)
    wrong = counts * elsewhere
    structure = jnp.maximum(wrong - STRUCTURE * jnp.sqrt(wrong), 0)
    even = jnp.sum(wrong - structure) / jnp.where(total > 0, total, 1) / max(l - 1, 1)
    counts = structure + (even * mass)[:, None] * elsewhere + jnp.diag(right)
    return _shares(counts, _average_row(counts))


def _sums_by_class(values, slot, classes: int) -> jax.Array:
    """Sums over the rows of each class; those of some rows first, as one to millions is lost in float32."""

    def step(sums, rows, fresh):
        part, place = rows
        added = jnp.zeros_like(sums).at[place].add(jnp.where(fresh, part, 0))
        # The barrier keeps XLA from adding each row to all that is held.
        return sums + jax.lax.optimization_barrier(added), None

    size = values.shape[0] if jax.device_count() > 1 else SUMMED_ROWS
    return fold_rows(step, jnp.zeros(classes, values.dtype), (values, slot), size)[0]


def _average_row(counts) -> jax.Array:
    """For each class one row that errs as all do on average: no label is impossible, no class unknown."""
    l = counts.shape[0]
    total = jnp.sum(counts)
    right = jnp.where(total > 0, jnp.trace(counts) / jnp.where(total > 0, total, 1), 0.5)
    here = jnp.eye(l, dtype=counts.dtype)
    return right * here + (1 - right) / max(l - 1, 1) * (1 - here)


def _shares(counts, average) -> jax.Array:
    smoothed = counts + average
    return smoothed / jnp.sum(smoothed, axis=1, keepdims=True)


def _sharpness(path: RidgePath, rows: Rows, ridge, transition, *, intercept: bool) -> jax.Array:
    """The factor under which the given labels are most likely, on rows spread evenly over all."""
    n, l = rows[0].shape[0], transition.shape[0]
    least, most = SHARPNESS_ROWS
    size = min(n, max(min(SHARPNESS_CELLS // l, most), least))
    picked = spread_over(rows, l, size)
    sample = jax.tree.map(lambda part: part[picked], rows)
    grid = jnp.asarray(SHARPNESS, transition.dtype)

    def likelihood(scores, y, w):
        column = transition.T[_given(scores, y)]

        def at(a):
            likely = jnp.sum(jax.nn.softmax(a * scores, axis=1) * column, axis=1)
            return jnp.where(w > 0, jnp.log(jnp.maximum(likely, jnp.finfo(likely.dtype).tiny)), 0)

        return jax.lax.map(at, grid).T

    likelihoods = left_out(path, sample, ridge, likelihood, intercept=intercept)
    likely = jnp.sum(likelihoods, axis=0)
    # Once sharp, scores may be sharpened at no cost: the least factor within rounding of the best is taken.
    return grid[jnp.argmax(likely >= likely.max() - 1e-5 * jnp.abs(likely.max()))]


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
) -> Purified:
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
        A `Purified`.

    Raises:
        ValueError: As `label_quality`, or if the rule or its options are unknown.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> true = jnp.arange(600) % 3
        >>> feats = jax.random.normal(jax.random.key(0), (600, 5)).at[jnp.arange(600), true].add(4.0)
        >>> given = lip_jax.symmetric_noise(jax.random.key(1), true, 0.3, num_classes=3)
        >>> purified = lip_jax.purify(feats, given)
        >>> bool((given == true)[purified.trusted].mean() > 0.98)
        True

    Reference:
        Pruning by noise rate: [northcutt2021]; the other rules are this package's.
    """
    l = check_readout_rows(feats, labels, num_classes, weights, None, "gcv")
    if rule not in ("posterior", "top", "margin", "noise_rate"):
        raise ValueError(f"rule must be 'posterior', 'top', 'margin' or 'noise_rate'; got {rule!r}.")
    if threshold is not None and rule not in ("posterior", "margin"):
        raise ValueError(f"threshold belongs to rule='posterior' and rule='margin'; got rule={rule!r}.")
    if rule == "posterior" and threshold is not None:
        check_fraction(threshold, "threshold")
    if top is not None and rule != "top":
        raise ValueError(f"top belongs to rule='top'; got rule={rule!r}.")
    if not isinstance(min_per_class, int) or min_per_class < 0:
        raise ValueError(f"min_per_class must be an integer of at least 0; got {min_per_class!r}.")
    if quality is None:
        quality = label_quality(feats, labels, num_classes=l, weights=weights)
    elif (quality.trust.shape[0], quality.noise_rate.shape[0]) != (feats.shape[0], l):
        raise ValueError(
            f"quality must be that of the same rows and classes, (n, l) = ({feats.shape[0]}, {l}); got "
            f"({quality.trust.shape[0]}, {quality.noise_rate.shape[0]}). Pass num_classes= to both."
        )
    top = min(max(round(l / 50), 1), 5) if top is None else top
    weights = None if weights is None else jnp.asarray(weights)
    return purified_rows(quality, weights, threshold, l=l, rule=rule, top=top, min_per_class=min_per_class)


@partial(jax.jit, static_argnames=("l", "rule", "top", "min_per_class"))
def purified_rows(
    quality: LabelQuality, weights, threshold, *, l: int, rule: Rule, top: int, min_per_class: int
) -> Purified:
    """`purify` on checked arguments."""
    counted = quality.given >= 0
    slot = jnp.where(counted, quality.given, l)
    key = quality.trust if rule == "posterior" else quality.margin
    count = lambda rows: jnp.zeros(l + 1, jnp.int32).at[slot].add(rows.astype(jnp.int32))  # noqa: E731
    offered = count(counted)
    n = slot.shape[0]

    def places():
        """Place of each row within its class, the best first."""
        order = jnp.lexsort((-key, slot))
        starts = jnp.cumsum(offered, dtype=jnp.int32) - offered
        return jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32) - starts[slot[order]])

    if rule == "posterior":
        passed = quality.trust > jnp.asarray(0.5 if threshold is None else threshold, key.dtype)
    elif rule == "margin":
        passed = quality.margin > jnp.asarray(0 if threshold is None else threshold, key.dtype)
    elif rule == "top":
        passed = quality.rank < top
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
    return Purified(
        trusted=trusted,
        weights=jnp.where(trusted, given, 0),
        kept=count(trusted)[:l],
        offered=offered[:l],
        rescued=count(rescued)[:l],
        quality=quality,
        rule=rule,
    )


@jax.jit
def trusted_rows(feats: jax.Array, purified: Purified) -> Rows:
    """The rows with the labels that were judged, the trusted ones first: the others then cost nothing."""
    order = jnp.argsort(~purified.trusted, stable=True)
    return Rows(feats[order], purified.quality.given[order], purified.weights[order])


@dataclass(frozen=True)
class PurifiedReadout:
    """A readout fitted to trusted rows.

    Attributes:
        readout: The readout.
        purified: The rows it was fitted to.
    """

    readout: Readout
    purified: Purified


jax.tree_util.register_dataclass(PurifiedReadout, data_fields=("readout", "purified"), meta_fields=())


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
    tolerance: float = 1e-2,
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
        tolerance: As in `linear_readout`; the labels do not deserve more precision than the default.

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
        >>> given = lip_jax.asymmetric_noise(jax.random.key(1), true, 0.3, num_classes=3)
        >>> readout = lip_jax.purified_readout(feats, given, ridge=1.0).readout
        >>> bool(((feats @ readout.kernel + readout.bias[None, :]).argmax(axis=1) == true).mean() > 0.95)
        True

    Reference:
        [li2020] on a clean set; certifying one by leave-one-out is this package's.
    """
    check_solver(solver, init, "gcv")
    purified = purify(
        feats,
        labels,
        num_classes=num_classes,
        weights=weights,
        rule=rule,
        threshold=threshold,
        top=top,
        min_per_class=min_per_class,
    )
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
        tolerance=tolerance,
    )
    return PurifiedReadout(readout, purified)


@dataclass(frozen=True)
class Memorisation:
    """Whether a head agrees with labels more than it should if it had not memorised them.

    Attributes:
        agreement: Share of the labels that the head predicts.
        reference: The share to expect of a head that has not seen them.
        standard_error: Of the difference of the two.
        memorised: Whether the agreement is above the reference by 0.1 and 3 standard errors more.
        held_out: Whether the reference is from held-out rows, else from leave-one-out scores.
    """

    agreement: Float[jax.Array, ""]
    reference: Float[jax.Array, ""]
    standard_error: Float[jax.Array, ""]
    memorised: Bool[jax.Array, ""]
    held_out: bool

    def __str__(self) -> str:
        source = "it agrees with held-out labels" if self.held_out else "leave-one-out scores agree"
        found = (
            f"the head agrees with {float(self.agreement):.1%} of the labels, {source} "
            + ("for" if self.held_out else "with")
            + f" {float(self.reference):.1%} (difference ± {float(self.standard_error):.1%})"
        )
        if bool(self.memorised):
            return (
                f"memorised: {found}. These rows cannot judge this head, nor labels by its features: repair "
                f"it with validation= rows it was not trained on, purify with features of a body stopped "
                f"early, or fit on held-out rows."
            )
        return f"not memorised: {found}"


jax.tree_util.register_dataclass(
    Memorisation,
    data_fields=("agreement", "reference", "standard_error", "memorised"),
    meta_fields=("held_out",),
)


def memorised(
    kernel: Kernel,
    bias: Bias | None,
    feats: Feats,
    labels: Labels,
    *,
    weights: Weights | None = None,
    validation: tuple | None = None,
) -> Memorisation:
    """Whether head and body have memorised these labels, so that rows with them can judge neither.

    The head's agreement with labels it was trained on is held against its agreement with held-out labels of
    the same noise or, without any, against that of leave-one-out scores on the same features. The latter see
    what the head memorised; of a body that memorised they see only a part (digits after 200 epochs at 40%
    noise: head 1.0, leave-one-out .82, held out .48), so held-out rows are worth having.

    Args:
        kernel: `(q, l)`.
        bias: `(l,)`, or None.
        feats: Features of rows the head was trained on `(n, q)`.
        labels: Their labels, of any kind.
        weights: Weight of each row `(n,)`.
        validation: `(feats, labels)` of rows neither head nor body was trained on, with labels as noisy.

    Returns:
        A `Memorisation`, which prints what to do.

    Raises:
        ValueError: If shapes do not fit, or, where values can be seen, a row cannot be used.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> feats, labels = jax.random.normal(jax.random.key(0), (200, 100)), jnp.arange(200) % 2
        >>> kernel = jnp.linalg.pinv(feats) @ jax.nn.one_hot(labels, 2)  # labels without any sense
        >>> bool(lip_jax.memorised(kernel, None, feats, labels).memorised)
        True

    Reference:
        [zhang2017] on memorised labels; the test is this package's.
    """
    check_kernel(kernel)
    q, l = kernel.shape
    check_rows(q, l, feats, labels, weights, bias, 0.0, "zero")
    rows = Rows(*as_rows(feats, labels, weights, None)[:3])
    held = None
    if validation is not None:
        held = check_validation(validation, q, l)
    head = jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
    found = memorisation_of(head, rows, held)
    raise_if_ignored(count_ignored(rows, l=l), feats, labels, weights, l)
    return found


@jax.jit
def memorisation_of(head, rows: Rows, held: Rows | None) -> Memorisation:
    """`memorised` on checked arguments."""
    kernel, bias = head
    l = kernel.shape[1]

    def agreement(feats, labels, weights):
        logits = _linalg.logits_of(feats, kernel, bias)
        return hits(logits, labels), row_weights(logits, labels, weights)

    own, use = agreement(*rows)
    if held is None:
        intercept = bias is not None
        path = ridge_path(*rows, l, intercept=intercept)
        ridge = strength(path, rows, None, "gcv", intercept=intercept)
        reference = left_out(path, rows, ridge, lambda scores, y, w: hits(scores, y), intercept=intercept)
        difference = jnp.where(use > 0, own - reference, 0)
        mean = weighted_mean(difference, use)
        error = error_of_mean(difference, mean, use)
        expected = weighted_mean(reference, use)
    else:
        theirs, held_use = agreement(*held)
        expected = weighted_mean(theirs, held_use)
        agreed = weighted_mean(own, use)
        mean = agreed - expected
        error = jnp.hypot(error_of_mean(own, agreed, use), error_of_mean(theirs, expected, held_use))
    return Memorisation(
        agreement=weighted_mean(own, use),
        reference=expected,
        standard_error=error,
        memorised=mean > MEMORISED_MARGIN + 3 * error,
        held_out=held is not None,
    )
