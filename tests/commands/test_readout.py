"""`lip-jax readout`: it writes the readout that the library computes, and scores it."""

import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from tests.commands.running import head_of, rows, run, run_json


def test_scores_before_and_after_are_those_of_the_heads_on_validation_rows(folder, tmp_path):
    out = tmp_path / "out"
    found, _ = run_json(
        "readout",
        folder / "state",
        "--feats",
        folder / "feats.npy",
        "--labels",
        folder / "clean_labels.npy",
        "--validation",
        folder / "test.npz",
        "--out",
        out,
    )
    feats, labels = rows(folder / "test.npz")
    for when, path in (("before", folder / "state"), ("after", out)):
        kernel, bias = head_of(path)
        metrics = lip_jax.head_metrics(jnp.asarray(feats @ kernel + bias), jnp.asarray(labels))
        assert found["validation"][when]["accuracy"] == pytest.approx(float(metrics.accuracy), abs=2e-3)
        assert found["validation"][when]["log_loss"] == pytest.approx(float(metrics.log_loss), rel=1e-3)
    assert found["rows"] == 1000


def test_solver_and_strength_are_those_of_the_library(folder, tmp_path):
    out = tmp_path / "out.npz"
    options = ("--feats", folder / "train.npz", "--solver", "logistic", "--strength", 3, "--out", out)
    text = run("readout", folder / "head.npz", *options).stdout
    expected = lip_jax.apply_readout(
        dict(np.load(folder / "head.npz")), *rows(folder / "train.npz"), method=lip_jax.Logistic(strength=3.0)
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(dict(np.load(out))[name], array)
    assert text.startswith("A logistic readout of 1000 labelled rows replaces the head.")
