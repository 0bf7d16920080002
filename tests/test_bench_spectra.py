"""The functions of `benchmarks.spectra` on a part of CLINC150: what they measure, and that bounds hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax

pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks import frame, spectra
from benchmarks.data import load_digits
from lip_jax.rows.labels import Rows

NUM_CLASSES = 10
RANKS = (3, 9, 10)


@pytest.fixture(scope="module")
def part(clinc150):
    """The rows of the first classes."""
    parts = (array[part.y < NUM_CLASSES] for part in clinc150.parts for array in part)
    return type(clinc150)(*parts)


@pytest.fixture(scope="module")
def found(part):
    """A softmax head, a ridge head and one of least squares."""
    recipes = [
        spectra.Recipe("softmax", 0.01),
        spectra.Recipe("ridge", 2.0),
        spectra.Recipe("ridge", 0.0),
    ]
    options = {"rates": (0.005, 0.2), "ranks": RANKS}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return [draw for recipe in recipes for draw in spectra.measure(recipe, part, (0, 1), **options)]


def values(draws, quantity, regime=None, rate=None):
    held = [draw for draw in draws if regime in (None, draw.cell.regime) and rate in (None, draw.cell.rate)]
    return np.array([x for draw in held for name, x in draw.values.items() if name.split()[0] == quantity])


def test_every_bound_holds_and_some_say_something(found):
    checked = spectra.check_bounds(found)
    # 2 rates, 2 seeds, 3 ranks; three bounds from the kernels, for ridge heads two more from the features.
    assert checked["compared"] == 2 * 2 * 3 * (3 + 5 + 5)
    assert checked["not_vacuous"] > 0


def test_a_bound_that_fails_is_reported(found):
    draws = list(found)
    i = next(i for i, draw in enumerate(draws) if "wedin_mixed 3" in draw.values)
    draws[i] = draws[i]._replace(values=draws[i].values | {"wedin_mixed 3": 0.0})
    with pytest.raises(AssertionError, match=r"1 bounds fail.*wedin_mixed 3"):
        spectra.check_bounds(draws)


def test_paper_is_infinite_without_ridge_and_filter_never_exceeds_it(found):
    assert np.isinf(values(found, "paper", "ridge λ/n=0")).all()
    assert (values(found, "filter") <= values(found, "paper")).all()


def test_feature_bounds_cannot_fall_below_their_floor(found):
    # √(2 n p) against a gap of at most g ‖Y'‖₂ = g √(largest class), here below 2 n/l.
    filtered = values(found, "filter", "ridge λ/n=2", 0.2)
    assert filtered.min() > np.sqrt(2 * NUM_CLASSES * 0.2 / 2)


def test_clean_head_is_similar_to_itself(found):
    for quantity in ("phi_leading", "phi_trailing"):
        np.testing.assert_allclose(values(found, quantity, rate=0.0), 1, atol=1e-4)
    assert set(values(found, "change_leading", rate=0.0)) == {0.0}


def test_similarity_leaves_out_the_direction_weight_decay_annihilates(found):
    rows = frame.summarise(found)
    curve = {row.cell.regime: row.curves["phi_leading"] for row in rows if row.cell.rate == 0.2}
    assert len(curve["softmax C=0.01"]) == NUM_CLASSES - 1
    assert len(curve["ridge λ/n=2"]) == NUM_CLASSES
    assert all(0 < x <= 1 for x in curve["softmax C=0.01"])


@pytest.mark.parametrize("share", [0.0, 2.0])
def test_ridge_heads_solve_the_normal_equations(part, share):
    recipe = spectra.Recipe("ridge", share)
    kernel, bias = recipe.fit(part.train_x, jnp.asarray(part.train_y), NUM_CLASSES)
    x, kernel = part.train_x.astype(np.float64), np.asarray(kernel, np.float64)
    targets = np.eye(NUM_CLASSES)[part.train_y]
    gradient = x.T @ (x @ kernel - targets) + share * len(x) * kernel
    assert np.abs(gradient).max() < 2e-4 * np.abs(x.T @ targets).max()
    assert not np.asarray(bias).any()


def test_rescaling_a_head_changes_no_similarity_and_no_angle(rng):
    kernel = jnp.asarray(rng.normal(size=(12, 6)), jnp.float32)
    split, scaled = lip_jax.svd_split(kernel, 0), lip_jax.svd_split(3 * kernel, 0)
    angles = spectra.angles_of(kernel, 3 * kernel, jnp.array([3]))
    assert float(angles["sin_theta"][0]) < 1e-5
    assert float(angles["wedin_mixed_rescaled"][0]) < 1e-5 < float(angles["wedin_mixed"][0])
    changes = spectra.spectrum_changes(split, scaled)
    assert changes["change_leading"] == pytest.approx(2, rel=1e-5)
    assert changes["shape_change_leading"] < 1e-5


@pytest.mark.parametrize(
    ("holds", "words"),
    [
        ([True] * 5, "at every p"),
        ([False, True, True, True, True], "not even at p = 0.05"),
        ([True, True, False, True, True], "up to p = 0.1 only"),
    ],
)
def test_reach_stops_at_the_first_failure(holds, words):
    assert spectra.reach(holds) == words


def test_gains_are_those_of_refined_heads():
    data = load_digits(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        head = spectra.Recipe("softmax", 0.01).fit(data.train_x, jnp.asarray(data.train_y), 10)
    fit, _, test = (Rows(jnp.asarray(x), jnp.asarray(y), None) for x, y in data.parts)
    gains = spectra.gains(head, fit, test)

    def accuracy(kernel, bias):
        return 100 * float(((test.feats @ kernel + bias[None, :]).argmax(axis=1) == test.labels).mean())

    base = accuracy(*head)
    for rank in (0, 4, 10):
        published = lip_jax.refine(head.kernel, *fit[:2], rank)
        calibrated = lip_jax.refine_calibrated(head.kernel, *fit[:2], rank, bias=head.bias)
        # One test row is 0.2 points: ties may fall either way.
        assert float(gains["published"][rank]) == pytest.approx(
            accuracy(published, head.bias) - base, abs=0.21
        )
        expected = accuracy(calibrated.kernel, calibrated.bias) - base
        assert float(gains["calibrated"][rank]) == pytest.approx(expected, abs=0.21)
    assert float(gains["published"][-1]) == float(gains["calibrated"][-1]) == 0


def test_every_head_is_followed_through_all_ranks(monkeypatch):
    monkeypatch.setattr(spectra, "load_clinc150", lambda _: load_digits(0))
    monkeypatch.setattr(spectra, "REFITTED", spectra.REFITTED[::2])
    monkeypatch.setattr(spectra, "RANK_RATES", (0.4,))
    # optax mixes dtypes, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        record = {"ranks": spectra.ranks(None, 1)}
    rows = spectra.tables(record)["gains"].splitlines()
    assert [row.split(" | ")[0] for row in rows] == 2 * ["| softmax C=0.01"] + 2 * ["| overfitted"]
    # At full rank nothing changes.
    assert all(float(row.split(" | ")[4]) >= 0 for row in rows)
    assert spectra.draw(record).axes
