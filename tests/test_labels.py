"""What every kind of labels means, and what becomes of rows that cannot be used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from lip_jax.rows.labels import as_labels, class_count, label_use, row_use, spread_over
from tests import oracles

N, Q, L = 40, 6, 4


@pytest.fixture
def data(rng):
    """Kernel, features and class ids."""
    kernel, feats = rng.normal(size=(Q, L)), rng.normal(size=(N, Q))
    return kernel.astype(np.float32), feats.astype(np.float32), rng.integers(0, L, N)


def assert_same_head(first, second):
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_class_ids_of_any_integer_dtype_mean_one_hot_targets(data, dtype):
    kernel, feats, ids = data
    targets = oracles.one_hot(ids, L)[0].astype(np.float32)
    expected = lip_jax.refine(kernel, feats, targets, 1)
    assert_same_head(lip_jax.refine(kernel, feats, ids.astype(dtype), 1), expected)
    if not dtype.endswith("64"):
        assert_same_head(lip_jax.refine(kernel, feats, jnp.asarray(ids.astype(dtype)), 1), expected)


def test_ids_beyond_int32_stay_out_of_range():
    for dtype in ("int64", "uint64", "uint32"):
        ids = np.array([3, 2**32 - 1], dtype)
        np.testing.assert_array_equal(as_labels(ids), [3, 2**31 - 1])
    np.testing.assert_array_equal(as_labels(np.array([-(2**40), 5])), [-(2**31), 5])


@pytest.mark.parametrize("kind", ["negative id", "NaN targets", "empty set", "weight 0"])
def test_row_that_counts_for_nothing_may_as_well_be_absent(data, kind):
    kernel, feats, ids = data
    gone, present = [0, 7], np.setdiff1d(np.arange(N), [0, 7])
    weights = np.ones(N, np.float32)
    targets = oracles.one_hot(ids, L)[0].astype(np.float32)
    if kind == "negative id":
        labels = ids.copy()
        labels[gone] = [-1, -100]
    elif kind == "NaN targets":
        labels = targets.copy()
        labels[gone] = np.nan
    elif kind == "empty set":
        mask = targets.astype(bool)
        mask[gone] = False
        labels = lip_jax.candidate_targets(mask)
    else:
        labels, weights[gone] = ids, 0
    refined = lip_jax.refine(kernel, feats, labels, 1, weights=weights)
    assert_same_head(refined, lip_jax.refine(kernel, feats[present], ids[present], 1))


def test_rows_without_weight_or_label_may_hold_anything(data):
    kernel, feats, ids = data
    expected = lip_jax.refine(kernel, feats[3:], ids[3:], 1)
    feats, labels, weights = feats.copy(), ids.copy(), np.ones(N, np.float32)
    feats[0], labels[0] = np.nan, -1
    feats[1], weights[1] = np.inf, 0
    labels[2], weights[2] = 99, 0
    assert_same_head(lip_jax.refine(kernel, feats, labels, 1, weights=weights), expected)


@pytest.mark.parametrize("dtype", ["bool", "int32", "uint8", "float32", "bfloat16", "float64"])
def test_candidate_targets_spread_each_set_uniformly(rng, dtype):
    mask = rng.random((20, 5)) < 0.4
    mask[4] = False
    with jax.enable_x64(dtype == "float64"):
        targets = lip_jax.candidate_targets(jnp.asarray(mask).astype(dtype))
        under_jit = jax.jit(lip_jax.candidate_targets)(jnp.asarray(mask).astype(dtype))
    floating = jnp.issubdtype(dtype, jnp.floating)
    assert targets.dtype == jnp.dtype(dtype if floating else "float32")
    tolerance = float(jnp.finfo(targets.dtype).eps)
    np.testing.assert_allclose(oracles.f64(targets), oracles.candidate_targets(mask), rtol=tolerance)
    np.testing.assert_array_equal(oracles.f64(under_jit), oracles.f64(targets))
    assert np.isnan(oracles.f64(targets)[4]).all()


def test_weights_repeat_rows(data):
    kernel, feats, ids = data
    copies = np.arange(N) % 3
    repeated = np.repeat(np.arange(N), copies)
    expected = lip_jax.refine(kernel, feats[repeated], ids[repeated], 1)
    for weights in (copies, copies.astype(np.float32), jnp.asarray(copies, jnp.bfloat16)):
        assert_same_head(lip_jax.refine(kernel, feats, ids, 1, weights=weights), expected)


def test_boolean_weights_are_a_mask(data, rng):
    kernel, feats, ids = data
    mask = rng.random(N) < 0.5
    refined = lip_jax.refine(kernel, feats, ids, 1, weights=mask)
    assert_same_head(refined, lip_jax.refine(kernel, feats[mask], ids[mask], 1))


@pytest.mark.parametrize(
    ("labels", "weights", "energy", "expected", "ignored"),
    [
        ([0, 3, -1, 4], None, [1, 1, 1, 1], [1, 1, 0, 0], 1),
        ([0, 3, -1, -1], None, [np.inf, 1, np.nan, 1], [0, 1, 0, 0], 1),
        ([0, 1, 2, -1], [2, -1, np.nan, np.inf], [1, 1, 1, 1], [2, 0, 0, 0], 3),
        ([9, 1, 2, -1], [0, 0, 0.5, 3], [1, np.nan, 1, 1], [0, 0, 0.5, 0], 0),
        ([[0, 1], [np.nan, np.nan], [np.nan, 1], [np.inf, 0]], None, [1, 1, 1, 1], [1, 0, 0, 0], 2),
        ([[0, 1], [np.nan, np.nan], [np.nan, 1], [0, 0]], [1, 1, 0, 1], [1, np.nan, 1, 1], [1, 0, 0, 1], 0),
    ],
    ids=["ids", "features", "bad weights", "weight 0 excuses", "targets", "targets excused"],
)
def test_use_and_count_of_rows(labels, weights, energy, expected, ignored):
    weights = None if weights is None else jnp.array(weights, jnp.float32)
    use = row_use(jnp.array(energy, jnp.float32), label_use(jnp.array(labels), 4), weights)
    np.testing.assert_array_equal(use.weights, expected)
    assert int(use.ignored) == ignored


def test_ids_of_l_or_more_raise_eagerly_and_are_dropped_not_clamped_under_jit(data):
    kernel, feats, ids = data
    ids[5] = L
    with pytest.raises(ValueError, match=r"below l = 4; got 4 at row 5 \(1 such rows\)"):
        lip_jax.refine(kernel, feats, ids, 1)
    under_jit = jax.jit(lambda ids: lip_jax.refine(kernel, feats, ids, 1))(jnp.asarray(ids))
    others = np.arange(N) != 5
    assert_same_head(under_jit, lip_jax.refine(kernel, feats[others], ids[others], 1))
    clamped = lip_jax.refine(kernel, feats, np.minimum(ids, L - 1), 1)
    assert float(jnp.abs(under_jit - clamped).max()) > 1e-3


def test_constant_bad_rows_raise_when_only_another_argument_is_traced(data):
    kernel, feats, ids = data
    ids[5] = L
    with pytest.raises(ValueError, match="got 4 at row 5"):
        jax.vmap(lambda rank: lip_jax.refine(kernel, feats, ids, rank))(jnp.arange(3, dtype=jnp.int32))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "uint32", "uint64", "int64"])
def test_classes_are_counted_in_any_integer_dtype(data, dtype):
    _, feats, ids = data
    expected = lip_jax.linear_readout(feats, ids.astype(np.int32))
    assert class_count(ids.astype(dtype), None) == L == expected.kernel.shape[1]
    found = lip_jax.linear_readout(feats, ids.astype(dtype))
    np.testing.assert_array_equal(found.kernel, expected.kernel)
    assert lip_jax.label_quality(feats, ids.astype(dtype)).transition.shape == (L, L)


@pytest.mark.parametrize("labels", [np.full(3, -1), np.zeros(0, np.uint8)])
def test_labels_that_name_no_class_do_not_make_a_head_of_none(labels):
    with pytest.raises(ValueError, match=r"no row of labels.* names a class. Pass num_classes="):
        lip_jax.linear_readout(np.ones((len(labels), 2), np.float32), labels)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bias_that_is_not_finite_counts_as_0_under_jit(data, value):
    kernel, feats, ids = data
    bias = np.array([0.5, value, -1.0, 0.25], np.float32)
    zero = np.where(np.isfinite(bias), bias, 0)
    targets = oracles.one_hot(ids, L)[0].astype(np.float32)
    moments = lip_jax.accumulate(lip_jax.moment_accumulator(Q, L), [(feats, ids)])
    for labels in (ids, targets):
        found = jax.jit(lambda b, y=labels: lip_jax.refine(kernel, feats, y, 1, bias=b))(bias)
        assert_same_head(found, lip_jax.refine(kernel, feats, labels, 1, bias=zero))
    found = jax.jit(lambda b: lip_jax.refine_from(kernel, moments, 1, bias=b))(bias)
    assert_same_head(found, lip_jax.refine_from(kernel, moments, 1, bias=zero))


@pytest.mark.parametrize("n", [0, 1, 7, 1_000, 1_000_003])
def test_a_sample_is_spread_over_all_rows_and_of_those_that_count(n):
    size = min(n, 256)
    ids = np.zeros(n, np.int32)
    picked = np.asarray(spread_over(lip_jax.Rows(None, jnp.asarray(ids)), 1, size))
    np.testing.assert_array_equal(picked, np.arange(size) * n // max(size, 1))
    weights = np.ones(n, np.float32)
    weights[picked[::2]] = 0
    ids[picked[1::2]] = -1
    rows = lip_jax.Rows(None, jnp.asarray(ids), jnp.asarray(weights))
    others = np.asarray(spread_over(rows, 1, size))
    if n >= 2 * size:
        np.testing.assert_array_equal(others, picked + 1)
    targets = np.where(ids[:, None] < 0, np.nan, np.ones((n, 2))).astype(np.float32)
    rows = rows._replace(labels=jnp.asarray(targets))
    others = np.asarray(spread_over(rows, 2, size))
    if n >= 2 * size:
        np.testing.assert_array_equal(others[::2], picked[::2] + 1)
        np.testing.assert_array_equal(others[1::2], picked[1::2])


def test_finite_rows_whose_sums_overflow_are_an_error_or_count_for_nothing(data):
    kernel, feats, ids = data
    feats = np.full_like(feats, 1e18)
    with pytest.raises(ValueError, match=r"some rows could not be used: .* sums of them overflow float32"):
        lip_jax.refine(kernel, feats, ids, 1)
    found = jax.jit(lambda feats: lip_jax.refine(kernel, feats, ids, 1))(feats)
    np.testing.assert_array_equal(found, kernel)
