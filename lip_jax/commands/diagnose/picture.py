"""A diagnosis as a picture, or as a page with the picture and the tables."""

import base64
import html
import io
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from lip_jax import plot
from lip_jax.commands.console import PLAIN
from lip_jax.commands.diagnose.compute import Diagnosis
from lip_jax.commands.diagnose.tables import print_diagnosis

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body style="margin:2em;font-family:sans-serif">
<img src="data:image/png;base64,{picture}" alt="{title}" style="max-width:100%">
<pre style="font-family:Menlo,'DejaVu Sans Mono',monospace">{tables}</pre>
</body>
</html>
"""


def write_report(found: Diagnosis, path: Path) -> None:
    """Write the picture, or a page where the path ends in `.html`."""
    figure = _draw(found)
    if path.suffix.lower() != ".html":
        figure.savefig(path)
        return
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    console = Console(**PLAIN, record=True, width=110, file=io.StringIO())
    print_diagnosis(console, found)
    page = PAGE.replace("{picture}", base64.b64encode(picture.getvalue()).decode())
    page = page.replace("{title}", html.escape(f"{found.checkpoint.name}, head {found.head}"))
    path.write_text(page.replace("{tables}", html.escape(console.export_text())), encoding="utf-8")


def _draw(found: Diagnosis) -> Figure:
    """One panel for each part of the diagnosis, two in a row."""
    against = found.against
    this, other = found.checkpoint.name, against.checkpoint.name if against else ""
    names = (this, other) if this != other else ("this head", "the other head")
    spectra = [head.singular_values for head in (found, against) if head is not None]
    panels = [partial(plot.spectrum, dict(zip(names, spectra, strict=False)))]
    if against is not None:
        panels.append(partial(plot.similarity_heatmap, np.asarray(against.similarity), names=names))
        if against.angles is not None:
            angles = against.angles
            sines = {"measured, features": angles.feats_side, "measured, classes": angles.class_side}
            panels.append(partial(plot.bound_against_measured, sines, angles.bounds))
    if found.rows is not None:
        quality = found.rows.quality
        trust = np.asarray(quality.trust)[np.asarray(quality.given) >= 0]
        panels.append(partial(plot.label_quality_histogram, trust))
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.6 * lines), dpi=120, layout="constrained")
    axes = np.ravel(figure.subplots(lines, columns, squeeze=False))
    for draw, ax in zip(panels, axes, strict=False):
        draw(ax=ax)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    figure.suptitle(f"{this}, head {found.head}")
    return figure
