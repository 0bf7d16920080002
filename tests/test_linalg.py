"""The factorisation by either way, against LAPACK in double precision."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lip_jax.numerics import linalg
from tests import oracles

SHAPES = [(60, 12), (12, 12), (300, 40), (7, 1), (2, 2)]


def orthonormal(rng, q, l):
    return np.linalg.qr(rng.normal(size=(q, l)))[0]


def kernel_of(rng, q, s, last=None):
    """A kernel with the singular values `s`; `last` is the direction of the classes of the last."""
    s = np.asarray(s, np.float64)
    l = len(s)
    v = orthonormal(rng, l, l)
    if last is not None:
        # QR keeps the first direction.
        v = np.linalg.qr(np.concatenate([last[:, None], rng.normal(size=(l, l - 1))], axis=1))[0][:, ::-1]
    return (orthonormal(rng, q, l) * s) @ v.T


def gauge(l):
    return np.full(l, 1 / np.sqrt(l))


ONE_AGAINST_ANOTHER = np.eye(12)[0] - np.eye(12)[1]

thin_svd, by_qr = jax.jit(linalg.thin_svd, static_argnums=1), jax.jit(linalg.svd_by_qr)


@jax.jit
def is_safe(kernel):
    return linalg.gram_is_safe(linalg.matmul(kernel.T, kernel))


@jax.jit
def by_gram(kernel):
    return linalg.svd_of_gram(kernel, linalg.matmul(kernel.T, kernel))


def assert_is_svd(found, kernel, tolerance):
    u, s, vt = (oracles.f64(part) for part in found)
    kernel = oracles.f64(kernel)
    exact = np.linalg.svd(kernel, compute_uv=False)
    np.testing.assert_allclose(u.T @ u, np.eye(len(s)), rtol=0, atol=tolerance)
    np.testing.assert_allclose(vt @ vt.T, np.eye(len(s)), rtol=0, atol=tolerance)
    np.testing.assert_allclose((u * s) @ vt, kernel, rtol=0, atol=tolerance * exact[0])
    np.testing.assert_allclose(s, exact, rtol=0, atol=tolerance * exact[0])
    assert (np.diff(s) <= 0).all()
    assert (s >= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_is_as_good_as_qr_where_it_is_called_safe(rng, shape, dtype):
    q, l = shape
    tolerance = 200 * np.finfo(dtype).eps
    for smallest, last in product([1.0, 0.5, 1.1 * linalg.GRAM_SHARE], [None, 0.0, 1e-8, 1e-4, 0.05]):
        s = np.geomspace(1, smallest, l)
        if last is not None and l > 1:
            s[-1] = last
        for scale in (1.0, 1e8, 1e-11):
            with jax.enable_x64(dtype == "float64"):
                kernel = jnp.asarray(scale * kernel_of(rng, q, s, gauge(l)), dtype)
                assert is_safe(kernel)
                assert_is_svd(by_gram(kernel), kernel, tolerance)
                assert_is_svd(thin_svd(kernel), kernel, tolerance)


@pytest.mark.parametrize("start", [1, 11, 12])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("last", [0.7, 0.0])
@pytest.mark.parametrize("smallest", [0.8, 1.1 * linalg.GRAM_SHARE, 1e-3])
def test_some_vectors_complete_the_others(rng, smallest, last, wide, start):
    kernel = kernel_of(rng, 60, [*np.geomspace(1, smallest, 11), last * smallest], gauge(12))
    assert is_safe(jnp.asarray(kernel, jnp.float32)) == (smallest > linalg.GRAM_SHARE)
    kernel = jnp.asarray(kernel.T if wide else kernel, jnp.float32)
    (u, _, vt), (tail_u, s, tail_vt) = thin_svd(kernel), thin_svd(kernel, start)
    assert (tail_u.shape[1], tail_vt.shape[0]) == (12 - start,) * 2
    found = jnp.concatenate([u[:, :start], tail_u], axis=1), s, jnp.concatenate([vt[:start], tail_vt])
    assert_is_svd(found, kernel, 100 * np.finfo(np.float32).eps)


UNSAFE = {
    "two small": lambda rng: kernel_of(rng, 60, [*np.ones(10), 0.05, 0.05]),
    "two small, one along the gauge": lambda rng: kernel_of(rng, 60, [*np.ones(10), 0.05, 0.0], gauge(12)),
    "one small elsewhere": lambda rng: kernel_of(
        rng, 60, [*np.ones(11), 1e-3], np.eye(12)[0] - np.eye(12)[1]
    ),
    "wide spectrum": lambda rng: kernel_of(rng, 60, np.geomspace(1, 1e-6, 12)),
    "one class alone": lambda rng: kernel_of(rng, 60, [1.0, *np.zeros(11)]),
    "equal columns": lambda rng: np.repeat(rng.normal(size=(60, 1)), 12, axis=1),
    "zero": lambda rng: np.zeros((60, 12)),
    "squares overflow": lambda rng: 1e25 * rng.normal(size=(60, 12)),
    "squares lose digits": lambda rng: 1e-16 * kernel_of(rng, 60, [*np.ones(11), 0.0], gauge(12)),
    "squares underflow": lambda rng: 1e-30 * rng.normal(size=(60, 12)),
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_other_kernels_are_left_to_qr(rng, kind):
    kernel = jnp.asarray(UNSAFE[kind](rng), jnp.float32)
    assert not is_safe(kernel)
    found, expected = thin_svd(kernel), by_qr(kernel)
    for part, of_qr in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, of_qr, rtol=1e-5, atol=1e-5 * max(1e-30, abs(of_qr).max()))
    assert_is_svd(found, kernel, 50 * np.finfo(np.float32).eps)


def test_a_kernel_with_nan_is_no_exception():
    found = thin_svd(jnp.full((6, 3), jnp.nan))
    assert not is_safe(jnp.full((6, 3), jnp.nan))
    assert all(np.isnan(part).any() for part in found)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40)])
def test_both_ways_side_by_side_under_vmap(rng, shape):
    tall = [kernel_of(rng, 40, s) for s in (np.ones(8), np.geomspace(1, 1e-5, 8))]
    kernels = jnp.asarray(tall if shape == (40, 8) else [kernel.T for kernel in tall], jnp.float32)
    found = jax.vmap(linalg.thin_svd)(kernels)
    for i, kernel in enumerate(kernels):
        assert_is_svd([part[i] for part in found], kernel, 100 * np.finfo(np.float32).eps)


def test_gradients_do_not_depend_on_the_way(rng, x64):
    kernel = jnp.asarray(kernel_of(rng, 20, [1.0, 0.8, 0.6, 0.4]))
    assert is_safe(kernel)

    def tail(svd, kernel):
        u, s, vt = svd(kernel)
        given = u.shape[1] - 2
        return jnp.sum(jnp.sin((u[:, given:] * s[None, 2:]) @ vt[given:]))

    step = 1e-6 * rng.normal(size=kernel.shape)
    difference = tail(by_qr, kernel + step) - tail(by_qr, kernel - step)
    for start in (0, 2):
        found = jax.grad(partial(tail, partial(linalg.thin_svd, start=start)))(kernel)
        np.testing.assert_allclose(jnp.vdot(found, 2 * step), difference, rtol=1e-5)
