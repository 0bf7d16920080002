"""`lip-jax readout`: a checkpoint with its head replaced by a linear readout of clean labels."""

from rich.console import Console

import lip_jax
from lip_jax.commands import options
from lip_jax.commands.checkpoints import check_place, head_in, open_checkpoint, stored_head, write_head
from lip_jax.commands.console import PLAIN, metrics_in_words, print_json, print_written, told
from lip_jax.commands.rows import count_labelled, head_scores, read_rows

EXAMPLES = """Examples:

lip-jax readout digits_ckpt --feats clean.npz --out readout_ckpt

lip-jax readout digits_ckpt --feats feats.npy --labels purified.csv --solver logistic --out readout_ckpt
"""


def readout(
    checkpoint: options.CheckpointPath,
    feats: options.Feats,
    out: options.OutCheckpoint,
    labels: options.Labels = None,
    weights: options.Weights = None,
    validation: options.Validation = None,
    validation_labels: options.ValidationLabels = None,
    hold_out: options.HoldOut = None,
    seed: options.Seed = 0,
    solver: options.Solver = "ridge",
    strength: options.Strength = None,
    head: options.HeadPath = None,
    layout: options.LayoutOption = "q l",
    num_classes: options.NumClasses = None,
    allow_tied: options.AllowTied = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Replace the head of a checkpoint by a linear readout of labels that should be clean.

    The head is replaced even if the readout is worse; --validation or --hold-out shows both scores. --labels
    takes the file that lip-jax purify wrote. Everything but the head is copied as it is.
    """
    with told("readout"):
        source = open_checkpoint(checkpoint)
        inputs = (feats, labels, weights, validation, validation_labels)
        check_place(source, out, force=force, inputs=inputs)
        rows, held = options.fit_and_validation(
            "readout", read_rows(feats, labels, weights), validation, validation_labels, hold_out, seed=seed
        )
        found = stored_head(source, head, layout, num_classes, rows=rows)
        tree = lip_jax.apply_readout(
            found.tree,
            rows.feats,
            rows.labels,
            weights=rows.weights,
            head=found.name,
            method=options.readout_method(solver, strength),
            layout=layout,
            allow_tied=allow_tied,
        )
        heads = {"before": found.head, "after": head_in(tree, found.name, layout)}
        scores = {} if held is None else {when: head_scores(each, held) for when, each in heads.items()}
        changed = write_head(source, found, tree, out, force=force)
    used = count_labelled(rows)
    if as_json:
        facts = {"command": "readout", "checkpoint": checkpoint, "head": found.name, "out": out}
        print_json(
            facts
            | {
                "changed": changed,
                "left_out": source.left_out,
                "rows": used,
                "solver": solver,
                "validation": scores or None,
            }
        )
        return
    console = Console(**PLAIN)
    console.print(f"A {solver} readout of {used} labelled rows replaces the head.")
    for when, metrics in scores.items():
        console.print(f"{when:7}{metrics_in_words(metrics)}")
    if scores:
        assert held is not None
        console.print(f"on {count_labelled(held)} labelled validation rows, whose labels may be wrong too.")
    print_written(console, checkpoint, found.name, out, changed=changed, left_out=source.left_out)
