"""`lip-jax refine`: it writes the head that the library computes."""

import numpy as np
import pytest

import lip_jax
from tests.commands.running import changed, head_of, restored, rows, run, run_json


def test_a_refit_changes_the_kernel_of_the_head_and_no_other_byte(folder, tmp_path):
    out = tmp_path / "out"
    result = run("refine", folder / "state", "--feats", folder / "train.npz", "--rank", 5, "--out", out)
    before, after = restored(folder / "state"), restored(out)
    assert changed(before, after) == {"['params']['Dense_1']['kernel']"}
    expected = lip_jax.refine(before["['params']['Dense_1']['kernel']"], *rows(folder / "train.npz"), 5)
    np.testing.assert_array_equal(after["['params']['Dense_1']['kernel']"], expected)
    assert "5 of 10 components preserved" in result.stdout
    assert f"Written: {out}; only the head params/Dense_1/kernel differs" in result.stdout
    assert any("mu" in name and "Dense_1" in name for name in before), "the optimiser's state is there"


@pytest.mark.slow
def test_the_choice_by_validation_is_that_of_the_library(folder, tmp_path):
    out = tmp_path / "out"
    options = ("--feats", folder / "train.npz", "--validation", folder / "held.npz", "--out", out)
    found, stderr = run_json("refine", folder / "state", *options, "--methods", "calibrated, ridge")
    kernel, bias = head_of(folder / "state")
    held, methods = rows(folder / "held.npz"), (lip_jax.Calibrated(), lip_jax.Ridge())
    expected = lip_jax.select(
        kernel, *rows(folder / "train.npz"), bias=bias, validation=held, methods=methods
    )
    assert found["report"]["reason"] == expected.report.reason
    assert found["report"]["methods"] == list(expected.report.methods)
    np.testing.assert_allclose(found["report"]["accuracy"], expected.report.accuracy)
    np.testing.assert_array_equal(head_of(out)[0], expected.kernel)
    np.testing.assert_array_equal(head_of(out)[1], expected.bias)
    assert found["changed"] == bool(expected.report.chosen)
    assert stderr == ""


@pytest.mark.slow
def test_hold_out_warns_that_the_head_knows_these_rows(folder, tmp_path):
    options = ("--feats", folder / "train.npz", "--methods", "ridge", "--hold-out", 0.4, "--seed", 7)
    found, stderr = run_json("refine", folder / "state", *options, "--out", tmp_path / "out")
    assert stderr.startswith("lip-jax refine: warning: rows are held out of those given.")
    assert found["report"]["methods"] == ["unchanged", "ridge"]


def noisy_problem(tmp_path, off=0.0):
    """A head beside the best one, and 800 rows with 30% wrong labels, in files."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 800)
    feats = (rng.normal(size=(800, 8)) + 2.5 * np.eye(4, 8)[true]).astype(np.float32)
    labels = np.where(rng.random(800) < 0.3, rng.integers(0, 4, 800), true)
    kernel = (np.eye(8, 4) + off * rng.normal(size=(8, 4))).astype(np.float32)
    np.savez(tmp_path / "head.npz", kernel=kernel)
    np.savez(tmp_path / "rows.npz", feats=feats, labels=labels)
    return feats, true, kernel


def test_a_head_of_other_labels_is_left_as_it_is_with_a_warning(tmp_path):
    _, _, kernel = noisy_problem(tmp_path, off=0.45)
    options = ("--feats", tmp_path / "rows.npz", "--methods", "ridge", "--out", tmp_path / "o.npz")
    result = run("refine", tmp_path / "head.npz", *options)
    assert "warning: the head is returned as it came: no readout of these rows resembles" in result.stderr
    assert "so they cannot judge it; pass --validation" in result.stdout
    assert f"nothing differs from {tmp_path / 'head.npz'}" in result.stdout
    with np.load(tmp_path / "o.npz") as held:
        np.testing.assert_array_equal(held["kernel"], kernel)


def test_unseen_rows_repair_without_others(tmp_path):
    feats, true, kernel = noisy_problem(tmp_path, off=0.45)
    options = (
        "--feats",
        tmp_path / "rows.npz",
        "--methods",
        "ridge",
        "--unseen",
        "--out",
        tmp_path / "o.npz",
    )
    result = run("refine", tmp_path / "head.npz", *options)
    assert "judged by 800 unseen rows, out of fold" in result.stdout
    with np.load(tmp_path / "o.npz") as held:
        after, before = ((feats @ k).argmax(axis=1) == true for k in (held["kernel"], kernel))
    assert after.mean() > before.mean() + 0.1


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (("--rank", 4), lip_jax.Published(rank=4)),
        (("--rank", 4, "--method", "calibrated"), lip_jax.Calibrated(rank=4)),
        (("--method", "ridge"), lip_jax.Ridge()),
        pytest.param(("--method", "purified"), lip_jax.Purified(), marks=pytest.mark.slow),
    ],
)
def test_one_method_is_applied_as_the_library_applies_it(options, method, folder, tmp_path):
    out, head = tmp_path / "out.npz", dict(np.load(folder / "head.npz"))
    found, _ = run_json(
        "refine", folder / "head.npz", "--feats", folder / "train.npz", *options, "--out", out
    )
    repaired, report = lip_jax.apply_with_report(head, *rows(folder / "train.npz"), method=method)
    for name, expected in repaired.items():
        np.testing.assert_array_equal(dict(np.load(out))[name], expected)
    assert found["report"]["method"] == report.method
    assert found["report"]["strength"] == pytest.approx(float(report.strength))
    assert found["report"]["change"] == pytest.approx(float(report.change))


def test_validation_chooses_the_rank_that_one_method_leaves_open(folder, tmp_path):
    options = ("--feats", folder / "train.npz", "--validation", folder / "held.npz")
    out = tmp_path / "out.npz"
    found, _ = run_json("refine", folder / "head.npz", *options, "--method", "published", "--out", out)
    _, report = lip_jax.apply_with_report(
        dict(np.load(folder / "head.npz")),
        *rows(folder / "train.npz"),
        method=lip_jax.Published(),
        validation=rows(folder / "held.npz"),
    )
    assert found["report"]["refit"] is True
    assert found["report"]["strength"] == float(report.strength)
