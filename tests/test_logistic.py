"""The logistic readout against scikit-learn's optimum and against the gradient of its own objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import lip_jax
from tests import oracles

N, Q, L = 120, 6, 4


def case(rng, dtype="float64"):
    """Classes that overlap, features of unequal scales about a mean that is not 0."""
    labels = rng.integers(0, L, N).astype(np.int32)
    feats = rng.normal(size=(N, Q)) + 1.5 * np.eye(L, Q)[labels]
    return jnp.asarray(feats * np.logspace(-1, 1, Q) + 3, dtype), jnp.asarray(labels)


def value_of(readout, feats, labels, ridge, weights=None):
    bias = 0 if readout.bias is None else readout.bias
    return oracles.logistic_objective(readout.kernel, bias, feats, labels, L, weights=weights, ridge=ridge)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_the_objective_is_scikit_learns_optimum(rng, dtype, weighted, ridge):
    with jax.enable_x64(dtype == "float64"):
        feats, labels = case(rng, dtype)
        weights = jnp.asarray(rng.random(N) + 0.1, dtype) if weighted else None
        readout = lip_jax.linear_readout(
            feats, labels, num_classes=L, solver="logistic", ridge=ridge, weights=weights
        )
        peer = LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=10_000)
        peer.fit(oracles.f64(feats), labels, sample_weight=None if weights is None else oracles.f64(weights))
        best, *_ = oracles.logistic_objective(
            peer.coef_.T, peer.intercept_, feats, labels, L, weights=weights, ridge=ridge
        )
        found, *_ = value_of(readout, feats, labels, ridge, weights)
        assert found <= best * (1 + 1e-6)
        assert bool(readout.converged)
        np.testing.assert_allclose(readout.objective, found, rtol=1e-6 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "no intercept"])
@pytest.mark.parametrize("kind", ["ids", "targets"])
def test_the_gradient_vanishes_at_the_solution(rng, x64, intercept, kind):
    feats, labels = case(rng)
    if kind == "targets":
        labels = rng.dirichlet(np.ones(L), N) * rng.uniform(0.5, 2, (N, 1))  # of unequal mass
        labels[5:9] = np.nan
        labels = jnp.asarray(labels)
    else:
        labels = labels.at[5:9].set(-1)
    readout = lip_jax.linear_readout(
        feats, labels, num_classes=L, solver="logistic", ridge=2.0, intercept=intercept, tolerance=1e-14
    )
    value, by_kernel, by_bias = value_of(readout, feats, labels, 2.0)
    assert np.abs(by_kernel).max() <= 1e-5 * value
    if intercept:
        assert np.abs(by_bias).max() <= 1e-6 * value


def test_the_gap_estimates_the_distance_to_the_minimum(rng, x64):
    feats, labels = case(rng)
    fit = lambda steps: lip_jax.linear_readout(  # noqa: E731
        feats, labels, num_classes=L, solver="logistic", ridge=1.0, tolerance=1e-13, max_steps=steps
    )
    best = fit(200)
    assert bool(best.converged)
    for steps in (3, 6, 9):
        early = fit(steps)
        assert int(early.steps) == steps
        assert not bool(early.converged)
        distance = float(early.objective - best.objective)
        assert distance / 10 <= float(early.gap) <= 10 * distance


@pytest.mark.slow
def test_a_start_near_the_solution_saves_steps_and_a_bad_one_does_no_harm(rng, x64):
    feats, labels = case(rng)
    fit = lambda init: lip_jax.linear_readout(  # noqa: E731
        feats, labels, num_classes=L, solver="logistic", ridge=1.0, init=init
    )
    cold = fit(None)
    warm = fit((cold.kernel, cold.bias))
    wild = fit((100 * jnp.asarray(rng.normal(size=(Q, L))), None))
    assert int(warm.steps) < int(cold.steps) / 2
    assert int(wild.steps) == int(cold.steps)
    for other in (warm, wild):
        np.testing.assert_allclose(other.objective, cold.objective, rtol=1e-6)


@pytest.mark.slow
def test_the_strength_is_chosen_by_log_loss_on_a_fifth_of_the_rows(rng, x64):
    feats, labels = case(rng)
    chosen = lip_jax.linear_readout(feats, labels, num_classes=L, solver="logistic")
    held = np.asarray(jax.random.permutation(jax.random.key(0), N)) % 5 == 0
    off = oracles.f64(feats)[~held] - oracles.f64(feats)[~held].mean(axis=0)
    grid = (off**2).sum() / Q * np.logspace(2, -4, 7)
    losses = []
    for ridge in grid:
        fit = lip_jax.linear_readout(
            feats[~held], labels[~held], num_classes=L, solver="logistic", ridge=ridge
        )
        logits = feats[held] @ fit.kernel + fit.bias[None, :]
        losses.append(lip_jax.head_metrics(logits, labels[held]).log_loss)
    np.testing.assert_allclose(chosen.ridge, 1.25 * grid[np.argmin(losses)], rtol=1e-9)


@pytest.mark.slow
def test_rows_that_cycle_through_the_classes_are_held_out_fairly(rng):
    # Every fifth row would be all there is of one class.
    labels = np.arange(300) % 5
    feats = np.float32(3 * np.eye(5)[labels] + rng.normal(size=(300, 5)))
    readout = lip_jax.linear_readout(feats, labels, solver="logistic")
    strongest = 1.25 * 100 * np.var(feats, axis=0).mean() * 240
    assert readout.ridge < strongest / 50


def test_a_class_without_rows_gets_a_small_finite_probability(rng):
    feats, labels = case(rng, "float32")
    readout = lip_jax.linear_readout(feats, labels, num_classes=L + 1, solver="logistic", ridge=1.0)
    share = jax.nn.softmax(feats @ readout.kernel + readout.bias[None, :])[:, L]
    assert bool(jnp.isfinite(share).all())
    assert float(share.max()) < 0.02


def test_under_jit_unusable_rows_count_for_nothing_and_strict_promotion_is_kept(rng):
    feats, labels = case(rng, "float32")
    fit = jax.jit(
        lambda f, y: lip_jax.linear_readout(f, y, num_classes=L, solver="logistic", ridge=1.0, max_steps=50)
    )
    spoilt = fit(feats.at[3].set(jnp.nan), labels.at[7].set(99))
    plain = fit(feats, labels.at[jnp.array([3, 7])].set(-1))
    assert int(spoilt.ignored) == 2
    np.testing.assert_allclose(spoilt.kernel, plain.kernel, rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_the_strength_is_chosen_on_rows_that_count(rng):
    n = 1_000
    place = np.asarray(jax.random.permutation(jax.random.key(0), n))
    labels = np.full(n, -1)
    known = np.flatnonzero(place % 5)[:60]  # none of the fifth of all rows that the key draws
    labels[known] = np.arange(60) % 2
    feats = (rng.normal(size=(n, 4)) + 2 * labels[:, None]).astype(np.float32)
    found = lip_jax.linear_readout(feats, labels, num_classes=2, solver="logistic")
    weighted = lip_jax.linear_readout(
        feats,
        np.maximum(labels, 0),
        num_classes=2,
        solver="logistic",
        weights=(labels >= 0).astype(np.float32),
    )
    few = lip_jax.linear_readout(feats[known], labels[known], num_classes=2, solver="logistic")
    assert float(found.ridge) == pytest.approx(float(weighted.ridge), rel=1e-5)
    assert float(found.ridge) < 20 * float(few.ridge)
