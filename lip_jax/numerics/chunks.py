"""Rows a chunk at a time, so that what is made of them stays small."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# Rows in flight at once: enough for the matrix products to run at full speed, few enough for the cache.
CHUNK_ROWS = 1024


def _cut(array: jax.Array, start: jax.Array | int, length: int) -> jax.Array:
    """`length` rows of an array, of bfloat16 as float32."""
    plain = partial(jax.lax.dynamic_slice_in_dim, slice_size=length)
    if array.dtype != jnp.bfloat16:
        return plain(array, start)

    # On the CPU XLA would make float32 of the whole array before it cuts. It cuts bits as they are, and
    # the barrier keeps it from making bits of the whole array first.
    @jax.custom_jvp
    def cut(array, start):
        bits = jax.lax.bitcast_convert_type(jax.lax.optimization_barrier((array, start))[0], jnp.uint16)
        wide = plain(bits, start).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(wide, jnp.float32)

    @cut.defjvp
    def _(primals, tangents):
        return cut(*primals), plain(tangents[0], primals[1]).astype(jnp.float32)

    return cut(array, start)


def rows_used(weights: jax.Array | None) -> jax.Array | None:
    """Up to which row there are weights other than 0, for `fold_rows` to stop there."""
    if weights is None:
        return None
    place = jnp.arange(1, weights.shape[0] + 1, dtype=jnp.int32)
    # NaN and negative weights are no weights, but to be counted.
    return jnp.max(jnp.where(weights.astype(bool), place, 0), initial=0)


def fold_rows(
    step: Callable, carry: Any, rows: Any, size: int | None = None, *, stop: jax.Array | None = None
) -> tuple[Any, Any]:
    """`carry, out = step(carry, chunk, fresh)` over all rows, `size` at a time; the outs are joined.

    The last chunk reaches back so that it is full, which spares a padded copy of the rows: `fresh` marks
    the rows not seen before, and only they may enter the carry. Chunks from row `stop` on are left out: rows
    in order of use cost nothing where they count for nothing; steps that have an out take no `stop`. Rows of
    bfloat16 come as float32, unless all fit into one chunk.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    steps = -(-n // (CHUNK_ROWS if size is None else size)) if n else 0
    if steps <= 1:
        return step(carry, rows, jnp.ones(n, bool))
    # Chunks of equal length overlap least.
    length = -(-n // steps)
    offsets = jnp.arange(length, dtype=jnp.int32)
    chunk = jax.eval_shape(lambda rows: jax.tree.map(lambda leaf: _cut(leaf, 0, length), rows), rows)
    _, out = jax.eval_shape(step, carry, chunk, jax.ShapeDtypeStruct((length,), bool))
    assert stop is None or not jax.tree.leaves(out)

    def visit(carry, chunk, fresh, first):
        if stop is None:
            return step(carry, chunk, fresh)
        return jax.lax.cond(first < stop, lambda: step(carry, chunk, fresh), lambda: (carry, out))

    joined = jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape[1:]), leaf.dtype), out)

    def body(state, i):
        carry, joined = state
        start = jnp.minimum(i * length, n - length)
        chunk = jax.tree.map(lambda leaf: _cut(leaf, start, length), rows)
        carry, out = visit(carry, chunk, start + offsets >= i * length, i * length)
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)  # noqa: E731
        return (carry, jax.tree.map(put, joined, out)), None

    state, _ = jax.lax.scan(body, (carry, joined), jnp.arange(steps, dtype=jnp.int32))
    return state
