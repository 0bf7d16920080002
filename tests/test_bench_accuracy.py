"""The accuracy table: noise, losses, single cells end to end, and the verdicts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks import accuracy, data, frame, heads
from benchmarks.data import Part
from benchmarks.frame import Cell, Draw


def test_noise_of_all_parts_follows_one_model():
    rng = np.random.default_rng(0)
    feats, labels = rng.normal(size=(4000, 6)).astype(np.float32), rng.integers(0, 5, 4000).astype(np.int32)
    parts = [Part(feats[:3000], labels[:3000]), Part(feats[3000:], labels[3000:])]
    for kind in ("symmetric", "asymmetric", "instance"):
        noisy = data.corrupt((kind, 0.3), 0, parts, 5)
        assert [part.shape for part in noisy] == [(3000,), (1000,)]
        for part, given in zip(parts, noisy, strict=True):
            assert np.mean(part.y != np.asarray(given)) == pytest.approx(0.3, abs=0.05)


def test_robust_losses_are_what_their_names_say():
    logits, labels = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), jnp.array([0, 2])
    p = jax.nn.softmax(logits)[jnp.arange(2), labels]
    np.testing.assert_allclose(heads.generalised_cross_entropy(logits, labels, 1.0), 1 - p, rtol=1e-5)
    np.testing.assert_allclose(heads.generalised_cross_entropy(logits, labels, 1e-4), -jnp.log(p), rtol=1e-3)
    everywhere = -jax.nn.log_softmax(logits).mean(axis=1)
    smoothed = heads.smoothed_cross_entropy(logits, labels, 0.1)
    np.testing.assert_allclose(smoothed, -0.9 * jnp.log(p) + 0.1 * everywhere, rtol=1e-5)


@pytest.fixture(scope="module")
def digit_draws():
    """The MLP on clean labels, early-stopped and memorised, with one seed."""
    # optax's Adam takes a float to an integer power, which strict dtype promotion forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("raise"):
        return [accuracy.measure(task) for task in itertools.islice(accuracy.digits(None, [0]), 2)]


def test_digits_cells_end_to_end(digit_draws):
    assert [draw.cell for draw in digit_draws] == [
        Cell("digits MLP", "symmetric", 0.0, regime) for regime in ("early-stopped", "memorised")
    ]
    for draw in digit_draws:
        values = draw.values
        assert values["base"] > 80
        assert values["best"] >= max(values[name] for name in ("base", *accuracy.METHODS))
        assert values["gain"] == pytest.approx(values["choice"] - values["base"])
        assert values["regret"] == pytest.approx(values["best"] - values["choice"])
        assert (draw.chosen == "unchanged") <= (values["gain"] == 0)


CELL = Cell("CLINC150", "symmetric", 0.2, "well regularised")


def hand_made(cell=CELL, seed=0, **changed):
    """A draw with base 80, choice 81, best 81.5, and the given values in place of those."""
    values = dict.fromkeys((*accuracy.COLUMNS, "LIP choice", "default"), 80.0) | {
        "choice": 81.0,
        "best": 81.5,
    }
    values |= {"gain": 1.0, "gain error": 0.2, "regret": 0.5, "regret error": 0.2, "published gain": 0.0}
    values |= {"least regret": 0.0, "LIP gain": 0.0, "default gain": 0.0}
    values |= {"log-loss base": 1.0, "log-loss choice": 1.0}
    return Draw(cell, seed, values | {name.replace("_", " "): x for name, x in changed.items()}, "ridge")


def cells(*changes):
    """One summary for each set of changes, at rates of their own."""
    draws = [hand_made(CELL._replace(rate=0.1 * i), **change) for i, change in enumerate(changes)]
    return frame.summarise(draws, accuracy.derived)


def test_a_loss_counts_beyond_three_tenths_and_two_errors():
    rows = cells({"gain": -0.29}, {"gain": -0.5, "gain_error": 0.3}, {"gain": -0.5, "gain_error": 0.2})
    verdict, *_ = accuracy.of_choice(rows)
    assert not verdict.holds
    assert [missed.startswith(str(CELL._replace(rate=0.2))) for missed in verdict.missed] == [True]
    assert verdict.figure.startswith("2 of 3 cells (66.7%)")
    assert accuracy.of_choice(cells({"gain": -0.29}, {}))[0].holds


def test_one_cell_in_ten_may_be_far_from_the_best():
    far, near = {"regret": 1.5, "regret_error": 0.6}, {"regret": 1.5, "regret_error": 0.8}
    assert accuracy.of_choice(cells(far, *[near] * 9))[1].holds
    assert not accuracy.of_choice(cells(far, far, *[near] * 9))[1].holds


def test_cells_that_a_rule_which_knew_the_best_method_would_meet_are_counted():
    missed = {"regret": 1.5, "least_regret": 0.9}, {"regret": 1.5, "least_regret": 1.5}
    figure = accuracy.of_choice(cells({}, *missed))[1].figure
    assert figure.startswith("1 of 3 cells (33.3%); 2 of 3 cells (66.7%) if the best method were known")


def test_log_loss_may_rise_by_two_percent():
    verdict = accuracy.of_choice(cells({"log-loss choice": 1.019}, {"log-loss choice": 1.021}))[2]
    assert not verdict.holds
    assert len(verdict.missed) == 1


def test_what_validation_rows_can_show_takes_three_errors_of_them_all():
    x, clean = np.eye(2, dtype=np.float32)[np.arange(200) % 2], np.arange(200) % 2
    kernels = ([[1.0, 0]] * 2, [[1.0, 0], [0, 1]])
    always_0, right = (accuracy.Head(jnp.array(kernel), jnp.zeros(2)) for kernel in kernels)
    for shown, better in ((False, 9), (True, 11)):
        # On rows of class 1 both are wrong, but for the first few.
        y = np.where((clean == 1) & (np.cumsum(clean) > better), 2, clean).astype(np.int32)
        assert (better > 3 * np.sqrt(better * (1 - better / 200) + 1)) == shown
        for labels in (y, np.eye(3, dtype=np.float32)[y]):
            problem = accuracy.Problem(always_0, None, Part(x, labels), None)
            assert accuracy.can_be_shown(right, problem) == shown


def test_errors_of_a_cell_shrink_with_its_draws():
    draws = [hand_made(seed=seed, gain_error=0.4) for seed in range(4)]
    (row,) = frame.summarise(draws, accuracy.derived)
    assert row.mean["gain error"] == pytest.approx(0.2)
    assert row.draws == 4


def test_one_losing_draw_breaks_never():
    draws = [hand_made(seed=seed, default_gain=gain) for seed, gain in enumerate((1.0, 1.0, -0.2))]
    verdict = accuracy.of_default(frame.summarise(draws, accuracy.derived), "such")
    assert not verdict.holds
    assert "worst draw -0.20" in verdict.figure


def test_mean_gain_takes_its_error_from_the_spread_within_cells():
    draws = [hand_made(seed=seed, published_gain=gain) for seed, gain in enumerate((1.0, 3.0))]
    constant = [hand_made(CELL._replace(rate=0.4), seed=seed, published_gain=10.0) for seed in range(2)]
    rows = frame.summarise(draws + constant, accuracy.derived)
    assert accuracy.mean_gain(rows, "published gain") == (6.0, 0.0, pytest.approx(0.5))  # √(2/2)/2
    assert not accuracy.of_paper(cells({"published_gain": -0.1})).holds
