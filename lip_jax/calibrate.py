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
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from lip_jax import _linalg
from lip_jax._checks import (
    check_bias,
    check_floating,
    check_labels,
    check_rank,
    check_rcond,
    check_ridge,
    check_softmax_kernel,
    check_weights,
)
from lip_jax._types import Bias, Feats, Kernel, Labels, Rank, Scalar, Weights
from lip_jax.labels import as_labels, as_rows
from lip_jax.metrics import Logits, corrected_losses, losses, row_weights, weighted_mean
from lip_jax.moments import Moments, along
from lip_jax.refit import Factors, check_rows, factors_for, raise_if_ignored, refit_sigma
from lip_jax.spectral import SvdSplit, leading
from lip_jax.tail import TailMoments, TailSums, centred, centred_tail_sums, tail_sums, uncentred

# Steps to a logit scale: far more than Newton's method takes, and enough to halve the bracket to rounding.
SCALE_STEPS = 25


@dataclass(frozen=True)
class CalibratedHead:
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


jax.tree_util.register_dataclass(
    CalibratedHead, data_fields=("kernel", "bias", "s", "sigma", "scale", "ignored"), meta_fields=()
)


def refine_calibrated(
    kernel: Kernel,
    bias: Bias | None,
    feats: Feats,
    labels: Labels,
    rank: Rank,
    *,
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
        bias: Its bias `(l,)`, or None.
        feats: Inputs of the head `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`; the kinds are told in `lip_jax.labels`.
        rank: How many leading components are preserved, 0 to `min(q, l)`.
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
        >>> head = lip_jax.refine_calibrated(kernel, jnp.zeros(4), feats, labels, rank=2)
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
    head = calibrated_head(jnp.asarray(kernel), rank, *as_rows(feats, labels, weights, bias), ridge, rcond)
    raise_if_ignored(head.ignored, feats, labels, weights, l)
    return head


def refine_calibrated_from(
    kernel: Kernel,
    bias: Bias | None,
    moments: Moments | TailMoments,
    rank: Rank,
    *,
    split: SvdSplit | None = None,
    ridge: Scalar = 0.0,
    rcond: Scalar | None = None,
) -> CalibratedHead:
    """`refine_calibrated` from moments instead of rows: gauge, centre and scale, then the tail.

    Args:
        kernel: Kernel of a softmax head `(q, l)`, `l ≥ 2`.
        bias: Its bias `(l,)`, or None.
        moments: `Moments`, of any rows with `q` features and `l` classes, or `TailMoments`.
        rank: How many leading components are preserved, 0 to `min(q, l)`.
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
        >>> head = lip_jax.refine_calibrated_from(kernel, jnp.zeros(4), moments, rank=2)
        >>> of_rows = lip_jax.refine_calibrated(kernel, jnp.zeros(4), feats, labels, rank=2)
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
    bias = None if bias is None else jnp.asarray(bias)
    return _calibrated_from(jnp.asarray(kernel), bias, moments, rank, factors, ridge, rcond)


class Spectrum(NamedTuple):
    """A kernel's components with the refitted value of each, which holds at every rank."""

    u: jax.Array
    s: jax.Array
    vt: jax.Array
    sigma: jax.Array
    mean_u: jax.Array
    scale: jax.Array
    ignored: jax.Array


def calibrated_spectrum(kernel, feats, labels, weights, bias, ridge, rcond) -> Spectrum:
    """All components of the gauge-free kernel, refitted at the head's own scale."""
    u, s, vt = factors = gauge_free(kernel)
    if bias is None:
        sums, mean_u = tail_sums(u, vt, feats, labels, weights, None), jnp.zeros_like(s)
    else:
        sums, mean_u = centred_tail_sums(u, vt, feats, labels, weights)
    return _spectrum(kernel, factors, sums, mean_u, ridge, rcond)


def gauge_free(kernel) -> Factors:
    """The thin SVD of the kernel less its mean over classes."""
    kernel = kernel.astype(_linalg.compute_dtype(kernel))
    return _linalg.thin_svd(kernel - kernel.mean(axis=1, keepdims=True))


def _spectrum(kernel, factors: Factors, sums: TailSums, mean_u, ridge, rcond) -> Spectrum:
    u, s, vt = factors
    max_dim = max(kernel.shape)
    if rcond is None:
        # What is left of the mean is rounding of the mean's size, √l ‖mean‖, which s_1 may be small against.
        mean = kernel.astype(s.dtype).mean(axis=1)
        size = jnp.sqrt(jnp.asarray(kernel.shape[1], s.dtype)) * jnp.linalg.norm(mean)
        rcond = jnp.finfo(s.dtype).eps * max_dim * jnp.maximum(1, size / jnp.where(s[0] > 0, s[0], 1))
    # V is orthonormal, so both inner products are sums over components.
    current = s.astype(sums.num.dtype)
    of_head, with_targets = jnp.sum(current**2 * sums.den), jnp.sum(current * sums.num)
    defined = (of_head > 0) & (with_targets > 0)
    scale = jnp.where(defined, of_head / jnp.where(defined, with_targets, 1), 0)
    sums = replace(sums, num=scale * sums.num)
    sigma = refit_sigma(s, sums, 0, kernel.shape[0], max_dim, ridge, "current", rcond)
    sigma = jnp.where(defined, sigma, s)
    return Spectrum(u, s, vt, sigma, mean_u.astype(s.dtype), scale.astype(s.dtype), sums.ignored)


@jax.jit
def calibrated_head(kernel, rank, feats, labels, weights, bias, ridge, rcond) -> CalibratedHead:
    """`refine_calibrated` on checked arguments."""
    return _at_rank(
        kernel, bias, calibrated_spectrum(kernel, feats, labels, weights, bias, ridge, rcond), rank
    )


@jax.jit
def _calibrated_from(kernel, bias, moments, rank, factors, ridge, rcond) -> CalibratedHead:
    u, s, vt = factors = factors or gauge_free(kernel)
    found = along(moments, u, vt)
    sums, mean_u = (uncentred(found, None), jnp.zeros_like(s)) if bias is None else centred(found)
    return _at_rank(kernel, bias, _spectrum(kernel, factors, sums, mean_u, ridge, rcond), rank)


def _at_rank(kernel, bias, spectrum: Spectrum, rank) -> CalibratedHead:
    sigma = jnp.where(leading(spectrum.s.shape[0], rank), spectrum.s, spectrum.sigma)
    refined, moved_bias = refitted(kernel, bias, spectrum, sigma)
    return CalibratedHead(refined, moved_bias, spectrum.s, sigma, spectrum.scale, spectrum.ignored)


def refitted(kernel, bias, spectrum: Spectrum, sigma) -> tuple[jax.Array, jax.Array | None]:
    """`W − U diag(s − σ) Vᵀ` and `b + V diag(s − σ) Uᵀμ`, in the dtypes they came in."""
    change = (spectrum.s - sigma)[None, :]
    kernel_change = _linalg.matmul(spectrum.u * change, spectrum.vt)
    refined = _less(kernel, kernel_change)
    if bias is None:
        return refined, None
    bias_change = _linalg.matmul(spectrum.mean_u[None, :] * change, spectrum.vt)[0]
    return refined, _less(bias, -bias_change)


def _less(array, change) -> jax.Array:
    # Where nothing changes the entry stays bit for bit: −0 − (−0) would be +0.
    return jnp.where(change == 0, array, (array.astype(change.dtype) - change).astype(array.dtype))


def fit_logit_scale(
    logits: Logits, labels: Labels, *, weights: Weights | None = None
) -> Float[jax.Array, ""]:
    """The scale `a > 0` that minimises the log-loss of `a · logits`: temperature scaling.

    Fold it into the head as `a · kernel`, `a · bias`. The loss is convex in `a`: Newton's method within a
    bracket that is bisected where a step leaves it. The bracket spans a factor 10⁴ either way of
    `a = 1/std(logits)`, where the answer is held for labels that are all right or all wrong. The loss is
    never above that of `a = 1`. Rows that cannot be used count for nothing even where they can be seen.

    Args:
        logits: `(n, l)`.
        labels: Class ids `(n,)` or targets `(n, l)`.
        weights: Weight of each row `(n,)`.

    Returns:
        A positive scalar; 1 where logits do not vary or no row counts.

    Raises:
        ValueError: If `logits` and `labels` do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> logits, labels = jnp.array([[1.0, 0.0]] * 4), jnp.array([0, 0, 0, 1])
        >>> round(float(lip_jax.fit_logit_scale(logits, labels)), 3)  # log(3/1)
        1.099

    Reference:
        [guo2017], temperature scaling.
    """
    check_floating(logits, "logits", "n l")
    check_labels(labels, *logits.shape)
    check_weights(weights, logits.shape[0])
    return logit_scale(
        jnp.asarray(logits), as_labels(labels), None if weights is None else jnp.asarray(weights)
    )


@jax.jit
def logit_scale(logits, labels, weights, transition=None) -> jax.Array:
    """`fit_logit_scale` on checked arguments; with `P(given | true)` the labels are taken for noisy ones."""
    logits = logits.astype(_linalg.compute_dtype(logits))
    weights = row_weights(logits, labels, weights)
    # Only differences between classes matter; so centred, the spread is that of the softmax. First less the
    # largest, so that equal logits become 0 exactly.
    centred = logits - jax.lax.stop_gradient(logits.max(axis=1, keepdims=True))
    centred = jnp.where(weights[:, None] > 0, centred - centred.mean(axis=1, keepdims=True), 0)
    square = weighted_mean(jnp.mean(centred**2, axis=1), weights)
    varies = (square > 0) & jnp.isfinite(square)
    spread = jnp.sqrt(jnp.where(varies, square, 1))
    unit = centred / spread

    def loss(log_scale):
        scaled = jnp.exp(log_scale) * unit
        if transition is None:
            return weighted_mean(losses(scaled, labels), weights)
        return weighted_mean(corrected_losses(scaled, labels, transition), weights)

    reach = jnp.log(jnp.asarray(1e4, unit.dtype))
    # Its derivative is that of the root, whatever the steps to it.
    log_scale = jax.lax.custom_root(
        jax.grad(loss),
        jnp.zeros_like(reach),
        partial(_root_within, reach=reach),
        _divided_by,
    )
    # An end of the bracket is no minimum: there, 1 may be better.
    better = varies & (loss(log_scale) <= loss(jnp.log(spread)))
    return jnp.where(better, jnp.exp(log_scale) / spread, 1)


def _root_within(slope, start, *, reach) -> jax.Array:
    """Where a slope is 0, by Newton's method in a bracket of `±reach`; an end of it where that is nowhere."""
    settled = 4 * jnp.finfo(start.dtype).eps

    def moves(state):
        steps, _, _, moving = state
        return moving & (steps < SCALE_STEPS)

    def step(state):
        steps, at, (low, high), _ = state
        gradient, curvature = jax.jvp(slope, (at,), (jnp.ones_like(at),))
        low = jnp.where(gradient < 0, at, low)
        high = jnp.where(gradient > 0, at, high)
        convex = curvature > 0
        newton = at - gradient / jnp.where(convex, curvature, 1)
        # The ends count as inside: a converged iterate is one, and halving the bracket would throw it away.
        inside = convex & (newton >= low) & (newton <= high)
        to = jnp.where(gradient == 0, at, jnp.where(inside, newton, (low + high) / 2))
        return steps + 1, to, (low, high), jnp.abs(to - at) > settled * jnp.maximum(1, jnp.abs(at))

    state = jnp.zeros((), jnp.int32), start, (-reach, reach), jnp.asarray(True)
    return jax.lax.while_loop(moves, step, state)[1]


def _divided_by(slope_of, value) -> jax.Array:
    curvature = slope_of(jnp.ones_like(value))
    return value * _linalg.reciprocal(curvature, curvature != 0)
