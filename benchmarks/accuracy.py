"""Accuracy of repaired heads under label noise, in every cell of data set, noise, regime and loss.

    python -m benchmarks.accuracy [digits|clinc150|cifar10n|partial|render] --data DIR

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
from lip_jax import Calibrated, Choice, Head, Published, Purified, Ridge
from lip_jax.numerics.linalg import logits_of
from lip_jax.plot import COLORS
from lip_jax.rows.metrics import correct
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
ALL, LIP = tuple(METHODS.values()), (Published(), Calibrated())
READOUTS = ("ridge", "purified")
COLUMNS = ("base", "published at 3r/4", *METHODS, "choice", "best")
HEADER = ("head", "labels", "base", "LIP ⌊3r/4⌋", "LIP selected", "calibrated selected", "ridge readout")
HEADER = (*HEADER, "purified readout", "**choice**", "best in hindsight", "chosen")
GAINS = ("gain", "LIP gain", "default gain")


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


def default_head(problem: Problem) -> Head:
    """What `lip_jax.apply` makes of the head without any validation rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the head agrees with these labels", UserWarning)
        params = {"head": problem.head._asdict()}
        return Head(**lip_jax.apply(params, *problem.fit, head="head", method=Choice(ALL))["head"])


def choose(problem: Problem) -> tuple[dict[str, Head], str]:
    """Every head of the table's columns, and the method of the automatic choice."""
    (kernel, bias), fit, validation, _ = problem
    chosen = lip_jax.select(kernel, *fit, bias=bias, validation=validation, methods=ALL)
    report, lip = chosen.report, chosen
    if report.methods[int(report.winner)] in READOUTS:
        # Otherwise no readout was in the way, and LIP alone comes to much the same.
        lip = lip_jax.select(kernel, *fit, bias=bias, validation=validation, methods=LIP)
    heads = {
        "base": problem.head,
        "published at 3r/4": Head(lip_jax.refine(kernel, *fit, rank=3 * min(kernel.shape) // 4), bias),
        **dict(zip(report.methods[1:], chosen.candidates[1:], strict=True)),
        "choice": Head(chosen.kernel, chosen.bias),
        "LIP choice": Head(lip.kernel, lip.bias),
        "default": default_head(problem),
    }
    return heads, report.methods[int(report.chosen)]


@jax.jit
def score(heads: list[Head], test: Part) -> tuple[jax.Array, jax.Array]:
    """Of each head: which test rows it gets right `(h, n)`, and its log-loss `(h,)`."""

    def one(head):
        said = logits(head, test.x)
        return jnp.argmax(said, axis=1) == test.y, lip_jax.head_metrics(said, test.y).log_loss

    return jax.lax.map(one, jax.tree.map(lambda *leaves: jnp.stack(leaves), *heads))


def can_be_shown(head: Head, problem: Problem) -> bool:
    """Whether a head beats the base by 3 standard errors on all validation rows, also those that chose it.

    A rule that asks for as much and tests on fewer rows takes the head less often, but for luck.
    """
    x, y = map(jnp.asarray, problem.validation)
    gain = np.asarray(correct(logits_of(x, *head), y)) - np.asarray(correct(logits_of(x, *problem.head), y))
    # As in `lip_jax.select`, with one disagreement more than there were.
    return bool(gain.sum() > 3 * np.sqrt(((gain - gain.mean()) ** 2).sum() + 1))


def measure(task: Task) -> Draw:
    """One draw of a cell, in points of test accuracy."""
    cell, seed, problem = task
    heads, method = choose(problem)
    hits, losses = score(list(heads.values()), Part(*map(jnp.asarray, problem.test)))
    right, log_loss = (dict(zip(heads, np.asarray(part), strict=True)) for part in (hits, losses))
    values = {name: 100 * float(row.mean()) for name, row in right.items()}
    best = max(("base", *METHODS), key=lambda name: values[name])
    for name, better, worse in (("gain", "choice", "base"), ("regret", best, "choice")):
        values[name], values[f"{name} error"] = paired(right[better], right[worse])
    shown = best == "base" or can_be_shown(heads[best], problem)
    values |= {"best": values[best], "least regret": 0.0 if shown else values[best] - values["base"]}
    for name, of in (("published", "published"), ("LIP", "LIP choice"), ("default", "default")):
        values[f"{name} gain"] = values[of] - values["base"]
    values |= {f"log-loss {name}": float(log_loss[name]) for name in ("base", "choice")}
    return Draw(cell, seed, values, method)


def derived(values: frame.Values) -> dict[str, float]:
    """Errors of the mean paired differences, as if draws were independent, and the worst draws."""
    rms = lambda found: float(np.sqrt((found**2).mean() / len(found)))
    errors = {name: rms(values[name]) for name in ("gain error", "regret error")}
    return errors | {f"worst {name}": float(values[name].min()) for name in ("gain", "default gain")}


def mean_gain(rows: list[Summary], name: str) -> Spread:
    """Mean over the cells, and its standard error from the spread over seeds within cells."""
    variance = sum(row.std[name] ** 2 / row.draws for row in rows)
    return Spread(float(np.mean([row.mean[name] for row in rows])), 0.0, float(np.sqrt(variance)) / len(rows))


def verdicts(record: Record) -> list[Verdict]:
    """Every claim the cells at hand can judge."""
    rows = cells_of(record)
    clinc = [row for row in rows if row.cell.data == "CLINC150"]
    memorised = [row for row in rows if row.cell.regime == "memorised"]
    paper = [row for row in clinc if row.cell[1::2] == ("symmetric", "well regularised", "")]
    never = (memorised, "memorised networks"), (clinc, "CLINC150")
    found = of_choice(rows) + [of_default(*part) for part in never if part[0]]
    return found + [of_paper(paper)] * bool(paper)


def of_choice(rows: list[Summary]) -> list[Verdict]:
    """The choice against the base, and in 90% of the cells against the best method."""
    cells = {str(row.cell): row for row in rows}
    gain, regret = (lambda row, name=name: row.mean[name] for name in ("gain", "regret"))
    may_lose = lambda row: max(0.3, 2 * row.mean["gain error"])
    may_miss = lambda row: max(1.0, 2 * row.mean["regret error"])
    ratio = lambda row: row.mean["log-loss choice"] / row.mean["log-loss base"]
    known = sum(row.mean["least regret"] <= may_miss(row) for row in rows)
    worst, risky = min(rows, key=gain), max(rows, key=ratio)
    lost = lambda row: f"{gain(row):+.2f}, allowed {-may_lose(row):.2f} ({row.chosen})"
    far = lambda row: f"{regret(row):.2f} below the best, allowed {may_miss(row):.2f} ({row.chosen})"
    unsure = lambda row: f"ratio {ratio(row):.4f} ({row.chosen})"
    no_worse = f"{{met}}; lowest gain {gain(worst):+.2f} ({worst.cell})"
    near = f"{{met}}; {frame.share_of(known, len(rows))} if the best method were known and only had to "
    near += "beat the base by 3 standard errors on all validation rows"
    sure = f"{{met}}; highest ratio {ratio(risky):.4f} ({risky.cell})"
    return [
        judge("choice no worse than base", cells, lambda row: gain(row) >= -may_lose(row), lost, no_worse),
        judge(
            "choice near best method in hindsight",
            cells,
            lambda row: regret(row) <= may_miss(row),
            far,
            near,
            0.1,
        ),
        judge("log-loss no more than 2% worse", cells, lambda row: ratio(row) <= 1.02, unsure, sure),
    ]


def of_default(rows: list[Summary], where: str) -> Verdict:
    """`lip_jax.apply` without validation loses in no single draw."""
    worst = lambda row: row.mean["worst default gain"]
    show = lambda row: f"worst draw {worst(row):+.2f}, mean {row.mean['default gain']:+.2f}"
    figure = f"{{met}}, {sum(row.draws for row in rows)} draws; worst draw {min(map(worst, rows)):+.2f}; "
    figure += f"mean gain {mean_gain(rows, 'default gain').mean:+.2f}"
    cells = {str(row.cell): row for row in rows}
    return judge(f"default never loses on {where}", cells, lambda row: worst(row) >= 0, show, figure)


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
    "choice": ("choice", COLORS[0], "o", 14.0),
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


SETS = {"digits": digits, "clinc150": clinc150, "cifar10n": cifar10n, "partial": partial_labels}
SEEDS = {"digits": 10, "clinc150": 3, "cifar10n": 3, "partial": 10}
SECTIONS = {name: frame.section(name, SETS[name], SEEDS[name], measure, derived) for name in SETS}
BENCHMARK = Benchmark("accuracy", SECTIONS, verdicts, tables, draw)

if __name__ == "__main__":
    BENCHMARK.run()
