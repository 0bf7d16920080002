"""The `ValueError`s people read: what argument, what came, what was expected, what to do.

Shapes and dtypes are checked always, since they are known under `jit` too. Values are checked only where
they can be seen (`is_concrete`); what happens to bad values under `jit` is defined in `lip_jax.rows`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_concrete(*arrays: Any) -> bool:
    """Whether every array's values can be inspected, i.e. none is being traced."""
    return not any(isinstance(array, Tracer) for array in arrays)


def see(compute: Callable[[], jax.Array]) -> np.ndarray:
    """The value of a check on concrete arrays, now, even while a surrounding `jit` is being traced."""
    with jax.ensure_compile_time_eval():
        return np.asarray(compute())


@jax.jit
def all_finite(array: jax.Array) -> jax.Array:
    """Whether there is neither NaN nor infinity."""
    return jnp.isfinite(array).all()


def describe(array: Any) -> str:
    """Dtype and shape as `float32[3,4]`, the notation of `jax.make_jaxpr`."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def is_floating(array: Any) -> bool:
    """Whether the dtype is a real floating one, bfloat16 included."""
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)


def check_floating(array: Any, name: str, axes: str) -> None:
    """Require a real floating array with the given axes, such as `"n q"`."""
    if not hasattr(array, "shape"):
        raise ValueError(
            f"{name} must be a JAX or NumPy array ({axes.replace(' ', ', ')}); got "
            f"{type(array).__name__}. Convert it with jnp.asarray({name})."
        )
    ndim = len(axes.split())
    if len(array.shape) != ndim:
        raise ValueError(
            f"{name} must have {ndim} axes ({axes.replace(' ', ', ')}); got {describe(array)}. "
            f"Reshape or flatten it first."
        )
    if not is_floating(array):
        raise ValueError(
            f"{name} must be floating point; got {describe(array)}. Cast it with {name}.astype(jnp.float32)."
        )


def check_kernel_form(kernel: Any, name: str = "kernel") -> None:
    """Require a non-empty floating `(q, l)` matrix."""
    check_floating(kernel, name, "q l")
    if 0 in kernel.shape:
        raise ValueError(f"{name} must have at least one row and one column; got {describe(kernel)}.")


def check_kernel(kernel: Any, name: str = "kernel") -> None:
    """Require a non-empty floating `(q, l)` matrix, finite where values can be seen."""
    check_kernel_form(kernel, name)
    if is_concrete(kernel) and not see(lambda: all_finite(kernel)):
        raise ValueError(
            f"{name} must be finite; got NaN or infinity in {describe(kernel)}. "
            f"The training run probably diverged: restore an earlier checkpoint."
        )


def check_softmax_kernel(kernel: Any) -> None:
    """Require a kernel with at least two outputs."""
    check_kernel(kernel)
    if kernel.shape[1] == 1:
        raise ValueError(
            f"kernel must be a softmax head's, with at least two outputs; got {describe(kernel)}. "
            f"A sigmoid head can be refitted as published: lip_jax.refine, or apply(rank=...)."
        )


def check_split(split: Any) -> None:
    """Require factors `(q, r)`, `(r,)` and `(r, l)`."""
    for name, array, axes in (("u", split.u, "q r"), ("s", split.s, "r"), ("vt", split.vt, "r l")):
        check_floating(array, f"split.{name}", axes)
    r = split.s.shape[0]
    if split.u.shape[1] != r or split.vt.shape[0] != r:
        raise ValueError(
            f"split must hold u (q, r), s (r,), vt (r, l); got u {describe(split.u)}, "
            f"s {describe(split.s)}, vt {describe(split.vt)}. Make it with lip_jax.svd_split."
        )


def check_split_of(split: Any, q: int, l: int) -> None:
    """Require the split of a `(q, l)` kernel."""
    check_split(split)
    if (split.u.shape[0], split.vt.shape[1]) != (q, l):
        raise ValueError(
            f"split must be that of the kernel, (q, l) = ({q}, {l}); got one of "
            f"({split.u.shape[0]}, {split.vt.shape[1]})."
        )


def check_bias(bias: Any, l: int) -> None:
    """Require a floating `(l,)` bias, finite where values can be seen, or None."""
    if bias is None:
        return
    check_floating(bias, "bias", "l")
    if bias.shape[0] != l:
        raise ValueError(f"bias must have one entry per class, l = {l}; got {describe(bias)}.")
    if is_concrete(bias) and not see(lambda: all_finite(bias)):
        values = np.asarray(bias, np.float64)
        first = int((~np.isfinite(values)).argmax())
        raise ValueError(
            f"bias must be finite; got {values[first]} for class {first}. A class that is masked out by an "
            f"infinite bias cannot be fitted: leave it out of the head, and mask the logits instead."
        )


def check_rank(rank: Any, r: int, *, smallest: int = 0, name: str = "rank") -> int | jax.Array:
    """Return the rank as a Python int where it is static, else as an integer scalar array."""
    value = None
    if not isinstance(rank, bool) and isinstance(rank, (int, np.integer)):
        value = rank = int(rank)
    elif (
        isinstance(rank, (jax.Array, np.ndarray))
        and rank.shape == ()
        and jnp.issubdtype(rank.dtype, jnp.integer)
    ):
        value = int(rank) if is_concrete(rank) else None
        rank = jnp.asarray(rank)
    else:
        got = describe(rank) if hasattr(rank, "dtype") else f"{rank!r} ({type(rank).__name__})"
        raise ValueError(
            f"{name} must be an integer (Python int or integer scalar array); got {got}. "
            f"For a share of the spectrum use lip_jax.spectrum.rank_for_energy(s, fraction)."
        )
    if value is not None and not smallest <= value <= r:
        raise ValueError(
            f"{name} must lie in [{smallest}, {r}] (the kernel has min(q, l) = {r} components); got {value}."
        )
    return rank


def check_ridge(ridge: Any, ridge_to: str) -> None:
    """Require a non-negative strength and a known target of the shrinkage."""
    if ridge_to not in ("current", "zero"):
        raise ValueError(f"ridge_to must be 'current' or 'zero'; got {ridge_to!r}.")
    if is_concrete(ridge) and not 0 <= float(ridge) < np.inf:
        raise ValueError(f"ridge must be finite and at least 0; got {ridge}.")


def check_rcond(rcond: Any) -> None:
    """Require a share of the largest singular value in [0, 1), or None for the default."""
    if rcond is not None and is_concrete(rcond) and not 0 <= float(rcond) < 1:
        raise ValueError(
            f"rcond must lie in [0, 1): components with s_i <= rcond * s_1 keep their value; got {rcond}. "
            f"0 is the literal paper, None the default eps * max(q, l)."
        )


def check_fraction(value: Any, name: str) -> None:
    """Require a number in [0, 1], where it can be seen."""
    if is_concrete(value) and not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value}.")
