"""Splits, subspace similarity, angles and effective ranks, against their definitions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import assume, given
from hypothesis import strategies as st

import lip_jax
from tests import oracles


def random_basis(rng, l, k, dtype=np.float64):
    return np.linalg.qr(rng.normal(size=(l, k)))[0].astype(dtype)


KERNELS = {
    "tall": lambda rng: rng.normal(size=(9, 4)),
    "wide": lambda rng: rng.normal(size=(4, 9)),
    "square": lambda rng: rng.normal(size=(6, 6)),
    "rank-deficient": lambda rng: rng.normal(size=(9, 2)) @ rng.normal(size=(2, 5)),
    "zero": lambda rng: np.zeros((5, 3)),
    "ties": lambda rng: np.eye(6, 4),
    "single entry": lambda rng: np.array([[-2.0]]),
    "one row": lambda rng: rng.normal(size=(1, 5)),
    "huge": lambda rng: 1e30 * rng.normal(size=(6, 4)),
    "tiny": lambda rng: 1e-30 * rng.normal(size=(6, 4)),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KERNELS)
def test_split_is_the_thin_svd_and_its_two_kernels_add_up(rng, kind, dtype):
    kernel = KERNELS[kind](rng).astype(dtype)
    q, l = kernel.shape
    r = min(q, l)
    tolerance = 50 * np.finfo(dtype).eps
    scale = np.linalg.norm(oracles.f64(kernel))
    with jax.enable_x64(dtype == "float64"):
        for rank in range(r + 1):
            split = lip_jax.svd_split(kernel, rank)
            chex.assert_shape([split.u, split.s, split.vt], [(q, r), (r,), (r, l)])
            principal, tail = oracles.f64(split.principal_kernel), oracles.f64(split.tail_kernel)
            np.testing.assert_allclose(principal + tail, kernel, rtol=0, atol=tolerance * scale)
            assert np.linalg.matrix_rank(principal, tol=tolerance * scale) <= rank
            traced = jax.jit(lambda k, s: lip_jax.svd_split(s, k).principal_kernel)(jnp.int32(rank), kernel)
            np.testing.assert_allclose(traced, principal, rtol=0, atol=tolerance * scale)
    u, s, vt = (oracles.f64(part) for part in (split.u, split.s, split.vt))
    np.testing.assert_allclose(u.T @ u, np.eye(r), atol=tolerance)
    np.testing.assert_allclose(vt @ vt.T, np.eye(r), atol=tolerance)
    assert (np.diff(s) <= 0).all()
    np.testing.assert_allclose(
        s, np.linalg.svd(oracles.f64(kernel))[1], rtol=0, atol=tolerance * max(s.max(), 1e-300)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_kernel_is_split_in_float32(rng, dtype):
    kernel = jnp.asarray(rng.normal(size=(6, 4)), dtype)
    split = lip_jax.svd_split(kernel, 2)
    chex.assert_trees_all_equal_dtypes((split.u, split.s, split.vt), (jnp.zeros(0, jnp.float32),) * 3)
    total = split.principal_kernel + split.tail_kernel
    np.testing.assert_allclose(total, kernel.astype(jnp.float32), atol=1e-5)


def test_recompose_uses_the_values_given(rng, x64):
    split = lip_jax.svd_split(rng.normal(size=(7, 4)), 2)
    sigma = rng.normal(size=4)
    expected = np.asarray(split.u) @ np.diag(sigma) @ np.asarray(split.vt)
    np.testing.assert_allclose(lip_jax.spectrum.recompose(split, sigma), expected, atol=1e-14)


@given(
    s=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    # XLA flushes subnormal numbers to zero, and a share of 0 has rank 0.
    fraction=st.floats(0, 1, allow_subnormal=False),
)
def test_rank_for_energy_is_the_smallest_rank_with_that_share(s, fraction):
    s = np.sort(np.array(s, float))[::-1]
    shares = np.cumsum(s**2) / max((s**2).sum(), 1)
    assume(fraction in (0, 1) or (np.abs(shares - fraction) > 1e-12).all())
    with jax.enable_x64(True):
        rank = lip_jax.spectrum.rank_for_energy(s, fraction)
        assert int(jax.jit(lip_jax.spectrum.rank_for_energy)(s, fraction)) == int(rank)
    assert rank.dtype == jnp.int32
    assert int(rank) == oracles.rank_for_energy(s, fraction)


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_rank_for_energy_counts_a_share_reached_exactly(fraction, expected):
    assert int(lip_jax.spectrum.rank_for_energy(jnp.full(4, 3.0), fraction)) == expected


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rank_for_energy_neither_overflows_nor_underflows(scale):
    s = scale * jnp.array([2.0, 1.0, 1.0])
    assert [int(lip_jax.spectrum.rank_for_energy(s, f)) for f in (0.0, 0.5, 0.7, 1.0)] == [0, 1, 2, 3]


def test_similarity_matches_its_definition_and_the_grid_holds_all_of_them(rng, x64):
    v, v_noisy = random_basis(rng, 7, 5), random_basis(rng, 7, 4)
    grid = lip_jax.spectrum.subspace_similarity_grid(v, v_noisy)
    chex.assert_shape(grid, (5, 4))
    # A function of its own: compiled programs are shared by all that jit the same one.
    similarity = jax.jit(lambda *args: lip_jax.subspace_similarity(*args))
    for i in range(1, 6):
        for j in range(1, 5):
            expected = oracles.similarity(v, v_noisy, i, j)
            assert float(grid[i - 1, j - 1]) == pytest.approx(expected, abs=1e-14)
            assert float(lip_jax.subspace_similarity(v, v_noisy, i, j)) == pytest.approx(expected, abs=1e-14)
            traced = similarity(v, v_noisy, jnp.int32(i), jnp.int32(j))
            assert float(traced) == pytest.approx(expected, abs=1e-14)
    assert similarity._cache_size() == 1
    low, high = (similarity(v, v_noisy, jnp.int32(i), jnp.int32(2)) for i in (-3, 99))
    assert float(low) == pytest.approx(oracles.similarity(v, v_noisy, 1, 2), abs=1e-14)
    assert float(high) == pytest.approx(oracles.similarity(v, v_noisy, 5, 2), abs=1e-14)


@given(seed=st.integers(0, 2**31))
def test_similarity_laws(seed):
    rng = np.random.default_rng(seed)
    v, v_noisy = random_basis(rng, 6, 4, np.float32), random_basis(rng, 6, 4, np.float32)
    grid = np.asarray(lip_jax.spectrum.subspace_similarity_grid(v, v_noisy))
    assert (grid >= 0).all()
    assert (grid <= 1 + 1e-5).all()
    np.testing.assert_allclose(lip_jax.spectrum.subspace_similarity_grid(v_noisy, v), grid.T, atol=1e-6)
    signs = rng.choice([-1, 1], 4).astype(np.float32)
    np.testing.assert_allclose(lip_jax.spectrum.subspace_similarity_grid(v * signs, v_noisy), grid, atol=1e-6)
    np.testing.assert_allclose(lip_jax.spectrum.subspace_similarity_grid(v, v), np.ones((4, 4)), atol=1e-5)
    other = np.linalg.svd(v)[0][:, 4:]
    np.testing.assert_allclose(
        lip_jax.spectrum.subspace_similarity_grid(v, other), np.zeros((4, 2)), atol=1e-6
    )


def test_kernel_similarity_compares_right_singular_subspaces(rng, x64):
    kernel, kernel_noisy = rng.normal(size=(9, 5)), rng.normal(size=(3, 5))
    right, right_noisy = (np.linalg.svd(w, full_matrices=False)[2].T for w in (kernel, kernel_noisy))
    grid = lip_jax.spectrum.kernel_similarity_grid(kernel, kernel_noisy)
    chex.assert_shape(grid, (5, 3))
    for i, j in ((1, 1), (2, 3), (5, 2)):
        expected = oracles.similarity(right, right_noisy, i, j)
        assert float(lip_jax.spectrum.kernel_similarity(kernel, kernel_noisy, i, j)) == pytest.approx(
            expected
        )
        assert float(grid[i - 1, j - 1]) == pytest.approx(expected)


@pytest.mark.parametrize(("k", "m"), [(3, 3), (2, 4), (4, 2), (1, 1), (6, 3)])
def test_principal_angles_match_scipy(rng, x64, k, m):
    v, v_noisy = random_basis(rng, 6, k), random_basis(rng, 6, m)
    angles = lip_jax.spectrum.principal_angles(v, v_noisy)
    np.testing.assert_allclose(angles, scipy.linalg.subspace_angles(v, v_noisy), atol=1e-13)


@pytest.mark.parametrize("angle", [1e-6, 1e-3, 0.5, np.pi / 2 - 1e-6])
def test_principal_angles_keep_their_digits_at_both_ends(angle):
    v = jnp.eye(4)[:, :2]
    turned = jnp.array([[1, 0], [0, np.cos(angle)], [0, np.sin(angle)], [0, 0]], jnp.float32)
    largest, smallest = np.asarray(lip_jax.spectrum.principal_angles(v, turned))
    assert largest == pytest.approx(angle, rel=1e-6)
    assert smallest == pytest.approx(0, abs=1e-7)


def test_effective_ranks_match_their_definitions(rng, x64):
    s = np.sort(rng.random(7))[::-1] + 0.01
    rank = lip_jax.spectrum.effective_rank(s)
    assert float(rank.entropy) == pytest.approx(oracles.entropy_rank(s), rel=1e-13)
    assert float(rank.stable) == pytest.approx(oracles.stable_rank(s), rel=1e-13)


@pytest.mark.parametrize(
    ("s", "expected"),
    [
        ([3.0, 3.0, 3.0, 3.0], 4.0),
        ([5.0, 0.0, 0.0], 1.0),
        ([0.0, 0.0], 0.0),
        ([1e30, 1e30], 2.0),
        ([1e-30, 1e-30], 2.0),
    ],
    ids=["equal", "one direction", "zero", "huge", "tiny"],
)
def test_effective_ranks_of_simple_spectra(s, expected):
    s = jnp.array(s)
    rank = lip_jax.spectrum.effective_rank(s)
    assert float(rank.entropy) == pytest.approx(expected, rel=1e-6)
    assert float(rank.stable) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("s", [[2.0, 1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], ids=["null", "tie", "zero"])
def test_effective_ranks_have_finite_gradients(s):
    gradient = jax.grad(lambda s: sum(jax.tree.leaves(lip_jax.spectrum.effective_rank(s))))(jnp.array(s))
    chex.assert_tree_all_finite(gradient)
