"""The observations of the LIP paper on CLINC150: spectra, angles and their bounds, accuracy by rank [si2025].

    python -m benchmarks.spectra [spectra|ranks|render] --data DIR

The command fails if a measured angle exceeds a bound.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import track

import lip_jax
from benchmarks import frame
from benchmarks.data import Dataset, Part, corrupt, load_clinc150
from benchmarks.frame import Benchmark, Cell, Draw, Measured, Record, Summary
from benchmarks.heads import head_of, right, train_overfitted, train_regularised
from lip_jax import Calibrated, Head, Published, plot
from lip_jax.bounds import compare_heads
from lip_jax.bounds.angles import ridge_bounds
from lip_jax.methods import Fit
from lip_jax.numerics.linalg import svd_tolerance
from lip_jax.plot import COLORS
from lip_jax.rows.labels import Rows
from lip_jax.spectrum import SvdSplit
from lip_jax.sums.ridge import ridge_factors, ridge_solution

RATES = (0.05, 0.1, 0.2, 0.3, 0.4)
CONTROL_RATE = 0.001
SEEDS = 3
RANKS = (10, 37, 75, 112, 140, 149, 150)
BOUNDS = {
    "wedin_own": "Wedin, own gap",
    "wedin_mixed": "Wedin, mixed gap",
    "wedin_mixed_rescaled": "Wedin, mixed gap, rescaled",
    "filter": "filter form",
    "paper": "paper",
}


class Recipe(NamedTuple):
    """How a head is trained: `softmax` with decay by C, `ridge` with λ/n, or `overfitted`, without decay."""

    kind: str
    strength: float = 0.0

    def __str__(self) -> str:
        named = {"softmax": f"softmax C={self.strength:g}", "ridge": f"ridge λ/n={self.strength:g}"}
        return named.get(self.kind, self.kind)

    def fit(self, feats: np.ndarray, labels: jax.Array, l: int, seed: int = 0) -> Head:
        """The head; a ridge head is `(XᵀX + λI)⁻¹XᵀY`, at λ = 0 the minimum-norm least-squares solution."""
        if self.kind == "overfitted":
            return head_of(train_overfitted(jax.random.key(seed), feats, labels, num_classes=l))
        if self.kind == "softmax":
            return head_of(train_regularised(feats, labels, num_classes=l, c=self.strength))
        factors = ridge_factors(jnp.asarray(feats), labels, None, l, intercept=False)
        return Head(ridge_solution(factors, jnp.float32(self.strength * len(feats)))[0], jnp.zeros(l))


COMPARED = (*(Recipe("softmax", c) for c in (0.01, 0.001)), *(Recipe("ridge", x) for x in (0.0, 0.01, 1.0)))
# Refitted at every rank, at these rates, by both methods.
REFITTED = (*COMPARED[:2], Recipe("overfitted"))
RANK_RATES = (0.05, 0.1, 0.2, 0.4)
METHODS = {"published": Published(), "calibrated": Calibrated()}


def noisy_labels(train: Part, rate: float, seed: int, l: int) -> jax.Array:
    """One key for all rates: the labels wrong at a lower rate are wrong at the higher ones too."""
    return corrupt(("symmetric", rate), seed, [train], l)[0]


def determined(*splits: SvdSplit) -> int:
    """How many components every head has: weight decay gives a softmax head l − 1 (the gauge)."""
    least = lambda split: svd_tolerance(split.s, split.u.shape[0], split.vt.shape[1])
    return min(int((split.s > least(split)).sum()) for split in splits)


def spectrum_changes(clean: SvdSplit, noisy: SvdSplit) -> dict[str, float]:
    """How the first and the last quarter of the singular values changed, on average.

    `ratio` is `s'_i / s_i`, `change` is `|s'_i / s_i − 1|`, `shape_change` the same with both spectra scaled
    to `Σ s² = 1`, since noise shrinks a head as a whole and that turns nothing.
    """
    r = determined(clean, noisy)
    ratio = noisy.s[:r] / clean.s[:r]
    shape, values = ratio * jnp.linalg.norm(clean.s) / jnp.linalg.norm(noisy.s), {}
    for part, block in (("leading", slice(None, r // 4)), ("trailing", slice(r - r // 4, r))):
        values[f"ratio_{part}"] = float(ratio[block].mean())
        values[f"change_{part}"] = float(jnp.abs(ratio[block] - 1).mean())
        values[f"shape_change_{part}"] = float(jnp.abs(shape[block] - 1).mean())
    return values


def curves_of(clean: SvdSplit, noisy: SvdSplit) -> dict[str, np.ndarray]:
    """Singular values, and φ at every k of the right vectors that both heads have; chance is k/r.

    `phi_leading` and `phi_trailing` are φ(k, k) of the first and of the last k: blocks of one size, as a
    complement turns by the same angle.
    """
    r = determined(clean, noisy)
    v, v_noisy = clean.vt[:r].T, noisy.vt[:r].T
    phi = lambda *bases: np.diagonal(lip_jax.spectrum.subspace_similarity_grid(*bases))
    trailing = phi(v[:, ::-1], v_noisy[:, ::-1])
    return {"singular_value": np.asarray(noisy.s), "phi_leading": phi(v, v_noisy), "phi_trailing": trailing}


def angles_of(kernel: jax.Array, noisy: jax.Array, ranks: jax.Array) -> dict[str, Any]:
    """`sin θ` of the leading subspaces on the side where it is larger, and Wedin's bounds, by rank.

    With the mixed gap it is the better of the two roles the heads can play. Rescaling a kernel turns none of
    its subspaces, so `c W'` bounds the same angle as `W'`; the c that brings it closest to `W` takes the
    shrinkage out of `‖W − W'‖₂`.
    """
    found = compare_heads(kernel, noisy, ranks)
    scaled = jnp.vdot(kernel, noisy) / jnp.vdot(noisy, noisy) * noisy

    def mixed(other: jax.Array) -> jax.Array:
        both = compare_heads(kernel, other, ranks), compare_heads(other, kernel, ranks)
        return jnp.minimum(*(angles.bounds["Wedin, mixed gap"] for angles in both))

    return {
        "sin_theta": jnp.maximum(found.feats_side, found.class_side),
        "wedin_own": found.bounds["Wedin, own gap"],
        "wedin_mixed": mixed(noisy),
        "wedin_mixed_rescaled": mixed(scaled),
    }


def feature_bounds(
    sigma: jax.Array, clean: SvdSplit, noisy: SvdSplit, ranks: jax.Array, **case: Any
) -> dict[str, jax.Array]:
    """The paper's bound and its filter form by rank, with the larger of the two mixed gaps."""
    roles = (clean.s, noisy.s), (noisy.s, clean.s)
    bound = lambda form, pair: ridge_bounds(sigma, *pair, ranks, form=form, **case)
    return {form: jnp.minimum(*(bound(form, pair) for pair in roles)) for form in ("paper", "filter")}


def measure(
    recipe: Recipe,
    data: Dataset,
    seeds: Sequence[int],
    rates: Sequence[float] = (CONTROL_RATE, *RATES),
    ranks: Sequence[int] = RANKS,
) -> Iterator[Draw]:
    """The clean head, then one noisy head at a time: figures at the ranks, and whole curves."""
    (train, _, test), l = data.parts, int(data.train_y.max()) + 1
    sigma = lip_jax.bounds.feature_singular_values(train.x)
    sizes = {"num_samples": len(train.y), "num_classes": l, "ridge": recipe.strength * len(train.y)}
    clean = recipe.fit(train.x, jnp.asarray(train.y), l)
    split = lip_jax.svd_split(clean.kernel, 0)

    def compared(head: Head, noisy: SvdSplit, rate: float, seed: int, angles: dict[str, Any]) -> Draw:
        values = {"accuracy": float(right(head, test).mean()), **spectrum_changes(split, noisy)}
        curves, pairs = curves_of(split, noisy), lambda held: zip(ranks, held, strict=True)
        values |= {f"{name} {k}": float(x[k - 1]) for name, x in curves.items() for k in ranks if k <= len(x)}
        values |= {f"{name} {k}": float(x) for name, held in angles.items() for k, x in pairs(held)}
        return Draw(Cell("CLINC150", "symmetric", rate, str(recipe)), seed, values, curves=curves)

    yield compared(clean, split, 0.0, 0, {})
    for seed, rate in product(seeds, rates):
        labels = noisy_labels(train, rate, seed, l)
        head = recipe.fit(train.x, labels, l, seed)
        noisy = lip_jax.svd_split(head.kernel, 0)
        angles = angles_of(clean.kernel, head.kernel, jnp.array(ranks))
        if recipe.kind == "ridge":
            flip_rate = float((labels != train.y).mean())
            angles |= feature_bounds(sigma, split, noisy, jnp.array(ranks), flip_rate=flip_rate, **sizes)
        yield compared(head, noisy, rate, seed, angles)


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
        raise AssertionError(f"{len(broken)} bounds fail; first (cell, bound, value, sin θ): {broken[0]}")
    informative = [cell for cell, _, value, _ in compared if value < 1]
    at_rates = sum(cell.rate in RATES for cell in informative)
    return {"compared": len(compared), "not_vacuous": len(informative), "not_vacuous_at_rates": at_rates}


def spectra(data: str | None, seeds: int | None) -> Measured:
    """Every head at every rate."""
    held, count = load_clinc150(data), seeds or SEEDS
    draws = chain.from_iterable(measure(recipe, held, range(count)) for recipe in COMPARED)
    total = len(COMPARED) * (1 + count * (1 + len(RATES)))
    found = list(track(draws, "training heads", total=total))
    return {"bounds": check_bounds(found), **frame.as_json(frame.summarise(found))}


@jax.jit
def gains(head: Head, rows: Rows, test: Rows) -> dict[str, jax.Array]:
    """By method, accuracy at ranks 0 to r less that of the head, in points."""
    right = lambda logits: (logits.argmax(axis=1) == test.labels).mean(dtype=jnp.float32)
    paths = {name: method.path(head, Fit(rows, None, None, jnp.int32(0))) for name, method in METHODS.items()}
    # A path goes from the full rank, which is the head, to rank 0.
    scores = {name: path.over_logits(test.feats, right)[::-1] for name, path in paths.items()}
    return {name: 100 * (score - score[-1]) for name, score in scores.items()}


def ranks(data: str | None, seeds: int | None) -> Measured:
    """Softmax heads on noisy labels, refitted at every rank."""
    held, draws = load_clinc150(data), []
    l, (train, _, test) = int(held.train_y.max()) + 1, held.parts
    settings = list(product(REFITTED, RANK_RATES, range(seeds or SEEDS)))
    for recipe, rate, seed in track(settings, "refitting heads"):
        labels = noisy_labels(train, rate, seed, l)
        rows = (Rows(jnp.asarray(x), jnp.asarray(y), None) for x, y in ((train.x, labels), test))
        found = gains(recipe.fit(train.x, labels, l, seed), *rows)
        cell = Cell("CLINC150", "symmetric", rate, str(recipe))
        draws.append(Draw(cell, seed, {}, curves={name: np.asarray(gain) for name, gain in found.items()}))
    return frame.as_json(frame.summarise(draws))


def reach(holds: Sequence[bool]) -> str:
    """Where a claim holds along `RATES`, in words."""
    if all(holds):
        return "at every p"
    first = list(holds).index(False)
    return f"up to p = {RATES[first - 1]:g} only" if first else "not even at p = 0.05"


def more(first: str, second: str) -> Callable:
    """Whether one figure of a cell exceeds another by more than both standard deviations."""
    return lambda at: at(first).mean - at(first).std > at(second).mean + at(second).std


# The paper's observations: a singular value within 10% has kept, and φ of 0.9 preserves a subspace.
CLAIMS: dict[str, Callable] = {
    "leading quarter of s within 10% of clean on average": lambda at: at("change_leading").mean <= 0.1,
    "trailing quarter changes more than the leading": more("change_trailing", "change_leading"),
    "the same once both spectra have one norm": more("shape_change_trailing", "shape_change_leading"),
    "φ(37, 37) of the leading vectors ≥ 0.9": lambda at: at("phi_leading 37").mean >= 0.9,
    "φ(37, 37) of the trailing vectors lower": more("phi_leading 37", "phi_trailing 37"),
}


# Beside the head and its rate, in the order of the page.
COLUMNS = (
    *("accuracy", "ratio_leading", "ratio_trailing", "shape_change_leading", "shape_change_trailing"),
    *("phi_leading 10", "phi_trailing 10", "phi_leading 37", "phi_trailing 37"),
)


def heads_of(record: Record, name: str) -> dict[str, list[Summary]]:
    """The cells of a section by head."""
    return frame.grouped(frame.summaries(record, [name]), lambda row: row.cell.regime)


def tables(record: Record) -> dict[str, str]:
    """What was measured, by section."""
    named = {"spectra": spectra_tables, "ranks": rank_table}
    return {name: text for part in record for name, text in named[part](record).items()}


def rank_table(record: Record) -> dict[str, str]:
    """At which rank each method does best on the mean over seeds, and what it gains there and elsewhere."""
    rows = []
    for row in frame.summaries(record, ["ranks"]):
        for method, gain in row.curves.items():
            best, r = int(np.argmax(gain)), len(gain) - 1
            at = (f"{gain[rank]:+.2f}" for rank in (best, 3 * r // 4, 0))
            rows.append((row.cell.regime, f"{row.cell.rate:g}", method, best, *at))
    return {"gains": frame.rows_of(rows)}


def spectra_tables(record: Record) -> dict[str, str]:
    """Observations, spectra and φ against the clean head, and every angle beside its bounds."""
    value = lambda x: "–" if x is None else f"**{x:.3g}**" if x < 1 else f"{x:.3g}"
    observed, changes, angles = [], [], []
    for head, rows in heads_of(record, "spectra").items():
        noisy = [row for row in rows if row.cell.rate in RATES]
        observed.append((head, *(reach([holds(row.at) for row in noisy]) for holds in CLAIMS.values())))
        for row in rows:
            where, mean = (head, f"{row.cell.rate:g}"), row.mean
            if row.cell.rate != CONTROL_RATE:
                changes.append((*where, *(f"{x.mean:.3f} ± {x.std:.3f}" for x in map(row.at, COLUMNS))))
            for k in RANKS if row.cell.rate in (CONTROL_RATE, RATES[0], RATES[-1]) else ():
                bounds = (value(mean.get(f"{name} {k}")) for name in BOUNDS)
                angles.append((*where, k, f"{mean[f'sin_theta {k}']:.3f}", *bounds))
    counts = record["spectra"]["bounds"]
    counted = f"{counts['compared']:,} comparisons; {counts['not_vacuous']} of the bounds were below 1, "
    counted += f"{counts['not_vacuous_at_rates']} of those at p ≥ {RATES[0]:g}"
    parts = {"observed": frame.table(("head", *CLAIMS), observed), "counted": counted}
    bounds = frame.table(("head", "p", "rank", "sin θ", *BOUNDS.values()), angles)
    return parts | {"spectra": frame.rows_of(changes), "bounds": bounds}


def draw(record: Record) -> Figure:
    """One row a head: spectra, φ, and sin θ with its bounds; then accuracy by rank."""
    figure = Figure(figsize=(16, 20), layout="constrained", dpi=80)
    *above, below = figure.subplots(4, 3)
    by_head = heads_of(record, "spectra")
    # The last of them has every bound.
    for axes, head in zip(above, [list(by_head)[i] for i in (0, 1, 3)] if by_head else (), strict=False):
        draw_head(axes, head, {row.cell.rate: row for row in by_head[head] if row.cell.rate != CONTROL_RATE})
    for ax, (head, rows) in zip(below, heads_of(record, "ranks").items(), strict=False):
        for row, color in zip(rows, COLORS[1:], strict=False):
            ax.plot(row.curves["published"], color=color, label=f"p = {row.cell.rate:g}")
            ax.plot(row.curves["calibrated"], ":", color=color)
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.set_yscale("symlog", linthresh=1)
        title = f"{head}: gain of published LIP, dotted of calibrated"
        ax.set(title=title, xlabel="rank (components preserved)", ylabel="points of test accuracy")
    below[0].legend(frameon=False, loc="lower right")
    return figure


def draw_head(axes: Sequence[Axes], head: str, rows: dict[float, Summary]) -> None:
    """Spectra and φ at every rate, and angles at the lowest."""
    left, middle, last = axes
    shown, mean = len(rows[RATES[0]].curves["phi_leading"]), rows[RATES[0]].mean
    k, ranks = np.arange(1, shown + 1), np.array([rank for rank in RANKS if rank <= shown])
    curves = {f"p = {rate:g}": np.array(row.curves["singular_value"][:shown]) for rate, row in rows.items()}
    plot.spectrum(curves, ax=left)
    left.set(title=f"{head}: spectra")
    for name, style, label in (("phi_leading", "-", "first k"), ("phi_trailing", ":", "last k")):
        for rate, color in zip(RATES, COLORS[1:], strict=False):
            middle.plot(k, rows[rate].curves[name], color=color, linestyle=style)
        middle.plot([], [], color="black", linestyle=style, label=label)
    middle.plot(k, k / shown, color="0.5", linestyle="--", label="chance")
    middle.set(title=f"{head}: subspaces, against p = 0", xlabel="k", ylabel="φ(k, k)", ylim=(0, 1.02))
    middle.legend(frameon=False, loc="lower right")
    by_rank = lambda name: np.array([mean[f"{name} {rank}"] for rank in ranks])
    bounds = {label: by_rank(name) for name, label in BOUNDS.items() if f"{name} {ranks[0]}" in mean}
    plot.bound_against_measured({"measured": by_rank("sin_theta")}, bounds, ranks=ranks, ax=last)
    last.set(title=f"{head}: largest angle, p = {RATES[0]:g}")


SECTIONS = {"spectra": spectra, "ranks": ranks}
BENCHMARK = Benchmark("spectra", SECTIONS, lambda record: [], tables, draw)

if __name__ == "__main__":
    BENCHMARK.run()
