"""The sums a refit needs. They are additive over samples, so any split of the rows gives the same answer.

For a given split `U, V`: `num_i = Σ_n w_n (x_n·u_i)(y_n·v_i)` and `den_i = Σ_n w_n (x_n·u_i)²`. Rows are
projected in chunks that stay in the cache, and never all of them are held.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lip_jax import _linalg
from lip_jax.labels import Rows, row_use

# Rows in flight at once: enough for the matrix products to run at full speed, few enough for the cache.
CHUNK_ROWS = 1024
TAIL_CHUNK_ROWS = 2048
# Accelerators want more work at a time.
ACCELERATOR_CHUNK_ROWS = 2**16

# Random directions beside the components: they show how large rows are, and which cannot be used.
PROBES = 4
# On how many rows, spread over all, the shift of centred sums is taken.
SHIFT_ROWS = 256


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
        energy: `Σ w ‖x‖²` within a small factor, as a few random directions tell it that are the same for
            all rows: the scale against which `den` counts as empty.
        ignored: How many rows could not be used (see `lip_jax.labels`).
    """

    num: Float[jax.Array, "r"]
    den: Float[jax.Array, "r"]
    energy: Float[jax.Array, ""]
    ignored: Int[jax.Array, ""]


def merge(first: TailSums, second: TailSums) -> TailSums:
    """The sums over the rows of both: associative and commutative up to rounding."""
    return jax.tree.map(jnp.add, first, second)


def _probes(q: int, components: int) -> np.ndarray:
    """Rows of signs, the same for each `q`: the mean square along them is `‖x‖²` on average."""
    count = PROBES
    # Few columns are multiplied fastest in multiples of 16.
    if components + PROBES <= 64:
        count += -(components + PROBES) % 16
    return np.random.default_rng(q).choice([-1, 1], (64, q))[:count]


@jax.custom_jvp
def _project_finite(feats: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`X U` with 0 for rows where it, or its square, is not finite; and where it is."""
    # A NaN row is masked after the product: masking the features would copy them.
    along = _linalg.matmul(feats, u)
    finite = jnp.isfinite(jnp.sum(along**2, axis=1))
    return jnp.where(finite[:, None], along, 0), finite


@_project_finite.defjvp
def _project_finite_jvp(primals, tangents):
    # The cotangent of u is featsᵀ times that of the product, and NaN · 0 = NaN: here the rows are masked.
    (feats, u), (dfeats, du) = primals, tangents
    along, finite = _project_finite(feats, u)
    from_feats = jnp.where(finite[:, None], _linalg.matmul(dfeats, u), 0)
    from_u = _linalg.matmul(jnp.where(finite[:, None], feats, 0), du)
    return (along, finite), (from_feats + from_u, np.zeros(finite.shape, jax.dtypes.float0))


class _Split(NamedTuple):
    """`u` with the probes as further columns, and `v`, in the dtype of the sums."""

    u: jax.Array
    v: jax.Array


class _Projected(NamedTuple):
    """Rows along the components: `x·u_i` and `y·v_i`, `(n, r)`, 0 where a row is not used."""

    along_u: jax.Array
    along_v: jax.Array
    weights: jax.Array
    energy: jax.Array
    ignored: jax.Array


def _split(u, vt, feats) -> _Split:
    dtype = _linalg.compute_dtype(u, feats)
    probes = jnp.asarray(_probes(*u.shape).T, dtype)
    return _Split(jnp.concatenate([u.astype(dtype), probes], axis=1), vt.T.astype(dtype))


def _project(split: _Split, rows: Rows, fresh) -> _Projected:
    feats, labels, weights = rows
    dtype, (l, r) = split.v.dtype, split.v.shape
    along, finite = _project_finite(feats.astype(dtype), split.u)
    use = row_use(jnp.where(finite, jnp.zeros((), dtype), jnp.nan), labels, weights, l)
    counted = jnp.where(fresh, use.weights, 0)
    # What a row without weight holds may be too large to be squared.
    along = jnp.where(counted[:, None] > 0, along, 0)
    if labels.ndim == 1:
        along_v = split.v[jnp.clip(labels, 0, l - 1)]
    else:
        along_v = _linalg.matmul(jnp.where(counted[:, None] > 0, labels.astype(dtype), 0), split.v)
    energy = jnp.sum(counted * jnp.mean(along[:, r:] ** 2, axis=1))
    return _Projected(along[:, :r], along_v, counted, energy, jnp.sum(use.bad & fresh, dtype=jnp.int32))


def _chunk_rows(feats, split: _Split) -> int:
    """How many rows to project at once.

    A chunk is a copy of its rows, which is dearer than what it saves where they are projected on few
    columns. Where there are several devices, rows may be spread over them and a loop over chunks would
    gather them: there, too, all are taken at once, and each device projects its own.
    """
    n, q = feats.shape
    skinny = 8 * split.u.shape[1] <= q and feats.dtype == split.u.dtype
    if skinny or jax.device_count() > 1:
        return n
    return TAIL_CHUNK_ROWS if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK_ROWS


def _no_sums(split: _Split) -> TailSums:
    dtype, r = split.v.dtype, split.v.shape[1]
    none, zero = jnp.zeros(r, dtype), jnp.zeros((), dtype)
    return TailSums(num=none, den=none, energy=zero, ignored=jnp.zeros((), jnp.int32))


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
    split = _split(u[:, start:], vt[start:], feats)
    along_bias = None if bias is None else _linalg.matmul(bias.astype(split.v.dtype), split.v)

    def add(sums, rows, fresh):
        row = _project(split, rows, fresh)
        along_v = row.along_v if along_bias is None else row.along_v - along_bias[None, :]
        weighted = row.weights[:, None] * row.along_u
        added = TailSums(
            num=jnp.sum(weighted * along_v, axis=0),
            den=jnp.sum(weighted * row.along_u, axis=0),
            energy=row.energy,
            ignored=row.ignored,
        )
        return merge(sums, added), None

    rows = Rows(feats, labels, weights)
    sums, _ = fold_rows(add, _no_sums(split), rows, _chunk_rows(feats, split))
    return replace(sums, num=jnp.pad(sums.num, (start, 0)), den=jnp.pad(sums.den, (start, 0)))


class _Centred(NamedTuple):
    """Sums about a shift `(s, t)`: what remains of the means is taken out at the end."""

    about: TailSums
    off_u: jax.Array
    off_v: jax.Array
    total: jax.Array


def centred_tail_sums(
    u: jax.Array, vt: jax.Array, feats: jax.Array, labels: jax.Array, weights: jax.Array | None
) -> tuple[TailSums, jax.Array]:
    """The sums about the weighted means of features and targets, and the mean of `x·u_i`, `(r,)`.

    `Σ w (a − s)² − (Σ w (a − s))²/Σ w`, with `s` the mean of a few rows: deviations are taken before
    squaring, as `Σ a² − (Σ a)²/n` loses what it is after at a large mean.
    """
    split = _split(u, vt, feats)
    rows = Rows(feats, labels, weights)
    n = feats.shape[0]
    few = jnp.arange(min(n, SHIFT_ROWS), dtype=jnp.int32) * max(n // SHIFT_ROWS, 1)
    seen = _project(split, jax.tree.map(lambda part: part[few], rows), jnp.asarray(True))
    shift_u, shift_v = (_mean(part, seen.weights) for part in (seen.along_u, seen.along_v))

    def add(sums, rows, fresh):
        row = _project(split, rows, fresh)
        off_u, off_v = row.along_u - shift_u[None, :], row.along_v - shift_v[None, :]
        weighted = row.weights[:, None] * off_u
        about = TailSums(
            num=jnp.sum(weighted * off_v, axis=0),
            den=jnp.sum(weighted * off_u, axis=0),
            energy=row.energy,
            ignored=row.ignored,
        )
        off_v = jnp.sum(row.weights[:, None] * off_v, axis=0)
        added = _Centred(about, jnp.sum(weighted, axis=0), off_v, jnp.sum(row.weights))
        return jax.tree.map(jnp.add, sums, added), None

    none = jnp.zeros_like(shift_u)
    empty = _Centred(_no_sums(split), none, none, jnp.zeros((), none.dtype))
    sums, _ = fold_rows(add, empty, rows, _chunk_rows(feats, split))
    share = jnp.where(sums.total > 0, 1 / jnp.where(sums.total > 0, sums.total, 1), 0)
    centred = replace(
        sums.about,
        num=sums.about.num - share * sums.off_u * sums.off_v,
        den=jnp.maximum(sums.about.den - share * sums.off_u**2, 0),
    )
    return centred, jnp.where(sums.total > 0, shift_u + share * sums.off_u, 0)


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    total = jnp.sum(weights)
    return jnp.sum((weights / jnp.where(total > 0, total, 1))[:, None] * values, axis=0)


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
    steps = -(-n // size)
    # Chunks of equal size overlap least.
    size = -(-n // steps)
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

    state, _ = jax.lax.scan(body, (carry, joined), jnp.arange(steps, dtype=jnp.int32))
    return state
