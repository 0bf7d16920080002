"""What the choice costs, and redraws of the validation rows: each is what `select` makes of it alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import lip_jax
from benchmarks import selection
from benchmarks.data import Dataset

L, Q, ROWS = 4, 5, 120
METHODS = selection.CLOSED_FORM


@pytest.fixture
def data(rng):
    """Classes that a linear head tells apart for the most part."""
    parts = []
    for n in (200, 150, 400):
        labels = rng.integers(0, L, n).astype(np.int32)
        parts += [(rng.normal(size=(n, Q)) + 2 * np.eye(L, Q)[labels]).astype(np.float32), labels]
    return Dataset(*parts)


def test_draws_at_once_are_draws_alone(data, rng):
    # Better than chance, and far from the best.
    kernel = np.eye(Q, L) + rng.normal(size=(Q, L))
    head = lip_jax.Head(*(jnp.asarray(part, jnp.float32) for part in (kernel, np.zeros(L))))
    keys = jax.random.split(jax.random.key(0), 6)
    chosen, accuracy = selection.redrawn(head, data, keys, 0.2, rows=ROWS, methods=METHODS)
    assert (chosen > 0).sum() > 0
    for key, method, score in zip(keys, chosen, accuracy, strict=True):
        row_key, noise_key = jax.random.split(key)
        drawn = np.asarray(jax.random.permutation(row_key, len(data.val_y))[:ROWS])
        labels = lip_jax.noise.symmetric(noise_key, data.val_y[drawn], 0.2, num_classes=L)
        options = {"bias": head.bias, "validation": (data.val_x[drawn], labels), "methods": METHODS}
        alone = lip_jax.select(head.kernel, data.train_x, data.train_y, **options)
        assert int(alone.report.chosen) == int(method)
        predicted = (data.test_x @ np.asarray(alone.kernel) + np.asarray(alone.bias)).argmax(axis=1)
        assert float(score) == pytest.approx((predicted == data.test_y).mean(), abs=0.01)


def test_the_choice_is_timed_against_one_solve():
    held = selection.cost(None, None, sizes=(300, 12, 4, 100), rounds=2)
    assert held["timings"]["rank-0 solve"]["times_the_solve"] == 1
    assert held["all_ranks_temporary_bytes"] > 0
    parts = selection.tables({"cost": held})
    assert parts["cost"].startswith("| rank-0 solve |")
    assert parts["sizes"] == "300 rows, 12 features, 4 classes and 100 validation rows"
