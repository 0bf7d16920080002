"""What rows say about the components of one split: `O(r)` sums, all that a refit needs.

For a given split `U, V`: `num_i = Σ_n w_n (x_n·u_i)(y_n·v_i)` and `den_i = Σ_n w_n (x_n·u_i)²`. They are
additive over samples, so any split of the rows gives the same answer. Rows are projected in chunks that stay
in the cache, and never all of them are held.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lip_jax._results import ShortRepr
from lip_jax.numerics import compensated, linalg
from lip_jax.numerics.chunks import fold_rows
from lip_jax.rows.labels import LabelUse, Rows, RowUse, label_use, row_use, spread_over, usable_bias
from lip_jax.sums import additive
from lip_jax.sums.additive import Additive

# Rows projected at once: few enough for their projections to stay in the cache, and of long rows fewer, so
# that a chunk has no more entries than the second says.
CHUNK_ROWS = 2048

CHUNK_ENTRIES = 2**21

# Accelerators want more work at a time.
ACCELERATOR_CHUNK_ROWS = 2**16

# Random directions beside the components: they show how large rows are, and which cannot be used.
PROBES = 4

# On how many rows, spread over all, origins are taken.
ORIGIN_ROWS = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class TailSums(ShortRepr):
    """What all rows say about every component of one split.

    Attributes:
        num: `Σ w (x·u_i)((y − b)·v_i)`, `(r,)`.
        den: `Σ w (x·u_i)²`, `(r,)`.
        energy: `Σ w ‖x‖²` within a small factor, as a few random directions tell it that are the same for
            all rows: the scale against which `den` counts as empty.
        ignored: How many rows could not be used (see `lip_jax.rows`).
    """

    num: Float[jax.Array, "r"]
    den: Float[jax.Array, "r"]
    energy: Float[jax.Array, ""]
    ignored: Int[jax.Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class TailMoments(Additive, ShortRepr):
    """First and second moments of rows along every component of one split.

    With `a = Uᵀx − origin_u` and `c = Vᵀy − origin_v`. The origins are near the means of the first rows that
    came, so that no digits are lost where means are large against deviations.

    Attributes:
        total: `Σ w`.
        energy: `Σ w ‖x‖²` within a small factor: the scale against which a direction counts as empty.
        sum_u: `Σ w a`, `(r,)`.
        sum_v: `Σ w c`, `(r,)`.
        products: `Σ w a c`, `(r,)`.
        squares: `Σ w a²`, `(r,)`.
        origin_u: `(r,)`.
        origin_v: `(r,)`.
        ignored: How many rows could not be used (see `lip_jax.rows`).
        compensation: What rounding took from the six sums, in their order.
    """

    total: Float[jax.Array, ""]
    energy: Float[jax.Array, ""]
    sum_u: Float[jax.Array, "r"]
    sum_v: Float[jax.Array, "r"]
    products: Float[jax.Array, "r"]
    squares: Float[jax.Array, "r"]
    origin_u: Float[jax.Array, "r"]
    origin_v: Float[jax.Array, "r"]
    ignored: Int[jax.Array, ""]
    compensation: tuple[Float[jax.Array, "..."], ...]


def _probes(q: int, components: int) -> np.ndarray:
    """Rows of signs, the same for each `q`: the mean square along them is `‖x‖²` on average."""
    count = PROBES
    # 16 columns, or a multiple of 32, are multiplied no slower than a few less.
    columns = components + PROBES
    if columns <= 16:
        count += 16 - columns
    elif columns > 32 and columns % 32 > 16:
        count += -columns % 32
    return np.random.default_rng(q).choice([-1, 1], (64, q))[:count]


@jax.custom_jvp
def _project_used(feats: jax.Array, used: jax.Array, u: jax.Array) -> jax.Array:
    # A NaN row is masked after the product: masking the features would copy them.
    return jnp.where(used[:, None], linalg.matmul(feats, u), 0)


@_project_used.defjvp
def _project_used_jvp(primals, tangents):
    # The cotangent of u is featsᵀ times that of the product, and NaN · 0 = NaN: here the rows are masked.
    feats, used, u = primals
    dfeats, _, du = tangents
    used_feats = jnp.where(used[:, None], feats, 0)
    tangent = _project_used(dfeats, used, u) + linalg.matmul(used_feats, du)
    return _project_used(feats, used, u), tangent


class _Split(NamedTuple):
    """`u` with the probes as further columns and `v` with columns of 0 for them, in the dtype of the sums."""

    u: jax.Array
    v: jax.Array


class _Shift(NamedTuple):
    """What projected rows are measured from, 0 for probes, and what targets are before that; or from 0."""

    u: jax.Array | None = None
    v: jax.Array | None = None
    targets: jax.Array | None = None


class _Sums(NamedTuple):
    """Sums over rows of shifted projections `a` and `b`, probes among them.

    `columns` are `Σ w a²`, where `a` is shifted `Σ w a`, and `Σ w ab`: in one array, as a loop over chunks
    pays for each that it carries. Where `a` is shifted, `Σ w b` is made of `of_v` at the end: of `Σ w y`, or
    of `Σ w` by class (see `_counts_classes`). What is known of all rows beforehand is None within the loop.
    """

    columns: jax.Array
    of_v: jax.Array
    total: Any
    ignored: Any


class _Projected(NamedTuple):
    """`Σ w ab`, `Σ w a²`, `Σ w a` and `Σ w b`; the last two read 0 where `a` is not shifted."""

    products: jax.Array
    squares: jax.Array
    of_u: jax.Array
    of_v: jax.Array


def _split(u, vt, dtype) -> _Split:
    probes = jnp.asarray(_probes(*u.shape).T, dtype)
    # Made once: without the barrier XLA's CPU transposes again as it gathers rows.
    v = jax.lax.optimization_barrier(jnp.pad(vt.T.astype(dtype), [(0, 0), (0, probes.shape[1])]))
    return _Split(jnp.concatenate([u.astype(dtype), probes], axis=1), v)


def _along_probes_too(along: jax.Array, split: _Split) -> jax.Array:
    return jnp.pad(along, (0, split.v.shape[1] - along.shape[0]))


def _counts_classes(shift: _Shift, labels, l: int) -> bool:
    """Whether `Σ w b` is made of the weight of each class once all rows are seen.

    That spares a pass over `y·v_i`, on one CPU a twentieth of the time. Of more classes than a chunk has rows
    the counts would be dearer, and over several devices rows would be gathered for them.
    """
    on_one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return shift.u is not None and labels.ndim == 1 and l <= CHUNK_ROWS and on_one_cpu


def _column_sums(*terms: jax.Array) -> jax.Array:
    """The sums over the rows, one term after the other; on the CPU a chunk is fastest stacked first."""
    if jax.default_backend() == "cpu" and terms[0].shape[0] <= CHUNK_ROWS:
        return jnp.sum(jnp.stack(terms), axis=1)
    return jnp.stack([jnp.sum(term, axis=0) for term in terms])


def _add_up(split: _Split, shift: _Shift, along_u, labels, weights, total=None, ignored=None) -> _Sums:
    """The sums over usable rows, projected on `u`."""
    v, of_v = split.v, jnp.zeros(0, weights.dtype)
    off_u = along_u if shift.u is None else along_u - shift.u[None, :]
    weighted = weights[:, None] * off_u
    terms = [weighted * off_u]
    if shift.u is not None:
        terms.append(weighted)
    if labels.ndim == 2:
        targets = labels.astype(v.dtype)
        targets = targets if shift.targets is None else targets - shift.targets[None, :]
        # By itself XLA's CPU sums it as it multiplies, in less time than the product alone would take.
        products = jnp.sum(weighted * linalg.matmul(targets, v), axis=0)
        columns = jnp.concatenate([_column_sums(*terms), products[None]])
        of_v = of_v if shift.u is None else linalg.matmul(weights, targets)
        return _Sums(columns, of_v, total, ignored)
    l = v.shape[0]
    ids = jnp.clip(labels, 0, l - 1)
    off_v = v[ids] if shift.v is None else v[ids] - shift.v[None, :]
    columns = _column_sums(*terms, weighted * off_v)
    if _counts_classes(shift, labels, l):
        of_v = jnp.zeros(l, weights.dtype).at[ids].add(weights)
    elif shift.u is not None:
        of_v = linalg.matmul(weights, off_v)
    return _Sums(columns, of_v, total, ignored)


def _projected(split: _Split, shift: _Shift, labels, sums: _Sums) -> _Projected:
    """What the sums say along the components."""
    v, squares, products = split.v, sums.columns[0], sums.columns[-1]
    of_u, of_v = (jnp.zeros_like(squares),) * 2 if shift.u is None else (sums.columns[1], sums.of_v)
    if labels.ndim == 1:
        if _counts_classes(shift, labels, v.shape[0]):
            of_v = linalg.matmul(of_v, v if shift.v is None else v - shift.v[None, :])
    else:
        if shift.u is not None:
            of_v = linalg.matmul(of_v, v)
        if shift.targets is not None and shift.v is not None:
            # They were shifted whole, which along a component is right but for rounding.
            rest = shift.v - linalg.matmul(shift.targets, v)
            products, of_v = products - rest * of_u, of_v - rest * sums.total
    return _Projected(products, squares, of_u, of_v)


def _sums_of_any(split: _Split, shift: _Shift, rows: Rows, fresh) -> _Sums:
    """The sums over rows of which some cannot be used."""
    feats, labels, weights = rows
    feats = feats.astype(split.u.dtype)
    use = row_use(jnp.sum(feats**2, axis=1), label_use(labels, split.v.shape[0]), weights)
    used = use.weights > 0
    along_u = _project_used(feats, used, split.u)
    if labels.ndim == 2:
        labels = jnp.where(used[:, None], labels, 0)
    weights = jnp.where(fresh, use.weights, 0)
    ignored = jnp.sum(use.bad & fresh, dtype=jnp.int32)
    return _add_up(split, shift, along_u, labels, weights, jnp.sum(weights), ignored)


def _use_of_finite(rows: Rows, l: int, dtype) -> RowUse:
    """Weights of rows whose features and targets are taken to be finite."""
    n = rows.labels.shape[0]
    nowhere = jnp.zeros(n, bool)
    labelled = label_use(rows.labels, l) if rows.labels.ndim == 1 else LabelUse(nowhere, nowhere)
    return row_use(jnp.zeros(n, dtype), labelled, rows.weights)


def _project(feats: jax.Array, u: jax.Array) -> jax.Array:
    """`feats u`, which the CPU multiplies a tenth faster 64 columns at a time where rows are long."""
    q, columns = u.shape
    feats = feats.astype(u.dtype)
    if jax.default_backend() != "cpu" or q < 1024 or not 64 < columns <= 256:
        return linalg.matmul(feats, u)
    blocks = [linalg.matmul(feats, u[:, start : start + 64]) for start in range(0, columns, 64)]
    return jnp.concatenate(blocks, axis=1)


def _sums_of_finite(split: _Split, shift: _Shift, rows: Rows, fresh) -> _Sums:
    """The sums over rows with the weights of `_use_of_finite`."""
    feats, labels, weights = rows
    return _add_up(split, shift, _project(feats, split.u), labels, jnp.where(fresh, weights, 0))


def _chunk_rows(feats, split: _Split) -> int:
    """How many rows to project at once.

    A chunk is a copy of its rows, which is dearer than what it saves where they are projected on few columns,
    or where what all rows are projected to is no larger than one chunk. Where there are several devices, rows
    may be spread over them and a loop over chunks would gather them: there all are taken at once, and each
    device projects its own.
    """
    (n, q), columns = feats.shape, split.u.shape[1]
    few = 16 * columns <= q or n * columns <= CHUNK_ROWS * (q + columns)
    if (few and feats.dtype == split.u.dtype) or jax.device_count() > 1:
        return n
    if jax.default_backend() != "cpu":
        return ACCELERATOR_CHUNK_ROWS
    return min(CHUNK_ROWS, max(CHUNK_ENTRIES // q, 1))


def _fold(split: _Split, shift: _Shift, rows: Rows, sums_of: Callable) -> tuple[_Sums, _Sums]:
    def step(carry, rows, fresh):
        sums, compensation = carry
        return compensated.add(sums, compensation, sums_of(split, shift, rows, fresh)), None

    n = rows.feats.shape[0]
    sums = jax.eval_shape(partial(sums_of, split, shift), rows, jax.ShapeDtypeStruct((n,), bool))
    empty = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), sums)
    carry = empty, compensated.no_compensation(empty)
    return fold_rows(step, carry, rows, _chunk_rows(rows.feats, split))[0]


def _sums_with_wide_targets(split: _Split, shift: _Shift, rows: Rows) -> tuple[_Sums, _Sums]:
    """The sums over finite rows, of which targets are not copied a chunk at a time."""
    step = lambda _, feats, fresh: (None, _project(feats, split.u))  # noqa: E731
    _, along_u = fold_rows(step, None, rows.feats, _chunk_rows(rows.feats, split))
    sums = _add_up(split, shift, along_u, rows.labels, rows.weights)
    return sums, compensated.no_compensation(sums)


@jax.custom_jvp
def _pass(split: _Split, shift: _Shift, rows: Rows) -> tuple[_Sums, _Sums]:
    """The sums over all rows, and what rounding took from them.

    Rows that cannot be used show in the sums, and only then are they looked for, in a second pass.
    """
    use = _use_of_finite(rows, split.v.shape[0], split.v.dtype)
    usable = Rows(rows.feats, rows.labels, use.weights)
    # What features are projected to is held for all rows where targets are wider by far.
    wide = rows.labels.ndim == 2 and 16 * split.u.shape[1] <= rows.labels.shape[1]
    if wide and rows.labels.dtype == split.v.dtype and shift.targets is None:
        sums, compensation = _sums_with_wide_targets(split, shift, usable)
    else:
        sums, compensation = _fold(split, shift, usable, _sums_of_finite)
    sums = sums._replace(total=jnp.sum(use.weights), ignored=use.ignored)
    compensation = compensation._replace(
        total=jnp.zeros_like(sums.total), ignored=jnp.zeros_like(use.ignored)
    )
    # Of the sum of all sums XLA would make a second pass over what they are sums of.
    finite = jnp.isfinite(sums.columns).all()
    return jax.lax.cond(finite, lambda: (sums, compensation), lambda: _sums_of_usable(split, shift, rows))


def _sums_of_usable(split: _Split, shift: _Shift, rows: Rows) -> tuple[_Sums, _Sums]:
    """The sums over the rows that can be used; none can where the sums of those overflow."""
    sums, compensation = _fold(split, shift, rows, _sums_of_any)
    finite = jnp.isfinite(sums.columns).all()
    sums, compensation = (
        jax.tree.map(lambda part: jnp.where(finite, part, 0), part) for part in (sums, compensation)
    )
    return sums._replace(ignored=jnp.where(finite, sums.ignored, rows.labels.shape[0])), compensation


@_pass.defjvp
def _pass_jvp(primals, tangents):
    # 0 · NaN: a derivative cannot pass through sums that were given up.
    return jax.jvp(_sums_of_usable, primals, tangents)


@jax.jit
def tail_sums(
    u: jax.Array,
    vt: jax.Array,
    feats: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None,
    bias: jax.Array | None,
) -> TailSums:
    """One pass over the rows."""
    split = _split(u, vt, linalg.compute_dtype(u, feats))
    bias = None if bias is None else usable_bias(bias, split.v.dtype)
    if labels.ndim == 2 or bias is None:
        shift = _Shift(targets=bias)
    else:
        shift = _Shift(v=linalg.matmul(bias, split.v))
    sums, _ = _pass(split, shift, Rows(feats, labels, weights))
    r = vt.shape[0]
    found = _projected(split, shift, labels, sums)
    return TailSums(found.products[:r], found.squares[:r], jnp.mean(found.squares[r:]), sums.ignored)


def centred_tail_sums(
    u: jax.Array, vt: jax.Array, feats: jax.Array, labels: jax.Array, weights: jax.Array | None
) -> tuple[TailSums, jax.Array]:
    """The sums about the weighted means of features and targets, and the mean of `x·u_i`, `(r,)`."""
    split = _split(u, vt, linalg.compute_dtype(u, feats))
    rows = Rows(feats, labels, weights)
    return centred(_moments_of(split, _origin(split, rows, vt.shape[0]), rows))


def no_rows(r: int, dtype: jnp.dtype) -> TailMoments:
    """The moments of no rows."""
    return additive.no_rows(TailMoments, ((), (), r, r, r, r), (r, r), dtype)


@partial(jax.jit, donate_argnums=0)
def updated(moments: TailMoments, u: jax.Array, vt: jax.Array, rows: Rows) -> TailMoments:
    """The moments with further rows, in the dtype they have."""
    split = _split(u, vt, moments.total.dtype)
    r = vt.shape[0]
    origin = jax.lax.cond(moments.total > 0, lambda: moments.origin, lambda: _origin(split, rows, r))
    return additive.added(moments, _moments_of(split, origin, rows))


def _origin(split: _Split, rows: Rows, r: int) -> tuple[jax.Array, jax.Array]:
    """The means of `x·u_i` and `y·v_i` over a few rows: somewhere near those of all."""
    few = spread_over(rows, split.v.shape[0], min(rows.feats.shape[0], ORIGIN_ROWS))
    # With their weights: what a row of weight 0 holds may be far from anything.
    some = jax.tree.map(lambda part: part[few], rows)
    zeros = jnp.zeros(split.u.shape[1], split.u.dtype)
    from_zero = _Shift(zeros, zeros)
    seen = _sums_of_any(split, from_zero, some, jnp.ones(few.shape, bool))
    share = linalg.reciprocal(seen.total, seen.total > 0)
    found = _projected(split, from_zero, some.labels, seen)
    return share * found.of_u[:r], share * found.of_v[:r]


def _moments_of(split: _Split, origin: tuple[jax.Array, jax.Array], rows: Rows) -> TailMoments:
    r = origin[0].shape[0]
    shift = _Shift(*(_along_probes_too(part, split) for part in origin))
    if rows.labels.ndim == 2:
        shift = shift._replace(targets=linalg.matmul(split.v[:, :r], origin[1]))
    sums, compensation = _pass(split, shift, rows)

    def ordered(part: _Sums) -> tuple[jax.Array, ...]:
        found = _projected(split, shift, rows.labels, part)
        held = (found.of_u, found.of_v, found.products, found.squares)
        return part.total, jnp.mean(found.squares[r:]), *(sums[:r] for sums in held)

    return additive.from_sums(TailMoments, ordered(sums), origin, sums.ignored, ordered(compensation))


def about(moments: TailMoments, origin_u: jax.Array, origin_v: jax.Array) -> TailMoments:
    """The same rows measured from elsewhere: `Σ w (a + d)(c + e)`, with `d`, `e` the ways back."""
    total, sum_u, sum_v = moments.total, moments.sum_u, moments.sum_v
    d, e = moments.origin_u - origin_u, moments.origin_v - origin_v
    return replace(
        moments,
        sum_u=sum_u + total * d,
        sum_v=sum_v + total * e,
        products=moments.products + d * sum_v + e * sum_u + total * d * e,
        squares=jnp.maximum(moments.squares + 2 * d * sum_u + total * d**2, 0),
        origin_u=origin_u,
        origin_v=origin_v,
    )


def uncentred(moments: TailMoments, along_bias: jax.Array | None) -> TailSums:
    """The sums a refit needs, with targets `Y − b` where `Vᵀb` is given."""
    zero = jnp.zeros_like(moments.origin_v)
    at = about(moments, jnp.zeros_like(moments.origin_u), zero if along_bias is None else along_bias)
    return TailSums(at.products, at.squares, at.energy, at.ignored)


def centred(moments: TailMoments) -> tuple[TailSums, jax.Array]:
    """The sums about the means of all rows, and the mean of `x·u_i`, `(r,)`."""
    share = linalg.reciprocal(moments.total, moments.total > 0)
    mean_u, mean_v = moments.origin_u + share * moments.sum_u, moments.origin_v + share * moments.sum_v
    at = about(moments, mean_u, mean_v)
    return TailSums(at.products, at.squares, at.energy, at.ignored), mean_u
