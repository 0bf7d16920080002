"""Accuracy of repaired heads under label noise, in every cell of data set, noise, regime and loss.

    python -m benchmarks.accuracy [digits|clinc150|elsewhere|cifar10n|partial|render] --data DIR

In each draw of a cell one head is trained on noisy labels, candidates are fitted and chosen with labels that
carry the same noise, and all are scored on clean test labels, which choose only the best in hindsight.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import lip_jax
from benchmarks import frame
from benchmarks.data import Noise, Part, corrupt, load_cifar10n, load_clinc150, load_partial
from benchmarks.frame import Benchmark, Cell, Draw, Record, Spread, Summary, Verdict, judge, paired
from benchmarks.heads import logits, train_head
from benchmarks.networks import CNN, MLP, digit_networks
from lip_jax import Calibrated, Head, Published, Purified, Ridge
from lip_jax.plot import COLORS
from lip_jax.sums.ridge import ridge_factors, ridge_solution


def noises(symmetric: Iterable[float], others: Iterable[float]) -> tuple[Noise, ...]:
    """Kinds and rates of noise."""
    kinds = {"symmetric": symmetric, "asymmetric": others, "instance": others}
    return tuple((kind, rate) for kind, rates in kinds.items() for rate in rates)


NOISES = noises((0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6), (0.2, 0.4))
# Where a regime or a loss is a variation of another.
FEWER_NOISES = noises((0.0, 0.2, 0.4, 0.6), (0.4,))
PLAIN, ROBUST_LOSSES = "cross-entropy", ("generalised cross-entropy", "label smoothing")
# How heads are trained on given features, and with which noises.
FROZEN = (
    ("well regularised", PLAIN, NOISES),
    ("lightly regularised", PLAIN, FEWER_NOISES),
    ("overfitted", PLAIN, NOISES),
    *(("overfitted", loss, FEWER_NOISES) for loss in ROBUST_LOSSES),
)
NETWORKS = (
    ("digits MLP", MLP(10), PLAIN, NOISES),
    *(("digits MLP", MLP(10), loss, FEWER_NOISES) for loss in ROBUST_LOSSES),
    ("digits CNN", CNN(10), PLAIN, NOISES),
)
PARTIAL_RIDGES = {"well regularised": 0.1, "lightly regularised": 0.001}  # λ/n

METHODS = {"published": Published(), "calibrated": Calibrated(), "ridge": Ridge(), "purified": Purified()}
ALL = tuple(METHODS.values())
# The choice with validation rows and without, and what each gains over the base.
CHOICES = {"choice": "gain", "default": "default gain"}
HARM = 0.3
PAPER = "CLINC150", "symmetric", "well regularised", PLAIN, ""
COLUMNS = ("base", "published at 3r/4", *METHODS, "default", "choice", "best")
HEADER = ("head", "labels", "base", "LIP ⌊3r/4⌋", "LIP selected", "calibrated selected", "ridge readout")
HEADER = (*HEADER, "purified readout", "**default**", "**choice**", "best in hindsight", "chosen")
GAINS = ("default gain", "gain", "regret")


class Problem(NamedTuple):
    """A trained head and the rows to fit on, to choose by, and to score on; test labels are clean ids."""

    head: Head
    fit: Part
    validation: Part
    test: Part


Task = tuple[Cell, int, Problem]


def clinc150(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Heads on sentence embeddings; the 3,000 validation rows carry the noise of the training rows."""
    train, val, test = load_clinc150(data).parts
    for regime, loss, noises in FROZEN:
        for noise in noises:
            for seed in seeds:
                train_y, val_y = corrupt(noise, seed, [train, val], 150)
                rows, validation = train._replace(y=train_y), val._replace(y=val_y)
                head = train_head(regime, loss, seed, rows, 150)
                yield Cell("CLINC150", *noise, regime, loss), seed, Problem(head, rows, validation, test)


def digits(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Networks on the digits; where a body memorised its rows, halves of the others fit and validate too."""
    del data  # comes with scikit-learn
    for name, model, loss, noises in NETWORKS:
        for noise in noises:
            for regime, seed, network in digit_networks(model, noise, seeds, loss):
                head, train, val, test, *_ = network
                cell, half = Cell(name, *noise, regime, loss), val.x.shape[0] // 2
                yield cell, seed, Problem(head, train, val, test)
                if regime == "memorised":
                    fit, rest = Part(val.x[:half], val.y[:half]), Part(val.x[half:], val.y[half:])
                    held_out = cell._replace(rows="fitted on held-out rows")
                    yield held_out, seed, Problem(head, fit, rest, test)


def cifar10n(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Human label errors: the head that came with the features, and heads trained on 45,000 of the rows.

    The body has seen all 50,000 rows with these labels. So has the given head, also the 5,000 that validate.
    """
    (x, y), test, given, _ = load_cifar10n(data)
    for seed in seeds:
        # Rows come ordered by class.
        order = np.random.default_rng(seed).permutation(len(y))
        rows, validation = (Part(x[part], y[part]) for part in np.split(order, [45000]))
        for regime, loss in (("given head", PLAIN), *(setting[:2] for setting in FROZEN)):
            head = given if regime == "given head" else train_head(regime, loss, seed, rows, 10)
            yield Cell("CIFAR-10N", "human", 0.402, regime, loss), seed, Problem(head, rows, validation, test)


def partial_labels(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Ridge heads on real candidate sets, split 60 / 20 / 20; the sets are the targets throughout."""
    for name in ("lost", "MSRCv2"):
        held = load_partial(name, data)
        n = held.feats.shape[0]
        targets = np.asarray(lip_jax.candidate_targets(held.candidates))
        false_share = round(1 - float(targets[np.arange(n), held.labels].mean()), 3)
        for seed in seeds:
            train, val, test = np.split(np.random.default_rng(seed).permutation(n), [3 * n // 5, 4 * n // 5])
            rows, validation = (Part(held.feats[part], targets[part]) for part in (train, val))
            factors = ridge_factors(rows.x, rows.y, None, targets.shape[1], intercept=True)
            for regime, share in PARTIAL_RIDGES.items():
                head = Head(*ridge_solution(factors, jnp.float32(share * len(train))))
                cell = Cell(name, "partial", false_share, regime, "squared error")
                yield cell, seed, Problem(head, rows, validation, Part(held.feats[test], held.labels[test]))


def elsewhere(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Heads that were not trained on the labels at hand: on the clean ones, or on other rows."""
    train, val, test = load_clinc150(data).parts
    for regime in ("well regularised", "overfitted"):
        for noise in (("symmetric", 0.4), ("asymmetric", 0.4)):
            for seed in seeds:
                train_y, val_y = corrupt(noise, seed, [train, val], 150)
                order = np.random.default_rng(seed).permutation(len(train_y))
                rows, validation = Part(train.x[order], train_y[order]), val._replace(y=val_y)
                half, true = len(order) // 2, np.asarray(train.y)[order]
                there, here = Part(rows.x[:half], rows.y[:half]), Part(rows.x[half:], rows.y[half:])
                cases = ("clean labels", Part(here.x, true[half:])), ("other rows", there)
                for trained, part in cases:
                    head = train_head(regime, PLAIN, seed, part, 150)
                    cell = Cell("CLINC150", *noise, f"{regime}, trained on {trained}")
                    yield cell, seed, Problem(head, here, validation, test)


def choose(problem: Problem, *, seen: bool) -> tuple[dict[str, Head], list[Head], str]:
    """The heads of the table's columns, every candidate, and which one the choice takes."""
    (kernel, bias), fit, validation, _ = problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        by_val = lip_jax.select(kernel, *fit, bias=bias, validation=validation, methods=ALL)
        default = lip_jax.select(kernel, *fit, bias=bias, seen=seen, methods=ALL)
    report = by_val.report
    heads = {
        "base": problem.head,
        "published at 3r/4": Head(lip_jax.refine(kernel, *fit, rank=3 * min(kernel.shape) // 4), bias),
        **dict(zip(METHODS, by_val.candidates[1:], strict=False)),
        "choice": Head(by_val.kernel, by_val.bias),
        "default": Head(default.kernel, default.bias),
    }
    return heads, list(by_val.candidates), report.methods[int(report.chosen)]


@jax.jit
def score(heads: list[Head], test: Part) -> tuple[jax.Array, jax.Array]:
    """Of each head: which test rows it gets right `(h, n)`, and its log-loss `(h,)`."""

    def one(head):
        said = logits(head, test.x)
        return jnp.argmax(said, axis=1) == test.y, lip_jax.head_metrics(said, test.y).log_loss

    return jax.lax.map(one, jax.tree.map(lambda *leaves: jnp.stack(leaves), *heads))


def measure(task: Task) -> Draw:
    """One draw of a cell, in points of test accuracy."""
    cell, seed, problem = task
    heads, candidates, method = choose(problem, seen=cell.rows == "")
    hits, losses = map(
        np.asarray, score([*heads.values(), *candidates], Part(*map(jnp.asarray, problem.test)))
    )
    right, log_loss = dict(zip(heads, hits, strict=False)), dict(zip(heads, losses, strict=False))
    values = {name: 100 * float(row.mean()) for name, row in right.items()}
    best = max(hits[len(heads) :], key=np.mean)
    values["best"] = 100 * float(best.mean())
    pairs = {"gain": (right["choice"], right["base"]), "regret": (best, right["choice"])}
    pairs |= {"default gain": (right["default"], right["base"])}
    for name, (better, worse) in pairs.items():
        values[name], values[f"{name} error"] = paired(better, worse)
    values["published gain"] = values["published"] - values["base"]
    values |= {f"log-loss {name}": float(log_loss[name]) for name in ("base", *CHOICES)}
    return Draw(cell, seed, values, method)


def derived(values: frame.Values) -> dict[str, float]:
    """Errors of the mean paired differences, as if draws were independent, worst draws, and harmful ones."""
    rms = lambda found: float(np.sqrt((found**2).mean() / len(found)))
    found = {f"{name} error": rms(values[f"{name} error"]) for name in ("regret", *CHOICES.values())}
    for name in CHOICES.values():
        harmed = values[name] < -np.maximum(HARM, HARM + 2 * values[f"{name} error"])
        found |= {f"worst {name}": float(values[name].min()), f"harmed {name}": float(harmed.sum())}
    return found


def mean_gain(rows: list[Summary], name: str) -> Spread:
    """Mean over the cells, and its standard error from the spread over seeds within cells."""
    variance = sum(row.std[name] ** 2 / row.draws for row in rows)
    return Spread(float(np.mean([row.mean[name] for row in rows])), 0.0, float(np.sqrt(variance)) / len(rows))


def verdicts(record: Record) -> list[Verdict]:
    """Every claim the cells at hand can judge."""
    rows = cells_of(record)
    paper = [row for row in rows if row.cell[:2] + row.cell[3:] == PAPER]
    found = [verdict for name in CHOICES for verdict in of_harm(rows, name)]
    return found + of_regret(rows) + ([of_paper(paper)] if paper else [])


def of_harm(rows: list[Summary], name: str) -> list[Verdict]:
    """The choice, with or without validation rows, against the base: by cells, by draws, by log-loss."""
    cells, gain_of = {str(row.cell): row for row in rows}, CHOICES[name]
    gain = lambda row: row.mean[gain_of]
    may_lose = lambda row: max(HARM, 2 * row.mean[f"{gain_of} error"])
    ratio = lambda row: row.mean[f"log-loss {name}"] / row.mean["log-loss base"]
    lost = lambda row: f"{gain(row):+.2f}, allowed {-may_lose(row):.2f} ({row.chosen})"
    worst, risky = min(rows, key=gain), max(rows, key=ratio)
    harmed, draws = sum(row.mean[f"harmed {gain_of}"] for row in rows), sum(row.draws for row in rows)
    least = min(row.mean[f"worst {gain_of}"] for row in rows)
    figure = f"{frame.share_of(int(harmed), draws, 'draws')}; worst draw {least:+.2f}"
    no_worse = f"{{met}}; lowest gain {gain(worst):+.2f} ({worst.cell})"
    sure = f"{{met}}; highest ratio {ratio(risky):.3f} ({risky.cell})"
    unsure = lambda row: f"ratio {ratio(row):.3f} ({row.chosen})"
    claim = f"{name} no worse than base by more than {HARM} points or 2 standard errors"
    return [
        judge(claim, cells, lambda row: gain(row) >= -may_lose(row), lost, no_worse),
        Verdict(f"{name} harms no more than 1% of draws", harmed <= 0.01 * draws, figure),
        judge(f"{name}: log-loss no more than 2% worse", cells, lambda row: ratio(row) <= 1.02, unsure, sure),
    ]


def of_regret(rows: list[Summary]) -> list[Verdict]:
    """The choice against the best candidate in hindsight, and the default against the choice."""
    frozen = [row for row in rows if row.cell.data in ("CLINC150", "CIFAR-10N")]
    trained = [row for row in rows if row.cell.data.startswith("digits")]
    found = []
    for claim, held, limit in (("frozen features", frozen, 0.4), ("digits networks", trained, 4.5)):
        if held:
            regret = mean_gain(held, "regret").mean
            claim = f"choice on {claim}: mean regret at most {limit} points"
            found.append(Verdict(claim, regret <= limit, f"{regret:.2f} over {len(held)} cells"))
    cells = {str(row.cell): row for row in frozen}
    show = lambda row: f"{row.mean['regret']:.2f} below the best ({row.chosen})"
    near = judge(
        "choice on frozen features: within 1 point of the best candidate in 90% of cells",
        cells, lambda row: row.mean["regret"] <= 1, show, tolerated=0.1,
    )  # fmt: skip
    return [*found, near, of_default(frozen)] if frozen else found


def of_default(rows: list[Summary]) -> Verdict:
    """What the rows of training alone show, of what held-out ones do."""
    own = [row for row in rows if "trained on" not in row.cell.training]
    default, choice = (mean_gain(own, CHOICES[name]).mean for name in ("default", "choice"))
    figure = f"{default:+.2f} and {choice:+.2f} points over {len(own)} cells ({default / choice:.0%})"
    return Verdict("default on frozen features: 80% of the gain of choice", default >= 0.8 * choice, figure)


def of_paper(rows: list[Summary]) -> Verdict:
    """The paper's claim, on the heads it is most likely to hold for."""
    gain, gains = mean_gain(rows, "published gain"), {str(r.cell): r.mean["published gain"] for r in rows}
    missed = [f"{cell}: {gain:+.2f}" for cell, gain in gains.items() if gain < 0]
    figure = f"mean gain over {len(rows)} rates {gain.mean:+.3f} ± {gain.error:.3f} points"
    return Verdict("published LIP gains on well-regularised CLINC150 heads", gain.above, figure, missed)


def cells_of(record: Record) -> list[Summary]:
    """Of all sets, in alphabetical order."""
    return frame.summaries(record, sorted(record))


def tables(record: Record) -> dict[str, str]:
    """Gains by way of training, and every cell."""
    rows, lines, parts = cells_of(record), [], []
    for key, held in frame.grouped(rows, lambda row: (row.cell.data, row.cell.training)).items():
        gains = (mean_gain(held, name) for name in GAINS)
        lines.append((*key, len(held), *(f"{gain.mean:+.2f} ± {gain.error:.2f}" for gain in gains)))
    for data, held in frame.grouped(rows, lambda row: row.cell.data).items():
        found = [(row.cell.training, row.cell.labels, *map(row.at, COLUMNS), row.chosen) for row in held]
        parts += [f"## {data}", frame.table(HEADER, found)]
    return {"gains": frame.rows_of(lines), "cells": "\n\n".join(parts)}


# Gains over the base that are drawn.
STYLES = {
    "published at 3r/4": ("LIP ⌊3r/4⌋", COLORS[1], "x", 22.0),
    "best": ("best in hindsight", COLORS[4], "D", 26.0),
    "default": ("default, no other rows", COLORS[2], "s", 12.0),
    "choice": ("choice by validation rows", COLORS[0], "o", 14.0),
}


def draw(record: Record) -> Figure:
    """How far LIP, the choice and the best method are from the base, small data sets together."""
    rows = cells_of(record)
    size = {data: len(held) for data, held in frame.grouped(rows, lambda row: row.cell.data).items()}
    groups = frame.grouped(rows, lambda row: row.cell.data if size[row.cell.data] >= 10 else "others")
    figure = Figure(layout="constrained", dpi=75)
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    gain, drawn = lambda row, name: row.lead(name, "base"), []
    ticks = [-30, -10, -3, -1, 0, 1, 3, 10, 30]
    for ax, (name, held) in zip(axes, groups.items(), strict=True):
        drawn.append(frame.draw_cells(ax, held, STYLES, gain, ("choice", "best")))
        ax.axvline(0, color="0.4", linewidth=0.8)
        ax.set_xscale("symlog", linthresh=1, linscale=0.6)
        ax.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("gain over the base, points of test accuracy", fontsize=8)
    for ax in axes:
        ax.set(xlim=(-60, 90), ylim=(max(drawn) - 0.4, -0.6))
    figure.set_size_inches(4.6 * len(groups), 1.5 + 0.17 * max(drawn))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    return figure


SETS = {"digits": digits, "clinc150": clinc150, "elsewhere": elsewhere}
SETS |= {"cifar10n": cifar10n, "partial": partial_labels}
SEEDS = {"digits": 6, "clinc150": 2, "elsewhere": 2, "cifar10n": 3, "partial": 10}
SECTIONS = {name: frame.section(name, SETS[name], SEEDS[name], measure, derived) for name in SETS}
BENCHMARK = Benchmark("accuracy", SECTIONS, verdicts, tables, draw)

if __name__ == "__main__":
    BENCHMARK.run()
