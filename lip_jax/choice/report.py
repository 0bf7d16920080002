"""What was compared, what was taken, and why: in numbers, in words, for JSON."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from lip_jax._results import STATIC, ShortRepr, short_repr
from lip_jax.choice.evidence import Metric, Source
from lip_jax.choice.imitation import Imitation
from lip_jax.methods.protocol import Head


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class SelectionReport(ShortRepr):
    """One row per candidate, "unchanged" first; figures of rows that the candidate has not seen.

    Attributes:
        methods: Names, `f` of them.
        strength: The rank or ridge each chose; NaN for "unchanged".
        share: The share of the candidate in the blend with the head as it came; 0 for "unchanged".
        available: Whether there was a candidate, and a finite one (calibration may be undefined).
        passes: Whether the evidence is enough.
        accuracy: Of the blend, out of fold, as are the metrics below.
        balanced_accuracy: See `lip_jax.rows.Metrics`.
        log_loss: Likewise.
        calibration_error: Likewise.
        difference: Mean paired difference to "unchanged" in the metric, positive is better.
        standard_error: Of that difference.
        likelihood_difference: The same of the log-likelihood under the estimated label noise, each of the two
            at its own logit scale.
        likelihood_error: Of that difference.
        noise_loss: The negative mean of that log-likelihood, by which candidates that pass are compared; with
            `metric="log_loss"` the log-loss.
        scale: The logit scale of the candidate; for "unchanged" that of the head in blends.
        chosen: Index of the head that was taken.
        winner: Index of the best candidate, whether it passes or not; 0 if there is none.
        tested: How many rows judged.
        kept: Classes that the best candidate leaves to the head as it came, `(l,)`: they have too few rows,
            or it would lose them.
        informed: Whether the head predicts these labels better than chance, or need not.
        near_total: Whether head and stand-in agree with nearly all labels: these are clean, or the body
            memorised them, and rows that were seen cannot tell which.
        memorised: Whether the head agrees with the labels it has seen far more than with those that judge.
        shared: How many validation rows were left out, as they also fit.
        ignored: How many rows could not be used.
        imitation: The readout that stood for the head, where there were no unseen rows.
        source: Which rows judged: `"validation"`, `"unseen rows"` or `"imitation"`.
        metric: By which metric.
        level: How many standard errors were asked for.
    """

    methods: tuple[str, ...] = field(metadata=STATIC)
    strength: Float[jax.Array, "f"]
    share: Float[jax.Array, "f"]
    available: Bool[jax.Array, "f"]
    passes: Bool[jax.Array, "f"]
    accuracy: Float[jax.Array, "f"]
    balanced_accuracy: Float[jax.Array, "f"]
    log_loss: Float[jax.Array, "f"]
    calibration_error: Float[jax.Array, "f"]
    difference: Float[jax.Array, "f"]
    standard_error: Float[jax.Array, "f"]
    likelihood_difference: Float[jax.Array, "f"]
    likelihood_error: Float[jax.Array, "f"]
    noise_loss: Float[jax.Array, "f"]
    scale: Float[jax.Array, "f"]
    chosen: Int[jax.Array, ""]
    winner: Int[jax.Array, ""]
    tested: Int[jax.Array, ""]
    kept: Bool[jax.Array, "l"]
    informed: Bool[jax.Array, ""]
    near_total: Bool[jax.Array, ""]
    memorised: Bool[jax.Array, ""]
    shared: Int[jax.Array, ""]
    ignored: Int[jax.Array, ""]
    imitation: Imitation | None
    source: Source = field(metadata=STATIC)
    metric: Metric = field(metadata=STATIC)
    level: float = field(metadata=STATIC)

    def __repr__(self) -> str:
        # The metrics, all of one form, would fill the screen.
        shown = "methods", "strength", "share", "available", "difference", "standard_error", "chosen"
        return short_repr(self, [*shown, "winner", "tested", "memorised", "ignored", "source", "metric"])

    @property
    def warnings(self) -> list[str]:
        """What users must know who do not read the report."""
        found = []
        unsure = int(self.tested) > 0 and not bool(self.informed)
        if self.imitation is not None:
            unsure |= not bool(self.imitation.resembles) or bool(self.memorised) or bool(self.near_total)
        if not int(self.chosen) and unsure:
            found.append(f"the head is returned as it came: {self._why_not(int(self.winner))}.")
        if int(self.chosen) and np.asarray(self.kept).any():
            found.append(
                f"classes {_some(np.flatnonzero(self.kept))} keep the logits of the head as it came: they "
                f"have too few labelled rows to fit or judge them, or the candidate would lose them."
            )
        return found

    @property
    def reason(self) -> str:
        """Why the chosen head was chosen, in words."""
        winner, chosen = int(self.winner), int(self.chosen)
        if chosen:
            return f"{self._named(winner)}: better than unchanged by {self._evidence(winner)}"
        return f"unchanged: {self._why_not(winner)}"

    def _why_not(self, winner: int) -> str:
        unseen = "pass validation= of rows it was not trained on; their labels may be noisy"
        if not int(self.tested):
            return "no row is left to judge by"
        if not bool(self.informed):
            return (
                "the head predicts these labels no better than chance, so it was not trained for them, or "
                "feats are not its inputs; trust_feats=True chooses all the same"
            )
        if self.imitation is not None and not bool(self.imitation.resembles):
            return (
                f"no readout of these rows resembles the head (cosine {float(self.imitation.cosine):.2f}), "
                f"so they cannot judge it; {unseen}"
            )
        if bool(self.near_total):
            return (
                f"cannot tell: the head agrees with nearly all of these labels, and so does a readout that "
                f"has not seen them. They are clean, or the body memorised them; {unseen}"
            )
        if winner == 0:
            return "there was no candidate"
        if self.imitation is not None and bool(self.memorised):
            return f"the head memorised these labels, and no candidate is better than its like; {unseen}"
        found = f"{self._named(winner)} was best, but {self._evidence(winner)} is not enough"
        figures = (
            (float(self.difference[winner]), float(self.standard_error[winner])),
            (float(self.likelihood_difference[winner]), float(self.likelihood_error[winner])),
        )
        if any(difference <= 0 for difference, _ in figures):
            return found
        # Errors shrink with the root of the rows.
        enough = int(self.tested) * min((self.level * error / gain) ** 2 for gain, error in figures)
        if enough <= int(self.tested):
            return f"{found}: the two must agree, and no class may be lost"
        digits = 1 - math.floor(math.log10(enough))
        some = f"some {round(enough, digits):,.0f}"
        return f"{found} on {int(self.tested)} rows; were the gain real, {some} would show it"

    def _named(self, index: int) -> str:
        share = float(self.share[index])
        return self.methods[index] if share == 1 else f"{share:.0%} {self.methods[index]}"

    def _evidence(self, index: int) -> str:
        metric = f"{float(self.difference[index]):+.4f} ± {float(self.standard_error[index]):.4f}"
        likely = (
            f"{float(self.likelihood_difference[index]):+.4f} ± {float(self.likelihood_error[index]):.4f}"
        )
        return (
            f"{metric} in {self.metric.replace('_', '-')} and {likely} in log-likelihood "
            f"({self.level:.1f} standard errors asked)"
        )

    def as_dict(self) -> dict:
        """Plain Python values, for JSON: a strength of NaN, which JSON lacks, is None."""

        def plain(value: Any) -> Any:
            return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else _listed(value)

        held = plain(asdict(self))
        strength = [None if np.isnan(value) else value for value in held["strength"]]
        return held | {"strength": strength, "reason": self.reason}

    def __str__(self) -> str:
        width = max(12, *(len(name) + 1 for name in self.methods))
        head = (
            f"{'':2}{'method':{width}}{'strength':>10}{'share':>7}{'accuracy':>10}{'log-loss':>10}{'ECE':>8}"
        )
        lines = [head + f"{'difference':>12}{'± s.e.':>9}{'likelihood':>12}{'± s.e.':>9}"]
        for i, name in enumerate(self.methods):
            mark = "* " if i == int(self.chosen) else "  "
            if not bool(self.available[i]):
                lines.append(
                    f"{mark}{name:{width}}  left out: it is undefined on these rows, or loses classes"
                )
                continue
            strength = "" if np.isnan(self.strength[i]) else f"{float(self.strength[i]):.4g}"
            share = "" if i == 0 else f"{float(self.share[i]):.2f}"
            lines.append(
                f"{mark}{name:{width}}{strength:>10}{share:>7}{float(self.accuracy[i]):>10.4f}"
                f"{float(self.log_loss[i]):>10.4f}{float(self.calibration_error[i]):>8.4f}"
                f"{float(self.difference[i]):>+12.4f}{float(self.standard_error[i]):>9.4f}"
                f"{float(self.likelihood_difference[i]):>+12.4f}{float(self.likelihood_error[i]):>9.4f}"
            )
        judges = {"validation": "validation rows", "unseen rows": "unseen rows, out of fold"}
        stood = "rows, out of fold, against a readout that resembles the head"
        lines.append(f"judged by {int(self.tested)} {judges.get(self.source, stood)}")
        if np.asarray(self.kept).any():
            lines.append(f"classes left to the head as it came: {_some(np.flatnonzero(self.kept))}")
        return "\n".join([*lines, self.reason])


def _listed(value: Any) -> Any:
    return value if value is None else np.asarray(value).tolist()


def _some(ids: np.ndarray) -> str:
    shown = ", ".join(map(str, ids[:10]))
    return shown if len(ids) <= 10 else f"{shown} and {len(ids) - 10} more"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Selection(ShortRepr):
    """The chosen head, the report of how it was chosen, and what else there was to choose.

    Attributes:
        kernel: `(q, l)`.
        bias: `(l,)`, or None where the head has none.
        report: One row per candidate.
        candidates: The head of each row of the report, logit scale and blend folded in.
    """

    kernel: Float[jax.Array, "q l"]
    bias: Float[jax.Array, "l"] | None
    report: SelectionReport
    candidates: tuple[Head, ...]
