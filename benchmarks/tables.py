"""What tables share: verdicts, groups, spreads over seeds, CSV, and Markdown."""

import csv
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from rich.console import Console

Held = TypeVar("Held")
Key = TypeVar("Key", bound=Hashable)


class Verdict(NamedTuple):
    """A claim, whether it holds, the figure it rests on, and the cells that miss it."""

    claim: str
    holds: bool
    figure: str
    missed: list[str]


def grouped(items: Iterable[Held], key: Callable[[Held], Key]) -> dict[Key, list[Held]]:
    """Items by a key, in the order of their first ones."""
    groups: dict[Key, list[Held]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


class Spread(NamedTuple):
    """A mean over seeds, the standard deviation, and the standard error of the mean."""

    mean: float
    std: float
    error: float

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


def spread(values: Sequence[float] | np.ndarray, shared_errors: Sequence[float] | None = None) -> Spread:
    """The spread of one value a seed.

    Errors that are shared, such as those of test rows common to all seeds, do not shrink with the seeds:
    their mean square is added to the squared error of the mean.
    """
    held = np.asarray(values, float)
    std = float(held.std(ddof=1)) if len(held) > 1 else 0.0
    shared = 0.0 if shared_errors is None else float(np.mean(np.square(shared_errors)))
    return Spread(float(held.mean()), std, float(np.sqrt(std**2 / len(held) + shared)))


def write_csv(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Rows with the same columns, numbers to four decimals."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


def judge(
    claim: str, cells: Mapping[str, Spread], holds: Callable[[Spread], bool] = lambda found: found.above
) -> Verdict:
    """Whether a difference, in points, is as claimed in every cell; by default beyond 2 standard errors."""
    missed = [f"{cell}: {found.difference}" for cell, found in cells.items() if not holds(found)]
    lowest = min(cells, key=lambda cell: cells[cell].mean)
    met = f"{len(cells) - len(missed)} of {len(cells)}"
    return Verdict(claim, not missed, f"{met}; least {cells[lowest].difference} ({lowest})", missed)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Verdicts as a Markdown table, and what speaks against each below it."""
    rows = [(item.claim, "holds" if item.holds else "**missed**", item.figure) for item in verdicts]
    lines = table(("claim", "", "figure"), rows)
    for item in verdicts:
        if item.missed:
            summary = f"<summary>Against “{item.claim}”: {len(item.missed)}</summary>"
            lines += ["", "<details>", summary, "", *(f"- {cell}" for cell in item.missed), "</details>"]
    return lines


def print_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    """Every verdict with what misses it."""
    for item in verdicts:
        mark = "[green]holds [/green]" if item.holds else "[red]MISSED[/red]"
        console.print(f"{mark} {item.claim}: {item.figure}", *item.missed, sep="\n    - ", highlight=False)
