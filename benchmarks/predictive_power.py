"""What each layer of a network trained on noisy labels knows: its predictive power [li2020].

    python -m benchmarks.predictive_power

A linear readout of ten clean labels a class is fitted to the features of every layer, of rows that the
network has not seen, and judged on clean test labels beside the network itself and beside a readout of the
raw inputs. The representation is the input of the last two dense layers, as in the paper, which replaces the
final dense layers. It, the noises and what the claims are judged by were fixed before any table; the CNN and
the training of graph networks were cut for speed after a trial with one seed.

- Digits: an MLP and a CNN.
- Graphs: the maximum degree, as class ids where the paper has a regression. A network that suits the task
  sums over neighbours and takes the maximum over nodes; sum and sum is in between. Beside symmetric noise
  there is one that tells the class of the largest node feature, which suits maxima.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

import lip_jax
from benchmarks.accuracy import Noise, Part, corrupt
from benchmarks.data import load_digits
from benchmarks.graphs import DEGREES, GraphNet, Pooling, load_graphs, max_feature_class
from benchmarks.networks import train_networks
from benchmarks.record import machine, write_json
from benchmarks.tables import Spread, Verdict, judge, print_verdicts, spread, table, verdict_lines, write_csv
from lip_jax.methods.readout import Solver
from lip_jax.plot import COLORS, MARKERS

COMMAND = "python -m benchmarks.predictive_power"
SEEDS = 5
SOLVERS: tuple[Solver, ...] = get_args(Solver)
# Classes of graphs are in an order, which indicators regressed on one number cannot tell: ridge masks the
# middle ones. So claims are judged by the other solver.
JUDGED: Solver = "logistic"
PER_CLASS = 10
GRAPH_SIZES = (2400, PER_CLASS * DEGREES, 1200)
EPOCHS = {"digits": (10, 100), "graphs": (20, 60)}
REGIMES = ("stopped early", "trained long")
PLAIN, ROBUST = "cross-entropy", "label smoothing"
# A network keeps its predictive power where noise takes no more points than this.
KEPT = 5.0

DIGITS_NOISES: tuple[Noise, ...] = (
    *(("symmetric", rate) for rate in (0.0, 0.2, 0.4, 0.6)),
    ("asymmetric", 0.4),
)
GRAPHS_NOISES: tuple[Noise, ...] = (
    *(("symmetric", rate) for rate in (0.0, 0.2, 0.4, 0.6)),
    *(("node-feature", rate) for rate in (0.4, 0.6)),
)


class MLP(nn.Module):
    """Three hidden layers on flattened inputs."""

    num_classes: int

    @nn.compact
    def __call__(self, inputs):  # noqa: D102
        feats = inputs.reshape(inputs.shape[0], -1)
        for i, width in enumerate((256, 128, 64), 1):
            feats = nn.relu(nn.Dense(width, name=f"hidden_{i}")(feats))
        return nn.Dense(self.num_classes, name="head")(feats)


class CNN(nn.Module):
    """Three convolutions on 8×8 images and two dense layers."""

    num_classes: int

    @nn.compact
    def __call__(self, inputs):  # noqa: D102
        maps = inputs.reshape(-1, 8, 8, 1)
        for i, (width, stride) in enumerate(((8, 2), (16, 1), (32, 2)), 1):
            maps = nn.relu(nn.Conv(width, (3, 3), strides=stride, name=f"convolution_{i}")(maps))
        hidden = nn.relu(nn.Dense(64, name="dense")(maps.reshape(maps.shape[0], -1)))
        return nn.Dense(self.num_classes, name="head")(hidden)


class Network(NamedTuple):
    """A network, the layer that takes in each of its features, and which of these are the representation."""

    name: str
    model: nn.Module
    layers: dict[str, str]
    represented: str


MLP_LAYERS = {"hidden 1": "hidden_2", "hidden 2": "hidden_3", "hidden 3": "head"}
CNN_LAYERS = {
    "convolution 1": "convolution_2",
    "convolution 2": "convolution_3",
    "convolution 3": "dense",
    "hidden": "head",
}
POOLINGS: tuple[tuple[Pooling, Pooling], ...] = (
    ("sum", "max"),
    ("sum", "sum"),
    ("max", "max"),
    ("max", "sum"),
)
SUITED = "sum, then max"
UNSUITED = ("max, then max", "max, then sum", "MLP on the matrix")
DIGITS_NETWORKS = (
    Network("MLP", MLP(10), MLP_LAYERS, "hidden 2"),
    Network("CNN", CNN(10), CNN_LAYERS, "convolution 3"),
)
GRAPHS_NETWORKS = (
    *(
        Network(
            f"{aggregate}, then {readout}",
            GraphNet(DEGREES, aggregate, readout),
            {"readout": "dense", "hidden": "head"},
            "readout",
        )
        for aggregate, readout in POOLINGS
    ),
    Network(UNSUITED[-1], MLP(DEGREES), MLP_LAYERS, "hidden 2"),
)


class Split(NamedTuple):
    """Rows that train the network, few clean ones for the readout, and clean test rows."""

    train: Part
    clean: Part
    test: Part


class Cell(NamedTuple):
    """What is repeated over seeds."""

    task: str
    network: str
    regime: str
    loss: str
    noise: str
    rate: float

    def __str__(self) -> str:
        return f"{self.task}, {self.training}, {self.labels}"

    @property
    def training(self) -> str:
        """Network, regime, and the loss where it is not the usual one."""
        return f"{self.network}, {self.regime}" + ("" if self.loss == PLAIN else f", {self.loss}")

    @property
    def labels(self) -> str:
        """The noise in words."""
        return f"{self.noise} {self.rate:.2g}" if self.rate > 0 else "clean"


class Measured(NamedTuple):
    """A cell in points for each of `s` seeds.

    `power` holds an array `(s, k)` for each solver, the predictive power of the `k` layers; `own` is the test
    accuracy of the network, `fit` how many of its noisy training labels it has learned.
    """

    cell: Cell
    layers: tuple[str, ...]
    widths: tuple[int, ...]
    represented: str
    power: dict[str, np.ndarray]
    own: np.ndarray
    fit: np.ndarray

    def at(self, layer: str, solver: str | None = None) -> np.ndarray:
        """The predictive power of a layer, `(s,)`; without a solver, by the one that judges."""
        return self.power[solver or JUDGED][:, self.layers.index(layer)]

    @property
    def representation(self) -> np.ndarray:
        """The predictive power of the representation, `(s,)`."""
        return self.at(self.represented)


def digits_split(seed: int) -> Split:
    """Digits; the clean rows are validation rows."""
    held = load_digits(seed)
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(held.val_y == y))[:PER_CLASS] for y in range(10)]
    # The logistic readout holds out a fifth of the rows to choose its strength.
    clean = rng.permutation(np.concatenate(rows))
    return Split(
        Part(held.train_x, held.train_y),
        Part(held.val_x[clean], held.val_y[clean]),
        Part(held.test_x, held.test_y),
    )


def graphs_split(seed: int, sizes: Sequence[int] = GRAPH_SIZES) -> Split:
    """Graphs, as many of each maximum degree."""
    return Split(*(Part(*graphs) for graphs in load_graphs(seed, sizes)))


def noisy_labels(noise: Noise, seed: int, rows: Part, num_classes: int) -> jax.Array:
    """Noisy class ids; with node-feature noise the share of wrong ones is a little below the rate."""
    kind, rate = noise
    if kind != "node-feature":
        return corrupt(noise, seed, [rows], num_classes)[0]
    replaced = jax.random.uniform(jax.random.key(seed), (len(rows.y),)) < rate
    return jnp.where(replaced, max_feature_class(rows.x, num_classes), rows.y)


@partial(jax.jit, static_argnames=("model", "modules"))
def forward(model: nn.Module, modules: tuple[str, ...], variables: Any, inputs: jax.Array):
    """The inputs of each of the named layers, and the class the network says."""
    feats = [lip_jax.capture_features(model, variables, inputs, head=module) for module in modules]
    logits = jnp.asarray(model.apply(variables, inputs))
    return feats, jnp.argmax(logits, axis=1)


def powers(network: Network, variables: Any, split: Split, num_classes: int) -> tuple[dict, float]:
    """`PredictivePower` by solver of one network, and its own test accuracy."""
    modules = tuple(network.layers.values())
    clean, _ = forward(network.model, modules, variables, split.clean.x)
    test, said = forward(network.model, modules, variables, split.test.x)
    layers, tested = (
        {"input": rows.x, **dict(zip(network.layers, feats, strict=True))}
        for rows, feats in ((split.clean, clean), (split.test, test))
    )
    found = {
        solver: lip_jax.predictive_power(
            layers, split.clean.y, tested, split.test.y, num_classes=num_classes, solver=solver
        )
        for solver in SOLVERS
    }
    return found, float((said == split.test.y).mean())


def measure(
    task: str,
    network: Network,
    noise: Noise,
    loss: str,
    splits: Sequence[Split],
    *,
    epochs: Sequence[int],
    num_classes: int,
) -> Iterator[Measured]:
    """Train one network a split on its noisy labels; what it knows after each number of epochs."""
    keys = jax.vmap(jax.random.key)(jnp.arange(len(splits)))
    train_x = jnp.stack([split.train.x for split in splits])
    train_y = jnp.stack(
        [noisy_labels(noise, seed, split.train, num_classes) for seed, split in enumerate(splits)]
    )
    snapshots = train_networks(
        keys, train_x, train_y, model=network.model, epochs=tuple(epochs), loss=loss, batch_size=50
    )
    for regime, params in zip(REGIMES, snapshots, strict=True):
        by_seed = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(len(splits))]
        results = [
            powers(network, variables, split, num_classes)
            for variables, split in zip(by_seed, splits, strict=True)
        ]
        fit = [
            float((forward(network.model, (), variables, x)[1] == y).mean())
            for variables, x, y in zip(by_seed, train_x, train_y, strict=True)
        ]
        first = results[0][0][JUDGED]
        yield Measured(
            Cell(task, network.name, regime, loss, *noise),
            first.layers,
            tuple(first.width.tolist()),
            network.represented,
            {s: 100 * np.array([found[s].accuracy for found, _ in results]) for s in SOLVERS},
            100 * np.array([own for _, own in results]),
            100 * np.array(fit),
        )


Setting = tuple[Network, Noise, str]


def settings(networks: Iterable[Network], noises: Sequence[Noise], robust: Sequence[str]) -> list[Setting]:
    """Every network with every noise, and robust training of some where there is noise."""
    networks = list(networks)
    return [(network, noise, PLAIN) for network in networks for noise in noises] + [
        (network, noise, ROBUST)
        for network in networks
        if network.name in robust
        for noise in noises
        if noise[1] > 0 and noise[0] != "node-feature"
    ]


def digits(seeds: int) -> list[Measured]:
    """All cells of the digits."""
    splits = [digits_split(seed) for seed in range(seeds)]
    run = partial(measure, "digits", splits=splits, epochs=EPOCHS["digits"], num_classes=10)
    listed = settings(DIGITS_NETWORKS, DIGITS_NOISES, ("MLP", "CNN"))
    return [found for setting in track(listed, "digits") for found in run(*setting)]


def graphs(seeds: int) -> list[Measured]:
    """All cells of the graphs."""
    splits = [graphs_split(seed) for seed in range(seeds)]
    run = partial(measure, "graphs", splits=splits, epochs=EPOCHS["graphs"], num_classes=DEGREES)
    listed = settings(GRAPHS_NETWORKS, GRAPHS_NOISES, (SUITED, UNSUITED[-1]))
    return [found for setting in track(listed, "graphs") for found in run(*setting)]


Table = Mapping[Cell, Measured]


def _groups(held: Table, loss: str = PLAIN) -> dict[tuple[str, str, str], list[Measured]]:
    """Cells with noise that comes from nowhere but chance, by task, network and regime."""
    groups: dict[tuple[str, str, str], list[Measured]] = {}
    for cell, found in held.items():
        if cell.rate > 0 and cell.loss == loss and cell.noise != "node-feature":
            groups.setdefault((cell.task, cell.network, cell.regime), []).append(found)
    return groups


def _clean(held: Table, cell: Cell) -> Measured:
    """The same network trained with clean labels."""
    return held[cell._replace(loss=PLAIN, noise="symmetric", rate=0.0)]


def _lost(held: Table, found: Measured, layer: str) -> np.ndarray:
    """What noise took from the predictive power of a layer, `(s,)`."""
    return _clean(held, found.cell).at(layer) - found.at(layer)


def _difference(first: np.ndarray, second: np.ndarray) -> Spread:
    return spread(first - second)


def beyond_network(held: Table) -> list[Verdict]:
    """A few clean labels and the representation beat the network that learned it."""
    return [
        judge(
            f"{task}, {network}, {regime}: the readout of the representation beats the network",
            {found.cell.labels: _difference(found.representation, found.own) for found in group},
        )
        for (task, network, regime), group in _groups(held).items()
        if network not in UNSUITED
    ]


def beyond_input(held: Table) -> list[Verdict]:
    """The representation learned from noisy labels beats the raw input, with the same clean labels."""
    return [
        judge(
            f"{task}, {network}, {regime}: the representation beats the raw input",
            {found.cell.labels: _difference(found.representation, found.at("input")) for found in group},
        )
        for (task, network, regime), group in _groups(held).items()
        if network not in UNSUITED
    ]


def suited_keeps(held: Table) -> list[Verdict]:
    """The network that suits the task keeps its predictive power; the others have less, and lose more."""
    judged = []
    for regime in REGIMES:
        groups = {
            network: found
            for (task, network, when), found in _groups(held).items()
            if task == "graphs" and when == regime
        }
        if SUITED not in groups:
            continue
        kept = {found.cell.labels: spread(-_lost(held, found, found.represented)) for found in groups[SUITED]}
        judged.append(
            judge(
                f"graphs, {regime}: noise takes at most {KEPT:.0f} points from the suited network ({SUITED})",
                kept,
                lambda change: change.mean >= -KEPT,
            )
        )
        less, lose_more = {}, {}
        for network in UNSUITED:
            for suited, other in zip(groups[SUITED], groups.get(network, []), strict=False):
                name = f"{network}, {other.cell.labels}"
                less[name] = _difference(suited.representation, other.representation)
                lose_more[name] = _difference(
                    _lost(held, other, other.represented), _lost(held, suited, suited.represented)
                )
        if less:
            judged.append(judge(f"graphs, {regime}: unsuited networks have less predictive power", less))
            judged.append(
                judge(f"graphs, {regime}: noise takes more from unsuited than from suited", lose_more)
            )
    return judged


def aligned_noise(held: Table) -> list[Verdict]:
    """Noise that a network can predict from what it sees costs it more than noise from nowhere."""
    judged = []
    for network in dict.fromkeys(cell.network for cell in held if cell.noise == "node-feature"):
        cost = {
            f"{cell.regime}, {cell.labels}": _difference(
                held[cell._replace(noise="symmetric")].representation, found.representation
            )
            for cell, found in held.items()
            if cell.noise == "node-feature" and cell.network == network
        }
        judged.append(
            judge(f"graphs, {network}: node-feature noise takes more than symmetric of that rate", cost)
        )
    return judged


def later_spoiled(held: Table) -> list[Verdict]:
    """Memorised noise takes more from the last layer than from the first, where a network can memorise."""
    return [
        judge(
            f"{task}, {network}, {regime}: noise takes more from the last hidden layer than from the first",
            {
                found.cell.labels: _difference(
                    _lost(held, found, found.layers[-1]), _lost(held, found, found.layers[1])
                )
                for found in group
            },
        )
        for (task, network, regime), group in _groups(held).items()
        if regime == "trained long" and (task == "digits" or network == UNSUITED[-1])
    ]


def robust_helps(held: Table) -> list[Verdict]:
    """Label smoothing gives the representation more predictive power than cross-entropy."""
    return [
        judge(
            f"{task}, {network}, {regime}: label smoothing adds predictive power",
            {
                found.cell.labels: _difference(
                    found.representation, held[found.cell._replace(loss=PLAIN)].representation
                )
                for found in group
            },
        )
        for (task, network, regime), group in _groups(held, ROBUST).items()
    ]


# The paper's claims, and one that its title makes.
CLAIMS = {
    "Predictive power exceeds the accuracy of the network": beyond_network,
    "Noisy labels induce a better representation than the raw input": beyond_input,
    "A suited architecture keeps its predictive power, an unsuited one does not": suited_keeps,
    "Noise that suits the architecture does more harm": aligned_noise,
    "Later layers are spoiled more than earlier ones": later_spoiled,
    "Robust training adds predictive power": robust_helps,
}


def verdicts(measured: Iterable[Measured]) -> dict[str, list[Verdict]]:
    """Every claim that the cells at hand can judge."""
    held = {found.cell: found for found in measured}
    judged = {claim: judge_all(held) for claim, judge_all in CLAIMS.items()}
    return {claim: items for claim, items in judged.items() if items}


def flat_rows(measured: Iterable[Measured]) -> list[dict[str, object]]:
    """One row of the CSV for each layer and solver."""
    rows = []
    for found in measured:
        own, fit = spread(found.own), spread(found.fit)
        for solver, power in found.power.items():
            for layer, width, column in zip(found.layers, found.widths, power.T, strict=True):
                known, gain = spread(column), spread(column - found.own)
                rows.append(
                    {
                        **found.cell._asdict(),
                        "solver": solver,
                        "layer": layer,
                        "width": width,
                        "representation": layer == found.represented,
                        "power": known.mean,
                        "power std": known.std,
                        "network": own.mean,
                        "network std": own.std,
                        "gain": gain.mean,
                        "gain error": gain.error,
                        "training fit": fit.mean,
                    }
                )
    return rows


ABOUT = f"""Written by `{COMMAND}`. Test accuracy in points, mean ± standard deviation over seeds, which
draw data, noise, networks and clean rows. Predictive power is the test accuracy of a linear readout fitted to
{PER_CLASS} clean labels a class of rows that the network has not seen. Claims are judged by the {JUDGED}
readout, at 2 standard errors of the mean of paired differences. The representation, in bold, is the input of
the last two dense layers. *Training fit* is the share of its noisy training labels that the network
reproduces. Of the graph networks “{SUITED}” suits the task, “sum, then sum” is in between."""


def markdown(measured: Sequence[Measured]) -> str:
    """Verdicts by claim, and every network."""
    lines = ["# Predictive power, layer by layer", "", ABOUT]
    for claim, items in verdicts(measured).items():
        lines += ["", f"## {claim}", "", *verdict_lines(items)]
    networks: dict[tuple[str, str], list[Measured]] = {}
    for found in measured:
        networks.setdefault((found.cell.task, found.cell.network), []).append(found)
    for (task, network), group in networks.items():
        first = group[0]
        layers = [f"**{layer}**" if layer == first.represented else layer for layer in first.layers]
        header = ["training", "labels", *layers, f"{first.represented}, ridge", "network", "training fit"]
        lines += ["", f"## {task}: {network}", "", *table(header, map(_markdown_row, group))]
    return "\n".join(lines) + "\n"


def _markdown_row(found: Measured) -> list[object]:
    training = found.cell.training.removeprefix(f"{found.cell.network}, ")
    known = [spread(found.at(layer)) for layer in found.layers]
    ridge = spread(found.at(found.represented, "ridge"))
    return [training, found.cell.labels, *known, ridge, spread(found.own), spread(found.fit)]


def draw_layers(group: Sequence[Measured], ax: Axes) -> None:
    """Predictive power along the layers, one line a noise, and the network itself at the end."""
    layers = group[0].layers
    for found, color, marker in zip(group, COLORS, MARKERS, strict=False):
        known = [spread(found.at(layer)) for layer in layers]
        style: dict[str, Any] = {"color": color, "marker": marker, "capsize": 2, "markersize": 5}
        label = found.cell.labels
        means, stds = [at.mean for at in known], [at.std for at in known]
        ax.errorbar(range(len(layers)), means, stds, label=label, **style)
        own, end = spread(found.own), len(layers)
        ax.errorbar([end], [own.mean], [own.std], markerfacecolor="white", **style)
        ax.plot([end - 1, end], [means[-1], own.mean], color=color, linestyle=":", linewidth=1)
    names = [name + "\n(repr.)" if name == group[0].represented else name for name in layers]
    ax.set_xticks(range(len(layers) + 1), [*(n.replace("convolution", "conv.") for n in names), "network"])
    ax.tick_params(labelsize=8)
    ax.grid(axis="y", color="0.92")
    ax.set_title(f"{group[0].cell.task}: {group[0].cell.network}, {group[0].cell.regime}", fontsize=10)


def draw_networks(group: Sequence[Measured], ax: Axes) -> None:
    """Predictive power and accuracy against symmetric noise, one colour a network."""
    networks: dict[str, list[Measured]] = {}
    for found in group:
        networks.setdefault(found.cell.network, []).append(found)
    for (network, cells), color, marker in zip(networks.items(), COLORS, MARKERS, strict=False):
        rates = [100 * found.cell.rate for found in cells]
        style: dict[str, Any] = {"color": color, "marker": marker, "capsize": 2, "markersize": 5}
        known = [spread(found.representation) for found in cells]
        own = [spread(found.own) for found in cells]
        ax.errorbar(rates, [at.mean for at in known], [at.std for at in known], label=network, **style)
        hollow = {**style, "markerfacecolor": "white", "linestyle": ":"}
        ax.errorbar(rates, [at.mean for at in own], [at.std for at in own], **hollow)
        ax.set_xticks(rates)
    ax.plot([], [], color="0.3", marker="o", label="readout of the representation")
    ax.plot([], [], color="0.3", marker="o", markerfacecolor="white", linestyle=":", label="network itself")
    ax.set_xlabel("symmetric noise, % of the training labels", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(color="0.92")
    ax.set_title(f"{group[0].cell.task}, {group[0].cell.regime}", fontsize=10)


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Digits layer by layer, and graphs against the noise; regimes side by side."""
    panels: dict[str, dict[str, list[Measured]]] = {}
    for found in measured:
        cell = found.cell
        if cell.loss == PLAIN and (cell.task == "digits" or cell.noise == "symmetric"):
            name = cell.network if cell.task == "digits" else cell.task
            panels.setdefault(name, {}).setdefault(cell.regime, []).append(found)
    figure = Figure(figsize=(12, 3.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(REGIMES), sharey="row", squeeze=False)
    for row, by_regime in zip(axes, panels.values(), strict=True):
        for ax, group in zip(row, by_regime.values(), strict=True):
            draw_panel = draw_layers if group[0].cell.task == "digits" else draw_networks
            draw_panel(group, ax)
        row[0].set_ylabel("test accuracy, %", fontsize=9)
        row[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), edgecolor="none")
    figure.savefig(path, dpi=90)


TASKS = {"digits": digits, "graphs": graphs}


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
    seeds: Annotated[int, typer.Option(help="Seeds of data, noise and networks.")] = SEEDS,
) -> None:
    """Measure both tasks, judge, and write predictive_power.csv, .json, .md and .png."""
    out.mkdir(parents=True, exist_ok=True)
    measured: list[Measured] = []
    seconds: dict[str, int] = {}
    for name, task in TASKS.items():
        start = time.perf_counter()
        measured += task(seeds)
        seconds[name] = round(time.perf_counter() - start)
    judged = verdicts(measured)
    write_csv(flat_rows(measured), out / "predictive_power.csv")
    record = {"command": COMMAND, "seeds": f"0 to {seeds - 1}", "seconds": seconds, "machine": machine()}
    by_claim = {claim: [item._asdict() for item in items] for claim, items in judged.items()}
    write_json(record | {"verdicts": by_claim}, out / "predictive_power.json")
    (out / "predictive_power.md").write_text(markdown(measured), encoding="utf-8")
    draw(measured, out / "predictive_power.png")
    console = Console(width=160)
    for claim, items in judged.items():
        console.print(f"[bold]{claim}[/bold]")
        print_verdicts(items, console)


if __name__ == "__main__":
    typer.run(main)
