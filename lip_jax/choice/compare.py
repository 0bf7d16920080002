"""Never harm: one candidate per method, chosen and tested on labels the head has not seen.

The validation rows are split in halves by a fixed permutation. On the first half every method chooses its
rank or strength and gets one logit scale, and the best method is named. On the second half that one candidate
is compared with the head as it came, row by row. It is taken if it is better by `num_standard_errors` and its
log-loss is not worse. Labels of both halves may be noisy: noise that does not depend on the head lowers both
scores alike. Candidates are tested as they would be stored, after the cast to the dtype of the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lip_jax._checks import all_finite, check_softmax_kernel
from lip_jax._types import Bias, Feats, Kernel, Labels, Weights
from lip_jax.choice.evidence import (
    Metric,
    likelier_noise,
    logits_on,
    noise_loss,
    paired_difference,
    score,
    scorer,
)
from lip_jax.choice.report import Selection, SelectionReport
from lip_jax.methods.calibrated import Calibrated
from lip_jax.methods.logit_scale import logit_scale
from lip_jax.methods.protocol import (
    Fit,
    Head,
    HeadPath,
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
from lip_jax.quality.memorisation import MEMORISED_MARGIN
from lip_jax.rows.checks import check_rows, check_validation, count_ignored, raise_if_ignored
from lip_jax.rows.labels import Rows, as_rows
from lip_jax.rows.metrics import Metrics, compute_metrics, row_weights

DEFAULT_METHODS: tuple[Method, ...] = (Published(), Calibrated(), Ridge(), Purified())

# At least 2 rows in each quarter.
FEWEST_SEEN = 8


@dataclass(frozen=True)
class Choice:
    """A choice among methods, by evidence: what `lip_jax.apply` does where no method is named.

    Attributes:
        methods: What to choose among; the head as it came always is.
        metric: `"accuracy"`, `"balanced_accuracy"` or `"log_loss"`.
        num_standard_errors: How many standard errors of the paired difference to ask for.
    """

    methods: tuple[Method, ...] = DEFAULT_METHODS
    metric: Metric = "accuracy"
    num_standard_errors: float = 3.0


class Candidate(NamedTuple):
    """The head of a method that the choosing rows prefer, at which strength, and whether there is any."""

    head: Head
    strength: jax.Array
    available: jax.Array


class _Judged(NamedTuple):
    """A candidate with its logit scale folded in, and all that is said of it."""

    head: Head
    scale: jax.Array
    available: jax.Array
    choosing: jax.Array
    veto: jax.Array
    metrics: Metrics
    paired: tuple[jax.Array, jax.Array]
    loss: jax.Array


def select(
    kernel: Kernel,
    feats: Feats,
    labels: Labels,
    *,
    bias: Bias | None,
    validation: tuple | None = None,
    weights: Weights | None = None,
    methods: Sequence[Method] = DEFAULT_METHODS,
    metric: Metric = "accuracy",
    num_standard_errors: float | int = 3.0,
) -> Selection:
    """The best head among refits, readouts and the head as it came, by labels it has not seen.

    A candidate replaces the head only if two things hold on the half of the validation rows that chose
    nothing.

    1. Its mean paired gain exceeds `num_standard_errors` standard errors, `√(Σ p²(d − mean(d))² + (Σ p²)²)`
       with `p = w/Σw`. The last term keeps the error above 0 where all differences agree.
    2. Its log-loss is no worse than the head's. With class ids and a readout among the methods it is taken
       under the label noise estimated on the fitting rows, or under none where that gives the first half of
       the validation rows a higher likelihood. Otherwise it is the plain log-loss.

    Without validation rows only readouts are tried, as refits keep directions that have seen these rows. They
    are fitted on one half of the rows and judged on the other, where the head is favoured, as it knows both.
    Where the head agrees with those labels far more than a readout that has not seen them, they look
    memorised, and nothing is changed.

    Args:
        kernel: Kernel of a softmax head `(q, l)`, `l ≥ 2`.
        feats: Rows to fit candidates on `(n, q)`.
        labels: Their labels, of any kind. Where the body memorised its training labels, fit on rows held
            out from it.
        bias: The head's bias `(l,)`, or None where it has none.
        validation: `(feats, labels)` or `(feats, labels, weights)` that neither the head nor the fit has
            seen; at least 2 rows. Labels may be noisy.
        weights: Weight of each fitting row `(n,)`.
        methods: What to choose among. `Purified()` costs seconds where the others cost milliseconds.
        metric: `"accuracy"`, `"balanced_accuracy"` or `"log_loss"`.
        num_standard_errors: How many standard errors of the paired difference to ask for.

    Returns:
        A `lip_jax.choice.Selection`: kernel and bias in the dtypes they came in, and the report.

    Raises:
        ValueError: If shapes do not fit, a method or the metric is unknown, or, where values can be seen, a
            row cannot be used.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> labels = jnp.arange(4000) % 4
        >>> feats = jax.random.normal(jax.random.key(0), (4000, 8)).at[jnp.arange(4000), labels].add(2.0)
        >>> kernel, bias = jax.random.normal(jax.random.key(1), (8, 4)), jnp.zeros(4)
        >>> held_out = feats[2000:], labels[2000:]
        >>> chosen = lip_jax.select(kernel, feats[:2000], labels[:2000], bias=bias, validation=held_out)
        >>> bool(lip_jax.head_metrics(feats @ chosen.kernel + chosen.bias[None, :], labels).accuracy > 0.8)
        True

    Reference:
        Candidates: [si2025], [li2020]; the rule of choice is this package's.
    """
    choice = Choice(methods, metric, num_standard_errors)  # pyright: ignore[reportArgumentType]
    rows = Rows(feats, labels, weights)
    # Arrays of NumPy, too, until they are checked.
    head: Any = Head(kernel, bias)  # pyright: ignore[reportArgumentType]
    return choose(head, rows, choice, validation)


def choose(head: Head, rows: Rows, choice: Choice, validation: tuple | None) -> Selection:
    """`select` with its arguments gathered."""
    feats, labels, weights = rows
    check_softmax_kernel(head.kernel)
    q, l = head.kernel.shape
    check_rows(q, l, feats, labels, weights, head.bias, 0.0, "current")
    _check_choice(choice)
    # Hashable, as it is compiled in.
    choice = replace(
        choice, methods=tuple(choice.methods), num_standard_errors=float(choice.num_standard_errors)
    )
    methods = choice.methods
    feats_array, labels_array, weights_array, bias = as_rows(feats, labels, weights, head.bias)
    head, fit = Head(jnp.asarray(head.kernel), bias), Rows(feats_array, labels_array, weights_array)
    if validation is None:
        readouts = tuple(method for method in methods if not is_refit(method))
        if methods and not readouts:
            raise ValueError(
                f"methods must hold a readout where there is no validation=; got "
                f"{', '.join(map(name_of, methods))}, refits, which only unseen rows can judge. "
                f"Pass validation=, or apply one method unasked."
            )
        if feats.shape[0] < FEWEST_SEEN:
            raise ValueError(
                f"feats must hold at least {FEWEST_SEEN} rows to choose without validation=; got "
                f"{feats.shape[0]}."
            )
        selection = _compare_seen(head, fit, replace(choice, methods=readouts))
    else:
        val, ignored = check_validation(validation, q, l)
        selection = _compare(head, fit, val, ignored, choice)
    raise_if_ignored(selection.report.ignored, feats, labels, weights, l)
    return selection


def _check_choice(choice: Choice) -> None:
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


def labels_of(methods: tuple[Method, ...]) -> tuple[str, ...]:
    """Names for reports: with options where several methods have one name."""
    names = [name_of(method) for method in methods]
    return tuple(
        name if names.count(name) == 1 else repr(method) for name, method in zip(names, methods, strict=True)
    )


def best_on(path: HeadPath, base: jax.Array, rows: Rows, metric: Metric) -> Candidate:
    """The candidate of a path with the best score; of equals the first."""
    index = jnp.zeros((), jnp.int32)
    if path.strength.shape[0] > 1:
        scores = path.over_logits(rows.feats, scorer(base, rows, metric))
        index = jnp.argmax(jnp.where(jnp.isnan(scores), -jnp.inf, scores)).astype(jnp.int32)
    return Candidate(path.head(index), path.strength[index].astype(jnp.float32), path.available)


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
    best = best_on(path, logits_on(head, val), val, "accuracy")
    found = best.head
    if not is_refit(method):
        found = _scaled(found, logit_scale(logits_on(found, val), val.labels, val.weights))
    return Settled(found, best.strength, fit.ignored), path.strength


@partial(jax.jit, static_argnames=("choice",))
def _compare(head: Head, rows: Rows, val: Rows, ignored: jax.Array, choice: Choice) -> Selection:
    """`select` by validation rows, on checked arguments; `ignored` of them cannot be used."""
    fit, (choosing, test) = _prepare(head, rows, choice), halves(val)
    fit = replace(fit, ignored=fit.ignored + ignored)
    return _compare_fits(head, fit, choosing, test, choice, _candidates(head, fit, choosing, choice))


@partial(jax.jit, static_argnames=("choice",))
def _compare_seen(head: Head, rows: Rows, choice: Choice) -> Selection:
    """`select` by rows the head has seen: readouts are fitted to one half and judged on the other."""
    first, second = halves(rows)
    fit, (choosing, test) = _prepare(head, first, choice, least="factors"), halves(second)
    candidates = _candidates(head, fit, choosing, choice)
    selection = _compare_fits(head, fit, choosing, test, choice, candidates)
    if Ridge() in choice.methods and choice.metric == "accuracy":
        reference = candidates[1 + choice.methods.index(Ridge())].head
    else:
        path = path_of(Ridge(), head, fit)
        reference = best_on(path, logits_on(head, choosing), choosing, "accuracy").head
    margin, error = paired_difference(logits_on(head, test), logits_on(reference, test), test, "accuracy")
    memorised = margin > MEMORISED_MARGIN + 3 * error
    report = replace(
        selection.report,
        memorised=memorised,
        chosen=jnp.where(memorised, 0, selection.report.chosen),
        ignored=fit.ignored + count_ignored(second, l=head.kernel.shape[1]),
    )
    found = Head(selection.kernel, selection.bias)
    taken = jax.tree.map(lambda old, new: jnp.where(memorised, old, new), head, found)
    return replace(selection, kernel=taken.kernel, bias=taken.bias, report=report)


def _prepare(head: Head, rows: Rows, choice: Choice, least: Needs = "rows") -> Fit:
    needs = most_needed(choice.methods)
    # The quality of labels also tells their noise. Refits alone cost less than it would: there losses are
    # taken as they come.
    needs = least if needs == "rows" else "quality"
    return prepare(rows, head.kernel.shape[1], intercept=head.bias is not None, needs=needs)


def _candidates(head: Head, fit: Fit, choosing: Rows, choice: Choice) -> list[Candidate]:
    """The head as it came, and the best of each method by the choosing rows."""
    base = logits_on(head, choosing)
    found = [Candidate(head, jnp.asarray(jnp.nan, jnp.float32), jnp.asarray(True))]
    for method in choice.methods:
        found.append(best_on(path_of(method, head, fit), base, choosing, choice.metric))
    return found


def _compare_fits(
    head: Head, fit: Fit, choosing: Rows, test: Rows, choice: Choice, candidates: list[Candidate]
) -> Selection:
    metric = choice.metric
    offered = jax.tree.map(lambda *leaves: jnp.stack(leaves), *candidates)
    transition = None
    if fit.quality is not None and choosing.labels.ndim == 1:
        transition = likelier_noise(choosing, offered.head, fit.quality.transition)
    base = logits_on(head, test)

    def judged(candidate: Candidate, first: jax.Array) -> _Judged:
        def own_scale() -> jax.Array:
            logits = logits_on(candidate.head, choosing)
            return logit_scale(logits, choosing.labels, choosing.weights, transition)

        scale = jax.lax.cond(first, lambda: jnp.ones((), base.dtype), own_scale)
        scaled = _scaled(candidate.head, scale)
        chosen_by = logits_on(scaled, choosing)
        # Those of the head as it came are `base` to the last bit.
        tested = jnp.where(first, base, logits_on(scaled, test))
        return _Judged(
            head=scaled,
            scale=scale,
            available=candidate.available & _is_finite(scaled),
            choosing=score(chosen_by, choosing, metric),
            veto=noise_loss(chosen_by, choosing, transition),
            metrics=compute_metrics(tested, test.labels, test.weights),
            paired=paired_difference(tested, base, test, metric),
            loss=noise_loss(tested, test, transition),
        )

    # One program for all, a candidate at a time: written out for each, it would be a quarter larger.
    first = jnp.arange(len(candidates), dtype=jnp.int32) == 0
    found = jax.lax.map(lambda part: judged(*part), (offered, first))

    eligible = found.available & (found.veto <= found.veto[0])
    # The first of equals is taken, so a candidate must beat "unchanged" to be tested at all.
    winner = jnp.argmax(jnp.where(eligible, found.choosing, -jnp.inf)).astype(jnp.int32)
    difference, error = found.paired
    enough = difference[winner] > choice.num_standard_errors * error[winner]
    better = enough & (found.loss[winner] <= found.loss[0])
    chosen = jnp.where(better, winner, 0).astype(jnp.int32)

    scaled = [jax.tree.map(lambda leaf, i=i: leaf[i], found.head) for i in range(1, len(candidates))]
    heads = (head, *scaled)
    taken = jax.tree.map(lambda *leaves: jax.lax.select_n(chosen, *leaves), *heads)
    report = SelectionReport(
        methods=("unchanged", *labels_of(choice.methods)),
        strength=offered.strength,
        available=found.available,
        choosing=found.choosing,
        difference=difference,
        standard_error=error,
        noise_loss=found.loss,
        scale=found.scale.astype(jnp.float32),
        chosen=chosen,
        winner=winner,
        tested=jnp.sum(row_weights(base, test.labels, test.weights) > 0, dtype=jnp.int32),
        memorised=jnp.asarray(False),
        ignored=fit.ignored,
        metric=metric,
        num_standard_errors=choice.num_standard_errors,
        **{name: getattr(found.metrics, name) for name in Metrics.__annotations__},
    )
    return Selection(taken.kernel, taken.bias, report, heads)


def _is_finite(head: Head) -> jax.Array:
    return jnp.stack([all_finite(part) for part in jax.tree.leaves(head)]).all()


def _scaled(head: Head, scale: jax.Array) -> Head:
    return jax.tree.map(lambda part: (part.astype(scale.dtype) * scale).astype(part.dtype), head)


def halves(rows: Rows) -> tuple[Rows, Rows]:
    """The rows in two halves, by a permutation that depends on their number alone."""
    n = rows.feats.shape[0]
    order = jax.random.permutation(jax.random.key(0), n)
    first, second = order[: n // 2], order[n // 2 :]
    return jax.tree.map(lambda part: part[first], rows), jax.tree.map(lambda part: part[second], rows)
