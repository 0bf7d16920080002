"""Heads trained on CLINC150: parity, the null direction and the bounds where the spectra are real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from lip_jax.numerics import linalg
from tests import oracles

L = 150
RANKS = (0, 75, 149)


@pytest.fixture(scope="module", params=["well regularised", "overfitted"])
def head(request, clinc150):
    """Kernel and bias of a head trained on 40% wrong labels, and those labels."""
    from benchmarks import heads

    noisy = lip_jax.noise.symmetric(jax.random.key(0), clinc150.train_y, 0.4, num_classes=L)
    if request.param == "well regularised":
        params = heads.train_regularised(clinc150.train_x, noisy, num_classes=L)
    else:
        params = heads.train_overfitted(jax.random.key(1), clinc150.train_x, noisy, num_classes=L, epochs=15)
    params = params["params"]["head"]
    return np.asarray(params["kernel"]), np.asarray(params["bias"]), np.asarray(noisy)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_refit_matches_the_published_formula(head, clinc150, dtype):
    kernel, bias, labels = head
    # A fifteenth of the rows, as the published n×l residual is dear in float64.
    kernel, bias, feats = (a.astype(dtype) for a in (kernel, bias, clinc150.train_x[::15]))
    labels = labels[::15]
    weights = np.random.default_rng(0).random(len(labels)).astype(dtype)
    rcond = np.finfo(dtype).eps * max(kernel.shape)
    for options in ({}, {"bias": bias, "weights": weights, "ridge": 30.0, "ridge_to": "zero"}):
        for rank in RANKS:
            with jax.enable_x64(dtype == "float64"):
                split = lip_jax.svd_split(kernel, jnp.int32(rank))
                sigma = lip_jax.solve_tail_sigma(split, feats, labels, **options)
            factors = split.u, split.s, split.vt
            expected = oracles.tail_sigma(*factors, rank, feats, labels, rcond=rcond, **options)
            error = oracles.relative_error(sigma, expected)
            assert error <= {"float32": 1e-5, "float64": 1e-12}[dtype], (rank, sorted(options))


def test_a_head_trained_on_wrong_labels_is_factorised_by_its_gram_matrix(head):
    kernel = head[0]
    exact = np.linalg.svd(oracles.f64(kernel), compute_uv=False)
    # Wrong labels leave no direction small but the one that weight decay empties.
    assert exact[-2] > linalg.GRAM_SHARE * exact[0]
    assert linalg.gram_is_safe(jnp.asarray(kernel.T @ kernel))
    split = lip_jax.svd_split(kernel, 0)
    u, s, vt = (oracles.f64(part) for part in (split.u, split.s, split.vt))
    np.testing.assert_allclose(s, exact, rtol=0, atol=1e-5 * exact[0])
    np.testing.assert_allclose((u * s) @ vt, kernel, rtol=0, atol=1e-5 * exact[0])
    np.testing.assert_allclose(u.T @ u, np.eye(L), rtol=0, atol=2e-5)


def test_full_rank_is_the_trained_kernel(head, clinc150):
    kernel, _, labels = head
    assert np.asarray(lip_jax.refine(kernel, clinc150.train_x, labels, L)).tobytes() == kernel.tobytes()


@pytest.mark.parametrize("head", ["well regularised"], indirect=True)
def test_null_direction_that_weight_decay_leaves_does_not_amplify_a_perturbation(head, clinc150):
    kernel, _, labels = head
    spectrum = np.linalg.svd(oracles.f64(kernel), compute_uv=False)
    assert spectrum[-1] < 1e-6 * spectrum[0] < spectrum[-2]
    perturbation = np.random.default_rng(0).normal(size=kernel.shape)
    perturbation *= 1e-6 * np.linalg.norm(kernel) / np.linalg.norm(perturbation)
    perturbed = (kernel + perturbation).astype(np.float32)
    for rank in (0, 75, 149):
        rank = jnp.int32(rank)
        before, after = (lip_jax.refine(k, clinc150.train_x, labels, rank) for k in (kernel, perturbed))
        assert oracles.relative_error(after, before) <= 1e-4
    literal = [lip_jax.refine(k, clinc150.train_x, labels, 0, rcond=0.0) for k in (kernel, perturbed)]
    assert oracles.relative_error(*literal) > 1e-2


def test_paper_bound_is_infinite_without_ridge_as_two_features_are_always_zero(clinc150):
    assert (clinc150.train_x == 0).all(axis=0).sum() == 2
    singular_values = lip_jax.bounds.feature_singular_values(clinc150.train_x)
    case = {"num_samples": len(clinc150.train_x), "num_classes": L, "gap": 0.1, "flip_rate": 0.1}
    bound = lip_jax.sin_theta_bound(singular_values=singular_values, **case)
    assert np.isposinf(bound.value)
    assert bool(bound.vacuous)
    assert np.isfinite(lip_jax.sin_theta_bound(singular_values=singular_values, ridge=1.0, **case).value)
