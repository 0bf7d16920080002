"""How far the leading singular subspaces of two heads coincide [si2025], and the angles between them."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lip_jax._checks import check_floating, check_rank, describe, is_concrete, see
from lip_jax._types import Array, Kernel, Rank
from lip_jax.numerics import linalg
from lip_jax.spectrum.split import leading, svd_split

Basis = Float[Array, "l k"]

OtherBasis = Float[Array, "l m"]

OtherKernel = Float[Array, "p l"]


def _orthonormality_error(basis: Array) -> jax.Array:
    basis = jnp.asarray(basis)
    basis = basis.astype(linalg.compute_dtype(basis))
    gram = linalg.matmul(basis.T, basis)
    return jnp.abs(gram - jnp.eye(basis.shape[1], dtype=basis.dtype)).max(initial=0)


def _check_bases(v: Array, v_noisy: Array) -> None:
    for name, basis in (("v", v), ("v_noisy", v_noisy)):
        check_floating(basis, name, "l k")
        if not is_concrete(basis):
            continue
        error = float(see(partial(_orthonormality_error, basis)))
        if not error <= 1e-2:
            raise ValueError(
                f"{name} must have orthonormal columns, (l, k); got {describe(basis)} with "
                f"|{name}ᵀ{name} − I| up to {error:.2g}. Right singular vectors are the rows of "
                f"svd_split(...).vt: pass vt.T, or use lip_jax.spectrum.kernel_similarity."
            )
    if v.shape[0] != v_noisy.shape[0]:
        raise ValueError(
            f"v and v_noisy must live in the same space; got {describe(v)} and {describe(v_noisy)}."
        )


def _squared_cosines(v: Array, v_noisy: Array) -> jax.Array:
    v, v_noisy = jnp.asarray(v), jnp.asarray(v_noisy)
    dtype = linalg.compute_dtype(v, v_noisy)
    return linalg.matmul(v.astype(dtype).T, v_noisy.astype(dtype)) ** 2


def subspace_similarity(v: Basis, v_noisy: OtherBasis, i: Rank, j: Rank) -> Float[jax.Array, ""]:
    """The overlap of two leading subspaces: `φ(i, j) = ‖V_:iᵀ V'_:j‖_F² / min(i, j) ∈ [0, 1]`.

    1 when one subspace contains the other, 0 when they are orthogonal.

    Args:
        v: Orthonormal columns `(l, k)`, leading first.
        v_noisy: Orthonormal columns `(l, m)`, leading first.
        i: How many columns of `v`, 1 to k; static or traced.
        j: How many columns of `v_noisy`, 1 to m; static or traced.

    Returns:
        A scalar. Under `jit` a traced `i` or `j` outside its range acts as the nearest end.

    Raises:
        ValueError: If a basis is not orthonormal, the spaces differ, or `i`, `j` are out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> eye = jnp.eye(4)
        >>> float(lip_jax.subspace_similarity(eye, eye[:, ::-1], 2, 3))
        0.5

    Reference:
        [si2025], definition of φ.
    """
    _check_bases(v, v_noisy)
    k, m = v.shape[1], v_noisy.shape[1]
    i = jnp.clip(jnp.asarray(check_rank(i, k, smallest=1, name="i"), jnp.int32), 1, k)
    j = jnp.clip(jnp.asarray(check_rank(j, m, smallest=1, name="j"), jnp.int32), 1, m)
    squares = _squared_cosines(v, v_noisy)
    inside = leading(k, i)[:, None] & leading(m, j)[None, :]
    return jnp.where(inside, squares, 0).sum() / jnp.minimum(i, j).astype(squares.dtype)


def subspace_similarity_grid(v: Basis, v_noisy: OtherBasis) -> Float[jax.Array, "k m"]:
    """`φ(i, j)` for all `i` and `j`, as a two-dimensional cumulative sum of `(VᵀV')²`.

    Args:
        v: Orthonormal columns `(l, k)`, leading first.
        v_noisy: Orthonormal columns `(l, m)`, leading first.

    Returns:
        A grid `(k, m)` whose entry `[i − 1, j − 1]` is `φ(i, j)`.

    Raises:
        ValueError: If a basis is not orthonormal, or the spaces differ.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> lip_jax.spectrum.subspace_similarity_grid(jnp.eye(2), jnp.eye(2)[:, ::-1]).tolist()
        [[0.0, 1.0], [1.0, 1.0]]

    Reference:
        [si2025], definition of φ.
    """
    _check_bases(v, v_noisy)
    squares = _squared_cosines(v, v_noisy)
    k, m = squares.shape
    smaller = jnp.minimum(jnp.arange(1, k + 1)[:, None], jnp.arange(1, m + 1)[None, :])
    return jnp.cumsum(jnp.cumsum(squares, axis=0), axis=1) / smaller.astype(squares.dtype)


def _right_vectors(kernel: Array) -> jax.Array:
    return jnp.asarray(svd_split(kernel, 0).vt.T)


def kernel_similarity(kernel: Kernel, kernel_noisy: OtherKernel, i: Rank, j: Rank) -> Float[jax.Array, ""]:
    """`subspace_similarity` of the leading right singular subspaces of two kernels.

    Args:
        kernel: Kernel `(q, l)`.
        kernel_noisy: Kernel `(p, l)`; the input widths may differ.
        i: How many right singular vectors of `kernel`, 1 to `min(q, l)`.
        j: How many of `kernel_noisy`, 1 to `min(p, l)`.

    Returns:
        `φ(i, j)`, a scalar in `[0, 1]`.

    Raises:
        ValueError: As `subspace_similarity` and `svd_split`.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> kernel = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        >>> float(lip_jax.spectrum.kernel_similarity(kernel, 5 * kernel, 2, 2))
        1.0

    Reference:
        [si2025], definition of φ.
    """
    return subspace_similarity(_right_vectors(kernel), _right_vectors(kernel_noisy), i, j)


def kernel_similarity_grid(kernel: Kernel, kernel_noisy: OtherKernel) -> Float[jax.Array, "k m"]:
    """`subspace_similarity_grid` of the right singular vectors of two kernels.

    Args:
        kernel: Kernel `(q, l)`.
        kernel_noisy: Kernel `(p, l)`; the input widths may differ.

    Returns:
        A grid `(min(q, l), min(p, l))` whose entry `[i − 1, j − 1]` is `φ(i, j)`.

    Raises:
        ValueError: As `subspace_similarity_grid` and `svd_split`.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> kernel = jnp.diag(jnp.array([2.0, 1.0]))
        >>> lip_jax.spectrum.kernel_similarity_grid(kernel, kernel).tolist()
        [[1.0, 1.0], [1.0, 1.0]]

    Reference:
        [si2025], figure of φ(i, j).
    """
    return subspace_similarity_grid(_right_vectors(kernel), _right_vectors(kernel_noisy))


def principal_angles(v: Basis, v_noisy: OtherBasis) -> Float[jax.Array, "a"]:
    """The angles between two subspaces, largest first, in radians.

    Large angles are computed from `cos θ = σ(VᵀV')` and small ones from `sin θ = σ((I − VVᵀ)V')`. Either
    alone loses half of the digits at the other end. The largest is the θ of `sin_theta_bound`.

    Args:
        v: Orthonormal columns `(l, k)`.
        v_noisy: Orthonormal columns `(l, m)`.

    Returns:
        Angles `(min(k, m),)` in `[0, π/2]`, descending, as `scipy.linalg.subspace_angles`.

    Raises:
        ValueError: If a basis is not orthonormal, or the spaces differ.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> eye = jnp.eye(3)
        >>> jnp.degrees(lip_jax.spectrum.principal_angles(eye[:, :2], eye[:, 1:])).tolist()
        [90.0, 0.0]

    Reference:
        [bjorck1973], algorithm 1 and section 4.
    """
    _check_bases(v, v_noisy)
    v, v_noisy = jnp.asarray(v), jnp.asarray(v_noisy)
    dtype = linalg.compute_dtype(v, v_noisy)
    large, small = v.astype(dtype), v_noisy.astype(dtype)
    if large.shape[1] < small.shape[1]:
        large, small = small, large
    product = linalg.matmul(large.T, small)
    cosines = jnp.linalg.svd(product, compute_uv=False)
    sines = jnp.linalg.svd(small - linalg.matmul(large, product), compute_uv=False)
    # Both in the order of descending angles.
    cosines, sines = cosines[::-1], sines[: cosines.shape[0]]
    return jnp.where(
        cosines**2 < 0.5,
        jnp.arccos(jnp.clip(cosines, 0, 1)),
        jnp.arcsin(jnp.clip(sines, 0, 1)),
    )
