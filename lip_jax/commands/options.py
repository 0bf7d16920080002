"""Options that several commands share, and the method that options stand for."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lip_jax.choice.compare import DEFAULT_METHODS, Choice
from lip_jax.choice.evidence import Metric
from lip_jax.commands.console import tell
from lip_jax.commands.rows import hold_out, read_rows
from lip_jax.methods import Calibrated, Logistic, Method, Published, Purified, Ridge
from lip_jax.methods.protocol import name_of
from lip_jax.models.trees import Layout
from lip_jax.rows.labels import Rows

CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Folder of an orbax checkpoint (parameters, variables, a TrainState or nnx.State; of several "
        "steps the newest), or a .safetensors or .npz file with kernel and bias (keys may hold slashes).",
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
    help="Inputs of the head (n, q): .npy, or .npz with feats and optionally labels and weights.",
)

Feats = Annotated[Path, _FEATS]

OptionalFeats = Annotated[Path | None, _FEATS]

Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        metavar="FILE",
        help="Class ids (n,), targets or candidate sets (n, l): .npy, .npz with labels, or .csv (its only "
        "column, or the one named labels). Unlabelled: -1 or an empty cell.",
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
        help="Rows the head was not trained on, as --feats; their labels may be as noisy.",
    ),
]

ValidationLabels = Annotated[
    Path | None, typer.Option("--validation-labels", metavar="FILE", help="Their labels, as --labels.")
]

HoldOut = Annotated[
    float | None,
    typer.Option(
        "--hold-out", metavar="SHARE", help="Take this share of the rows for validation, in place of a file."
    ),
]

Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the draw of --hold-out.")]

Rank = Annotated[
    int | None, typer.Option("--rank", min=0, help="Refit at this rank: so many leading components stay.")
]

MethodName = Literal["published", "calibrated", "ridge", "logistic", "purified"]

MethodOption = Annotated[
    MethodName | None,
    typer.Option(
        "--method", help="Apply this method unasked; --validation then only chooses its rank or strength."
    ),
]

Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="NAMES",
        help="What to choose among without --rank and --method; otherwise "
        + ",".join(map(name_of, DEFAULT_METHODS)),
    ),
]

MetricOption = Annotated[Metric, typer.Option("--metric", help="The metric to choose by.")]

NumStandardErrors = Annotated[
    float,
    typer.Option(
        "--num-standard-errors", min=0, help="By how many standard errors the choice must be better."
    ),
]

Solver = Annotated[Literal["ridge", "logistic"], typer.Option("--solver", help="Kind of readout.")]

Strength = Annotated[
    float | None,
    typer.Option("--strength", min=0, help="Strength of its penalty; otherwise chosen by cross-validation."),
]

Unseen = Annotated[
    bool,
    typer.Option("--unseen", help="The network was not trained on these rows, so they judge it as well."),
]
TrustFeats = Annotated[
    bool,
    typer.Option(
        "--trust-feats", help="Choose even where the head predicts the labels no better than chance."
    ),
]
AllowTied = Annotated[
    bool, typer.Option("--allow-tied", help="Change a kernel that is also used elsewhere, as an embedding.")
]

OutCheckpoint = Annotated[
    Path,
    typer.Option("--out", metavar="PATH", help="The checkpoint to write, of the same kind as CHECKPOINT."),
]

Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")]

METHODS: dict[str, Method] = {
    "published": Published(),
    "calibrated": Calibrated(),
    "ridge": Ridge(),
    "logistic": Logistic(),
    "purified": Purified(),
}


def repair_method(
    rank: int | None,
    method: MethodName | None,
    methods: str | None,
    metric: Metric,
    num_standard_errors: float,
    trust_feats: bool,
) -> Method | Choice:
    """The method that `--rank` or `--method` asks for, or else a choice among `--methods`."""
    if rank is None and method is None:
        names = [] if methods is None else [name.strip() for name in methods.split(",")]
        unknown = [name for name in names if name not in METHODS]
        if unknown:
            raise ValueError(f"--methods must name some of {', '.join(METHODS)}; got {unknown[0]!r}.")
        chosen = DEFAULT_METHODS if methods is None else tuple(METHODS[name] for name in names)
        return Choice(chosen, metric, num_standard_errors, trust_feats)
    if methods is not None:
        raise ValueError("--methods is a choice, and --rank or --method applies one unasked. Leave one out.")
    if rank is None:
        return METHODS[method or "published"]
    refits: dict[str, Method] = {"published": Published(rank), "calibrated": Calibrated(rank)}
    if method not in (None, *refits):
        raise ValueError(f"--rank belongs to --method published or calibrated; got --method {method}.")
    return refits[method or "published"]


def readout_method(solver: Literal["ridge", "logistic"], strength: float | None) -> Method:
    """The readout that `--solver` and `--strength` ask for."""
    return Ridge(strength) if solver == "ridge" else Logistic(strength)


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
    """Rows to fit to, and validation rows, if any are given or held out."""
    held = validation_rows(validation, validation_labels)
    if share is None:
        return rows, held
    if held is not None:
        raise ValueError("--validation and --hold-out exclude each other. Leave one out.")
    if not 0 < share < 1:
        raise ValueError(f"--hold-out must be a share between 0 and 1; got {share:g}.")
    tell(
        command,
        "warning: rows are held out of those given. If the head, or the network below it, was trained on "
        "them, it knows their labels, wrong ones too. The verdict then favours the head as it came, and the "
        "accuracy measured is too high. Rows kept from training belong in --validation.",
    )
    return hold_out(rows, share, seed=seed)
