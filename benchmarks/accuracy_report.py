"""What the accuracy table says: means over the draws of a cell, verdicts, and the table in four formats."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.record import machine, write_json
from benchmarks.tables import Verdict, grouped, table, verdict_lines
from benchmarks.tables import print_verdicts as print_judged
from lip_jax.plot import COLORS

COMMAND = "python -m benchmarks.accuracy --data DIR"

COLUMNS = {
    "base": "base",
    "published at 3r/4": "LIP ⌊3r/4⌋",
    "published": "LIP selected",
    "calibrated": "calibrated selected",
    "ridge": "ridge readout",
    "purified": "purified readout",
    "choice": "**choice**",
    "best": "best in hindsight",
}
SPREAD = (*COLUMNS, "LIP choice", "default", "gain", "LIP gain", "published gain", "default gain")
LOSSES = ("log-loss base", "log-loss choice")
ERRORS = ("gain error", "regret error")
WORST = ("gain", "default gain")


class Cell(NamedTuple):
    """What is repeated over seeds; `rows` says which rows the candidates were fitted on."""

    dataset: str
    noise: str
    rate: float
    regime: str
    loss: str
    rows: str

    def __str__(self) -> str:
        return f"{self.dataset}, {self.training}, {self.labels}"

    @property
    def training(self) -> str:
        """Regime, loss and fitting rows, as far as they are not the usual ones."""
        loss = "" if self.loss in ("cross-entropy", "squared error") else f", {self.loss}"
        rows = "" if self.rows == "training" else f", fitted on {self.rows} rows"
        return self.regime + loss + rows

    @property
    def labels(self) -> str:
        """The noise in words."""
        return f"{self.noise} {self.rate:.2g}" if self.rate > 0 else "clean"


class Draw(NamedTuple):
    """One seed of a cell: accuracies and gains in points, log-losses, and the family that was chosen."""

    cell: Cell
    seed: int
    values: dict[str, float]
    family: str


class Summary(NamedTuple):
    """A cell: means and standard deviations over its draws.

    `mean` also holds the standard errors of the mean paired differences on the test rows (`gain error`,
    `regret error`), as if draws were independent, the worst draw (`worst gain`, `worst default gain`), and
    the regret of a rule that takes the best family wherever the validation rows can show it to be better
    (`least regret`).
    """

    cell: Cell
    draws: int
    chosen: str
    mean: dict[str, float]
    std: dict[str, float]


def summarise(draws: Iterable[Draw]) -> list[Summary]:
    """One summary a cell, in the order of their first draws."""
    return [_summarise(cell, group) for cell, group in grouped(draws, lambda draw: draw.cell).items()]


def _summarise(cell: Cell, draws: list[Draw]) -> Summary:
    values = {name: np.array([draw.values[name] for draw in draws]) for name in draws[0].values}
    mean = {name: float(held.mean()) for name, held in values.items()}
    mean |= {name: float(np.sqrt((values[name] ** 2).mean() / len(draws))) for name in ERRORS}
    mean |= {f"worst {name}": float(values[name].min()) for name in WORST}
    std = {name: float(values[name].std(ddof=1)) if len(draws) > 1 else 0.0 for name in SPREAD}
    counts = Counter(draw.family for draw in draws).most_common()
    return Summary(cell, len(draws), ", ".join(f"{name} {count}" for name, count in counts), mean, std)


def _percentage(summaries: list[Summary], missed: list[Summary]) -> str:
    met = len(summaries) - len(missed)
    return f"{met} of {len(summaries)} cells ({100 * met / max(len(summaries), 1):.1f}%)"


def never_worse(summaries: list[Summary]) -> Verdict:
    """The choice loses at most max(0.3 points, 2 paired standard errors) on the base, in every cell."""
    allowed = lambda mean: max(0.3, 2 * mean["gain error"])  # noqa: E731
    missed = [row for row in summaries if row.mean["gain"] < -allowed(row.mean)]
    worst = min(summaries, key=lambda row: row.mean["gain"])
    figure = f"{_percentage(summaries, missed)}; lowest gain {worst.mean['gain']:+.2f} ({worst.cell})"
    failures = [
        f"{row.cell}: {row.mean['gain']:+.2f}, allowed {-allowed(row.mean):.2f} ({row.chosen})"
        for row in missed
    ]
    return Verdict("choice no worse than base", not missed, figure, failures)


def near_best(summaries: list[Summary]) -> Verdict:
    """The choice is within max(1 point, 2 paired standard errors) of the best family, in 90% of the cells."""
    allowed = lambda mean: max(1.0, 2 * mean["regret error"])  # noqa: E731
    missed = [row for row in summaries if row.mean["regret"] > allowed(row.mean)]
    failures = [
        f"{row.cell}: {row.mean['regret']:.2f} below the best, allowed {allowed(row.mean):.2f} ({row.chosen})"
        for row in missed
    ]
    holds = len(missed) <= 0.1 * len(summaries)
    hidden = [row for row in summaries if row.mean["least regret"] > allowed(row.mean)]
    figure = (
        f"{_percentage(summaries, missed)}; {_percentage(summaries, hidden)} if the best family were known "
        "and only had to beat the base by 3 standard errors on all validation rows"
    )
    return Verdict("choice near best family in hindsight", holds, figure, failures)


def log_loss_kept(summaries: list[Summary]) -> Verdict:
    """The log-loss of the choice exceeds the base's by at most 2%, in every cell."""
    ratio = lambda mean: mean["log-loss choice"] / mean["log-loss base"]  # noqa: E731
    missed = [row for row in summaries if ratio(row.mean) > 1.02]
    worst = max(summaries, key=lambda row: ratio(row.mean))
    figure = f"{_percentage(summaries, missed)}; highest ratio {ratio(worst.mean):.4f} ({worst.cell})"
    failures = [f"{row.cell}: ratio {ratio(row.mean):.4f} ({row.chosen})" for row in missed]
    return Verdict("log-loss no more than 2% worse", not missed, figure, failures)


def default_never_loses(summaries: list[Summary], claim: str) -> Verdict:
    """`lip_jax.apply` without validation loses in no single draw."""
    missed = [row for row in summaries if row.mean["worst default gain"] < 0]
    worst = min(summaries, key=lambda row: row.mean["worst default gain"])
    gain = float(np.mean([row.mean["default gain"] for row in summaries]))
    figure = (
        f"{_percentage(summaries, missed)}, {sum(row.draws for row in summaries)} draws; worst draw "
        f"{worst.mean['worst default gain']:+.2f}; mean gain {gain:+.2f}"
    )
    failures = [
        f"{row.cell}: worst draw {row.mean['worst default gain']:+.2f}, mean {row.mean['default gain']:+.2f}"
        for row in missed
    ]
    return Verdict(claim, not missed, figure, failures)


def published_claim(summaries: list[Summary]) -> Verdict:
    """The paper's claim, on the heads it is most likely to hold for."""
    gain, error = mean_gain(summaries, "published gain")
    lost = [row for row in summaries if row.mean["published gain"] < 0]
    figure = f"mean gain over {len(summaries)} rates {gain:+.3f} ± {error:.3f} points"
    failures = [f"{row.cell}: {row.mean['published gain']:+.2f}" for row in lost]
    claim = "published LIP gains on well-regularised CLINC150 heads"
    return Verdict(claim, gain > 2 * error, figure, failures)


def mean_gain(summaries: list[Summary], name: str) -> tuple[float, float]:
    """Mean over the cells, and its standard error from the spread over seeds within cells."""
    variance = sum(row.std[name] ** 2 / row.draws for row in summaries)
    return float(np.mean([row.mean[name] for row in summaries])), float(np.sqrt(variance)) / len(summaries)


def verdicts(summaries: list[Summary]) -> list[Verdict]:
    """Every claim the cells at hand can judge."""

    def where(holds: Callable[[Cell], bool]) -> list[Summary]:
        return [row for row in summaries if holds(row.cell)]

    memorised = where(lambda cell: cell.regime == "memorised")
    clinc = where(lambda cell: cell.dataset == "CLINC150")
    paper = [row for row in clinc if row.cell.regime == "well regularised" and row.cell.noise == "symmetric"]
    judged = [never_worse(summaries), near_best(summaries), log_loss_kept(summaries)]
    if memorised:
        judged.append(default_never_loses(memorised, "default never loses on memorised networks"))
    if clinc:
        judged.append(default_never_loses(clinc, "default never loses on CLINC150"))
    if paper:
        judged.append(published_claim(paper))
    return judged


class Gain(NamedTuple):
    """Mean gains over the base in points with standard errors, of one data set and way of training."""

    dataset: str
    training: str
    cells: int
    choice: tuple[float, float]
    lip: tuple[float, float]
    default: tuple[float, float]

    @property
    def figures(self) -> list[str]:
        """The three gains in words."""
        return [f"{mean:+.2f} ± {error:.2f}" for mean, error in (self.choice, self.lip, self.default)]


def gains(summaries: list[Summary]) -> list[Gain]:
    """The gains of the choice, of LIP alone and of the default, by data set and way of training."""
    groups = grouped(summaries, lambda row: (row.cell.dataset, row.cell.training))
    names = ("gain", "LIP gain", "default gain")
    return [Gain(*key, len(rows), *(mean_gain(rows, name) for name in names)) for key, rows in groups.items()]


def write_csv(summaries: list[Summary], path: Path) -> None:
    """One row a cell: means, and standard deviations over the draws under `… std`."""
    means = (*SPREAD, "regret", "least regret", *ERRORS, *(f"worst {name}" for name in WORST), *LOSSES)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Cell._fields, "draws", "chosen", *means, *(f"{name} std" for name in SPREAD)])
        for row in summaries:
            figures = [row.mean[name] for name in means] + [row.std[name] for name in SPREAD]
            cell = row.cell._replace(rate=round(row.cell.rate, 3))
            writer.writerow([*cell, row.draws, row.chosen, *(f"{value:.4f}" for value in figures)])


def read_csv(path: Path) -> list[Summary]:
    """What `write_csv` wrote, with the columns of today."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in SPREAD if f"{name} std" not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {missing}: measure its set anew, or write elsewhere.")
        return [_read(row) for row in reader]


def _read(row: dict[str, str]) -> Summary:
    fields = {name: row.pop(name) for name in Cell._fields}
    cell = Cell(**{**fields, "rate": float(fields["rate"])})
    draws, chosen = int(row.pop("draws")), row.pop("chosen")
    std = {name: float(row.pop(f"{name} std")) for name in SPREAD}
    return Summary(cell, draws, chosen, {name: float(value) for name, value in row.items()}, std)


def markdown(summaries: list[Summary]) -> str:
    """Verdicts, gains and every cell, as Markdown."""
    lines = [
        "# Accuracy of repaired heads",
        "",
        f"Written by `{COMMAND}`. Test accuracy in points, mean ± standard deviation over seeds. Labels that "
        "train, fit and choose carry the noise; test labels are clean and choose nothing but the best family "
        "in hindsight.",
        "",
        *verdict_lines(verdicts(summaries)),
        "",
        "## Mean gain over the base, in points ± standard error over seeds",
        "",
    ]
    rows = [(gain.dataset, gain.training, gain.cells, *gain.figures) for gain in gains(summaries)]
    lines += table(("data", "head", "cells", "choice", "LIP alone", "default, no validation"), rows)
    for dataset, held in grouped(summaries, lambda row: row.cell.dataset).items():
        lines += ["", f"## {dataset}", ""]
        lines += table(("head", "labels", *COLUMNS.values(), "chosen"), map(_figures, held))
    return "\n".join(lines) + "\n"


def _figures(row: Summary) -> tuple[str, ...]:
    figures = (f"{row.mean[name]:.1f} ± {row.std[name]:.1f}" for name in COLUMNS)
    return row.cell.training, row.cell.labels, *figures, row.chosen


# Gain over the base of each column drawn: colour, marker and size; markers tell them apart without colour.
STYLES = {
    "published at 3r/4": (COLORS[1], "x", 22),
    "best": (COLORS[4], "D", 26),
    "choice": (COLORS[0], "o", 14),
}


def draw_gains(summaries: list[Summary], ax: Axes) -> int:
    """One line a cell: how far published LIP, the choice and the best family are from the base.

    Returns how many lines there are, one for each way of training included.
    """
    lines: list[Summary | str] = []
    for row in summaries:
        title = f"{row.cell.dataset}, {row.cell.training}"
        lines += [row] if title in lines else [title, row]
    height = np.array([i for i, line in enumerate(lines) if isinstance(line, Summary)])
    gain = {name: np.array([row.mean[name] - row.mean["base"] for row in summaries]) for name in STYLES}
    ax.hlines(height, gain["choice"], gain["best"], color="0.75", linewidth=1)
    for name, (color, marker, size) in STYLES.items():
        label = COLUMNS[name].strip("*")
        ax.scatter(gain[name], height, s=size, c=color, marker=marker, label=label, zorder=3)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.set_xscale("symlog", linthresh=1, linscale=0.6)
    ticks = [-30, -10, -3, -1, 0, 1, 3, 10, 30]
    ax.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks], fontsize=7)
    ax.set_xlim(-60, 90)
    ax.set_yticks(height, [row.cell.labels for row in summaries], fontsize=7)
    ax.grid(axis="x", color="0.92")
    for i, line in enumerate(lines):
        if isinstance(line, str):
            ax.axhspan(i - 0.5, i + 0.5, color="0.94", zorder=2)
            place = {"transform": ax.get_yaxis_transform(), "va": "center", "zorder": 4}
            ax.text(0.01, i, line, fontsize=6.5, weight="bold", **place)
    return len(lines)


def draw(summaries: list[Summary], path: Path) -> None:
    """Every cell, in columns by data set, those with few cells together."""
    cells = Counter(row.cell.dataset for row in summaries)
    groups = grouped(summaries, lambda row: row.cell.dataset if cells[row.cell.dataset] >= 10 else "others")
    figure = Figure(layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    lines = [draw_gains(rows, ax) for rows, ax in zip(groups.values(), axes, strict=True)]
    for name, ax in zip(groups, axes, strict=True):
        ax.set_ylim(max(lines) - 0.4, -0.6)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("gain over the base, points of test accuracy", fontsize=8)
    figure.set_size_inches(4.6 * len(groups), 1.5 + 0.17 * max(lines))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=75)


def by_training(summaries: Iterable[Summary]) -> list[Summary]:
    """The cells ordered by data set and way of training, each where it came first."""
    return [
        row
        for of_dataset in grouped(summaries, lambda row: row.cell.dataset).values()
        for rows in grouped(of_dataset, lambda row: row.cell.training).values()
        for row in rows
    ]


def print_verdicts(summaries: list[Summary], console: Console) -> None:
    """Every verdict with what misses it, and the gains."""
    print_judged(verdicts(summaries), console)
    for gain in gains(summaries):
        figures = gain.figures
        where = f"{gain.dataset}, {gain.training} ({gain.cells} cells)"
        console.print(
            f"{where}: choice {figures[0]}, LIP alone {figures[1]}, default {figures[2]}", highlight=False
        )


def write_all(summaries: list[Summary], seconds: dict[str, int], out: Path, console: Console) -> None:
    """Judge and write everything but the tables themselves; `seconds` of other sets are kept."""
    summaries = by_training(summaries)
    path = out / "accuracy.json"
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    seeds = {row.cell.dataset: row.draws for row in summaries}
    record = {
        "command": COMMAND,
        "seeds": {dataset: f"0 to {draws - 1}" for dataset, draws in seeds.items()},
        "seconds": before.get("seconds", {}) | seconds,
        "machine": machine(),
        "verdicts": [item._asdict() for item in verdicts(summaries)],
        "gains": [gain._asdict() for gain in gains(summaries)],
    }
    write_json(record, path)
    (out / "accuracy.md").write_text(markdown(summaries), encoding="utf-8")
    draw(summaries, out / "accuracy.png")
    print_verdicts(summaries, console)
