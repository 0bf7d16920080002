"""The paper's pictures on CLINC150: φ(i, j) against the flip rate, and accuracy against the rank [si2025].

    python -m benchmarks.paper_figures [figures|render] --data DIR

Singular values and angles against their bounds are drawn by `benchmarks.spectra`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

import lip_jax
from benchmarks import frame
from benchmarks.data import Dataset, load_clinc150
from benchmarks.frame import Benchmark, Measured, Record
from benchmarks.heads import head_of, train_overfitted, train_regularised
from lip_jax import Calibrated, Head, Published, plot
from lip_jax.methods import Fit
from lip_jax.plot import COLORS
from lip_jax.rows.labels import Rows

RATES = (0.05, 0.1, 0.2, 0.4)
SEEDS = 3
METHODS = {"published": Published(), "calibrated": Calibrated()}
PHI_RANKS = (10, 37, 75, 112)
# C of the softmax heads; none for one that is trained without decay until it knows its labels by heart.
HEADS = {"softmax, C = 0.01": 0.01, "softmax, C = 0.001": 0.001, "overfitted": None}
# The record has φ(i, j) at every so many ranks, of 150.
STEP = 3


def train(c: float | None, seed: int, feats: np.ndarray, labels: jax.Array, l: int) -> Head:
    """One of `HEADS`."""
    if c is None:
        return head_of(train_overfitted(jax.random.key(seed), feats, labels, num_classes=l))
    return head_of(train_regularised(feats, labels, num_classes=l, c=c))


@jax.jit
def gains(head: Head, rows: Rows, test: Rows) -> jax.Array:
    """Of each method, accuracy at ranks 0 to r less that of the head, in points: `(methods, r + 1)`."""
    right = lambda logits: (logits.argmax(axis=1) == test.labels).mean(dtype=jnp.float32)
    paths = [method.path(head, Fit(rows, None, None, jnp.int32(0))) for method in METHODS.values()]
    # From the full rank, which is the head, to rank 0.
    scores = jnp.stack([path.over_logits(test.feats, right)[::-1] for path in paths])
    return 100 * (scores - scores[:, -1:])


def measure(data: Dataset, rates=RATES, seeds=range(SEEDS)) -> Measured:
    """Train every head and follow it through all ranks; for the record."""
    feats, train_y, l = jnp.asarray(data.train_x), jnp.asarray(data.train_y), int(data.train_y.max()) + 1
    test = Rows(jnp.asarray(data.test_x), jnp.asarray(data.test_y), None)
    similarity, grids, found = {}, {}, []
    for (name, c), rate in track([(item, rate) for item in HEADS.items() for rate in rates], "heads"):
        by_seed = []
        for seed in seeds:
            given = lip_jax.noise.symmetric(jax.random.key(seed), train_y, rate, num_classes=l)
            head = train(c, seed, data.train_x, given, l)
            by_seed.append(np.asarray(gains(head, Rows(feats, given, None), test)))
            if (name, seed) == (next(iter(HEADS)), seeds[0]):
                clean = train(c, seed, data.train_x, train_y, l)
                grid = np.asarray(lip_jax.spectrum.kernel_similarity_grid(clean.kernel, head.kernel), float)
                ranks = [k for k in PHI_RANKS if k <= len(grid)]
                similarity[f"{rate:g}"] = {f"φ({k}, {k})": round(float(grid[k - 1, k - 1]), 3) for k in ranks}
                grids[f"{rate:g}"] = grid[STEP - 1 :: STEP, STEP - 1 :: STEP].round(3).tolist()
        for method, values in zip(METHODS, np.stack(by_seed, axis=1), strict=True):
            best = int(values.mean(axis=0).argmax())
            mean, at_best = values.mean(axis=0), frame.spread(values[:, best])
            found.append(
                {"head": name, "flip_rate": rate, "method": method, "best_rank": best}
                | {"best_gain": round(at_best.mean, 3), "its_std": round(at_best.std, 3)}
                | {
                    "at_3r/4": round(float(mean[3 * (len(mean) - 1) // 4]), 3),
                    "mean_gain": [round(float(x), 2) for x in mean],
                }
            )
    return {"similarity": similarity, "curves": found, "grids": grids}


def figures(data: str | None, seeds: int | None) -> Measured:
    """Every head at every rate."""
    return measure(load_clinc150(data), seeds=range(seeds or SEEDS))


def tables(record: Record) -> dict[str, str]:
    """φ by flip rate, and at which rank each method does best on the mean over seeds."""
    held = record["figures"]
    best = []
    for row in held["curves"]:
        gains = f"{row['best_gain']:+.3f} ± {row['its_std']:.3f}", f"{row['at_3r/4']:+.3f}"
        where = row["head"], f"{row['flip_rate']:g}", row["method"], row["best_rank"]
        best.append((*where, *gains, f"{row['mean_gain'][0]:+.2f}"))
    similarity = [(rate, *found.values()) for rate, found in held["similarity"].items()]
    return {"similarity": frame.rows_of(similarity), "gains": frame.rows_of(best)}


def draw(record: Record) -> Figure:
    """Heat maps above, accuracies below: a colour a rate, dashed where calibrated."""
    held, count = record["figures"], len(record["figures"]["similarity"])
    figure = Figure(figsize=(4 * count, 8.4), layout="constrained", dpi=80)
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    for ax, (rate, grid) in zip(
        above.subplots(1, count, squeeze=False)[0], held["grids"].items(), strict=True
    ):
        whole = np.kron(np.array(grid), np.ones((STEP, STEP)))
        plot.similarity_heatmap(whole, names=("clean", "noisy"), ax=ax)
        ax.set_title(f"φ(i, j), softmax, C = 0.01, p = {rate}")
    panels = frame.grouped(held["curves"], lambda row: row["head"])
    axes = below.subplots(1, len(panels), squeeze=False)[0]
    for ax, (name, rows) in zip(axes, panels.items(), strict=True):
        for j, row in enumerate(rows):
            i, calibrated = divmod(j, len(METHODS))
            label = None if calibrated else f"p = {row['flip_rate']:g}"
            every = max(len(row["mean_gain"]) // 10, 1)
            style = {"color": COLORS[i], "ls": "--" if calibrated else "-", "marker": "osd^"[i], "ms": 4}
            ax.plot(row["mean_gain"], label=label, markevery=every, **style)
        ax.axhline(0, color="0.5", lw=0.8)
        ax.set_yscale("symlog", linthresh=1)
        ax.set(title=name, xlabel="rank (components preserved)")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy less that of the head, points")
    for style, name in zip(("k-", "k--"), METHODS, strict=True):
        axes[0].plot([], [], style, label=name)
    axes[0].legend(fontsize=8, ncols=2)
    return figure


BENCHMARK = Benchmark("paper_figures", {"figures": figures}, lambda record: [], tables, draw)

if __name__ == "__main__":
    BENCHMARK.run()
