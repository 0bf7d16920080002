"""The logit scale against scipy, at the ends of its bracket, and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

import lip_jax
from tests import oracles


def logits_case(rng, size, noise, n=300, l=4):
    logits = rng.normal(size=(n, l)) * size
    labels = np.argmax(logits + size * noise * rng.gumbel(size=logits.shape), axis=1).astype(np.int32)
    return logits, labels


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("noise", [0.05, 0.5, 3.0])
def test_logit_scale_is_scipys(rng, x64, size, noise):
    logits, labels = logits_case(rng, size, noise)
    logits += 7 * size * rng.normal(size=(300, 1))  # which softmax does not see
    weights = rng.random(300) * (rng.random(300) > 0.3)
    for options in ({}, {"weights": weights}):
        fitted = lip_jax.fit_logit_scale(logits, labels, **options)
        assert float(fitted) == pytest.approx(oracles.best_scale(logits, labels, **options), rel=1e-6)


def test_logit_scale_of_targets_and_of_unlabelled_rows_is_scipys(rng, x64):
    logits, labels = logits_case(rng, 2.0, 1.0)
    soft = 0.6 * np.eye(4)[labels] + 0.4 * rng.dirichlet(np.ones(4), 300)
    soft[5] = np.nan
    assert float(lip_jax.fit_logit_scale(logits, soft)) == pytest.approx(
        oracles.best_scale(logits, soft), rel=1e-6
    )
    some = np.where(rng.random(300) < 0.5, -1, labels)
    assert float(lip_jax.fit_logit_scale(logits, some)) == pytest.approx(
        oracles.best_scale(logits, some), rel=1e-6
    )


def test_logit_scale_in_float32_is_scipys_to_its_precision(rng):
    logits, labels = logits_case(rng, 1.0, 0.5)
    logits = logits.astype(np.float32)
    fitted = lip_jax.fit_logit_scale(logits, labels)
    assert fitted.dtype == jnp.float32
    assert float(fitted) == pytest.approx(oracles.best_scale(logits, labels), rel=1e-5)


@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-8, 8),
    kind=st.sampled_from(["right", "wrong", "random"]),
)
def test_logit_scale_never_raises_the_log_loss(seed, exponent, kind):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(12, 3)) * 10.0**exponent
    labels = {
        "right": logits.argmax(axis=1),
        "wrong": logits.argmin(axis=1),
        "random": rng.integers(0, 3, 12),
    }[kind].astype(np.int32)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        scale = float(lip_jax.fit_logit_scale(logits, labels))
        before = float(lip_jax.head_metrics(logits, labels).log_loss)
        after = float(lip_jax.head_metrics(scale * logits, labels).log_loss)
    assert 0 < scale < np.inf
    assert after <= before * (1 + 1e-14)


def test_logit_scale_of_degenerate_logits_is_1_and_of_decided_ones_at_the_end_of_its_bracket(rng):
    ids = jnp.asarray(rng.integers(0, 3, 20), jnp.int32)
    logits = jnp.asarray(rng.normal(size=(20, 3)), jnp.float32)
    for constant in (jnp.zeros((20, 3)), jnp.full((20, 3), 4.0), jnp.broadcast_to(logits[:, :1], (20, 3))):
        assert float(lip_jax.fit_logit_scale(constant, ids)) == 1
    assert float(lip_jax.fit_logit_scale(logits, jnp.full_like(ids, -1))) == 1
    assert float(lip_jax.fit_logit_scale(logits, ids, weights=jnp.zeros(20))) == 1
    assert float(lip_jax.fit_logit_scale(logits[:0], ids[:0])) == 1
    assert float(lip_jax.fit_logit_scale(1e25 * logits, ids)) == 1
    spread = float(jnp.std(logits - logits.mean(axis=1, keepdims=True)))
    right = float(lip_jax.fit_logit_scale(logits, jnp.argmax(logits, axis=1).astype(jnp.int32)))
    wrong = float(lip_jax.fit_logit_scale(logits, jnp.argmin(logits, axis=1).astype(jnp.int32)))
    assert 10 / spread < right <= 1.001e4 / spread
    assert wrong == pytest.approx(1e-4 / spread, rel=1e-2)


def test_gradients_of_the_logit_scale_match_finite_differences(rng, x64):
    logits, labels = logits_case(rng, 1.0, 1.0, n=40)
    soft = jnp.asarray(0.6 * np.eye(4)[labels] + 0.4 * rng.dirichlet(np.ones(4), 40))
    for fixed in ((labels,), ()):
        scale = lambda weights, logits, *given, fixed=fixed: lip_jax.fit_logit_scale(  # noqa: E731
            logits, *fixed, *given, weights=weights
        )
        arguments = jnp.asarray(rng.random(40) + 0.1), jnp.asarray(logits), soft
        check_grads(scale, arguments[: 3 - len(fixed)], order=1, modes=["fwd", "rev"], rtol=1e-5)


def test_logit_scale_ignores_unusable_rows_under_jit(rng):
    logits, labels = logits_case(rng, 1.0, 1.0, n=40)
    logits, targets = jnp.asarray(logits, jnp.float32), jax.nn.one_hot(labels, 4)
    used = jnp.ones(40, jnp.float32).at[jnp.array([2, 3, 5])].set(0)
    expected = lip_jax.fit_logit_scale(logits, targets, weights=used)
    spoilt = logits.at[2].set(jnp.nan), targets.at[3, 1].set(jnp.inf).at[5, 0].set(jnp.nan)
    assert float(jax.jit(lip_jax.fit_logit_scale)(*spoilt)) == pytest.approx(float(expected), rel=1e-5)


def test_logit_scale_says_what_does_not_fit(rng, unchecked):
    logits = jnp.ones((6, 3))
    with pytest.raises(ValueError, match=r"labels must have one row per row of feats, n = 6"):
        lip_jax.fit_logit_scale(logits, jnp.zeros(5, jnp.int32))
    with pytest.raises(ValueError, match=r"logits must be floating point"):
        lip_jax.fit_logit_scale(jnp.ones((6, 3), jnp.int32), jnp.zeros(6, jnp.int32))
    with pytest.raises(ValueError, match=r"weights must have shape \(n,\) = \(6,\)"):
        lip_jax.fit_logit_scale(logits, jnp.zeros(6, jnp.int32), weights=jnp.ones(3))


@pytest.mark.parametrize("weights", [None, np.zeros(4, np.float32)])
def test_the_gradient_of_a_scale_that_is_not_defined_is_finite(weights):
    labels = jnp.array([0, 1, 0, 0])
    scale = lambda logits: lip_jax.fit_logit_scale(logits, labels, weights=weights)  # noqa: E731
    for logits in (jnp.zeros((4, 2)), jnp.ones((4, 2))):
        assert float(scale(logits)) == 1
        assert jnp.isfinite(jax.grad(scale)(logits)).all()
