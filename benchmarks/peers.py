"""The published refit as others would run it: transcribed from the paper's formula, and nothing saved.

`W_k = U_k diag(s_k) V_kᵀ`, `A = U_lᵀ Xᵀ (Y − X W_k) V_l`, `B = U_lᵀ Xᵀ X U_l`, and then
`W* = W_k + U_l diag(A_ii/B_ii) V_lᵀ`, with a one-hot `Y` where labels are ids [si2025].
"""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _published(kernel, feats, targets, rank: int, *, svd, diagonal):
    u, s, vt = svd(kernel, full_matrices=False)
    principal = (u[:, :rank] * s[None, :rank]) @ vt[:rank]
    tail_u, tail_v = u[:, rank:], vt[rank:].T
    residual = targets - feats @ principal
    a = tail_u.T @ (feats.T @ residual) @ tail_v
    b = tail_u.T @ (feats.T @ (feats @ tail_u))
    return principal + (tail_u * (diagonal(a) / diagonal(b))[None, :]) @ tail_v.T


def published_numpy(kernel, feats, labels, rank: int):
    """The formula in NumPy."""
    targets = np.eye(kernel.shape[1], dtype=feats.dtype)[labels] if labels.ndim == 1 else labels
    return _published(kernel, feats, targets, rank, svd=np.linalg.svd, diagonal=np.diagonal)


def published_torch(kernel, feats, labels, rank: int):
    """The formula in PyTorch, on tensors of any device."""
    torch, one_hot = pytorch(), pytorch().nn.functional.one_hot
    with torch.no_grad():
        targets = one_hot(labels, kernel.shape[1]).to(feats.dtype) if labels.ndim == 1 else labels
        return _published(kernel, feats, targets, rank, svd=torch.linalg.svd, diagonal=torch.diagonal)


def published_jax(kernel, feats, labels, rank: int):
    """The straightforward port to JAX, to be compiled with `rank` static."""
    with jax.default_matmul_precision("highest"):
        targets = jax.nn.one_hot(labels, kernel.shape[1], dtype=feats.dtype) if labels.ndim == 1 else labels
        return _published(kernel, feats, targets, rank, svd=jnp.linalg.svd, diagonal=jnp.diagonal)


def pytorch() -> Any:
    """The module, which need not be installed for anything else."""
    return importlib.import_module("torch")


def torch_installed() -> bool:
    """Whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


def has_torch() -> bool:
    """Whether PyTorch is installed and, beside an accelerator, may use it too."""
    return torch_installed() and (jax.default_backend() == "cpu" or pytorch().cuda.is_available())


def as_tensors(arrays: Sequence[jax.Array]) -> list[Any]:
    """Copies as tensors where JAX computes, to be used by as many threads."""
    torch = pytorch()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    tensors = [torch.from_numpy(np.array(array)).to(device) for array in arrays]
    return [part if part.is_floating_point() else part.long() for part in tensors]
