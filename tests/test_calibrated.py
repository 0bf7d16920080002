"""Calibrated LIP, step by step against explicit matrices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from lip_jax.methods import calibrated
from tests import oracles

N, Q, L = 80, 9, 5
RANK = 2


def separated_kernel(rng, q, l):
    """A kernel whose gauge-free part has singular values 1, 0.85, … and whose mean over classes is not 0."""
    r = min(q, l - 1)
    u = np.linalg.qr(rng.normal(size=(q, r)))[0]
    v = np.linalg.qr(np.concatenate([np.ones((l, 1)), rng.normal(size=(l, r))], axis=1))[0][:, 1 : r + 1]
    return u @ np.diag(1 - 0.15 * np.arange(r)) @ v.T + 0.3 * rng.normal(size=(q, 1))


def ids_the_head_likes(rng, kernel, feats, noise=1.0):
    logits = feats @ kernel
    return np.argmax(logits + noise * rng.gumbel(size=logits.shape), axis=1).astype(np.int32)


LABELS = {
    "class ids": lambda rng, ids: ids,
    "class ids, some unlabelled": lambda rng, ids: np.where(rng.random(len(ids)) < 0.2, -1, ids),
    "soft targets": lambda rng, ids: 0.7 * np.eye(L)[ids] + 0.3 * rng.dirichlet(np.ones(L), len(ids)),
    "candidate sets, one empty": lambda rng, ids: oracles.candidate_targets(
        ((rng.random((len(ids), L)) < 0.3) | (np.eye(L)[ids] > 0)) & (np.arange(len(ids)) != 3)[:, None]
    ),
}


def case(rng, dtype="float64", q=Q, l=L, mean=0.5):
    """Kernel, bias, features, class ids and weights (some 0) of a head that fits its labels somewhat."""
    kernel, feats = separated_kernel(rng, q, l), rng.normal(size=(N, q)) + mean
    labels = ids_the_head_likes(rng, kernel, feats)
    weights = rng.random(N) * (rng.random(N) > 0.2)
    bias = rng.normal(size=l)
    kernel, bias, feats, weights = (jnp.asarray(a, dtype) for a in (kernel, bias, feats, weights))
    return kernel, bias, feats, jnp.asarray(labels), weights


def logits_of(head, feats):
    logits = oracles.f64(feats) @ oracles.f64(head[0])
    return logits if head[1] is None else logits + oracles.f64(head[1])


# Every part of the result against the oracle.


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("shape", "with_bias"),
    [((9, 5), True), ((5, 9), True), ((7, 2), True), ((1, 3), True), ((9, 5), False), ((6, 6), False)],
    ids=str,
)
def test_kernel_bias_scale_and_sigma_are_the_oracles_at_every_rank(rng, dtype, shape, with_bias):
    tolerance = {"float64": 1e-11, "float32": 2e-5}[dtype]
    with jax.enable_x64(dtype == "float64"):
        kernel, bias, feats, labels, weights = case(rng, dtype, *shape)
        bias = bias if with_bias else None
        for rank in range(min(shape) + 1):
            head = lip_jax.refine_calibrated(
                kernel, feats, labels, jnp.int32(rank), bias=bias, weights=weights, ridge=0.5
            )
            expected = oracles.calibrated(kernel, bias, feats, labels, rank, weights=weights, ridge=0.5)
            assert oracles.relative_error(head.kernel, expected[0]) <= tolerance
            if with_bias:
                assert oracles.relative_error(head.bias, expected[1]) <= tolerance
            else:
                assert head.bias is None
            assert float(head.scale) == pytest.approx(expected[2], rel=tolerance)
            np.testing.assert_allclose(head.sigma, expected[3], rtol=0, atol=tolerance)
            assert {head.kernel.dtype, head.sigma.dtype, head.s.dtype, head.scale.dtype} == {kernel.dtype}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_every_label_kind_matches_the_oracle(rng, x64, labels, with_bias):
    kernel, bias, feats, ids, weights = case(rng)
    given_labels = LABELS[labels](rng, np.asarray(ids))
    bias = bias if with_bias else None
    head = lip_jax.refine_calibrated(kernel, feats, given_labels, RANK, bias=bias, weights=weights)
    expected = oracles.calibrated(kernel, bias, feats, given_labels, RANK, weights=weights)
    assert oracles.relative_error(head.kernel, expected[0]) <= 1e-12
    assert float(head.scale) == pytest.approx(expected[2], rel=1e-12)
    if with_bias:
        assert oracles.relative_error(head.bias, expected[1]) <= 1e-12


def test_class_ids_are_their_one_hot_targets(rng, x64):
    kernel, bias, feats, labels, weights = case(rng)
    targets = oracles.one_hot(labels, L)[0]
    by_id, by_target = (
        lip_jax.refine_calibrated(kernel, feats, y, RANK, bias=bias, weights=weights)
        for y in (labels, targets)
    )
    chex.assert_trees_all_close(by_id, by_target, rtol=1e-12, atol=1e-13)


# Gauge.


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_softmax_outputs_do_not_depend_on_the_gauge(rng, x64, with_bias):
    kernel, bias, feats, labels, _ = case(rng)
    bias = bias if with_bias else None
    shift = 5 * rng.normal(size=(Q, 1))
    plain = lip_jax.refine_calibrated(kernel, feats, labels, RANK, bias=bias)
    shifted = lip_jax.refine_calibrated(kernel + shift, feats, labels, RANK, bias=bias)
    before, after = (oracles.softmax(logits_of((h.kernel, h.bias), feats)) for h in (plain, shifted))
    np.testing.assert_allclose(after, before, atol=1e-12)
    np.testing.assert_allclose(shifted.sigma, plain.sigma, atol=1e-12)
    # The published refit, which knows no gauge, does depend on it.
    published = [lip_jax.refine(k, feats, labels, RANK) for k in (kernel, kernel + shift)]
    before, after = (oracles.softmax(logits_of((k, None), feats)) for k in published)
    assert np.abs(after - before).max() > 1e-2


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_mean_of_the_kernel_over_classes_is_kept(rng, x64, with_bias):
    kernel, bias, feats, labels, _ = case(rng)
    kernel = kernel + 1e3 * rng.normal(size=(Q, 1))
    head = lip_jax.refine_calibrated(kernel, feats, labels, 0, bias=bias if with_bias else None)
    assert np.abs(head.kernel - kernel).max() > 0.05
    np.testing.assert_allclose(head.kernel.mean(axis=1), kernel.mean(axis=1), atol=1e-12)


# Centre.


@pytest.mark.parametrize("rank", [0, RANK])
def test_weighted_mean_logit_is_unchanged_given_a_bias(rng, x64, rank):
    kernel, bias, feats, labels, weights = case(rng, mean=3.0)
    head = lip_jax.refine_calibrated(kernel, feats, labels, rank, bias=bias, weights=weights)
    before, after = (
        np.average(logits_of(pair, feats), axis=0, weights=weights)
        for pair in ((kernel, bias), (head.kernel, head.bias))
    )
    np.testing.assert_allclose(after, before, atol=1e-12)
    assert np.abs(np.asarray(head.bias - bias)).max() > 1e-2
    unweighted = logits_of((head.kernel, head.bias), feats) - logits_of((kernel, bias), feats)
    assert np.abs(unweighted.mean(axis=0)).max() > 1e-3


def test_without_bias_nothing_is_centred(rng, x64):
    kernel, _, feats, labels, _ = case(rng, mean=3.0)
    head = lip_jax.refine_calibrated(kernel, feats, labels, 0, bias=None)
    expected = oracles.calibrated(kernel, None, feats, labels, 0)
    centred = oracles.calibrated(kernel, np.zeros(L), feats, labels, 0)
    assert head.bias is None
    assert oracles.relative_error(head.kernel, expected[0]) <= 1e-12
    assert oracles.relative_error(head.kernel, centred[0]) > 1e-2


def test_moving_the_features_and_the_bias_alike_changes_no_logit(rng, x64):
    kernel, bias, feats, labels, _ = case(rng)
    move = 4 * rng.normal(size=Q)
    plain = lip_jax.refine_calibrated(kernel, feats, labels, 1, bias=bias)
    moved_bias = bias - jnp.asarray(move) @ kernel
    moved = lip_jax.refine_calibrated(kernel, feats + move[None, :], labels, 1, bias=moved_bias)
    expected = logits_of((plain.kernel, plain.bias), feats)
    np.testing.assert_allclose(
        logits_of((moved.kernel, moved.bias), oracles.f64(feats) + move), expected, atol=1e-11
    )


def test_a_large_feature_mean_costs_float32_no_more_than_its_rounding(rng):
    # Features of spread 1 about 1e3 are stored to eps·1e3 = 1.2e-4; the oracle reads them as stored. Their
    # projections err by as much, relative to a spread of 1.
    kernel, bias, feats, labels, weights = case(rng, "float32", mean=1e3)
    feats = jnp.asarray(np.asarray(feats), jnp.float32)
    labels = ids_the_head_likes(rng, oracles.f64(kernel), oracles.f64(feats) - 1e3)
    head = lip_jax.refine_calibrated(kernel, feats, labels, 1, bias=bias, weights=weights)
    expected = oracles.calibrated(kernel, bias, feats, labels, 1, weights=weights)
    assert oracles.relative_error(head.kernel, expected[0]) <= 1.2e-4
    assert float(head.scale) == pytest.approx(expected[2], rel=1.2e-4)
    change = expected[1] - oracles.f64(bias)
    assert np.abs(oracles.f64(head.bias) - oracles.f64(bias) - change).max() <= 1e3 * 1.2e-4
    assert np.abs(change).max() > 10


# Scale.


@pytest.mark.parametrize("factor", [1e-3, 0.5, 40.0])
def test_scaling_the_head_scales_the_refit(rng, x64, factor):
    kernel, bias, feats, labels, _ = case(rng)
    plain = lip_jax.refine_calibrated(kernel, feats, labels, RANK, bias=bias)
    scaled = lip_jax.refine_calibrated(factor * kernel, feats, labels, RANK, bias=factor * bias)
    assert oracles.relative_error(scaled.kernel, factor * plain.kernel) <= 1e-12
    assert oracles.relative_error(scaled.bias, factor * plain.bias) <= 1e-12
    assert float(scaled.scale) == pytest.approx(factor * float(plain.scale), rel=1e-12)


def test_at_its_scale_the_head_is_its_own_best_multiple(rng, x64):
    kernel, bias, feats, labels, _ = case(rng)
    head = lip_jax.refine_calibrated(kernel, feats, labels, RANK, bias=bias)
    off_x = oracles.f64(feats - feats.mean(axis=0)[None, :])
    logits = off_x @ oracles.f64(kernel - kernel.mean(axis=1, keepdims=True))
    targets = oracles.one_hot(labels, L)[0]
    targets = float(head.scale) * (targets - targets.mean(axis=0))
    best = np.linalg.lstsq(logits.reshape(-1, 1), targets.ravel(), rcond=None)[0]
    np.testing.assert_allclose(best, 1, rtol=1e-12)


UNDEFINED = {
    "a zero kernel": lambda k, f, y: (0 * k, f, y),
    "logits that fall with targets": lambda k, f, y: (-k, f, y),
    "constant features": lambda k, f, y: (k, 0 * f, y),
    "no labelled row": lambda k, f, y: (k, f, jnp.full_like(y, -1)),
    "no row": lambda k, f, y: (k, f[:0], y[:0]),
}


@pytest.mark.parametrize("why", UNDEFINED)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_undefined_scale_is_reported_as_0_and_the_head_comes_back_bit_for_bit(rng, why, with_bias):
    kernel, bias, feats, labels, _ = case(rng, "float32")
    kernel, feats, labels = UNDEFINED[why](kernel, feats, labels)
    bias = bias.at[1].set(-0.0) if with_bias else None
    for rank in (0, RANK):
        head = lip_jax.refine_calibrated(kernel, feats, labels, rank, bias=bias)
        assert float(head.scale) == 0
        chex.assert_tree_all_finite(head)
        assert np.asarray(head.kernel).tobytes() == np.asarray(kernel).tobytes()
        if with_bias:
            assert np.asarray(head.bias).tobytes() == np.asarray(bias).tobytes()
        np.testing.assert_array_equal(head.sigma, head.s)


# What stays.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (1, 3)], ids=str)
def test_full_rank_returns_kernel_and_bias_bit_for_bit(rng, dtype, shape):
    kernel, bias, feats, labels, _ = case(rng, "float32", *shape)
    # A pruned weight may be −0, which + 0 would turn to +0.
    kernel = kernel.at[0, :2].set(-0.0).astype(dtype)
    bias = bias.at[:2].set(-0.0).astype(dtype)
    labels = ids_the_head_likes(rng, oracles.f64(kernel), oracles.f64(feats), 0.01)
    head = lip_jax.refine_calibrated(kernel, feats, labels, min(shape), bias=bias)
    assert float(head.scale) > 0
    assert np.asarray(head.kernel).tobytes() == np.asarray(kernel).tobytes()
    assert np.asarray(head.bias).tobytes() == np.asarray(bias).tobytes()


@pytest.mark.parametrize(("kernel_dtype", "bias_dtype"), [("bfloat16", "float32"), ("float32", "float16")])
def test_kernel_and_bias_keep_their_dtypes(rng, kernel_dtype, bias_dtype):
    kernel, bias, feats, labels, _ = case(rng, "float32")
    kernel, bias = kernel.astype(kernel_dtype), bias.astype(bias_dtype)
    head = lip_jax.refine_calibrated(kernel, feats.astype(jnp.bfloat16), labels, 0, bias=bias)
    assert (head.kernel.dtype, head.bias.dtype) == (kernel_dtype, bias_dtype)
    expected = oracles.calibrated(kernel, bias, feats.astype(jnp.bfloat16), labels, 0)
    rounding = float(jnp.finfo(kernel_dtype).eps + jnp.finfo(bias_dtype).eps)
    assert oracles.relative_error(head.kernel, expected[0]) <= rounding
    assert oracles.relative_error(head.bias, expected[1]) <= rounding


# Transforms.


def test_jit_vmap_over_ranks_and_eager_agree_with_one_compilation(rng):
    kernel, bias, feats, labels, weights = case(rng, "float32")

    def refine(rank):
        return lip_jax.refine_calibrated(kernel, feats, labels, rank, bias=bias, weights=weights)

    eager = [refine(rank) for rank in range(L + 1)]
    compiled = calibrated._calibrated_head._cache_size()
    jitted = jax.jit(chex.assert_max_traces(refine, n=1))
    one_by_one = [jitted(jnp.int32(rank)) for rank in range(L + 1)]
    stacked = jax.vmap(refine)(jnp.arange(L + 1, dtype=jnp.int32))
    for rank in range(L + 1):
        chex.assert_trees_all_close(one_by_one[rank], eager[rank], rtol=1e-5, atol=1e-6)
        nth = jax.tree.map(lambda a: a[rank], stacked)  # noqa: B023
        chex.assert_trees_all_close(nth, eager[rank], rtol=1e-5, atol=1e-6)
    assert jitted._cache_size() == 1
    again = [refine(rank) for rank in range(L + 1)]
    chex.assert_trees_all_equal(again, eager)
    assert calibrated._calibrated_head._cache_size() <= compiled + 2  # inside jit, and inside vmap


def test_unusable_rows_under_jit_count_for_nothing_and_are_counted(rng):
    kernel, bias, feats, labels, _ = case(rng, "float32")
    spoilt = feats.at[4].set(jnp.nan), labels.at[7].set(L).at[9].set(-1)
    without = jnp.ones(N, jnp.float32).at[jnp.array([4, 7, 9])].set(0)
    head = jax.jit(lambda f, y: lip_jax.refine_calibrated(kernel, f, y, 1, bias=bias))(*spoilt)
    expected = lip_jax.refine_calibrated(kernel, feats, labels, 1, bias=bias, weights=without)
    assert int(head.ignored) == 2
    chex.assert_trees_all_close(head.kernel, expected.kernel, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(head.bias, expected.bias, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"labels must be class ids below l = 5; got 5 at row 7"):
        lip_jax.refine_calibrated(kernel, *spoilt, 1, bias=bias)


def test_errors_say_what_is_wrong(rng, unchecked):
    kernel, bias, feats, labels, _ = case(rng, "float32")
    refine = lip_jax.refine_calibrated
    with pytest.raises(ValueError, match=r"at least two outputs; got float32\[9,1\].*lip_jax\.refine"):
        refine(kernel[:, :1], feats, labels, 0, bias=bias[:1])
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 5\].*got 6"):
        refine(kernel, feats, labels, 6, bias=bias)
    with pytest.raises(ValueError, match=r"bias must have one entry per class, l = 5"):
        refine(kernel, feats, labels, 1, bias=bias[:3])
    with pytest.raises(ValueError, match=r"feats must have as many columns .* q = 9"):
        refine(kernel, feats[:, :4], labels, 1, bias=bias)
    with pytest.raises(ValueError, match=r"rcond must lie in \[0, 1\)"):
        refine(kernel, feats, labels, 1, bias=bias, rcond=2.0)
    with pytest.raises(ValueError, match=r"ridge must be finite and at least 0; got -1"):
        refine(kernel, feats, labels, 1, bias=bias, ridge=-1.0)
