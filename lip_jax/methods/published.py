"""The published method: keep the principal subspace, refit the tail's singular values [si2025].

With `U` and `V` fixed, `min_σ ‖X (W_k + Σ_{i>k} σ_i u_i v_iᵀ) − Y‖_F²` separates: V is orthonormal, so
`W_k v_i = 0` for i > k and `σ_i* = (X u_i)·(Y v_i) / ‖X u_i‖²`, whatever the rank. One pass over the rows
therefore gives every component at every rank, and neither the residual `Y − X W_k` nor a one-hot `Y` is
ever formed.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lip_jax._checks import (
    check_bias,
    check_kernel,
    check_kernel_form,
    check_rank,
    check_rcond,
    check_ridge,
    check_split,
    check_split_of,
    is_concrete,
)
from lip_jax._types import Bias, Feats, Kernel, Labels, Rank, Scalar, Weights
from lip_jax.methods.protocol import Fit, Head, HeadPath, Needs, Settled, one_head
from lip_jax.methods.refit_path import RefitPath
from lip_jax.numerics import linalg
from lip_jax.rows.checks import check_rows, raise_if_ignored
from lip_jax.rows.labels import Rows, as_array, as_rows
from lip_jax.spectrum.split import SvdSplit, leading
from lip_jax.sums.moments import Moments, check_moments, check_split_given, project_uncentred
from lip_jax.sums.tail import TailMoments, TailSums, tail_sums

RidgeTo = Literal["current", "zero"]


def solve_tail_sigma(
    split: SvdSplit,
    feats: Feats,
    labels: Labels,
    *,
    weights: Weights | None = None,
    bias: Bias | None = None,
    ridge: Scalar = 0.0,
    ridge_to: RidgeTo = "current",
    rcond: Scalar | None = None,
) -> Float[jax.Array, "r"]:
    """The singular values of the refitted head: `σ_i* = (num_i + λ σ_i)/(den_i + λ)` for i > rank.

    `num_i = Σ w (x·u_i)((y − b)·v_i)` and `den_i = Σ w (x·u_i)²`. The leading `rank` values come back
    unchanged, so `rank = 0` yields every component and hence every rank. Refitted values may be
    negative and need not descend.

    Some components keep their value, since the data or the kernel do not determine another: those
    with `s_i ≤ rcond · s_1`, whose vectors are arbitrary, and those with `den_i` at rounding level,
    `den_i ≤ (c · eps)² Σ w‖x‖²`, `c = max(q, 16)`, a direction without data. With `ridge > 0` the latter
    is still well posed and its minimiser is taken, which is `σ_i`, or 0 with `ridge_to="zero"`.

    Args:
        split: The split kernel, from `svd_split`.
        feats: Inputs of the head `(n, q)`, any real floating dtype.
        labels: Class ids `(n,)` or targets `(n, l)`; the kinds are told in `lip_jax.rows`.
        weights: Weight of each row `(n,)`, at least 0.
        bias: `b (l,)`: targets become `Y − b`. None is the strict paper.
        ridge: `λ ≥ 0`.
        ridge_to: Shrink towards the `"current"` value, or to `"zero"`: `num_i/(den_i + λ)`, with which
            a ridge-`λ` head is a fixed point.
        rcond: Default `eps · max(q, l)`, with the eps of `split.s`: a head trained in float32 and cast to
            float64 needs that of float32. 0 is the literal paper.

    Returns:
        Singular values `(r,)` in the dtype of `split.s`.

    Raises:
        ValueError: If shapes or dtypes do not fit, or, where values can be seen, if a row cannot be
            used. Under `jit` such rows count for nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> split = lip_jax.svd_split(jnp.diag(jnp.array([3.0, 2.0])), rank=1)
        >>> lip_jax.solve_tail_sigma(split, jnp.eye(2), jnp.array([0, 1])).tolist()
        [3.0, 1.0]

    Reference:
        [si2025], closed-form solution of label ambiguity purification.
    """
    check_split(split)
    q, r, l = split.u.shape[0], *split.vt.shape
    check_rows(q, l, feats, labels, weights, bias, ridge, ridge_to)
    check_rcond(rcond)
    rank = check_rank(split.rank, r)
    factors = jnp.asarray(split.u), jnp.asarray(split.s), jnp.asarray(split.vt)
    options = {"start": _known_start(rank), "ridge_to": ridge_to}
    rows = as_rows(feats, labels, weights, bias)
    sigma, ignored = _solve(factors, rank, rows, ridge, rcond, **options)
    raise_if_ignored(ignored, feats, labels, weights, l)
    return sigma


def refine(
    kernel: Kernel,
    feats: Feats,
    labels: Labels,
    rank: Rank,
    *,
    weights: Weights | None = None,
    bias: Bias | None = None,
    ridge: Scalar = 0.0,
    ridge_to: RidgeTo = "current",
    rcond: Scalar | None = None,
) -> Float[jax.Array, "q l"]:
    """The head with its tail refitted: `W + Σ_{i>rank} (σ_i* − s_i) u_i v_iᵀ`.

    `svd_split`, `solve_tail_sigma` and the sum above in one compiled call. Written as a change of `W`,
    so what is not refitted is returned bit for bit, and `rank = r` returns the kernel itself.

    A Python `rank` is compiled in and pays only for its own tail; pass `jnp.int32(rank)` to try many
    ranks with one compilation.

    Args:
        kernel: Head kernel `(q, l)`, any real floating dtype.
        feats: Inputs of the head `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`; the kinds are told in `lip_jax.rows`.
        rank: How many leading components are preserved, 0 to `min(q, l)`.
        weights: Weight of each row `(n,)`, at least 0.
        bias: `b (l,)`: targets become `Y − b`. None is the strict paper.
        ridge: `λ ≥ 0`.
        ridge_to: `"current"` or `"zero"`, as in `solve_tail_sigma`.
        rcond: Default `eps · max(q, l)`; 0 is the literal paper.

    Returns:
        The refined kernel `(q, l)`, in the dtype of `kernel`.

    Raises:
        ValueError: As `svd_split` and `solve_tail_sigma`.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> kernel = jnp.diag(jnp.array([3.0, 2.0]))
        >>> lip_jax.refine(kernel, jnp.eye(2), jnp.array([0, 1]), rank=1).tolist()
        [[3.0, 0.0], [0.0, 1.0]]

    Reference:
        [si2025], principal subspace preservation and label ambiguity purification.
    """
    refit = refit_kernel(kernel, Rows(feats, labels, weights), rank, bias, ridge, ridge_to, rcond)
    raise_if_ignored(refit.ignored, feats, labels, weights, kernel.shape[1])
    return refit.kernel


def solve_tail_sigma_from(
    split: SvdSplit,
    moments: Moments | TailMoments,
    *,
    bias: Bias | None = None,
    ridge: Scalar = 0.0,
    ridge_to: RidgeTo = "current",
    rcond: Scalar | None = None,
) -> Float[jax.Array, "r"]:
    """`solve_tail_sigma` from moments instead of rows.

    `num_i = u_iᵀ Σ w x(y − b)ᵀ v_i` and `den_i = u_iᵀ Σ w xxᵀ u_i`. In `Moments` squares are summed before
    they are projected, so that a direction counts as empty, and keeps its value, already where its variance
    is within 4 eps of that of all directions together.

    Args:
        split: The split kernel, from `svd_split`.
        moments: Of the rows: `Moments` with `(q, l)` of the kernel, or `TailMoments` that were taken for this
            very split.
        bias: `b (l,)`: targets become `Y − b`. None is the strict paper.
        ridge: `λ ≥ 0`.
        ridge_to: `"current"` or `"zero"`, as in `solve_tail_sigma`.
        rcond: Default `eps · max(q, l)`; 0 is the literal paper.

    Returns:
        Singular values `(r,)` in the dtype of `split.s`; of no rows, those that came.

    Raises:
        ValueError: If shapes or dtypes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> split = lip_jax.svd_split(jnp.diag(jnp.array([3.0, 2.0])), rank=1)
        >>> accumulator = lip_jax.moment_accumulator(q=2, l=2)
        >>> moments = accumulator.update(accumulator.init(), jnp.eye(2), jnp.array([0, 1]))
        >>> lip_jax.methods.solve_tail_sigma_from(split, moments).round(4).tolist()
        [3.0, 1.0]

    Reference:
        [si2025], closed-form solution of label ambiguity purification.
    """
    check_split(split)
    q, r, l = split.u.shape[0], *split.vt.shape
    factors = factors_for(moments, split, q, l)
    check_bias(bias, l)
    check_ridge(ridge, ridge_to)
    check_rcond(rcond)
    bias = None if bias is None else jnp.asarray(bias)
    return _solve_from(factors, check_rank(split.rank, r), moments, bias, ridge, rcond, ridge_to=ridge_to)


def refine_from(
    kernel: Kernel,
    moments: Moments | TailMoments,
    rank: Rank,
    *,
    split: SvdSplit | None = None,
    bias: Bias | None = None,
    ridge: Scalar = 0.0,
    ridge_to: RidgeTo = "current",
    rcond: Scalar | None = None,
) -> Float[jax.Array, "q l"]:
    """`refine` from moments instead of rows: `W + Σ_{i>rank} (σ_i* − s_i) u_i v_iᵀ`.

    Args:
        kernel: Head kernel `(q, l)`.
        moments: `Moments`, of any rows with `q` features and `l` classes, or `TailMoments`.
        rank: How many leading components are preserved, 0 to `min(q, l)`.
        split: The split that `TailMoments` were taken for; with `Moments` it spares the SVD.
        bias: `b (l,)`: targets become `Y − b`. None is the strict paper.
        ridge: `λ ≥ 0`.
        ridge_to: `"current"` or `"zero"`, as in `solve_tail_sigma`.
        rcond: Default `eps · max(q, l)`; 0 is the literal paper.

    Returns:
        The refined kernel `(q, l)`, in the dtype of `kernel`.

    Raises:
        ValueError: If shapes or dtypes do not fit, or `TailMoments` come without their split.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> batches = [(jnp.eye(2), jnp.array([0, 1]))] * 3
        >>> moments = lip_jax.accumulate(lip_jax.moment_accumulator(q=2, l=2), batches)
        >>> lip_jax.refine_from(jnp.diag(jnp.array([3.0, 2.0])), moments, rank=1).round(4).tolist()
        [[3.0, 0.0], [0.0, 1.0]]

    Reference:
        [si2025], principal subspace preservation and label ambiguity purification.
    """
    check_kernel(kernel)
    q, l = kernel.shape
    factors = factors_for(moments, split, q, l)
    check_bias(bias, l)
    check_ridge(ridge, ridge_to)
    check_rcond(rcond)
    rank = check_rank(rank, min(q, l))
    bias = None if bias is None else jnp.asarray(bias)
    return _refine_from(jnp.asarray(kernel), rank, moments, factors, bias, ridge, rcond, ridge_to=ridge_to)


@dataclass(frozen=True)
class Published:
    """Published LIP as a method: `refine`, which changes the kernel and leaves the bias.

    Attributes:
        rank: How many leading components are preserved; None: chosen by evidence.
        use_bias: Take `Y − b` for targets, `b` the head's bias if it has one. False is the strict paper.
        ridge: `λ ≥ 0`, as in `solve_tail_sigma`.
        ridge_to: `"current"` or `"zero"`.
        rcond: Default `eps · max(q, l)`; 0 is the literal paper.
    """

    rank: Rank | None = None
    use_bias: bool = False
    ridge: Scalar = 0.0
    ridge_to: RidgeTo = "current"
    rcond: Scalar | None = None

    name: ClassVar[str] = "published"
    needs: ClassVar[Needs] = "rows"
    refits: ClassVar[bool] = True

    def path(self, head: Head, fit: Fit) -> HeadPath:
        """One candidate for each rank, or the one at the rank that is given."""
        if self.rank is not None:
            found = self.settle(head, fit)
            return one_head(found.head, found.strength)
        kernel = head.kernel.astype(linalg.compute_dtype(head.kernel))
        u, s, vt = linalg.thin_svd(kernel)
        sums = tail_sums(u, vt, *fit.rows, head.bias if self.use_bias else None)
        (q, l), zeros = kernel.shape, jnp.zeros_like(s)
        sigma = refit_sigma(s, sums, 0, q, max(q, l), self.ridge, self.ridge_to, self.rcond)
        return RefitPath(head, u, s, vt, sigma, zeros, jnp.ones((), s.dtype), sums.ignored)

    def settle(self, head: Head, fit: Fit) -> Settled:
        """The refit at the rank that is given."""
        rank = check_given(self)
        options = head.bias if self.use_bias else None, self.ridge, self.ridge_to, self.rcond
        refit = refit_kernel(head.kernel, fit.rows, rank, *options)
        return Settled(Head(refit.kernel, head.bias), rank, refit.ignored, refit.s, refit.sigma)

    def from_moments(self, head: Head, moments: Moments | TailMoments, split: SvdSplit | None) -> Settled:
        """The refit at the rank that is given, from moments."""
        rank = check_given(self)
        options = {"bias": head.bias if self.use_bias else None, "ridge_to": self.ridge_to}
        kernel = refine_from(
            head.kernel, moments, rank, split=split, ridge=self.ridge, rcond=self.rcond, **options
        )
        return Settled(Head(kernel, head.bias), rank, moments.ignored)


def check_given(method: Any) -> Rank:
    """Require a rank, where nothing can choose one."""
    if method.rank is None:
        raise ValueError(
            f"the method {method.name} leaves its rank open, and nothing here can choose one. Give rank=, or "
            f"validation= rows that the head has not seen."
        )
    return method.rank


class Refit(NamedTuple):
    """A refined kernel, the spectrum before and after, ignored rows, and whether what came was finite."""

    kernel: jax.Array
    s: jax.Array
    sigma: jax.Array
    ignored: jax.Array
    finite: jax.Array


def refit_kernel(
    kernel: Kernel,
    rows: Rows,
    rank: Rank,
    bias: Bias | None,
    ridge: Scalar,
    ridge_to: RidgeTo,
    rcond: Scalar | None,
) -> Refit:
    """`refine` with what a report needs; unusable rows are counted, not raised for."""
    check_kernel_form(kernel)
    q, l = kernel.shape
    check_rows(q, l, *rows, bias, ridge, ridge_to)
    check_rcond(rcond)
    rank = check_rank(rank, min(q, l))
    arrays, options = as_rows(*rows, bias), {"start": _known_start(rank), "ridge_to": ridge_to}
    refit = _refit(as_array(kernel), rank, arrays, ridge, rcond, **options)
    if not (is_concrete(refit.finite) and bool(refit.finite)):
        check_kernel(kernel)
    return refit


Factors = tuple[jax.Array, jax.Array, jax.Array]


def factors_for(moments: Moments | TailMoments, split: SvdSplit | None, q: int, l: int) -> Factors | None:
    """The factors of the split that is given with moments for a `(q, l)` kernel."""
    check_moments(moments, q, l, min(q, l))
    check_split_given(moments, split)
    if split is None:
        return None
    check_split_of(split, q, l)
    return jnp.asarray(split.u), jnp.asarray(split.s), jnp.asarray(split.vt)


@partial(jax.jit, static_argnames=("start", "ridge_to"))
def _solve(
    factors: Factors,
    rank: Rank,
    rows: tuple,
    ridge: Scalar,
    rcond: Scalar | None,
    *,
    start: int,
    ridge_to: RidgeTo,
) -> tuple[jax.Array, jax.Array]:
    u, s, vt = factors
    return _solved((u[:, start:], s, vt[start:]), rank, rows, ridge, rcond, ridge_to)


@partial(jax.jit, static_argnames=("start", "ridge_to"))
def _refit(
    kernel: jax.Array,
    rank: Rank,
    rows: tuple,
    ridge: Scalar,
    rcond: Scalar | None,
    *,
    start: int,
    ridge_to: RidgeTo,
) -> Refit:
    u, s, vt = tail = linalg.thin_svd(kernel.astype(linalg.compute_dtype(kernel)), start)
    sigma, ignored = _solved(tail, rank, rows, ridge, rcond, ridge_to)
    # NaN or infinity anywhere in the kernel is in its singular values too.
    return Refit(_changed(kernel, u, (s - sigma)[start:], vt), s, sigma, ignored, jnp.isfinite(s).all())


def _solved(
    tail: Factors, rank: Rank, rows: tuple, ridge: Scalar, rcond: Scalar | None, ridge_to: RidgeTo
) -> tuple[jax.Array, jax.Array]:
    """All singular values, those of the last components refitted whose vectors are given."""
    u, s, vt = tail
    sums = tail_sums(u, vt, *rows)
    before = lambda sums: jnp.pad(sums, (s.shape[0] - vt.shape[0], 0))  # noqa: E731
    sums = replace(sums, num=before(sums.num), den=before(sums.den))
    max_dim = max(u.shape[0], vt.shape[1])
    return refit_sigma(s, sums, rank, u.shape[0], max_dim, ridge, ridge_to, rcond), sums.ignored


def _changed(kernel: jax.Array, u: jax.Array, change: jax.Array, vt: jax.Array) -> jax.Array:
    # Subtracted, not added, so that a change of +0 leaves an entry of −0 as it is.
    return (kernel.astype(u.dtype) - linalg.matmul(u * change[None, :], vt)).astype(kernel.dtype)


@partial(jax.jit, static_argnames=("ridge_to",))
def _solve_from(
    factors: Factors,
    rank: Rank,
    moments: Moments | TailMoments,
    bias: jax.Array | None,
    ridge: Scalar,
    rcond: Scalar | None,
    *,
    ridge_to: RidgeTo,
) -> jax.Array:
    u, s, vt = factors
    sums = project_uncentred(moments, u, vt, bias)
    max_dim = max(u.shape[0], vt.shape[1])
    return refit_sigma(s, sums, rank, u.shape[0], max_dim, ridge, ridge_to, rcond)


@partial(jax.jit, static_argnames=("ridge_to",))
def _refine_from(
    kernel: jax.Array,
    rank: Rank,
    moments: Moments | TailMoments,
    factors: Factors | None,
    bias: jax.Array | None,
    ridge: Scalar,
    rcond: Scalar | None,
    *,
    ridge_to: RidgeTo,
) -> jax.Array:
    u, s, vt = factors = factors or linalg.thin_svd(kernel.astype(linalg.compute_dtype(kernel)))
    sigma = _solve_from(factors, rank, moments, bias, ridge, rcond, ridge_to=ridge_to)
    return _changed(kernel, u, s - sigma, vt)


def refit_sigma(
    s: jax.Array,
    sums: TailSums,
    rank: Rank,
    q: int,
    max_dim: int,
    ridge: Scalar,
    ridge_to: RidgeTo,
    rcond: Scalar | None,
) -> jax.Array:
    """`σ*` from the sums, with the components that must keep their value kept."""
    dtype = sums.num.dtype
    # eps of the coarser dtype: float32 vectors are not orthogonal to float64 data beyond their own rounding.
    eps = float(max(jnp.finfo(dtype).eps, jnp.finfo(linalg.compute_dtype(s)).eps))
    current = s.astype(dtype)
    ridge = jnp.asarray(ridge, dtype)
    # |fl(x·u) − x·u| ≤ q eps ‖x‖: a sum of squares below that is a direction without data.
    empty = sums.den <= (max(q, 16) * eps) ** 2 * sums.energy
    num, den = jnp.where(empty, 0, sums.num), jnp.where(empty, 0, sums.den)
    prior = ridge * current if ridge_to == "current" else jnp.zeros_like(current)
    # Double where: the quotient is also safe to differentiate where it is not used.
    solvable = den + ridge > 0
    refitted = jnp.where(solvable, (num + prior) / jnp.where(solvable, den + ridge, 1), current)

    rcond = jnp.finfo(s.dtype).eps * max_dim if rcond is None else rcond
    rcond = jnp.asarray(rcond, s.dtype)
    arbitrary = (rcond > 0) & (s <= rcond * s[0])
    kept = leading(s.shape[0], rank) | arbitrary
    return jnp.where(kept, s, refitted.astype(s.dtype))


def _known_start(rank: int | jax.Array) -> int:
    return rank if isinstance(rank, int) else 0
