"""Moments: sums of fixed size that stand for any number of rows, taken a batch at a time.

Refits, ridge readouts, centring, scale and bounds need only moments of the rows, which are additive. There
are two levels, each with an accumulator of the same three functions:

| accumulator | state | serves |
|---|---|---|
| `tail_accumulator(split)` | `TailMoments`, `O(r)` | refits of that one head, at every rank |
| `moment_accumulator(q, l)` | `Moments`, `O(q² + ql)` | every head, readout and bound |

Each solver has a twin that takes moments instead of rows: `refine_from`, `refine_calibrated_from`,
`solve_tail_sigma_from`, `linear_readout_from`, `feature_singular_values_from`, `apply_from`. Sums are taken
about an origin near the first rows, and compensated: neither a large mean nor a large number of rows costs
accuracy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from lip_jax._checks import check_split, describe
from lip_jax._results import ShortRepr
from lip_jax._types import Feats, Labels, Weights
from lip_jax.numerics import compensated, linalg
from lip_jax.numerics.chunks import CHUNK_ROWS, fold_rows
from lip_jax.rows.checks import check_feats, check_label_kind, check_labels, check_weights
from lip_jax.rows.labels import Rows, as_rows, spread_over, usable_bias, usable_rows
from lip_jax.spectrum.split import SvdSplit
from lip_jax.sums import additive, tail
from lip_jax.sums.additive import Additive
from lip_jax.sums.tail import TailMoments, TailSums

# In a Gram matrix, a direction counts as empty if its variance is below this many eps of the trace.
GRAM_LEVEL = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Moments(Additive, ShortRepr):
    """First and second moments of features and targets, which depend on no head.

    With `a = x − origin_x` and `c = y − origin_y`. The origins are near the means of the first rows, so that
    no digits are lost where means are large against deviations. `origin_y` is 0 if those rows had class ids.

    Attributes:
        total: `Σ w`.
        rows: How many rows have weight, as a floating number.
        squared: `Σ w²`.
        spread: `Σ w ‖c‖²`.
        sum_x: `Σ w a`, `(q,)`.
        sum_y: `Σ w c`, `(l,)`.
        gram: `Σ w a aᵀ`, `(q, q)`.
        cross: `Σ w a cᵀ`, `(q, l)`.
        origin_x: `(q,)`.
        origin_y: `(l,)`.
        ignored: How many rows could not be used (see `lip_jax.rows`).
        compensation: Rounding errors of the eight sums, in their order.
    """

    total: Float[jax.Array, ""]
    rows: Float[jax.Array, ""]
    squared: Float[jax.Array, ""]
    spread: Float[jax.Array, ""]
    sum_x: Float[jax.Array, "q"]
    sum_y: Float[jax.Array, "l"]
    gram: Float[jax.Array, "q q"]
    cross: Float[jax.Array, "q l"]
    origin_x: Float[jax.Array, "q"]
    origin_y: Float[jax.Array, "l"]
    ignored: Int[jax.Array, ""]
    compensation: tuple[Float[jax.Array, "..."], ...]


def no_rows(q: int, l: int, dtype: jnp.dtype) -> Moments:
    """The moments of no rows."""
    return additive.no_rows(Moments, ((), (), (), (), q, l, (q, q), (q, l)), (q, l), dtype)


def moments_of(rows: Rows, l: int, dtype: jnp.dtype, *, stop: jax.Array | None = None) -> Moments:
    """The moments of all rows, in one pass that ends at row `stop`."""
    return _pass(rows, _origin(rows, l, dtype), stop)


def _origin(rows: Rows, l: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The means of features and targets over a few rows, near those of all."""
    few = spread_over(rows, l, min(rows.feats.shape[0], tail.ORIGIN_ROWS))
    # Weighted: a row of weight 0 may hold anything.
    some = jax.tree.map(lambda part: part[few], rows)
    x, y, w, _ = usable_rows(some, jnp.ones(few.shape, bool), l, dtype)
    total = jnp.sum(w)
    share = (w * linalg.reciprocal(total, total > 0))[None, :]
    mean_y = jnp.zeros(l, dtype) if y.ndim == 1 else linalg.matmul(share, y)[0]
    return linalg.matmul(share, x)[0], mean_y


class _Sums(NamedTuple):
    """The sums of a pass: the Gram matrix in blocks, and `cross` by class, `(l, q)`."""

    total: jax.Array
    rows: jax.Array
    squared: jax.Array
    spread: jax.Array
    sum_x: jax.Array
    sum_y: jax.Array
    gram: tuple[jax.Array, jax.Array, jax.Array]
    cross: jax.Array


def _pass(rows: Rows, origin: tuple[jax.Array, jax.Array], stop: jax.Array | None) -> Moments:
    (origin_x, origin_y), (n, q) = origin, rows.feats.shape
    l, dtype = origin_y.shape[0], origin_x.dtype
    zeros = partial(jnp.zeros, dtype=dtype)
    # A dense sum for each chunk is dear for many classes, each of which has few rows to lose digits over.
    many_classes = rows.labels.ndim == 1 and l > CHUNK_ROWS

    def step(carry: tuple, rows: Rows, fresh: jax.Array) -> tuple[tuple, None]:
        sums, compensation, by_class, ignored = carry
        x, y, w, bad = usable_rows(rows, fresh, l, dtype)
        x = jnp.where(w[:, None] > 0, x - origin_x[None, :], 0)
        weighted = w[:, None] * x
        if y.ndim == 1:
            squares = jnp.ones_like(w)
            held = by_class if many_classes else (zeros(l), zeros((l, q)))
            sum_y, cross = (part.at[y].add(term) for part, term in zip(held, (w, weighted), strict=True))
        else:
            y = jnp.where(w[:, None] > 0, y - origin_y[None, :], 0)
            squares = jnp.sum(y**2, axis=1)
            sum_y, cross = linalg.matmul(w[None, :], y)[0], linalg.matmul(y.T, weighted)
        if many_classes:
            by_class, sum_y, cross = (sum_y, cross), zeros(0), zeros((0, q))
        else:
            # The barrier keeps XLA from adding each row to all that is held.
            sum_y, cross = jax.lax.optimization_barrier((sum_y, cross))
        terms = _Sums(
            total=jnp.sum(w),
            rows=jnp.sum(w > 0, dtype=dtype),
            squared=jnp.sum(w**2),
            spread=jnp.sum(w * squares),
            sum_x=jnp.sum(weighted, axis=0),
            sum_y=sum_y,
            gram=linalg.gram_blocks(x, weighted),
            cross=cross,
        )
        return (*compensated.add(sums, compensation, terms), by_class, ignored + bad), None

    no_gram = linalg.gram_blocks(zeros((0, q)), zeros((0, q)))
    held = 0 if many_classes else l
    zero = zeros(())
    empty = _Sums(zero, zero, zero, zero, zeros(q), zeros(held), no_gram, zeros((held, q)))
    by_class: Any = (zeros(l), zeros((l, q))) if many_classes else ()
    carry = empty, compensated.no_compensation(empty), by_class, jnp.zeros((), jnp.int32)
    (sums, _, by_class, ignored), _ = fold_rows(step, carry, rows, stop=stop)
    if many_classes:
        sums = sums._replace(sum_y=by_class[0], cross=by_class[1])
    if rows.labels.ndim == 1:
        sums = _from_origin_y(sums, origin_y)
    # No row is usable if the sums of finite rows overflow.
    finite = jnp.stack([jnp.isfinite(part).all() for part in (*sums.gram, sums.cross)]).all()
    *first, gram, cross = jax.tree.map(lambda part: jnp.where(finite, part, 0), sums)
    held = (*first, linalg.from_blocks(gram), cross.T)
    return additive.from_sums(Moments, held, origin, jnp.where(finite, ignored, n))


def _from_origin_y(sums: _Sums, origin_y: jax.Array) -> _Sums:
    """Sums over class ids about an origin, from those about 0, which need no one-hot rows."""
    total, sum_y = sums.total, sums.sum_y
    spread = sums.spread - 2 * jnp.sum(origin_y * sum_y) + total * jnp.sum(origin_y**2)
    return sums._replace(
        spread=jnp.maximum(spread, 0),
        sum_y=sum_y - total * origin_y,
        cross=sums.cross - origin_y[:, None] * sums.sum_x[None, :],
    )


def about(moments: Moments, origin_x: jax.Array, origin_y: jax.Array) -> Moments:
    """The moments about other origins: `Σ w (a + d)(c + e)ᵀ`, with `d`, `e` the shifts of the origins."""
    total, sum_x, sum_y = moments.total, moments.sum_x, moments.sum_y
    d, e = moments.origin_x - origin_x, moments.origin_y - origin_y
    outer = lambda a, c: a[:, None] * c[None, :]  # noqa: E731
    return replace(
        moments,
        spread=jnp.maximum(moments.spread + 2 * jnp.sum(e * sum_y) + total * jnp.sum(e**2), 0),
        sum_x=sum_x + total * d,
        sum_y=sum_y + total * e,
        gram=moments.gram + outer(d, sum_x) + outer(sum_x, d) + total * outer(d, d),
        cross=moments.cross + outer(d, sum_y) + outer(sum_x, e) + total * outer(d, e),
        origin_x=origin_x,
        origin_y=origin_y,
    )


def centred(moments: Moments) -> Moments:
    """The moments about the weighted means of all rows."""
    share = linalg.reciprocal(moments.total, moments.total > 0)
    return about(moments, moments.origin_x + share * moments.sum_x, moments.origin_y + share * moments.sum_y)


def from_zero(moments: Moments) -> Moments:
    """The moments about 0."""
    return about(moments, jnp.zeros_like(moments.origin_x), jnp.zeros_like(moments.origin_y))


def project(moments: Moments | TailMoments, u: jax.Array, vt: jax.Array) -> TailMoments:
    """The moments along the components of a split; `TailMoments` are assumed to belong to it."""
    if isinstance(moments, TailMoments):
        return moments
    u, v = u.astype(moments.gram.dtype), vt.T.astype(moments.gram.dtype)
    of_x = lambda x: linalg.matmul(x[None, :], u)[0]  # noqa: E731
    of_y = lambda y: linalg.matmul(y[None, :], v)[0]  # noqa: E731
    energy = (
        jnp.trace(moments.gram)
        + 2 * jnp.sum(moments.origin_x * moments.sum_x)
        + moments.total * jnp.sum(moments.origin_x**2)
    )
    products = jnp.sum(linalg.matmul(moments.cross.T, u).T * v.T, axis=1)
    squares = jnp.sum(u * linalg.matmul(moments.gram, u), axis=0)
    # A direction without data is at eps in a Gram matrix, not at eps² as in sums over projected rows.
    level = jnp.finfo(moments.gram.dtype).eps * GRAM_LEVEL * jnp.trace(moments.gram)
    products, squares = (jnp.where(squares > level, part, 0) for part in (products, squares))
    sums = (
        moments.total,
        jnp.maximum(energy, 0),
        of_x(moments.sum_x),
        of_y(moments.sum_y),
        products,
        squares,
    )
    origin = of_x(moments.origin_x), of_y(moments.origin_y)
    return additive.from_sums(TailMoments, sums, origin, moments.ignored)


def check_split_given(moments: Moments | TailMoments, split: SvdSplit | None) -> None:
    """Require a split with `TailMoments`."""
    if split is None and isinstance(moments, TailMoments):
        raise ValueError(
            "split must be given with TailMoments, which are sums along its components: pass the split that "
            "lip_jax.tail_accumulator was made with. For a calibrated refit that is the split of the kernel "
            "less its mean over classes."
        )


def project_uncentred(
    moments: Moments | TailMoments, u: jax.Array, vt: jax.Array, bias: jax.Array | None
) -> TailSums:
    """The sums for a refit, with targets `Y − b` where there is a bias."""
    found = project(moments, u, vt)
    dtype = found.total.dtype
    along_bias = None if bias is None else linalg.matmul(vt.astype(dtype), usable_bias(bias, dtype))
    return tail.uncentred(found, along_bias)


def check_moments_kind(moments: Any) -> None:
    """Require moments at either level."""
    if not isinstance(moments, (Moments, TailMoments)):
        raise ValueError(
            f"moments must be lip_jax.sums.Moments or lip_jax.sums.TailMoments, the results of "
            f"lip_jax.accumulate; got {type(moments).__name__}."
        )


def check_moments(moments: Any, q: int, l: int, r: int) -> None:
    """Require moments of rows for a `(q, l)` head."""
    check_moments_kind(moments)
    if isinstance(moments, TailMoments) and moments.squares.shape != (r,):
        raise ValueError(
            f"moments must be along r = {r} components; got {describe(moments.squares)}. TailMoments serve "
            f"only the split they were taken for."
        )
    if isinstance(moments, Moments) and moments.cross.shape != (q, l):
        raise ValueError(f"moments must be of rows with (q, l) = ({q}, {l}); got {describe(moments.cross)}.")


State = TypeVar("State", Moments, TailMoments)


@dataclass(frozen=True)
class Accumulator(Generic[State]):
    """Three functions that take moments a batch at a time, in the style of `optax`.

    Attributes:
        init: `init() → state` of no rows.
        update: `update(state, feats, labels, weights=None) → state` with the rows of a batch added. The given
            state is donated: its memory is reused, so it must not be used again.
        merge: `merge(state, state) → state` of the rows of both. Associative and commutative up to rounding;
            the state of no rows changes nothing.
        shape: `(q, l)`.
        split: The split of `TailMoments`, or None.
    """

    init: Callable[[], State]
    update: Callable[..., State]
    merge: Callable[[State, State], State]
    shape: tuple[int, int]
    split: SvdSplit | None


def moment_accumulator(q: int, l: int, *, dtype: Any = jnp.float32) -> Accumulator[Moments]:
    """Moments that serve every head: `Σw`, `Σw²`, `Σwx`, `Σwy`, `Σw xxᵀ`, `Σw xyᵀ`, `Σw‖y‖²`.

    `update` works on NumPy arrays and on JAX arrays with any sharding, eagerly and under `jit`. Rows that
    cannot be used count for nothing and are counted in `ignored`. Products are summed before they are
    projected, so a direction counts as empty if its variance is below 4 eps of the total.

    Args:
        q: How many features a row has.
        l: How many classes, or outputs, there are.
        dtype: Of the sums: float32, or float64 where JAX has it enabled.

    Returns:
        An `Accumulator` of `Moments`.

    Raises:
        ValueError: If `q`, `l` or `dtype` are not valid; `update` raises if shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> accumulator = lip_jax.moment_accumulator(q=2, l=2)
        >>> state = accumulator.init()
        >>> for _ in range(3):
        ...     state = accumulator.update(state, jnp.eye(2), jnp.array([0, 1]))
        >>> lip_jax.refine_from(jnp.diag(jnp.array([3.0, 2.0])), state, rank=1).round(4).tolist()
        [[3.0, 0.0], [0.0, 1.0]]

    Reference:
        The sums of [si2025]'s closed form, one level up.
    """
    for name, size in (("q", q), ("l", l)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an int of at least 1; got {size!r}.")
    dtype = _sums_dtype(dtype)

    def update(state: Moments, feats: Feats, labels: Labels, weights: Weights | None = None) -> Moments:
        return _updated(state, _checked(feats, labels, weights, q, l))

    return Accumulator(partial(no_rows, q, l, dtype), update, merge_moments, (q, l), None)


def tail_accumulator(split: SvdSplit, *, dtype: Any = None) -> Accumulator[TailMoments]:
    """Moments along the components of one head: `O(r)` numbers for any number of rows.

    They serve every rank, with and without bias, published or calibrated as the split is. `update` works as
    that of `moment_accumulator`, and costs one product `n×q×r`.

    Args:
        split: The split kernel, from `svd_split`; its rank does not matter. For `refine_calibrated_from` the
            split of the kernel less its mean over classes.
        dtype: Of the sums: float32, or float64 where JAX has it enabled; None: as the split, at least
            float32.

    Returns:
        An `Accumulator` of `TailMoments`.

    Raises:
        ValueError: If `split` is no split; `update` raises if shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> split = lip_jax.svd_split(jnp.diag(jnp.array([3.0, 2.0])), rank=1)
        >>> accumulator = lip_jax.tail_accumulator(split)
        >>> state = accumulator.update(accumulator.init(), jnp.eye(2), jnp.array([0, 1]))
        >>> lip_jax.methods.solve_tail_sigma_from(split, state).round(4).tolist()
        [3.0, 1.0]

    Reference:
        [si2025], closed-form solution of label ambiguity purification.
    """
    check_split(split)
    u, vt = jnp.asarray(split.u), jnp.asarray(split.vt)
    (q, r), l = u.shape, vt.shape[1]
    dtype = linalg.compute_dtype(u) if dtype is None else _sums_dtype(dtype)

    def update(
        state: TailMoments, feats: Feats, labels: Labels, weights: Weights | None = None
    ) -> TailMoments:
        return tail.updated(state, u, vt, _checked(feats, labels, weights, q, l))

    return Accumulator(partial(tail.no_rows, r, dtype), update, merge_tails, (q, l), split)


def _sums_dtype(dtype: Any) -> jnp.dtype:
    held = jnp.dtype(dtype)
    if held not in (jnp.float32, jnp.float64) or jax.dtypes.canonicalize_dtype(held) != held:
        raise ValueError(
            f"dtype must be float32, or float64 where jax_enable_x64 is set; got {held}. Sums are "
            f"compensated, so float32 loses nothing."
        )
    return held


def _checked(feats: Feats, labels: Labels, weights: Weights | None, q: int, l: int) -> Rows:
    check_feats(feats, q)
    check_label_kind(labels)
    check_labels(labels, feats.shape[0], l)
    check_weights(weights, feats.shape[0])
    return Rows(*as_rows(feats, labels, weights, None)[:3])


@partial(jax.jit, donate_argnums=0)
def _updated(moments: Moments, rows: Rows) -> Moments:
    l, dtype = moments.origin_y.shape[0], moments.total.dtype
    origin = jax.lax.cond(moments.total > 0, lambda: moments.origin, lambda: _origin(rows, l, dtype))
    return additive.added(moments, _pass(rows, origin, None))


def _merge(merged: Callable[..., State], first: State, second: State) -> State:
    sizes = [part.origin_v if isinstance(part, TailMoments) else part.cross for part in (first, second)]
    shapes = [describe(size) for size in sizes]
    if type(first) is not type(second) or shapes[0] != shapes[1]:
        raise ValueError(
            f"first and second must be states of the same accumulator; got {type(first).__name__} of "
            f"{shapes[0]} and {type(second).__name__} of {shapes[1]}."
        )
    return merged(first, second)


merge_moments = partial(_merge, jax.jit(partial(additive.merged, about)))

merge_tails = partial(_merge, jax.jit(partial(additive.merged, tail.about)))
