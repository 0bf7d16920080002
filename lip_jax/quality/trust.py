"""Which labels can be trusted, without a clean set and without cross-validation: beyond both papers.

A ridge readout scores every row as if it had not seen it (`lip_jax.leave_one_out_scores`), which puts a wrong
label in contradiction to its neighbours. How strong a contradiction must be depends on how labels err, so
both are estimated. Counts of confident disagreements say which classes are given for which: the excess of a
count over three standard errors is structure, all else errors spread evenly. Scores `s` become class
probabilities `p(i|x) = softmax(a s)_i`, with `a` of the greatest likelihood `Σ log Σ_i p(i|x) T[i, given]`,
and Bayes' rule gives the probability that a label is right, `p(j|x) T[j, j]/Σ_i p(i|x) T[i, j]`. Under
symmetric noise an outlier is mostly kept, because few errors land on any one class. Under pair flips it is
dropped if its label is the usual wrong label of its neighbours' class.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lip_jax._results import ShortRepr
from lip_jax._types import Feats, Labels, Scalar, Weights
from lip_jax.numerics.chunks import fold_rows
from lip_jax.quality.left_out import Criterion, check_readout_rows, left_out, strength
from lip_jax.rows.checks import check_several_classes, raise_if_ignored
from lip_jax.rows.labels import Rows, as_rows, spread_over
from lip_jax.sums.ridge import RidgeFactors, ridge_factors

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


# Where features predict so many of the labels leave-one-out, the labels are clean or the body memorised them.
NEAR_TOTAL = 0.95


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class LabelQuality(ShortRepr):
    """How far each label can be trusted, and how labels err.

    Attributes:
        trust: The probability that the label is right, `(n,)`; 0 for unlabelled rows and those of weight 0.
        margin: Leave-one-out score of the label less the best of the other classes, `(n,)`.
        num_above: How many classes score above the label, `(n,)`.
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
    num_above: Int[jax.Array, "n"]
    given: Int[jax.Array, "n"]
    suggested: Int[jax.Array, "n"]
    noise_rate: Float[jax.Array, "l"]
    transition: Float[jax.Array, "l l"]
    sharpness: Float[jax.Array, ""]
    ridge: Float[jax.Array, ""]
    ignored: Int[jax.Array, ""]

    @property
    def doubt(self) -> str:
        """Why these features cannot judge these labels, in words; empty where nothing speaks against it."""
        counted = np.asarray(self.given) >= 0
        num = int(counted.sum())
        if not num:
            return "cannot tell which labels are wrong: no row has a label"
        agreement = float((np.asarray(self.num_above)[counted] == 0).mean())
        most = float(np.bincount(np.asarray(self.given)[counted]).max()) / num
        if agreement <= most + 3 * math.sqrt(most * (1 - most) / num):
            return (
                f"cannot tell which labels are wrong: without a row's own label the features predict "
                f"{agreement:.1%} of the labels, no more than the most frequent class would ({most:.1%})"
            )
        if agreement >= NEAR_TOTAL:
            return (
                f"cannot tell clean labels from memorised ones: the features predict {agreement:.1%} of the "
                f"labels. If the network that made them was trained on these labels, only rows it has not "
                f"seen can tell"
            )
        return ""

    def __str__(self) -> str:
        counted = np.asarray(self.given) >= 0
        if self.doubt.startswith("cannot tell which"):
            return f"{int(counted.sum())} labels: {self.doubt}"
        wrong = 1 - np.asarray(self.trust)[counted]
        share = wrong.mean() if counted.any() else 0.0
        rates = np.asarray(self.noise_rate)
        worst = ", ".join(f"{c}: {rates[c]:.0%}" for c in np.argsort(-rates)[:5])
        return (
            f"{int(counted.sum())} labels, about {share:.1%} wrong; {int((wrong > 0.5).sum())} more likely "
            f"wrong than right\nclasses with the largest shares of wrong labels: {worst}"
            + (f"\n{self.doubt}" if self.doubt else "")
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
    come from. `transition` of the result is estimated anew from the suggestions, and is not this `T`. Two
    passes over the rows if there are at most 2²⁴ scores, which are kept; beyond that three, in chunks.

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
        >>> given = lip_jax.noise.symmetric(jax.random.key(1), true, 0.3, num_classes=3)
        >>> quality = lip_jax.label_quality(feats, given)
        >>> bool(((quality.trust > 0.5) == (given == true)).mean() > 0.95)
        True

    Reference:
        Confident counts: [northcutt2021]; leave-one-out: [allen1974]; the rest is this package's.
    """
    l = check_readout_rows(feats, labels, num_classes, weights, ridge, criterion)
    check_several_classes(l)
    rows = Rows(*as_rows(feats, labels, weights, None)[:3])
    factors = ridge_factors(*rows, l, intercept=intercept)
    quality = quality_of(factors, rows, ridge, criterion=criterion, intercept=intercept)
    raise_if_ignored(quality.ignored, feats, labels, weights, l)
    return quality


class _Judged(NamedTuple):
    """What one pass says of each row."""

    given: jax.Array
    own: jax.Array
    best_other: jax.Array
    predicted: jax.Array
    best: jax.Array
    num_above: jax.Array


@partial(jax.jit, static_argnames=("criterion", "intercept"))
def quality_of(
    factors: RidgeFactors, rows: Rows, ridge: Scalar | None, *, criterion: Criterion, intercept: bool
) -> LabelQuality:
    """`label_quality` on checked arguments, with the factors of the rows."""
    l = factors.cross.shape[1]
    ridge = strength(factors, rows, ridge, criterion, intercept=intercept)

    def judge(scores: jax.Array, y: jax.Array, w: jax.Array) -> _Judged:
        given = _given(scores, y)
        own = jnp.take_along_axis(scores, given[:, None], axis=1)[:, 0]
        at_given = jnp.arange(l, dtype=jnp.int32)[None, :] == given[:, None]
        best_other = jnp.max(jnp.where(at_given, -jnp.inf, scores), axis=1)
        num_above = jnp.sum(scores > own[:, None], axis=1, dtype=jnp.int32)
        predicted = jnp.argmax(scores, axis=1).astype(jnp.int32)
        return _Judged(jnp.where(w > 0, given, -1), own, best_other, predicted, scores.max(axis=1), num_above)

    n = rows.feats.shape[0]
    judging = partial(left_out, factors, rows, ridge, intercept=intercept)
    if n * l <= KEPT_SCORES:
        kept = judging(lambda scores, y, w: (scores, y, w))
        judging = lambda reduce: reduce(*kept)  # noqa: E731
    judged = judging(judge)
    counted = judged.given >= 0
    transition = _structure(judged, l)
    sharpness = _sharpness(factors, rows, ridge, transition, intercept=intercept)

    by_given = transition.T

    def weigh(scores: jax.Array, y: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
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
        num_above=jnp.where(counted, judged.num_above, 0),
        given=judged.given,
        suggested=suggested,
        noise_rate=jnp.where(offered > 0, 1 - right / jnp.where(offered > 0, offered, 1), 0),
        transition=_shares(pairs, _average_row(pairs)),
        sharpness=sharpness,
        ridge=ridge,
        ignored=factors.ignored,
    )


def _given(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The label that is judged: the id, or the best scored of the largest targets."""
    if labels.ndim == 1:
        return labels.astype(jnp.int32)
    return jnp.argmax(jnp.where(_candidates(labels), scores, -jnp.inf), axis=1).astype(jnp.int32)


def _candidates(targets: jax.Array) -> jax.Array:
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


def evident_transition(quality: LabelQuality) -> jax.Array:
    """`quality.transition` less what chance explains, as a likelihood for other rows.

    With many classes most of its entries rest on a row or two, and are far too sure. Those that are not above
    an even spread of the wrong labels by `STRUCTURE` standard errors are replaced by that spread.
    """
    l, dtype = quality.transition.shape[0], quality.transition.dtype
    slot = jnp.where(quality.given >= 0, quality.suggested, l)
    mass = jnp.zeros(l + 1, jnp.int32).at[slot].add(1)[:l].astype(dtype)
    counts = quality.transition * mass[:, None]
    elsewhere = 1 - jnp.eye(l, dtype=dtype)
    wrong = counts * elsewhere
    total = jnp.where(jnp.sum(mass) > 0, jnp.sum(mass), 1)

    def spread_of(evident: jax.Array) -> jax.Array:
        """The even spread of the entries that are left."""
        cells = jnp.sum(jnp.where(evident, 0, elsewhere) * mass[:, None])
        even = jnp.sum(jnp.where(evident, 0, wrong)) / jnp.where(cells > 0, cells, 1)
        return even * mass[:, None] * elsewhere

    def above(spread: jax.Array) -> jax.Array:
        return wrong > spread + STRUCTURE * jnp.sqrt(spread) + 1 / total

    # Twice, as evident entries are no part of what is even.
    evident = above(spread_of(above(spread_of(jnp.zeros_like(wrong, bool)))))
    spread = jnp.where(evident, wrong, spread_of(evident)) + jnp.diag(jnp.diagonal(counts))
    return _shares(spread, _average_row(spread))


def _sums_by_class(values: jax.Array, slot: jax.Array, classes: int) -> jax.Array:
    """Sums over the rows of each class; those of some rows first, as one to millions is lost in float32."""

    def step(sums: jax.Array, rows: tuple, fresh: jax.Array) -> tuple:
        part, place = rows
        added = jnp.zeros_like(sums).at[place].add(jnp.where(fresh, part, 0))
        # The barrier keeps XLA from adding each row to all that is held.
        return sums + jax.lax.optimization_barrier(added), None

    return fold_rows(step, jnp.zeros(classes, values.dtype), (values, slot), SUMMED_ROWS)[0]


def _average_row(counts: jax.Array) -> jax.Array:
    """For each class one row that errs as all do on average: no label is impossible, no class unknown."""
    l = counts.shape[0]
    total = jnp.sum(counts)
    right = jnp.where(total > 0, jnp.trace(counts) / jnp.where(total > 0, total, 1), 0.5)
    here = jnp.eye(l, dtype=counts.dtype)
    return right * here + (1 - right) / max(l - 1, 1) * (1 - here)


def _shares(counts: jax.Array, average: jax.Array) -> jax.Array:
    smoothed = counts + average
    return smoothed / jnp.sum(smoothed, axis=1, keepdims=True)


def _sharpness(
    factors: RidgeFactors, rows: Rows, ridge: Scalar, transition: jax.Array, *, intercept: bool
) -> jax.Array:
    """The factor under which the given labels are most likely, on rows spread evenly over all."""
    n, l = rows[0].shape[0], transition.shape[0]
    least, most = SHARPNESS_ROWS
    size = min(n, max(min(SHARPNESS_CELLS // l, most), least))
    picked = spread_over(rows, l, size)
    sample = jax.tree.map(lambda part: part[picked], rows)
    grid = jnp.asarray(SHARPNESS, transition.dtype)

    def likelihood(scores: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
        column = transition.T[_given(scores, y)]

        def at(a: jax.Array) -> jax.Array:
            likely = jnp.sum(jax.nn.softmax(a * scores, axis=1) * column, axis=1)
            return jnp.where(w > 0, jnp.log(jnp.maximum(likely, jnp.finfo(likely.dtype).tiny)), 0)

        return jax.lax.map(at, grid).T

    likelihoods = left_out(factors, sample, ridge, likelihood, intercept=intercept)
    likely = jnp.sum(likelihoods, axis=0)
    # Once sharp, scores may be sharpened at no cost: the least factor within rounding of the best is taken.
    return grid[jnp.argmax(likely >= likely.max() - 1e-5 * jnp.abs(likely.max()))]
