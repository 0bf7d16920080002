"""`lip-jax diagnose`: it reports what the library computes."""

import base64
import io
import re

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import lip_jax
from tests.commands.running import head_of, rows, run, run_json


@pytest.fixture(scope="module")
def found(folder):
    """The diagnosis of a network beside clean labels' readout, on its training rows."""
    options = ("--against", folder / "clean", "--feats", folder / "train.npz")
    found, stderr = run_json("diagnose", folder / "state", *options)
    assert stderr == ""
    return found


def test_the_spectrum_in_json_is_that_of_the_kernel(found, folder):
    kernel, _ = head_of(folder / "state")
    np.testing.assert_allclose(found["singular_values"], np.linalg.svd(kernel, compute_uv=False), rtol=1e-4)
    s = jnp.asarray(found["singular_values"])
    effective_rank = lip_jax.spectrum.effective_rank(s)
    assert found["effective_rank"]["entropy"] == pytest.approx(float(effective_rank.entropy))
    assert found["rank_for_energy"]["0.9"] == int(lip_jax.spectrum.rank_for_energy(s, 0.9))


def test_similarity_and_bounds_in_json_are_those_of_the_library(found, folder):
    (kernel, _), (clean, _) = head_of(folder / "state"), head_of(folder / "clean")
    grid = lip_jax.spectrum.kernel_similarity_grid(kernel, clean)
    np.testing.assert_allclose(found["against"]["similarity"], np.diagonal(grid), rtol=1e-5)
    for name, gap in (("Wedin, mixed gap", "mixed"), ("Wedin, own gap", "own")):
        bound = found["against"]["bounds"][name]
        for k in range(1, 11):
            wedin = lip_jax.bounds.wedin_bound(clean, kernel, k, gap=gap)
            assert bound["vacuous"][k - 1] == bool(wedin.vacuous)
            finite = bool(jnp.isfinite(wedin.value))
            assert bound["value"][k - 1] == (pytest.approx(float(wedin.value), rel=1e-3) if finite else None)


def test_quality_and_memorisation_in_json_are_those_of_the_library(found, folder):
    kernel, bias = head_of(folder / "state")
    feats, labels = rows(folder / "train.npz")
    memorised = lip_jax.memorised(kernel, feats, labels, bias=bias)
    assert found["rows"]["memorised"]["agreement"] == pytest.approx(float(memorised.agreement))
    assert found["rows"]["memorised"]["can_tell"] is True
    quality = lip_jax.label_quality(feats, labels)
    np.testing.assert_allclose(found["rows"]["noise_rate"], quality.noise_rate, rtol=1e-5)
    assert 0.2 < found["rows"]["wrong"] < 0.6


def test_bounds_of_the_noise_hold_for_the_ridge_readout_they_are_of(found, folder):
    """With the true flip rate in place of the estimated one: readouts of clean and given labels."""
    given, clean = np.load(folder / "labels.npy"), np.load(folder / "clean_labels.npy")
    feats = np.load(folder / "feats.npy").astype(np.float64)
    gram = feats.T @ feats + found["rows"]["ridge"] * np.eye(feats.shape[1])
    noisy, true = (np.linalg.solve(gram, feats.T @ np.eye(10)[ids]) for ids in (given, clean))
    u, s, _ = np.linalg.svd(noisy, full_matrices=False)
    u_true, _, _ = np.linalg.svd(true, full_matrices=False)
    scale = np.sqrt((given != clean).mean() / found["rows"]["wrong"])
    sigma = np.linalg.svd(feats, compute_uv=False)
    gain = (sigma / (sigma**2 + found["rows"]["ridge"])).max()
    for k in range(1, 11):
        sine = np.linalg.norm(u_true[:, :k] - u[:, :k] @ (u[:, :k].T @ u_true[:, :k]), 2)
        value = found["rows"]["bounds"]["filter"]["value"][k - 1]
        change = np.sqrt(2 * len(given) * found["rows"]["wrong"])
        gap = s[k - 1] - (s[k] if k < 10 else 0)
        assert value == pytest.approx(2 * gain * change / gap, rel=1e-2)
        assert sine <= value * scale


def test_the_tables_mark_every_vacuous_bound(found, folder):
    options = ("--against", folder / "clean", "--feats", folder / "train.npz")
    text = run("diagnose", folder / "state", *options, "--validation", folder / "held.npz").stdout
    shown = [k - 1 for k in map(int, re.findall(r"^ *(\d+) +\d\.\d\d +\d\.\d\d *$", text, re.MULTILINE))]
    assert len(shown) == 8
    bounds = [*found["against"]["bounds"].values(), *found["rows"]["bounds"].values()]
    vacuous = sum(bound["vacuous"][k] for bound in bounds for k in shown)
    assert len(re.findall(r"vacuous\s+(?:\d|inf)", text)) == vacuous > 0
    for words in ("Effective rank", "labels, about", "memorised:", "held-out labels", "bounds are vacuous"):
        assert words in text, words


def test_unlabelled_validation_rows_cannot_tell_whether_the_head_memorised(folder, tmp_path):
    feats, labels = rows(folder / "held.npz")
    np.savez(tmp_path / "unlabelled.npz", feats=feats, labels=np.full_like(labels, -1))
    options = ("--feats", folder / "train.npz", "--validation", tmp_path / "unlabelled.npz")
    text = run("diagnose", folder / "head.npz", *options).stdout
    assert "cannot tell whether the head memorised these labels" in text


@pytest.mark.slow
def test_the_html_report_holds_tables_and_picture(folder, tmp_path):
    options = ("--against", folder / "clean", "--feats", folder / "train.npz")
    text = run("diagnose", folder / "state", *options, "--out", tmp_path / "report.html").stdout
    page = (tmp_path / "report.html").read_text()
    picture = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    assert matplotlib.image.imread(io.BytesIO(picture)).shape == (1104, 1536, 4)
    assert "Effective rank" in page
    assert "http" not in page
    assert f"Report: {tmp_path / 'report.html'}" in text


@pytest.mark.parametrize(("with_rows", "shape"), [(False, (552, 768, 4)), (True, (552, 1536, 4))])
def test_the_picture_has_a_panel_for_each_part(with_rows, shape, folder, tmp_path):
    options = ("--feats", folder / "train.npz") if with_rows else ()
    out = tmp_path / "report.png"
    run("diagnose", folder / "state", "--head", "Dense_1", *options, "--out", out)
    assert matplotlib.image.imread(out).shape == shape
