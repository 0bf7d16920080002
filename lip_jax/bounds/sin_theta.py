"""Bounds on `sin θ`, by which label noise turns the principal subspace, with their assumptions.

`θ` is the largest principal angle between the leading `rank` singular subspaces of a clean head `W` and
of a noisy one `W'`, on either side. Two families:

- From features alone, for ridge solutions `W = (XᵀX + λI)⁻¹XᵀY` on the same `X` and `λ`: with
  `‖W − W'‖₂ ≤ ‖(XᵀX + λI)⁻¹Xᵀ‖₂ ‖Y − Y'‖_F`, the first factor is at most `σ_max(X)/(λ_min(XᵀX) + λ)`
  (the paper) and exactly `max_i σ_i/(σ_i² + λ)` (the `"filter"` form).
- From two given kernels, however trained: `wedin_bound`.

One-hot labels: a wrong label changes two entries of its row, so rows flipped at `flip_rate` are entries
flipped at `entry_rate = 2 · flip_rate / l`, and `‖Y − Y'‖_F = √(n l · entry_rate) = √(2 n · flip_rate)`,
exact for a realised rate, the root mean square for an expected one.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lip_jax._checks import (
    all_finite,
    check_floating,
    check_fraction,
    check_kernel,
    check_rank,
    check_ridge,
    is_concrete,
    see,
)
from lip_jax._results import STATIC, ShortRepr
from lip_jax._types import Array, Feats, Kernel, Rank, Scalar
from lip_jax.numerics import linalg
from lip_jax.spectrum.split import svd_split
from lip_jax.sums.moments import Moments, from_zero

Form = Literal["paper", "filter"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class SinThetaBound(ShortRepr):
    """A bound on `sin θ` with its assumptions.

    Attributes:
        value: The bound, a scalar; infinite where the gap or the smallest eigenvalue is not positive, and
            under `jit` where an argument is not finite.
        vacuous: Whether the bound is 1 or more, which says nothing; a boolean scalar.
        name: Which bound this is.
        assumptions: The assumptions, in words.
    """

    value: Float[jax.Array, ""]
    vacuous: Bool[jax.Array, ""]
    name: str = field(metadata=STATIC)
    assumptions: tuple[str, ...] = field(metadata=STATIC)


def _bound(numerator: jax.Array, denominator: jax.Array, name: str, *assumptions: str) -> SinThetaBound:
    # A numerator of exactly 0 (no noise) bounds sin θ by 0, but only where there is a gap.
    known = (denominator > 0) & ~jnp.isnan(numerator)
    value = jnp.where(known, numerator / jnp.where(known, denominator, 1), jnp.inf)
    return SinThetaBound(value, value >= 1, name, assumptions)


def feature_singular_values(feats: Feats) -> Float[jax.Array, "k"]:
    """The singular values of the feature matrix, descending, numerically zero ones set to exactly 0.

    Zero means `σ_i ≤ eps · max(min(n, q), 16) · σ_1`. Left as rounding errors, such values would make a bound
    at ridge 0 huge and arbitrary instead of infinite.

    Args:
        feats: Features `(n, q)`.

    Returns:
        Singular values `(min(n, q),)` in at least float32.

    Raises:
        ValueError: If `feats` has not two axes, is not floating, or, where values can be seen, not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> lip_jax.bounds.feature_singular_values(jnp.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).round(
        ...     4
        ... ).tolist()
        [4.0, 3.0]

    Reference:
        [si2025], theorem on the angle between principal subspaces.
    """
    check_floating(feats, "feats", "n q")
    feats = jnp.asarray(feats)
    feats = feats.astype(linalg.compute_dtype(feats))
    # QR first, for a small SVD.
    triangle = jnp.linalg.qr(feats if feats.shape[0] >= feats.shape[1] else feats.T, mode="r")
    s = jnp.linalg.svd(triangle, full_matrices=False, compute_uv=False)
    _check_finite(s, "feats", "Drop the rows that hold NaN or infinity.")
    return jnp.where(s <= _zero_level(s, *feats.shape) * s[:1], 0, s)


def _zero_level(s: jax.Array, n: int, q: int) -> float:
    # With the longer side, as is usual, a million rows in float32 would make this a tenth.
    return float(jnp.finfo(s.dtype).eps) * max(min(n, q), 16)


def _check_finite(s: jax.Array, name: str, hint: str) -> None:
    """Require finite singular values where they can be seen; they are finite if the matrix is."""
    if is_concrete(s) and not see(lambda: all_finite(s)):
        raise ValueError(f"{name} must be finite; got NaN or infinity, or squares that overflow. {hint}")


def feature_singular_values_from(moments: Moments) -> Float[jax.Array, "q"]:
    """The singular values of the feature matrix from moments, descending: roots of the eigenvalues of `XᵀX`.

    Squares cannot tell a value below `√(eps · q) σ_1` from 0. All such values are set to exactly 0, which
    makes a bound larger or infinite, but never wrong. Pass them to `sin_theta_bound` with `num_samples`.

    Args:
        moments: `Moments` of rows of weight 1.

    Returns:
        Singular values `(q,)`.

    Raises:
        ValueError: If `moments` are no `Moments`, or, where values can be seen, not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> accumulator = lip_jax.moment_accumulator(q=2, l=1)
        >>> feats = jnp.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
        >>> moments = accumulator.update(accumulator.init(), feats, jnp.zeros((3, 1)))
        >>> [round(value, 3) for value in lip_jax.bounds.feature_singular_values_from(moments).tolist()]
        [4.0, 3.0]

    Reference:
        [si2025], theorem on the angle between principal subspaces.
    """
    if not isinstance(moments, Moments):
        raise ValueError(
            f"moments must be lip_jax.sums.Moments, of lip_jax.moment_accumulator; got "
            f"{type(moments).__name__}."
        )
    s = _singular_values_from(moments)
    _check_finite(s, "moments", "Scale the features down before they are summed.")
    return s


@jax.jit
def _singular_values_from(moments: Moments) -> jax.Array:
    gram = from_zero(moments).gram
    # LAPACK may return finite eigenvalues of a matrix with NaN.
    eigenvalues = jnp.where(jnp.isfinite(gram).all(), jnp.linalg.eigvalsh(gram)[::-1], jnp.nan)
    tolerance = jnp.finfo(eigenvalues.dtype).eps * eigenvalues.shape[0] * eigenvalues[0]
    zero = eigenvalues <= tolerance
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, eigenvalues)))


def _label_change(
    n: Any, l: int, entry_rate: Scalar | None, flip_rate: Scalar | None
) -> tuple[jax.Array, str]:
    """`‖Y − Y'‖_F`, and the assumption about the rate it was computed from."""
    if (entry_rate is None) == (flip_rate is None):
        raise ValueError(
            "exactly one of entry_rate (share of label-matrix entries that changed, the paper's p) "
            "and flip_rate (share of samples whose label changed) must be given; "
            f"got entry_rate={entry_rate}, flip_rate={flip_rate}."
        )
    n = 1.0 * n  # The number of entries may exceed int32.
    if entry_rate is not None:
        check_fraction(entry_rate, "entry_rate")
        return (
            jnp.sqrt(n * l * jnp.asarray(entry_rate)),
            "entry_rate is the share of the n·l label entries that changed, each by at most 1",
        )
    check_fraction(flip_rate, "flip_rate")
    return (
        jnp.sqrt(2 * n * jnp.asarray(flip_rate)),
        "labels are one-hot and flip_rate is the share of samples whose label changed",
    )


def sin_theta_bound(
    feats: Feats | None = None,
    *,
    num_classes: int,
    gap: Scalar,
    entry_rate: Scalar | None = None,
    flip_rate: Scalar | None = None,
    ridge: Scalar = 0.0,
    singular_values: Float[Array, "k"] | None = None,
    num_samples: int | None = None,
    form: Form = "paper",
) -> SinThetaBound:
    """The paper's bound from the features, or a tighter form of it.

    - `"paper"`: `sin θ ≤ σ_max(X) √(n l p) / (δ (λ_min(XᵀX) + λ))`
    - `"filter"`: `sin θ ≤ max_i σ_i/(σ_i² + λ) · √(n l p) / δ`, never larger

    Both are worst cases over the positions of the noise, and often vacuous.

    Args:
        feats: Features `(n, q)`; or give `singular_values` and `num_samples` instead.
        num_classes: `l`.
        gap: `δ`, the mixed gap `s_rank(W) − s_{rank+1}(W')` (`mixed_gap`).
        entry_rate: `p`, the share of the `n·l` label entries that changed.
        flip_rate: Instead of `entry_rate`, the share of samples whose label changed; the bound then
            uses `p = 2 · flip_rate / l`.
        ridge: `λ` of both ridge solutions.
        singular_values: Singular values of the features: all of them, or the largest and the smallest. The
            bound allows for any value between the extremes. With fewer samples than features, or dependent
            features, the smallest is 0.
        num_samples: `n`, where `feats` is not given.
        form: Which bound. At `λ = 0` and dependent features, `"paper"` is infinite. `"filter"` is then the
            bound for the minimum-norm solutions given `feats`, and infinite given `singular_values`, as any
            value may lie between them.

    Returns:
        A `SinThetaBound`.

    Raises:
        ValueError: If not exactly one rate, or not exactly one source of singular values, is given,
            or a rate, the ridge or the form is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> feats = jnp.diag(jnp.array([10.0, 1.0, 0.0]))
        >>> case = dict(num_classes=3, flip_rate=0.01, ridge=1.0, gap=1.0)
        >>> paper, filtered = (lip_jax.sin_theta_bound(feats, form=f, **case) for f in ("paper", "filter"))
        >>> round(float(paper.value), 3), bool(paper.vacuous)
        (2.449, True)
        >>> round(float(filtered.value), 3), bool(filtered.vacuous)
        (0.122, False)

    Reference:
        [si2025], theorem on the angle between principal subspaces; `"filter"` evaluates
        `‖(XᵀX + λI)⁻¹Xᵀ‖₂` exactly where the theorem bounds it.
    """
    if form not in ("paper", "filter"):
        raise ValueError(f"form must be 'paper' or 'filter'; got {form!r}.")
    check_ridge(ridge, "current")
    given = tuple(part is not None for part in (feats, singular_values, num_samples))
    if given not in ((True, False, False), (False, True, True)):
        raise ValueError(
            "either feats, or both singular_values (those of feats, or just the largest and the "
            "smallest) and num_samples must be given, not both; got "
            + ", ".join(
                f"{name}={'given' if there else None}"
                for name, there in zip(("feats", "singular_values", "num_samples"), given, strict=True)
            )
            + "."
        )
    if feats is not None:
        check_floating(feats, "feats", "n q")
        n, q = feats.shape
        sigma = feature_singular_values(feats)
        # A value set to 0 may have been anything up to the zero level.
        unseen = 0, jnp.where((sigma == 0).any(), _zero_level(sigma, n, q) * sigma.max(initial=0), 0)
        # With fewer samples than features XᵀX has zero eigenvalues that the thin SVD leaves out.
        sigma = jnp.pad(sigma, (0, max(q - n, 0)))
    else:
        check_floating(singular_values, "singular_values", "k")
        _check_finite(jnp.asarray(singular_values), "singular_values", "Take them of finite features.")
        n, sigma = num_samples, jnp.asarray(singular_values)
        sigma = sigma.astype(linalg.compute_dtype(sigma))
        unseen = sigma.min(), sigma.max()
    dtype = sigma.dtype
    ridge, gap = jnp.asarray(ridge, dtype), jnp.asarray(gap, dtype)
    label_change, rate_words = _label_change(n, num_classes, entry_rate, flip_rate)
    assumptions = [
        "both heads are ridge solutions without intercept on the same features and ridge",
        rate_words,
        "gap is the mixed gap: s_rank of one head minus s_{rank+1} of the other",
    ]
    if form == "paper":
        gain, loss = sigma.max(), sigma.min() ** 2 + ridge
    else:
        # σ/(σ² + λ) peaks at √λ, where a value that was not given may lie.
        sigma = jnp.append(sigma, jnp.clip(jnp.sqrt(ridge), *unseen))
        zero = sigma == 0
        safe = jnp.where(zero, 1, sigma)
        gain, loss = jnp.where(zero, 0, safe / (safe**2 + ridge)).max(), jnp.ones((), dtype)
        if feats is None:
            # At ridge 0 it has no peak, and is unbounded towards 0.
            unbounded = (unseen[0] == 0) & (unseen[1] > 0) & (ridge == 0)
            gain = jnp.where(unbounded, jnp.inf, gain)
            assumptions.append("any singular value between the given ones may occur")
        else:
            assumptions.append(
                "at ridge 0 both heads are the minimum-norm least-squares solutions, singular values of the "
                "features at rounding level taken as 0"
            )
    return _bound(gain * label_change.astype(dtype), jnp.where(gap > 0, gap * loss, 0), form, *assumptions)


def mixed_gap(s: Float[Array, "r"], s_noisy: Float[Array, "m"], rank: Rank) -> Float[jax.Array, ""]:
    """The gap of a sin θ theorem: `s_rank(W) − s_{rank+1}(W')`, with `s_{r+1} = 0`.

    If it is not positive, no theorem of this kind applies at this rank.

    Args:
        s: Singular values of `W`, descending.
        s_noisy: Singular values of `W'`, descending.
        rank: 1 to the shorter length, static or traced.

    Returns:
        A scalar, of either sign.

    Raises:
        ValueError: If `rank` is no integer in range.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> float(lip_jax.bounds.mixed_gap(jnp.array([1.0, 0.5]), jnp.array([0.75, 0.25]), 1))
        0.75

    Reference:
        [wedin1972].
    """
    check_floating(s, "s", "r")
    check_floating(s_noisy, "s_noisy", "m")
    shortest = min(s.shape[0], s_noisy.shape[0])
    rank = jnp.clip(jnp.asarray(check_rank(rank, shortest, smallest=1)), 1, shortest)
    s, s_noisy = jnp.asarray(s), jnp.asarray(s_noisy)
    dtype = linalg.compute_dtype(s, s_noisy)
    return s.astype(dtype)[rank - 1] - jnp.pad(s_noisy.astype(dtype), (0, 1))[rank]


def wedin_bound(
    kernel: Kernel, kernel_noisy: Kernel, rank: Rank, *, gap: Literal["mixed", "own"] = "mixed"
) -> SinThetaBound:
    """Wedin's bound for two given kernels: `sin θ ≤ ‖W − W'‖₂ / (s_rank(W) − s_{rank+1}(W'))`.

    The kernels may have been trained in any way. With one head's own gap the inequality needs a factor 2:
    `sin θ ≤ 2 ‖W − W'‖₂ / (s_rank(W) − s_{rank+1}(W))`.

    Args:
        kernel: `W (q, l)`.
        kernel_noisy: `W' (q, l)`.
        rank: 1 to `min(q, l)`, static or traced.
        gap: `"mixed"`, or `"own"` for the gap of `W` alone with the factor 2.

    Returns:
        A `SinThetaBound`, infinite where the gap is not positive.

    Raises:
        ValueError: If the kernels differ in shape, `rank` is out of range, or `gap` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> kernel = jnp.diag(jnp.array([2.0, 1.0]))
        >>> bound = lip_jax.bounds.wedin_bound(kernel, kernel.at[0, 1].set(0.1), 1)
        >>> round(float(bound.value), 3), bool(bound.vacuous)
        (0.1, False)

    Reference:
        [wedin1972]; factor 2: [yu2015].
    """
    if gap not in ("mixed", "own"):
        raise ValueError(f"gap must be 'mixed' or 'own'; got {gap!r}.")
    check_kernel(kernel)
    check_kernel(kernel_noisy, "kernel_noisy")
    if tuple(kernel.shape) != tuple(kernel_noisy.shape):
        raise ValueError(
            f"kernel and kernel_noisy must have the same shape; got {kernel.shape} and {kernel_noisy.shape}."
        )
    r = min(kernel.shape)
    check_rank(rank, r, smallest=1)
    s = svd_split(kernel, 0).s
    s_noisy = svd_split(kernel_noisy, 0).s
    dtype = linalg.compute_dtype(s, s_noisy)
    difference = jnp.asarray(kernel).astype(dtype) - jnp.asarray(kernel_noisy).astype(dtype)
    distance = jnp.linalg.norm(difference, ord=2)
    if gap == "mixed":
        return _bound(
            distance,
            mixed_gap(s, s_noisy, rank),
            "wedin",
            "gap is the mixed gap: s_rank of kernel minus s_{rank+1} of kernel_noisy",
        )
    return _bound(
        2 * distance,
        mixed_gap(s, s, rank),
        "wedin, own gap",
        "gap is s_rank minus s_{rank+1} of kernel alone, hence the factor 2",
    )
