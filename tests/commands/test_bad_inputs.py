"""Input that cannot be used: exit code 2, a sentence on stderr, and nothing written."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.commands.running import fails, head_of, rows


@pytest.fixture(scope="module")
def bad(folder, tmp_path_factory):
    """Files that cannot be used, and links to good ones."""
    bad = tmp_path_factory.mktemp("bad")
    feats, labels = rows(folder / "train.npz")
    kernel, bias = head_of(folder / "state")
    with_nan = np.where(np.arange(1000)[:, None] == 7, np.nan, feats)
    np.savez(bad / "nan.npz", feats=with_nan, labels=labels)
    np.savez(bad / "no_labels.npz", feats=feats)
    np.savez(bad / "wide.npz", feats=np.ones((50, 33), np.float32), labels=labels[:50])
    np.savez(bad / "uneven.npz", feats=feats, labels=labels[:-1])
    np.savez(bad / "other_keys.npz", x=feats, y=labels)
    np.savez(bad / "ids.npz", feats=feats, labels=np.where(labels == 9, 12, labels))
    np.savez(bad / "diverged.npz", kernel=np.full_like(kernel, np.nan), bias=bias)
    np.savez(bad / "two.npz", **{"a/kernel": kernel, "b/kernel": kernel})
    np.save(bad / "objects.npy", np.array([None] * 1000), allow_pickle=True)
    (bad / "text.npz").write_text("no arrays")
    (bad / "cut.npz").write_bytes((folder / "train.npz").read_bytes()[:3000])
    (bad / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    (bad / "empty").mkdir()
    (bad / "names.csv").write_text("labels\ncat\n")
    (bad / "odd.csv").write_text("labels\n--5\n")
    (bad / "columns.csv").write_text("a,b\n1,2\n")
    (bad / "large.csv").write_text(f"labels\n3\n{2**63}\n")
    (bad / "broken").mkdir()
    (bad / "broken" / "_METADATA").write_text("{")
    (bad / "state").symlink_to(folder / "state")
    for name in ("train.npz", "head.npz", "feats.npy"):
        shutil.copy(folder / name, bad / name)
    return bad


BAD = [
    ("diagnose absent", "absent is no file and no folder"),
    ("diagnose empty", "holds no tree saved by orbax"),
    ("diagnose broken", "cannot be read by orbax"),
    ("diagnose names.csv", "must be the folder of an orbax checkpoint"),
    ("diagnose text.npz", "cannot be read as .npz: it is no .npz archive"),
    ("diagnose cut.safetensors", "cannot be read as .safetensors"),
    ("diagnose diverged.npz", "kernel must be finite"),
    ("diagnose two.npz", "2 kernels could be the head; name one with --head PATH:"),
    ("diagnose state --head nowhere", "no kernel that matches a kernel at head = 'nowhere'"),
    ("diagnose state --labels train.npz", "go with --feats, which is missing"),
    ("diagnose state --head Dense_1 --out nowhere/r.png", "name a file in an existing folder"),
    ("diagnose state --head Dense_1 --out r.doc", "must end in one of"),
    ("diagnose state --head Dense_1 --against-head x", "came without --against"),
    ("diagnose state --head Dense_1 --validation-labels train.npz", "came without --validation"),
    ("refine state --feats absent.npy --out OUT", "absent.npy is no file"),
    ("refine state --feats cut.npz --out OUT", "cannot be read as .npz"),
    ("refine state --feats other_keys.npz --out OUT", "must hold the array feats (n, q)"),
    ("refine state --feats no_labels.npz --out OUT", "holds no labels (feats)"),
    ("refine state --feats wide.npz --out OUT", "no kernel that matches a kernel (q l)"),
    ("refine state --feats uneven.npz --out OUT", "labels must have one row per row of"),
    ("refine state --feats nan.npz --rank 3 --out OUT", "feats must be finite; row 7"),
    ("refine state --feats ids.npz --head Dense_1 --rank 3 --out OUT", "below l = 10"),
    ("refine state --feats train.npz --rank 11 --out OUT", "rank must lie in [0, 10]"),
    ("refine state --feats train.npz --methods magic --out OUT", "--methods must name some of published,"),
    (
        "refine state --feats train.npz --validation train.npz --out OUT",
        "--validation has no row that is not also in --feats",
    ),
    ("refine state --feats train.npz --methods ridge --rank 3 --out OUT", "Leave one out"),
    ("refine state --feats train.npz --method calibrated --out OUT", "Give --rank, or --validation rows"),
    (
        "refine state --feats train.npz --method ridge --rank 3 --out OUT",
        "--rank belongs to --method",
    ),
    ("refine state --feats train.npz --hold-out 1.5 --out OUT", "a share between 0 and 1; got 1.5"),
    ("refine state --feats train.npz --validation train.npz --hold-out 0.5 --out OUT", "exclude each other"),
    ("refine state --feats train.npz --rank 2 --validation train.npz --out OUT", "exclude each other"),
    ("refine head.npz --feats train.npz --out OUT.npy", "must end in .npz"),
    ("refine state --feats train.npz --out OUT/no/a", "is no folder. Make it first"),
    ("readout state --feats train.npz --validation wide.npz --out OUT", "validation: feats"),
    ("purify --feats train.npz --out OUT.txt", "must end in .npz or .csv"),
    ("purify --feats train.npz --top 2 --out OUT.csv", "top belongs to --rule top; got --rule posterior"),
    ("purify --feats train.npz --head x --out OUT.csv", "came without --checkpoint"),
    ("purify --feats feats.npy --out OUT.csv", "holds no labels"),
    ("purify --feats feats.npy --labels names.csv --out OUT.csv", "line 2 must hold a class id, a whole"),
    ("purify --feats feats.npy --labels odd.csv --out OUT.csv", "line 2 must hold a class id"),
    ("purify --feats feats.npy --labels large.csv --out OUT.csv", "line 3 must hold a class id, a whole"),
    ("purify --feats feats.npy --labels columns.csv --out OUT.csv", "2 columns and none named labels"),
    ("purify --feats feats.npy --labels objects.npy --out OUT.csv", "objects.npy cannot be read"),
    ("purify --feats feats.npy --labels no_labels.npz --out OUT.csv", "must hold the array labels; it holds"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("line", "words"), BAD)
def test_bad_input_meets_a_sentence_and_nothing_is_written(line, words, bad, tmp_path, monkeypatch):
    monkeypatch.chdir(bad)
    before = sorted(bad.iterdir())
    message = fails(*line.replace("OUT", str(tmp_path / "out")).split())
    assert words in message
    assert not re.search(r"\b(head|rank|validation|num_classes)=[^=]", message), message
    assert sorted(bad.iterdir()) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ["ids", "sets", "weights"])
@pytest.mark.parametrize("n", [900, 1100])
def test_labels_and_weights_of_another_number_than_the_rows_are_refused(kind, n, folder, tmp_path):
    labels = np.resize(np.load(folder / "labels.npy"), n)
    array = {"ids": labels, "sets": np.eye(10)[labels] > 0, "weights": np.ones(n, np.float32)}[kind]
    np.save(tmp_path / "part.npy", array)
    name = "weights" if kind == "weights" else "labels"
    options = ("--feats", folder / "train.npz", f"--{name}", tmp_path / "part.npy", "--hold-out", 0.2)
    message = fails("readout", folder / "state", *options, "--out", tmp_path / "out")
    assert f"{name} must have one row per row of feats" in message
    assert f"part.npy holds {array.dtype}[{n}" in message


def test_a_folder_without_permission_cannot_be_read(folder, tmp_path, monkeypatch):
    whole = Path.iterdir

    def locked(path):
        if path == folder / "steps":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "iterdir", locked)
    options = ("--feats", folder / "train.npz", "--out", tmp_path / "out")
    assert "cannot be read" in fails("readout", folder / "steps", *options)


@pytest.mark.parametrize("what", ["checkpoint", "feats"])
def test_a_name_too_long_for_the_system_cannot_be_read(what, folder, tmp_path):
    paths = {"checkpoint": folder / "state", "feats": folder / "train.npz"}
    paths[what] = tmp_path / ("a" * 300 + ".npy" * (what == "feats"))
    options = ("--feats", paths["feats"], "--out", tmp_path / "out")
    assert "cannot be read" in fails("readout", paths["checkpoint"], *options)
