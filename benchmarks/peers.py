"""The published refit as others would run it: transcribed from the paper's formula, and nothing saved.

`W_k = U_k diag(s_k) V_kᵀ`, `A = U_lᵀ Xᵀ (Y − X W_k) V_l`, `B = U_lᵀ Xᵀ X U_l`, and then
`W* = W_k + U_l diag(A_ii/B_ii) V_lᵀ`, with a one-hot `Y` where labels are ids [si2025].
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST


def published_numpy(kernel, feats, labels, rank: int):
    """The formula in NumPy."""
    l = kernel.shape[1]
    targets = np.eye(l, dtype=feats.dtype)[labels] if labels.ndim == 1 else labels
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    principal = (u[:, :rank] * s[:rank]) @ vt[:rank]
    tail_u, tail_v = u[:, rank:], vt[rank:].T
    residual = targets - feats @ principal
    a = tail_u.T @ (feats.T @ residual) @ tail_v
    b = tail_u.T @ (feats.T @ (feats @ tail_u))
    return principal + (tail_u * (np.diag(a) / np.diag(b))) @ tail_v.T


def pytorch() -> Any:
    """The module, which need not be installed for anything else."""
    return importlib.import_module("torch")


def published_torch(kernel, feats, labels, rank: int):
    """The formula in PyTorch, on tensors of any device."""
    torch = pytorch()
    with torch.no_grad():
        l = kernel.shape[1]
        targets = torch.nn.functional.one_hot(labels, l).to(feats.dtype) if labels.ndim == 1 else labels
        u, s, vt = torch.linalg.svd(kernel, full_matrices=False)
        principal = (u[:, :rank] * s[:rank]) @ vt[:rank]
        tail_u, tail_v = u[:, rank:], vt[rank:].T
        residual = targets - feats @ principal
        a = tail_u.T @ (feats.T @ residual) @ tail_v
        b = tail_u.T @ (feats.T @ (feats @ tail_u))
        return principal + (tail_u * (torch.diagonal(a) / torch.diagonal(b))) @ tail_v.T


def published_jax(kernel, feats, labels, rank: int):
    """The straightforward port to JAX, to be compiled with `rank` static."""
    l = kernel.shape[1]
    targets = jax.nn.one_hot(labels, l, dtype=feats.dtype) if labels.ndim == 1 else labels

    def times(*factors):
        product = factors[-1]
        for factor in factors[-2::-1]:
            product = jnp.matmul(factor, product, precision=HIGHEST)
        return product

    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    principal = times(u[:, :rank] * s[None, :rank], vt[:rank])
    tail_u, tail_v = u[:, rank:], vt[rank:].T
    residual = targets - times(feats, principal)
    a = times(tail_u.T, times(feats.T, residual), tail_v)
    b = times(tail_u.T, feats.T, feats, tail_u)
    return principal + times(tail_u * (jnp.diagonal(a) / jnp.diagonal(b))[None, :], tail_v.T)
