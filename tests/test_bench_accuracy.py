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
        assert values["best"] >= max(values[name] for name in ("base", "choice", *accuracy.METHODS))
        assert values["gain"] == pytest.approx(values["choice"] - values["base"])
        assert values["regret"] == pytest.approx(values["best"] - values["choice"])
        assert (draw.chosen == "unchanged") <= (values["gain"] == 0)


CELL = Cell("CLINC150", "symmetric", 0.2, "well regularised")


def hand_made(cell=CELL, seed=0, **changed):
    """A draw with base 80, choice 81, best 81.5, and the given values in place of those."""
    values = dict.fromkeys(accuracy.COLUMNS, 80.0) | {"choice": 81.0, "best": 81.5}
    values |= {"gain": 1.0, "gain error": 0.2, "regret": 0.3, "regret error": 0.2, "published gain": 0.0}
    values |= {"default gain": 0.0, "default gain error": 0.2}
    values |= dict.fromkeys(("log-loss base", "log-loss choice", "log-loss default"), 1.0)
    return Draw(cell, seed, values | {name.replace("_", " "): x for name, x in changed.items()}, "ridge")


def cells(*changes):
    """One summary for each set of changes, at rates of their own."""
    draws = [hand_made(CELL._replace(rate=0.1 * i), **change) for i, change in enumerate(changes)]
    return frame.summarise(draws, accuracy.derived)


@pytest.mark.parametrize(("name", "gain"), [("choice", "gain"), ("default", "default_gain")])
def test_a_loss_counts_beyond_three_tenths_and_two_errors(name, gain):
    error = f"{gain}_error"
    rows = cells({gain: -0.29}, {gain: -0.5, error: 0.3}, {gain: -0.5, error: 0.2})
    verdict, *_ = accuracy.of_harm(rows, name)
    assert not verdict.holds
    assert [missed.startswith(str(CELL._replace(rate=0.2))) for missed in verdict.missed] == [True]
    assert verdict.figure.startswith("2 of 3 cells (66.7%)")
    assert accuracy.of_harm(cells({gain: -0.29}, {}), name)[0].holds


def test_one_draw_in_a_hundred_may_be_harmed():
    def judged(harmed):
        draws = [hand_made(seed=seed, gain=-1.0 if seed < harmed else 1.0) for seed in range(100)]
        return accuracy.of_harm(frame.summarise(draws, accuracy.derived), "choice")[1]

    assert judged(1).holds
    assert not judged(2).holds
    assert judged(2).figure == "2 of 100 draws (2.0%); worst draw -1.00"


def test_regret_is_judged_on_frozen_features_by_mean_and_by_cell():
    mean, near, _ = accuracy.of_regret(cells(*[{}] * 9, {"regret": 1.2}))
    assert mean.holds
    assert near.holds
    mean, near, _ = accuracy.of_regret(cells(*[{}] * 8, {"regret": 1.2}, {"regret": 1.2}))
    assert not mean.holds
    assert not near.holds


def test_the_default_is_held_against_the_choice_on_heads_of_these_rows():
    elsewhere = Cell("CLINC150", "symmetric", 0.2, "well regularised, trained on other rows")
    for share, holds in ((0.8, True), (0.79, False)):
        draws = [hand_made(default_gain=share), hand_made(elsewhere, gain=9.0)]
        *_, verdict = accuracy.of_regret(frame.summarise(draws, accuracy.derived))
        assert verdict.holds == holds
        assert verdict.figure == f"{share:+.2f} and +1.00 points over 1 cells ({share:.0%})"


def test_log_loss_may_rise_by_two_percent():
    verdict = accuracy.of_harm(cells({"log-loss choice": 1.019}, {"log-loss choice": 1.021}), "choice")[2]
    assert not verdict.holds
    assert len(verdict.missed) == 1


def test_errors_of_a_cell_shrink_with_its_draws():
    draws = [hand_made(seed=seed, gain_error=0.4) for seed in range(4)]
    (row,) = frame.summarise(draws, accuracy.derived)
    assert row.mean["gain error"] == pytest.approx(0.2)
    assert row.draws == 4


def test_mean_gain_takes_its_error_from_the_spread_within_cells():
    draws = [hand_made(seed=seed, published_gain=gain) for seed, gain in enumerate((1.0, 3.0))]
    constant = [hand_made(CELL._replace(rate=0.4), seed=seed, published_gain=10.0) for seed in range(2)]
    rows = frame.summarise(draws + constant, accuracy.derived)
    assert accuracy.mean_gain(rows, "published gain") == (6.0, 0.0, pytest.approx(0.5))  # √(2/2)/2
    assert not accuracy.of_paper(cells({"published_gain": -0.1})).holds
