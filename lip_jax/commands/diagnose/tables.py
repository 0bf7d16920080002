"""A diagnosis as tables and sentences."""

import numpy as np
from rich.console import Console

from lip_jax.bounds.angles import Angles
from lip_jax.commands.console import (
    bound_in_words,
    metrics_in_words,
    print_angles,
    print_similarity,
    print_table,
    print_vacuous,
    spelled,
    thinned,
)
from lip_jax.commands.diagnose.compute import Comparison, Diagnosis, OnRows

MOST_RANKS = 8


def print_diagnosis(console: Console, found: Diagnosis) -> None:
    """Print the whole diagnosis, at up to `MOST_RANKS` ranks."""
    (q, l), r = found.shape, found.singular_values.shape[0]
    bias = "with a bias" if found.bias else "without a bias"
    console.print(
        f"{found.checkpoint}: head {found.head}, {q} features, {l} classes, {found.dtype}, {bias}\n",
        soft_wrap=True,
    )
    shown = thinned(1, r, MOST_RANKS)
    _print_spectrum(console, found, shown)
    if found.against is not None:
        most = found.against.singular_values.shape[0]
        _print_comparison(console, found.against, [k for k in shown if k <= most], l)
    if found.rows is not None:
        _print_rows(console, found.rows, shown)


def _print_spectrum(console: Console, found: Diagnosis, shown: list[int]) -> None:
    s = np.asarray(found.singular_values, np.float64)
    energy = np.cumsum(s**2) / max(np.sum(s**2), np.finfo(float).tiny)
    print_table(
        console,
        f"Spectrum, {len(shown)} of {s.size} components",
        ["component", "singular value", "energy up to here"],
        [[str(k), f"{s[k - 1]:.4g}", f"{energy[k - 1]:.1%}"] for k in shown],
    )
    held = ", ".join(f"{share:.0%} in {k}" for share, k in found.rank_for_energy.items())
    console.print(
        f"Effective rank {float(found.effective_rank.entropy):.1f} by entropy, "
        f"{float(found.effective_rank.stable):.1f} stable, of {s.size}. Energy: {held} components.\n"
        f"Components at rounding level, which a refit keeps as they are: {found.null_components}.\n"
    )


def _print_comparison(console: Console, found: Comparison, shown: list[int], l: int) -> None:
    title = f"Similarity φ(k,k) of leading class directions to those of {found.checkpoint}, head {found.head}"
    print_similarity(console, title, {"φ(k,k)": np.asarray(found.similarity)}, shown, l)
    if found.angles is None:
        console.print("The heads have inputs of different width, so there are no angles between them.\n")
        return
    at = np.array(shown) - 1
    angles = Angles(
        np.asarray(found.angles.feats_side)[at],
        np.asarray(found.angles.class_side)[at],
        {name: np.asarray(values)[at] for name, values in found.angles.bounds.items()},
    )
    print_angles(console, "Angles between leading subspaces of the two, beside Wedin's bounds", angles, shown)


def _print_rows(console: Console, found: OnRows, shown: list[int]) -> None:
    console.print(f"On {found.labelled} labelled rows, by their labels as they are", style="bold")
    console.print(
        f"{metrics_in_words(found.metrics)}\n\nQuality: {found.quality}\n\n{spelled(str(found.memorised))}\n",
        soft_wrap=True,
    )
    if not found.bounds:
        console.print("Bounds from features are left out: they need labelled rows without weights.\n")
        return
    bounds = {name: np.asarray(values)[np.array(shown) - 1] for name, values in found.bounds.items()}
    print_table(
        console,
        f"How far {found.wrong:.1%} wrong labels can turn a ridge readout of them (λ = {found.ridge:.3g})",
        ["k", *(f"sin θ, {name} bound" for name in bounds)],
        [
            [str(k), *(bound_in_words(float(values[i])) for values in bounds.values())]
            for i, k in enumerate(shown)
        ],
    )
    console.print(
        "They hold for a ridge readout of these rows against one of the true labels. The true labels are not "
        "known, so twice the bound from the readout's own gap is shown. They say nothing of the head itself."
    )
    print_vacuous(console, bounds)
