"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from lip_jax.commands.console import tell
from lip_jax.commands.rows import hold_out, read_rows
from lip_jax.models.trees import Layout
from lip_jax.rows.labels import Rows

CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Folder of an orbax checkpoint (parameters, variables, a TrainState or nnx.State; of several "
        "steps the newest), a .safetensors or an .npz file with kernel and bias (keys may hold slashes).",
    ),
]

HeadPath = Annotated[
    str | None,
    typer.Option("--head", metavar="PATH", help="The head, where several kernels fit: params/Dense_2, say."),
]

LayoutOption = Annotated[
    Layout, typer.Option("--layout", help="How the kernel is stored; q inputs, l outputs. Flax: 'q l'.")
]

NumClasses = Annotated[
    int | None, typer.Option("--num-classes", min=1, help="Outputs, where labels lack the last classes.")
]

_FEATS = typer.Option(
    "--feats",
    metavar="FILE",
    help="Inputs of the head (n, q): .npy, or .npz with feats and maybe labels and weights.",
)

Feats = Annotated[Path, _FEATS]

OptionalFeats = Annotated[Path | None, _FEATS]

Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="Class ids (n,), targets or sets of candidates (n, l): .npy, .npz with labels, or .csv (its "
        "only column, or that named labels); -1 or an empty cell where there is none.",
    ),
]

Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Weight of each row (n,): .npy, or .npz with weights."),
]

Validation = Annotated[
    Path | None,
    typer.Option(
        "--validation",
        metavar="FILE",
        help="Rows the head was not trained on, as --feats; labels may be as noisy.",
    ),
]

ValidationLabels = Annotated[
    Path | None, typer.Option("--validation-labels", metavar="FILE", help="Their labels, as --labels.")
]

HoldOut = Annotated[
    float | None,
    typer.Option(
        "--hold-out", metavar="SHARE", help="Take this share of the rows for validation in place of a file."
    ),
]

Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the draw of --hold-out.")]

AllowTied = Annotated[
    bool, typer.Option("--allow-tied", help="Change a kernel that is an embedding as well.")
]

OutCheckpoint = Annotated[
    Path,
    typer.Option("--out", metavar="PATH", help="The checkpoint to write, of the same kind as CHECKPOINT."),
]

Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")]


def validation_rows(validation: Path | None, labels: Path | None) -> Rows | None:
    """The rows of `--validation`, if it was given."""
    if validation is None:
        if labels is not None:
            raise ValueError("--validation-labels came without --validation, the features they belong to.")
        return None
    return read_rows(validation, labels, what="--validation-")


def fit_and_validation(
    command: str,
    rows: Rows,
    validation: Path | None,
    validation_labels: Path | None,
    share: float | None,
    *,
    seed: int,
) -> tuple[Rows, Rows | None]:
    """Rows to fit to, and rows to judge by, if any are given or held out."""
    held = validation_rows(validation, validation_labels)
    if share is None:
        return rows, held
    if held is not None:
        raise ValueError("--validation and --hold-out exclude each other: rows to judge by come from one.")
    if not 0 < share < 1:
        raise ValueError(f"--hold-out must be a share between 0 and 1; got {share:g}.")
    tell(
        command,
        "warning: rows are held out of those given. If the head, or the network below it, was trained on "
        "them, it knows their labels, wrong ones too: the verdict then favours the head as it came, and its "
        "accuracy is no estimate. Rows kept from training belong in --validation.",
    )
    return hold_out(rows, share, seed=seed)
