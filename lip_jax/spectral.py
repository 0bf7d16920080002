"""The spectrum of a head: splitting it at a rank, and comparing the subspaces of two heads.

The kernel `W = U diag(s) Vᵀ` is the sum of a principal part `W_k`, its leading `rank` components, and
a tail. The premise of the method is that label noise moves the tail and leaves the principal subspace
nearly where it was [si2025]; comparing subspaces tells how far that holds.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from lip_jax import _linalg
from lip_jax._checks import (
    check_floating,
    check_fraction,
    check_kernel,
    check_rank,
    describe,
    is_concrete,
    see,
)
from lip_jax._types import Array, Kernel, Rank, Scalar

Spectrum = Float[Array, "r"]
Basis = Float[Array, "l k"]
OtherBasis = Float[Array, "l m"]
OtherKernel = Float[Array, "p l"]


def leading(r: int, rank: Rank) -> Bool[jax.Array, "r"]:
    """Which of `r` components are among the first `rank`."""
    return jnp.arange(r, dtype=jnp.int32) < jnp.asarray(rank, jnp.int32)


@partial(jax.tree_util.register_dataclass, data_fields=("u", "s", "vt", "rank"), meta_fields=())
@dataclass(frozen=True)
class SvdSplit:
    """The thin SVD of a kernel and the rank at which it is split.

    Attributes:
        u: Left singular vectors `(q, r)`, `r = min(q, l)`.
        s: Singular values `(r,)`, descending.
        vt: Right singular vectors, transposed, `(r, l)`.
        rank: How many leading components are the principal part. No shape depends on it.
    """

    u: Float[Array, "q r"]
    s: Spectrum
    vt: Float[Array, "r l"]
    rank: Rank

    @property
    def principal_kernel(self) -> Float[jax.Array, "q l"]:
        """`W_k = Σ_{i ≤ rank} s_i u_i v_iᵀ`."""
        return recompose(self, jnp.where(leading(self.s.shape[0], self.rank), self.s, 0))

    @property
    def tail_kernel(self) -> Float[jax.Array, "q l"]:
        """`W − W_k = Σ_{i > rank} s_i u_i v_iᵀ`."""
        return recompose(self, jnp.where(leading(self.s.shape[0], self.rank), 0, self.s))


@dataclass(frozen=True)
class EffectiveRank:
    """Two smooth counts of the directions a spectrum uses: see `effective_rank`."""

    entropy: Float[jax.Array, ""]
    stable: Float[jax.Array, ""]


jax.tree_util.register_dataclass(EffectiveRank, data_fields=("entropy", "stable"), meta_fields=())


def svd_split(kernel: Kernel, rank: Rank) -> SvdSplit:
    """Split a head at a rank: `W = W_k + Σ_{i > k} s_i u_i v_iᵀ`.

    Args:
        kernel: Head kernel `(q, l)`, any real floating dtype; computed in at least float32.
        rank: How many leading components are principal, 0 to `r = min(q, l)`. A Python int stays
            static; an integer array may be traced, vmapped and scanned over. Under `jit` a traced
            rank outside `[0, r]` acts as the nearest end.

    Returns:
        An `SvdSplit` with `u (q, r)`, `s (r,)`, `vt (r, l)` and the rank.

    Raises:
        ValueError: If `kernel` is not a finite floating matrix, or `rank` is no integer in `[0, r]`.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> split = lip_jax.svd_split(jnp.diag(jnp.array([3.0, 2.0, 1.0])), rank=1)
        >>> split.s.tolist()
        [3.0, 2.0, 1.0]
        >>> bool(jnp.allclose(split.principal_kernel, jnp.diag(jnp.array([3.0, 0.0, 0.0]))))
        True

    Reference:
        [si2025], principal subspace preservation.
    """
    check_kernel(kernel)
    rank = check_rank(rank, min(kernel.shape))
    kernel = jnp.asarray(kernel)
    u, s, vt = _thin_svd(kernel.astype(_linalg.compute_dtype(kernel)))
    return SvdSplit(u, s, vt, rank)


_thin_svd = jax.jit(_linalg.thin_svd)


def recompose(split: SvdSplit, sigma: Spectrum) -> Float[jax.Array, "q l"]:
    """The kernel with the vectors of `split` and other singular values: `U diag(sigma) Vᵀ`.

    Args:
        split: A split `(q, r), (r,), (r, l)`.
        sigma: Singular values `(r,)`, in the order of `split.s`.

    Returns:
        The kernel `(q, l)` in the dtype of the split.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> split = lip_jax.svd_split(jnp.diag(jnp.array([3.0, 2.0])), rank=1)
        >>> lip_jax.recompose(split, jnp.array([3.0, 0.5])).tolist()
        [[3.0, 0.0], [0.0, 0.5]]

    Reference:
        [si2025], principal subspace preservation.
    """
    return _linalg.matmul(split.u * jnp.asarray(sigma).astype(split.s.dtype)[None, :], jnp.asarray(split.vt))


def rank_for_energy(s: Spectrum, fraction: Scalar) -> Int[jax.Array, ""]:
    """The smallest rank whose components hold a share of the energy: `Σ_{i≤k} s_i² ≥ fraction · Σ s_i²`.

    Args:
        s: Singular values `(r,)`, descending.
        fraction: The share, 0 to 1. A share of 0, or a zero spectrum, gives rank 0.

    Returns:
        An int32 scalar in `[0, r]`, usable as `rank` everywhere, traced too.

    Raises:
        ValueError: If `fraction` lies outside `[0, 1]`, or `s` has not one axis.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> int(lip_jax.rank_for_energy(jnp.array([2.0, 1.0, 1.0]), 0.8))
        2

    Reference:
        [si2025], choice of k.
    """
    check_floating(s, "s", "r")
    check_fraction(fraction, "fraction")
    # Relative to s_1 the squares cannot overflow; comparing with the cumulative sum's own last
    # entry keeps fraction = 1 within r.
    s = jnp.asarray(s)
    s = s.astype(_linalg.compute_dtype(s))
    scale = jnp.where(s[0] > 0, s[0], 1)
    held = jnp.cumsum((s / scale) ** 2)
    fraction = jnp.asarray(fraction, s.dtype)
    return jnp.sum(held < fraction * held[-1], dtype=jnp.int32) + jnp.asarray(
        (held[-1] > 0) & (fraction > 0), jnp.int32
    )


def _orthonormality_error(basis: Array) -> jax.Array:
    basis = jnp.asarray(basis)
    basis = basis.astype(_linalg.compute_dtype(basis))
    gram = _linalg.matmul(basis.T, basis)
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
                f"|{name}ᵀ{name} − I| up to {error:.2g}. Right singular vectors are the "
                f"rows of svd_split(...).vt: pass vt.T, or use the wrappers named for kernels."
            )
    if v.shape[0] != v_noisy.shape[0]:
        raise ValueError(
            f"v and v_noisy must live in the same space; got {describe(v)} and {describe(v_noisy)}."
        )


def _squared_cosines(v: Array, v_noisy: Array) -> jax.Array:
    v, v_noisy = jnp.asarray(v), jnp.asarray(v_noisy)
    dtype = _linalg.compute_dtype(v, v_noisy)
    return _linalg.matmul(v.astype(dtype).T, v_noisy.astype(dtype)) ** 2


def subspace_similarity(v: Basis, v_noisy: OtherBasis, i: Rank, j: Rank) -> Float[jax.Array, ""]:
    """How far two leading subspaces coincide: `φ(i, j) = ‖V_:iᵀ V'_:j‖_F² / min(i, j) ∈ [0, 1]`.

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
    """`φ(i, j)` for all `i`, `j` at once, as a two-dimensional cumulative sum of `(VᵀV')²`.

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
        >>> lip_jax.subspace_similarity_grid(jnp.eye(2), jnp.eye(2)[:, ::-1]).tolist()
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
        >>> float(lip_jax.kernel_similarity(kernel, 5 * kernel, 2, 2))
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
        >>> lip_jax.kernel_similarity_grid(kernel, kernel).tolist()
        [[1.0, 1.0], [1.0, 1.0]]

    Reference:
        [si2025], figure of φ(i, j).
    """
    return subspace_similarity_grid(_right_vectors(kernel), _right_vectors(kernel_noisy))


def principal_angles(v: Basis, v_noisy: OtherBasis) -> Float[jax.Array, "a"]:
    """The angles between two subspaces, largest first, in radians.

    Large angles come from `cos θ = σ(VᵀV')`, small ones from `sin θ = σ((I − VVᵀ)V')`: either alone
    loses half the digits at its own end. The largest is the θ of `sin_theta_bound`.

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
        >>> jnp.degrees(lip_jax.principal_angles(eye[:, :2], eye[:, 1:])).tolist()
        [90.0, 0.0]

    Reference:
        [bjorck1973], algorithm 1 and section 4.
    """
    _check_bases(v, v_noisy)
    v, v_noisy = jnp.asarray(v), jnp.asarray(v_noisy)
    dtype = _linalg.compute_dtype(v, v_noisy)
    large, small = v.astype(dtype), v_noisy.astype(dtype)
    if large.shape[1] < small.shape[1]:
        large, small = small, large
    product = _linalg.matmul(large.T, small)
    cosines = jnp.linalg.svd(product, compute_uv=False)
    sines = jnp.linalg.svd(small - _linalg.matmul(large, product), compute_uv=False)
    # Cosines descend with ascending angles; sines are turned to the same order.
    cosines, sines = cosines[::-1], sines[: cosines.shape[0]]
    return jnp.where(
        cosines**2 < 0.5,
        jnp.arccos(jnp.clip(cosines, 0, 1)),
        jnp.arcsin(jnp.clip(sines, 0, 1)),
    )


def effective_rank(s: Spectrum) -> EffectiveRank:
    """How many directions a spectrum uses: entropy `exp(−Σ p_i log p_i)` and stable `Σ s_i² / s_1²`.

    With `p_i = s_i / Σ s`. Both are 1 for one direction, r for r equal ones, and 0 for a zero spectrum.

    Args:
        s: Singular values `(r,)`, descending, at least 0.

    Returns:
        An `EffectiveRank(entropy, stable)` of scalars.

    Raises:
        ValueError: If `s` has not one axis, or is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> rank = lip_jax.effective_rank(jnp.ones(4))
        >>> float(rank.entropy), float(rank.stable)
        (4.0, 4.0)

    Reference:
        Entropy: [roy2007], equation 3. Stable rank: [rudelson2007].
    """
    check_floating(s, "s", "r")
    s = jnp.asarray(s)
    s = s.astype(_linalg.compute_dtype(s))
    some = s[0] > 0
    relative = s / jnp.where(some, s[0], 1)
    p = relative / jnp.where(some, relative.sum(), 1)
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum()
    return EffectiveRank(
        entropy=jnp.where(some, jnp.exp(entropy), 0), stable=jnp.where(some, (relative**2).sum(), 0)
    )
