"""What was compared, what was taken, and why: in numbers, in words, for JSON."""

import math
from dataclasses import asdict, dataclass, field

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from lip_jax._results import STATIC, ShortRepr, short_repr
from lip_jax.choice.evidence import Metric
from lip_jax.methods.protocol import Head


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class SelectionReport(ShortRepr):
    """One row per method, "unchanged" first.

    Attributes:
        methods: Names, `f` of them.
        strength: The rank or ridge each chose; NaN for "unchanged".
        available: Whether the method had a candidate, and a finite one (calibration may be undefined).
        choosing: Its score on the first half, higher is better.
        accuracy: On the second half, as are the metrics below.
        balanced_accuracy: See `lip_jax.rows.Metrics`.
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
        num_standard_errors: How many were asked for.
    """

    methods: tuple[str, ...] = field(metadata=STATIC)
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
    metric: Metric = field(metadata=STATIC)
    num_standard_errors: float = field(metadata=STATIC)

    def __repr__(self) -> str:
        # The metrics, all of one form, would fill the screen.
        shown = "methods", "strength", "available", "difference", "standard_error", "scale", "chosen"
        return short_repr(self, [*shown, "winner", "tested", "memorised", "ignored", "metric"])

    @property
    def reason(self) -> str:
        """Why the chosen head was chosen, in words."""
        winner, chosen = int(self.winner), int(self.chosen)
        name = self.methods[winner]
        difference, error = float(self.difference[winner]), float(self.standard_error[winner])
        tested = f"{difference:+.4f} ± {error:.4f} in {self.metric.replace('_', '-')}"
        asked = f"{self.num_standard_errors:g} standard errors"
        if bool(self.memorised):
            return "unchanged: the labels look memorised, so they cannot judge; pass validation="
        if winner == 0:
            better = np.asarray(self.available) & (np.asarray(self.choosing) > float(self.choosing[0]))
            vetoed = " without a worse log-loss" if better.any() else ""
            return f"unchanged: no candidate scored better on the choosing half{vetoed}"
        if chosen == winner:
            return f"{name}: better than unchanged by {tested}, at least {asked}"
        if difference > self.num_standard_errors * error and difference > 0:
            return f"unchanged: {name} was better by {tested}, but its log-loss is worse"
        short = f"unchanged: {name} was best, but {tested} is less than {asked}"
        if difference <= 0:
            return short
        # Errors shrink with the root of the rows.
        enough = int(self.tested) * (self.num_standard_errors * error / difference) ** 2
        digits = 1 - math.floor(math.log10(enough))
        some = f"some {round(enough, digits):,.0f}"
        return f"{short} on {int(self.tested)} rows; were the gain real, {some} would show it"

    def as_dict(self) -> dict:
        """Plain Python values, for JSON: a strength of NaN, which JSON lacks, is None."""
        plain = {name: np.asarray(value).tolist() for name, value in asdict(self).items()}
        strength = [None if np.isnan(value) else value for value in plain["strength"]]
        return plain | {"strength": strength, "reason": self.reason}

    def __str__(self) -> str:
        head = f"{'':2}{'method':12}{'strength':>10}{'accuracy':>10}{'balanced':>10}{'log-loss':>10}"
        lines = [head + f"{'ECE':>8}{'difference':>12}{'± s.e.':>9}"]
        for i, name in enumerate(self.methods):
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Selection(ShortRepr):
    """The chosen head, the report of how it was chosen, and what else there was to choose.

    Attributes:
        kernel: `(q, l)`.
        bias: `(l,)`, or None where the head has none.
        report: One row per method.
        candidates: The head of each method, in the order of `report.methods`, logit scale folded in.
    """

    kernel: Float[jax.Array, "q l"]
    bias: Float[jax.Array, "l"] | None
    report: SelectionReport
    candidates: tuple[Head, ...]
