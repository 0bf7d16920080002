"""What each layer of a network trained on noisy labels knows: its predictive power [li2020].

    python -m benchmarks.predictive_power [digits|graphs|render]

A linear readout of ten clean labels a class is fitted to the features of every layer, of rows that the
network has not seen, and judged on clean test labels beside the network and a readout of the raw inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track

import lip_jax
from benchmarks import frame
from benchmarks.data import Noise, Part, corrupt, load_digits
from benchmarks.frame import Benchmark, Cell, Draw, Measured, Record, Summary, Values, Verdict, spread
from benchmarks.graphs import DEGREES, GraphNet, Pooling, load_graphs
from benchmarks.networks import CNN, MLP, train_networks

SEEDS = 5
# Classes of graphs are in an order, which indicators regressed on one number cannot tell: ridge masks the
# middle ones. So claims are judged by the other solver.
SOLVERS, JUDGED = ("ridge", "logistic"), "logistic"
PER_CLASS = 10
GRAPH_SIZES = (2400, PER_CLASS * DEGREES, 1200)
REGIMES = ("stopped early", "trained long")
SYMMETRIC: tuple[Noise, ...] = tuple(("symmetric", rate) for rate in (0.0, 0.2, 0.4, 0.6))


class Network(NamedTuple):
    """A model, the layer that takes in each of its features, and which of these are the representation."""

    model: nn.Module
    layers: dict[str, str]
    represented: str


WIDTHS, MAPS = (256, 128, 64), ((8, 2), (16, 1), (32, 2))
MLP_LAYERS = {"hidden 1": "hidden_2", "hidden 2": "hidden_3", "hidden 3": "head"}
CNN_LAYERS = {f"convolution {i}": f"convolution_{i + 1}" for i in (1, 2)}
CNN_LAYERS |= {"convolution 3": "dense", "hidden": "head"}
POOLINGS: tuple[tuple[Pooling, Pooling], ...] = (
    ("sum", "max"),
    ("sum", "sum"),
    ("max", "max"),
    ("max", "sum"),
)
SUITED, UNSUITED = "sum, then max", ("max, then max", "max, then sum", "MLP on the matrix")


class Split(NamedTuple):
    """Rows that train the network, few clean ones for the readout, and clean test rows."""

    train: Part
    clean: Part
    test: Part


def digits_split(seed: int) -> Split:
    """Digits; the clean rows are validation rows."""
    train, val, test = load_digits(seed).parts
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(val.y == y))[:PER_CLASS] for y in range(10)]
    # The logistic readout holds out a fifth of the rows to choose its strength.
    clean = rng.permutation(np.concatenate(rows))
    return Split(train, Part(val.x[clean], val.y[clean]), test)


def graphs_split(seed: int, sizes: Sequence[int] = GRAPH_SIZES) -> Split:
    """Graphs, as many of each maximum degree."""
    return Split(*(Part(*graphs) for graphs in load_graphs(seed, sizes)))


class Task(NamedTuple):
    """Networks, noises, classes, and epochs by regime."""

    name: str
    split: Callable[[int], Split]
    networks: dict[str, Network]
    noises: tuple[Noise, ...]
    num_classes: int
    epochs: tuple[int, ...]


DIGIT_NETWORKS = {
    "MLP": Network(MLP(10, WIDTHS, named=True), MLP_LAYERS, "hidden 2"),
    "CNN": Network(CNN(10, MAPS, named=True), CNN_LAYERS, "convolution 3"),
}
DIGITS = Task("digits", digits_split, DIGIT_NETWORKS, (*SYMMETRIC, ("asymmetric", 0.4)), 10, (10, 100))
GRAPH_LAYERS = {"readout": "dense", "hidden": "head"}
GRAPH_NETWORKS = {
    f"{a}, then {b}": Network(GraphNet(DEGREES, a, b), GRAPH_LAYERS, "readout") for a, b in POOLINGS
}
GRAPH_NETWORKS[UNSUITED[-1]] = Network(MLP(DEGREES, WIDTHS, named=True), MLP_LAYERS, "hidden 2")
GRAPHS = Task("graphs", graphs_split, GRAPH_NETWORKS, SYMMETRIC, DEGREES, (20, 60))
NETWORKS = {
    f"{task.name}, {name}": network for task in (DIGITS, GRAPHS) for name, network in task.networks.items()
}
# What is drawn.
SHOWN = ("digits, MLP", "digits, CNN", f"graphs, {SUITED}", f"graphs, {UNSUITED[-1]}")


@partial(jax.jit, static_argnames=("model", "modules"))
def forward(model: nn.Module, modules: tuple[str, ...], variables: Any, inputs: jax.Array):
    """The inputs of each of the named layers, and the class the network says."""
    feats = [lip_jax.capture_features(model, variables, inputs, head=module) for module in modules]
    return feats, jnp.argmax(jnp.asarray(model.apply(variables, inputs)), axis=1)


def powers(network: Network, variables: Any, split: Split, num_classes: int) -> dict[str, float]:
    """The predictive power of each layer by solver, and the network's own test accuracy."""
    run = partial(forward, network.model, tuple(network.layers.values()), variables)
    (clean, _), (test, said) = run(split.clean.x), run(split.test.x)
    layers = {"input": split.clean.x, **dict(zip(network.layers, clean, strict=True))}
    tested = {"input": split.test.x, **dict(zip(network.layers, test, strict=True))}
    values = {"network": 100 * float((said == split.test.y).mean())}
    for solver in SOLVERS:
        options = {"num_classes": num_classes, "solver": solver}
        found = lip_jax.predictive_power(layers, split.clean.y, tested, split.test.y, **options)
        values |= {
            f"{at}, {solver}": 100 * float(x) for at, x in zip(found.layers, found.accuracy, strict=True)
        }
    return values


def measure(task: Task, name: str, noise: Noise, splits: Sequence[Split]) -> Iterator[Draw]:
    """Train one network a split on its noisy labels; what it knows after each number of epochs."""
    network, l = task.networks[name], task.num_classes
    keys = jax.vmap(jax.random.key)(jnp.arange(len(splits)))
    train_x = jnp.stack([split.train.x for split in splits])
    train_y = jnp.stack([corrupt(noise, seed, [split.train], l)[0] for seed, split in enumerate(splits)])
    snapshots = train_networks(keys, train_x, train_y, model=network.model, epochs=task.epochs)
    for regime, params in zip(REGIMES, snapshots, strict=True):
        for seed, split in enumerate(splits):
            variables = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
            _, said = forward(network.model, (), variables, train_x[seed])
            fit = {"training fit": 100 * float((said == train_y[seed]).mean())}
            cell = Cell(f"{task.name}, {name}", *noise, regime)
            yield Draw(cell, seed, powers(network, variables, split, l) | fit)


def measured(task: Task, _: str | None, seeds: int | None) -> Measured:
    """A section: every network with every noise."""
    splits = [task.split(seed) for seed in range(seeds or SEEDS)]
    settings = [(name, noise) for name in task.networks for noise in task.noises]
    draws = [draw for setting in track(settings, task.name) for draw in measure(task, *setting, splits)]
    cells = frame.as_json(frame.summarise(draws, gain_errors))
    return cells | {"verdicts": [item._asdict() for item in judge(draws)]}


def gain_errors(values: Values) -> dict[str, float]:
    """Of the gain of each readout over the network, paired by seed."""
    return {
        f"{name} gain error": spread(held - values["network"]).error
        for name, held in values.items()
        if name.endswith(SOLVERS)
    }


def judge(draws: Iterable[Draw]) -> list[Verdict]:
    """The paper's claims, and one that its title makes, as far as the draws of one task can judge them."""
    held: dict[Cell, Values] = {
        cell: {name: np.array([draw.values[name] for draw in group]) for name in group[0].values}
        for cell, group in frame.grouped(draws, lambda draw: draw.cell).items()
    }
    found: list[Verdict] = []
    name_of = lambda cell: cell.data.split(", ", 1)[1]
    power = lambda cell, layer: held[cell][f"{layer}, {JUDGED}"]
    known = lambda cell: power(cell, NETWORKS[cell.data].represented)
    suited = lambda cell: cell._replace(data=f"graphs, {SUITED}")

    def lost(cell: Cell, layer: str | None = None) -> np.ndarray:
        """What noise took from a layer, or from the representation."""
        layer = layer or NETWORKS[cell.data].represented
        return power(cell._replace(noise="symmetric", rate=0.0), layer) - power(cell, layer)

    def claim(title: str, cells: list[Cell], gain: Callable, name: Callable = lambda cell: cell.labels):
        """One verdict for each network and regime, or for whatever the title tells apart."""
        for claimed, group in frame.grouped(cells, lambda cell: title.format(cell=cell)).items():
            gains = {name(cell): spread(gain(cell)) for cell in group}
            found.append(frame.judge_gain(claimed, gains))

    noisy = [cell for cell in held if cell.rate > 0]
    able = [cell for cell in noisy if name_of(cell) not in UNSUITED]
    where = "{cell.data}, {cell.regime}: "
    title = where + "the readout of the representation beats the network"
    claim(title, able, lambda cell: known(cell) - held[cell]["network"])
    title = where + "the representation beats the raw input"
    claim(title, able, lambda cell: known(cell) - power(cell, "input"))

    named = lambda cell: f"{name_of(cell)}, {cell.labels}"
    others = [cell for cell in noisy if name_of(cell) in UNSUITED and suited(cell) in held]
    title = "graphs, {cell.regime}: unsuited networks have less predictive power"
    claim(title, others, lambda cell: known(suited(cell)) - known(cell), named)
    title = "graphs, {cell.regime}: noise takes more from unsuited than from suited"
    claim(title, others, lambda cell: lost(cell) - lost(suited(cell)), named)

    memorises = lambda cell: cell.data.startswith("digits") or name_of(cell) == UNSUITED[-1]
    spoiled = [cell for cell in noisy if memorises(cell) and cell.regime == REGIMES[1]]
    ends = lambda cell: [lost(cell, list(NETWORKS[cell.data].layers)[i]) for i in (-1, 0)]
    title = where + "noise takes more from the last hidden layer than from the first"
    claim(title, spoiled, lambda cell: np.subtract(*ends(cell)))
    return found


def verdicts(record: Record) -> list[Verdict]:
    """What was judged seed by seed when it was measured."""
    return [Verdict(**item) for held in record.values() for item in held["verdicts"]]


def tables(record: Record) -> dict[str, str]:
    """Every network."""
    parts = []
    for data, rows in frame.grouped(frame.summaries(record), lambda row: row.cell.data).items():
        _, layers, best = NETWORKS[data]
        names, last = ["input", *layers], [f"{best}, ridge", "network", "training fit"]
        header = ["training", "labels", *(f"**{at}**" if at == best else at for at in names), *last]
        figures = [*(f"{at}, {JUDGED}" for at in names), *last]
        found = [(row.cell.training, row.cell.labels, *map(row.at, figures)) for row in rows]
        parts += [f"## {data.replace(', ', ': ', 1)}", frame.table(header, found)]
    return {"networks": "\n\n".join(parts)}


def draw_layers(rows: Sequence[Summary], ax: Axes) -> None:
    """Predictive power along the layers, one line a noise, and the network itself at the end."""
    _, layers, best = NETWORKS[rows[0].cell.data]
    names, end = ["input", *layers], len(layers) + 1
    hollow: dict[str, Any] = {"markerfacecolor": "white", "linestyle": ":", "linewidth": 1}
    for i, row in enumerate(rows):
        known, own = [row.at(f"{at}, {JUDGED}") for at in names], row.at("network")
        frame.error_bars(ax, range(end), known, i, label=row.cell.labels)
        frame.error_bars(ax, [end - 1, end], [known[-1]._replace(std=0.0), own], i, **hollow)
    ticks = [at.replace("convolution", "conv.") + ("\n(repr.)" if at == best else "") for at in names]
    ax.set_xticks(range(end + 1), [*ticks, "network"])
    ax.grid(axis="y", color="0.92")
    ax.tick_params(labelsize=8)


def draw(record: Record) -> Figure:
    """Layer by layer, the networks of digits and two of graphs; regimes side by side."""
    by_network = frame.grouped(frame.summaries(record), lambda row: row.cell.data)
    panels = {name: rows for name, rows in by_network.items() if name in SHOWN}
    figure = Figure(figsize=(12, 3.5 * len(panels)), layout="constrained", dpi=90)
    axes = figure.subplots(len(panels), len(REGIMES), sharey="row", squeeze=False)
    for line, (name, held) in zip(axes, panels.items(), strict=True):
        by_regime = frame.grouped(held, lambda row: row.cell.regime)
        for ax, (regime, rows) in zip(line, by_regime.items(), strict=True):
            draw_layers(rows, ax)
            ax.set_title(f"{name.replace(', ', ': ', 1)}, {regime}", fontsize=10)
        line[0].set_ylabel("test accuracy, %", fontsize=9)
        line[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), edgecolor="none")
    return figure


SECTIONS = {task.name: partial(measured, task) for task in (DIGITS, GRAPHS)}
BENCHMARK = Benchmark("predictive_power", SECTIONS, verdicts, tables, draw)

if __name__ == "__main__":
    BENCHMARK.run()
