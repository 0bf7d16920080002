"""The paper's pictures, on digits: gains at every rank are those of the heads `refine` returns."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from benchmarks import paper_figures
from benchmarks.data import load_digits
from benchmarks.heads import train_regularised
from lip_jax.rows.labels import Rows


@pytest.fixture(scope="module")
def figures():
    # optax mixes dtypes, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return paper_figures.measure(load_digits(0), rates=(0.1, 0.4), seeds=(0,))


def test_gains_are_those_of_refined_heads():
    data = load_digits(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        head = paper_figures.head_of(train_regularised(data.train_x, data.train_y, num_classes=10, steps=30))
    fit, test = (Rows(jnp.asarray(x), jnp.asarray(y), None) for x, y in (data[:2], data[4:]))
    gains = paper_figures.gains(head, fit, test)

    def accuracy(kernel, bias):
        return 100 * float(((test.feats @ kernel + bias[None, :]).argmax(axis=1) == test.labels).mean())

    base = accuracy(*head)
    for rank in (0, 4, 10):
        published = lip_jax.refine(head.kernel, *fit[:2], rank)
        calibrated = lip_jax.refine_calibrated(*head, *fit[:2], rank)
        # One test row is 0.2 points: ties may fall either way.
        expected = accuracy(published, head.bias) - base, accuracy(calibrated.kernel, calibrated.bias) - base
        np.testing.assert_allclose(gains[:, rank], expected, atol=0.21)
    np.testing.assert_array_equal(gains[:, -1], 0)


def test_measures_are_recorded_and_drawn(figures, tmp_path):
    assert set(figures.similarity) == {0.1, 0.4}
    assert {values.shape for values in figures.gains.values()} == {(2, 2, 1, 11)}
    record = json.loads(json.dumps(paper_figures.record(figures, (0,))))
    assert len(record["curves"]) == 3 * 2 * 2
    for curve in record["curves"]:
        assert curve["best_gain"] == pytest.approx(max(curve["mean_gain"]), abs=0.01)
        assert curve["best_gain"] >= 0  # at full rank nothing changes
    assert record["similarity"]["0.1"]["φ(10, 10)"] == pytest.approx(1, abs=1e-3)
    paper_figures.draw(figures, tmp_path / "figures.png")
    assert (tmp_path / "figures.png").stat().st_size > 10_000
