"""Angles between the leading subspaces of two heads, and bounds on them, at many ranks."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer

from lip_jax._types import Array, Kernel, Scalar
from lip_jax.bounds.sin_theta import Form, mixed_gap, sin_theta_bound, wedin_bound
from lip_jax.numerics import linalg
from lip_jax.spectrum.split import svd_split


@dataclass(frozen=True)
class Angles:
    """Measured `sin θ` between the leading subspaces of two heads, and bounds on it, by rank.

    Attributes:
        feats_side: `sin θ` of the left singular subspaces, `(k,)`.
        class_side: `sin θ` of the right singular subspaces, `(k,)`.
        bounds: Bounds on both, by name, each `(k,)`.
    """

    feats_side: Float[Array, "k"]
    class_side: Float[Array, "k"]
    bounds: dict[str, Float[Array, "k"]]


def compare_heads(kernel: Kernel, kernel_noisy: Kernel, ranks: Integer[Array, "k"]) -> Angles:
    """Angles between the leading subspaces of two kernels, and Wedin's bounds on them [wedin1972].

    Args:
        kernel: `(q, l)`.
        kernel_noisy: Another head on the same features `(q, l)`.
        ranks: How many leading components to compare `(k,)`.

    Returns:
        `Angles`, with one entry for each rank.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> kernel = jnp.diag(jnp.array([4.0, 2.0, 1.0]))
        >>> angles = lip_jax.bounds.compare_heads(kernel, kernel.at[0, 1].set(0.5), jnp.array([1, 2]))
        >>> bool((angles.feats_side <= angles.bounds["Wedin, mixed gap"]).all())
        True
    """
    feats_side, class_side, mixed, own = _measure_angles(kernel, kernel_noisy, ranks)
    return Angles(feats_side, class_side, {"Wedin, mixed gap": mixed, "Wedin, own gap": own})


@jax.jit
def _measure_angles(kernel: Array, kernel_noisy: Array, ranks: Array) -> tuple[jax.Array, ...]:
    split, split_noisy = svd_split(kernel, 0), svd_split(kernel_noisy, 0)
    wedin = partial(wedin_bound, kernel, kernel_noisy)
    return (
        _largest_sines(split.u, split_noisy.u, ranks),
        _largest_sines(split.vt.T, split_noisy.vt.T, ranks),
        jax.vmap(lambda rank: wedin(rank, gap="mixed").value)(ranks),
        jax.vmap(lambda rank: wedin(rank, gap="own").value)(ranks),
    )


def _largest_sines(v: Array, v_noisy: Array, ranks: Array) -> jax.Array:
    # The largest of `lip_jax.spectrum.principal_angles` at a traced rank: sin θ = ‖(I − V_k V_kᵀ) V'_k‖₂.
    # Columns beyond k are set to 0, which keeps shapes fixed.
    product = linalg.matmul(v.T, v_noisy)

    def at(rank: Array) -> jax.Array:
        leading = jnp.arange(v.shape[1]) < rank
        inside = linalg.matmul(v, jnp.where(leading[:, None], product, 0))
        outside = jnp.where(leading[None, :], v_noisy - inside, 0)
        return jnp.minimum(jnp.linalg.norm(outside, ord=2), 1)

    return jax.lax.map(at, ranks)


@partial(jax.jit, static_argnames=("num_samples", "num_classes", "form"))
def ridge_bounds(
    feature_values: Float[Array, "f"],
    s: Float[Array, "r"],
    s_noisy: Float[Array, "r"],
    ranks: Integer[Array, "k"],
    *,
    num_samples: int,
    num_classes: int,
    flip_rate: Scalar,
    ridge: Scalar,
    form: Form,
) -> Float[jax.Array, "k"]:
    """`sin_theta_bound` at every rank, for ridge heads with spectra `s` and `s_noisy`."""

    def at(rank: Array) -> jax.Array:
        return sin_theta_bound(
            singular_values=feature_values,
            gap=mixed_gap(s, s_noisy, rank),
            num_samples=num_samples,
            num_classes=num_classes,
            flip_rate=flip_rate,
            ridge=ridge,
            form=form,
        ).value

    return jax.vmap(at)(ranks)
