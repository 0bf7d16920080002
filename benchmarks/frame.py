"""What all benchmarks share: cells over seeds, verdicts, Markdown, pictures, the record, the command line.

A benchmark is a set of sections. `NAME.json` holds what was measured of each, with its commit, date and
machine; measuring one section leaves the others as they were. `NAME.md` and `NAME.png` are made from that
file alone, so the section `render` makes them again without measuring.
"""

import json
import math
import os
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
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
from rich.console import Console
from rich.progress import track

from lip_jax.plot import COLORS, MARKERS

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
# What was measured, by section, as values for JSON.
Record = dict[str, dict[str, Any]]

RESULTS, PAGES = (Path(__file__).parent / name for name in ("results", "pages"))
USUAL_LOSSES = ("cross-entropy", "squared error")


class Ask(NamedTuple):
    """What the command line says to every section: the data folder, and the number of seeds."""

    data: str | None = None
    seeds: int | None = None


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
    """One seed of a cell: its figures, NaN where one does not apply, and what was chosen, if anything was."""

    cell: Cell
    seed: int
    values: dict[str, float]
    chosen: str = ""


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
    """The spread of one value a seed.

    Errors that are `shared`, such as those of test rows common to all seeds, do not shrink with the seeds:
    their mean square is added to the squared error of the mean.
    """
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
    curves: dict[str, list[float]] | None = None

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
        mean = {name: of_seeds.mean for name, of_seeds in spreads.items()} | derive(values)
        std = {name: of_seeds.std for name, of_seeds in spreads.items()}
        found.append(Summary(cell, len(group), mean, std, ", ".join(f"{name} {n}" for name, n in counts)))
    return found


def as_json(rows: Iterable[Summary]) -> list[dict[str, Any]]:
    """For the record: six digits, infinity as a string, what is empty left out."""
    digits = lambda held: {n: float(f"{x:.6g}") if math.isfinite(x) else str(x) for n, x in held.items()}
    return [
        {name: part for name, part in row._asdict().items() if part}
        | {"cell": row.cell._asdict(), "mean": digits(row.mean), "std": digits(row.std)}
        for row in rows
    ]


def summaries(record: Record, sections: Iterable[str] | None = None) -> list[Summary]:
    """The cells of several sections, those of one data set and way of training together."""
    found = []
    for row in (row for name in sections or record for row in record.get(name, {}).get("cells", [])):
        figures = {part: {name: float(x) for name, x in row[part].items()} for part in ("mean", "std")}
        found.append(Summary(**{**row, **figures, "cell": Cell(**row["cell"])}))
    by_data = grouped(found, lambda row: row.cell.data).values()
    return [
        row for held in by_data for rows in grouped(held, lambda row: row.cell.head).values() for row in rows
    ]


def cells_measured(
    name: str,
    tasks: Callable[[str | None, range], Iterator[Any]],
    seeds: int,
    measure: Callable[[Any], Draw],
    derive: Derive = lambda values: {},
) -> Callable[[Ask], dict[str, Any]]:
    """A section: every draw of every cell of one set of tasks."""

    def run(ask: Ask) -> dict[str, Any]:
        draws = track(tasks(ask.data, range(ask.seeds or seeds)), name)
        return {"cells": as_json(summarise(map(measure, draws), derive))}

    return run


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by a key, in the order of their first ones."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


class Verdict(NamedTuple):
    """A claim, whether it holds, the figure it rests on, and what misses it; in a chapter of its own."""

    claim: str
    holds: bool
    figure: str
    missed: Sequence[str] = ()
    chapter: str = ""


def judge(
    claim: str,
    cells: Mapping[str, Item],
    holds: Callable[[Item], bool],
    show: Callable[[Item], str],
    figure: str,
    tolerated: float = 0.0,
) -> Verdict:
    """A claim about all cells but a tolerated share; `{met}` in the figure becomes how many meet it."""
    missed = [f"{name}: {show(cell)}" for name, cell in cells.items() if not holds(cell)]
    met = len(cells) - len(missed)
    share = f"{met} of {len(cells)} cells ({100 * met / len(cells):.1f}%)"
    return Verdict(claim, len(missed) <= tolerated * len(cells), figure.replace("{met}", share), missed)


def judge_gain(
    claim: str, cells: Mapping[str, Spread], holds: Callable[[Spread], bool] = lambda gain: gain.above
) -> Verdict:
    """Whether a difference, in points, is as claimed in every cell; by default beyond 2 standard errors."""
    least = min(cells, key=lambda cell: cells[cell].mean)
    met = sum(map(holds, cells.values()))
    figure = f"{met} of {len(cells)}; least {cells[least].difference} ({least})"
    return judge(claim, cells, holds, lambda gain: gain.difference, figure)


def rows_of(cells: Iterable[Iterable[object]]) -> str:
    """The rows of a Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def table(header: Sequence[str], cells: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    return f"| {' | '.join(header)} |\n{'|---' * len(header)}|\n{rows_of(cells)}"


def verdict_page(verdicts: Sequence[Verdict]) -> str:
    """Verdicts as Markdown tables by chapter, and what speaks against each below it."""
    parts = []
    for chapter, items in grouped(verdicts, lambda item: item.chapter).items():
        rows = [(item.claim, "holds" if item.holds else "**missed**", item.figure) for item in items]
        parts += [f"## {chapter}"] * bool(chapter) + [table(("claim", "", "figure"), rows)]
        for item in (item for item in items if item.missed):
            summary = f"<summary>Against “{item.claim}”: {len(item.missed)}</summary>"
            parts += [
                "\n".join(["<details>", summary, "", *(f"- {cell}" for cell in item.missed), "</details>"])
            ]
    return "\n\n".join(parts)


# Of a column in a picture: label, colour, marker and size; markers tell columns apart without colour.
Style = tuple[str, str, str, float]


def draw_cells(
    ax: Axes,
    rows: Sequence[Summary],
    columns: Mapping[str, Style],
    value: Callable[[Summary, str], float],
    line: tuple[str, str] | None = None,
    named: bool = True,
) -> int:
    """A line for each cell under a title for each way of training, and on it a mark for each column."""
    height, heights = 0, []
    for title, group in grouped(rows, lambda row: row.cell.head).items():
        ax.axhspan(height - 0.5, height + 0.5, color="0.94", zorder=2)
        if named:
            place = {"transform": ax.get_yaxis_transform(), "va": "center", "zorder": 4}
            ax.text(0.01, height, title, fontsize=6.5, weight="bold", **place)
        heights += range(height + 1, height + 1 + len(group))
        height += 1 + len(group)
    if named:
        ax.set_yticks(heights, [row.cell.labels for row in rows])
    if line:
        ax.hlines(heights, *([value(row, name) for row in rows] for name in line), color="0.75", linewidth=1)
    for name, (label, color, marker, size) in columns.items():
        at = [value(row, name) for row in rows]
        ax.scatter(at, heights, s=size, c=color, marker=marker, label=label, zorder=3)
    ax.tick_params(labelsize=7)
    ax.grid(axis="x", color="0.92")
    return height


def error_bars(ax: Axes, x: Sequence[float], found: Sequence[Spread], index: int, **style: Any) -> None:
    """A curve of means with standard deviations, in the colour and with the marker of an index."""
    means, stds = [item.mean for item in found], [item.std for item in found]
    options = {"color": COLORS[index], "marker": MARKERS[index], "capsize": 2, "markersize": 5} | style
    ax.errorbar(x, means, stds, **options)


def machine(*others: str) -> dict[str, Any]:
    """What figures are made with; `others` are packages that took part beside the usual ones."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    packages = ("jax", "jaxlib", "numpy", "flax", "optax", "lip_jax", *others)
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jax_devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def commit() -> str:
    """The commit of the working tree, with a plus where it has been changed since."""

    def git(*args: str) -> str:
        found = subprocess.run(("git", "-C", RESULTS.parent, *args), capture_output=True, text=True)
        return found.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def compact(value: Any, indent: str = "") -> str:
    """JSON with what is short, or holds no other container, on one line."""
    line = json.dumps(value, ensure_ascii=False)
    keyed = isinstance(value, dict)
    parts = value.values() if keyed else value if isinstance(value, list | tuple) else ()
    if len(line) + len(indent) <= 110 or not any(isinstance(part, dict | list | tuple) for part in parts):
        return line
    keys = [f"{json.dumps(key, ensure_ascii=False)}: " for key in value] if keyed else [""] * len(value)
    held = (f"{indent} {key}{compact(part, indent + ' ')}" for key, part in zip(keys, parts, strict=True))
    first, last = "{}" if keyed else "[]"
    return "\n".join([first, ",\n".join(held), indent + last])


def _has(chapter: str, parts: Mapping[str, str]) -> bool:
    return all(name in parts for name in re.findall(r"\{(\w+)\}", chapter))


@dataclass(frozen=True)
class Benchmark:
    """The sections of a benchmark, how each is measured, and what the whole record says.

    `pages/NAME.md` is the page, where `{verdicts}`, `{record}` and what `tables` makes are put in; of sections
    that are not on record nothing is said. `groups` names several sections at once, `packages` those that take
    part beside the usual ones. With `by_platform` each of JAX's platforms has a record of its own.
    """

    name: str
    sections: dict[str, Callable[[Ask], dict[str, Any]]]
    verdicts: Callable[[Record], list[Verdict]]
    tables: Callable[[Record], dict[str, str]]
    draw: Callable[[Record], Figure | None] = lambda record: None
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    by_platform: bool = False

    @property
    def stem(self) -> str:
        """Of the files."""
        return f"{self.name}_{jax.default_backend()}" if self.by_platform else self.name

    def load(self, out: Path = RESULTS) -> Record:
        """What is on record, in the order of the sections."""
        path = out / f"{self.stem}.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {name: held[name] for name in self.sections if name in held}

    def markdown(self, record: Record) -> str:
        """The page."""
        made = table(
            ("section", "measured", "commit", "seconds", "processor", "cores"),
            (
                (name, held["date"], held["commit"], held.get("seconds", ""), on["processor"], on["cores"])
                for name, held in record.items()
                for on in [held["machine"]]
            ),
        )
        parts = {"verdicts": verdict_page(self.verdicts(record)), "record": made, **self.tables(record)}
        page = (PAGES / f"{self.name}.md").read_text(encoding="utf-8")
        # A chapter all of whose tables are missing is left out.
        chapters = [part for part in re.split(r"^(?=## )", page, flags=re.MULTILINE) if _has(part, parts)]
        return re.sub(r"\{(\w+)\}", lambda name: parts[name[1]], "".join(chapters))

    def write(self, record: Record, out: Path) -> None:
        """The record, its page and its picture."""
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{self.stem}.json").write_text(compact(record) + "\n", encoding="utf-8")
        (out / f"{self.stem}.md").write_text(self.markdown(record), encoding="utf-8")
        if figure := self.draw(record):
            figure.savefig(out / f"{self.stem}.png")

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
            record = self.load(out)
            if name != "render":
                start = time.perf_counter()
                measured = self.sections[name](Ask(data, seeds))
                made = {"seconds": round(time.perf_counter() - start), "commit": commit()}
                made |= {"date": date.today().isoformat(), "machine": machine(*self.packages)}
                record[name] = measured | made
            self.write({part: record[part] for part in self.sections if part in record}, out)
        for item in self.verdicts(self.load(out)):
            mark = "[green]holds [/green]" if item.holds else "[red]MISSED[/red]"
            line = f"{mark} {item.claim}: {item.figure}", *item.missed
            Console(width=160).print(*line, sep="\n    - ", highlight=False)

    def run(self) -> None:
        """The command line."""
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(help=f"Measure {', '.join([*self.sections, *self.groups])}, or render.")(self.main)
        app()
