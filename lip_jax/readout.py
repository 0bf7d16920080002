"""The clean readout: the head replaced by a linear model fitted on its inputs [li2020]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lip_jax import _linalg
from lip_jax.labels import row_use
from lip_jax.metrics import weighted_mean


class RidgePath(NamedTuple):
    """Everything the ridge solutions of all strengths share: one eigendecomposition serves the path.

    `W(λ) = Q diag(1/(e + λ)) (Qᵀ X̃ᵀ Ỹ)` with `X̃ᵀX̃ = Q diag(e) Qᵀ`, and the intercept `ȳ − μᵀ W`, which is
    not penalised. Without intercept the means are 0.
    """

    basis: jax.Array
    eigenvalues: jax.Array
    cross: jax.Array
    mean_x: jax.Array
    mean_y: jax.Array


def ridge_path(feats, labels, weights, l: int, *, intercept: bool) -> RidgePath:
    """The shared part of all ridge solutions on one set of rows."""
    dtype = _linalg.compute_dtype(feats)
    feats = feats.astype(dtype)
    use = row_use(jnp.sum(feats**2, axis=1), labels, weights, l)
    used = use.weights > 0
    feats = jnp.where(used[:, None], feats, 0)
    mean_x = jnp.zeros(feats.shape[1], dtype)
    if intercept:
        mean_x = jax.vmap(weighted_mean, (1, None))(feats, use.weights)
    centred = jnp.where(used[:, None], feats - mean_x[None, :], 0)
    weighted = use.weights[:, None] * centred
    total = jnp.sum(use.weights)
    if labels.ndim == 1:
        ids = jnp.clip(labels, 0, l - 1)
        cross = jnp.zeros((l, feats.shape[1]), dtype).at[ids].add(weighted).T
        mass = jnp.zeros(l, dtype).at[ids].add(use.weights)
    else:
        targets = jnp.where(used[:, None], labels.astype(dtype), 0)
        cross = _linalg.matmul(weighted.T, targets)
        mass = jnp.sum(use.weights[:, None] * targets, axis=0)
    mean_y = mass / jnp.where(total > 0, total, 1) if intercept else jnp.zeros_like(mass)
    # Centred features sum to 0 up to rounding; what is left would carry the mean target in.
    cross = cross - jnp.sum(weighted, axis=0)[:, None] * mean_y[None, :]
    eigenvalues, basis = jnp.linalg.eigh(_linalg.matmul(weighted.T, centred))
    eigenvalues = jnp.maximum(eigenvalues, 0)
    return RidgePath(basis, eigenvalues, _linalg.matmul(basis.T, cross), mean_x, mean_y)


def ridge_grid(path: RidgePath, points: int) -> jax.Array:
    """Strengths from 10⁻⁴ to 10² times the mean eigenvalue, evenly in the logarithm."""
    mean = path.eigenvalues.mean()
    span = jnp.logspace(-4, 2, points, dtype=path.eigenvalues.dtype)
    return jnp.where(mean > 0, mean, 1) * span


def ridge_solution(path: RidgePath, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kernel `(q, l)` and intercept `(l,)` at one strength, which must be positive."""
    kernel = _linalg.matmul(path.basis, path.cross / (path.eigenvalues + ridge)[:, None])
    return kernel, path.mean_y - _linalg.matmul(path.mean_x[None, :], kernel)[0]
