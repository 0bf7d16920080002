"""What all benchmarks share: cells over seeds, verdicts, pages, pictures, the record, the command line.

`NAME.json` holds what was measured of each section, with its commit, date and machine; measuring one leaves
the others as they were. `NAME.md` and `NAME.png` are made from that file alone, also by the section `render`.
"""

import json
import math
import os
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import jax
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track

from lip_jax.plot import COLORS, MARKERS

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
# A part of the record, as values for JSON: what was measured of a section, and when, and where.
Measured = dict[str, Any]
Record = dict[str, Measured]
# Measures, given the data folder and the number of seeds, or None for what the section is used to.
Section = Callable[[str | None, int | None], Measured]

RESULTS, PAGES = (Path(__file__).parent / name for name in ("results", "pages"))
PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "lip_jax")
USUAL_LOSSES = ("cross-entropy", "squared error")


class Cell(NamedTuple):
    """What is repeated over seeds; `rows` says which were fitted, where they are not the training rows."""

    data: str
    noise: str
    rate: float
    regime: str
    loss: str = "cross-entropy"
    rows: str = ""

    @property
    def training(self) -> str:
        """Regime, loss and rows, as far as they are not the usual ones."""
        loss = "" if self.loss in USUAL_LOSSES else self.loss
        return ", ".join(part for part in (self.regime, loss, self.rows) if part)

    @property
    def labels(self) -> str:
        """The noise in words."""
        return f"{self.noise} {self.rate:.2g}" if self.rate > 0 else "clean"

    @property
    def head(self) -> str:
        """The cell but for its noise."""
        return f"{self.data}, {self.training}"

    def __str__(self) -> str:
        return f"{self.head}, {self.labels}"


class Draw(NamedTuple):
    """One seed of a cell: its figures, NaN where one does not apply, what was chosen, and curves to draw."""

    cell: Cell
    seed: int
    values: dict[str, float]
    chosen: str = ""
    curves: dict[str, np.ndarray] = {}  # noqa: RUF012


class Spread(NamedTuple):
    """A mean over seeds, the standard deviation, and the standard error of the mean."""

    mean: float
    std: float
    error: float = 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f}"

    @property
    def above(self) -> bool:
        """Whether the mean is above 0 by more than 2 standard errors."""
        return self.mean > 2 * self.error

    @property
    def difference(self) -> str:
        """As a difference in points, with its standard error."""
        return f"{self.mean:+.1f} ± {self.error:.1f}"


def spread(values: Sequence[float] | np.ndarray, shared: Sequence[float] | np.ndarray = (0.0,)) -> Spread:
    """The spread of one value a seed; errors that are `shared` by all seeds do not shrink with them."""
    held = np.asarray(values, float)
    std = float(held.std(ddof=1)) if len(held) > 1 and np.isfinite(held).all() else 0.0
    return Spread(float(held.mean()), std, math.sqrt(std**2 / len(held) + float(np.mean(np.square(shared)))))


def paired(better: np.ndarray, worse: np.ndarray) -> tuple[float, float]:
    """Mean difference of two rows of correct answers in points, and its standard error."""
    difference = 100 * (better.astype(float) - worse)
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


class Summary(NamedTuple):
    """A cell: means and standard deviations of its figures, how often what was chosen, and curves to draw."""

    cell: Cell
    draws: int
    mean: dict[str, float]
    std: dict[str, float]
    chosen: str = ""
    curves: dict[str, list[float]] = {}  # noqa: RUF012

    def at(self, name: str) -> Spread:
        """The spread of one figure; its error is the figure `NAME error`, if there is one."""
        return Spread(self.mean[name], self.std.get(name, 0.0), self.mean.get(f"{name} error", 0.0))

    def lead(self, ours: str, theirs: str) -> float:
        """How far the mean of one figure is above that of another."""
        return self.mean[ours] - self.mean[theirs]


Values = dict[str, np.ndarray]
Derive = Callable[[Values], dict[str, float]]


def summarise(draws: Iterable[Draw], derive: Derive = lambda values: {}) -> list[Summary]:
    """One summary a cell, in the order of their first draws; `derive` adds to the means, or replaces them."""
    found = []
    for cell, group in grouped(draws, lambda draw: draw.cell).items():
        values = {name: np.array([draw.values[name] for draw in group]) for name in group[0].values}
        values = {name: held for name, held in values.items() if not np.isnan(held).any()}
        spreads = {name: spread(held) for name, held in values.items()}
        counts = Counter(draw.chosen for draw in group if draw.chosen).most_common()
        chosen = ", ".join(f"{name} {n}" for name, n in counts)
        curves = {name: np.mean([draw.curves[name] for draw in group], axis=0) for name in group[0].curves}
        curves = {name: [float(f"{x:.4g}") for x in held] for name, held in curves.items()}
        mean = {name: held.mean for name, held in spreads.items()} | derive(values)
        std = {name: held.std for name, held in spreads.items()}
        found.append(Summary(cell, len(group), mean, std, chosen, curves))
    return found


def as_json(rows: Iterable[Summary]) -> Measured:
    """For the record: six digits, infinity as a string, what is empty left out."""
    digits = lambda held: {n: float(f"{x:.6g}") if math.isfinite(x) else str(x) for n, x in held.items()}
    figures = lambda row: {"cell": row.cell._asdict(), "mean": digits(row.mean), "std": digits(row.std)}
    return {"cells": [{k: x for k, x in row._asdict().items() if x} | figures(row) for row in rows]}


def summaries(record: Record, sections: Iterable[str] | None = None) -> list[Summary]:
    """The cells of several sections, those of one data set and way of training together."""
    found = []
    for row in (row for name in sections or record for row in record.get(name, {}).get("cells", [])):
        figures = {part: {name: float(x) for name, x in row[part].items()} for part in ("mean", "std")}
        found.append(Summary(**{**row, **figures, "cell": Cell(**row["cell"])}))
    for key in (lambda row: row.cell.head, lambda row: row.cell.data):
        found = [row for rows in grouped(found, key).values() for row in rows]
    return found


def section(
    name: str, tasks: Callable, seeds: int, measure: Callable[[Any], Draw], derive: Derive = lambda values: {}
) -> Section:
    """Every draw of every cell of one set of tasks, which is made from the data folder and seeds."""

    def run(data: str | None, count: int | None) -> Measured:
        return as_json(summarise(map(measure, track(tasks(data, range(count or seeds)), name)), derive))

    return run


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by a key, in the order of their first ones."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


class Verdict(NamedTuple):
    """A claim, whether it holds, the figure it rests on, and what misses it."""

    claim: str
    holds: bool
    figure: str
    missed: Sequence[str] = ()


def judge(
    claim: str, cells: Mapping[str, Item], holds: Callable, show: Callable, figure="{met}", tolerated=0.0
) -> Verdict:
    """A claim about all cells but a tolerated share; `{met}` in the figure becomes how many meet it."""
    missed = [f"{name}: {show(cell)}" for name, cell in cells.items() if not holds(cell)]
    share = share_of(len(cells) - len(missed), len(cells))
    return Verdict(claim, len(missed) <= tolerated * len(cells), figure.replace("{met}", share), missed)


def share_of(met: int, cells: int, what: str = "cells") -> str:
    """How many cells, in words."""
    return f"{met} of {cells} {what} ({100 * met / max(cells, 1):.1f}%)"


def judge_gain(claim: str, cells: Mapping[str, Spread]) -> Verdict:
    """Whether a difference, in points, is above 0 in every cell by more than 2 standard errors."""
    least, met = min(cells, key=lambda cell: cells[cell].mean), sum(gain.above for gain in cells.values())
    figure = f"{met} of {len(cells)}; least {cells[least].difference} ({least})"
    return judge(claim, cells, lambda gain: gain.above, lambda gain: gain.difference, figure)


def rows_of(cells: Iterable[Iterable[object]]) -> str:
    """The rows of a Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def table(header: Sequence[str], cells: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    return f"{rows_of([header])}\n{'|---' * len(header)}|\n{rows_of(cells)}"


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """All verdicts, and what speaks against each below them."""
    rows = [(item.claim, "holds" if item.holds else "**missed**", item.figure) for item in verdicts]
    parts = [table(("claim", "", "figure"), rows)]
    for item in (item for item in verdicts if item.missed):
        summary = f"<summary>Against “{item.claim}”: {len(item.missed)}</summary>\n"
        parts.append("\n".join(["<details>", summary, *(f"- {cell}" for cell in item.missed), "</details>"]))
    return "\n\n".join(parts)


# Of a column in a picture: label, colour, marker and size; markers tell columns apart without colour.
Style = tuple[str, str, str, float]


def draw_cells(
    ax: Axes, rows: Sequence[Summary], columns: Mapping[str, Style], value: Callable, line: Sequence[str]
) -> int:
    """A row a cell under a title for each way of training, a mark for each column, and a line between two."""
    height, heights = 0, []
    for title, group in grouped(rows, lambda row: row.cell.head).items():
        ax.axhspan(height - 0.5, height + 0.5, color="0.94", zorder=2)
        place = {"transform": ax.get_yaxis_transform(), "va": "center", "zorder": 4}
        ax.text(0.01, height, title, fontsize=6.5, weight="bold", **place)
        heights += range(height + 1, height + 1 + len(group))
        height += 1 + len(group)
    ax.set_yticks(heights, [row.cell.labels for row in rows])
    first, last = ([value(row, name) for row in rows] for name in line)
    ax.hlines(heights, first, last, color="0.75", linewidth=1)
    for name, (label, color, marker, size) in columns.items():
        at = [value(row, name) for row in rows]
        ax.scatter(at, heights, s=size, c=color, marker=marker, label=label, zorder=3)
    ax.tick_params(labelsize=7)
    ax.grid(axis="x", color="0.92")
    return height


def error_bars(ax: Axes, x: Sequence[float], found: Sequence[Spread], index: int, **style: Any) -> None:
    """A curve of means with standard deviations, in the colour and with the marker of an index."""
    options = {"color": COLORS[index], "marker": MARKERS[index], "capsize": 2, "markersize": 5} | style
    ax.errorbar(x, [item.mean for item in found], [item.std for item in found], **options)


def made(*packages: str) -> Measured:
    """When, at which commit and with what figures are made; a plus marks a tree changed since its commit."""
    command = ("git", "-C", str(RESULTS.parent))
    git = lambda *args: subprocess.run((*command, *args), capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    machine = {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jax_devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in (*PACKAGES, *packages)},
    }
    commit = git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    return {"commit": commit, "date": date.today().isoformat(), "machine": machine}


def dump(value: Any, indent: str = "") -> str:
    """JSON with what is short, or holds no other container, on one line."""
    line, keyed = json.dumps(value, ensure_ascii=False), isinstance(value, dict)
    parts = value.values() if keyed else value if isinstance(value, list | tuple) else ()
    if len(line) + len(indent) <= 110 or not any(isinstance(part, dict | list | tuple) for part in parts):
        return line
    keys = [f"{json.dumps(key, ensure_ascii=False)}: " for key in value] if keyed else [""] * len(value)
    held = [f"{indent} {key}{dump(part, indent + ' ')}" for key, part in zip(keys, parts, strict=True)]
    return "{["[not keyed] + "\n" + ",\n".join(held) + f"\n{indent}" + "}]"[not keyed]


@dataclass(frozen=True)
class Benchmark:
    """The sections of a benchmark, how each is measured, and what the whole record says.

    `pages/NAME.md` is the page, where verdicts, record and `tables` are put in; chapters without their tables
    are left out. `groups` are several sections, `packages` take part beside the usual ones. With
    `by_platform` each of JAX's platforms has a record of its own.
    """

    name: str
    sections: dict[str, Section]
    verdicts: Callable[[Record], list[Verdict]]
    tables: Callable[[Record], dict[str, str]]
    draw: Callable[[Record], Figure | None] = lambda record: None
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    by_platform: bool = False

    def path(self, out: Path, suffix: str) -> Path:
        """One of the files."""
        return out / (self.name + (f"_{jax.default_backend()}" if self.by_platform else "") + suffix)

    def load(self, out: Path = RESULTS) -> Record:
        """What is on record, in the order of the sections."""
        path = self.path(out, ".json")
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {name: held[name] for name in self.sections if name in held}

    def markdown(self, record: Record) -> str:
        """The page."""
        header = ("section", "measured", "commit", "seconds", "processor", "cores")
        machine = lambda held: (held["machine"]["processor"], held["machine"]["cores"])
        made = lambda held: (held["date"], held["commit"], held.get("seconds", ""), *machine(held))
        made_of = table(header, ((name, *made(held)) for name, held in record.items()))
        parts = {"verdicts": verdict_table(self.verdicts(record)), "record": made_of}
        parts |= {"picture": self.path(Path(), ".png").name, **self.tables(record)}
        names = lambda chapter: re.findall(r"\{(\w+)\}", chapter)
        page = (PAGES / f"{self.name}.md").read_text(encoding="utf-8")
        chapters = re.split(r"^(?=## )", page, flags=re.MULTILINE)
        page = "".join(chapter for chapter in chapters if set(names(chapter)) <= set(parts))
        return re.sub(r"\{(\w+)\}", lambda name: parts[name[1]], page)

    def write(self, record: Record, out: Path) -> None:
        """The record, its page and its picture."""
        out.mkdir(parents=True, exist_ok=True)
        self.path(out, ".json").write_text(dump(record) + "\n", encoding="utf-8")
        self.path(out, ".md").write_text(self.markdown(record), encoding="utf-8")
        if figure := self.draw(record):
            figure.savefig(self.path(out, ".png"))

    def main(
        self,
        sections: Annotated[list[str] | None, typer.Argument(help="What to measure, or render.")] = None,
        data: Annotated[str | None, typer.Option(help="Data folder; default: LIP_JAX_DATA.")] = None,
        out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
        seeds: Annotated[int | None, typer.Option(help="Seeds, where they are not fixed.")] = None,
    ) -> None:
        """Measure some sections, or all; judge and write the whole record."""
        asked = [name for given in sections or self.sections for name in self.groups.get(given, (given,))]
        known = [*self.sections, *self.groups, "render"]
        if unknown := sorted({*asked} - {*known}):
            raise typer.BadParameter(f"there is no section {unknown}; there are {known}.")
        for name in asked:
            record, start = self.load(out), time.perf_counter()
            if name != "render":
                measured = self.sections[name](data, seeds)
                took = {"seconds": round(time.perf_counter() - start)}
                record[name] = measured | took | made(*self.packages)
            self.write({part: record[part] for part in self.sections if part in record}, out)

    def run(self) -> None:
        """The command line."""
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(help=f"Measure {', '.join([*self.sections, *self.groups])}, or render.")(self.main)
        app()
