"""The sums a refit needs. They are additive over samples, so any split of the rows gives the same answer.

For a given split `U, V`: `num_i = Σ_n w_n (x_n·u_i)(y_n·v_i)` and `den_i = Σ_n w_n (x_n·u_i)²`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from lip_jax import _linalg
from lip_jax.labels import row_use

# Rows in flight at once: a few hundred are enough for the matrix products to run at full speed.
CHUNK_ROWS = 1024


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("num", "den", "energy", "ignored"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TailSums:
    """What all rows say about every component of one split.

    Attributes:
        num: `Σ w (x·u_i)((y − b)·v_i)`, `(r,)`.
        den: `Σ w (x·u_i)²`, `(r,)`.
        energy: `Σ w ‖x‖²`, the scale against which `den` counts as empty.
        ignored: How many rows could not be used (see `lip_jax.labels`).
    """

    num: Float[jax.Array, "r"]
    den: Float[jax.Array, "r"]
    energy: Float[jax.Array, ""]
    ignored: Int[jax.Array, ""]


def merge(first: TailSums, second: TailSums) -> TailSums:
    """The sums over the rows of both: associative and commutative up to rounding."""
    return jax.tree.map(jnp.add, first, second)


@jax.custom_jvp
def _project_used(feats: jax.Array, used: jax.Array, u: jax.Array) -> jax.Array:
    # A NaN row is masked after the product: masking the features would copy them.
    return jnp.where(used[:, None], _linalg.matmul(feats, u), 0)


@_project_used.defjvp
def _project_used_jvp(primals, tangents):
    # The cotangent of u is featsᵀ times that of the product, and NaN · 0 = NaN: here the rows are masked.
    feats, used, u = primals
    dfeats, _, du = tangents
    used_feats = jnp.where(used[:, None], feats, 0)
    tangent = _project_used(dfeats, used, u) + _linalg.matmul(used_feats, du)
    return _project_used(feats, used, u), tangent


@partial(jax.jit, static_argnames=("start",))
def tail_sums(
    u: jax.Array,
    vt: jax.Array,
    feats: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None,
    bias: jax.Array | None,
    *,
    start: int = 0,
) -> TailSums:
    """One pass over the rows; components before `start` are not computed and read 0."""
    rows = _project(u[:, start:], vt[start:], feats, labels, weights)
    along_v = rows.along_v
    if bias is not None:
        along_bias = _linalg.matmul(bias.astype(along_v.dtype), vt[start:].T.astype(along_v.dtype))
        along_v = along_v - along_bias[None, :]
    weighted = rows.weights[:, None] * rows.along_u
    return TailSums(
        num=jnp.pad(jnp.sum(weighted * along_v, axis=0), (start, 0)),
        den=jnp.pad(jnp.sum(weighted * rows.along_u, axis=0), (start, 0)),
        energy=rows.energy,
        ignored=rows.ignored,
    )


def centred_tail_sums(
    u: jax.Array, vt: jax.Array, feats: jax.Array, labels: jax.Array, weights: jax.Array | None
) -> tuple[TailSums, jax.Array]:
    """The sums about the weighted means of features and targets, and the mean of `x·u_i`, `(r,)`.

    Deviations are taken before squaring: `Σ x² − (Σ x)²/n` loses what it is after at a large mean.
    """
    rows = _project(u, vt, feats, labels, weights)
    total = jnp.sum(rows.weights)
    share = (rows.weights / jnp.where(total > 0, total, 1))[:, None]
    mean_u = jnp.sum(share * rows.along_u, axis=0)
    off_u = rows.along_u - mean_u[None, :]
    off_v = rows.along_v - jnp.sum(share * rows.along_v, axis=0)[None, :]
    weighted = rows.weights[:, None] * off_u
    sums = TailSums(
        num=jnp.sum(weighted * off_v, axis=0),
        den=jnp.sum(weighted * off_u, axis=0),
        energy=rows.energy,
        ignored=rows.ignored,
    )
    return sums, mean_u


class _Projected(NamedTuple):
    """The rows along the components: `x·u_i` and `y·v_i`, `(n, r)`, 0 where a row is not used."""

    along_u: jax.Array
    along_v: jax.Array
    weights: jax.Array
    energy: jax.Array
    ignored: jax.Array


def _project(u, vt, feats, labels, weights) -> _Projected:
    dtype = _linalg.compute_dtype(u, feats)
    l = vt.shape[1]
    feats, u, v = feats.astype(dtype), u.astype(dtype), vt.T.astype(dtype)
    row_energy = jnp.sum(feats**2, axis=1)
    use = row_use(row_energy, labels, weights, l)
    used = use.weights > 0
    if labels.ndim == 1:
        along_v = v[jnp.clip(labels, 0, l - 1)]
    else:
        along_v = _linalg.matmul(jnp.where(used[:, None], labels.astype(dtype), 0), v)
    return _Projected(
        along_u=_project_used(feats, used, u),
        along_v=along_v,
        weights=use.weights,
        energy=jnp.sum(jnp.where(used, use.weights * row_energy, 0)),
        ignored=use.ignored,
    )


def rows_used(weights: jax.Array | None) -> jax.Array | None:
    """Up to which row there are weights above 0, for `fold_rows` to stop there."""
    if weights is None:
        return None
    place = jnp.arange(1, weights.shape[0] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(weights > 0, place, 0), initial=0)


def fold_rows(
    step: Callable, carry: Any, rows: Any, size: int | None = None, *, stop: jax.Array | None = None
) -> tuple[Any, Any]:
    """`carry, out = step(carry, chunk, fresh)` over all rows, `size` at a time; the outs are joined.

    The last chunk reaches back so that it is full, which spares a padded copy of the rows: `fresh` marks
    the rows not seen before, and only they may enter the carry. Chunks from row `stop` on are left out, and
    their out reads 0: rows in order of use cost nothing where they count for nothing.
    """
    size = CHUNK_ROWS if size is None else size
    n = jax.tree.leaves(rows)[0].shape[0]
    if n <= size:
        return step(carry, rows, jnp.ones(n, bool))
    offsets = jnp.arange(size, dtype=jnp.int32)
    chunk = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), rows)
    _, out = jax.eval_shape(step, carry, chunk, jax.ShapeDtypeStruct((size,), bool))

    def visit(carry, chunk, fresh, first):
        if stop is None:
            return step(carry, chunk, fresh)
        skip = lambda: (carry, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out))  # noqa: E731
        return jax.lax.cond(first < stop, lambda: step(carry, chunk, fresh), skip)

    joined = jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape[1:]), leaf.dtype), out)

    def body(state, i):
        carry, joined = state
        start = jnp.minimum(i * size, n - size)
        chunk = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), rows)
        carry, out = visit(carry, chunk, start + offsets >= i * size, i * size)
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)  # noqa: E731
        return (carry, jax.tree.map(put, joined, out)), None

    state, _ = jax.lax.scan(body, (carry, joined), jnp.arange(-(-n // size), dtype=jnp.int32))
    return state
