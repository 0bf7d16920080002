"""Rows in files: features, labels and weights; a hold-out of some of them."""

import csv
import re
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lip_jax._checks import describe
from lip_jax.commands.files import opened_npz
from lip_jax.methods.protocol import Head
from lip_jax.numerics.linalg import logits_of
from lip_jax.quality.trust import LabelQuality
from lip_jax.rows.checks import check_validation
from lip_jax.rows.labels import Rows, candidate_targets, label_use
from lip_jax.rows.metrics import Metrics, head_metrics

KEYS = ("feats", "labels", "weights")


def read_rows(feats: Path, labels: Path | None, weights: Path | None = None, *, what: str = "--") -> Rows:
    """Features with labels and weights: from one `.npz`, or from files of their own, which take precedence.

    `what` is the prefix of the options that named these files.
    """
    held = _read_npz(feats) if feats.suffix == ".npz" else {"feats": _read_npy(feats)}
    if "feats" not in held:
        raise ValueError(f"{feats} must hold the array feats (n, q); it holds {_listed(held)}.")
    if labels is not None:
        held["labels"] = read_labels(labels)
    elif "labels" not in held:
        raise ValueError(
            f"{feats} holds no labels ({_listed(held)}). Name their file with {what}labels, or put the array "
            f"labels into one .npz with feats."
        )
    if weights is not None:
        found = _read_npz(weights) if weights.suffix == ".npz" else {"weights": _read_npy(weights)}
        if "weights" not in found:
            raise ValueError(f"{weights} must hold the array weights (n,); it holds {_listed(found)}.")
        held["weights"] = found["weights"]
    n = held["feats"].shape[:1]
    for name, path in (("labels", labels or feats), ("weights", weights or feats)):
        if name in held and (not n or held[name].shape[:1] != n):
            raise ValueError(
                f"{name} must have one row per row of feats, {describe(held['feats'])} in {feats}; {path} "
                f"holds {describe(held[name])}."
            )
    return Rows(held["feats"], _as_labels(held["labels"]), held.get("weights"))  # pyright: ignore


def read_labels(path: Path) -> np.ndarray:
    """Labels from an `.npy`, the array `labels` of an `.npz`, or a column of a `.csv`."""
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix != ".npz":
        return _read_npy(path)
    held = _read_npz(path)
    if "labels" not in held:
        raise ValueError(f"{path} must hold the array labels; it holds {_listed(held)}.")
    return held["labels"]


def hold_out(rows: Rows, share: float, *, seed: int) -> tuple[Rows, Rows]:
    """The rows in two parts, drawn at random: what is kept, and the share held out."""
    n = rows.feats.shape[0]
    order = np.random.default_rng(seed).permutation(n)
    held, kept = np.split(order, [round(share * n)])
    if len(held) < 2 or len(kept) < 2:
        raise ValueError(f"--hold-out {share:g} of {n} rows leaves {len(held)} and {len(kept)}: too few.")
    return _at(rows, np.sort(kept)), _at(rows, np.sort(held))


def head_scores(head: Head, rows: Rows) -> Metrics:
    """Metrics of a head on rows, by their labels."""
    q, l = head.kernel.shape
    rows, _ = check_validation(rows, q, l)
    return head_metrics(logits_of(rows.feats, head.kernel, head.bias), rows.labels, weights=rows.weights)


def count_labelled(rows: Rows) -> int:
    """How many rows have a label."""
    return int((~label_use(jnp.asarray(rows.labels), np.iinfo(np.int32).max).unlabelled).sum())


def share_wrong(quality: LabelQuality) -> float:
    """The estimated share of wrong labels among those given."""
    counted = np.asarray(quality.given) >= 0
    return float(1 - np.asarray(quality.trust)[counted].mean()) if counted.any() else 0.0


def _at(rows: Rows, where: np.ndarray) -> Rows:
    return jax.tree.map(lambda part: part[where], rows)


def _as_labels(labels: np.ndarray) -> np.ndarray | jax.Array:
    """Labels, with candidate sets turned into targets."""
    sets = labels.ndim == 2 and not jnp.issubdtype(labels.dtype, jnp.floating)
    return candidate_targets(labels) if sets else labels


def _listed(held: dict[str, np.ndarray]) -> str:
    return ", ".join(sorted(held)) or "nothing"


def _check_file(path: Path) -> None:
    try:
        found = path.is_file()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{path} is no file.")


def _read_npy(path: Path) -> np.ndarray:
    if path.suffix != ".npy":
        raise ValueError(f"{path} must be an .npy or .npz file.")
    _check_file(path)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an .npz file by another name. Rename it.")
    return array


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` whose names are in `KEYS`."""
    _check_file(path)
    try:
        with opened_npz(path) as held:
            return {key: held[key] for key in held.files if key in KEYS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error


def _read_csv(path: Path) -> np.ndarray:
    _check_file(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as .csv: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty.")
    # In a file of one column, an empty line between rows is an empty cell.
    only = max(map(len, lines)) == 1
    lines = [line or [""] for line in lines if line or only]
    first, column, header = lines[0], 0, not _is_id(lines[0][0]) or len(lines[0]) > 1
    if len(first) > 1:
        if "labels" not in first:
            raise ValueError(
                f"{path} has {len(first)} columns and none named labels in its first line "
                f"({', '.join(first)}). Name the column of class ids labels."
            )
        column = first.index("labels")
    ids = []
    for number, line in enumerate(lines[header:], start=1 + header):
        # An int64 holds any number of eighteen digits.
        if len(line) != len(first) or not _is_id(line[column]) or len(line[column].strip()) > 18:
            raise ValueError(
                f"{path} line {number} must hold a class id, a whole number, or nothing where the row is "
                f"unlabelled; got {','.join(line)!r}. Number classes as the outputs of the head."
            )
        ids.append(int(line[column].strip() or -1))
    return np.array(ids, np.int64)


def _is_id(text: str) -> bool:
    return re.fullmatch(r"\s*(-?[0-9]+)?\s*", text) is not None
