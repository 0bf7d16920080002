"""The ridge readout at every strength against scikit-learn."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from lip_jax.readout import ridge_grid, ridge_path, ridge_solution
from tests import oracles

N, Q, L = 90, 7, 4


def case(rng, dtype="float64", n=N, q=Q):
    feats = rng.normal(size=(n, q)) @ rng.normal(size=(q, q)) + 3
    labels = rng.integers(0, L, n).astype(np.int32)
    weights = rng.random(n) * (rng.random(n) > 0.2)
    return jnp.asarray(feats, dtype), jnp.asarray(labels), jnp.asarray(weights, dtype)


def reference(feats, labels, weights, ridge, intercept):
    """Kernel and intercept by scikit-learn, of the labelled rows."""
    targets, labelled = oracles.as_targets(labels, L)
    weights = None if weights is None else oracles.f64(weights)[labelled]
    model = Ridge(
        alpha=float(ridge), fit_intercept=intercept, solver="svd" if weights is None else "cholesky"
    )
    model.fit(oracles.f64(feats)[labelled], targets[labelled], sample_weight=weights)
    return model.coef_.T, model.intercept_ if intercept else np.zeros(L)


@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "no intercept"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("shape", [(N, Q), (20, 40)], ids=["tall", "more features than rows"])
def test_every_strength_is_scikit_learns_ridge(rng, x64, intercept, weighted, shape):
    feats, labels, weights = case(rng, n=shape[0], q=shape[1])
    weights = weights if weighted else None
    path = ridge_path(feats, labels, weights, L, intercept=intercept)
    for ridge in ridge_grid(path, 13):
        kernel, offset = ridge_solution(path, ridge)
        expected = reference(feats, labels, weights, ridge, intercept)
        assert oracles.relative_error(kernel, expected[0]) <= 1e-8
        np.testing.assert_allclose(offset, expected[1], rtol=1e-8, atol=1e-8)


def test_soft_targets_and_unlabelled_rows_are_scikit_learns_ridge(rng, x64):
    feats, _, weights = case(rng)
    soft = rng.dirichlet(np.ones(L), N)
    soft[4:9] = np.nan
    path = ridge_path(feats, jnp.asarray(soft), weights, L, intercept=True)
    kernel, offset = ridge_solution(path, jnp.asarray(2.5))
    expected = reference(feats, soft, weights, 2.5, True)
    assert oracles.relative_error(kernel, expected[0]) <= 1e-12
    np.testing.assert_allclose(offset, expected[1], rtol=1e-11)


@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "no intercept"])
def test_class_ids_give_the_path_of_their_one_hot_targets(rng, x64, intercept):
    feats, labels, weights = case(rng)
    labels = labels.at[3:8].set(-1)
    targets = jnp.asarray(np.where(np.asarray(labels)[:, None] < 0, np.nan, np.eye(L)[labels]))
    by_id, by_target = (ridge_path(feats, y, weights, L, intercept=intercept) for y in (labels, targets))
    chex.assert_trees_all_close(by_id, by_target, rtol=1e-12, atol=1e-12)


def test_strengths_span_six_decades_about_the_mean_eigenvalue(rng, x64):
    feats, labels, _ = case(rng)
    path = ridge_path(feats, labels, None, L, intercept=True)
    off = oracles.f64(feats) - oracles.f64(feats).mean(axis=0)
    mean = np.trace(off.T @ off) / Q
    np.testing.assert_allclose(ridge_grid(path, 7), mean * 10.0 ** np.arange(-4, 3), rtol=1e-12)


def test_a_large_feature_mean_costs_float32_no_more_than_its_rounding(rng):
    # Features of spread 1 about 1e3 are stored to 6e-5, and read as stored; their mean errs by as much.
    feats = jnp.asarray(rng.normal(size=(500, Q)) + 1e3, jnp.float32)
    labels = jnp.argmax(feats[:, :L], axis=1).astype(jnp.int32)
    kernel, offset = ridge_solution(ridge_path(feats, labels, None, L, intercept=True), jnp.float32(5.0))
    expected = reference(feats, labels, None, 5.0, True)
    assert oracles.relative_error(kernel, expected[0]) <= 1e-4
    logits = oracles.f64(feats) @ oracles.f64(kernel) + oracles.f64(offset)
    expected_logits = oracles.f64(feats) @ expected[0] + expected[1]
    np.testing.assert_allclose(logits, expected_logits, atol=5e-4)


@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "no intercept"])
def test_without_rows_the_readout_is_0_at_every_strength(intercept):
    path = ridge_path(jnp.zeros((0, Q)), jnp.zeros(0, jnp.int32), None, L, intercept=intercept)
    for ridge in ridge_grid(path, 3):
        kernel, offset = ridge_solution(path, ridge)
        assert not kernel.any()
        assert not offset.any()


def test_rows_that_cannot_be_used_count_for_nothing(rng):
    feats, labels, _ = case(rng, "float32")
    spoilt = feats.at[3].set(jnp.nan), labels.at[5].set(L)
    without = jnp.ones(N).at[jnp.array([3, 5])].set(0)
    fit = jax.jit(lambda f, y, w: ridge_solution(ridge_path(f, y, w, L, intercept=True), jnp.float32(2.0)))
    chex.assert_trees_all_close(fit(*spoilt, None), fit(feats, labels, without), rtol=1e-4, atol=1e-5)
