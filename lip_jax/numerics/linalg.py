"""Products at full precision, and factorisations with derivatives that stay finite at ties."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def compute_dtype(*arrays: Array | np.ndarray) -> jnp.dtype:
    """The dtype to compute in: the widest of the arguments, at least float32."""
    # jnp.promote_types refuses to mix dtypes under strict promotion.
    double = any(array.dtype == jnp.float64 for array in arrays)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def matmul(a: Array | np.ndarray, b: Array | np.ndarray) -> Array:
    """`a @ b` in full precision.

    By default TPUs multiply in bfloat16 and recent GPUs in TF32, too coarse for the tail of a spectrum.
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def logits_of(
    feats: Array | np.ndarray, kernel: Array | np.ndarray, bias: Array | np.ndarray | None
) -> Array:
    """`X W + b`, computed in float32 or wider."""
    dtype = compute_dtype(feats, kernel)
    logits = matmul(feats.astype(dtype), kernel.astype(dtype))
    return logits if bias is None else logits + bias.astype(dtype)[None, :]


def reciprocal(x: Array, defined: Array) -> Array:
    """`1/x` where `defined`, elsewhere 0; safe to differentiate."""
    return jnp.where(defined, 1 / jnp.where(defined, x, 1), 0)


def gram_blocks(x: Array, weighted: Array) -> tuple[Array, Array, Array]:
    """The symmetric `weightedᵀ x` in two by two blocks, without the upper off-diagonal one."""
    half = x.shape[1] // 2
    (a, b), (weighted_a, weighted_b) = (jnp.split(part, [half], axis=1) for part in (x, weighted))
    return matmul(weighted_a.T, a), matmul(weighted_b.T, a), matmul(weighted_b.T, b)


def from_blocks(blocks: tuple[Array, Array, Array]) -> Array:
    """The matrix of `gram_blocks`."""
    upper, lower, last = blocks
    return jnp.block([[upper, lower.T], [lower, last]])


def svd_tolerance(s: Float[Array, "r"], q: int, l: int) -> Array:
    """`eps · max(q, l) · s_1`: singular values and gaps below it are rounding."""
    return jnp.finfo(s.dtype).eps * max(q, l) * s[0]


# The Gram matrix is used where all singular values but the last are at least this share of the largest. It
# magnifies rounding errors of the vectors by up to the inverse square of the share, still close to QR.
GRAM_SHARE = 0.1


def gram_is_safe(gram: Array) -> Array:
    """Whether at most one singular value, along equal weights of all columns, may be below `GRAM_SHARE`.

    All eigenvalues of `G` but one are at least `τ` if `G + ρ e eᵀ − τ I` has a Cholesky factor, for any `ρ`
    and `e`. A softmax does not depend on the logits' mean over classes, so the singular value of its head
    along equal weights is often 0. `e` with equal weights lets such heads pass. Kernels so small that squares
    underflow never pass.
    """
    l, number = gram.shape[0], jnp.finfo(gram.dtype)
    longest = jnp.max(jnp.diagonal(gram))
    gram = gram / longest
    # A few steps of the power method estimate the largest eigenvalue well enough.
    vector = gram[:, jnp.argmax(jnp.diagonal(gram))]
    for _ in range(3):
        vector = matmul(gram, vector)
        vector = vector / jnp.max(jnp.abs(vector))
    largest = matmul(vector, matmul(gram, vector)) / matmul(vector, vector)
    shifted = gram + largest * (1 / l - GRAM_SHARE**2 * jnp.eye(l, dtype=gram.dtype))
    factor = jax.lax.linalg.cholesky(shifted, symmetrize_input=False)
    return jnp.isfinite(factor).all() & (longest > number.tiny / number.eps**2)


def svd_of_gram(a: Array, gram: Array, start: int = 0) -> tuple[Array, Array, Array]:
    """The thin SVD by the eigenvectors of `aᵀa`, accurate only where that is safe; see `thin_svd`."""
    l = gram.shape[0]
    values, v = jnp.linalg.eigh(gram, symmetrize_input=False)
    values, v = values[::-1], v[:, ::-1]
    # The last vector is always computed, because its singular value needs it.
    first = min(start, l - 1)
    tail = v[:, first:]
    scaled = matmul(a, tail)
    s = jnp.sqrt(jnp.concatenate([jnp.maximum(values[:first], 0), jnp.sum(scaled**2, axis=0)]))
    # Near a singular value of 0 the last left vector is rounding error, not orthogonal to the others. It is
    # orthogonalised. An arbitrary vector of the size of rounding is added before, as nothing may be left.
    # The unit is a power of two near s_1: that is exact, and squares of rounding errors do not underflow.
    unit = jnp.ldexp(jnp.ones_like(s[0]), -jnp.frexp(s[0])[1])
    eps = float(jnp.finfo(a.dtype).eps)
    anything = eps / math.sqrt(a.shape[0]) * jnp.sin(1 + jnp.arange(a.shape[0], dtype=a.dtype))
    direction = unit * scaled[:, -1] + jnp.where(unit * s[-1] > 16 * eps, 0, anything)
    others = ((s[0] / s) ** 2).at[-1].set(0)
    for _ in range(2):
        # `UUᵀ` of the others is `A V S⁻² Vᵀ Aᵀ`, as not all of their left vectors are computed.
        shares = others * matmul(matmul(direction, a) / s[0], v)
        direction = direction - matmul(a, matmul(v, shares)) / s[0]
    direction = direction / jnp.sqrt(jnp.sum(direction**2))
    s = s.at[-1].set(jnp.maximum(matmul(direction, scaled[:, -1]), 0))
    u = (scaled * (1 / s[first:])[None, :]).at[:, -1].set(direction)
    # Equal values may come in either order.
    return u[:, start - first :], jax.lax.cummin(s), tail.T[start - first :]


def svd_by_qr(a: Array, gram: Array | None = None, start: int = 0) -> tuple[Array, Array, Array]:
    """The thin SVD by QR of the tall matrix, then the SVD of the small factor; see `thin_svd`."""
    del gram
    basis, triangle = jnp.linalg.qr(a)
    u, s, vt = jnp.linalg.svd(triangle, full_matrices=False)
    return matmul(basis, u[:, start:]), s, vt[start:]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def thin_svd(
    a: Float[Array, "q l"], start: int = 0
) -> tuple[Float[Array, "q c"], Float[Array, "r"], Float[Array, "c l"]]:
    """The thin SVD `a = u diag(s) vt`: all singular values, descending, and the vectors from `start` on.

    The Gram matrix `aᵀa` is used where a Cholesky factor shows that it is safe. It takes a third to half of
    the time, but squares the condition number, which ruins the tail of a wide spectrum. Elsewhere QR comes
    first, which beats LAPACK's SVD of wide matrices and accelerators' SVD of skinny ones. Under `vmap` both
    are computed.
    """
    if a.shape[0] < a.shape[1]:
        v, s, ut = thin_svd(a.T, start)
        return ut.T, s, v.T
    gram = matmul(a.T, a)
    by_gram, by_qr = partial(svd_of_gram, start=start), partial(svd_by_qr, start=start)
    return jax.lax.cond(gram_is_safe(gram), by_gram, by_qr, a, gram)


@thin_svd.defjvp
def _thin_svd_jvp(start: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple, tuple]:
    # With dP = Uᵀ dA V:  ds = diag(dP),  dU = U (F ∘ (dP S + S dPᵀ)) + (I − UUᵀ) dA V S⁻¹,
    # dV = V (F ∘ (S dP + dPᵀ S)) + (I − VVᵀ) dAᵀ U S⁻¹,  F_ij = 1/(s_j² − s_i²).
    # Where s_i = s_j, or s_i = 0, the vectors are arbitrary and so is their derivative: 0 is used,
    # which keeps gradients finite. Inequalities are strict so that a = 0 divides by nothing.
    (a,), (da,) = primals, tangents
    u, s, vt = thin_svd(a, 0)
    v = vt.T
    q, l = a.shape
    tolerance = svd_tolerance(s, q, l)

    av, atu = matmul(da, v), matmul(da.T, u)
    inner = matmul(u.T, av)
    separated = jnp.abs(s[None, :] - s[:, None]) > tolerance
    difference = (s[None, :] - s[:, None]) * (s[None, :] + s[:, None])
    f = reciprocal(difference, separated)
    s_inverse = reciprocal(s, s > tolerance)

    ps, sp = inner * s[None, :], s[:, None] * inner
    du = matmul(u, f * (ps + ps.T))
    dv = matmul(v, f * (sp + sp.T))
    if q > l:
        du = du + (av - matmul(u, inner)) * s_inverse[None, :]
    if l > q:
        dv = dv + (atu - matmul(v, inner.T)) * s_inverse[None, :]
    return (u[:, start:], s, vt[start:]), (du[:, start:], jnp.diagonal(inner), dv.T[start:])


@jax.custom_jvp
def eigh(a: Float[Array, "q q"]) -> tuple[Float[Array, "q"], Float[Array, "q q"]]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix."""
    eigenvalues, basis = jnp.linalg.eigh(a)
    return eigenvalues, basis


@eigh.defjvp
def _eigh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple, tuple]:
    # Eigenvectors of equal eigenvalues are arbitrary and so is their derivative: 0 is used, as for the SVD.
    (a,), (da,) = primals, tangents
    eigenvalues, basis = eigh(a)
    inner = matmul(basis.T, matmul((da + da.T) / 2, basis))
    difference = eigenvalues[None, :] - eigenvalues[:, None]
    separated = jnp.abs(difference) > jnp.finfo(a.dtype).eps * a.shape[0] * jnp.abs(eigenvalues).max()
    turn = jnp.where(separated, inner / jnp.where(separated, difference, 1), 0)
    return (eigenvalues, basis), (jnp.diagonal(inner), matmul(basis, turn))
