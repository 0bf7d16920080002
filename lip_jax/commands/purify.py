"""`lip-jax purify`: which labels to trust, which classes to suggest instead, and with what probability."""

import csv
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

import lip_jax
from lip_jax.commands import options
from lip_jax.commands.checkpoints import open_checkpoint, spared_file, stored_head
from lip_jax.commands.console import PLAIN, print_json, spelled, told
from lip_jax.commands.files import check_out, written_whole
from lip_jax.commands.rows import read_rows, share_wrong
from lip_jax.quality.rules import Rule

EXAMPLES = """Examples:

lip-jax purify --feats rows.npz --out purified.npz

lip-jax purify --feats feats.npy --labels labels.csv --checkpoint digits_ckpt --out purified.csv

lip-jax readout digits_ckpt --feats feats.npy --labels purified.csv --out readout_ckpt
"""


def purify(
    feats: options.Feats,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="The .npz or .csv to write. For each row: given, trusted, labels (given where trusted, else "
            "-1), suggested, trust (the probability that given is right), margin, num_above.",
        ),
    ],
    labels: options.Labels = None,
    weights: options.Weights = None,
    num_classes: options.NumClasses = None,
    rule: Annotated[Rule, typer.Option(help="The rule by which rows are trusted.")] = "posterior",
    threshold: Annotated[
        float | None, typer.Option(help="For the rules posterior (otherwise 0.5) and margin (otherwise 0).")
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="For the rule top; otherwise by the number of classes.")
    ] = None,
    min_per_class: Annotated[
        int, typer.Option(min=0, help="Trust at least so many rows of each class, whatever the rule says.")
    ] = 1,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="A checkpoint whose head was trained on these labels, to test whether it memorised them.",
        ),
    ] = None,
    head: options.HeadPath = None,
    layout: options.LayoutOption = "q l",
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Find the labels that can be trusted, without a clean set and without cross-validation.

    Features judge the labels, so features of a network that memorised the labels agree with all of them.
    --checkpoint tests for that. If it has, use features of rows kept from training, or of a network stopped
    early.
    """
    with told("purify"):
        if out.suffix not in (".npz", ".csv"):
            raise ValueError(f"--out {out} must end in .npz or .csv.")
        check_out(out, force=force, spared=spared_file, inputs=(feats, labels, weights, checkpoint))
        rows = read_rows(feats, labels, weights)
        memorised = None
        if checkpoint is not None:
            found = stored_head(open_checkpoint(checkpoint), head, layout, num_classes, rows=rows)
            kernel, bias = found.head
            num_classes = kernel.shape[1]
            memorised = lip_jax.memorised(kernel, rows.feats, rows.labels, bias=bias, weights=rows.weights)
        elif head is not None:
            raise ValueError("--head came without --checkpoint, the file it is in.")
        purified = lip_jax.purify(
            rows.feats,
            rows.labels,
            num_classes=num_classes,
            weights=rows.weights,
            rule=rule,
            threshold=threshold,
            top=top,
            min_per_class=min_per_class,
        )
        columns = _columns(purified)
        with written_whole(out, force=force) as fresh:
            if out.suffix == ".npz":
                np.savez(fresh, allow_pickle=False, **columns)
            else:
                _write_csv(columns, fresh)
    quality = purified.quality
    if as_json:
        print_json(
            {
                "command": "purify",
                "out": out,
                "rows": len(columns["given"]),
                "trusted": int(columns["trusted"].sum()),
                "wrong": share_wrong(quality),
                "noise_rate": quality.noise_rate,
                "offered": purified.offered,
                "kept": purified.kept,
                "rescued": purified.rescued,
                "rule": rule,
                "memorised": memorised,
            }
        )
        return
    console = Console(**PLAIN)
    console.print(str(purified), soft_wrap=True)
    if memorised is not None:
        console.print(spelled(str(memorised)), soft_wrap=True)
    console.print(f"\nWritten: {out}", soft_wrap=True)


def _columns(purified: lip_jax.quality.PurifiedRows) -> dict[str, np.ndarray]:
    quality = purified.quality
    given, trusted = np.asarray(quality.given), np.asarray(purified.trusted)
    return {
        "given": given,
        "trusted": trusted,
        "labels": np.where(trusted, given, -1).astype(np.int32),
        "suggested": np.asarray(quality.suggested),
        "trust": np.asarray(quality.trust),
        "margin": np.asarray(quality.margin),
        "num_above": np.asarray(quality.num_above),
    }


def _write_csv(columns: dict[str, np.ndarray], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        lists: list[list[Any]] = [
            (column.astype(int) if column.dtype == bool else column).tolist() for column in columns.values()
        ]
        writer.writerows(zip(*lists, strict=True))
