"""The paper's pictures, on digits: gains at every rank are those of the heads `refine` returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax

pytest.importorskip("optax")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks import paper_figures
from benchmarks.data import load_digits
from lip_jax.rows.labels import Rows


def test_gains_are_those_of_refined_heads():
    data = load_digits(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        head = paper_figures.train(0.01, 0, data.train_x, jnp.asarray(data.train_y), 10)
    fit, _, test = (Rows(jnp.asarray(x), jnp.asarray(y), None) for x, y in data.parts)
    gains = paper_figures.gains(head, fit, test)

    def accuracy(kernel, bias):
        return 100 * float(((test.feats @ kernel + bias[None, :]).argmax(axis=1) == test.labels).mean())

    base = accuracy(*head)
    for rank in (0, 4, 10):
        published = lip_jax.refine(head.kernel, *fit[:2], rank)
        calibrated = lip_jax.refine_calibrated(head.kernel, *fit[:2], rank, bias=head.bias)
        # One test row is 0.2 points: ties may fall either way.
        expected = accuracy(published, head.bias) - base, accuracy(calibrated.kernel, calibrated.bias) - base
        np.testing.assert_allclose(gains[:, rank], expected, atol=0.21)
    np.testing.assert_array_equal(gains[:, -1], 0)


def test_every_head_is_followed_through_all_ranks(monkeypatch):
    monkeypatch.setattr(paper_figures, "HEADS", {"softmax, C = 0.01": 0.01})
    # optax mixes dtypes, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        held = paper_figures.measure(load_digits(0), rates=(0.1, 0.4), seeds=range(1))
    assert len(held["curves"]) == 2 * 2
    for curve in held["curves"]:
        assert curve["best_gain"] == pytest.approx(max(curve["mean_gain"]), abs=0.01)
        assert curve["best_gain"] >= 0  # at full rank nothing changes
    assert held["similarity"]["0.1"] == {"φ(10, 10)": pytest.approx(1, abs=1e-3)}
    parts = paper_figures.tables({"figures": held})
    assert parts["gains"].startswith("| softmax, C = 0.01 | 0.1 | published |")
    assert paper_figures.draw({"figures": held}).axes
