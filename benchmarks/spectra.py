"""What label noise does to the spectrum of a head, on CLINC150, and how far the bounds see it.

    python -m benchmarks.spectra [spectra|render] --data DIR

The command fails if a measured angle exceeds a bound.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track

import lip_jax
from benchmarks import frame
from benchmarks.data import Dataset, load_clinc150
from benchmarks.frame import Benchmark, Cell, Draw, Measured, Record, Spread, Summary, Verdict
from benchmarks.heads import head_of, train_regularised
from lip_jax import Head, plot
from lip_jax.plot import COLORS
from lip_jax.spectrum import SvdSplit

RATES = (0.05, 0.1, 0.2, 0.3, 0.4)
CONTROL_RATE = 0.001
SEEDS = 3
RANKS = (10, 37, 75, 112, 140, 149, 150)
STRENGTHS = (0.01, 0.001)  # C of the softmax heads
RIDGES = (0.0, 0.01, 1.0)  # λ/n of the ridge heads
KEPT = 0.1  # a singular value within 10% of the clean one has kept
PRESERVED = 0.9  # a subspace with φ of at least 0.9 is preserved
BOUNDS = ("paper", "filter", "wedin_own", "wedin_mixed", "wedin_mixed_rescaled")
# What is drawn at every rank, and not only at those of the tables.
CURVES = ("singular_value", "phi_leading", "phi_trailing")


class Factors(NamedTuple):
    """`X = P diag(σ) Qᵀ`, numerically zero singular values set to 0, as the bounds have them."""

    p: jax.Array
    sigma: jax.Array
    qt: jax.Array


def factorise(feats: np.ndarray) -> Factors:
    """The thin SVD of the features, which serves every ridge and labelling."""
    p, _, qt = jnp.linalg.svd(jnp.asarray(feats), full_matrices=False)
    return Factors(p, lip_jax.bounds.feature_singular_values(feats), qt)


class Recipe(NamedTuple):
    """A way to train a head from labels, and its `λ` and factors where it is a ridge head."""

    name: str
    fit: Callable[[jax.Array], Head]
    ridge: float | None = None
    factors: Factors | None = None


def softmax(feats: np.ndarray, num_classes: int, c: float) -> Recipe:
    """A softmax head with weight decay."""
    train = partial(train_regularised, feats, num_classes=num_classes, c=c)
    return Recipe(f"softmax C={c:g}", lambda labels: head_of(train(labels=labels)))


def ridge(factors: Factors, num_classes: int, share: float) -> Recipe:
    """`(XᵀX + λI)⁻¹XᵀY = Q diag(σ/(σ² + λ)) PᵀY`; at λ = 0 the minimum-norm least-squares head."""
    p, sigma, qt = factors
    strength, nonzero = share * p.shape[0], sigma > 0
    gain = jnp.where(nonzero, sigma / jnp.where(nonzero, sigma**2 + strength, 1), 0)

    def fit(labels: jax.Array) -> Head:
        weighted = gain[:, None] * jax.ops.segment_sum(p, jnp.asarray(labels), num_classes).T
        kernel = jnp.matmul(qt.T, weighted, precision=jax.lax.Precision.HIGHEST)
        return Head(kernel, jnp.zeros(num_classes))

    return Recipe(f"ridge λ/n={share:g}", fit, strength, factors)


def determined(*splits: SvdSplit) -> int:
    """How many components every head has: weight decay gives a softmax head l − 1 (the gauge)."""
    eps = np.finfo(np.float32).eps
    least = lambda split: eps * max(split.u.shape[0], split.vt.shape[1]) * split.s[0]
    return min(int((split.s > least(split)).sum()) for split in splits)


def spectrum_changes(clean: SvdSplit, noisy: SvdSplit) -> dict[str, float]:
    """How the first and the last quarter of the singular values changed, on average.

    `ratio` is `s'_i / s_i`, `change` is `|s'_i / s_i − 1|`, `shape_change` the same with both spectra scaled
    to `Σ s² = 1`, since noise shrinks a head as a whole and that turns nothing.
    """
    r = determined(clean, noisy)
    ratio = noisy.s[:r] / clean.s[:r]
    shape = ratio * jnp.linalg.norm(clean.s) / jnp.linalg.norm(noisy.s)
    effective = lip_jax.spectrum.effective_rank(noisy.s)
    values = {"effective_rank_entropy": effective.entropy, "effective_rank_stable": effective.stable}
    values["ratio_first"] = ratio[0]
    for part, block in (("leading", slice(None, r // 4)), ("trailing", slice(r - r // 4, r))):
        values[f"ratio_{part}"] = ratio[block].mean()
        values[f"change_{part}"] = jnp.abs(ratio[block] - 1).mean()
        values[f"shape_change_{part}"] = jnp.abs(shape[block] - 1).mean()
    return {name: float(value) for name, value in values.items()}


def curves(clean: SvdSplit, noisy: SvdSplit) -> dict[str, np.ndarray]:
    """Singular values, energy, and φ at every k, of the components both heads have.

    `phi_leading`, `phi_trailing`: φ(k, k) of the first and of the last k right vectors; chance is k/r. Blocks
    of one size are compared, not a subspace with its complement, which turns by the same angle.
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
    first, energy = np.arange(r), np.cumsum(np.asarray(noisy.s) ** 2)
    found = {name: np.diagonal(grid) for name, grid in grids.items()}
    found["phi_held"] = grids["phi_leading"][first, np.maximum(first, 3 * r // 4 - 1)]
    return found | {"singular_value": np.asarray(noisy.s), "energy_beyond": 1 - energy / energy[-1]}


def sin_theta(clean: SvdSplit, noisy: SvdSplit, rank: int) -> float:
    """Sine of the largest angle between the leading subspaces, on the side where it is larger."""
    left = lip_jax.spectrum.principal_angles(clean.u[:, :rank], noisy.u[:, :rank])
    right = lip_jax.spectrum.principal_angles(clean.vt[:rank].T, noisy.vt[:rank].T)
    return float(jnp.sin(jnp.maximum(left[0], right[0])))


@jax.jit
def wedin_bounds(kernel: jax.Array, noisy: jax.Array, ranks: jax.Array) -> dict[str, jax.Array]:
    """Wedin's bounds at many ranks; with the mixed gap the better of the two roles the heads can play.

    Rescaling a kernel turns none of its subspaces, so `c W'` bounds the same angle as `W'`; the c that brings
    it closest to `W` takes the shrinkage out of `‖W − W'‖₂`.
    """
    bound = lambda *args, **options: lip_jax.bounds.wedin_bound(*args, **options).value
    mixed = lambda rank, other: jnp.minimum(bound(kernel, other, rank), bound(other, kernel, rank))
    scale = jnp.vdot(kernel, noisy) / jnp.vdot(noisy, noisy)
    return jax.vmap(
        lambda rank: {
            "wedin_own": bound(kernel, noisy, rank, gap="own"),
            "wedin_mixed": mixed(rank, noisy),
            "wedin_mixed_rescaled": mixed(rank, scale * noisy),
        }
    )(ranks)


def feature_bounds(
    recipe: Recipe, clean: SvdSplit, noisy: SvdSplit, ranks: jax.Array, flip_rate: float
) -> dict[str, jax.Array]:
    """The paper's bound and its filter form at many ranks, at the flip rate that was realised."""
    assert recipe.factors is not None
    n, l = recipe.factors.p.shape[0], clean.vt.shape[1]
    case: dict[str, Any] = {"num_samples": n, "num_classes": l, "flip_rate": flip_rate, "ridge": recipe.ridge}
    case["singular_values"] = recipe.factors.sigma
    mixed = lip_jax.bounds.mixed_gap

    def at(rank: jax.Array) -> dict[str, jax.Array]:
        gap = jnp.maximum(mixed(clean.s, noisy.s, rank), mixed(noisy.s, clean.s, rank))
        return {
            form: lip_jax.sin_theta_bound(gap=gap, form=form, **case).value for form in ("paper", "filter")
        }

    return jax.vmap(at)(ranks)


def measure(
    recipe: Recipe,
    data: Dataset,
    seeds: Sequence[int],
    rates: Sequence[float] = (CONTROL_RATE, *RATES),
    ranks: Sequence[int] = RANKS,
) -> Iterator[tuple[Draw, dict[str, np.ndarray]]]:
    """The clean head, then one noisy head at a time: a draw with figures at the ranks, and whole curves."""

    def compared(head: Head, rate: float, seed: int, angles: dict[str, float]) -> tuple[Draw, dict]:
        assert head.bias is not None
        said = jnp.argmax(jnp.asarray(data.test_x) @ head.kernel + head.bias[None, :], axis=1)
        noisy = lip_jax.svd_split(head.kernel, 0)
        values = {"accuracy": float((said == data.test_y).mean()), **spectrum_changes(split, noisy)}
        drawn = curves(split, noisy)
        at = {f"{name} {k}": float(x[k - 1]) for name, x in drawn.items() for k in ranks if k <= len(x)}
        return Draw(Cell("CLINC150", "symmetric", rate, recipe.name), seed, values | at | angles), drawn

    num_classes, of_ranks = int(data.train_y.max()) + 1, jnp.array(ranks)
    clean = recipe.fit(jnp.asarray(data.train_y))
    split = lip_jax.svd_split(clean.kernel, 0)
    yield compared(clean, 0.0, 0, {})
    for seed in seeds:
        for rate in rates:
            # One key for all rates: the labels wrong at a lower rate are wrong at the higher ones too.
            key = jax.random.key(seed)
            labels = lip_jax.noise.symmetric(key, data.train_y, rate, num_classes=num_classes)
            head = recipe.fit(labels)
            noisy = lip_jax.svd_split(head.kernel, 0)
            bounds = wedin_bounds(clean.kernel, head.kernel, of_ranks)
            if recipe.factors is not None:
                flipped = float((labels != data.train_y).mean())
                bounds |= feature_bounds(recipe, split, noisy, of_ranks, flipped)
            angles = {f"sin_theta {rank}": sin_theta(split, noisy, rank) for rank in ranks}
            angles |= {
                f"{name} {k}": float(x)
                for name, held in bounds.items()
                for k, x in zip(ranks, held, strict=True)
            }
            yield compared(head, rate, seed, angles)


def check_bounds(draws: Sequence[Draw]) -> dict[str, int]:
    """Count the comparisons of sin θ with a bound, and the informative ones; raise if one fails."""
    compared = [
        (draw.cell, name, value, draw.values[f"sin_theta {name.split()[1]}"])
        for draw in draws
        for name, value in draw.values.items()
        if name.split()[0] in BOUNDS
    ]
    # Angles of float32 kernels are known to about eps · s_1 / gap, at most 1e-4 at these ranks.
    if broken := [item for item in compared if not item[3] <= item[2] + 1e-4]:
        raise AssertionError(
            f"{len(broken)} bounds do not hold; first (cell, bound, value, sin θ) {broken[0]}"
        )
    informative = [cell for cell, _, value, _ in compared if value < 1]
    at_rates = sum(cell.rate in RATES for cell in informative)
    return {"compared": len(compared), "not_vacuous": len(informative), "not_vacuous_at_rates": at_rates}


def spectra(data: str | None, seeds: int | None) -> Measured:
    """Every head at every rate."""
    held, count = load_clinc150(data), seeds or SEEDS
    l, factors = int(held.train_y.max()) + 1, factorise(held.train_x)
    recipes = [softmax(held.train_x, l, c) for c in STRENGTHS] + [
        ridge(factors, l, share) for share in RIDGES
    ]
    batches = chain.from_iterable(measure(recipe, held, range(count)) for recipe in recipes)
    total = len(recipes) * (1 + count * (1 + len(RATES)))
    draws, drawn = zip(*track(batches, "training heads", total=total), strict=True)
    return {"bounds": check_bounds(draws), **frame.as_json(with_curves(draws, drawn))}


def with_curves(draws: Sequence[Draw], drawn: Sequence[dict[str, np.ndarray]]) -> Iterator[Summary]:
    """The cells, with the means of their curves."""
    for row in frame.summarise(draws):
        mine = [held for draw, held in zip(draws, drawn, strict=True) if draw.cell == row.cell]
        mean = {name: np.mean([held[name] for held in mine], axis=0) for name in CURVES}
        yield row._replace(curves={name: [float(f"{x:.4g}") for x in held] for name, held in mean.items()})


def reach(holds: Sequence[bool]) -> str:
    """Where a claim holds along `RATES`, in words."""
    if all(holds):
        return "at every p"
    first = list(holds).index(False)
    return f"up to p = {RATES[first - 1]:g} only" if first else "not even at p = 0.05"


def verdicts(record: Record) -> list[Verdict]:
    """The paper's two observations judged by the thresholds above, and the bounds."""
    found = []
    exceeds = lambda a, b: a.mean - a.std > b.mean + b.std
    k = RANKS[1]
    kept = lambda at: at("change_leading").mean <= KEPT
    more = lambda first, second: lambda at: exceeds(at(first), at(second))
    claims: dict[str, Callable[[Callable[[str], Spread]], bool]] = {
        f"leading quarter of s within {KEPT:.0%} of clean on average": kept,
        "trailing quarter changes more than the leading": more("change_trailing", "change_leading"),
        "the same once both spectra have one norm": more("shape_change_trailing", "shape_change_leading"),
        f"φ({k}, {k}) of the leading vectors ≥ {PRESERVED}": lambda at: (
            at(f"phi_leading {k}").mean >= PRESERVED
        ),
        f"φ({k}, {k}) of the trailing vectors lower": more(f"phi_leading {k}", f"phi_trailing {k}"),
    }
    for head, rows in frame.grouped(frame.summaries(record), lambda row: row.cell.regime).items():
        for claim, holds in claims.items():
            held = [holds(row.at) for row in rows if row.cell.rate in RATES]
            found.append(Verdict(f"{head}: {claim}", all(held), reach(held)))
    if "spectra" in record:
        counts = record["spectra"]["bounds"]
        figure = (
            f"in {counts['compared']:,} comparisons; {counts['not_vacuous']} of the bounds were below 1, "
            f"{counts['not_vacuous_at_rates']} of those at p ≥ {RATES[0]:g}"
        )
        found.append(Verdict("every bound holds", True, figure))
    return found


# Beside the head and its rate, in the order of the page.
COLUMNS = (
    *("accuracy", "ratio_first", "ratio_leading", "ratio_trailing", "shape_change_leading"),
    *("shape_change_trailing", "effective_rank_entropy", "phi_leading 10", "phi_trailing 10"),
    *("phi_leading 37", "phi_trailing 37", "phi_held 37"),
)


def tables(record: Record) -> dict[str, str]:
    """Spectra and φ against the clean head, and every angle beside its bounds."""
    value = lambda x: "–" if x is None else f"**{x:.3g}**" if x < 1 else f"{x:.3g}"
    changes, angles = [], []
    for row in frame.summaries(record):
        head, mean = (row.cell.regime, f"{row.cell.rate:g}"), row.mean
        if row.cell.rate != CONTROL_RATE:
            changes.append((*head, *(f"{x.mean:.3f} ± {x.std:.3f}" for x in map(row.at, COLUMNS))))
        for k in RANKS if row.cell.rate in (CONTROL_RATE, RATES[0], RATES[-1]) else ():
            bounds = (value(mean.get(f"{name} {k}")) for name in BOUNDS)
            angles.append((*head, k, f"{mean[f'sin_theta {k}']:.3f}", *bounds))
    return {"spectra": frame.rows_of(changes), "bounds": frame.rows_of(angles)}


# The bounds in Okabe and Ito's colours, as in lip_jax.plot; markers tell them apart without colour.
STYLES = {
    "sin_theta": (COLORS[6], "o", "measured sin θ"),
    "wedin_mixed": (COLORS[0], "s", "Wedin, mixed gap"),
    "wedin_mixed_rescaled": (COLORS[5], "^", "Wedin, mixed gap, rescaled"),
    "wedin_own": (COLORS[2], "v", "Wedin, own gap"),
    "filter": (COLORS[4], "D", "filter form"),
    "paper": (COLORS[1], "X", "paper"),
}


def draw(record: Record) -> Figure:
    """One row a head: spectra, φ, and sin θ with its bounds; the last head has every bound."""
    by_head = frame.grouped(frame.summaries(record), lambda row: row.cell.regime)
    heads = [list(by_head)[i] for i in (0, 1, 3)]
    figure = Figure(figsize=(16, 4.6 * len(heads)), layout="constrained", dpi=80)
    for axes, head in zip(figure.subplots(len(heads), 3), heads, strict=True):
        rows = {row.cell.rate: row for row in by_head[head]}
        drawn = {
            rate: {k: np.array(x) for k, x in (rows[rate].curves or {}).items()} for rate in (0.0, *RATES)
        }
        shown = len(drawn[RATES[0]]["phi_leading"])
        k = np.arange(1, shown + 1)
        spectra = {f"p = {rate:g}": held["singular_value"][:shown] for rate, held in drawn.items()}
        plot.spectrum(spectra, ax=axes[0]).set(title=f"{head}: spectra")
        for name, style, label in (("phi_leading", "-", "first k"), ("phi_trailing", ":", "last k")):
            for rate, color in zip(RATES, COLORS[1:], strict=False):
                axes[1].plot(k, drawn[rate][name], color=color, linestyle=style)
            axes[1].plot([], [], color="black", linestyle=style, label=label)
        axes[1].plot(k, k / shown, color="0.5", linestyle="--", label="chance")
        axes[1].set(title=f"{head}: subspaces, against p = 0", xlabel="k", ylabel="φ(k, k)", ylim=(0, 1.02))
        axes[1].legend(frameon=False, loc="lower right")
        ranks = [rank for rank in RANKS if rank <= shown]
        for name, (color, marker, label) in STYLES.items():
            values = [rows[RATES[0]].mean.get(f"{name} {rank}", np.nan) for rank in ranks]
            if np.isfinite(values).any():
                axes[2].semilogy(ranks, values, color=color, marker=marker, markersize=5, label=label)
        axes[2].axhline(1, color="0.5", linestyle="--")
        axes[2].annotate(
            "vacuous from here on", (RANKS[0], 1), (0, 3), textcoords="offset points", fontsize=8
        )
        title = f"{head}: largest angle, p = {RATES[0]:g}"
        axes[2].set(title=title, xlabel="rank", ylabel="sin θ and its bounds")
    lines, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower right", ncols=len(labels), title="right column")
    return figure


BENCHMARK = Benchmark("spectra", {"spectra": spectra}, verdicts, tables, draw)

if __name__ == "__main__":
    BENCHMARK.run()
