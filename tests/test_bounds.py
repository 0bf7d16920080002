"""Bounds on sin θ: equal to their formulas, and true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lip_jax
from tests import oracles


def noisy_ridge_heads(rng, ridge, n=200, q=6, l=4, flips=8):
    """Features, clean and noisy ridge heads, and the realised flip rate."""
    feats = rng.normal(size=(n, q)) @ np.diag(np.linspace(2, 0.5, q))
    labels = (feats[:, :l] + 0.3 * rng.normal(size=(n, l))).argmax(axis=1)
    noisy = labels.copy()
    noisy[:flips] = (noisy[:flips] + 1) % l
    heads = [oracles.ridge_optimum(feats, oracles.one_hot(ids, l)[0], ridge) for ids in (labels, noisy)]
    return feats, *heads, flips / n


@pytest.mark.parametrize("ridge", [0.0, 0.5, 50.0])
@pytest.mark.parametrize("form", ["paper", "filter"])
def test_sin_theta_bound_matches_its_formula_from_either_rate(rng, x64, form, ridge):
    feats, l, gap, flip_rate = rng.normal(size=(50, 6)), 4, 0.3, 0.01
    entry_rate = 2 * flip_rate / l
    oracle = {"paper": oracles.paper_bound, "filter": oracles.filter_bound}[form]
    expected = oracle(feats, l, entry_rate, ridge, gap)
    for rate in ({"entry_rate": entry_rate}, {"flip_rate": flip_rate}):
        bound = lip_jax.sin_theta_bound(feats, num_classes=l, gap=gap, ridge=ridge, form=form, **rate)
        assert float(bound.value) == pytest.approx(expected, rel=1e-12)
        assert bool(bound.vacuous) == (expected >= 1)
        assert bound.name == form
        assert any(next(iter(rate)) in words for words in bound.assumptions)


def test_sin_theta_bound_from_singular_values_equals_that_from_features(rng, x64):
    feats = rng.normal(size=(50, 6))
    s = np.linalg.svd(feats, compute_uv=False)
    case = {"num_classes": 4, "gap": 0.3, "flip_rate": 0.01, "ridge": 2.0}
    for form in ("paper", "filter"):
        expected = float(lip_jax.sin_theta_bound(feats, form=form, **case).value)
        bound = lip_jax.sin_theta_bound(singular_values=s, num_samples=50, form=form, **case)
        # Between the extremes the filter form allows for any value, so it may only be larger.
        assert float(bound.value) == pytest.approx(expected, rel=1e-12)
        ends = lip_jax.sin_theta_bound(singular_values=s[[0, -1]], num_samples=50, form=form, **case)
        assert float(ends.value) >= expected * (1 - 1e-12)


@pytest.mark.parametrize("ridge", [0.3, 4.0, 400.0])
def test_filter_bound_from_extremes_covers_every_value_between(ridge, x64):
    ends = lip_jax.sin_theta_bound(
        singular_values=jnp.array([10.0, 0.1]),
        num_samples=30,
        num_classes=4,
        gap=1.0,
        flip_rate=0.1,
        ridge=ridge,
        form="filter",
    )
    between = np.linspace(0.1, 10, 2001)
    worst = (between / (between**2 + ridge)).max() * np.sqrt(2 * 30 * 0.1)
    assert float(ends.value) == pytest.approx(worst, rel=1e-4)
    assert float(ends.value) >= worst


@given(
    seed=st.integers(0, 2**31), ridge=st.sampled_from([0.0, 1.0, 20.0]), flips=st.sampled_from([0, 1, 3, 40])
)
def test_every_bound_holds_for_ridge_heads(seed, ridge, flips):
    feats, clean, noisy, flip_rate = noisy_ridge_heads(np.random.default_rng(seed), ridge, flips=flips)
    for rank in (1, 2, 3):
        measured = max(oracles.sin_theta(clean, noisy, rank))
        gap = oracles.mixed_gap(clean, noisy, rank)
        with jax.enable_x64(True):
            paper, filtered = (
                lip_jax.sin_theta_bound(
                    feats, num_classes=4, gap=gap, flip_rate=flip_rate, ridge=ridge, form=form
                )
                for form in ("paper", "filter")
            )
            wedin, own = (lip_jax.bounds.wedin_bound(clean, noisy, rank, gap=g) for g in ("mixed", "own"))
        for bound in (paper, filtered, wedin, own):
            assert measured <= float(bound.value) + 1e-7, bound.name
        assert float(filtered.value) <= float(paper.value) * (1 + 1e-12)
        assert float(wedin.value) <= float(filtered.value) * (1 + 1e-9) + 1e-12


@given(seed=st.integers(0, 2**31), size=st.sampled_from([1e-3, 0.1, 0.5, 2.0]))
def test_wedin_bounds_hold_for_any_two_kernels(seed, size):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(6, 4)) @ np.diag([4, 2, 1, 0.5])
    kernel_noisy = kernel + size * rng.normal(size=(6, 4))
    distance = np.linalg.norm(kernel - kernel_noisy, 2)
    for rank in (1, 2, 3, 4):
        measured = max(oracles.sin_theta(kernel, kernel_noisy, rank))
        for kind, other, factor in (("mixed", kernel_noisy, 1), ("own", kernel, 2)):
            gap = oracles.mixed_gap(kernel, other, rank)
            with jax.enable_x64(True):
                bound = lip_jax.bounds.wedin_bound(kernel, kernel_noisy, jnp.int32(rank), gap=kind)
            expected = factor * distance / gap if gap > 0 else np.inf
            assert float(bound.value) == pytest.approx(expected, rel=1e-9)
            assert measured <= float(bound.value) + 1e-9
            assert bool(bound.vacuous) == (expected >= 1)


def test_one_heads_own_gap_without_the_factor_two_is_no_bound(x64):
    # DESIGN.md's counterexample: X = I, Y = diag(1, .9), Y' = diag(.94, .96).
    kernel, kernel_noisy = np.diag([1.0, 0.9]), np.diag([0.94, 0.96])
    assert max(oracles.sin_theta(kernel, kernel_noisy, 1)) == pytest.approx(1)
    own = lip_jax.bounds.wedin_bound(kernel, kernel_noisy, 1, gap="own")
    assert float(own.value) == pytest.approx(1.2)
    assert float(own.value) / 2 < 1 <= float(own.value)
    assert float(lip_jax.bounds.wedin_bound(kernel, kernel_noisy, 1).value) == pytest.approx(1)


@pytest.mark.parametrize("gap", [0.0, -0.3])
def test_bound_is_infinite_where_there_is_no_gap(rng, gap):
    bound = lip_jax.sin_theta_bound(
        rng.normal(size=(20, 3)).astype(np.float32), num_classes=3, gap=gap, flip_rate=0.0
    )
    assert np.isposinf(bound.value)
    assert bool(bound.vacuous)


def test_no_noise_bounds_the_angle_by_zero(rng):
    bound = lip_jax.sin_theta_bound(
        rng.normal(size=(20, 3)).astype(np.float32), num_classes=3, gap=0.1, flip_rate=0.0
    )
    assert float(bound.value) == 0
    assert not bool(bound.vacuous)


@pytest.mark.parametrize("kind", ["dead features", "dependent features", "fewer samples than features"])
def test_without_ridge_the_paper_bound_is_infinite_on_singular_features(rng, kind):
    feats = rng.normal(size=(20, 6))
    if kind == "dead features":
        feats[:, 2:4] = 0
    elif kind == "dependent features":
        feats[:, 5] = feats[:, 0] - 2 * feats[:, 1]
    else:
        feats = feats[:4]
    feats = feats.astype(np.float32)
    case = {"num_classes": 3, "gap": 1.0, "flip_rate": 0.01}
    assert np.isposinf(lip_jax.sin_theta_bound(feats, **case).value)
    with_ridge = lip_jax.sin_theta_bound(feats, ridge=2.0, **case)
    largest = np.linalg.norm(oracles.f64(feats), 2)
    assert float(with_ridge.value) == pytest.approx(largest * np.sqrt(0.02 * len(feats)) / 2, rel=1e-5)
    s = np.asarray(lip_jax.bounds.feature_singular_values(feats))
    smallest = s[s > 0].min()
    filtered = lip_jax.sin_theta_bound(feats, form="filter", **case)
    assert float(filtered.value) == pytest.approx(np.sqrt(0.02 * len(feats)) / smallest, rel=1e-5)


def test_feature_singular_values_are_numpys_with_rounding_set_to_zero(rng):
    feats = rng.normal(size=(30, 4)) @ rng.normal(size=(4, 7))
    s = np.asarray(lip_jax.bounds.feature_singular_values(feats.astype(np.float32)))
    expected = np.linalg.svd(feats, compute_uv=False)
    np.testing.assert_allclose(s[:4], expected[:4], rtol=1e-5)
    np.testing.assert_array_equal(s[4:], 0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_mixed_gap_matches_its_definition_static_and_traced(rng, x64, rank):
    kernel, kernel_noisy = rng.normal(size=(5, 3)), rng.normal(size=(6, 4))
    s, s_noisy = (np.linalg.svd(w, compute_uv=False) for w in (kernel, kernel_noisy))
    expected = oracles.mixed_gap(kernel, kernel_noisy, rank)
    assert float(lip_jax.bounds.mixed_gap(s, s_noisy, rank)) == pytest.approx(expected)
    assert float(jax.jit(lip_jax.bounds.mixed_gap)(s, s_noisy, jnp.int32(rank))) == pytest.approx(expected)


def test_bounds_vmap_over_ranks_and_noise_rates(rng):
    kernel, kernel_noisy = (rng.normal(size=(6, 4)).astype(np.float32) for _ in range(2))
    ranks = jnp.arange(1, 5, dtype=jnp.int32)
    stacked = jax.vmap(lambda rank: lip_jax.bounds.wedin_bound(kernel, kernel_noisy, rank).value)(ranks)
    single = [lip_jax.bounds.wedin_bound(kernel, kernel_noisy, rank).value for rank in range(1, 5)]
    np.testing.assert_allclose(stacked, single, rtol=1e-6)

    def bound(rate):
        return lip_jax.sin_theta_bound(kernel, num_classes=4, gap=0.1, flip_rate=rate).value

    rates = jnp.array([0.0, 0.1, 0.4])
    np.testing.assert_allclose(jax.vmap(bound)(rates), [bound(rate) for rate in rates], rtol=1e-6)


def test_the_filter_bound_of_many_rows_leaves_out_no_value_above_rounding():
    feats = np.random.default_rng(0).normal(size=(60_000, 2)).astype(np.float32)
    feats *= np.array([1, 1e-3], np.float32)
    case = {"num_classes": 3, "gap": 1.0, "flip_rate": 0.1}
    for ridge in (0.0, 1e-3):
        bound = lip_jax.sin_theta_bound(feats, form="filter", ridge=ridge, **case)
        expected = oracles.filter_bound(feats, 3, 0.2 / 3, ridge, 1.0)
        assert float(bound.value) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n", [300, 3_000, 100_000])
def test_values_at_rounding_level_are_zero_whatever_the_number_of_rows(rng, n):
    feats = (rng.normal(size=(n, 3)) @ rng.normal(size=(3, 8))).astype(np.float32)
    s = np.asarray(lip_jax.bounds.feature_singular_values(feats))
    assert (s[:3] > 0).all()
    np.testing.assert_array_equal(s[3:], 0)


def test_a_value_set_to_zero_may_have_been_anything_up_to_rounding(x64):
    feats = np.diag([1.0, 0.5, 1e-16])
    case = {"num_classes": 3, "gap": 1.0, "flip_rate": 0.01, "form": "filter"}
    bound = lip_jax.sin_theta_bound(feats, ridge=1e-32, **case)
    assert float(bound.value) >= 0.999 * 1e-16 / 2e-32 * np.sqrt(2 * 3 * 0.01)
    assert any("rounding level taken as 0" in words for words in bound.assumptions)


def test_singular_values_that_reach_zero_bound_nothing_without_ridge():
    case = {"num_samples": 30, "num_classes": 4, "gap": 1.0, "flip_rate": 0.1, "form": "filter"}
    ends = jnp.array([10.0, 0.0])
    assert np.isposinf(lip_jax.sin_theta_bound(singular_values=ends, ridge=0.0, **case).value)
    assert np.isfinite(lip_jax.sin_theta_bound(singular_values=ends, ridge=1e-3, **case).value)
    nothing = lip_jax.sin_theta_bound(singular_values=jnp.zeros(2), ridge=0.0, **case)
    assert float(nothing.value) == 0


@pytest.mark.parametrize("form", ["paper", "filter"])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_no_small_bound(rng, form, ridge, value):
    feats = rng.normal(size=(20, 3)).astype(np.float32)
    feats[4, 1] = value
    case = {"num_classes": 3, "gap": 0.5, "flip_rate": 0.1, "form": form, "ridge": ridge}
    with pytest.raises(ValueError, match="feats must be finite; got NaN or infinity"):
        lip_jax.sin_theta_bound(feats, **case)
    bound = jax.jit(lambda feats: lip_jax.sin_theta_bound(feats, **case))(feats)
    assert np.isposinf(bound.value)
    assert bool(bound.vacuous)
    with pytest.raises(ValueError, match="singular_values must be finite"):
        lip_jax.sin_theta_bound(singular_values=np.array([1, value], np.float32), num_samples=9, **case)


def test_moments_whose_squares_overflow_have_no_singular_values():
    accumulator = lip_jax.moment_accumulator(2, 1)
    moments, feats = accumulator.init(), jnp.array([[1e19, 0], [-1e19, 1.0]])
    for _ in range(2):
        moments = accumulator.update(moments, feats, jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="moments must be finite"):
        lip_jax.bounds.feature_singular_values_from(moments)


@pytest.mark.parametrize("rate", ["entry_rate", "flip_rate"])
def test_samples_may_number_more_than_int32_holds(rate):
    bound = lip_jax.sin_theta_bound(
        singular_values=jnp.array([10.0, 1.0]),
        num_samples=3 * 10**9,
        num_classes=1000,
        gap=1.0,
        **{rate: 1e-12},
    )
    entries = 3e9 * 1000 if rate == "entry_rate" else 2 * 3e9
    assert float(bound.value) == pytest.approx(10 * np.sqrt(entries * 1e-12), rel=1e-5)
