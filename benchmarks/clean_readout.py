"""Readouts of a few clean labels beside the noisy head they replace [li2020].

    python -m benchmarks.clean_readout [clinc150|cifar10n|render] --data DIR

Test accuracy of ridge and logistic readouts, each with the strength it chooses itself, against the number of
clean labels a class, on features whose head was trained on noisy labels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.progress import track

import lip_jax
from benchmarks import frame
from benchmarks.data import Noise, Part, corrupt, load_cifar10n, load_clinc150
from benchmarks.frame import Benchmark, Cell, Draw, Measured, Record, Summary, paired
from benchmarks.heads import right, train_head
from lip_jax.methods.readout import Solver

SOLVERS: tuple[Solver, ...] = ("ridge", "logistic")
SEEDS = 5
RATES = (0.2, 0.4, 0.6)
REGIMES = ("well regularised", "overfitted")
CONTROL = "ridge on the noisy labels"
# Labels a class, and all of them.
COUNTS = {"CLINC150": (1, 2, 5, 10, 20, 50, 100), "CIFAR-10N": (1, 2, 5, 10, 20, 50, 200, 500, 5000)}

# Which test rows are right, for each seed, of the readouts by solver and labels a class, or of a head.
Hits = list[np.ndarray]


def clean_rows(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Rows with `per_class` of each class, in random order; those of a smaller number are among them."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    rows = [order[labels[order] == y][:per_class] for y in range(labels.max() + 1)]
    # The logistic readout holds out a fifth of the rows to choose its strength.
    return rng.permutation(np.concatenate(rows))


def readouts(clean: Part, test: Part, counts: Sequence[int], seeds: Sequence[int]) -> dict[tuple, Hits]:
    """What every readout gets right; all labels are the same for every seed, so one fit of them serves."""
    found, num_classes = {}, int(clean.y.max()) + 1
    settings: list[tuple[Solver, int]] = [(solver, count) for solver in SOLVERS for count in counts]
    for solver, count in track(settings, "readouts"):
        everything, hits = count * num_classes >= len(clean.y), []
        for seed in seeds[:1] if everything else seeds:
            rows = clean_rows(clean.y, count, seed)
            x, y = clean.x[rows], clean.y[rows]
            hits.append(right(lip_jax.linear_readout(x, y, num_classes=num_classes, solver=solver), test))
        found[solver, count] = hits * len(seeds) if everything else hits
    return found


def compare(data: str, noise: Noise, heads: dict[str, Hits], found: dict[tuple, Hits]) -> Iterator[Summary]:
    """Every head beside every readout, seed by seed."""
    points = lambda hits: 100 * float(hits.mean())
    for name, base in heads.items():
        draws = []
        for seed, own in enumerate(base):
            values = {"head": points(own)}
            for (solver, count), hits in found.items():
                readout, better = f"{solver} {count}", hits[seed]
                values[readout] = points(better)
                values[f"{readout} gain"], values[f"{readout} gain error"] = paired(better, own)
            draws.append(Draw(Cell(data, *noise, name), seed, values))
        yield from frame.summarise(draws, gain_errors)


def gain_errors(values: frame.Values) -> dict[str, float]:
    """All seeds are judged on the same test rows."""
    gains = [name for name in values if name.endswith(" gain")]
    return {f"{name} error": frame.spread(values[name], values[f"{name} error"]).error for name in gains}


def noisy_ridge(rows: Part, num_classes: int) -> Any:
    """The control."""
    return lip_jax.linear_readout(rows.x, rows.y, num_classes=num_classes)


def clinc150(data: str | None, count: int | None) -> Measured:
    """Readouts of frozen sentence embeddings, beside the heads of `benchmarks.accuracy`."""
    (train, val, test), seeds = load_clinc150(data).parts, range(count or SEEDS)
    found, rows = readouts(train, test, COUNTS["CLINC150"], seeds), []
    for rate in track(RATES, "heads"):
        heads: dict[str, Hits] = {name: [] for name in (*REGIMES, CONTROL)}
        for seed in seeds:
            noisy = train._replace(y=corrupt(("symmetric", rate), seed, [train, val], 150)[0])
            for name in REGIMES:
                heads[name].append(right(train_head(name, "cross-entropy", seed, noisy, 150), test))
            heads[CONTROL].append(right(noisy_ridge(noisy, 150), test))
        rows += compare("CLINC150", ("symmetric", rate), heads, found)
    return frame.as_json(rows)


def cifar10n(data: str | None, count: int | None) -> Measured:
    """Readouts of a body trained on human labels, beside the head that came with it."""
    (train, test, given, true), seeds = load_cifar10n(data), range(count or SEEDS)
    by_name = {"given head": given, CONTROL: noisy_ridge(train, 10)}
    heads = {name: [right(head, test)] * len(seeds) for name, head in by_name.items()}
    found = readouts(train._replace(y=true), test, COUNTS["CIFAR-10N"], seeds)
    return frame.as_json(compare("CIFAR-10N", ("human", 0.402), heads, found))


def counts_of(row: Summary) -> list[int]:
    """How many labels a class a cell was given, the last all that there are."""
    return sorted({int(name.split()[1]) for name in row.mean if name[-1].isdigit()})


def beats_from(row: Summary, solver: str) -> int | str:
    """From how many labels a class on readouts of one solver beat a head, by more than 2 standard errors."""
    first: int | str = "never"
    for count in reversed(counts_of(row)):
        if not row.at(f"{solver} {count} gain").above:
            break
        first = count
    return first


def tables(record: Record) -> dict[str, str]:
    """From how many labels readouts beat each head, and every readout."""
    rows, parts = frame.summaries(record), []
    firsts = [[beats_from(row, solver) for solver in SOLVERS] for row in rows]
    cells = [(row.cell.data, row.cell.regime, row.cell.labels, row.at("head")) for row in rows]
    heads = [(*cell, *first) for cell, first in zip(cells, firsts, strict=True)]
    for data, (row, *_) in frame.grouped(rows, lambda row: row.cell.data).items():
        counts = counts_of(row)
        found = [(solver, *(row.at(f"{solver} {n}") for n in counts)) for solver in SOLVERS]
        header = ("readout", *(f"{n:,}" for n in counts))
        parts += [f"## {data}: accuracy by clean labels a class", frame.table(header, found)]
    return {"heads": frame.rows_of(heads), "readouts": "\n\n".join(parts)}


SECTIONS = {"clinc150": clinc150, "cifar10n": cifar10n}
BENCHMARK = Benchmark("clean_readout", SECTIONS, lambda record: [], tables)

if __name__ == "__main__":
    BENCHMARK.run()
