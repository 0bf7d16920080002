"""`lip-jax diagnose`: what its spectrum, another head and labels say of a head."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lip_jax import plot
from lip_jax.commands import options
from lip_jax.commands.checkpoints import open_checkpoint, stored_head
from lip_jax.commands.console import PLAIN, print_json, told
from lip_jax.commands.diagnose.compute import diagnosed
from lip_jax.commands.diagnose.picture import write_report
from lip_jax.commands.diagnose.tables import print_diagnosis
from lip_jax.commands.files import check_out, written_whole
from lip_jax.commands.rows import read_rows

EXAMPLES = """Examples:

lip-jax diagnose digits_ckpt

lip-jax diagnose digits_ckpt --against clean_ckpt --feats train.npz --out report.html

lip-jax diagnose head.npz --feats feats.npy --labels labels.npy --json
"""


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
            metavar="CHECKPOINT", help="Another checkpoint to compare the head with, such as a clean one."
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

    With --against: how similar the leading subspaces of two heads are, and bounds on the angle between them.
    With --feats and --labels: the quality of the labels, and whether the head has memorised them. For the
    latter, --validation with rows kept from training is the sharper test. Nothing is changed.
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
            l = found.head.kernel.shape[1]
            name = against_head or head
            other = against, stored_head(open_checkpoint(against), name, layout, l, rows=None)
        elif against_head is not None:
            raise ValueError("--against-head came without --against, the checkpoint it is in.")
        diagnosis = diagnosed(checkpoint, found, other, rows, held)
        if out is not None:
            with written_whole(out, force=force) as fresh:
                write_report(diagnosis, fresh)
    if as_json:
        print_json(diagnosis.as_dict() | {"out": out})
        return
    console = Console(**PLAIN)
    print_diagnosis(console, diagnosis)
    if out is not None:
        console.print(f"Report: {out}", soft_wrap=True)
