"""Repair of whole networks: before which layer they are cut, and what that gains.

    python -m benchmarks.repair [digits|render]

Networks are trained end to end on noisy labels for 120 epochs, with dropout and without. `lip_jax.repair`
sees their training rows and 300 held-out rows, all with noisy labels; clean test labels only judge.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import lip_jax
from benchmarks import frame
from benchmarks.data import Dataset, Noise, corrupt, load_digits
from benchmarks.frame import Benchmark, Cell, Draw, Measured, Record, Summary, Verdict, paired
from benchmarks.networks import CNN, MLP, train_networks

SEEDS, EPOCHS, DROPOUT = 5, 120, 0.2
WIDTHS, MAPS = (256, 128), ((32, 2), (64, 2))
NETWORKS: dict[tuple[str, str], nn.Module] = {
    ("digits MLP", "without dropout"): MLP(10, WIDTHS, named=True),
    ("digits MLP", "with dropout"): MLP(10, WIDTHS, named=True, dropout=DROPOUT),
    ("digits CNN", "without dropout"): CNN(10, MAPS, named=True),
    ("digits CNN", "with dropout"): CNN(10, MAPS, named=True, dropout=DROPOUT),
}
MEMORISED: Noise = ("symmetric", 0.4)
NOISES: tuple[Noise, ...] = (
    ("symmetric", 0.0), ("symmetric", 0.2), MEMORISED,
    ("asymmetric", 0.2), ("asymmetric", 0.4), ("instance", 0.4),
)  # fmt: skip
ASKED, HARM = 93.0, 0.3
COLUMNS = ("agreement", "base", "head", "repaired", "gain")


class Trained(NamedTuple):
    """A network, its noisy labels of training and validation rows, and its split."""

    model: nn.Module
    variables: Any
    train_y: np.ndarray
    val_y: np.ndarray
    split: Dataset


def trained(model: nn.Module, noise: Noise, splits: Sequence[Dataset]) -> Iterator[Trained]:
    """One network for each split."""
    noisy = [corrupt(noise, seed, split.parts[:2], 10) for seed, split in enumerate(splits)]
    keys = jax.vmap(jax.random.key)(jnp.arange(len(splits)))
    rows = jnp.stack([split.train_x for split in splits]), jnp.stack([train for train, _ in noisy])
    (snapshot,) = train_networks(keys, *rows, model=model, epochs=(EPOCHS,))
    for i, (split, labels) in enumerate(zip(splits, noisy, strict=True)):
        variables, (train_y, val_y) = jax.tree.map(lambda leaf, i=i: leaf[i], snapshot), labels
        yield Trained(model, variables, np.asarray(train_y), np.asarray(val_y), split)


def measure(cell: Cell, seed: int, network: Trained) -> Draw:
    """Repair one network: by its head alone, and wherever that is best."""
    model, variables, train_y, val_y, split = network
    found = lip_jax.repair(
        model, variables, split.train_x, train_y, validation=(split.val_x, val_y), head="head"
    )
    feats = [lip_jax.capture_features(model, variables, x, head="head") for x in (split.train_x, split.val_x)]
    head = lip_jax.apply(variables, feats[0], train_y, validation=(feats[1], val_y), head="head")
    said = lambda logits: np.asarray(jnp.argmax(logits, axis=1))
    base = said(model.apply(variables, split.test_x))
    after = said(found.apply(found.params, split.test_x))
    points = lambda given, labels: 100 * float((given == labels).mean())
    gain, error = paired(after == split.test_y, base == split.test_y)
    values = {
        "agreement": points(said(model.apply(variables, split.train_x)), train_y),
        "base": points(base, split.test_y),
        "head": points(said(model.apply(head, split.test_x)), split.test_y),
        "repaired": points(after, split.test_y),
        "gain": gain,
        "gain error": error,
    }
    report = found.report
    at = report.head.methods[int(report.head.chosen)] if report.chosen < 0 else report.methods[report.chosen]
    return Draw(cell, seed, values, f"{found.layer or 'head'}: {at.replace(', ', ' ')}")


def digits(_: str | None, seeds: int | None) -> Measured:
    """A section: every network with every noise."""
    splits = [load_digits(seed) for seed in range(seeds or SEEDS)]
    draws = []
    for (name, regime), noise in track([(key, noise) for key in NETWORKS for noise in NOISES], "digits"):
        cell = Cell(name, *noise, regime)
        networks = trained(NETWORKS[name, regime], noise, splits)
        draws += [measure(cell, seed, network) for seed, network in enumerate(networks)]
    return frame.as_json(frame.summarise(draws, derived))


def derived(values: frame.Values) -> dict[str, float]:
    """The error of the mean gain, and the worst gain of a draw."""
    error = float(np.sqrt((values["gain error"] ** 2).mean() / len(values["gain"])))
    return {"gain error": error, "worst": float(values["gain"].min())}


def verdicts(record: Record) -> list[Verdict]:
    """What repair is to reach where networks memorised, and that it does no harm."""
    rows = frame.summaries(record)
    memorised = [row for row in rows if (row.cell.noise, row.cell.rate) == MEMORISED]
    found = []
    if memorised:
        mean = float(np.mean([row.mean["repaired"] for row in memorised]))
        kinds = ", ".join(f"{row.cell.head} {row.mean['repaired']:.1f}" for row in memorised)
        claim = f"at 40% symmetric noise networks are {ASKED:.0f} right on average"
        found.append(Verdict(claim, mean >= ASKED, f"{mean:.1f} ({kinds})"))
    lost = lambda row: f"{row.mean['gain']:+.2f} ({row.chosen})"
    no_loss = lambda row: row.mean["gain"] >= -max(HARM, 2 * row.mean["gain error"])
    for name, held in (
        ("clean labels", [row for row in rows if row.cell.rate == 0]),
        ("wrong labels", [row for row in rows if row.cell.rate > 0]),
    ):
        cells, worst = {str(row.cell): row for row in held}, min(row.mean["worst"] for row in held)
        claim = f"{name}: no network loses more than {HARM} points or 2 standard errors"
        found.append(frame.judge(claim, cells, no_loss, lost, f"{{met}}; worst draw {worst:+.2f}"))
    return found


def tables(record: Record) -> dict[str, str]:
    """Every cell."""
    shown = lambda row: (row.cell.data, row.cell.regime, row.cell.labels, *map(row.at, COLUMNS[:-1]))
    gains = lambda row: (row.at("gain").difference, f"{row.mean['worst']:+.1f}", row.chosen)
    rows: list[Summary] = frame.summaries(record)
    return {"cells": frame.rows_of((*shown(row), *gains(row)) for row in rows)}


BENCHMARK = Benchmark("repair", {"digits": digits}, verdicts, tables)

if __name__ == "__main__":
    BENCHMARK.run()
