"""Rows a chunk at a time, so that what is computed from them stays small."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

# Rows of a chunk: enough for matrix products at full speed, few enough for the cache.
CHUNK_ROWS = 1024

Carry = TypeVar("Carry")

Step = Callable[[Carry, Any, jax.Array], tuple[Carry, Any]]


def _cut(array: jax.Array, start: jax.Array | int, length: int, axis: int) -> jax.Array:
    """A slice of `length` along an axis; bfloat16 becomes float32."""
    plain = partial(jax.lax.dynamic_slice_in_dim, slice_size=length, axis=axis)
    if array.dtype != jnp.bfloat16:
        return plain(array, start)

    # XLA:CPU hoists the cast above the slice, so slice the uint16 bits. The barrier keeps XLA from hoisting
    # the cast to bits.
    @jax.custom_jvp
    def cut(array: jax.Array, start: jax.Array | int) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(jax.lax.optimization_barrier((array, start))[0], jnp.uint16)
        wide = plain(bits, start).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(wide, jnp.float32)

    @cut.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        return cut(*primals), plain(tangents[0], primals[1]).astype(jnp.float32)

    return cut(array, start)


def rows_used(weights: jax.Array | None) -> jax.Array | None:
    """The number of leading rows that hold all weights other than 0: `stop` of `fold_rows`."""
    if weights is None:
        return None
    place = jnp.arange(1, weights.shape[0] + 1, dtype=jnp.int32)
    # NaN and negative weights cannot be used, but they must be counted.
    return jnp.max(jnp.where(weights.astype(bool), place, 0), initial=0)


def fold_rows(
    step: Step, carry: Carry, rows: Any, size: int | None = None, *, stop: jax.Array | None = None
) -> tuple[Carry, Any]:
    """`carry, out = step(carry, chunk, fresh)` over all rows, `size` at a time; the outs are joined.

    The carry must be a sum that starts at 0. `fresh` marks rows not seen before, and only they may enter the
    carry: the last chunk overlaps the one before, which spares a padded copy of the rows. The outs of rows
    seen twice must agree. Chunks from row `stop` on are skipped; steps with an out take no `stop`. Rows of
    bfloat16 come as float32, unless all fit into one chunk.

    Where there are several devices, rows may be sharded over them, and a chunk of consecutive rows would have
    to be gathered. Rows are therefore viewed as one block per device, and a chunk takes `size` rows of every
    block. Each block has its own carry. These are added once, at the end.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    size = CHUNK_ROWS if size is None else size
    # A divisor of n: rows sharded over some of the devices are then cut where they lie, too.
    blocks = math.gcd(n, jax.device_count())
    if n <= blocks * size:
        return step(carry, rows, jnp.ones(n, bool))
    if blocks == 1:
        return _fold(step, carry, rows, size, 0, stop)
    split = lambda whole: whole.reshape(blocks, n // blocks, *whole.shape[1:])  # noqa: E731
    carries = jax.tree.map(lambda part: jnp.zeros((blocks, *part.shape), part.dtype), carry)
    stepped = jax.vmap(step, in_axes=(0, 0, None))
    carries, outs = _fold(stepped, carries, jax.tree.map(split, rows), size, 1, stop)
    joined = jax.tree.map(lambda part: part.reshape(n, *part.shape[2:]), outs)
    return jax.tree.map(lambda part: part.sum(axis=0, dtype=part.dtype), carries), joined


def _fold(
    step: Step, carry: Carry, rows: Any, size: int, axis: int, stop: jax.Array | None
) -> tuple[Carry, Any]:
    """The loop of `fold_rows` over chunks along an axis."""
    n = jax.tree.leaves(rows)[0].shape[axis]
    steps = -(-n // size)
    # Chunks of equal length overlap least.
    length = -(-n // steps)
    offsets = jnp.arange(length, dtype=jnp.int32)

    def cut(start: jax.Array | int) -> Any:
        return jax.tree.map(lambda leaf: _cut(leaf, start, length, axis), rows)

    _, out = jax.eval_shape(step, carry, jax.eval_shape(cut, 0), jax.ShapeDtypeStruct((length,), bool))
    assert stop is None or not jax.tree.leaves(out)

    def visit(carry: Carry, chunk: Any, fresh: jax.Array, first: jax.Array) -> tuple[Carry, Any]:
        if stop is None:
            return step(carry, chunk, fresh)
        return jax.lax.cond(first < stop, lambda: step(carry, chunk, fresh), lambda: (carry, out))

    def empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((*leaf.shape[:axis], n, *leaf.shape[axis + 1 :]), leaf.dtype)

    def body(state: tuple[Carry, Any], i: jax.Array) -> tuple[tuple[Carry, Any], None]:
        carry, joined = state
        start = jnp.minimum(i * length, n - length)
        carry, out = visit(carry, cut(start), start + offsets >= i * length, i * length)
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis)  # noqa: E731
        return (carry, jax.tree.map(put, joined, out)), None

    state = carry, jax.tree.map(empty, out)
    state, _ = jax.lax.scan(body, state, jnp.arange(steps, dtype=jnp.int32))
    return state
