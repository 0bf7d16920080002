"""The functions of `benchmarks.spectra` on a part of CLINC150: what they measure, and that bounds hold."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax

pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from benchmarks import spectra

NUM_CLASSES = 10
RANKS = (3, 9, 10)


@pytest.fixture(scope="module")
def part(clinc150):
    """The rows of the first classes."""
    kept = {name: getattr(clinc150, f"{name}_y") < NUM_CLASSES for name in ("train", "val", "test")}
    return clinc150._replace(
        **{
            f"{name}_{axis}": getattr(clinc150, f"{name}_{axis}")[rows]
            for name, rows in kept.items()
            for axis in "xy"
        }
    )


@pytest.fixture(scope="module")
def factors(part):
    return spectra.factorise(part.train_x)


@pytest.fixture(scope="module")
def rows(part, factors):
    families = [
        spectra.Family("softmax", spectra.softmax_fit(part.train_x, NUM_CLASSES, 0.01), None),
        spectra.Family("ridge", spectra.ridge_fit(factors, NUM_CLASSES, 2000.0), 2000.0),
        spectra.Family("least squares", spectra.ridge_fit(factors, NUM_CLASSES, 0.0), 0.0),
    ]
    options = {"num_classes": NUM_CLASSES, "rates": (0.005, 0.2), "seeds": (0, 1), "ranks": RANKS}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        batches = [
            batch for family in families for batch in spectra.measure(family, part, factors, **options)
        ]
    return [row for batch in batches for row in batch]


def values(rows, **wanted):
    return np.array(
        [row.value for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    )


def test_every_bound_holds_and_some_say_something(rows):
    checked = spectra.check_bounds(rows)
    # 2 rates, 2 seeds, 3 ranks; three bounds from the kernels, for ridge heads two more from the features.
    assert checked["compared"] == 2 * 2 * 3 * (3 + 5 + 5)
    assert checked["not_vacuous"] > 0


def test_a_bound_that_fails_is_reported(rows):
    i = next(i for i, row in enumerate(rows) if row.quantity == "wedin_mixed")
    broken = [*rows[:i], rows[i]._replace(value=0.0), *rows[i + 1 :]]
    with pytest.raises(AssertionError, match=r"1 bounds do not hold.*wedin_mixed"):
        spectra.check_bounds(broken)


def test_paper_is_infinite_without_ridge_and_filter_never_exceeds_it(rows):
    assert np.isinf(values(rows, head="least squares", quantity="paper")).all()
    assert (values(rows, quantity="filter") <= values(rows, quantity="paper")).all()


def test_feature_bounds_cannot_fall_below_their_floor(rows):
    # √(2 n p) against a gap of at most g ‖Y'‖₂ = g √(largest class), here below 2 n/l.
    filtered = values(rows, quantity="filter", head="ridge", flip_rate=0.2)
    assert filtered.min() > np.sqrt(2 * NUM_CLASSES * 0.2 / 2)


def test_clean_head_is_similar_to_itself(rows):
    for quantity in ("phi_leading", "phi_trailing", "phi_left", "phi_held"):
        np.testing.assert_allclose(values(rows, flip_rate=0.0, quantity=quantity), 1, atol=1e-4)
    assert set(values(rows, flip_rate=0.0, quantity="change_leading")) == {0.0}


def test_similarity_leaves_out_the_direction_weight_decay_annihilates(rows):
    leading = values(rows, head="softmax", flip_rate=0.2, seed=0, quantity="phi_leading")
    assert len(leading) == NUM_CLASSES - 1
    assert len(values(rows, head="ridge", flip_rate=0.2, seed=0, quantity="phi_leading")) == NUM_CLASSES
    assert ((leading > 0) & (leading <= 1 + 1e-5)).all()


@pytest.mark.parametrize("ridge", [0.0, 2000.0])
def test_ridge_heads_solve_the_normal_equations(part, factors, ridge):
    kernel, _ = spectra.ridge_fit(factors, NUM_CLASSES, ridge)(jnp.asarray(part.train_y))
    x = part.train_x.astype(np.float64)
    targets = np.eye(NUM_CLASSES)[part.train_y]
    gradient = x.T @ (x @ np.asarray(kernel, np.float64) - targets) + ridge * np.asarray(kernel, np.float64)
    assert np.abs(gradient).max() < 1e-4 * np.abs(x.T @ targets).max()


def test_rescaling_a_head_changes_no_similarity_and_no_angle(rng):
    kernel = jnp.asarray(rng.normal(size=(12, 6)), jnp.float32)
    split, scaled = lip_jax.svd_split(kernel, 0), lip_jax.svd_split(3 * kernel, 0)
    assert spectra.sin_theta(split, scaled, 3) < 1e-5
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


def test_files_hold_infinite_bounds_and_lists_on_one_line(tmp_path):
    stats = {("h", 0.05, 10, "paper"): spectra.Stat(float("inf"), float("nan"))}
    spectra.write_csv(stats, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[1] == "h,0.05,10,paper,inf,nan"
    record = {"command": "python", "curve": [1.0, 2.0], "seeds": (0, 1)}
    spectra.write_json(record, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    assert '"curve": [ 1.0, 2.0 ]' in text
    assert json.loads(text) == record | {"seeds": [0, 1]}
