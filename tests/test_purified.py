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
