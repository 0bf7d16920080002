"""The choice: candidates of several methods, and blends of each with the head as it came.

A candidate is taken if rows it has not seen show it to be better (`lip_jax.choice.evidence`): one of the two
kinds of evidence by the level of the choice, the other by one standard error in the same direction. Of those
that pass the likeliest is taken. Which rows judge depends on what the head has seen:

| given | who judges | whom they judge |
|---|---|---|
| `validation=` | the validation rows | candidates fitted to the other rows, against the head |
| `seen=False` | all rows, each fold by fits without it | candidates against the head |
| neither | the same | candidates against a stand-in for the head (`lip_jax.choice.imitation`) |

Labels may be noisy everywhere: noise that does not depend on the head lowers the scores of all alike.
Candidates are judged as they would be stored, at one logit scale.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lip_jax._checks import check_softmax_kernel, is_concrete
from lip_jax._types import Bias, Feats, Kernel, Labels, Weights
from lip_jax.choice.candidates import best_places, chosen_out_of_fold, fitted_out_of_fold
from lip_jax.choice.evidence import (
    FOLDS,
    SUPPORT,
    Metric,
    Source,
    contributions,
    flat,
    fold_places,
    fold_scorer,
    in_folds,
    informed,
    logits_on,
    out_of_fold,
    paired,
)
from lip_jax.choice.imitation import Imitation, imitate, stand_in
from lip_jax.choice.judge import (
    Case,
    Rule,
    Standard,
    case_of,
    judge,
    likeliest,
    logits_of_one,
    standard_of,
)
from lip_jax.choice.report import Selection, SelectionReport
from lip_jax.methods.calibrated import Calibrated
from lip_jax.methods.logit_scale import logit_scale
from lip_jax.methods.protocol import (
    Head,
    Method,
    Needs,
    Settled,
    check_method,
    is_refit,
    most_needed,
    name_of,
    needs_of,
    path_of,
    prepare,
)
from lip_jax.methods.published import Published
from lip_jax.methods.purified import Purified
from lip_jax.methods.ridge import Ridge
from lip_jax.quality.memorisation import MEMORISED_MARGIN, NEAR_TOTAL
from lip_jax.quality.trust import evident_transition
from lip_jax.rows.checks import check_rows, check_shares, check_validation, raise_if_ignored
from lip_jax.rows.labels import Rows, as_rows, label_use
from lip_jax.rows.metrics import Metrics, error_of_mean, weighted_mean
from lip_jax.rows.repeats import first_places, found_in

DEFAULT_METHODS: tuple[Method, ...] = (Published(), Calibrated(), Ridge(), Purified())

# At least 2 rows in each fold.
FEWEST_ROWS = 10
# A class with fewer fitting rows cannot be fitted.
FEWEST_OF_CLASS = 2
# A class of which so many validation rows should have come, and none did, cannot be judged.
EXPECTED_OF_CLASS = 5


@dataclass(frozen=True)
class Choice:
    """A choice among methods, by evidence: what `lip_jax.apply` does where no method is named.

    Attributes:
        methods: What to choose among; the head as it came always is.
        metric: `"accuracy"`, `"balanced_accuracy"` or `"log_loss"`.
        num_standard_errors: How many standard errors of a paired difference to ask for. With several methods
            the level is higher, `√(num_standard_errors² + 2 log m)` for m of them.
        trust_feats: Whether to choose even where the head predicts these labels no better than chance, as an
            untrained head does, or one that is given features that are not its inputs.
    """

    methods: tuple[Method, ...] = DEFAULT_METHODS
    metric: Metric = "accuracy"
    num_standard_errors: float = 2.0
    trust_feats: bool = False

    @property
    def level(self) -> float:
        """How many standard errors the evidence must reach."""
        return float(np.sqrt(self.num_standard_errors**2 + 2 * np.log(max(len(self.methods), 1))))


def select(
    kernel: Kernel,
    feats: Feats,
    labels: Labels,
    *,
    bias: Bias | None,
    validation: tuple | None = None,
    seen: bool = True,
    weights: Weights | None = None,
    methods: Sequence[Method] = DEFAULT_METHODS,
    metric: Metric = "accuracy",
    num_standard_errors: float | int = 2.0,
    trust_feats: bool = False,
) -> Selection:
    """The best head among refits, readouts, their blends with the head as it came, and that head itself.

    Each method offers candidates `W_m`. Each of these is blended with the head `W` as it came,
    `share · a_m W_m + (1 − share) · a W`, with the logit scale `a` that suits each and shares of 1, 0.75,
    0.5 and 0.25. Rows are split into folds, and every fold is judged by candidates chosen without it. Two
    differences to the head are pooled over all folds: that of the metric, and that of the log-likelihood
    under the label noise estimated on the fitting rows, or under none where that makes the labels likelier.
    A candidate passes if one of them exceeds `√(num_standard_errors² + 2 log m)` standard errors, with `m`
    methods, and the other one standard error, or one and a half with `seen=False`. Of those that pass the
    likeliest is taken. With `metric="log_loss"` the log-loss decides alone.

    - With `validation=`, these rows judge candidates fitted to `feats`.
    - With `seen=False`, neither the head nor its body was trained on `feats`: candidates are fitted in turn
      to the rows outside each fold, and all rows judge.
    - With neither, the head cannot be judged on its training rows. A readout of the same rows with the norm
      of the head is judged in its place, if it resembles the head (`lip_jax.choice.Imitation`).

    A class with fewer than 2 fitting rows, or with none among validation rows where 5 are to be expected,
    keeps the logits of the head as it came. A candidate that never predicts a class rightly, which the head
    does 5 times, is not taken.

    Args:
        kernel: Kernel of a softmax head `(q, l)`, `l ≥ 2`.
        feats: Rows to fit candidates on `(n, q)`.
        labels: Their labels, of any kind.
        bias: The head's bias `(l,)`, or None where it has none.
        validation: `(feats, labels)` or `(feats, labels, weights)` that neither the head nor the fit has
            seen; at least 2 rows. Labels may be noisy. Rows that are also in `feats` do not judge.
        seen: Whether the head or its body was trained on `feats`.
        weights: Weight of each fitting row `(n,)`.
        methods: What to choose among. `Purified()` costs seconds where the others cost milliseconds.
        metric: `"accuracy"`, `"balanced_accuracy"` or `"log_loss"`.
        num_standard_errors: How many standard errors of a paired difference to ask for.
        trust_feats: Choose even where the head predicts no better than chance.

    Returns:
        A `lip_jax.choice.Selection`: kernel and bias in the dtypes they came in, and the report.

    Raises:
        ValueError: If shapes do not fit, a method or the metric is unknown, or, where values can be seen, a
            row cannot be used.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> truth = 2 * jax.random.normal(jax.random.key(0), (8, 4))
        >>> feats = jax.random.normal(jax.random.key(1), (4000, 8))
        >>> labels = jnp.argmax(feats @ truth, axis=1).astype(jnp.int32)
        >>> kernel, bias = truth + 2 * jax.random.normal(jax.random.key(2), (8, 4)), jnp.zeros(4)
        >>> held_out = feats[2000:], labels[2000:]
        >>> chosen = lip_jax.select(kernel, feats[:2000], labels[:2000], bias=bias, validation=held_out)
        >>> int(chosen.report.chosen) > 0 and float(chosen.report.difference[chosen.report.chosen]) > 0.1
        True

    Reference:
        Candidates: [si2025], [li2020]; the rule of choice is this package's.
    """
    choice = Choice(methods, metric, num_standard_errors, trust_feats)  # pyright: ignore[reportArgumentType]
    rows = Rows(feats, labels, weights)
    # Arrays of NumPy, too, until they are checked.
    head: Any = Head(kernel, bias)  # pyright: ignore[reportArgumentType]
    return choose(head, rows, choice, validation, seen=seen)


class Decision(NamedTuple):
    """A choice, and what a further candidate needs to be held against it.

    `standards` are the logits out of fold of the head as it came and of what was taken, with the rows that
    judged; `val` and `first` are the validation rows that count and the places of the first of equal rows;
    `also` whether readouts of them were tried.
    """

    selection: Selection
    standards: tuple[Standard, Standard] | None
    val: Rows | None
    first: np.ndarray | None
    also: bool


def choose(
    head: Head, rows: Rows, choice: Choice, validation: tuple | None, *, seen: bool = True
) -> Selection:
    """`select` with its arguments gathered."""
    return decide(head, rows, choice, validation, seen=seen).selection


def decide(
    head: Head, rows: Rows, choice: Choice, validation: tuple | None, *, seen: bool, keep: bool = False
) -> Decision:
    """`choose`; with `keep`, the logits that were compared are handed on."""
    feats, labels, weights = rows
    check_softmax_kernel(head.kernel)
    q, l = head.kernel.shape
    check_rows(q, l, feats, labels, weights, head.bias, 0.0, "current")
    check_shares(labels)
    choice = _checked(choice)
    feats_array, labels_array, weights_array, bias = as_rows(feats, labels, weights, head.bias)
    head, fit = Head(jnp.asarray(head.kernel), bias), Rows(feats_array, labels_array, weights_array)
    if validation is None:
        if feats.shape[0] < FEWEST_ROWS:
            raise ValueError(
                f"feats must hold at least {FEWEST_ROWS} rows to choose without validation=; got "
                f"{feats.shape[0]}."
            )
        imitation = imitate(head, fit) if seen else None
        if imitation is not None and is_concrete(imitation.resembles) and not bool(imitation.resembles):
            # Nothing can be taken, so that nothing need be tried.
            choice = replace(choice, methods=())
        first = first_places(feats)
        selection, standards = _choose_within(head, fit, first, choice, imitation, keep=keep)
        decision = Decision(selection, standards, None, first, also=False)
    else:
        val, ignored = check_validation(validation, q, l)
        val, first, left_out = _independent(fit, val)
        memorised = _memorised(head, fit, val)
        # What can be seen decides what is compiled: readouts of the rows that judge are tried where no others
        # can be trusted.
        also = is_concrete(memorised) and bool(memorised)
        selection, standards = _choose_by(head, fit, val, first, choice, also=also, keep=keep)
        report = selection.report
        report = replace(report, ignored=report.ignored + ignored, memorised=memorised, shared=left_out)
        decision = Decision(replace(selection, report=report), standards, val, first, also)
    raise_if_ignored(decision.selection.report.ignored, feats, labels, weights, l)
    return decision


def _checked(choice: Choice) -> Choice:
    """A choice that can be made; hashable, as it is compiled in."""
    if isinstance(choice.methods, str) or not isinstance(choice.methods, Sequence):
        raise ValueError(
            f"methods must be a sequence of methods, such as (lip_jax.Ridge(),); got {choice.methods!r}."
        )
    for method in choice.methods:
        check_method(method)
    if choice.metric not in ("accuracy", "balanced_accuracy", "log_loss"):
        raise ValueError(
            f"metric must be 'accuracy', 'balanced_accuracy' or 'log_loss'; got {choice.metric!r}."
        )
    if not choice.num_standard_errors >= 0:
        raise ValueError(f"num_standard_errors must be at least 0; got {choice.num_standard_errors}.")
    return replace(
        choice, methods=tuple(choice.methods), num_standard_errors=float(choice.num_standard_errors)
    )


def labels_of(methods: tuple[Method, ...]) -> tuple[str, ...]:
    """Names for reports: with options where several methods have one name."""
    names = [name_of(method) for method in methods]
    return tuple(
        name if names.count(name) == 1 else repr(method) for name, method in zip(names, methods, strict=True)
    )


def choose_strength(head: Head, rows: Rows, method: Method, validation: tuple) -> Settled:
    """The head of one method at the rank or strength that validation rows prefer, with no test against it."""
    check_softmax_kernel(head.kernel)
    q, l = head.kernel.shape
    val, ignored = check_validation(validation, q, l)
    feats, labels, weights, bias = as_rows(*rows, head.bias)
    found, size = _at_best_strength(
        Head(jnp.asarray(head.kernel), bias), Rows(feats, labels, weights), val, method
    )
    if size.shape[0] < 2:
        raise ValueError(
            f"validation= has nothing to choose: the method {name_of(method)} leaves neither rank nor "
            f"strength open. Leave out validation=, or compare it with the head by lip_jax.Choice(methods=…)."
        )
    return found._replace(ignored=found.ignored + ignored)


@partial(jax.jit, static_argnames=("method",))
def _at_best_strength(head: Head, rows: Rows, val: Rows, method: Method) -> tuple[Settled, jax.Array]:
    fit = prepare(rows, head.kernel.shape[1], intercept=head.bias is not None, needs=needs_of(method))
    path = path_of(method, head, fit)
    place = best_places(path.over_logits(val.feats, fold_scorer(logits_on(head, val), val, "accuracy", 1)))[1]
    found = path.head(place)
    if not is_refit(method):
        scale = logit_scale(logits_on(found, val), val.labels, val.weights)
        found = jax.tree.map(lambda part: (part.astype(scale.dtype) * scale).astype(part.dtype), found)
    return Settled(found, path.strength[place].astype(jnp.float32), fit.ignored), path.strength


def _independent(fit: Rows, val: Rows) -> tuple[Rows, np.ndarray | None, jax.Array]:
    """Validation rows that do not fit, the place of the first of equal rows, and how many were left out."""
    known = found_in(val.feats, fit.feats)
    if known is None:
        return val, None, jnp.zeros((), jnp.int32)
    counted = np.asarray(_counted(val))
    known &= counted
    if not known.any():
        return val, first_places(val.feats), jnp.zeros((), jnp.int32)
    found = f"{int(known.sum())} of {int(counted.sum())} validation rows are also in feats"
    if known[counted].all():
        found += (
            ", so that no row is left to judge by: the head is returned as it came. Pass rows held out from "
        )
        found += "feats; if the head was not trained on feats, seen=False needs no others."
    else:
        found += ". They are left out, as rows that fit a candidate cannot judge it."
    warnings.warn(found, stacklevel=5)
    weights = jnp.where(known, 0, jnp.ones(len(known)) if val.weights is None else val.weights)
    return val._replace(weights=weights), first_places(val.feats), jnp.asarray(known.sum(), jnp.int32)


@jax.jit
def _memorised(head: Head, fit: Rows, val: Rows) -> jax.Array:
    """Whether the head agrees with the fitting rows far more than with the validation rows."""
    hits, weights = contributions(logits_on(head, fit), fit, "accuracy")
    theirs, judges = contributions(logits_on(head, val), val, "accuracy")
    own, reference = weighted_mean(hits, weights), weighted_mean(theirs, judges)
    error = jnp.hypot(error_of_mean(hits, own, weights), error_of_mean(theirs, reference, judges))
    counted = (jnp.sum(weights) > 0) & (jnp.sum(judges) > 0)
    return counted & (own - reference > MEMORISED_MARGIN + 3 * error)


@partial(jax.jit, static_argnames=("choice", "also", "keep"))
def _choose_by(
    head: Head, rows: Rows, val: Rows, first: jax.Array | None, choice: Choice, *, also: bool, keep: bool
) -> tuple[Selection, tuple[Standard, Standard] | None]:
    """`select` by validation rows, on checked arguments."""
    case, names = tried_by(head, rows, val, first, choice, also=also)
    return _decide(case, names, choice, "validation", None, keep=keep)


@partial(jax.jit, static_argnames=("choice", "keep"))
def _choose_within(
    head: Head,
    rows: Rows,
    first: jax.Array | None,
    choice: Choice,
    imitation: Imitation | None,
    *,
    keep: bool,
) -> tuple[Selection, tuple[Standard, Standard] | None]:
    """`select` by the rows that fit: against the head if it has not seen them, else against its imitation."""
    source: Source = "unseen rows" if imitation is None else "imitation"
    case, names = tried_within(head, rows, first, choice, source, imitation)
    return _decide(case, names, choice, source, imitation, keep=keep)


def tried_by(
    head: Head, rows: Rows, val: Rows, first: jax.Array | None, choice: Choice, *, also: bool
) -> tuple[Case, tuple[str, ...]]:
    """Candidates for validation rows to judge, and names; `also` readouts of these rows themselves."""
    l = head.kernel.shape[1]
    fit = prepare(rows, l, intercept=head.bias is not None, needs=_needs(choice))
    places = fold_places(val.feats.shape[0], FOLDS["validation"])
    folded = in_folds(val, places, first)
    trials = chosen_out_of_fold(head, fit, choice.methods, folded, choice.metric)
    names = labels_of(choice.methods)
    counts, judges = _of_class(rows, l), _of_class(val, l)
    expected = counts / jnp.maximum(jnp.sum(counts), 1) * jnp.sum(judges)
    known = [(counts >= FEWEST_OF_CLASS) & ~((judges == 0) & (expected >= EXPECTED_OF_CLASS))] * len(trials)
    readouts = tuple(method for method in choice.methods if not is_refit(method))
    if also and readouts:
        fold = _fold_of_rows(places, first)
        own = fitted_out_of_fold(
            head, val, readouts, folded, fold, choice.metric, most_needed(readouts), None
        )
        trials += own.trials
        names += tuple(f"{name}, held out" for name in labels_of(readouts))
        known += [judges >= FEWEST_OF_CLASS] * len(own.trials)
    bases = jax.tree.map(lambda part: jnp.broadcast_to(part, (places.shape[0], *part.shape)), head)
    transition = None if fit.quality is None else evident_transition(fit.quality)
    return case_of(head, bases, folded, trials, known, transition, fit.ignored), names


def tried_within(
    head: Head,
    rows: Rows,
    first: jax.Array | None,
    choice: Choice,
    source: Source,
    imitation: Imitation | None,
) -> tuple[Case, tuple[str, ...]]:
    """Candidates fitted without each fold in turn, for all rows to judge, and names."""
    l = head.kernel.shape[1]
    places = fold_places(rows.feats.shape[0], FOLDS[source])
    folded = in_folds(rows, places, first)
    make = None
    if imitation is not None and choice.methods:
        used = jnp.where(_counted(rows, l), 1 if rows.weights is None else rows.weights, 0)
        total = jnp.sum(used.astype(folded.weights.dtype))
        make = partial(stand_in, head, strength=imitation.strength, total=total)
    fold = _fold_of_rows(places, first)
    made = fitted_out_of_fold(head, rows, choice.methods, folded, fold, choice.metric, _needs(choice), make)
    known = [_of_class(rows, l) >= FEWEST_OF_CLASS] * len(made.trials)
    case = case_of(head, made.bases, folded, made.trials, known, made.transition, made.ignored)
    return case, labels_of(choice.methods)


def _needs(choice: Choice) -> Needs:
    # The quality of labels also tells their noise. Refits alone cost less than it would: there losses are
    # taken as they come.
    return "rows" if most_needed(choice.methods) == "rows" else "quality"


def _counted(rows: Rows, l: int | None = None) -> jax.Array:
    """Which rows have a label and a weight."""
    unlabelled, bad = label_use(rows.labels, np.iinfo(np.int32).max if l is None else l)
    used = ~(unlabelled | bad)
    return used if rows.weights is None else used & (rows.weights.astype(jnp.float32) > 0)


def _of_class(rows: Rows, l: int) -> jax.Array:
    """How many labelled rows of each class count, or the mass of its targets."""
    used = _counted(rows, l)
    counts = used.astype(jnp.float32)
    if rows.labels.ndim == 1:
        return jnp.zeros(l, counts.dtype).at[jnp.clip(rows.labels, 0, l - 1)].add(counts)
    return jnp.sum(jnp.where(used[:, None], rows.labels, 0), axis=0).astype(counts.dtype)


def _fold_of_rows(places: np.ndarray, first: jax.Array | np.ndarray | None) -> jax.Array:
    """The fold of each row; equal rows lie in one."""
    fold = np.zeros(int((places >= 0).sum()), np.int32)
    for k, block in enumerate(places):
        fold[block[block >= 0]] = k
    return jnp.asarray(fold) if first is None else jnp.asarray(fold)[first]


def _decide(
    case: Case,
    names: tuple[str, ...],
    choice: Choice,
    source: Source,
    imitation: Imitation | None,
    *,
    keep: bool,
) -> tuple[Selection, tuple[Standard, Standard] | None]:
    """Judge every candidate, take the likeliest of those that pass, and report."""
    rows = flat(case.folded)
    came = logits_on(case.head, rows)
    standard = standard_of(out_of_fold(case.bases, case.folded), rows, case.transition, choice.metric)
    trusted = jnp.asarray(choice.trust_feats) | informed(came, rows)
    memorised = near_total = jnp.zeros((), bool)
    may = trusted
    if imitation is not None:
        memorised, near_total = _seen(came, standard.logits, rows)
        may &= imitation.resembles & ~near_total
    table = judge(case, standard, Rule(choice.metric, choice.level, SUPPORT[source]), may)
    evidence = table.evidence
    # The head as it came is no candidate: the best of the others is named even where none passes.
    others = table._replace(available=table.available.at[0].set(~table.available[1:].any()))
    winner = likeliest(others)
    chosen = jnp.where(evidence.passes.any(), winner, 0).astype(jnp.int32)
    nothing = jnp.full(1, jnp.nan, jnp.float32)
    strength = nothing if case.trials is None else jnp.concatenate([nothing, case.trials.strength])
    report = SelectionReport(
        methods=("unchanged", *names),
        strength=strength,
        share=table.share.astype(jnp.float32),
        available=table.available,
        passes=evidence.passes,
        difference=evidence.metric.difference,
        standard_error=evidence.metric.error,
        likelihood_difference=evidence.likelihood.difference,
        likelihood_error=evidence.likelihood.error,
        noise_loss=evidence.loss,
        scale=table.scale.astype(jnp.float32),
        chosen=chosen,
        winner=winner,
        tested=jnp.sum(standard.weights > 0, dtype=jnp.int32),
        kept=table.kept[winner],
        informed=trusted,
        near_total=near_total,
        memorised=memorised,
        shared=jnp.zeros((), jnp.int32),
        ignored=case.ignored,
        imitation=imitation,
        source=source,
        metric=choice.metric,
        level=choice.level,
        **{name: getattr(evidence.metrics, name) for name in Metrics.__annotations__},
    )
    heads = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], table.head) for i in range(len(names) + 1))
    taken = jax.tree.map(lambda leaf: leaf[chosen], table.head)
    selection = Selection(taken.kernel, taken.bias, report, heads)
    if not keep:
        return selection, None
    logits = logits_of_one(case, standard, table, chosen)
    return selection, (standard, standard_of(logits, rows, case.transition, choice.metric))


def _seen(came: jax.Array, base: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Whether the head memorised the labels it has seen, or agrees with nearly all as its like does."""
    agreed, weights = contributions(came, rows, "accuracy")
    expected = contributions(base, rows, "accuracy")[0]
    difference, error = paired(agreed, expected, weights)
    own, others = weighted_mean(agreed, weights), weighted_mean(expected, weights)
    near_total = (own >= NEAR_TOTAL[0]) & (others >= NEAR_TOTAL[1])
    return difference > MEMORISED_MARGIN + 3 * error, near_total
