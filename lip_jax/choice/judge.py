"""The verdict on each candidate, in the blend with the head as it came that the rows find likeliest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lip_jax._checks import all_finite
from lip_jax.choice.candidates import Trial
from lip_jax.choice.evidence import (
    RECALLED,
    Metric,
    Paired,
    contributions,
    flat,
    likelier_noise,
    noise_losses,
    out_of_fold,
    paired,
    recalled,
    scale_of,
    score,
)
from lip_jax.methods.protocol import Head
from lip_jax.rows.labels import Rows
from lip_jax.rows.metrics import Metrics, compute_metrics, row_weights, weighted_mean

# Shares of a candidate in its blends with the head as it came.
SHARES = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Rule:
    """By which metric, how many standard errors one kind of evidence must reach, and how many the other."""

    metric: Metric
    level: float
    support: float


class Standard(NamedTuple):
    """What candidates are held against: logits out of fold, and what the rows say of them.

    `scale` is the logit scale that suits them, `losses` are those at this scale under the label noise.
    """

    logits: jax.Array
    rows: Rows
    transition: jax.Array | None
    scale: jax.Array
    losses: jax.Array
    weights: jax.Array
    scores: jax.Array
    score_weights: jax.Array
    recalled: jax.Array


class Evidence(NamedTuple):
    """What the rows say of one head: two differences to the standard, and whether they are enough."""

    passes: jax.Array
    loss: jax.Array
    metrics: Metrics
    metric: Paired
    likelihood: Paired


class Judged(NamedTuple):
    """A candidate at one share, as it would be stored, and the classes that it leaves to the head."""

    head: Head
    share: jax.Array
    scale: jax.Array
    available: jax.Array
    kept: jax.Array
    evidence: Evidence


class Case(NamedTuple):
    """A head, the heads `(k, …)` that stand for it, candidates, and rows that judge, in folds.

    `known` are the classes that each candidate can be trusted with, `(f, l)`.
    """

    head: Head
    bases: Head
    folded: Rows
    trials: Trial | None
    known: jax.Array | None
    transition: jax.Array | None
    ignored: jax.Array


def case_of(
    head: Head,
    bases: Head,
    folded: Rows,
    trials: Sequence[Trial],
    known: Sequence[jax.Array],
    transition: jax.Array | None,
    ignored: jax.Array,
) -> Case:
    """The case with its candidates stacked, and with the noise that suits the rows that judge."""
    if not trials:
        return Case(head, bases, folded, None, None, _noise(bases, folded, None, transition), ignored)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trials)
    transition = _noise(bases, folded, stacked, transition)
    return Case(head, bases, folded, stacked, jnp.stack(list(known)), transition, ignored)


def _noise(bases: Head, folded: Rows, trials: Trial | None, transition: jax.Array | None) -> jax.Array | None:
    """The noise under which the most accurate of all heads finds the labels likelier: this, or none."""
    rows = flat(folded)
    if transition is None or rows.labels.ndim == 2:
        return None
    heads = bases
    if trials is not None:
        right = jax.lax.map(lambda held: score(out_of_fold(held, folded), rows, "accuracy"), trials.heads)
        best = jnp.argmax(right)
        better = right[best] > score(out_of_fold(bases, folded), rows, "accuracy")
        heads = jax.tree.map(lambda a, b: jnp.where(better, a[best], b), trials.heads, bases)
    return likelier_noise(out_of_fold(heads, folded), rows, transition)


def standard_of(logits: jax.Array, rows: Rows, transition: jax.Array | None, metric: Metric) -> Standard:
    """What candidates on these rows are held against."""
    scale = scale_of(logits, rows, transition)
    scores, score_weights = contributions(logits, rows, metric)
    return Standard(
        logits=logits,
        rows=rows,
        transition=transition,
        scale=scale,
        losses=noise_losses(scale * logits, rows.labels, transition),
        weights=row_weights(logits, rows.labels, rows.weights),
        scores=scores,
        score_weights=score_weights,
        recalled=recalled(logits, rows),
    )


def weigh(logits: jax.Array, losses: jax.Array, standard: Standard, rule: Rule) -> Evidence:
    """What the rows say of logits as they would be stored, with their losses under the label noise."""
    rows = standard.rows
    scores = contributions(logits, rows, rule.metric)[0]
    in_metric = paired(scores, standard.scores, standard.score_weights)
    in_likelihood = paired(-losses, -standard.losses, standard.weights)
    metrics = compute_metrics(logits, rows.labels, rows.weights)
    if rule.metric == "log_loss":
        shown, loss = in_metric.z > rule.level, metrics.log_loss
    else:
        both = jnp.stack([in_metric.z, in_likelihood.z])
        shown = (both.max() > rule.level) & (both.min() >= rule.support)
        loss = weighted_mean(losses, standard.weights)
    lost = lost_classes(logits, standard).any()
    return Evidence(shown & ~lost, loss, metrics, in_metric, in_likelihood)


def lost_classes(logits: jax.Array, standard: Standard) -> jax.Array:
    """Classes that the standard tells, and these logits never do."""
    return (standard.recalled >= RECALLED) & (recalled(logits, standard.rows) == 0)


def unchanged(head: Head, standard: Standard, rule: Rule) -> Judged:
    """The head as it came, as the first of the candidates."""
    return Judged(
        head=head,
        share=jnp.zeros((), standard.logits.dtype),
        scale=standard.scale,
        available=jnp.asarray(True),
        kept=jnp.zeros(standard.logits.shape[1], bool),
        evidence=weigh(standard.logits, standard.losses, standard, rule),
    )


def judge(case: Case, standard: Standard, rule: Rule, may: jax.Array) -> Judged:
    """Every candidate in its likeliest blend, of those that pass where any does; the head as it came first.

    `may` says whether any candidate may be taken at all.
    """
    first = jax.tree.map(lambda leaf: leaf[None], unchanged(case.head, standard, rule))
    if case.trials is None:
        return first

    def of_trial(part: tuple[Trial, jax.Array]) -> Judged:
        trial, known = part
        alone = out_of_fold(trial.heads, case.folded)
        scale = scale_of(alone, standard.rows, standard.transition)
        # A class that the candidate would lose is not taken from the head either.
        known &= ~lost_classes(jnp.where(known[None, :], alone, -jnp.inf), standard)

        def at(share: jax.Array) -> Judged:
            made, tested, logits = blended(case, standard, trial, scale, share, known)
            available = trial.available & _is_finite(made) & _is_finite(tested) & (jnp.sum(known) >= 2)
            losses = noise_losses(logits, standard.rows.labels, standard.transition)
            evidence = weigh(logits, losses, standard, rule)
            evidence = evidence._replace(passes=evidence.passes & available & may)
            return Judged(made, share, scale, available, ~known, evidence)

        found = jax.lax.map(at, jnp.asarray(SHARES, alone.dtype))
        best = likeliest(found)
        return jax.tree.map(lambda leaf: leaf[best], found)

    found = jax.lax.map(of_trial, (case.trials, case.known))
    join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)])  # noqa: E731
    return jax.tree.map(join, first, found)


def likeliest(judged: Judged) -> jax.Array:
    """The place of the likeliest of those that pass, or of all that are available where none does."""
    passes, loss = judged.evidence.passes, judged.evidence.loss
    eligible = judged.available & (passes | ~passes.any())
    return jnp.argmin(jnp.where(eligible, loss, jnp.inf)).astype(jnp.int32)


def logits_of_one(case: Case, standard: Standard, judged: Judged, place: jax.Array) -> jax.Array:
    """The logits out of fold of the candidate in one place of the table; those of the standard at 0."""
    came = standard.scale * standard.logits
    if case.trials is None:
        return came
    trial = jax.tree.map(lambda leaf: leaf[jnp.maximum(place - 1, 0)], case.trials)
    one = jax.tree.map(lambda leaf: leaf[place], judged)
    _, _, logits = blended(case, standard, trial, one.scale, one.share, ~one.kept)
    return jnp.where(place > 0, logits, came)


def blended(
    case: Case, standard: Standard, trial: Trial, scale: jax.Array, share: jax.Array, known: jax.Array
) -> tuple[Head, Head, jax.Array]:
    """A candidate blended with the head as it came, the same for each fold, and its logits out of fold."""
    made = blend(case.head, standard.scale, trial.head, scale, share, known)
    tested = jax.vmap(blend, in_axes=(0, None, 0, None, None, None))(
        case.bases, standard.scale, trial.heads, scale, share, known
    )
    logits = out_of_fold(tested, case.folded)
    made, logits = _levelled(made, logits, standard.scale * standard.logits, standard.weights, known)
    return made, tested, logits


def blend(
    base: Head, base_scale: jax.Array, made: Head, scale: jax.Array, share: jax.Array, known: jax.Array
) -> Head:
    """`share · scale · made + (1 − share) · base_scale · base`, in the dtypes they came in.

    Classes that are not `known` keep the logits of the base. The others are moved to its level, which a
    softmax over them alone does not see.
    """
    num_known = jnp.maximum(jnp.sum(known), 1).astype(scale.dtype)

    def mixed(old: jax.Array, new: jax.Array) -> jax.Array:
        old, found = old.astype(scale.dtype) * base_scale, new.astype(scale.dtype) * scale
        held = known if found.ndim == 1 else known[None, :]
        off = jnp.sum(jnp.where(held, old - found, 0), axis=-1, keepdims=True) / num_known
        found = jnp.where(held, found + jnp.where(known.all(), 0, off), old)
        return (share * found + (1 - share) * old).astype(new.dtype)

    return jax.tree.map(mixed, base, made)


def _levelled(
    made: Head, logits: jax.Array, base: jax.Array, weights: jax.Array, known: jax.Array
) -> tuple[Head, jax.Array]:
    """Known classes moved so that those that keep their logits compete with them as they did with the base.

    A candidate that is surer of the known classes would otherwise crowd the others out: the mean over rows of
    `log Σ exp` of the known logits stays that of the base. Without a bias there is nothing to move.
    """
    if made.bias is None:
        return made, logits
    of_known = lambda z: jax.nn.logsumexp(jnp.where(known[None, :], z, -jnp.inf), axis=1)  # noqa: E731
    level = weighted_mean(of_known(base) - of_known(logits), weights)
    moved = jnp.where(known, jnp.where(known.all() | ~known.any(), 0, level), 0)
    bias = (made.bias.astype(moved.dtype) + moved).astype(made.bias.dtype)
    return made._replace(bias=bias), logits + moved[None, :]


def _is_finite(head: Head) -> jax.Array:
    return jnp.stack([all_finite(part) for part in jax.tree.leaves(head)]).all()
