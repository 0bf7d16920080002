"""`lip-jax purify`: it writes what the library says of each label, in a form other commands read."""

import csv
import re

import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from tests.commands.running import from_npz, head_of, rows, run, run_json


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_purified_labels_are_those_of_the_library_and_feed_a_readout(suffix, folder, tmp_path):
    out, again = tmp_path / f"purified{suffix}", tmp_path / "readout"
    feats, labels = folder / "feats.npy", folder / "labels.npy"
    found, _ = run_json(
        "purify", "--feats", feats, "--labels", labels, "--checkpoint", folder / "clean", "--out", out
    )
    expected = lip_jax.purify(*rows(folder / "train.npz"), num_classes=10)
    kernel, bias = head_of(folder / "clean")
    memorised = lip_jax.memorised(kernel, *rows(folder / "train.npz"), bias=bias)
    assert found["trusted"] == int(expected.trusted.sum())
    assert found["memorised"]["memorised"] == bool(memorised.memorised)
    if suffix == ".csv":
        with out.open() as file:
            lines = list(csv.DictReader(file))
        columns = {name: np.array([float(line[name]) for line in lines]) for name in lines[0]}
    else:
        columns = from_npz(out)
    given = np.load(labels)
    np.testing.assert_array_equal(columns["trusted"], expected.trusted)
    np.testing.assert_array_equal(columns["suggested"], expected.quality.suggested)
    np.testing.assert_array_equal(columns["num_above"], expected.quality.num_above)
    np.testing.assert_allclose(columns["trust"], expected.quality.trust, rtol=1e-6)
    np.testing.assert_array_equal(columns["labels"], np.where(expected.trusted, given, -1))

    run("readout", folder / "state", "--feats", feats, "--labels", out, "--out", again)
    kernel, bias = head_of(folder / "state")
    trusted = jnp.where(expected.trusted, given, -1)
    readout = lip_jax.apply_readout({"kernel": kernel, "bias": bias}, np.load(feats), trusted)
    np.testing.assert_allclose(head_of(again)[0], readout["kernel"], rtol=1e-5, atol=1e-6)


def test_trusted_labels_are_right_more_often_and_their_number_is_printed(folder, tmp_path):
    out = tmp_path / "purified.npz"
    result = run("purify", "--feats", folder / "train.npz", "--out", out)
    right = np.load(folder / "labels.npy") == np.load(folder / "clean_labels.npy")
    trusted = from_npz(out)["trusted"]
    assert right[trusted].mean() > right.mean() + 0.2
    kept, offered = map(int, re.search(r"(\d+) of (\d+) rows trusted", result.stdout).groups())
    assert (kept, offered) == (trusted.sum(), 1000)


CSV = {
    "one column": lambda ids: "\n".join(map(str, ids)),
    "empty cells": lambda ids: "labels\n" + "".join(f"{id if id >= 0 else ''}\n" for id in ids) + "\n",
    "spaces": lambda ids: "".join(f" {id if id >= 0 else ''} \n" for id in ids),
    "named column": lambda ids: "id,labels\n" + "\n".join(f"x,{id if id >= 0 else ''}" for id in ids),
}


@pytest.mark.parametrize("form", CSV)
def test_labels_in_csv_are_those_of_the_same_array(form, folder, tmp_path):
    given = np.load(folder / "labels.npy").copy()
    given[[5, 7]] = -1
    np.save(tmp_path / "labels.npy", given)
    (tmp_path / "labels.csv").write_text(CSV[form](given))
    found = []
    for suffix in (".npy", ".csv"):
        out, labels = tmp_path / f"out{suffix}.npz", tmp_path / f"labels{suffix}"
        run_json("purify", "--feats", folder / "feats.npy", "--labels", labels, "--out", out)
        found.append(from_npz(out))
    assert found[1]["given"][5] == -1
    for name, column in found[0].items():
        np.testing.assert_array_equal(found[1][name], column)


def test_of_two_candidates_the_right_one_is_taken(tmp_path, folder):
    given, clean = np.load(folder / "labels.npy"), np.load(folder / "clean_labels.npy")
    np.save(tmp_path / "sets.npy", (np.eye(10)[given] + np.eye(10)[clean]) > 0)
    options = (
        "--feats",
        folder / "feats.npy",
        "--labels",
        tmp_path / "sets.npy",
        "--out",
        tmp_path / "p.npz",
    )
    run("purify", *options)
    assert (from_npz(tmp_path / "p.npz")["given"] == clean).mean() > 0.9


def test_where_no_label_counts_it_cannot_tell_whether_the_head_memorised(folder, tmp_path):
    np.save(tmp_path / "none.npy", np.full(1000, -1))
    options = ("--feats", folder / "feats.npy", "--labels", tmp_path / "none.npy", "--num-classes", 10)
    options = (*options, "--checkpoint", folder / "head.npz", "--out")
    assert "cannot tell whether the head memorised" in run("purify", *options, tmp_path / "p.npz").stdout
    found, _ = run_json("purify", *options, tmp_path / "q.npz")
    assert found["memorised"]["can_tell"] is False
    assert found["trusted"] == 0
