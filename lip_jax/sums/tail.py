"""The sums over rows along the components of one split: `O(r)` numbers, all that a refit needs.

For a given split `U, V`: `num_i = Σ_n w_n (x_n·u_i)(y_n·v_i)` and `den_i = Σ_n w_n (x_n·u_i)²`. They are
additive over rows. Rows are projected in chunks that stay in the cache.
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

# Rows of a chunk on the CPU: their projections stay in the cache.
CPU_CHUNK_ROWS = 2048

# Features of a chunk on the CPU: chunks of long rows have fewer rows.
CPU_CHUNK_ENTRIES = 2**21

# Rows of a chunk on accelerators, which need more work per step.
ACCELERATOR_CHUNK_ROWS = 2**16

# Random directions beside the components. They measure `‖x‖²`, and are NaN or infinite for unusable rows.
PROBES = 4

# Rows in the means that serve as origins, spread over all rows.
ORIGIN_ROWS = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class TailSums(ShortRepr):
    """The sums over rows along every component of one split.

    Attributes:
        num: `Σ w (x·u_i)((y − b)·v_i)`, `(r,)`.
        den: `Σ w (x·u_i)²`, `(r,)`.
        energy: `Σ w ‖x‖²` within a small factor, estimated from a few fixed random directions. It is the
            scale at which `den` counts as empty.
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

    With `a = Uᵀx − origin_u` and `c = Vᵀy − origin_v`. The origins are near the means of the first rows, so
    that no digits are lost where means are large against deviations.

    Attributes:
        total: `Σ w`.
        energy: `Σ w ‖x‖²` within a small factor: the scale at which a direction counts as empty.
        sum_u: `Σ w a`, `(r,)`.
        sum_v: `Σ w c`, `(r,)`.
        products: `Σ w a c`, `(r,)`.
        squares: `Σ w a²`, `(r,)`.
        origin_u: `(r,)`.
        origin_v: `(r,)`.
        ignored: How many rows could not be used (see `lip_jax.rows`).
        compensation: Rounding errors of the six sums, in their order.
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
    """Rows of random signs, fixed for each `q`. The expected mean square along them is `‖x‖²`."""
    count = PROBES
    # Products with 16 columns, or a multiple of 32, are no slower than with a few less.
    columns = components + PROBES
    if columns <= 16:
        count += 16 - columns
    elif columns > 32 and columns % 32 > 16:
        count += -columns % 32
    return np.random.default_rng(q).choice([-1, 1], (64, q))[:count]


@jax.custom_jvp
def _project_used(feats: jax.Array, used: jax.Array, u: jax.Array) -> jax.Array:
    # The product is masked, not the features, which would copy them.
    return jnp.where(used[:, None], linalg.matmul(feats, u), 0)


@_project_used.defjvp
def _project_used_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # The cotangent of u is featsᵀ times that of the product, and NaN · 0 = NaN: the features must be masked.
    feats, used, u = primals
    dfeats, _, du = tangents
    used_feats = jnp.where(used[:, None], feats, 0)
    tangent = _project_used(dfeats, used, u) + linalg.matmul(used_feats, du)
    return _project_used(feats, used, u), tangent


class _Split(NamedTuple):
    """`u` with the probes appended and `v` with zero columns for them, in the dtype of the sums."""

    u: jax.Array
    v: jax.Array


class _Shift(NamedTuple):
    """Origins of projections on `u` and `v`, 0 for probes, and of targets before projection; None for 0."""

    u: jax.Array | None = None
    v: jax.Array | None = None
    targets: jax.Array | None = None


class _Sums(NamedTuple):
    """Sums over rows of shifted projections `a` and `b`, probes included.

    `columns` stacks `Σ w a²`, `Σ w a` (only where `a` is shifted) and `Σ w ab`. A loop over chunks is faster
    with one array to carry than with three. Where `a` is shifted, `of_v` gives `Σ w b` at the end. It holds
    `Σ w y`, or `Σ w` by class (see `_counts_classes`). `total` and `ignored` are None in a loop over rows for
    which they are known beforehand.
    """

    columns: jax.Array
    of_v: jax.Array
    total: Any
    ignored: Any


class _Projected(NamedTuple):
    """`Σ w ab`, `Σ w a²`, `Σ w a` and `Σ w b`; the last two are 0 where `a` is not shifted."""

    products: jax.Array
    squares: jax.Array
    of_u: jax.Array
    of_v: jax.Array


def _split(u: jax.Array, vt: jax.Array, dtype: jnp.dtype) -> _Split:
    probes = jnp.asarray(_probes(*u.shape).T, dtype)
    # Without the barrier XLA:CPU fuses the transposition into every gather of rows.
    v = jax.lax.optimization_barrier(jnp.pad(vt.T.astype(dtype), [(0, 0), (0, probes.shape[1])]))
    return _Split(jnp.concatenate([u.astype(dtype), probes], axis=1), v)


def _with_probes(projection: jax.Array, split: _Split) -> jax.Array:
    return jnp.pad(projection, (0, split.v.shape[1] - projection.shape[0]))


def _counts_classes(shift: _Shift, labels: jax.Array, l: int) -> bool:
    """Whether `Σ w b` is computed from the weight of each class after the last chunk.

    That spares a pass over `y·v_i`, 5% of the time on one core. With more classes than a chunk has rows the
    counts would cost more.
    """
    return shift.u is not None and labels.ndim == 1 and l <= CPU_CHUNK_ROWS


def _column_sums(*terms: jax.Array) -> jax.Array:
    """The sums over the rows, one row for each term."""
    # On the CPU a small chunk is summed fastest if its terms are stacked first.
    if terms[0].shape[0] <= CPU_CHUNK_ROWS:
        return jnp.sum(jnp.stack(terms), axis=1)
    return jnp.stack([jnp.sum(term, axis=0) for term in terms])


def _add_up(
    split: _Split,
    shift: _Shift,
    along_u: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    total: jax.Array | None = None,
    ignored: jax.Array | None = None,
) -> _Sums:
    """The sums over usable rows, given their projections on `u`."""
    v, of_v = split.v, jnp.zeros(0, weights.dtype)
    off_u = along_u if shift.u is None else along_u - shift.u[None, :]
    weighted = weights[:, None] * off_u
    terms = [weighted * off_u]
    if shift.u is not None:
        terms.append(weighted)
    if labels.ndim == 2:
        targets = labels.astype(v.dtype)
        targets = targets if shift.targets is None else targets - shift.targets[None, :]
        # Not stacked: XLA:CPU fuses this sum with the product, which is faster than the product alone.
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


def _projected(split: _Split, shift: _Shift, labels: jax.Array, sums: _Sums) -> _Projected:
    """The sums along the components."""
    v, squares, products = split.v, sums.columns[0], sums.columns[-1]
    of_u, of_v = (jnp.zeros_like(squares),) * 2 if shift.u is None else (sums.columns[1], sums.of_v)
    if labels.ndim == 1:
        if _counts_classes(shift, labels, v.shape[0]):
            of_v = linalg.matmul(of_v, v if shift.v is None else v - shift.v[None, :])
    else:
        if shift.u is not None:
            of_v = linalg.matmul(of_v, v)
        if shift.targets is not None and shift.v is not None:
            # Targets were shifted before projection; what that misses of `shift.v` is rounding.
            rest = shift.v - linalg.matmul(shift.targets, v)
            products, of_v = products - rest * of_u, of_v - rest * sums.total
    return _Projected(products, squares, of_u, of_v)


def _sums_of_any(split: _Split, shift: _Shift, rows: Rows, fresh: jax.Array) -> _Sums:
    """The sums over rows of which some may be unusable."""
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


def _use_of_finite(rows: Rows, l: int, dtype: jnp.dtype) -> RowUse:
    """Weights of rows whose features and targets are assumed finite."""
    n = rows.labels.shape[0]
    nowhere = jnp.zeros(n, bool)
    labelled = label_use(rows.labels, l) if rows.labels.ndim == 1 else LabelUse(nowhere, nowhere)
    return row_use(jnp.zeros(n, dtype), labelled, rows.weights)


def _project(feats: jax.Array, u: jax.Array) -> jax.Array:
    """`feats u`. The CPU multiplies long rows a tenth faster in blocks of 64 columns."""
    q, columns = u.shape
    feats = feats.astype(u.dtype)
    if q < 1024 or not 64 < columns <= 256:
        return linalg.matmul(feats, u)

    def in_blocks(feats: jax.Array, u: jax.Array) -> jax.Array:
        blocks = [linalg.matmul(feats, u[:, start : start + 64]) for start in range(0, columns, 64)]
        return jnp.concatenate(blocks, axis=1)

    return jax.lax.platform_dependent(feats, u, cpu=in_blocks, default=linalg.matmul)


def _sums_of_finite(split: _Split, shift: _Shift, rows: Rows, fresh: jax.Array) -> _Sums:
    """The sums over rows with the weights of `_use_of_finite`."""
    feats, labels, weights = rows
    return _add_up(split, shift, _project(feats, split.u), labels, jnp.where(fresh, weights, 0))


def _fold_projected(step: Callable, carry: Any, rows: Any, feats: jax.Array, split: _Split) -> tuple:
    """`fold_rows` over rows that are projected, in chunks that suit the platform.

    A chunk is a copy of its rows. That costs more than it saves for few columns, or where the projections of
    all rows are no larger than one chunk.
    """
    (n, q), columns = feats.shape, split.u.shape[1]
    on_cpu = min(CPU_CHUNK_ROWS, max(CPU_CHUNK_ENTRIES // q, 1))
    few = 16 * columns <= q or n * columns <= CPU_CHUNK_ROWS * (q + columns)
    if n <= on_cpu or (few and feats.dtype == split.u.dtype):
        return fold_rows(step, carry, rows, n)
    return jax.lax.platform_dependent(
        cpu=lambda: fold_rows(step, carry, rows, on_cpu),
        default=lambda: fold_rows(step, carry, rows, ACCELERATOR_CHUNK_ROWS),
    )


def _fold(split: _Split, shift: _Shift, rows: Rows, sums_of: Callable) -> tuple[_Sums, _Sums]:
    def step(carry: tuple[_Sums, _Sums], rows: Rows, fresh: jax.Array) -> tuple:
        sums, compensation = carry
        return compensated.add(sums, compensation, sums_of(split, shift, rows, fresh)), None

    n = rows.feats.shape[0]
    sums = jax.eval_shape(partial(sums_of, split, shift), rows, jax.ShapeDtypeStruct((n,), bool))
    empty = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), sums)
    carry = empty, compensated.no_compensation(empty)
    return _fold_projected(step, carry, rows, rows.feats, split)[0]


def _sums_with_wide_targets(split: _Split, shift: _Shift, rows: Rows) -> tuple[_Sums, _Sums]:
    """The sums over finite rows, without copying chunks of the targets."""
    step = lambda _, feats, fresh: (None, _project(feats, split.u))  # noqa: E731
    _, along_u = _fold_projected(step, None, rows.feats, rows.feats, split)
    sums = _add_up(split, shift, along_u, rows.labels, rows.weights)
    return sums, compensated.no_compensation(sums)


@jax.custom_jvp
def _pass(split: _Split, shift: _Shift, rows: Rows) -> tuple[_Sums, _Sums]:
    """The sums over all rows, and their rounding errors.

    Unusable rows make the sums NaN or infinite. Only then does a second pass look for them.
    """
    use = _use_of_finite(rows, split.v.shape[0], split.v.dtype)
    usable = Rows(rows.feats, rows.labels, use.weights)
    # Where targets are far wider than projections, the latter are held for all rows.
    wide = rows.labels.ndim == 2 and 16 * split.u.shape[1] <= rows.labels.shape[1]
    if wide and rows.labels.dtype == split.v.dtype and shift.targets is None:
        sums, compensation = _sums_with_wide_targets(split, shift, usable)
    else:
        sums, compensation = _fold(split, shift, usable, _sums_of_finite)
    sums = sums._replace(total=jnp.sum(use.weights), ignored=use.ignored)
    compensation = compensation._replace(
        total=jnp.zeros_like(sums.total), ignored=jnp.zeros_like(use.ignored)
    )
    # Not of one sum of all: XLA would recompute it from the rows.
    finite = jnp.isfinite(sums.columns).all()
    return jax.lax.cond(finite, lambda: (sums, compensation), lambda: _sums_of_usable(split, shift, rows))


def _sums_of_usable(split: _Split, shift: _Shift, rows: Rows) -> tuple[_Sums, _Sums]:
    """The sums over the usable rows; no row is usable if these sums overflow."""
    sums, compensation = _fold(split, shift, rows, _sums_of_any)
    finite = jnp.isfinite(sums.columns).all()
    sums, compensation = (
        jax.tree.map(lambda part: jnp.where(finite, part, 0), part) for part in (sums, compensation)
    )
    return sums._replace(ignored=jnp.where(finite, sums.ignored, rows.labels.shape[0])), compensation


@_pass.defjvp
def _pass_jvp(primals: tuple, tangents: tuple) -> tuple:
    # NaN · 0 = NaN: a derivative cannot pass through the branch that was not taken.
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
    """The sums about the weighted means of features and targets, and the weighted mean of `x·u_i`, `(r,)`."""
    split = _split(u, vt, linalg.compute_dtype(u, feats))
    rows = Rows(feats, labels, weights)
    return centred(_moments_of(split, _origin(split, rows, vt.shape[0]), rows))


def no_rows(r: int, dtype: jnp.dtype) -> TailMoments:
    """The moments of no rows."""
    return additive.no_rows(TailMoments, ((), (), r, r, r, r), (r, r), dtype)


@partial(jax.jit, donate_argnums=0)
def updated(moments: TailMoments, u: jax.Array, vt: jax.Array, rows: Rows) -> TailMoments:
    """The moments with further rows, in their own dtype."""
    split = _split(u, vt, moments.total.dtype)
    r = vt.shape[0]
    origin = jax.lax.cond(moments.total > 0, lambda: moments.origin, lambda: _origin(split, rows, r))
    return additive.added(moments, _moments_of(split, origin, rows))


def _origin(split: _Split, rows: Rows, r: int) -> tuple[jax.Array, jax.Array]:
    """The means of `x·u_i` and `y·v_i` over a few rows, near those of all."""
    few = spread_over(rows, split.v.shape[0], min(rows.feats.shape[0], ORIGIN_ROWS))
    # Weighted: a row of weight 0 may hold anything.
    some = jax.tree.map(lambda part: part[few], rows)
    zeros = jnp.zeros(split.u.shape[1], split.u.dtype)
    from_zero = _Shift(zeros, zeros)
    seen = _sums_of_any(split, from_zero, some, jnp.ones(few.shape, bool))
    share = linalg.reciprocal(seen.total, seen.total > 0)
    found = _projected(split, from_zero, some.labels, seen)
    return share * found.of_u[:r], share * found.of_v[:r]


def _moments_of(split: _Split, origin: tuple[jax.Array, jax.Array], rows: Rows) -> TailMoments:
    r = origin[0].shape[0]
    shift = _Shift(*(_with_probes(part, split) for part in origin))
    if rows.labels.ndim == 2:
        shift = shift._replace(targets=linalg.matmul(split.v[:, :r], origin[1]))
    sums, compensation = _pass(split, shift, rows)

    def ordered(part: _Sums) -> tuple[jax.Array, ...]:
        found = _projected(split, shift, rows.labels, part)
        held = (found.of_u, found.of_v, found.products, found.squares)
        return part.total, jnp.mean(found.squares[r:]), *(sums[:r] for sums in held)

    return additive.from_sums(TailMoments, ordered(sums), origin, sums.ignored, ordered(compensation))


def about(moments: TailMoments, origin_u: jax.Array, origin_v: jax.Array) -> TailMoments:
    """The moments about other origins: `Σ w (a + d)(c + e)`, with `d`, `e` the shifts of the origins."""
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
    """The sums for a refit, with targets `Y − b` where `Vᵀb` is given."""
    zero = jnp.zeros_like(moments.origin_v)
    at = about(moments, jnp.zeros_like(moments.origin_u), zero if along_bias is None else along_bias)
    return TailSums(at.products, at.squares, at.energy, at.ignored)


def centred(moments: TailMoments) -> tuple[TailSums, jax.Array]:
    """The sums about the means of all rows, and the mean of `x·u_i`, `(r,)`."""
    share = linalg.reciprocal(moments.total, moments.total > 0)
    mean_u, mean_v = moments.origin_u + share * moments.sum_u, moments.origin_v + share * moments.sum_v
    at = about(moments, mean_u, mean_v)
    return TailSums(at.products, at.squares, at.energy, at.ignored), mean_u
