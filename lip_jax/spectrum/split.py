"""A kernel split at a rank: `W = U diag(s) Vᵀ` as a principal part and a tail.

The principal part `W_k` holds the leading `rank` components. The method's premise is that label noise changes
the tail, but hardly the principal subspace [si2025].
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from lip_jax._checks import check_floating, check_fraction, check_kernel, check_rank
from lip_jax._results import ShortRepr
from lip_jax._types import Array, Kernel, Rank, Scalar
from lip_jax.numerics import linalg

Spectrum = Float[Array, "r"]


def leading(r: int, rank: Rank) -> Bool[jax.Array, "r"]:
    """Which of `r` components are among the first `rank`."""
    return jnp.arange(r, dtype=jnp.int32) < jnp.asarray(rank, jnp.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class SvdSplit(ShortRepr):
    """The thin SVD of a kernel, and the rank at which it is split.

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class EffectiveRank(ShortRepr):
    """Two smooth counts of the directions a spectrum uses: see `effective_rank`."""

    entropy: Float[jax.Array, ""]
    stable: Float[jax.Array, ""]


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
    u, s, vt = _thin_svd(kernel.astype(linalg.compute_dtype(kernel)))
    return SvdSplit(u, s, vt, rank)


_thin_svd = jax.jit(linalg.thin_svd)


def recompose(split: SvdSplit, sigma: Spectrum) -> Float[jax.Array, "q l"]:
    """The kernel with other singular values: `U diag(sigma) Vᵀ`.

    Args:
        split: A split `(q, r), (r,), (r, l)`.
        sigma: Singular values `(r,)`, in the order of `split.s`.

    Returns:
        The kernel `(q, l)` in the dtype of the split.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> split = lip_jax.svd_split(jnp.diag(jnp.array([3.0, 2.0])), rank=1)
        >>> lip_jax.spectrum.recompose(split, jnp.array([3.0, 0.5])).tolist()
        [[3.0, 0.0], [0.0, 0.5]]

    Reference:
        [si2025], principal subspace preservation.
    """
    return linalg.matmul(split.u * jnp.asarray(sigma).astype(split.s.dtype)[None, :], jnp.asarray(split.vt))


def rank_for_energy(s: Spectrum, fraction: Scalar) -> Int[jax.Array, ""]:
    """The smallest rank that holds a share of the energy: `Σ_{i≤k} s_i² ≥ fraction · Σ s_i²`.

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
        >>> int(lip_jax.spectrum.rank_for_energy(jnp.array([2.0, 1.0, 1.0]), 0.8))
        2

    Reference:
        [si2025], choice of k.
    """
    check_floating(s, "s", "r")
    check_fraction(fraction, "fraction")
    # Squares relative to s_1 cannot overflow. The total is the last cumulative sum, which keeps the rank at
    # most r for fraction = 1.
    s = jnp.asarray(s)
    s = s.astype(linalg.compute_dtype(s))
    scale = jnp.where(s[0] > 0, s[0], 1)
    held = jnp.cumsum((s / scale) ** 2)
    fraction = jnp.asarray(fraction, s.dtype)
    return jnp.sum(held < fraction * held[-1], dtype=jnp.int32) + jnp.asarray(
        (held[-1] > 0) & (fraction > 0), jnp.int32
    )


def effective_rank(s: Spectrum) -> EffectiveRank:
    """How many directions a spectrum uses: entropy `exp(−Σ p_i log p_i)` and stable `Σ s_i² / s_1²`.

    With `p_i = s_i / Σ s`. Both are 1 for one direction, r for r equal ones and 0 for a zero spectrum.

    Args:
        s: Singular values `(r,)`, descending, at least 0.

    Returns:
        An `EffectiveRank(entropy, stable)` of scalars.

    Raises:
        ValueError: If `s` has not one axis, or is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> rank = lip_jax.spectrum.effective_rank(jnp.ones(4))
        >>> float(rank.entropy), float(rank.stable)
        (4.0, 4.0)

    Reference:
        Entropy: [roy2007], equation 3. Stable rank: [rudelson2007].
    """
    check_floating(s, "s", "r")
    s = jnp.asarray(s)
    s = s.astype(linalg.compute_dtype(s))
    some = s[0] > 0
    relative = s / jnp.where(some, s[0], 1)
    p = relative / jnp.where(some, relative.sum(), 1)
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum()
    return EffectiveRank(
        entropy=jnp.where(some, jnp.exp(entropy), 0), stable=jnp.where(some, (relative**2).sum(), 0)
    )
