"""Output of all commands: sentences on stderr, tables and JSON on stdout."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lip_jax._types import Array
from lip_jax.bounds.angles import Angles
from lip_jax.rows.metrics import Metrics

UNUSABLE, UNWRITABLE = 2, 3

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}

# Arguments in library messages that are options of the command line.
ARGUMENTS = (
    "allow_tied|head|layout|method|methods|metric|min_per_class|num_classes|num_standard_errors|rank|rule"
    "|strength|threshold|top|trust_feats|validation|weights"
)


def spelled(message: str) -> str:
    """A message of the library with its arguments as options: `head=` becomes `--head`."""

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        return "--" + name.replace("_", "-") + ("" if value is None else f" {value}")

    message = message.replace("seen=False", "--unseen")
    return re.sub(rf"\b({ARGUMENTS})=(?:True\b|…|'([^']*)')?", option, message)


@contextmanager
def told(command: str) -> Iterator[None]:
    """Turn errors that a user can mend into a sentence and an exit code."""
    try:
        yield
    except ValueError as error:
        stop(command, spelled(str(error)), UNUSABLE)
    except OSError as error:
        stop(command, f"the result could not be written: {error}", UNWRITABLE)


def stop(command: str, message: str, code: int = UNUSABLE) -> NoReturn:
    """Print why on stderr, and exit."""
    tell(command, message)
    raise typer.Exit(code)


def tell(command: str, message: str) -> None:
    """Print a sentence on stderr."""
    Console(stderr=True, **PLAIN).print(f"lip-jax {command}: {message}", soft_wrap=True)


def print_json(found: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout: dataclasses as objects, non-finite numbers as null."""
    typer.echo(json.dumps(_plain(found), allow_nan=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def print_written(
    console: Console, checkpoint: Path, head: str, out: Path, *, changed: bool, left_out: Sequence[str]
) -> None:
    """Print where the new checkpoint is, what differs in it, and which steps it lacks."""
    differs = f"only the head {head} differs from" if changed else "nothing differs from"
    without = f" Left out: its other steps, {', '.join(left_out)}." if left_out else ""
    console.print(f"\nWritten: {out}; {differs} {checkpoint}.{without}", soft_wrap=True)


def metrics_in_words(metrics: Metrics) -> str:
    """The four metrics in a line."""
    return (
        f"accuracy {float(metrics.accuracy):.3f}, balanced {float(metrics.balanced_accuracy):.3f}, "
        f"log-loss {float(metrics.log_loss):.3f}, calibration error {float(metrics.calibration_error):.3f}"
    )


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str] | None]
) -> None:
    """Print right-aligned columns under a title; None among the rows draws a line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    console.print(title, style="bold")
    console.print(table)
    console.print()


def thinned(first: int, last: int, most: int) -> list[int]:
    """At most `most` integers, evenly spaced from the first to the last."""
    return np.linspace(first, last, min(last - first + 1, most)).round().astype(int).tolist()


def print_similarity(
    console: Console, title: str, similarity: Mapping[str, Array], ranks: Sequence[int], l: int
) -> None:
    """Print `φ(k, k)` by the name of the other head, beside chance; each grid is `(r, r)`."""
    diagonals = {name: np.diagonal(np.asarray(grid)) for name, grid in similarity.items()}
    print_table(
        console,
        title,
        ["k", *diagonals, "chance"],
        [[str(k), *(f"{phi[k - 1]:.2f}" for phi in diagonals.values()), f"{k / l:.2f}"] for k in ranks],
    )
    console.print(
        "Where singular values nearly coincide the order of components is arbitrary, and φ falls to chance.\n"
    )


def print_angles(console: Console, title: str, angles: Angles, ranks: Sequence[int]) -> None:
    """Print sines at these ranks beside their bounds, and mark the vacuous bounds."""
    rows = [
        [
            str(k),
            f"{angles.feats_side[row]:.3f}",
            f"{angles.class_side[row]:.3f}",
            *(bound_in_words(float(values[row])) for values in angles.bounds.values()),
        ]
        for row, k in enumerate(ranks)
    ]
    print_table(console, title, ["k", "sin θ, features", "sin θ, classes", *angles.bounds], rows)
    print_vacuous(console, angles.bounds)


def print_vacuous(console: Console, bounds: Mapping[str, Any]) -> None:
    """Print how many of the bounds are vacuous."""
    values = np.concatenate([np.asarray(each) for each in bounds.values()])
    console.print(
        f"{int((values >= 1).sum())} of {values.size} bounds are vacuous: 1 or more, they say nothing.\n"
    )


def bound_in_words(value: float) -> str:
    """A bound on a sine, marked where it is vacuous."""
    if value < 1:
        return f"{value:.3f}"
    return f"vacuous {value:.{1 if value < 1000 else 0}f}"
