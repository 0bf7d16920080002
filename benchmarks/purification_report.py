"""What the purification benchmark says: means over the draws of a cell, verdicts, and all in four formats."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.record import machine, write_json
from benchmarks.tables import Verdict, grouped, print_verdicts, table, verdict_lines, write_csv
from lip_jax.plot import COLORS

COMMAND = "python -m benchmarks.purification table|strengths|speed|large --data DIR"
PACKAGES = ("cleanlab", "scikit-learn", "scipy")
CLEANLAB = "CleanLearning"

ACCURACIES = {
    "noisy": "all noisy labels",
    "purified": "**purified**",
    "purified ridge": "purified, ridge",
    CLEANLAB: CLEANLAB,
    "oracle": "truly clean rows",
}
DETECTED = ("AUROC", "F1", "precision", "recall", "kept", "right among kept")
DETECTORS = ("lip_jax", CLEANLAB)
DETECTIONS = tuple(f"{name} {quantity}" for quantity in DETECTED for name in DETECTORS)
# Share of draws in which `lip_jax.memorised` says yes, by leave-one-out scores and by held-out rows.
MEMORISED = ("memorised", "memorised by held-out rows")
FIGURES = (*ACCURACIES, "wrong", *DETECTIONS, *MEMORISED)

# What is compared at other strengths.
BY_STRENGTH = ("noisy", "purified", CLEANLAB, f"{CLEANLAB} F1")

MOST_BELOW = 0.5
READOUT_SPEEDUP, CERTIFICATION_SPEEDUP = 10, 50
MEMORY_LIMIT = 2**32

# What they choose or reach, and who does it, here and there.
SCIKIT_LEARN = (
    ("ridge", "ridge readout", "RidgeClassifierCV"),
    ("objective", "logistic readout", "LogisticRegression"),
)


class Cell(NamedTuple):
    """What is repeated over seeds; `rows` says which rows were judged and fitted to."""

    dataset: str
    noise: str
    rate: float
    body: str
    rows: str

    def __str__(self) -> str:
        return f"{self.dataset}, {self.training}, {self.labels}"

    @property
    def training(self) -> str:
        """The body, and which rows were judged where they are not those it was trained on."""
        return self.body + ("" if self.rows == "training" else f", {self.rows} rows")

    @property
    def labels(self) -> str:
        """The noise in words."""
        return f"{self.noise} {self.rate:.2g}"


class Draw(NamedTuple):
    """One seed of a cell: `FIGURES` in points, NaN where one does not apply."""

    cell: Cell
    seed: int
    values: dict[str, float]


class Summary(NamedTuple):
    """A cell: means of `FIGURES` and standard deviations of accuracies over its draws."""

    cell: Cell
    draws: int
    mean: dict[str, float]
    std: dict[str, float]

    def lead(self, ours: str, theirs: str) -> float:
        """How far the mean of one figure is above that of another."""
        return self.mean[ours] - self.mean[theirs]


def summarise(draws: Iterable[Draw]) -> list[Summary]:
    """One summary a cell, in the order of their first draws."""
    return [_summarise(cell, group) for cell, group in grouped(draws, lambda draw: draw.cell).items()]


def _summarise(cell: Cell, draws: list[Draw]) -> Summary:
    values = {name: np.array([draw.values[name] for draw in draws]) for name in FIGURES}
    mean = {name: float(held.mean()) for name, held in values.items()}
    std = {name: float(values[name].std(ddof=1)) if len(draws) > 1 else 0.0 for name in ACCURACIES}
    return Summary(cell, len(draws), mean, std)


def by_training(summaries: list[Summary]) -> list[Summary]:
    """The cells of one data set and body together, in the order of their first ones."""
    places = list(dict.fromkeys((row.cell.dataset, row.cell.training) for row in summaries))
    return sorted(summaries, key=lambda row: places.index((row.cell.dataset, row.cell.training)))


def mean_lead(summaries: list[Summary], ours: str, theirs: str) -> float:
    """Mean over the cells of how far one figure is above another."""
    return float(np.mean([row.lead(ours, theirs) for row in summaries]))


def compared(summaries: list[Summary], claim: str, ours: str, theirs: str) -> Verdict:
    """One figure is at least another on average over the cells; those where it is not are listed."""
    below = sorted((row.lead(ours, theirs), str(row.cell)) for row in summaries)
    below = [f"{cell}: {lead:+.2f}" for lead, cell in below if lead < 0]
    lead = mean_lead(summaries, ours, theirs)
    figure = f"{lead:+.2f} points; below in {len(below)} of {len(summaries)} cells"
    frozen = [row for row in summaries if row.cell.body == "frozen"]
    if frozen:
        figure += f"; {mean_lead(frozen, ours, theirs):+.2f} on the {len(frozen)} of frozen features"
    return Verdict(claim, lead >= 0, figure, below)


def never_far_below(summaries: list[Summary]) -> Verdict:
    """The purified readout is at most half a point below CleanLearning, in every cell."""
    worst = min(summaries, key=lambda row: row.lead("purified", CLEANLAB))
    missed = [row for row in summaries if row.lead("purified", CLEANLAB) < -MOST_BELOW]
    failures = [f"{row.cell}: {row.lead('purified', CLEANLAB):+.2f}" for row in missed]
    claim = f"on frozen features nowhere more than {MOST_BELOW} points below CleanLearning"
    figure = f"lowest {worst.lead('purified', CLEANLAB):+.2f} ({worst.cell}), {len(summaries)} cells"
    return Verdict(claim, not missed, figure, failures)


def recognised(summaries: list[Summary], body: str, said: bool) -> Verdict:
    """`lip_jax.memorised` with held-out rows says in every draw whether the body memorised."""
    name = "memorised by held-out rows"
    rows = [row for row in summaries if row.cell.body == body and np.isfinite(row.mean[name])]
    right = lambda share: share if said else 100 - share  # noqa: E731
    missed = [
        f"{row.cell}: {right(row.mean[name]):.0f}% of draws" for row in rows if right(row.mean[name]) < 100
    ]
    draws = sum(row.draws for row in rows)
    shares = [
        sum(right(row.mean[by]) * row.draws for row in rows) / max(draws, 1) for by in (name, MEMORISED[0])
    ]
    figure = f"{shares[0]:.1f}% of {draws} draws; by leave-one-out scores alone {shares[1]:.1f}%"
    verb = "recognised" if said else "not taken for memorised"
    return Verdict(f"{body} networks are {verb}, with held-out rows", not missed, figure, missed)


def table_verdicts(summaries: list[Summary]) -> list[Verdict]:
    """What the cells at hand can judge."""
    frozen = [row for row in summaries if row.cell.body == "frozen"]
    judged = [compared(summaries, "purified readout at least CleanLearning on average", "purified", CLEANLAB)]
    if frozen:
        judged.append(never_far_below(frozen))
    for quantity in ("AUROC", "F1"):
        claim = f"{quantity} of wrong labels at least cleanlab's on average"
        judged.append(compared(summaries, claim, f"lip_jax {quantity}", f"{CLEANLAB} {quantity}"))
    for body, said in (("memorised", True), ("early-stopped", False)):
        if any(row.cell.body == body for row in summaries):
            judged.append(recognised(summaries, body, said))
    return judged


def speed_verdict(cases: list[dict[str, Any]], name: str, claim: str, least: float) -> Verdict:
    """CleanLearning takes at least so many times as long, in every case.

    More threads may slow it down, so the figure also says how it does with the cores that suit each best.
    """
    ratios = {
        f"{case['data']}, {case['cores']} cores": case["seconds"][CLEANLAB] / case["seconds"][name]
        for case in cases
    }
    slow = [f"{case}: {ratio:.1f} times" for case, ratio in ratios.items() if ratio < least]
    figure = ", ".join(f"{ratio:.1f} ({case})" for case, ratio in ratios.items())
    fastest: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(lambda: np.inf))
    for case in cases:
        for who in (CLEANLAB, name):
            fastest[case["data"]][who] = min(fastest[case["data"]][who], case["seconds"][who])
    best = ", ".join(f"{spent[CLEANLAB] / spent[name]:.1f} ({data})" for data, spent in fastest.items())
    return Verdict(claim, not slow, f"times: {figure}; each at its fastest: {best}", slow)


def verdicts(summaries: list[Summary], record: dict[str, Any]) -> list[Verdict]:
    """Every claim that what was measured can judge."""
    judged = table_verdicts(summaries) if summaries else []
    if "speed" in record:
        for name, least in (
            ("purified readout", READOUT_SPEEDUP),
            ("purify", CERTIFICATION_SPEEDUP),
        ):
            claim = f"{name} in at most a {'tenth' if least == 10 else 'fiftieth'} of CleanLearning's time"
            judged.append(speed_verdict(record["speed"]["cases"], name, claim, least))
    if "large" in record:
        large = record["large"]
        peak = large["peak_bytes"]["purify"]
        figure = f"peak {peak / 2**30:.2f} GiB, {large['seconds']['purify']:.0f} s"
        claim = f"purify of n = {large['n']:,}, q = {large['q']}, l = {large['l']:,} within 4 GiB"
        judged.append(Verdict(claim, peak <= MEMORY_LIMIT, figure, [] if peak <= MEMORY_LIMIT else [figure]))
    return judged


class Group(NamedTuple):
    """Means over the cells of one kind of data and body."""

    name: str
    cells: int
    mean: dict[str, float]


def groups(summaries: list[Summary]) -> Iterator[Group]:
    """The cells by data and body."""
    found: dict[str, list[Summary]] = defaultdict(list)
    for row in summaries:
        found[f"{row.cell.dataset}, {row.cell.training}"].append(row)
    for name, rows in (found | {"all": summaries}).items():
        yield Group(
            name, len(rows), {key: float(np.mean([row.mean[key] for row in rows])) for key in FIGURES}
        )


def write_cells(summaries: list[Summary], path: Path) -> None:
    """One row a cell: means, and standard deviations over the draws under `… std`."""
    rows = []
    for row in summaries:
        cell = row.cell._replace(rate=round(row.cell.rate, 3))
        stds = {f"{name} std": x for name, x in row.std.items()}
        figures = {name: "" if np.isnan(x) else x for name, x in (row.mean | stds).items()}
        rows.append({**cell._asdict(), "draws": row.draws, **figures})
    write_csv(rows, path)


def read_cells(path: Path) -> list[Summary]:
    """What `write_cells` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_read(row) for row in csv.DictReader(file)]


def _read(row: dict[str, str]) -> Summary:
    fields = {name: row[name] for name in Cell._fields}
    number = lambda name: float(row[name] or "nan")  # noqa: E731
    return Summary(
        Cell(**{**fields, "rate": float(fields["rate"])}),
        int(row["draws"]),
        {name: number(name) for name in FIGURES},
        {name: number(f"{name} std") for name in ACCURACIES},
    )


def markdown(summaries: list[Summary], record: dict[str, Any]) -> str:
    """Verdicts and every figure, as Markdown."""
    lines = [
        "# Purification",
        "",
        f"Written by `{COMMAND}`.",
        "",
        *verdict_lines(verdicts(summaries, record)),
    ]
    if summaries:
        lines += [*_accuracy_markdown(summaries), *_detection_markdown(summaries)]
    if "strengths" in record:
        lines += _strengths_markdown(record["strengths"]["rows"])
    if "speed" in record:
        lines += _speed_markdown(record["speed"])
    if "large" in record:
        lines += _large_markdown(record["large"])
    return "\n".join(lines) + "\n"


def _accuracy_markdown(summaries: list[Summary]) -> list[str]:
    text = (
        "In points, mean ± standard deviation over seeds; test labels are clean. Logistic regression has "
        "one strength a data set, fixed beforehand (C = 0.03 on CLINC150, 0.01 on CIFAR-10N, 1 on digits) in "
        "all columns but the ridge one, whose strength is GCV's. CleanLearning has 5 folds. *Memorised* is "
        "the share of draws in which `lip_jax.memorised` says so, by leave-one-out scores / by held-out rows."
    )
    lead = "purified − CleanLearning"
    cells = [
        (
            f"{row.cell.dataset}, {row.cell.training}",
            row.cell.labels,
            *(f"{row.mean[name]:.1f} ± {row.std[name]:.1f}" for name in ACCURACIES),
            f"{row.lead('purified', CLEANLAB):+.2f}",
            _said(row.mean),
        )
        for row in summaries
    ]
    kinds = [
        (
            group.name,
            group.cells,
            *(f"{group.mean[name]:.2f}" for name in ACCURACIES),
            f"{group.mean['purified'] - group.mean[CLEANLAB]:+.2f}",
        )
        for group in groups(summaries)
    ]
    return [
        *("", "## Test accuracy", "", text, ""),
        *table(("data", "labels", *ACCURACIES.values(), lead, "memorised"), cells),
        *("", "Means over the cells of a kind:", ""),
        *table(("data", "cells", *ACCURACIES.values(), lead), kinds),
    ]


def _said(mean: dict[str, float]) -> str:
    """In how many of the draws the body was said to have memorised, both ways."""
    if np.isnan(mean[MEMORISED[0]]):
        return ""
    return " / ".join(f"{mean[name]:.0f}%" for name in MEMORISED)


def _detection_markdown(summaries: list[Summary]) -> list[str]:
    text = (
        "lip_jax / cleanlab, in points: AUROC of trust and of cleanlab's label quality; the rest is of "
        "the masks. *Kept* is the share of rows trusted, *right* how many of those are labelled correctly."
    )
    cells = [
        (
            f"{row.cell.dataset}, {row.cell.training}",
            row.cell.labels,
            f"{row.mean['wrong']:.1f}",
            *(_pair(row.mean, quantity) for quantity in DETECTED),
        )
        for row in summaries
    ]
    return [
        "",
        "## Which labels are wrong",
        "",
        text,
        "",
        *table(("data", "labels", "wrong", *DETECTED), cells),
    ]


def _pair(mean: dict[str, float], quantity: str) -> str:
    """Ours and theirs, the better in bold."""
    values = [round(mean[f"{name} {quantity}"], 1) for name in DETECTORS]
    best = max(values) if quantity != "kept" and values[0] != values[1] else None
    return " / ".join(f"**{value:.1f}**" if value == best else f"{value:.1f}" for value in values)


def _strengths_markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Each column at the strength that suits it best in hindsight."""
    text = (
        "How much hangs on the strength that was fixed: test accuracy of each column, and F1 of cleanlab's "
        "mask, at the C that is best for it in hindsight, in brackets; on fewer draws."
    )
    cells: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["cell"]].append(row)
    best = {
        cell: {name: max(held, key=lambda row, name=name: row[name]) for name in BY_STRENGTH}
        for cell, held in cells.items()
    }
    leads = {cell: row["purified"]["purified"] - row[CLEANLAB][CLEANLAB] for cell, row in best.items()}
    lines = [
        (
            cell,
            *(f"{row[name][name]:.1f} ({row[name]['C']:.2g})" for name in BY_STRENGTH),
            f"{leads[cell]:+.2f}",
        )
        for cell, row in best.items()
    ]
    below = sum(lead < 0 for lead in leads.values())
    mean = f"Mean lead {np.mean(list(leads.values())):+.2f} points; below in {below} of {len(leads)} cells."
    names = (ACCURACIES["noisy"], "purified", CLEANLAB, "F1 of cleanlab", "purified − CleanLearning")
    return [
        "",
        "## At the best strength in hindsight",
        "",
        text,
        "",
        *table(("data", *names), lines),
        "",
        mean,
    ]


def _speed_markdown(speed: dict[str, Any]) -> list[str]:
    text = (
        f"On {speed['machine']['processor']}, in one process for each number of cores; XLA and OpenBLAS have "
        "as many threads as it has cores. Seconds from features and labels, as JAX or NumPy arrays, to the "
        f"result: of lip_jax the median of {speed['repeats']} calls after the first, whose excess, the "
        "compilation, stands apart; of the others one call. *Copying* is what features in NumPy would add."
    )
    against = (
        "Against scikit-learn, on the same rows: ridge with the same 61 strengths, chosen by GCV here and by "
        "leave-one-out errors in `RidgeClassifierCV`; logistic regression at equal L2, and the objective "
        "reached, per row, in double precision."
    )
    ours = ("purified readout", "purify")
    cases = [
        (
            case["data"],
            case["cores"],
            *(f"{case['seconds'][name]:.3g}" for name in (*ours, CLEANLAB)),
            ", ".join(f"{case['seconds'][CLEANLAB] / case['seconds'][name]:.1f}" for name in ours),
            ", ".join(f"{case['compilation'][name]:.1f}" for name in ours),
            f"{case['copying']:.3g}",
        )
        for case in speed["cases"]
    ]
    pairs = [
        (
            case["data"],
            case["cores"],
            what,
            *(f"{case['seconds'][name]:.3g}" for name in (mine, other)),
            f"{case['seconds'][other] / case['seconds'][mine]:.1f}",
            " / ".join(f"{case['accuracy'][name]:.2f}" for name in (mine, other)),
            " / ".join(f"{case[what][name]:.6g}" for name in (mine, other)),
        )
        for case in speed["cases"]
        for what, mine, other in SCIKIT_LEARN
    ]
    return [
        *("", "## Speed", "", text, ""),
        *table(("data", "cores", *ours, CLEANLAB, "times: readout, purify", "compilation", "copying"), cases),
        *("", against, ""),
        *table(("data", "cores", "", "lip_jax", "scikit-learn", "times", "test accuracy", "value"), pairs),
    ]


def _large_markdown(large: dict[str, Any]) -> list[str]:
    memory = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in large["peak_bytes"].items())
    text = (
        f"Clustered {large['dtype']} features, {large['rate']:.0%} symmetric noise, {large['cores']} cores, "
        f"one thread of OpenBLAS. Peak resident memory in GiB, after: {memory}."
    )
    return [
        *("", f"## n = {large['n']:,}, q = {large['q']}, l = {large['l']:,}", "", text, ""),
        *table(("step", "seconds"), ((name, f"{x:.2f}") for name, x in large["seconds"].items())),
        "",
        *table(("", "points"), ((name, f"{x:.2f}") for name, x in large["points"].items())),
    ]


# Colour, marker and size of a column; markers tell them apart without colour.
GAINS = {
    "oracle": (COLORS[6], "|", 60),
    CLEANLAB: (COLORS[1], "s", 22),
    "purified ridge": (COLORS[2], "^", 20),
    "purified": (COLORS[0], "o", 20),
}
DETECTOR_STYLES = {CLEANLAB: GAINS[CLEANLAB], "lip_jax": GAINS["purified"]}


def draw(summaries: list[Summary], path: Path) -> None:
    """Every cell: gain in test accuracy over all noisy labels, and how well wrong labels are found."""
    lines: list[Summary | str] = []
    for row in summaries:
        title = f"{row.cell.dataset}, {row.cell.training}"
        lines += [row] if title in lines else [title, row]
    height = np.array([i for i, line in enumerate(lines) if isinstance(line, Summary)])
    figure = Figure(layout="constrained", figsize=(11, 1.6 + 0.2 * len(lines)))
    gain_ax, auroc_ax, f1_ax = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    for name, (color, marker, size) in GAINS.items():
        label = ACCURACIES[name].strip("*") + (" (logistic)" if name == "purified" else "")
        gain = [row.lead(name, "noisy") for row in summaries]
        gain_ax.scatter(gain, height, s=size, c=color, marker=marker, label=label, zorder=3)
    gain_ax.axvline(0, color="0.4", linewidth=0.8)
    gain_ax.set_xlabel("gain over the fit to all noisy labels, points of test accuracy", fontsize=8)
    for quantity, ax in (("AUROC", auroc_ax), ("F1", f1_ax)):
        ours, theirs = ([row.mean[f"{name} {quantity}"] for row in summaries] for name in DETECTORS)
        ax.hlines(height, ours, theirs, color="0.75", linewidth=1)
        for name, (color, marker, size) in DETECTOR_STYLES.items():
            values = [row.mean[f"{name} {quantity}"] for row in summaries]
            ax.scatter(values, height, s=size, c=color, marker=marker, zorder=3)
        ax.set_xlabel(f"{quantity} of wrong labels", fontsize=8)
    _label_rows(gain_ax, lines, height, summaries)
    for ax in (gain_ax, auroc_ax, f1_ax):
        ax.grid(axis="x", color="0.92")
        ax.tick_params(labelsize=7)
        for i, line in enumerate(lines):
            if isinstance(line, str):
                ax.axhspan(i - 0.5, i + 0.5, color="0.94", zorder=2)
    figure.legend(*gain_ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=80)


def _label_rows(ax: Axes, lines: list[Summary | str], height: np.ndarray, summaries: list[Summary]) -> None:
    ax.set_yticks(height, [row.cell.labels for row in summaries])
    ax.set_ylim(len(lines) - 0.4, -0.6)
    place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center", "zorder": 4}
    for i, line in enumerate(lines):
        if isinstance(line, str):
            ax.text(0.01, i, line, fontsize=6.5, weight="bold", **place)


def write(section: str, measured: dict[str, Any], out: Path, console: Console) -> None:
    """Put one section on record beside what other commands measured, judge all, and write all."""
    path, cells = out / "purification.json", out / "purification.csv"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    summaries = by_training(read_cells(cells)) if cells.exists() else []
    sections = {name: record[name] for name in ("table", "strengths", "speed", "large") if name in record}
    sections[section] = {**measured, "machine": machine(*PACKAGES)}
    judged = verdicts(summaries, sections)
    held = {"command": COMMAND, **sections, "verdicts": [item._asdict() for item in judged]}
    write_json(held, path)
    (out / "purification.md").write_text(markdown(summaries, sections), encoding="utf-8")
    if summaries:
        draw(summaries, out / "purification.png")
    print_verdicts(judged, console)
