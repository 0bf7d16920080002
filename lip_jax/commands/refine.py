"""`lip-jax refine`: a checkpoint with its head repaired or left as it was, and a report of why."""

import warnings

from rich.console import Console

import lip_jax
from lip_jax.choice import SelectionReport
from lip_jax.commands import options
from lip_jax.commands.checkpoints import check_place, open_checkpoint, stored_head, write_head
from lip_jax.commands.console import PLAIN, print_json, print_written, spelled, tell, told
from lip_jax.commands.rows import read_rows

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
    rank: options.Rank = None,
    method: options.MethodOption = None,
    methods: options.Methods = None,
    metric: options.MetricOption = "accuracy",
    num_standard_errors: options.NumStandardErrors = 2.0,
    trust_feats: options.TrustFeats = False,
    unseen: options.Unseen = False,
    head: options.HeadPath = None,
    layout: options.LayoutOption = "q l",
    num_classes: options.NumClasses = None,
    allow_tied: options.AllowTied = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Repair the head of a checkpoint, or leave it as it is where that is better.

    The best of several repairs replaces the head if it is shown to be better: with --validation by rows that
    the head has not seen, with --unseen by the rows of --feats themselves, which it has not seen either, and
    without them by a readout that resembles the head. With --rank or --method, exactly that method is
    applied. Everything but the head is copied as it is.
    """
    with told("refine"):
        asked = options.repair_method(rank, method, methods, metric, num_standard_errors, trust_feats)
        if rank is not None and (validation or hold_out) is not None:
            raise ValueError("--rank and --validation exclude each other: no rank is left to choose.")
        source = open_checkpoint(checkpoint)
        inputs = (feats, labels, weights, validation, validation_labels)
        check_place(source, out, force=force, inputs=inputs)
        rows, held = options.fit_and_validation(
            "refine", read_rows(feats, labels, weights), validation, validation_labels, hold_out, seed=seed
        )
        found = stored_head(source, head, layout, num_classes, rows=rows)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            tree, report = lip_jax.apply_with_report(
                found.tree,
                rows.feats,
                rows.labels,
                weights=rows.weights,
                method=asked,
                validation=held,
                seen=not unseen,
                head=found.name,
                layout=layout,
                allow_tied=allow_tied,
            )
        assert not isinstance(report, dict)
        if isinstance(report, SelectionReport) and not int(report.tested):
            raise ValueError(
                "validation= has no row that is not also in --feats, so nothing can judge a repair."
            )
        changed = write_head(source, found, tree, out, force=force)
    chosen = isinstance(report, SelectionReport)
    for warning in warned:
        tell("refine", f"warning: {spelled(str(warning.message))}")
    if as_json:
        facts = {"command": "refine", "checkpoint": checkpoint, "head": found.name, "out": out}
        shown = report.as_dict() if chosen else report
        print_json(facts | {"changed": changed, "left_out": source.left_out, "report": shown})
        return
    console = Console(**PLAIN)
    console.print(spelled(str(report)), soft_wrap=True)
    if not chosen:
        console.print("Nothing compared it with the head as it was. To compare, give only --validation.")
    print_written(console, checkpoint, found.name, out, changed=changed, left_out=source.left_out)
