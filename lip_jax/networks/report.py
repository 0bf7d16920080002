"""What was compared at each layer of a network, and where it was cut."""

from dataclasses import asdict, dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from lip_jax._results import STATIC, ShortRepr
from lip_jax.choice.report import SelectionReport


@dataclass(frozen=True, repr=False)
class RepairReport(ShortRepr):
    """The choice of the head's repair, and one row for each readout of an earlier layer.

    Attributes:
        path: Where the head is, such as `head`.
        head: What was compared at the head, and taken.
        layers: The layer of each of `c` readouts.
        methods: Their methods.
        width: How many features the layer has, `(c,)`.
        strength: The ridge that each chose.
        available: Whether there is such a readout that tells all classes.
        passes: Whether it is better than the head as it came by more than the level, and than its repair by
            more than one standard error.
        accuracy: Out of fold, as are all figures below.
        balanced_accuracy: See `lip_jax.rows.Metrics`.
        log_loss: Likewise.
        calibration_error: Likewise.
        difference: Mean paired difference in the metric to the head as it came, positive is better.
        standard_error: Of that difference.
        likelihood_difference: The same of the log-likelihood under the estimated label noise.
        likelihood_error: Of that difference.
        over_head: Mean paired difference in the metric to the head as repaired.
        over_head_error: Of that difference.
        likelihood_over_head: The same of the log-likelihood.
        likelihood_over_head_error: Of that difference.
        noise_loss: The negative mean of that log-likelihood, by which readouts are ranked.
        chosen: The index of the readout that was taken; −1 where the head stays.
        too_wide: Layers that were left out, with more than 8192 features.
        level: How many standard errors were asked for.
    """

    path: str = field(metadata=STATIC)
    head: SelectionReport
    layers: tuple[str, ...]
    methods: tuple[str, ...]
    width: Int[np.ndarray, "c"]
    strength: Float[np.ndarray, "c"]
    available: Bool[np.ndarray, "c"]
    passes: Bool[np.ndarray, "c"]
    accuracy: Float[np.ndarray, "c"]
    balanced_accuracy: Float[np.ndarray, "c"]
    log_loss: Float[np.ndarray, "c"]
    calibration_error: Float[np.ndarray, "c"]
    difference: Float[np.ndarray, "c"]
    standard_error: Float[np.ndarray, "c"]
    likelihood_difference: Float[np.ndarray, "c"]
    likelihood_error: Float[np.ndarray, "c"]
    over_head: Float[np.ndarray, "c"]
    over_head_error: Float[np.ndarray, "c"]
    likelihood_over_head: Float[np.ndarray, "c"]
    likelihood_over_head_error: Float[np.ndarray, "c"]
    noise_loss: Float[np.ndarray, "c"]
    chosen: int
    too_wide: tuple[str, ...]
    level: float

    @property
    def ranked(self) -> list[int]:
        """The readouts of earlier layers, the likeliest first."""
        loss = np.where(self.available, self.noise_loss, np.inf)
        return [int(i) for i in np.argsort(loss, kind="stable")]

    @property
    def reason(self) -> str:
        """Why the network was cut where it was, or not at all, in words."""
        if not self.layers:
            if self.head.source == "imitation":
                return (
                    f"{self.path} stays the last layer: cannot tell whether an earlier one is better, as the "
                    f"network has seen these rows. Pass validation= of rows it was not trained on; their "
                    f"labels may be noisy"
                )
            return f"{self.path} stays the last layer: there is no other to try"
        best = self.ranked[0] if self.chosen < 0 else self.chosen
        named, metric = f"{self.methods[best]} of the input of {self.layers[best]}", self.head.metric
        came = (
            f"{float(self.difference[best]):+.4f} ± {float(self.standard_error[best]):.4f} in "
            f"{metric.replace('_', '-')} and {float(self.likelihood_difference[best]):+.4f} ± "
            f"{float(self.likelihood_error[best]):.4f} in log-likelihood ({self.level:.1f} standard errors "
            f"asked)"
        )
        over = (
            f"{float(self.over_head[best]):+.4f} ± {float(self.over_head_error[best]):.4f} and "
            f"{float(self.likelihood_over_head[best]):+.4f} ± "
            f"{float(self.likelihood_over_head_error[best]):.4f}"
        )
        both = (
            f"{came}" if not int(self.head.chosen) else f"{came}, and than its repair by {over} (1.0 asked)"
        )
        if self.chosen >= 0:
            return f"cut before {self.layers[best]}, {named}: better than {self.path} as it came by {both}"
        if not self.available[best]:
            return f"{self.path} stays the last layer: no readout of another could be fitted and judged"
        return (
            f"{self.path} stays the last layer: {named} was the best of the others, but not by enough: {both}"
        )

    def as_dict(self) -> dict:
        """Plain Python values, for JSON."""
        held = {name: getattr(self, name) for name in asdict(self) if name != "head"}
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in held.items()}
        plain["strength"] = [None if np.isnan(value) else value for value in plain["strength"]]
        return {**plain, "head": self.head.as_dict(), "reason": self.reason}

    def __str__(self) -> str:
        head = f"{self.path}, in its place:\n{self.head}"
        if not self.layers:
            return f"{head}\n\n{self.reason}"
        width = [max(map(len, ("cut before", *self.layers))), max(map(len, ("method", *self.methods)))]
        lines = [
            f"{'':2}{'cut before':{width[0]}}  {'method':{width[1]}}{'width':>7}{'accuracy':>10}"
            f"{'log-loss':>10}{'difference':>12}{'± s.e.':>9}{'likelihood':>12}{'± s.e.':>9}"
            f"{'over head':>11}{'± s.e.':>9}"
        ]
        for i in self.ranked:
            mark = "* " if i == self.chosen else "  "
            named = f"{mark}{self.layers[i]:{width[0]}}  {self.methods[i]:{width[1]}}{int(self.width[i]):>7}"
            if not self.available[i]:
                lines.append(f"{named}  left out: some class cannot be fitted or judged")
                continue
            lines.append(
                f"{named}{float(self.accuracy[i]):>10.4f}{float(self.log_loss[i]):>10.4f}"
                f"{float(self.difference[i]):>+12.4f}{float(self.standard_error[i]):>9.4f}"
                f"{float(self.likelihood_difference[i]):>+12.4f}{float(self.likelihood_error[i]):>9.4f}"
                f"{float(self.over_head[i]):>+11.4f}{float(self.over_head_error[i]):>9.4f}"
            )
        wide = f"\nleft out, too wide: {', '.join(self.too_wide)}" if self.too_wide else ""
        against = f"earlier layers against {self.path} as it came, the likeliest first:"
        return "\n".join([head, "", against, *lines]) + f"{wide}\n{self.reason}"
