"""Readouts of a few clean labels beside the noisy head they replace [li2020].

    python -m benchmarks.clean_readout --data DIR

Test accuracy of ridge and logistic readouts, each with the strength it chooses itself, against the number
of clean labels a class, on features whose head was trained on noisy labels. The counts and the share that is
called few were fixed before the first table. It showed GCV interpolating where rows are fewer than features;
that was mended in the library, and no verdict changed.

- CLINC150: the features are frozen sentence embeddings, which no label noise has touched. Only the head is
  noisy, so this is the easy case, and the readouts are the same at all noise rates.
- CIFAR-10N: the body of the network was itself trained on the labels that people gave, 40.2% of them wrong,
  and has seen all rows that the readouts are fitted to.

A third head is a control: the ridge readout fitted to all noisy labels, at no cost in clean ones.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

import lip_jax
from benchmarks.accuracy import Noise, Part, corrupt, paired, train_head
from benchmarks.data import load_cifar10n, load_clinc150
from benchmarks.record import machine, write_json
from benchmarks.tables import Spread, Verdict, judge, print_verdicts, spread, table, verdict_lines, write_csv
from lip_jax import Head
from lip_jax.methods.readout import Solver
from lip_jax.plot import COLORS, LINE_STYLES, MARKERS

COMMAND = "python -m benchmarks.clean_readout --data DIR"
SOLVERS: tuple[Solver, ...] = get_args(Solver)
SEEDS = 5
RATES = (0.2, 0.4, 0.6)
REGIMES = ("well regularised", "overfitted")
CONTROL = "ridge on the noisy labels"
# A readout is said to need few clean labels where a tenth of them do.
FEW = 0.1
# Labels a class, and all of them.
COUNTS = {"CLINC150": (1, 2, 5, 10, 20, 50, 100), "CIFAR-10N": (1, 2, 5, 10, 20, 50, 200, 500, 5000)}


class Row(NamedTuple):
    """A head beside one readout, in points of test accuracy; `gain` is the readout's over the head."""

    dataset: str
    noise: str
    rate: float
    head: str
    solver: str
    per_class: int
    accuracy: Spread
    base: Spread
    gain: Spread

    @property
    def labels(self) -> str:
        """The noise in words."""
        return f"{self.noise} {self.rate:.2g}"


class Heads(NamedTuple):
    """Noisy heads of one noise: which test rows they get right, `(m,)` for each seed."""

    noise: Noise
    hits: dict[str, list[np.ndarray]]


# Solver and labels a class.
Setting = tuple[Solver, int]
Readouts = dict[Setting, list[np.ndarray]]


def clean_rows(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Rows with `per_class` of each class, in random order; those of a smaller number are among them."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    rows = [order[labels[order] == y][:per_class] for y in range(labels.max() + 1)]
    # The logistic readout holds out a fifth of the rows to choose its strength.
    return rng.permutation(np.concatenate(rows))


def hits(head: Any, test: Part) -> np.ndarray:
    """Which test rows a head or readout gets right."""
    logits = jnp.matmul(test.x, head.kernel, precision=jax.lax.Precision.HIGHEST) + head.bias[None, :]
    return np.asarray(jnp.argmax(logits, axis=1) == test.y)


def readouts(clean: Part, test: Part, counts: Sequence[int], seeds: Sequence[int]) -> Readouts:
    """What every readout gets right; all labels are the same for every seed, so one fit of them serves."""
    found: Readouts = {}
    settings: list[Setting] = [(solver, count) for solver in SOLVERS for count in counts]
    num_classes = int(clean.y.max()) + 1
    for solver, count in track(settings, "readouts"):
        everything = count * num_classes >= len(clean.y)
        fitted = []
        for seed in seeds[:1] if everything else seeds:
            rows = clean_rows(clean.y, count, seed)
            readout = lip_jax.linear_readout(
                clean.x[rows], clean.y[rows], num_classes=num_classes, solver=solver
            )
            fitted.append(hits(readout, test))
        found[solver, count] = fitted * len(seeds) if everything else fitted
    return found


def compare(dataset: str, heads: Iterable[Heads], found: Readouts) -> list[Row]:
    """Every head beside every readout, seed by seed."""
    return [
        _compare(dataset, noise, name, base, setting, right)
        for noise, by_name in heads
        for name, base in by_name.items()
        for setting, right in found.items()
    ]


def _compare(
    dataset: str, noise: Noise, name: str, base: list[np.ndarray], setting: Setting, right: list[np.ndarray]
) -> Row:
    gains = [paired(better, worse) for better, worse in zip(right, base, strict=True)]
    accuracy, own = (spread([100 * float(row.mean()) for row in rows]) for rows in (right, base))
    # All seeds are judged on the same test rows.
    gain = spread([gain for gain, _ in gains], [error for _, error in gains])
    (kind, rate), (solver, per_class) = noise, setting
    return Row(dataset, kind, rate, name, solver, per_class, accuracy, own, gain)


def noisy_ridge(rows: Part, num_classes: int) -> Head:
    """The control."""
    readout = lip_jax.linear_readout(rows.x, rows.y, num_classes=num_classes)
    assert readout.bias is not None
    return Head(readout.kernel, readout.bias)


def clinc150_heads(data: str | None, seeds: Sequence[int], rates: Sequence[float] = RATES) -> Iterator[Heads]:
    """Heads on CLINC150, the same as those of `benchmarks.accuracy`."""
    held = load_clinc150(data)
    train, val, test = (Part(held[i], held[i + 1]) for i in (0, 2, 4))
    for rate in rates:
        right: dict[str, list[np.ndarray]] = {name: [] for name in (*REGIMES, CONTROL)}
        for seed in seeds:
            noisy = train._replace(y=corrupt(("symmetric", rate), seed, [train, val], 150)[0])
            for regime in REGIMES:
                right[regime].append(hits(train_head(regime, "cross-entropy", seed, noisy, 150), test))
            right[CONTROL].append(hits(noisy_ridge(noisy, 150), test))
        yield Heads(("symmetric", rate), right)


def clinc150(data: str | None, seeds: Sequence[int]) -> list[Row]:
    """Readouts of frozen sentence embeddings."""
    held = load_clinc150(data)
    test = Part(held.test_x, held.test_y)
    heads = list(track(clinc150_heads(data, seeds), "heads", len(RATES)))
    found = readouts(Part(held.train_x, held.train_y), test, COUNTS["CLINC150"], seeds)
    return compare("CLINC150", heads, found)


def cifar10n(data: str | None, seeds: Sequence[int]) -> list[Row]:
    """Readouts of a body trained on human labels, beside the head that came with it."""
    held = load_cifar10n(data)
    test = Part(held.test_x, held.test_y)
    given = hits(Head(jnp.asarray(held.kernel), jnp.asarray(held.bias)), test)
    control = hits(noisy_ridge(Part(held.train_x, held.train_y), 10), test)
    right = {name: [row] * len(seeds) for name, row in (("given head", given), (CONTROL, control))}
    found = readouts(Part(held.train_x, held.train_true), test, COUNTS["CIFAR-10N"], seeds)
    return compare("CIFAR-10N", [Heads(("human", 0.402), right)], found)


def cells(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The rows of each data set, noise and head."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.dataset, row.head, row.labels), []).append(row)
    return groups


def beats_from(rows: Iterable[Row]) -> int | None:
    """From how many labels a class on readouts of one solver beat a head, by more than 2 standard errors."""
    first = None
    for row in sorted(rows, key=lambda row: -row.per_class):
        if not row.gain.above:
            break
        first = row.per_class
    return first


def counts_of(rows: Iterable[Row]) -> dict[str, list[int]]:
    """How many labels a class each data set was given, the last all that it has."""
    counts: dict[str, set[int]] = {}
    for row in rows:
        counts.setdefault(row.dataset, set()).add(row.per_class)
    return {dataset: sorted(held) for dataset, held in counts.items()}


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """For each head and solver: whether a tenth of the clean labels do."""
    few = {dataset: round(FEW * counts[-1]) for dataset, counts in counts_of(rows).items()}
    groups: dict[tuple[str, str, str], dict[str, Spread]] = {}
    for row in rows:
        if row.per_class == few[row.dataset]:
            groups.setdefault((row.dataset, row.head, row.solver), {})[row.labels] = row.gain
    return [
        judge(
            f"{dataset}: a {solver} readout of {few[dataset]} clean labels a class beats the noisy head "
            f"({head})",
            gains,
        )
        for (dataset, head, solver), gains in groups.items()
    ]


ABOUT = f"""Written by `{COMMAND}`. Test accuracy in points, mean ± standard deviation over seeds, which
draw the clean rows and the noise; a readout of all rows is fitted once. A readout beats a head where the mean
of the paired differences is more than 2 standard errors above 0, those of the common test rows included.
Strengths are chosen by the solvers themselves, on the clean rows alone.

The features of CLINC150 are frozen sentence embeddings, untouched by label noise: only its heads differ. The
body of CIFAR-10N was trained on labels of which 40.2% are wrong. “{CONTROL.capitalize()}” is a control that
needs no clean label: what a readout gains over it is owed to the labels, not to the solver."""


def markdown(rows: Sequence[Row]) -> str:
    """Verdicts, from how many labels readouts beat each head, and every readout."""
    lines = ["# Readouts of a few clean labels", "", ABOUT, "", *verdict_lines(verdicts(rows))]
    lines += ["", "## From how many clean labels a class a readout beats the noisy head", ""]
    listed = []
    for (dataset, head, labels), group in cells(rows).items():
        firsts = [beats_from(row for row in group if row.solver == solver) for solver in SOLVERS]
        listed.append((dataset, head, labels, group[0].base, *("never" if n is None else n for n in firsts)))
    lines += table(("data", "head", "labels", "accuracy of the head", *SOLVERS), listed)
    for dataset, counts in counts_of(rows).items():
        found = {(row.solver, row.per_class): row.accuracy for row in rows if row.dataset == dataset}
        lines += ["", f"## {dataset}: accuracy by clean labels a class", ""]
        listed = [(solver, *(found[solver, count] for count in counts)) for solver in SOLVERS]
        lines += table(("readout", *(f"{count:,}" for count in counts)), listed)
    return "\n".join(lines) + "\n"


def flat_rows(rows: Iterable[Row]) -> list[dict[str, object]]:
    """One row of the CSV for each."""
    return [
        {
            **{name: value for name, value in row._asdict().items() if not isinstance(value, Spread)},
            "accuracy": row.accuracy.mean,
            "accuracy std": row.accuracy.std,
            "head accuracy": row.base.mean,
            "head accuracy std": row.base.std,
            "gain": row.gain.mean,
            "gain error": row.gain.error,
        }
        for row in rows
    ]


def draw_panel(rows: Sequence[Row], ax: Axes) -> None:
    """The curves of both solvers, and a line at the accuracy of each noisy head."""
    heads = dict.fromkeys((row.labels, row.base) for row in rows)
    for (labels, base), color, style in zip(heads, COLORS[2:], LINE_STYLES, strict=False):
        ax.axhline(base.mean, color=color, linestyle=style, linewidth=1.6, label=f"head, {labels}")
        ax.axhspan(base.mean - base.std, base.mean + base.std, color=color, alpha=0.15, linewidth=0)
    for solver, color, marker in zip(SOLVERS, COLORS, MARKERS, strict=False):
        curve = {row.per_class: row.accuracy for row in rows if row.solver == solver}
        means, stds = [found.mean for found in curve.values()], [found.std for found in curve.values()]
        ax.errorbar(
            list(curve), means, stds, color=color, marker=marker, label=f"{solver} readout", capsize=3
        )
    counts = sorted({row.per_class for row in rows})
    ax.set_xscale("log")
    ax.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=8)
    ax.set_xticks([], minor=True)
    ax.set_xlabel("clean labels a class")
    ax.grid(color="0.92")
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, edgecolor="none")


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel for each head but the control."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.head != CONTROL:
            panels.setdefault((row.dataset, row.head), []).append(row)
    figure = Figure(figsize=(4.8 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, ((dataset, head), panel) in zip(axes, panels.items(), strict=True):
        draw_panel(panel, ax)
        ax.set_title(f"{dataset}, {head}" + ("" if "head" in head else " head"), fontsize=10)
    axes[0].set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=100)


SETS = {"clinc150": clinc150, "cifar10n": cifar10n}


def main(
    data: Annotated[str | None, typer.Option(help="Data folder; default: LIP_JAX_DATA.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
    seeds: Annotated[int, typer.Option(help="Seeds of noise and clean rows.")] = SEEDS,
) -> None:
    """Measure both data sets, judge, and write clean_readout.csv, .json, .md and .png."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    seconds: dict[str, int] = {}
    for name, measure in SETS.items():
        start = time.perf_counter()
        rows += measure(data, range(seeds))
        seconds[name] = round(time.perf_counter() - start)
    judged = verdicts(rows)
    write_csv(flat_rows(rows), out / "clean_readout.csv")
    record = {"command": COMMAND, "seeds": f"0 to {seeds - 1}", "seconds": seconds, "machine": machine()}
    record["beats_from"] = {
        ", ".join(cell): {solver: beats_from(r for r in group if r.solver == solver) for solver in SOLVERS}
        for cell, group in cells(rows).items()
    }
    write_json(record | {"verdicts": [item._asdict() for item in judged]}, out / "clean_readout.json")
    (out / "clean_readout.md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, out / "clean_readout.png")
    print_verdicts(judged, Console(width=160))


if __name__ == "__main__":
    typer.run(main)
