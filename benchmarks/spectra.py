"""What label noise does to the spectrum of a head, on CLINC150, and how far the bounds see it.

    python -m benchmarks.spectra --data DIR

Heads trained on labels flipped symmetrically at rate p are compared with the head trained on clean
labels: singular values, φ(k, k) of the leading and of the trailing k right singular vectors, and the
largest angle between the leading subspaces, on either side, beside every bound that applies to it:

- softmax heads with weight decay: Wedin, for kernels however trained;
- ridge heads `(XᵀX + λI)⁻¹XᵀY`: Wedin, and the two forms that know features and flip rate alone.

Ranks, rates, strengths and thresholds were chosen before the first run, in which 11 of 2,205 bounds were
below 1; the control rate was added after it, low enough for bounds to say something and for the check to be
able to fail. The command does fail if a measured angle exceeds a bound.
"""

import csv
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

import lip_jax
from benchmarks.data import Dataset, load_clinc150
from benchmarks.heads import train_regularised
from benchmarks.record import machine, write_json
from lip_jax import plot
from lip_jax.plot import COLORS
from lip_jax.spectrum import SvdSplit

COMMAND = "python -m benchmarks.spectra --data DIR"
RATES = (0.05, 0.1, 0.2, 0.3, 0.4)
CONTROL_RATE = 0.001
SEEDS = (0, 1, 2)
RANKS = (10, 37, 75, 112, 140, 149, 150)
STRENGTHS = (0.01, 0.001)  # C of the softmax heads
RIDGES = (0.0, 0.01, 1.0)  # λ/n of the ridge heads
KEPT = 0.1  # a singular value within 10% of the clean one has kept
PRESERVED = 0.9  # a subspace with φ of at least 0.9 is preserved
BOUNDS = ("paper", "filter", "wedin_own", "wedin_mixed", "wedin_mixed_rescaled")


class Row(NamedTuple):
    """One measurement; `rank` 0 marks those of the whole head."""

    head: str
    flip_rate: float
    seed: int
    rank: int
    quantity: str
    value: float


class Stat(NamedTuple):
    """Mean and standard deviation over the seeds."""

    mean: float
    std: float


Key = tuple[str, float, int, str]
Fit = Callable[[jax.Array], tuple[jax.Array, jax.Array | float]]  # labels -> kernel, bias


def softmax_fit(feats: np.ndarray, num_classes: int, c: float) -> Fit:
    """Training of a softmax head with weight decay, as a function of the labels."""

    def fit(labels):
        head = train_regularised(feats, labels, num_classes=num_classes, c=c)["params"]["head"]
        return head["kernel"], head["bias"][None, :]

    return fit


class Factors(NamedTuple):
    """`X = P diag(σ) Qᵀ`, numerically zero singular values set to 0, as the bounds have them."""

    p: jax.Array
    sigma: jax.Array
    qt: jax.Array


def factorise(feats: np.ndarray) -> Factors:
    """The thin SVD of the features, which serves every ridge and labelling."""
    p, _, qt = jnp.linalg.svd(jnp.asarray(feats), full_matrices=False)
    return Factors(p, lip_jax.bounds.feature_singular_values(feats), qt)


def ridge_fit(factors: Factors, num_classes: int, ridge: float) -> Fit:
    """`(XᵀX + λI)⁻¹XᵀY = Q diag(σ/(σ² + λ)) PᵀY`; at λ = 0 the minimum-norm least-squares head."""
    p, sigma, qt = factors
    nonzero = sigma > 0
    gain = jnp.where(nonzero, sigma / jnp.where(nonzero, sigma**2 + ridge, 1), 0)

    def fit(labels):
        per_class = jax.ops.segment_sum(p, jnp.asarray(labels), num_classes)
        weighted = gain[:, None] * per_class.T
        return jnp.matmul(qt.T, weighted, precision=jax.lax.Precision.HIGHEST), 0.0

    return fit


def determined(*splits: SvdSplit) -> int:
    """How many components every head has: weight decay gives a softmax head l − 1 (the gauge)."""
    eps = np.finfo(np.float32).eps
    return min(
        int((split.s > eps * max(split.u.shape[0], split.vt.shape[1]) * split.s[0]).sum()) for split in splits
    )


def spectrum_changes(clean: SvdSplit, noisy: SvdSplit) -> dict[str, float]:
    """How the first and the last quarter of the singular values changed, on average.

    `ratio` is `s'_i / s_i`, `change` is `|s'_i / s_i − 1|`, `shape_change` the same with both spectra
    scaled to `Σ s² = 1`, since noise shrinks a head as a whole and that turns nothing.
    """
    r = determined(clean, noisy)
    ratio = noisy.s[:r] / clean.s[:r]
    shape = ratio * jnp.linalg.norm(clean.s) / jnp.linalg.norm(noisy.s)
    effective = lip_jax.spectrum.effective_rank(noisy.s)
    values = {
        "effective_rank_entropy": effective.entropy,
        "effective_rank_stable": effective.stable,
        "ratio_first": ratio[0],
    }
    for part, block in (("leading", slice(None, r // 4)), ("trailing", slice(r - r // 4, r))):
        values |= {
            f"ratio_{part}": ratio[block].mean(),
            f"change_{part}": jnp.abs(ratio[block] - 1).mean(),
            f"shape_change_{part}": jnp.abs(shape[block] - 1).mean(),
        }
    return {name: float(value) for name, value in values.items()}


def similarity_curves(clean: SvdSplit, noisy: SvdSplit) -> dict[str, np.ndarray]:
    """φ at every k, of the components both heads have.

    `phi_leading`, `phi_trailing`: φ(k, k) of the first and of the last k right vectors; chance is k/r.
    Blocks of one size are compared, not a subspace with its complement, which turns by the same angle.
    `phi_left`: φ(k, k) of the first k left vectors; chance is k/q.
    `phi_held`: φ(k, max(k, ⌊3r/4⌋)), how much of the clean first k a noisy head keeps in its first 3/4.
    """
    r = determined(clean, noisy)
    v, v_noisy = clean.vt[:r].T, noisy.vt[:r].T
    bases = {
        "phi_leading": (v, v_noisy),
        "phi_trailing": (v[:, ::-1], v_noisy[:, ::-1]),
        "phi_left": (clean.u[:, :r], noisy.u[:, :r]),
    }
    grids = {
        name: np.asarray(lip_jax.spectrum.subspace_similarity_grid(*pair)) for name, pair in bases.items()
    }
    first = np.arange(r)
    held = grids["phi_leading"][first, np.maximum(first, 3 * r // 4 - 1)]
    return {name: np.diagonal(grid) for name, grid in grids.items()} | {"phi_held": held}


def sin_theta(clean: SvdSplit, noisy: SvdSplit, rank: int) -> float:
    """Sine of the largest angle between the leading subspaces, on the side where it is larger."""
    left = lip_jax.spectrum.principal_angles(clean.u[:, :rank], noisy.u[:, :rank])
    right = lip_jax.spectrum.principal_angles(clean.vt[:rank].T, noisy.vt[:rank].T)
    return float(jnp.sin(jnp.maximum(left[0], right[0])))


@jax.jit
def wedin_bounds(kernel: jax.Array, kernel_noisy: jax.Array, ranks: jax.Array) -> dict[str, jax.Array]:
    """Wedin's bounds at many ranks; with the mixed gap the better of the two roles the heads can play.

    Rescaling a kernel turns none of its subspaces, so `c W'` bounds the same angle as `W'`; the c that
    brings it closest to `W` takes the shrinkage out of `‖W − W'‖₂`.
    """
    scale = jnp.vdot(kernel, kernel_noisy) / jnp.vdot(kernel_noisy, kernel_noisy)

    def mixed(rank, other):
        return jnp.minimum(
            lip_jax.bounds.wedin_bound(kernel, other, rank).value,
            lip_jax.bounds.wedin_bound(other, kernel, rank).value,
        )

    def at(rank):
        return {
            "wedin_own": lip_jax.bounds.wedin_bound(kernel, kernel_noisy, rank, gap="own").value,
            "wedin_mixed": mixed(rank, kernel_noisy),
            "wedin_mixed_rescaled": mixed(rank, scale * kernel_noisy),
        }

    return jax.vmap(at)(ranks)


def ridge_bounds(
    factors: Factors, clean: SvdSplit, noisy: SvdSplit, ranks: jax.Array, *, flip_rate: float, ridge: float
) -> dict[str, jax.Array]:
    """The paper's bound and its filter form at many ranks, at the flip rate that was realised."""
    case: dict[str, Any] = {
        "singular_values": factors.sigma,
        "num_samples": factors.p.shape[0],
        "num_classes": clean.vt.shape[1],
        "flip_rate": flip_rate,
        "ridge": ridge,
    }

    def at(rank):
        s, s_noisy = clean.s, noisy.s
        gap = jnp.maximum(
            lip_jax.bounds.mixed_gap(s, s_noisy, rank), lip_jax.bounds.mixed_gap(s_noisy, s, rank)
        )
        return {
            form: lip_jax.sin_theta_bound(gap=gap, form=form, **case).value for form in ("paper", "filter")
        }

    return jax.vmap(at)(ranks)


def compare_spectra(clean: SvdSplit, noisy: SvdSplit) -> Iterator[tuple[int, str, float]]:
    """Singular values and φ of one head against the clean one, at every rank: `(rank, quantity, value)`."""
    for name, value in spectrum_changes(clean, noisy).items():
        yield 0, name, value
    energy = np.cumsum(np.asarray(noisy.s) ** 2)
    curves = similarity_curves(clean, noisy)
    curves |= {"singular_value": np.asarray(noisy.s), "energy_beyond": 1 - energy / energy[-1]}
    for name, curve in curves.items():
        for rank, value in enumerate(curve, start=1):
            yield rank, name, float(value)


def compare_angles(
    clean: SvdSplit, noisy: SvdSplit, bounds: dict[str, jax.Array], ranks: tuple[int, ...]
) -> Iterator[tuple[int, str, float]]:
    """The measured sin θ and its bounds, as `(rank, quantity, value)`."""
    for i, rank in enumerate(ranks):
        yield rank, "sin_theta", sin_theta(clean, noisy, rank)
        for name, bound in bounds.items():
            yield rank, name, float(bound[i])


class Family(NamedTuple):
    """A way to train a head, and its `λ` where it is a ridge head."""

    name: str
    fit: Fit
    ridge: float | None


def families(feats: np.ndarray, num_classes: int, factors: Factors) -> list[Family]:
    """Every head of the tables."""
    n = feats.shape[0]
    softmax = [Family(f"softmax C={c:g}", softmax_fit(feats, num_classes, c), None) for c in STRENGTHS]
    ridge = [
        Family(f"ridge λ/n={share:g}", ridge_fit(factors, num_classes, share * n), share * n)
        for share in RIDGES
    ]
    return softmax + ridge


def measure(
    family: Family,
    data: Dataset,
    factors: Factors,
    *,
    num_classes: int,
    rates: tuple[float, ...] = (CONTROL_RATE, *RATES),
    seeds: tuple[int, ...] = SEEDS,
    ranks: tuple[int, ...] = RANKS,
) -> Iterator[list[Row]]:
    """The rows of the clean head, then of one noisy head at a time."""

    def accuracy(kernel, bias):
        logits = jnp.asarray(data.test_x) @ kernel + bias
        return float((jnp.argmax(logits, axis=1) == data.test_y).mean())

    clean_kernel, clean_bias = family.fit(jnp.asarray(data.train_y))
    clean = lip_jax.svd_split(clean_kernel, 0)
    values = [(0, "accuracy", accuracy(clean_kernel, clean_bias)), *compare_spectra(clean, clean)]
    yield [Row(family.name, 0.0, 0, *value) for value in values]
    for seed in seeds:
        for rate in rates:
            # One key for all rates: the labels wrong at a lower rate are wrong at the higher ones too.
            key = jax.random.key(seed)
            labels = lip_jax.noise.symmetric(key, data.train_y, rate, num_classes=num_classes)
            kernel, bias = family.fit(labels)
            noisy = lip_jax.svd_split(kernel, 0)
            bounds = wedin_bounds(clean_kernel, kernel, jnp.array(ranks))
            if family.ridge is not None:
                flipped = float((labels != data.train_y).mean())
                case = {"flip_rate": flipped, "ridge": family.ridge}
                bounds |= ridge_bounds(factors, clean, noisy, jnp.array(ranks), **case)
            values = [
                (0, "accuracy", accuracy(kernel, bias)),
                *compare_spectra(clean, noisy),
                *compare_angles(clean, noisy, bounds, ranks),
            ]
            yield [Row(family.name, rate, seed, *value) for value in values]


def check_bounds(rows: list[Row]) -> dict[str, int]:
    """Count the comparisons of sin θ with a bound, and the informative ones; raise if one fails."""
    measured = {row[:4]: row.value for row in rows if row.quantity == "sin_theta"}
    compared = [(row, measured[row[:4]]) for row in rows if row.quantity in BOUNDS]
    # Angles of float32 kernels are known to about eps · s_1 / gap, at most 1e-4 at these ranks.
    broken = [(row, sine) for row, sine in compared if not sine <= row.value + 1e-4]
    if broken:
        row, sine = broken[0]
        raise AssertionError(f"{len(broken)} bounds do not hold; first {row} against sin θ = {sine}")
    informative = [row for row, _ in compared if row.value < 1]
    return {
        "compared": len(compared),
        "not_vacuous": len(informative),
        "not_vacuous_at_rates": sum(row.flip_rate in RATES for row in informative),
    }


def summarise(rows: list[Row]) -> dict[Key, Stat]:
    """Mean and standard deviation over the seeds, by head, rate, rank and quantity."""
    groups: dict[Key, list[float]] = defaultdict(list)
    for row in rows:
        groups[row.head, row.flip_rate, row.rank, row.quantity].append(row.value)
    with np.errstate(invalid="ignore"):  # the spread of an infinite bound is NaN
        return {
            key: Stat(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
            for key, values in groups.items()
        }


def reach(holds: list[bool]) -> str:
    """Where a claim holds along `RATES`, in words."""
    if all(holds):
        return "at every p"
    first_failure = holds.index(False)
    return f"up to p = {RATES[first_failure - 1]:g} only" if first_failure else "not even at p = 0.05"


def verdicts(stats: dict[Key, Stat], head: str) -> list[str]:
    """The two observations judged by the thresholds above; more means by more than both spreads."""

    def at(rank: int, quantity: str) -> list[Stat]:
        return [stats[head, rate, rank, quantity] for rate in RATES]

    def exceeds(larger: list[Stat], smaller: list[Stat]) -> list[bool]:
        return [a.mean - a.std > b.mean + b.std for a, b in zip(larger, smaller, strict=True)]

    quarter = RANKS[1]
    leading, trailing = at(0, "change_leading"), at(0, "change_trailing")
    shape = exceeds(at(0, "shape_change_trailing"), at(0, "shape_change_leading"))
    phi, phi_trailing = at(quarter, "phi_leading"), at(quarter, "phi_trailing")
    return [
        f"1. leading quarter of s within {KEPT:.0%} of clean on average: "
        f"{reach([x.mean <= KEPT for x in leading])}",
        f"1. trailing quarter changes more than the leading: {reach(exceeds(trailing, leading))}",
        f"1. the same once both spectra have one norm: {reach(shape)}",
        f"2. φ({quarter}, {quarter}) of the leading vectors ≥ {PRESERVED}: "
        f"{reach([x.mean >= PRESERVED for x in phi])}",
        f"2. φ({quarter}, {quarter}) of the trailing vectors lower: {reach(exceeds(phi, phi_trailing))}",
    ]


def spectra_table(stats: dict[Key, Stat], heads: list[str]) -> Table:
    """Spectra and φ against the clean head."""
    columns = {
        "accuracy": (0, "accuracy"),
        "s'/s first": (0, "ratio_first"),
        "s'/s first ¼": (0, "ratio_leading"),
        "s'/s last ¼": (0, "ratio_trailing"),
        "shape Δ first ¼": (0, "shape_change_leading"),
        "shape Δ last ¼": (0, "shape_change_trailing"),
        "eff. rank": (0, "effective_rank_entropy"),
        "φ first 10": (10, "phi_leading"),
        "φ last 10": (10, "phi_trailing"),
        "φ first 37": (37, "phi_leading"),
        "φ last 37": (37, "phi_trailing"),
        "first 37 in first ¾": (37, "phi_held"),
    }
    title = "Spectra and φ against the clean head, mean ± std over seeds"
    table = Table(Column("head", no_wrap=True), "p", *columns, title=title)
    for head in heads:
        for rate in (0.0, *RATES):
            cells = [stats[head, rate, *where] for where in columns.values()]
            table.add_row(head, f"{rate:g}", *(f"{cell.mean:.3f}±{cell.std:.3f}" for cell in cells))
        table.add_section()
    return table


def bounds_table(stats: dict[Key, Stat], heads: list[str]) -> Table:
    """Measured sin θ beside its bounds; those below 1, which say something, in bold."""

    def cell(key: Key) -> str:
        if key not in stats:
            return "–"
        value = stats[key].mean
        return f"[bold]{value:.3g}[/bold]" if value < 1 else f"{value:.3g}"

    table = Table("head", "p", "rank", "sin θ", *BOUNDS, title="sin θ and its bounds, means over seeds")
    table.caption = "The last rank of a softmax head includes the direction weight decay sets to 0: no gap."
    for head in heads:
        for rate in (CONTROL_RATE, RATES[0], RATES[-1]):
            for rank in RANKS:
                measured = f"{stats[head, rate, rank, 'sin_theta'].mean:.3f}"
                cells = [cell((head, rate, rank, name)) for name in BOUNDS]
                table.add_row(head, f"{rate:g}", str(rank), measured, *cells)
            table.add_section()
    return table


def curve(stats: dict[Key, Stat], head: str, rate: float, quantity: str) -> np.ndarray:
    """The means of one quantity at ranks 1, 2, …, as far as it was measured."""
    ranks = sorted(rank for *key, rank, name in stats if key == [head, rate] and name == quantity)
    return np.array([stats[head, rate, rank, quantity].mean for rank in ranks])


def num_components(stats: dict[Key, Stat], head: str) -> int:
    """How many components the noisy and the clean head both have."""
    return len(curve(stats, head, RATES[0], "phi_leading"))


# The bounds in Okabe and Ito's colours, as in lip_jax.plot; markers tell them apart without colour.
STYLES = {
    "sin_theta": ("#000000", "o", "measured sin θ"),
    "wedin_mixed": ("#0072B2", "s", "Wedin, mixed gap"),
    "wedin_mixed_rescaled": ("#56B4E9", "^", "Wedin, mixed gap, rescaled"),
    "wedin_own": ("#009E73", "v", "Wedin, own gap"),
    "filter": ("#E69F00", "D", "filter form"),
    "paper": ("#D55E00", "X", "paper"),
}


def draw_similarity(stats: dict[Key, Stat], head: str, ax: Axes) -> None:
    """φ(k, k) against k by rate, in the colours of the spectra."""
    k = np.arange(1, num_components(stats, head) + 1)
    for rate, color in zip(RATES, COLORS[1:], strict=False):
        ax.plot(k, curve(stats, head, rate, "phi_leading"), color=color)
        ax.plot(k, curve(stats, head, rate, "phi_trailing"), color=color, linestyle=":")
    for style, label in (("-", "first k"), (":", "last k")):
        ax.plot([], [], color="black", linestyle=style, label=label)
    ax.plot(k, k / len(k), color="0.5", linestyle="--", label="chance")
    ax.set(title=f"{head}: subspaces, against p = 0", xlabel="k", ylabel="φ(k, k)", ylim=(0, 1.02))
    ax.legend(frameon=False, loc="lower right")


def draw_bounds(stats: dict[Key, Stat], head: str, rate: float, ax: Axes) -> None:
    """The measured sin θ and its bounds at the ranks that have a gap."""
    ranks = [rank for rank in RANKS if rank <= num_components(stats, head)]
    for name, (color, marker, label) in STYLES.items():
        if (head, rate, ranks[0], name) in stats:
            values = [stats[head, rate, rank, name].mean for rank in ranks]
            ax.semilogy(ranks, values, color=color, marker=marker, markersize=5, label=label)
    ax.axhline(1, color="0.5", linestyle="--")
    ax.annotate("vacuous from here on", (RANKS[0], 1), (0, 3), textcoords="offset points", fontsize=8)
    ax.set(title=f"{head}: largest angle, p = {rate:g}", xlabel="rank", ylabel="sin θ and its bounds")


def draw(stats: dict[Key, Stat], heads: list[str], path: Path) -> None:
    """One row a head: spectra, φ, and sin θ with its bounds; the last head must have every bound."""
    figure = Figure(figsize=(16, 4.6 * len(heads)), layout="constrained")
    for axes, head in zip(figure.subplots(len(heads), 3, squeeze=False), heads, strict=True):
        shown = num_components(stats, head)
        spectra = {f"p = {p:g}": curve(stats, head, p, "singular_value")[:shown] for p in (0.0, *RATES)}
        plot.spectrum(spectra, ax=axes[0]).set(title=f"{head}: spectra")
        draw_similarity(stats, head, axes[1])
        draw_bounds(stats, head, RATES[0], axes[2])
    lines, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower right", ncols=len(labels), title="right column")
    figure.savefig(path, dpi=80)


def write_csv(stats: dict[Key, Stat], path: Path) -> None:
    """One row per head, rate, rank (0: whole head) and quantity, at the ranks of the tables."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["head", "flip_rate", "rank", "quantity", "mean", "std"])
        for (head, rate, rank, quantity), (mean, std) in stats.items():
            if rank in (0, *RANKS):
                writer.writerow([head, rate, rank, quantity, f"{mean:.5g}", f"{std:.3g}"])


def main(
    data: Annotated[str | None, typer.Option(help="Data folder; default: LIP_JAX_DATA.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
) -> None:
    """Measure, check every bound, and write spectra.csv, spectra.json and spectra.png."""
    start = time.perf_counter()
    clinc = load_clinc150(data)
    n, l = clinc.train_x.shape[0], int(clinc.train_y.max()) + 1
    factors = factorise(clinc.train_x)
    all_families = families(clinc.train_x, l, factors)
    heads = [family.name for family in all_families]

    batches = (batch for family in all_families for batch in measure(family, clinc, factors, num_classes=l))
    num_heads = len(heads) * (1 + len(SEEDS) * (1 + len(RATES)))
    rows = [row for batch in track(batches, "training heads", total=num_heads) for row in batch]
    checked = check_bounds(rows)
    stats = summarise(rows)
    judged = {head: verdicts(stats, head) for head in heads}

    out.mkdir(parents=True, exist_ok=True)
    write_csv(stats, out / "spectra.csv")
    record = {
        "command": COMMAND,
        "data": f"CLINC150 training set, n = {n}, q = {clinc.train_x.shape[1]}, l = {l}",
        "seeds": SEEDS,
        "seconds": round(time.perf_counter() - start),
        "machine": machine(),
        "bounds": checked,
        "observations": judged,
        "curves": {
            f"{head}, p = {rate:g}": {
                quantity: [float(f"{x:.4g}") for x in curve(stats, head, rate, quantity)]
                for quantity in ("singular_value", "phi_leading", "phi_trailing")
            }
            for head in heads
            for rate in (0.0, *RATES)
        },
    }
    write_json(record, out / "spectra.json")
    draw(stats, [heads[0], heads[1], heads[3]], out / "spectra.png")

    console = Console(width=200)
    console.print(spectra_table(stats, heads), bounds_table(stats, heads))
    for head, lines in judged.items():
        console.print(f"[bold]{head}[/bold]", *lines, sep="\n  ")
    floor, zeros = np.sqrt(2 * l * RATES[0]), int((factors.sigma == 0).sum())
    console.print(
        f"Every bound held in {checked['compared']} comparisons; {checked['not_vacuous']} of the bounds were "
        f"below 1, {checked['not_vacuous_at_rates']} of those at p ≥ {RATES[0]:g}.",
        f"The paper's bound and its filter form cannot fall below about √(2 l p) with balanced classes, as "
        f"the gap is at most\n‖W‖₂ ≤ ‖(XᵀX + λI)⁻¹Xᵀ‖₂ √(n/l): {floor:.2f} at p = {RATES[0]:g}, at "
        f"any rank and ridge.",
        f"At λ = 0 the paper's is infinite: {zeros} singular values of the features are 0 in float32.",
        sep="\n",
    )


if __name__ == "__main__":
    typer.run(main)
