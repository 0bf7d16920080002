"""Refitting a softmax head at its own scale: beyond the paper.

The published refit puts the tail at the scale of one-hot targets while the preserved part stays at the
scale of logits, which harms heads trained with cross-entropy. Three steps bring both to one scale:

- gauge: softmax does not see `W + c 1ᵀ`, so the spectrum is that of `W` less its mean over classes. Its
  right vectors are orthogonal to `1`, hence blind to the targets' mean too, and the refit, being a sum of
  them, leaves the mean of `W` where it was;
- centre: features and targets enter as deviations from their means `μ`, `ȳ`, and the bias takes up the
  difference, `b' = b + μᵀ(W − W')`, which leaves the mean logit unchanged (a head without bias is not
  centred);
- scale: targets are multiplied by `α = ⟨Z, Z⟩/⟨Z, Y⟩`, `Z = (X − μ) W`, the one scale at which the head is
  already its own best multiple.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from lip_jax._checks import check_bias, check_rank, check_rcond, check_ridge, check_softmax_kernel
from lip_jax._results import ShortRepr
from lip_jax._types import Bias, Feats, Kernel, Labels, Rank, Scalar, Weights
from lip_jax.methods.protocol import Fit, Head, HeadPath, Needs, Settled, one_head
from lip_jax.methods.published import Factors, check_given, factors_for, refit_sigma
from lip_jax.methods.refit_path import RefitPath
from lip_jax.numerics import linalg
from lip_jax.rows.checks import check_rows, raise_if_ignored
from lip_jax.rows.labels import Rows, as_rows
from lip_jax.spectrum.split import SvdSplit
from lip_jax.sums.moments import Moments, project
from lip_jax.sums.tail import TailMoments, TailSums, centred, centred_tail_sums, tail_sums, uncentred


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class CalibratedHead(ShortRepr):
    """A head refitted at its own scale.

    Attributes:
        kernel: `(q, l)`.
        bias: `(l,)`, or None where the head has none.
        s: Singular values of the gauge-free kernel before, `(r,)`.
        sigma: After, in the order of `s`, `(r,)`.
        scale: `α`; 0 where it is undefined, and then the head is the one that came.
        ignored: How many rows could not be used.
    """

    kernel: Float[jax.Array, "q l"]
    bias: Float[jax.Array, "l"] | None
    s: Float[jax.Array, "r"]
    sigma: Float[jax.Array, "r"]
    scale: Float[jax.Array, ""]
    ignored: Int[jax.Array, ""]


def refine_calibrated(
    kernel: Kernel,
    feats: Feats,
    labels: Labels,
    rank: Rank,
    *,
    bias: Bias | None,
    weights: Weights | None = None,
    ridge: Scalar = 0.0,
    rcond: Scalar | None = None,
) -> CalibratedHead:
    """Refit the tail of a softmax head at the head's own scale, kernel and bias.

    `σ_i* = (α Σ w (x − μ)·u_i (y − ȳ)·v_i + λ s_i)/(Σ w ((x − μ)·u_i)² + λ)` for i > rank. At full rank
    nothing changes. `α` is undefined for a zero kernel, or where logits do not rise with targets
    (`⟨Z, Y⟩ ≤ 0`); then the head comes back as it was, with `scale` 0.

    Args:
        kernel: Kernel of a softmax head `(q, l)`, `l ≥ 2`.
        feats: Inputs of the head `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`; the kinds are told in `lip_jax.rows`.
        rank: How many leading components are preserved, 0 to `min(q, l)`.
        bias: The head's bias `(l,)`, or None where it has none.
        weights: Weight of each row `(n,)`, at least 0.
        ridge: `λ ≥ 0`, shrinking towards the current values.
        rcond: Default `eps · max(q, l)`, times the size of the mean over `s_1` where that is larger.

    Returns:
        A `CalibratedHead`; kernel and bias in the dtypes they came in.

    Raises:
        ValueError: As `lip_jax.refine`, or if the kernel has a single output.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> feats, labels = jax.random.normal(jax.random.key(0), (200, 8)), jnp.arange(200) % 4
        >>> kernel = jax.random.normal(jax.random.key(1), (8, 4)) + feats.T @ jax.nn.one_hot(labels, 4)
        >>> head = lip_jax.refine_calibrated(kernel, feats, labels, rank=2, bias=jnp.zeros(4))
        >>> before, after = feats @ kernel, feats @ head.kernel + head.bias[None, :]
        >>> bool(jnp.allclose(before.mean(axis=0), after.mean(axis=0), atol=1e-4))
        True

    Reference:
        The tail's closed form is that of [si2025]; gauge, centre and scale are this package's.
    """
    check_softmax_kernel(kernel)
    q, l = kernel.shape
    check_rows(q, l, feats, labels, weights, bias, ridge, "current")
    check_rcond(rcond)
    rank = check_rank(rank, min(q, l))
    feats_array, labels_array, weights_array, bias = as_rows(feats, labels, weights, bias)
    rows = Rows(feats_array, labels_array, weights_array)
    head = _calibrated_head(Head(jnp.asarray(kernel), bias), rank, rows, ridge, rcond)
    raise_if_ignored(head.ignored, feats, labels, weights, l)
    return head


def refine_calibrated_from(
    kernel: Kernel,
    moments: Moments | TailMoments,
    rank: Rank,
    *,
    bias: Bias | None,
    split: SvdSplit | None = None,
    ridge: Scalar = 0.0,
    rcond: Scalar | None = None,
) -> CalibratedHead:
    """`refine_calibrated` from moments instead of rows: gauge, centre and scale, then the tail.

    Args:
        kernel: Kernel of a softmax head `(q, l)`, `l ≥ 2`.
        moments: `Moments`, of any rows with `q` features and `l` classes, or `TailMoments`.
        rank: How many leading components are preserved, 0 to `min(q, l)`.
        bias: The head's bias `(l,)`, or None where it has none.
        split: The split that `TailMoments` were taken for: that of the kernel less its mean over classes,
            `svd_split(kernel - kernel.mean(axis=1, keepdims=True), 0)`. With `Moments` it spares the SVD.
        ridge: `λ ≥ 0`, shrinking towards the current values.
        rcond: As in `refine_calibrated`.

    Returns:
        A `CalibratedHead`; kernel and bias in the dtypes they came in.

    Raises:
        ValueError: If shapes or dtypes do not fit, `TailMoments` come without their split, or the kernel has
            a single output.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> feats, labels = jax.random.normal(jax.random.key(0), (200, 8)), jnp.arange(200) % 4
        >>> kernel = jax.random.normal(jax.random.key(1), (8, 4)) + feats.T @ jax.nn.one_hot(labels, 4)
        >>> moments = lip_jax.accumulate(lip_jax.moment_accumulator(q=8, l=4), [(feats, labels)])
        >>> head = lip_jax.methods.refine_calibrated_from(kernel, moments, rank=2, bias=jnp.zeros(4))
        >>> of_rows = lip_jax.refine_calibrated(kernel, feats, labels, rank=2, bias=jnp.zeros(4))
        >>> bool(jnp.allclose(head.kernel, of_rows.kernel, rtol=1e-3, atol=1e-3))
        True

    Reference:
        The tail's closed form is that of [si2025]; gauge, centre and scale are this package's.
    """
    check_softmax_kernel(kernel)
    q, l = kernel.shape
    factors = factors_for(moments, split, q, l)
    check_bias(bias, l)
    check_ridge(ridge, "current")
    check_rcond(rcond)
    rank = check_rank(rank, min(q, l))
    head = Head(jnp.asarray(kernel), None if bias is None else jnp.asarray(bias))
    return _calibrated_from(head, moments, rank, factors, ridge, rcond)


@dataclass(frozen=True)
class Calibrated:
    """Calibrated LIP as a method: `refine_calibrated`.

    Attributes:
        rank: How many leading components are preserved; None: chosen by evidence.
        ridge: `λ ≥ 0`, shrinking towards the current values.
        rcond: As in `refine_calibrated`.
    """

    rank: Rank | None = None
    ridge: Scalar = 0.0
    rcond: Scalar | None = None

    name: ClassVar[str] = "calibrated"
    needs: ClassVar[Needs] = "rows"
    refits: ClassVar[bool] = True

    def path(self, head: Head, fit: Fit) -> HeadPath:
        """One candidate for each rank, or the one at the rank that is given."""
        path = calibrated_path(head, fit.rows, self.ridge, self.rcond)
        if self.rank is None:
            return path
        rank = check_rank(self.rank, min(head.kernel.shape))
        return replace(one_head(path.head_at(rank), rank), available=path.available)

    def settle(self, head: Head, fit: Fit) -> Settled:
        """The refit at the rank that is given."""
        rank = check_given(self)
        feats, labels, weights = fit.rows
        options = {"bias": head.bias, "weights": weights, "ridge": self.ridge, "rcond": self.rcond}
        refit = refine_calibrated(head.kernel, feats, labels, rank, **options)
        return Settled(Head(refit.kernel, refit.bias), rank, refit.ignored, refit.s, refit.sigma)

    def from_moments(self, head: Head, moments: Moments | TailMoments, split: SvdSplit | None) -> Settled:
        """The refit at the rank that is given, from moments."""
        rank = check_given(self)
        refit = refine_calibrated_from(
            head.kernel, moments, rank, bias=head.bias, split=split, ridge=self.ridge, rcond=self.rcond
        )
        return Settled(Head(refit.kernel, refit.bias), rank, refit.ignored, refit.s, refit.sigma)


def calibrated_path(head: Head, rows: Rows, ridge: Scalar, rcond: Scalar | None) -> RefitPath:
    """All components of the gauge-free kernel, refitted at the head's own scale."""
    u, s, vt = factors = gauge_free(head.kernel)
    if head.bias is None:
        sums, mean_u = tail_sums(u, vt, *rows, None), jnp.zeros_like(s)
    else:
        sums, mean_u = centred_tail_sums(u, vt, *rows)
    return _path(head, factors, sums, mean_u, ridge, rcond)


def gauge_free(kernel: jax.Array) -> Factors:
    """The thin SVD of the kernel less its mean over classes."""
    kernel = kernel.astype(linalg.compute_dtype(kernel))
    return linalg.thin_svd(kernel - kernel.mean(axis=1, keepdims=True))


def _path(
    head: Head, factors: Factors, sums: TailSums, mean_u: jax.Array, ridge: Scalar, rcond: Scalar | None
) -> RefitPath:
    u, s, vt = factors
    q, l = head.kernel.shape
    max_dim = max(q, l)
    if rcond is None:
        # What is left of the mean is rounding of the mean's size, √l ‖mean‖, which s_1 may be small against.
        mean = head.kernel.astype(s.dtype).mean(axis=1)
        size = jnp.sqrt(jnp.asarray(l, s.dtype)) * jnp.linalg.norm(mean)
        rcond = jnp.finfo(s.dtype).eps * max_dim * jnp.maximum(1, size / jnp.where(s[0] > 0, s[0], 1))
    # V is orthonormal, so both inner products are sums over components.
    current = s.astype(sums.num.dtype)
    of_head, with_targets = jnp.sum(current**2 * sums.den), jnp.sum(current * sums.num)
    defined = (of_head > 0) & (with_targets > 0)
    scale = jnp.where(defined, of_head / jnp.where(defined, with_targets, 1), 0)
    sums = replace(sums, num=scale * sums.num)
    sigma = refit_sigma(s, sums, 0, q, max_dim, ridge, "current", rcond)
    sigma = jnp.where(defined, sigma, s)
    return RefitPath(head, u, s, vt, sigma, mean_u.astype(s.dtype), scale.astype(s.dtype), sums.ignored)


@jax.jit
def _calibrated_head(
    head: Head, rank: Rank, rows: Rows, ridge: Scalar, rcond: Scalar | None
) -> CalibratedHead:
    return _at_rank(calibrated_path(head, rows, ridge, rcond), rank)


@jax.jit
def _calibrated_from(
    head: Head,
    moments: Moments | TailMoments,
    rank: Rank,
    factors: Factors | None,
    ridge: Scalar,
    rcond: Scalar | None,
) -> CalibratedHead:
    u, s, vt = factors = factors or gauge_free(head.kernel)
    found = project(moments, u, vt)
    sums, mean_u = (uncentred(found, None), jnp.zeros_like(s)) if head.bias is None else centred(found)
    return _at_rank(_path(head, factors, sums, mean_u, ridge, rcond), rank)


def _at_rank(path: RefitPath, rank: Rank) -> CalibratedHead:
    kernel, bias = path.head_at(rank)
    return CalibratedHead(kernel, bias, path.s, path.sigma_at(rank), path.scale, path.ignored)
