"""Never harm: one candidate per family, chosen and tested on labels the head has not seen.

The validation rows are split in halves by a fixed permutation. On the first half every family chooses its
own rank or strength and gets one logit scale, and the best family is named. On the second half that one
candidate is compared with the head as it came, row by row: it is taken only if it is better by `level`
paired standard errors and its log-loss is not worse. Labels of both halves may be noisy: noise that does
not depend on the head lowers both scores alike. Each family is tested as it would be stored, after the cast
to the dtype of the head.

A family is a function `(head, fit, choose, metric) -> Candidate`; `FAMILIES` names those that come with the
package, and any function of that signature may stand beside the names.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from lip_jax import _linalg
from lip_jax._checks import all_finite, check_softmax_kernel
from lip_jax._types import Bias, Feats, Kernel, Labels, Weights
from lip_jax.calibrate import Spectrum, calibrated_spectrum, logit_scale, refitted
from lip_jax.labels import Rows, as_rows
from lip_jax.logistic import fit_logistic
from lip_jax.metrics import (
    Metrics,
    balanced_hits,
    compute_metrics,
    corrected_losses,
    error_of_mean,
    hits,
    hits_by_comparing,
    losses,
    row_weights,
    weighted_mean,
)
from lip_jax.purify import MEMORISED_MARGIN, LabelQuality, purified_rows, quality_of, trusted_rows
from lip_jax.refit import (
    check_rows,
    check_validation,
    count_ignored,
    raise_if_ignored,
    refit_sigma,
)
from lip_jax.ridge import ridge_grid, ridge_path, ridge_solution
from lip_jax.spectral import leading
from lip_jax.tail import tail_sums

Metric = Literal["accuracy", "balanced_accuracy", "log_loss"]

DEFAULT_FAMILIES = ("published", "calibrated", "ridge", "purified")

RIDGE_POINTS = 13

# Strengths of the purified readout in mean eigenvalues; how closely and in how many steps each is fitted.
LOGISTIC_SHARES = (0.03, 0.003, 0.0003)
LOGISTIC_STEPS = 100
LOGISTIC_TOLERANCE = 1e-2


class Head(NamedTuple):
    """A kernel `(q, l)` and its bias `(l,)` or None."""

    kernel: jax.Array
    bias: jax.Array | None


class Candidate(NamedTuple):
    """What a family offers: its best head by the choosing rows, at which strength, and if at all."""

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


@dataclass(frozen=True)
class SelectionReport:
    """One row per family, "unchanged" first.

    Attributes:
        families: Names, `f` of them.
        strength: The rank or ridge each chose; NaN for "unchanged".
        available: Whether the family had a candidate, and a finite one (calibration may be undefined).
        choosing: Its score on the first half, higher is better.
        accuracy: On the second half, as are the metrics below.
        balanced_accuracy: See `lip_jax.Metrics`.
        log_loss: Likewise.
        calibration_error: Likewise.
        difference: Mean paired difference to "unchanged" in the metric, positive is better.
        standard_error: Of that difference.
        noise_loss: Log-loss under the estimated label noise, which is what vetoes; see `select`.
        scale: The logit scale folded into the candidate.
        chosen: Index of the head that was taken.
        winner: Index of the candidate that was tested.
        tested: How many rows of the second half count.
        memorised: Whether labels looked memorised (only without validation rows).
        ignored: How many rows could not be used.
        metric: By which metric.
        level: How many standard errors were asked for.
    """

    families: tuple[str, ...]
    strength: Float[jax.Array, "f"]
    available: Bool[jax.Array, "f"]
    choosing: Float[jax.Array, "f"]
    accuracy: Float[jax.Array, "f"]
    balanced_accuracy: Float[jax.Array, "f"]
    log_loss: Float[jax.Array, "f"]
    calibration_error: Float[jax.Array, "f"]
    difference: Float[jax.Array, "f"]
    standard_error: Float[jax.Array, "f"]
    noise_loss: Float[jax.Array, "f"]
    scale: Float[jax.Array, "f"]
    chosen: Int[jax.Array, ""]
    winner: Int[jax.Array, ""]
    tested: Int[jax.Array, ""]
    memorised: Bool[jax.Array, ""]
    ignored: Int[jax.Array, ""]
    metric: Metric
    level: float

    @property
    def reason(self) -> str:
        """Why the chosen head was chosen, in words."""
        winner, chosen = int(self.winner), int(self.chosen)
        name = self.families[winner]
        difference, error = float(self.difference[winner]), float(self.standard_error[winner])
        tested = f"{difference:+.4f} ± {error:.4f} in {self.metric.replace('_', '-')}"
        if bool(self.memorised):
            return "unchanged: the labels look memorised, so they cannot judge; pass validation="
        if winner == 0:
            better = np.asarray(self.available) & (np.asarray(self.choosing) > float(self.choosing[0]))
            vetoed = " without a worse log-loss" if better.any() else ""
            return f"unchanged: no candidate scored better on the choosing half{vetoed}"
        if chosen == winner:
            return f"{name}: better than unchanged by {tested}, at least {self.level:g} standard errors"
        if difference > self.level * error and difference > 0:
            return f"unchanged: {name} was better by {tested}, but its log-loss is worse"
        short = f"unchanged: {name} was best, but {tested} is less than {self.level:g} standard errors"
        if difference <= 0:
            return short
        # Errors shrink with the root of the rows.
        enough = int(self.tested) * (self.level * error / difference) ** 2
        digits = 1 - math.floor(math.log10(enough))
        some = f"some {round(enough, digits):,.0f}"
        return f"{short} on {int(self.tested)} rows; were the gain real, {some} would show it"

    def as_dict(self) -> dict:
        """Plain Python values, for JSON: a strength of NaN, which JSON lacks, is None."""
        plain = {name: np.asarray(value).tolist() for name, value in asdict(self).items()}
        strength = [None if np.isnan(value) else value for value in plain["strength"]]
        return plain | {"strength": strength, "reason": self.reason}

    def __str__(self) -> str:
        head = f"{'':2}{'family':12}{'strength':>10}{'accuracy':>10}{'balanced':>10}{'log-loss':>10}"
        lines = [head + f"{'ECE':>8}{'difference':>12}{'± s.e.':>9}"]
        for i, name in enumerate(self.families):
            mark = "* " if i == int(self.chosen) else "  "
            if not bool(self.available[i]):
                lines.append(f"{mark}{name:12}  left out: it is undefined on these rows")
                continue
            strength = "" if i == 0 else f"{float(self.strength[i]):.4g}"
            lines.append(
                f"{mark}{name:12}{strength:>10}{float(self.accuracy[i]):>10.4f}"
                f"{float(self.balanced_accuracy[i]):>10.4f}{float(self.log_loss[i]):>10.4f}"
                f"{float(self.calibration_error[i]):>8.4f}{float(self.difference[i]):>+12.4f}"
                f"{float(self.standard_error[i]):>9.4f}"
            )
        return "\n".join([*lines, self.reason])


_STATIC = ("families", "metric", "level")
jax.tree_util.register_dataclass(
    SelectionReport,
    data_fields=tuple(name for name in SelectionReport.__annotations__ if name not in _STATIC),
    meta_fields=_STATIC,
)


@dataclass(frozen=True)
class Selection:
    """The chosen head, the report of how it was chosen, and what else there was to choose.

    Attributes:
        kernel: `(q, l)`.
        bias: `(l,)`, or None where the head has none.
        report: One row per family.
        candidates: The head of each family, in the order of `report.families`, logit scale folded in.
    """

    kernel: Float[jax.Array, "q l"]
    bias: Float[jax.Array, "l"] | None
    report: SelectionReport
    candidates: tuple[Head, ...]


jax.tree_util.register_dataclass(
    Selection, data_fields=("kernel", "bias", "report", "candidates"), meta_fields=()
)


def published_spectrum(kernel: jax.Array, fit: Rows) -> Spectrum:
    """All components of the kernel, refitted as published."""
    kernel = kernel.astype(_linalg.compute_dtype(kernel))
    u, s, vt = _linalg.thin_svd(kernel)
    sums = tail_sums(u, vt, *fit, None)
    sigma = refit_sigma(s, sums, 0, kernel.shape[0], max(kernel.shape), 0.0, "current", None)
    return Spectrum(u, s, vt, sigma, jnp.zeros_like(s), jnp.ones((), s.dtype), sums.ignored)


def published_family(head: Head, fit: Rows, choose: Rows, metric: Metric) -> Candidate:
    """Published LIP at the rank the choosing rows prefer."""
    return _best_rank(head, published_spectrum(head.kernel, fit), choose, metric)


def calibrated_family(head: Head, fit: Rows, choose: Rows, metric: Metric) -> Candidate:
    """Calibrated LIP at the rank the choosing rows prefer."""
    spectrum = calibrated_spectrum(head.kernel, *fit, head.bias, 0.0, None)
    return _best_rank(head, spectrum, choose, metric)


def ridge_family(head: Head, fit: Rows, choose: Rows, metric: Metric) -> Candidate:
    """A ridge readout at the strength the choosing rows prefer."""
    path = ridge_path(*fit, head.kernel.shape[1], intercept=head.bias is not None)
    grid = ridge_grid(path, RIDGE_POINTS)
    along = _linalg.matmul(choose.feats.astype(path.basis.dtype) - path.mean_x[None, :], path.basis)

    def score_at(ridge):
        logits = _linalg.matmul(along, path.cross / (path.eigenvalues + ridge)[:, None])
        return _score(logits + path.mean_y[None, :], choose, metric)

    ridge = grid[jnp.argmax(jax.lax.map(score_at, grid))]
    kernel, intercept = ridge_solution(path, ridge)
    bias = None if head.bias is None else intercept.astype(head.bias.dtype)
    return Candidate(Head(kernel.astype(head.kernel.dtype), bias), ridge, jnp.asarray(True))


def purified_family(
    head: Head, fit: Rows, choose: Rows, metric: Metric, *, quality: LabelQuality | None = None
) -> Candidate:
    """A logistic readout of the rows that can be trusted, at the strength the choosing rows prefer."""
    l, intercept = head.kernel.shape[1], head.bias is not None
    quality = _quality(head, fit) if quality is None else quality
    trusted = purified_rows(quality, fit.weights, None, l=l, rule="posterior", top=1, min_per_class=1)
    rows = trusted_rows(fit.feats, trusted)
    path = ridge_path(rows.feats, rows.labels, rows.weights, l, intercept=intercept)
    mean = jnp.where(path.total > 0, path.eigenvalues.mean(), 1)

    def at(start, share):
        found = fit_logistic(
            path, rows, share * mean, start, LOGISTIC_TOLERANCE, LOGISTIC_STEPS, intercept=intercept
        )
        readout = found.kernel, found.bias
        return readout, (readout, _score(_logits(Head(*readout), choose), choose, metric))

    bias = jnp.zeros(l, path.total.dtype) if head.bias is None else head.bias.astype(path.total.dtype)
    start = head.kernel.astype(path.total.dtype), bias
    shares = jnp.asarray(LOGISTIC_SHARES, path.total.dtype)
    _, (readouts, scores) = jax.lax.scan(at, start, shares)
    best = jnp.argmax(scores)
    kernel, bias = (part[best] for part in readouts)
    bias = None if head.bias is None else bias.astype(head.bias.dtype)
    return Candidate(Head(kernel.astype(head.kernel.dtype), bias), shares[best] * mean, jnp.asarray(True))


Family = Callable[[Head, Rows, Rows, Metric], Candidate]

FAMILIES: dict[str, Family] = {
    "published": published_family,
    "calibrated": calibrated_family,
    "ridge": ridge_family,
    "purified": purified_family,
}


REFITS = (published_family, calibrated_family)
READOUTS = (ridge_family, purified_family)


def select(
    kernel: Kernel,
    bias: Bias | None,
    feats: Feats,
    labels: Labels,
    *,
    validation: tuple,
    weights: Weights | None = None,
    families: Sequence[str | Family] = DEFAULT_FAMILIES,
    metric: Metric = "accuracy",
    level: float | int = 3.0,
) -> Selection:
    """The best head among refits, readouts and the head as it came, by labels it has not seen.

    A candidate replaces the head only if, on rows that chose nothing, its mean paired gain exceeds `level`
    standard errors, `mean(d) > level · √(Σ p²(d − mean(d))² + (Σ p²)²)`, `p = w/Σw` (the last term is one
    disagreement, so that a handful of rows cannot look certain), and its log-loss is no worse: that under
    the label noise of the fitting rows, or under none where the choosing half is likelier so.

    Args:
        kernel: Kernel of a softmax head `(q, l)`, `l ≥ 2`.
        bias: Its bias `(l,)`, or None.
        feats: Rows to fit candidates on `(n, q)`.
        labels: Their labels, of any kind. Where the body memorised its training labels, fit on rows held
            out from it.
        validation: `(feats, labels)` or `(feats, labels, weights)` that neither the head nor the fit has
            seen; at least 2 rows. Labels may be noisy.
        weights: Weight of each fitting row `(n,)`.
        families: Names from `("published", "calibrated", "ridge", "purified")`, or functions as this module
            tells. `"purified"` costs seconds where the others cost milliseconds.
        metric: `"accuracy"`, `"balanced_accuracy"` or `"log_loss"`.
        level: Standard errors of the paired difference to ask for.

    Returns:
        A `Selection`: kernel and bias in the dtypes they came in, and the report.

    Raises:
        ValueError: If shapes do not fit, a family or the metric is unknown, or, where values can be seen, a
            row cannot be used.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> labels = jnp.arange(4000) % 4
        >>> feats = jax.random.normal(jax.random.key(0), (4000, 8)).at[jnp.arange(4000), labels].add(2.0)
        >>> bad_head = jax.random.normal(jax.random.key(1), (8, 4))
        >>> held_out = feats[2000:], labels[2000:]
        >>> chosen = lip_jax.select(bad_head, jnp.zeros(4), feats[:2000], labels[:2000], validation=held_out)
        >>> bool(lip_jax.head_metrics(feats @ chosen.kernel + chosen.bias[None, :], labels).accuracy > 0.8)
        True

    Reference:
        Candidates: [si2025], [li2020]; the rule of choice is this package's.
    """
    named = named_families(families)
    check_selection(kernel, bias, feats, labels, weights, metric)
    q, l = kernel.shape
    val = check_validation(validation, q, l)
    head, rows = _as_arrays(kernel, bias, feats, labels, weights)
    selection = select_head(
        head,
        rows,
        val,
        families=named,
        metric=metric,
        level=float(level),
    )
    raise_if_ignored(selection.report.ignored, feats, labels, weights, l)
    return selection


def select_seen(kernel, bias, feats, labels, *, weights, families, metric, level) -> Selection:
    """`select` without validation rows: the default of `lip_jax.apply`, which documents it."""
    # Refits keep the head's own directions, which have seen the rows they would be judged on: with
    # structured noise (pair flips on CLINC150) one agreed more with the wrong labels and lost 1.4 points.
    named = tuple(family for family in named_families(families) if family[1] not in REFITS)
    if families and not named:
        raise ValueError(
            f"families must hold a readout where there is no validation=; got {list(families)}, refits, that "
            f"only rows the head has not seen can judge. Pass validation=, or rank= for a refit unasked."
        )
    check_selection(kernel, bias, feats, labels, weights, metric)
    if feats.shape[0] < 8:
        raise ValueError(
            f"feats must hold at least 8 rows to choose without validation=; got {feats.shape[0]}."
        )
    head, rows = _as_arrays(kernel, bias, feats, labels, weights)
    selection = select_seen_head(
        head,
        rows,
        families=named,
        metric=metric,
        level=float(level),
    )
    raise_if_ignored(selection.report.ignored, feats, labels, weights, kernel.shape[1])
    return selection


def named_families(families: Sequence[str | Family]) -> tuple[tuple[str, Family], ...]:
    """Names and functions of the families asked for."""
    for family in families:
        if family not in FAMILIES if isinstance(family, str) else not callable(family):
            raise ValueError(
                f"families must name some of {sorted(FAMILIES)} or be functions; got {family!r}."
            )
    return tuple(
        (family, FAMILIES[family])
        if isinstance(family, str)
        else (getattr(family, "__name__", type(family).__name__), family)
        for family in families
    )


def _as_arrays(kernel, bias, feats, labels, weights) -> tuple[Head, Rows]:
    feats, labels, weights, bias = as_rows(feats, labels, weights, bias)
    return Head(jnp.asarray(kernel), bias), Rows(feats, labels, weights)


def check_selection(kernel, bias, feats, labels, weights, metric) -> None:
    """Require a softmax head, rows that fit it, and a known metric."""
    check_softmax_kernel(kernel)
    q, l = kernel.shape
    check_rows(q, l, feats, labels, weights, bias, 0.0, "current")
    if metric not in ("accuracy", "balanced_accuracy", "log_loss"):
        raise ValueError(f"metric must be 'accuracy', 'balanced_accuracy' or 'log_loss'; got {metric!r}.")


@partial(jax.jit, static_argnames=("families", "metric", "level"))
def select_head(
    head: Head,
    fit: Rows,
    val: Rows,
    *,
    families: tuple[tuple[str, Family], ...],
    metric: Metric,
    level: float,
) -> Selection:
    """`select` on checked arguments, in one compiled call."""
    l = head.kernel.shape[1]
    choose, test = halves(val)
    # Refits alone cost less than the estimate would: there losses are taken as they come.
    quality = _quality(head, fit) if any(family in READOUTS for _, family in families) else None
    transition = None if quality is None or val.labels.ndim == 2 else quality.transition
    candidates = [Candidate(head, jnp.asarray(jnp.nan), jnp.asarray(True))]
    for _, family in families:
        if family is purified_family:
            # Its own estimate would be the same.
            family = partial(purified_family, quality=quality)
        candidates.append(family(head, fit, choose, metric))
    candidates = [part._replace(strength=part.strength.astype(jnp.float32)) for part in candidates]
    offered = jax.tree.map(lambda *leaves: jnp.stack(leaves), *candidates)
    if transition is not None:
        transition = _noise_of(choose, offered.head, transition)
    base = _logits(head, test)

    def judged(candidate: Candidate, first: jax.Array) -> _Judged:
        def own_scale():
            return logit_scale(_logits(candidate.head, choose), choose.labels, choose.weights, transition)

        scale = jax.lax.cond(first, lambda: jnp.ones((), base.dtype), own_scale)
        scaled = _scaled(candidate.head, scale)
        chosen_by = _logits(scaled, choose)
        # Those of the head as it came are `base` to the last bit.
        tested = jnp.where(first, base, _logits(scaled, test))
        return _Judged(
            head=scaled,
            scale=scale,
            available=candidate.available & _is_finite(scaled),
            choosing=_score(chosen_by, choose, metric),
            veto=_noise_loss(chosen_by, choose, transition),
            metrics=compute_metrics(tested, test.labels, test.weights),
            paired=_paired_difference(tested, base, test, metric),
            loss=_noise_loss(tested, test, transition),
        )

    # One program for all, a candidate at a time: written out for each, it would be a quarter larger.
    first = jnp.arange(len(candidates), dtype=jnp.int32) == 0
    found = jax.lax.map(lambda part: judged(*part), (offered, first))

    eligible = found.available & (found.veto <= found.veto[0])
    # The first of equals is taken, so a candidate must beat "unchanged" to be tested at all.
    winner = jnp.argmax(jnp.where(eligible, found.choosing, -jnp.inf)).astype(jnp.int32)
    difference, error = found.paired
    better = (difference[winner] > level * error[winner]) & (found.loss[winner] <= found.loss[0])
    chosen = jnp.where(better, winner, 0).astype(jnp.int32)

    scaled = [jax.tree.map(lambda leaf, i=i: leaf[i], found.head) for i in range(1, len(candidates))]
    heads = (head, *scaled)
    taken = jax.tree.map(lambda *leaves: jax.lax.select_n(chosen, *leaves), *heads)
    report = SelectionReport(
        families=("unchanged", *(name for name, _ in families)),
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
        ignored=count_ignored(fit, l=l) + count_ignored(val, l=l),
        metric=metric,
        level=level,
        **{name: getattr(found.metrics, name) for name in Metrics.__annotations__},
    )
    return Selection(taken.kernel, taken.bias, report, heads)


@partial(jax.jit, static_argnames=("families", "metric", "level"))
def select_seen_head(
    head: Head,
    rows: Rows,
    *,
    families: tuple[tuple[str, Family], ...],
    metric: Metric,
    level: float,
) -> Selection:
    """The default without validation rows: choose among readouts on rows the head has seen, with suspicion.

    Readouts are fitted on one half and judged on the other. The head knows both, which favours it: what
    beats it all the same is better. Where the head agrees with the labels far more than a ridge readout
    that has not seen them, it has memorised them, and nothing is changed.
    """
    fit, val = halves(rows)
    selection = select_head(head, fit, val, families=families, metric=metric, level=level)
    choose, test = halves(val)
    readout = ridge_family(head, fit, choose, "accuracy").head
    margin, error = _paired_difference(_logits(head, test), _logits(readout, test), test, "accuracy")
    memorised = margin > MEMORISED_MARGIN + 3 * error
    report = replace(
        selection.report,
        memorised=memorised,
        chosen=jnp.where(memorised, 0, selection.report.chosen),
        ignored=count_ignored(rows, l=head.kernel.shape[1]),
    )
    found = Head(selection.kernel, selection.bias)
    taken = jax.tree.map(lambda old, new: jnp.where(memorised, old, new), head, found)
    return replace(selection, kernel=taken.kernel, bias=taken.bias, report=report)


def halves(rows: Rows) -> tuple[Rows, Rows]:
    """The rows in two halves, by a permutation that depends on their number alone."""
    n = rows.feats.shape[0]
    order = jax.random.permutation(jax.random.key(0), n)
    first, second = order[: n // 2], order[n // 2 :]
    return jax.tree.map(lambda part: part[first], rows), jax.tree.map(lambda part: part[second], rows)


def _quality(head: Head, fit: Rows) -> LabelQuality:
    """How far the labels of the fitting rows can be trusted, with `P(given | true)`, as they tell it."""
    return quality_of(fit, None, l=head.kernel.shape[1], criterion="gcv", intercept=head.bias is not None)


def _noise_of(choose: Rows, heads: Head, transition: jax.Array) -> jax.Array:
    """`transition`, or that of no noise if the labels of the choosing half are likelier under it.

    Validation labels may be cleaner than those of the fitting rows. Under too much noise the log-loss takes
    sharp logits for good ones. Judged by the most accurate head, at the scale that suits each.
    """
    accuracy = jax.lax.map(lambda head: _score(_logits(head, choose), choose, "accuracy"), heads)
    logits = _logits(jax.tree.map(lambda part: part[jnp.argmax(accuracy)], heads), choose)

    def loss(noise):
        scale = logit_scale(logits, choose.labels, choose.weights, noise)
        return _noise_loss(scale * logits, choose, noise)

    none = jnp.eye(transition.shape[0], dtype=transition.dtype)
    return jnp.where(loss(none) < loss(transition), none, transition)


def _noise_loss(logits: jax.Array, rows: Rows, transition: jax.Array | None) -> jax.Array:
    """Log-loss of what the head says labels are after the noise, or of the labels as they are."""
    if transition is None:
        return -_score(logits, rows, "log_loss")
    weights = row_weights(logits, rows.labels, rows.weights)
    return weighted_mean(corrected_losses(logits, rows.labels, transition), weights)


def _is_finite(head: Head) -> jax.Array:
    return jnp.stack([all_finite(part) for part in jax.tree.leaves(head)]).all()


def _logits(head: Head, rows: Rows) -> jax.Array:
    return _linalg.logits_of(rows.feats, head.kernel, head.bias)


def _scaled(head: Head, scale: jax.Array) -> Head:
    return jax.tree.map(lambda part: (part.astype(scale.dtype) * scale).astype(part.dtype), head)


def _contributions(logits: jax.Array, rows: Rows, metric: Metric) -> tuple[jax.Array, jax.Array]:
    """Each row's score, higher is better, and the weights under which their mean is the metric."""
    weights = row_weights(logits, rows.labels, rows.weights)
    if metric == "log_loss":
        return -losses(logits, rows.labels), weights
    if metric == "balanced_accuracy":
        return balanced_hits(logits, rows.labels, weights)
    return hits(logits, rows.labels), weights


def _score(logits: jax.Array, rows: Rows, metric: Metric) -> jax.Array:
    return weighted_mean(*_contributions(logits, rows, metric))


def _paired_difference(logits, base_logits, rows: Rows, metric: Metric) -> tuple[jax.Array, jax.Array]:
    score, weights = _contributions(logits, rows, metric)
    base, _ = _contributions(base_logits, rows, metric)
    difference = jnp.where(weights > 0, score - base, 0)
    mean = weighted_mean(difference, weights)
    return mean, error_of_mean(difference, mean, weights)


def _best_rank(head: Head, spectrum: Spectrum, choose: Rows, metric: Metric) -> Candidate:
    """The rank with the best score; of equal ones the highest, nearest to the head as it came."""
    scores = rank_scores(head, spectrum, choose, metric)
    r = spectrum.s.shape[0]
    rank = r - jnp.argmax(scores[::-1]).astype(jnp.int32)
    sigma = jnp.where(leading(r, rank), spectrum.s, spectrum.sigma)
    refined = Head(*refitted(head.kernel, head.bias, spectrum, sigma))
    return Candidate(refined, rank.astype(jnp.float32), spectrum.scale > 0)


def rank_scores(head: Head, spectrum: Spectrum, rows: Rows, metric: Metric) -> jax.Array:
    """The score of the refitted head at ranks 0 to r, `(r + 1,)`.

    `Z(k) = Z(k+1) + (σ_k* − s_k) (Xu_k − μ·u_k) v_kᵀ`: from the full rank down, a rank costs one pass over
    the logits, in memory for one rank.
    """
    dtype = spectrum.s.dtype
    along = _linalg.matmul(rows.feats.astype(dtype), spectrum.u) - spectrum.mean_u[None, :]
    logits = _logits(head, rows).astype(dtype)
    contributions, weights = _contributions(logits, rows, metric)

    def score(logits):
        if metric == "log_loss" or (metric == "balanced_accuracy" and rows.labels.ndim == 2):
            return _score(logits, rows, metric)
        # Which rows can be used does not hang on the rank, and looking costs as much as scoring.
        return weighted_mean(hits_by_comparing(logits, rows.labels), weights)

    def step(carry, component):
        logits, last = carry
        along_u, change, v = component
        logits = logits + along_u[:, None] * (change * v)[None, :]
        # A branch is given logits that lie in memory.
        last = jax.lax.cond(change != 0, score, lambda _: last, logits)
        return (logits, last), last

    full = weighted_mean(contributions, weights)
    components = (along.T, spectrum.sigma - spectrum.s, spectrum.vt)
    _, scores = jax.lax.scan(step, (logits, full), components, reverse=True)
    return jnp.append(scores, full)
