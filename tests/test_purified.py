"""Purified readouts: readouts of the rows whose labels are trusted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from lip_jax.methods.purified import TOLERANCE

N, Q, L = 300, 8, 4


def clusters(rng, n=N, spread=1.0, dtype=np.float32):
    """Classes around the first unit vectors."""
    true = (np.arange(n) % L).astype(np.int32)
    feats = spread * rng.normal(size=(n, Q)) + 4 * np.eye(L, Q)[true]
    return jnp.asarray(feats, dtype), jnp.asarray(true)


@pytest.fixture
def noisy(rng):
    feats, true = clusters(rng)
    return feats, true, lip_jax.noise.symmetric(jax.random.key(0), true, 0.3, num_classes=L)


@pytest.mark.parametrize("solver", ["ridge", "logistic"])
def test_a_purified_readout_is_the_readout_of_the_trusted_rows(noisy, solver):
    feats, true, given = noisy
    found = lip_jax.purified_readout(feats, given, solver=solver, ridge=1.0)
    trusted = np.asarray(found.purified.trusted)
    plain = lip_jax.linear_readout(
        feats[trusted], given[trusted], num_classes=L, solver=solver, ridge=1.0, tolerance=TOLERANCE
    )
    np.testing.assert_allclose(found.readout.kernel, plain.kernel, rtol=2e-2, atol=2e-3)
    logits = feats @ found.readout.kernel + found.readout.bias[None, :]
    assert float(lip_jax.head_metrics(logits, true).accuracy) > 0.95


def test_a_purified_readout_of_candidate_sets_is_fitted_to_the_best_candidates(rng):
    feats, true = clusters(rng)
    targets = lip_jax.candidate_targets(
        lip_jax.noise.candidate_sets(jax.random.key(0), true, 0.3, num_classes=L)
    )
    found = lip_jax.purified_readout(feats, targets, solver="ridge", ridge=1.0)
    quality = found.purified.quality
    plain = lip_jax.linear_readout(feats, quality.given, ridge=1.0, weights=found.purified.weights)
    np.testing.assert_allclose(found.readout.kernel, plain.kernel, rtol=1e-5)


@pytest.mark.slow
def test_without_intercept_rows_are_certified_without_one_too(rng):
    # Far from the origin a readout without intercept judges labels otherwise.
    feats, true = clusters(rng)
    feats = feats + jnp.linspace(0, 3, Q)[None, :]
    given = lip_jax.noise.symmetric(jax.random.key(0), true, 0.3, num_classes=L)
    options = {"solver": "ridge", "ridge": 1.0}
    found = lip_jax.purified_readout(feats, given, intercept=False, **options)
    expected, other = (lip_jax.label_quality(feats, given, intercept=has) for has in (False, True))
    np.testing.assert_allclose(found.purified.quality.trust, expected.trust, rtol=1e-5)
    assert float(jnp.abs(found.purified.quality.trust - other.trust).max()) > 0.05
    assert found.readout.bias is None
    # As a method, it certifies as the head has a bias or none.
    method = lip_jax.Purified(solver="ridge", strength=1.0)
    for head, intercept in (
        ({"kernel": jnp.eye(Q, L)}, False),
        ({"kernel": jnp.eye(Q, L), "bias": jnp.zeros(L)}, True),
    ):
        applied = lip_jax.apply(head, feats, given, method=method)
        readout = lip_jax.purified_readout(feats, given, intercept=intercept, **options).readout
        np.testing.assert_allclose(applied["kernel"], readout.kernel, rtol=1e-4, atol=1e-5)


def test_a_purified_method_is_the_purified_readout_started_from_the_head(noisy):
    feats, _, given = noisy
    head = {"kernel": 0.1 * jnp.eye(Q, L), "bias": jnp.zeros(L)}
    applied = lip_jax.apply(head, feats, given, method=lip_jax.Purified(rule="margin", strength=1.0))
    readout = lip_jax.purified_readout(
        feats, given, rule="margin", ridge=1.0, init=(head["kernel"], head["bias"])
    ).readout
    np.testing.assert_allclose(applied["kernel"], readout.kernel, rtol=1e-4, atol=1e-4)
