"""The paper's pictures on CLINC150: φ(i, j) against the flip rate, and accuracy against the rank.

    python -m benchmarks.paper_figures --data DIR

Singular values and angles against their bounds are drawn by `benchmarks.spectra`. Nothing is chosen here:
every rank is shown, with the test accuracy of the head it gives, less that of the head as it came.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from lip_jax.calibrate import calibrated_spectrum
from lip_jax.selection import published_spectrum, rank_scores
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track

import lip_jax
from benchmarks.accuracy import head_of
from benchmarks.data import Dataset, load_clinc150
from benchmarks.heads import train_overfitted, train_regularised
from benchmarks.record import machine, write_json
from lip_jax import Head, plot
from lip_jax.plot import COLORS
from lip_jax.rows.labels import Rows

COMMAND = "python -m benchmarks.paper_figures --data DIR"
RATES = (0.05, 0.1, 0.2, 0.4)
SEEDS = (0, 1, 2)
FAMILIES = ("published", "calibrated")
PHI_RANKS = (10, 37, 75, 112)

Train = Callable[[jax.Array, jax.Array], Head]


def trainers(feats: np.ndarray, num_classes: int) -> dict[str, Train]:
    """How heads are trained, by regime."""

    def regularised(key: jax.Array, labels: jax.Array, *, c: float) -> Head:
        del key
        return head_of(train_regularised(feats, labels, num_classes=num_classes, c=c, steps=60))

    def overfitted(key: jax.Array, labels: jax.Array) -> Head:
        return head_of(train_overfitted(key, feats, labels, num_classes=num_classes))

    weak, strong = partial(regularised, c=0.01), partial(regularised, c=0.001)
    return {"softmax, C = 0.01": weak, "softmax, C = 0.001": strong, "overfitted": overfitted}


@jax.jit
def gains(head: Head, fit: Rows, test: Rows) -> jax.Array:
    """Of each family, accuracy at ranks 0 to r less that of the head, in points: `(families, r + 1)`."""
    spectra = (
        published_spectrum(head.kernel, fit),
        calibrated_spectrum(head.kernel, *fit, head.bias, 0.0, None),
    )
    scores = jnp.stack([rank_scores(head, spectrum, test, "accuracy") for spectrum in spectra])
    return 100 * (scores - scores[:, -1:])


class Figures(NamedTuple):
    """What is drawn: a grid of φ a rate, and by regime `(rates, families, seeds, ranks)`."""

    similarity: dict[float, np.ndarray]
    gains: dict[str, np.ndarray]


def measure(data: Dataset, *, rates: tuple[float, ...], seeds: tuple[int, ...]) -> Figures:
    """Train every head and follow it through all ranks."""
    train_y, l = jnp.asarray(data.train_y), int(data.train_y.max()) + 1
    test = Rows(jnp.asarray(data.test_x), jnp.asarray(data.test_y), None)
    similarity, found = {}, {}
    for name, train in trainers(data.train_x, l).items():
        by_rate = []
        for rate in track(rates, name):
            of_seeds = []
            for seed in seeds:
                key = jax.random.key(seed)
                given = lip_jax.noise.symmetric(key, train_y, rate, num_classes=l)
                head = train(key, given)
                of_seeds.append(gains(head, Rows(jnp.asarray(data.train_x), given, None), test))
                if name == "softmax, C = 0.01" and seed == seeds[0]:
                    clean = train(key, train_y)
                    grid = lip_jax.spectrum.kernel_similarity_grid(clean.kernel, head.kernel)
                    similarity[rate] = np.asarray(grid)
            by_rate.append(np.stack(of_seeds, axis=1))
        found[name] = np.stack(by_rate)
    return Figures(similarity, found)


def draw_gains(name: str, values: np.ndarray, rates: tuple[float, ...], ax: Axes) -> None:
    """Mean over seeds, a colour a rate, dashed where calibrated."""
    mean = values.mean(axis=2)
    every = max(mean.shape[-1] // 10, 1)
    for i, rate in enumerate(rates):
        for family, style in zip(FAMILIES, ("-", "--"), strict=True):
            label = f"p = {rate:g}" if family == "published" else None
            options = {"color": COLORS[i], "ls": style, "marker": "osd^"[i], "markevery": every, "ms": 4}
            ax.plot(mean[i, FAMILIES.index(family)], label=label, **options)
    ax.axhline(0, color="0.5", lw=0.8)
    ax.set_yscale("symlog", linthresh=1)
    ax.set(title=name, xlabel="rank (components preserved)")
    ax.grid(alpha=0.3)


def draw(figures: Figures, path: Path) -> None:
    """Heat maps above, accuracies below."""
    rates = tuple(figures.similarity)
    figure = Figure(figsize=(4 * len(rates), 8.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    for ax, rate in zip(above.subplots(1, len(rates)), rates, strict=True):
        plot.similarity_heatmap(figures.similarity[rate], names=("clean", "noisy"), ax=ax)
        ax.set_title(f"φ(i, j), softmax, C = 0.01, p = {rate:g}")
    axes = below.subplots(1, len(figures.gains))
    for ax, (name, values) in zip(axes, figures.gains.items(), strict=True):
        draw_gains(name, values, rates, ax)
    axes[0].set_ylabel("test accuracy less that of the head, points")
    axes[0].plot([], [], "k-", label="published")
    axes[0].plot([], [], "k--", label="calibrated")
    axes[0].legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=80)


def record(figures: Figures, seeds: tuple[int, ...]) -> dict:
    """Means and spreads, and at which rank each family does best on the mean."""
    curves = []
    for name, values in figures.gains.items():
        for i, rate in enumerate(figures.similarity):
            for j, family in enumerate(FAMILIES):
                mean = values[i, j].mean(axis=0)
                best = int(mean.argmax())
                spread = float(values[i, j, :, best].std(ddof=1)) if len(seeds) > 1 else 0.0
                curves.append(
                    {
                        "head": name,
                        "flip_rate": rate,
                        "family": family,
                        "best_rank": best,
                        "best_gain": round(float(mean[best]), 3),
                        "its_std": round(spread, 3),
                        "at_3r/4": round(float(mean[3 * (len(mean) - 1) // 4]), 3),
                        "mean_gain": [round(float(x), 2) for x in mean],
                    }
                )
    phi = {
        str(rate): {
            f"φ({k}, {k})": round(float(grid[k - 1, k - 1]), 3) for k in PHI_RANKS if k <= grid.shape[0]
        }
        for rate, grid in figures.similarity.items()
    }
    return {"command": COMMAND, "seeds": seeds, "similarity": phi, "curves": curves, "machine": machine()}


def main(
    data: Annotated[str | None, typer.Option(help="Data folder; default: LIP_JAX_DATA.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
) -> None:
    """Measure, and write paper_figures.json and paper_figures.png."""
    out.mkdir(parents=True, exist_ok=True)
    figures = measure(load_clinc150(data), rates=RATES, seeds=SEEDS)
    write_json(record(figures, SEEDS), out / "paper_figures.json")
    draw(figures, out / "paper_figures.png")


if __name__ == "__main__":
    typer.run(main)
