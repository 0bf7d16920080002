"""`lip-jax refine`: a checkpoint with its head repaired, and why it was repaired so or left as it was."""

import warnings
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console

import lip_jax
from lip_jax.choice.compare import DEFAULT_FAMILIES, Metric
from lip_jax.commands import options
from lip_jax.commands.checkpoints import check_place, open_checkpoint, stored_head, write_head
from lip_jax.commands.console import PLAIN, print_json, print_written, spelled, tell, told
from lip_jax.commands.rows import read_rows
from lip_jax.models.transform import Report

EXAMPLES = """Examples:

lip-jax refine digits_ckpt --feats train.npz --validation held_out.npz --out repaired_ckpt

lip-jax refine head.npz --feats feats.npy --labels labels.csv --rank 75 --out refined.npz

lip-jax refine model.safetensors --head classifier --layout "l q" --feats rows.npz --hold-out 0.2
--out repaired.safetensors
"""


def refine(
    checkpoint: options.CheckpointPath,
    feats: options.Feats,
    out: options.OutCheckpoint,
    labels: options.Labels = None,
    weights: options.Weights = None,
    validation: options.Validation = None,
    validation_labels: options.ValidationLabels = None,
    hold_out: options.HoldOut = None,
    seed: options.Seed = 0,
    rank: Annotated[
        int | None,
        typer.Option(min=0, help="Refit at this rank unasked: so many leading components are preserved."),
    ] = None,
    method: Annotated[
        Literal["published", "calibrated"],
        typer.Option(help="Which refit --rank makes: the paper's, or that at the head's own scale."),
    ] = "published",
    families: Annotated[
        str, typer.Option(metavar="NAMES", help="What to choose among without --rank.")
    ] = ",".join(DEFAULT_FAMILIES),
    metric: Annotated[Metric, typer.Option(help="By which metric to choose.")] = "accuracy",
    level: Annotated[
        float, typer.Option(min=0, help="By how many standard errors the choice must be better.")
    ] = 3.0,
    head: options.HeadPath = None,
    layout: options.LayoutOption = "q l",
    num_classes: options.NumClasses = None,
    allow_tied: options.AllowTied = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Repair the head of a checkpoint, or leave it as it is where that is better.

    With --validation the best of several repairs is taken if it beats the head as it came, by labels the
    head has not seen. With --rank exactly that refit is made. With neither only readouts are tried, with
    suspicion. All but the head is copied as it is.
    """
    with told("refine"):
        source = open_checkpoint(checkpoint)
        inputs = (feats, labels, weights, validation, validation_labels)
        check_place(source, out, force=force, inputs=inputs)
        rows, held = options.fit_and_validation(
            "refine", read_rows(feats, labels, weights), validation, validation_labels, hold_out, seed=seed
        )
        found = stored_head(source, head, layout, num_classes, rows=rows)
        with warnings.catch_warnings():
            # Told below, as the command line spells it.
            warnings.filterwarnings("ignore", message="the head agrees with these labels")
            tree, report = lip_jax.apply_with_report(
                found.tree,
                rows.feats,
                rows.labels,
                weights=rows.weights,
                rank=rank,
                validation=held,
                head=found.name,
                method=method,
                families=tuple(name.strip() for name in families.split(",")),
                metric=metric,
                level=level,
                layout=layout,
                allow_tied=allow_tied,
            )
        assert not isinstance(report, dict)
        changed = write_head(source, found, tree, out, force=force)
    if isinstance(report, lip_jax.choice.SelectionReport) and bool(report.memorised):
        tell(
            "refine",
            "warning: the head agrees with these labels far more than a readout that has not seen them. They "
            "look memorised and cannot judge it: give rows it was not trained on with --validation.",
        )
    if as_json:
        facts = {"command": "refine", "checkpoint": checkpoint, "head": found.name, "out": out}
        print_json(facts | {"changed": changed, "left_out": source.left_out, "report": _as_dict(report)})
        return
    console = Console(**PLAIN)
    console.print(spelled(str(report)), soft_wrap=True)
    if rank is not None:
        console.print("Whether that helps was not measured: leave out --rank and give --validation for that.")
    print_written(console, checkpoint, found.name, out, changed=changed, left_out=source.left_out)


def _as_dict(report: Report) -> dict[str, Any]:
    if isinstance(report, lip_jax.choice.SelectionReport):
        return report.as_dict()
    return {"rank": int(report.rank), "s": np.asarray(report.s), "sigma": np.asarray(report.sigma)}
