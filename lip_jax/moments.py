"""The sums a refit needs. They are additive over samples, so any split of the rows gives the same answer.

For a given split `U, V`: `num_i = Σ_n w_n (x_n·u_i)(y_n·v_i)` and `den_i = Σ_n w_n (x_n·u_i)²`. Rows are
projected in chunks that stay in the cache, and never all of them are held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lip_jax import _linalg
from lip_jax.labels import LabelUse, Rows, RowUse, label_use, row_use

# Rows in flight at once: enough for the matrix products to run at full speed, few enough for the cache.
CHUNK_ROWS = 1024
TAIL_CHUNK_ROWS = 2048
# Of rows in low precision, which are cast chunk by chunk.
CAST_CHUNK_ROWS = 512
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


class _Split(NamedTuple):
    """`u` with the probes as further columns, and `v`, in the dtype of the sums."""

    u: jax.Array
    v: jax.Array


class _Shift(NamedTuple):
    """What projected rows are measured from: `(r + probes,)`, 0 for probes, and `(r,)`; or from 0."""

    u: jax.Array | None = None
    v: jax.Array | None = None


class _Sums(NamedTuple):
    """`Σ w ab`, `Σ w a²` (probes too) of shifted projections; `Σ w a` and `Σ w b` where `a` is shifted."""

    products: jax.Array
    squares: jax.Array
    of_u: jax.Array
    of_v: jax.Array
    total: jax.Array
    ignored: jax.Array


def _split(u, vt, feats) -> _Split:
    dtype = _linalg.compute_dtype(u, feats)
    probes = jnp.asarray(_probes(*u.shape).T, dtype)
    return _Split(jnp.concatenate([u.astype(dtype), probes], axis=1), vt.T.astype(dtype))


def _add_up(split: _Split, shift: _Shift, along_u, along_v, use: RowUse, fresh) -> _Sums:
    weights = jnp.where(fresh, use.weights, 0)[:, None]
    r = split.v.shape[1]
    off_v = along_v if shift.v is None else along_v - shift.v[None, :]
    off_u = along_u if shift.u is None else along_u - shift.u[None, :]
    weighted = weights * off_u
    of_u = of_v = jnp.zeros(0, off_u.dtype)
    if shift.u is not None:
        of_u, of_v = jnp.sum(weighted[:, :r], axis=0), jnp.sum(weights * off_v, axis=0)
    return _Sums(
        products=jnp.sum(weighted[:, :r] * off_v, axis=0),
        squares=jnp.sum(weighted * off_u, axis=0),
        of_u=of_u,
        of_v=of_v,
        total=jnp.sum(weights),
        ignored=jnp.sum(use.bad & fresh, dtype=jnp.int32),
    )


def _sums_of_any(split: _Split, shift: _Shift, rows: Rows, fresh) -> _Sums:
    """The sums over rows of which some cannot be used."""
    feats, labels, weights = rows
    (u, v), l = split, split.v.shape[0]
    feats = feats.astype(u.dtype)
    use = row_use(jnp.sum(feats**2, axis=1), label_use(labels, l), weights)
    used = use.weights > 0
    along_u = _project_used(feats, used, u)
    if labels.ndim == 1:
        along_v = v[jnp.clip(labels, 0, l - 1)]
    else:
        along_v = _linalg.matmul(jnp.where(used[:, None], labels.astype(v.dtype), 0), v)
    return _add_up(split, shift, along_u, along_v, use, fresh)


@jax.custom_jvp
def _sums_of(split: _Split, shift: _Shift, rows: Rows, fresh) -> _Sums:
    """The sums over rows, in the hope that all are finite: if not, that shows in the sums."""
    feats, labels, weights = rows
    (u, v), l = split, split.v.shape[0]
    if not v.shape[1]:
        # Without components there is nothing for it to show in.
        return _sums_of_any(split, shift, rows, fresh)
    along_u = _linalg.matmul(feats.astype(u.dtype), u)
    if labels.ndim == 1:
        along_v, labelled = v[jnp.clip(labels, 0, l - 1)], label_use(labels, l)
    else:
        everywhere = jnp.zeros(labels.shape[0], bool)
        along_v, labelled = _linalg.matmul(labels.astype(v.dtype), v), LabelUse(everywhere, everywhere)
    use = row_use(jnp.zeros(feats.shape[0], u.dtype), labelled, weights)
    sums = _add_up(split, shift, along_u, along_v, use, fresh)
    finite = jnp.isfinite(jnp.sum(sums.squares) + jnp.sum(sums.products))
    return jax.lax.cond(finite, lambda: sums, lambda: _sums_of_any(split, shift, rows, fresh))


@_sums_of.defjvp
def _sums_of_jvp(primals, tangents):
    # 0 · NaN: a derivative cannot pass through sums that were given up.
    return jax.jvp(_sums_of_any, primals, tangents)


def _chunk_rows(feats, split: _Split) -> int:
    """How many rows to project at once.

    A chunk is a copy of its rows, which is dearer than what it saves where they are projected on few
    columns. Where there are several devices, rows may be spread over them and a loop over chunks would
    gather them: there, too, all are taken at once, and each device projects its own.
    """
    n, q = feats.shape
    cast = feats.dtype != split.u.dtype
    skinny = 16 * split.u.shape[1] <= q and not cast
    if skinny or jax.device_count() > 1:
        return n
    if jax.default_backend() != "cpu":
        return ACCELERATOR_CHUNK_ROWS
    return CAST_CHUNK_ROWS if cast else TAIL_CHUNK_ROWS


def _pass(split: _Split, shift: _Shift, rows: Rows) -> _Sums:
    """The sums over all rows."""

    def add(sums, rows, fresh):
        return jax.tree.map(jnp.add, sums, _sums_of(split, shift, rows, fresh)), None

    (_, columns), (_, r) = split.u.shape, split.v.shape
    zeros = partial(jnp.zeros, dtype=split.u.dtype)
    of = zeros(0 if shift.u is None else r)
    empty = _Sums(zeros(r), zeros(columns), of, of, zeros(()), jnp.zeros((), jnp.int32))
    sums, _ = fold_rows(add, empty, rows, _chunk_rows(rows.feats, split))
    return sums


def _tail(products, squares, ignored, start: int = 0) -> TailSums:
    r = products.shape[0]
    pad = lambda part: jnp.pad(part, (start, 0))  # noqa: E731
    return TailSums(num=pad(products), den=pad(squares[:r]), energy=jnp.mean(squares[r:]), ignored=ignored)


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
    sums = _pass(split, _Shift(v=along_bias), Rows(feats, labels, weights))
    return _tail(sums.products, sums.squares, sums.ignored, start)


def centred_tail_sums(
    u: jax.Array, vt: jax.Array, feats: jax.Array, labels: jax.Array, weights: jax.Array | None
) -> tuple[TailSums, jax.Array]:
    """The sums about the weighted means of features and targets, and the mean of `x·u_i`, `(r,)`.

    `Σ w (a − s)² − (Σ w (a − s))²/Σ w`, with `s` the mean of a few rows: deviations are taken before
    squaring, as `Σ a² − (Σ a)²/n` loses what it is after at a large mean.
    """
    split = _split(u, vt, feats)
    rows = Rows(feats, labels, weights)
    (n, _), (_, columns), (_, r) = feats.shape, split.u.shape, split.v.shape
    from_zero = jnp.zeros(columns, split.u.dtype), jnp.zeros(r, split.v.dtype)
    few = jnp.arange(min(n, SHIFT_ROWS), dtype=jnp.int32) * max(n // SHIFT_ROWS, 1)
    some = jax.tree.map(lambda part: part[few], rows)
    seen = _sums_of(split, _Shift(*from_zero), some, jnp.ones(few.shape, bool))
    share = _inverse(seen.total)
    shift_u = share * seen.of_u
    shift = _Shift(jnp.pad(shift_u, (0, columns - r)), share * seen.of_v)

    sums = _pass(split, shift, rows)
    share = _inverse(sums.total)
    products = sums.products - share * sums.of_u * sums.of_v
    squares = jnp.maximum(sums.squares - jnp.pad(share * sums.of_u**2, (0, columns - r)), 0)
    mean_u = jnp.where(sums.total > 0, shift_u + share * sums.of_u, 0)
    return _tail(products, squares, sums.ignored), mean_u


def _inverse(total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)


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
    n = jax.tree.leaves(rows)[0].shape[0]
    steps = -(-n // (CHUNK_ROWS if size is None else size)) if n else 0
    if steps <= 1:
        return step(carry, rows, jnp.ones(n, bool))
    # Chunks of equal length overlap least.
    length = -(-n // steps)
    offsets = jnp.arange(length, dtype=jnp.int32)
    chunk = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype), rows)
    _, out = jax.eval_shape(step, carry, chunk, jax.ShapeDtypeStruct((length,), bool))

    def visit(carry, chunk, fresh, first):
        if stop is None:
            return step(carry, chunk, fresh)
        skip = lambda: (carry, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out))  # noqa: E731
        return jax.lax.cond(first < stop, lambda: step(carry, chunk, fresh), skip)

    joined = jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape[1:]), leaf.dtype), out)

    def body(state, i):
        carry, joined = state
        start = jnp.minimum(i * length, n - length)
        chunk = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, length), rows)
        carry, out = visit(carry, chunk, start + offsets >= i * length, i * length)
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)  # noqa: E731
        return (carry, jax.tree.map(put, joined, out)), None

    state, _ = jax.lax.scan(body, (carry, joined), jnp.arange(steps, dtype=jnp.int32))
    return state
