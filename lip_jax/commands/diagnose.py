"""`lip-jax diagnose`: what its spectrum, another head and the labels say of a head."""

import base64
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from rich.console import Console

import lip_jax
from lip_jax import plot
from lip_jax._types import Array
from lip_jax.bounds.angles import Angles, compare_heads, ridge_bounds
from lip_jax.commands import options
from lip_jax.commands.checkpoints import StoredHead, open_checkpoint, stored_head
from lip_jax.commands.console import (
    PLAIN,
    bound_in_words,
    metrics_in_words,
    print_angles,
    print_json,
    print_similarity,
    print_table,
    print_vacuous,
    spelled,
    thinned,
    told,
)
from lip_jax.commands.files import check_out, written_whole
from lip_jax.commands.rows import count_labelled, head_scores, read_rows, share_wrong
from lip_jax.methods.protocol import Head
from lip_jax.numerics.linalg import svd_tolerance
from lip_jax.rows.labels import Rows

MOST_RANKS = 8

ENERGIES = (0.5, 0.9, 0.99)

EXAMPLES = """Examples:

lip-jax diagnose digits_ckpt

lip-jax diagnose digits_ckpt --against clean_ckpt --feats train.npz --out report.html

lip-jax diagnose head.npz --feats feats.npy --labels labels.npy --json
"""


@dataclass(frozen=True)
class Comparison:
    """A head beside another.

    Attributes:
        path: The other checkpoint.
        head: The path of the head in it.
        s: Its spectrum, `(m,)`.
        similarity: `φ(i, j)` of this head and the other, `(r, m)`.
        angles: Angles and bounds at ranks 1 to r, where both have inputs of one width.
    """

    path: Path
    head: str
    s: Float[Array, "m"]
    similarity: Float[Array, "r m"]
    angles: Angles | None


@dataclass(frozen=True)
class OnRows:
    """A head and labels beside each other.

    Attributes:
        labelled: How many rows have a label.
        metrics: How the head does by these labels.
        quality: How far they can be trusted.
        memorised: Whether the head has memorised them.
        wrong: The estimated share of wrong labels.
        ridge: Strength of the ridge readout that the bounds are of; None where they are left out.
        bounds: How far so many wrong labels can have turned its leading subspaces, at ranks 1 to r.
    """

    labelled: int
    metrics: lip_jax.rows.Metrics
    quality: lip_jax.quality.LabelQuality
    memorised: lip_jax.quality.Memorisation
    wrong: float
    ridge: float | None
    bounds: dict[str, Float[Array, "r"]]


@dataclass(frozen=True)
class Diagnosis:
    """Everything `lip-jax diagnose` reports.

    Attributes:
        path: The checkpoint.
        head: The path of the head in it.
        shape: `(q, l)`.
        dtype: As it is stored.
        bias: Whether it has one.
        s: Singular values, `(r,)`.
        effective_rank: Two counts of the directions in use.
        energy_ranks: How many components hold the shares of energy in `ENERGIES`.
        null: How many singular values are rounding noise, so that refits keep them.
        against: The comparison with another head.
        rows: The comparison with labels.
    """

    path: Path
    head: str
    shape: tuple[int, int]
    dtype: str
    bias: bool
    s: Float[Array, "r"]
    effective_rank: lip_jax.spectrum.EffectiveRank
    energy_ranks: Int[Array, "3"]
    null: int
    against: Comparison | None
    rows: OnRows | None


def diagnose(
    checkpoint: options.CheckpointPath,
    feats: options.OptionalFeats = None,
    labels: options.Labels = None,
    weights: options.Weights = None,
    validation: options.Validation = None,
    validation_labels: options.ValidationLabels = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT", help="Another checkpoint to compare the head with: a clean one, say."
        ),
    ] = None,
    against_head: Annotated[
        str | None, typer.Option(metavar="PATH", help="The head in it, if it has another name.")
    ] = None,
    head: options.HeadPath = None,
    layout: options.LayoutOption = "q l",
    num_classes: options.NumClasses = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The report to write: a picture (.png, .svg, .pdf), or tables and picture in one .html.",
        ),
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Look at a head: its spectrum, another head beside it, and how far the labels can be trusted.

    With --against: how similar their leading subspaces are, and the bounds on the angle between them. With
    --feats and --labels: the quality of the labels, and whether the head has memorised them; --validation
    with rows kept from training makes that sharper. Nothing is changed.
    """
    with told("diagnose"):
        if out is not None:
            if out.suffix.lower() != ".html":
                plot.check_path(out)
            inputs = (checkpoint, against, feats, labels, weights, validation, validation_labels)
            check_out(out, force=force, inputs=inputs)
        rows = None if feats is None else read_rows(feats, labels, weights)
        if rows is None and (labels, weights, validation) != (None, None, None):
            raise ValueError("--labels, --weights and --validation go with --feats, which is missing.")
        held = options.validation_rows(validation, validation_labels)
        found = stored_head(open_checkpoint(checkpoint), head, layout, num_classes, rows=rows)
        other = None
        if against is not None:
            l = found.kernel.shape[1]
            name = against_head or head
            other = against, stored_head(open_checkpoint(against), name, layout, l, rows=None)
        elif against_head is not None:
            raise ValueError("--against-head came without --against, the checkpoint it is in.")
        diagnosis = diagnosed(checkpoint, found, other, rows, held)
        if out is not None:
            with written_whole(out, force=force) as fresh:
                _write_report(diagnosis, fresh)
    if as_json:
        print_json(_as_dict(diagnosis) | {"out": out})
        return
    console = Console(**PLAIN)
    _print(console, diagnosis)
    if out is not None:
        console.print(f"Report: {out}", soft_wrap=True)


def diagnosed(
    path: Path, head: StoredHead, other: tuple[Path, StoredHead] | None, rows: Rows | None, held: Rows | None
) -> Diagnosis:
    """All that is reported, computed."""
    s = lip_jax.svd_split(head.kernel, 0).s
    q, l = head.kernel.shape
    return Diagnosis(
        path=path,
        head=head.name,
        shape=(q, l),
        dtype=str(head.dtype),
        bias=head.bias is not None,
        s=s,
        effective_rank=lip_jax.spectrum.effective_rank(s),
        energy_ranks=jnp.stack([lip_jax.spectrum.rank_for_energy(s, share) for share in ENERGIES]),
        null=int((s <= svd_tolerance(jnp.asarray(s), q, l)).sum()),
        against=None if other is None else _compare(head, *other),
        rows=None if rows is None else _on_rows(head, rows, held),
    )


def _compare(head: StoredHead, path: Path, other: StoredHead) -> Comparison:
    angles = None
    if head.kernel.shape == other.kernel.shape:
        ranks = jnp.arange(1, min(head.kernel.shape) + 1)
        angles = compare_heads(other.kernel, head.kernel, ranks)
    return Comparison(
        path,
        other.name,
        lip_jax.svd_split(other.kernel, 0).s,
        lip_jax.spectrum.kernel_similarity_grid(head.kernel, other.kernel),
        angles,
    )


def _on_rows(head: StoredHead, rows: Rows, held: Rows | None) -> OnRows:
    l = head.kernel.shape[1]
    quality = lip_jax.label_quality(rows.feats, rows.labels, num_classes=l, weights=rows.weights)
    counted = np.asarray(quality.given) >= 0
    wrong = share_wrong(quality)
    ridge, bounds = None, {}
    if rows.weights is None and counted.any():
        ridge, bounds = _noise_bounds(jnp.asarray(rows.feats)[counted], quality.given[counted], l, wrong)
    return OnRows(
        labelled=count_labelled(rows),
        metrics=head_scores(Head(head.kernel, head.bias), rows),
        quality=quality,
        memorised=lip_jax.memorised(
            head.kernel, head.bias, rows.feats, rows.labels, weights=rows.weights, validation=held
        ),
        wrong=wrong,
        ridge=ridge,
        bounds=bounds,
    )


def _noise_bounds(feats, labels, l: int, flip_rate: float) -> tuple[float, dict[str, Any]]:
    """The bounds for a ridge readout of these labels against one of the true labels, at every rank.

    The mixed gap needs the clean head, which nobody has. One head's own gap will do, with a factor 2: the
    bounds are homogeneous in the gap, so half the spectrum stands for it.
    """
    readout = lip_jax.linear_readout(feats, labels, num_classes=l, intercept=False)
    s = lip_jax.svd_split(readout.kernel, 0).s
    n, q = feats.shape
    values = jnp.pad(lip_jax.bounds.feature_singular_values(feats), (0, max(q - n, 0)))
    terms = {"num_samples": n, "num_classes": l, "flip_rate": flip_rate, "ridge": readout.ridge}
    ranks = jnp.arange(1, s.shape[0] + 1)
    return float(readout.ridge), {
        form: ridge_bounds(values, s / 2, s / 2, ranks, form=form, **terms) for form in ("paper", "filter")
    }


def _print(console: Console, found: Diagnosis) -> None:
    (q, l), r = found.shape, found.s.shape[0]
    bias = "with a bias" if found.bias else "without a bias"
    console.print(
        f"{found.path}: head {found.head}, {q} features, {l} classes, {found.dtype}, {bias}\n", soft_wrap=True
    )
    shown = thinned(1, r, MOST_RANKS)
    _print_spectrum(console, found, shown)
    if found.against is not None:
        _print_comparison(console, found.against, [k for k in shown if k <= found.against.s.shape[0]], l)
    if found.rows is not None:
        _print_rows(console, found.rows, shown)


def _print_spectrum(console: Console, found: Diagnosis, shown: list[int]) -> None:
    s = np.asarray(found.s, np.float64)
    energy = np.cumsum(s**2) / max(np.sum(s**2), np.finfo(float).tiny)
    print_table(
        console,
        f"Spectrum, {len(shown)} of {s.size} components",
        ["component", "singular value", "energy up to here"],
        [[str(k), f"{s[k - 1]:.4g}", f"{energy[k - 1]:.1%}"] for k in shown],
    )
    held = ", ".join(
        f"{share:.0%} in {int(k)}" for share, k in zip(ENERGIES, found.energy_ranks, strict=True)
    )
    console.print(
        f"Effective rank {float(found.effective_rank.entropy):.1f} by entropy, "
        f"{float(found.effective_rank.stable):.1f} stable, of {s.size}. Energy: {held} components.\n"
        f"Components that are rounding noise, which a refit keeps as they are: {found.null}.\n"
    )


def _print_comparison(console: Console, found: Comparison, shown: list[int], l: int) -> None:
    title = f"Similarity φ(k,k) of leading class directions to those of {found.path}, head {found.head}"
    print_similarity(console, title, {"φ(k,k)": np.asarray(found.similarity)}, shown, l)
    if found.angles is None:
        console.print(
            "The heads have inputs of different width: there are no angles between them to bound.\n"
        )
        return
    rows = np.array(shown) - 1
    angles = Angles(
        np.asarray(found.angles.feats_side)[rows],
        np.asarray(found.angles.class_side)[rows],
        {name: np.asarray(values)[rows] for name, values in found.angles.bounds.items()},
    )
    print_angles(console, "Angles between leading subspaces of the two, beside Wedin's bounds", angles, shown)


def _print_rows(console: Console, found: OnRows, shown: list[int]) -> None:
    console.print(f"On {found.labelled} labelled rows, by their labels as they are", style="bold")
    console.print(
        f"{metrics_in_words(found.metrics)}\n\nQuality: {found.quality}\n\n{spelled(str(found.memorised))}\n",
        soft_wrap=True,
    )
    if not found.bounds:
        console.print("Bounds from features are left out: they are of rows that count alike.\n")
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
        "They hold for a ridge readout of these rows beside one of the true labels, with its own gap and a "
        "factor 2, as the true ones are not known; of the head itself they say nothing."
    )
    print_vacuous(console, bounds)


def _draw(found: Diagnosis) -> Figure:
    """What there is to draw, two panels a row."""
    panels = [_draw_spectrum]
    if found.against is not None:
        panels.append(_draw_similarity)
        if found.against.angles is not None:
            panels.append(_draw_angles)
    if found.rows is not None:
        panels.append(_draw_quality)
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.6 * lines), dpi=120, layout="constrained")
    axes = np.ravel(figure.subplots(lines, columns, squeeze=False))
    for draw, ax in zip(panels, axes, strict=False):
        draw(found, ax)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    figure.suptitle(f"{found.path.name}, head {found.head}")
    return figure


def _names(found: Diagnosis) -> tuple[str, str]:
    """What the two heads are called in pictures."""
    this, other = found.path.name, found.against.path.name if found.against else ""
    return (this, other) if this != other else ("this head", "the other head")


def _draw_spectrum(found: Diagnosis, ax) -> None:
    spectra = [found.s] if found.against is None else [found.s, found.against.s]
    plot.spectrum(dict(zip(_names(found), spectra, strict=False)), ax=ax)


def _draw_similarity(found: Diagnosis, ax) -> None:
    assert found.against is not None
    plot.similarity_heatmap(np.asarray(found.against.similarity), names=_names(found), ax=ax)


def _draw_angles(found: Diagnosis, ax) -> None:
    assert found.against is not None
    assert found.against.angles is not None
    angles = found.against.angles
    measured = {"measured, features": angles.feats_side, "measured, classes": angles.class_side}
    plot.bound_against_measured(measured, angles.bounds, ax=ax)


def _draw_quality(found: Diagnosis, ax) -> None:
    assert found.rows is not None
    quality = found.rows.quality
    plot.label_quality_histogram(np.asarray(quality.trust)[np.asarray(quality.given) >= 0], ax=ax)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body style="margin:2em;font-family:sans-serif">
<img src="data:image/png;base64,{picture}" alt="{title}" style="max-width:100%">
<pre style="font-family:Menlo,'DejaVu Sans Mono',monospace">{tables}</pre>
</body>
</html>
"""


def _write_report(found: Diagnosis, path: Path) -> None:
    figure = _draw(found)
    if path.suffix.lower() != ".html":
        figure.savefig(path)
        return
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    console = Console(**PLAIN, record=True, width=110, file=io.StringIO())
    _print(console, found)
    page = PAGE.replace("{picture}", base64.b64encode(picture.getvalue()).decode())
    page = page.replace("{title}", html.escape(f"{found.path.name}, head {found.head}"))
    path.write_text(page.replace("{tables}", html.escape(console.export_text())), encoding="utf-8")


def _as_dict(found: Diagnosis) -> dict[str, Any]:
    against, rows = found.against, found.rows
    return {
        "command": "diagnose",
        "checkpoint": found.path,
        "head": found.head,
        "shape": found.shape,
        "dtype": found.dtype,
        "bias": found.bias,
        "singular_values": found.s,
        "effective_rank": found.effective_rank,
        "rank_for_energy": dict(zip(map(str, ENERGIES), np.asarray(found.energy_ranks), strict=True)),
        "null_components": found.null,
        "against": against
        and {
            "checkpoint": against.path,
            "head": against.head,
            "singular_values": against.s,
            "similarity": np.diagonal(np.asarray(against.similarity)),
            "sin_theta": against.angles
            and {"features": against.angles.feats_side, "classes": against.angles.class_side},
            "bounds": against.angles and _bounds_as_dict(against.angles.bounds),
        },
        "rows": rows
        and {
            "labelled": rows.labelled,
            "metrics": rows.metrics,
            "wrong": rows.wrong,
            "noise_rate": rows.quality.noise_rate,
            "memorised": rows.memorised,
            "ridge": rows.ridge,
            "bounds": _bounds_as_dict(rows.bounds),
        },
    }


def _bounds_as_dict(bounds: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"value": np.asarray(values), "vacuous": np.asarray(values) >= 1}
        for name, values in bounds.items()
    }
