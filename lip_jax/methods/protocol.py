"""What a method is: from a head and rows to a path of candidate heads along one strength.

A method is a value: a frozen, hashable dataclass of options, such as `Published(rank=50)` or `Ridge()`. What
it leaves open, a rank of None, is chosen by evidence (`lip_jax.choice`). A method of your own is any hashable
object with

    path(head: Head, fit: Fit) -> HeadPath | Head

and, if it wants more than rows, `needs = "factors"` or `"quality"`; if it keeps directions of the head it
came with, `refits = True`; `name`, for reports.

| member | without it | meaning |
|---|---|---|
| `needs` | `"rows"` | what of `Fit` must be there: `"factors"` of the rows, or their `"quality"` as well |
| `refits` | False | whether candidates keep directions of the head, which have seen its training rows |
| `name` | the class in lower case | its row of the report |
| `settle(head, fit)` | the path must hold one head | the one head it makes without evidence |
| `from_moments(head, moments, split)` | refused | the same from moments in place of rows |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from lip_jax._checks import describe
from lip_jax._results import ShortRepr, short_repr
from lip_jax.numerics import linalg
from lip_jax.quality.trust import LabelQuality, quality_of
from lip_jax.rows.checks import count_ignored
from lip_jax.rows.labels import Rows
from lip_jax.sums.ridge import RidgeFactors, ridge_factors

Needs = Literal["rows", "factors", "quality"]


class Head(NamedTuple):
    """A kernel `(q, l)` and its bias `(l,)` or None."""

    kernel: jax.Array
    bias: jax.Array | None

    def __repr__(self) -> str:
        return short_repr(self, self._fields)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Fit(ShortRepr):
    """Rows to fit to, with what several methods derive from them, made once.

    Attributes:
        rows: The rows.
        factors: Their centred second moments with eigenvectors, if any method needs them.
        quality: How far their labels can be trusted, if any method needs that.
        ignored: How many rows could not be used (see `lip_jax.rows`).
    """

    rows: Rows
    factors: RidgeFactors | None
    quality: LabelQuality | None
    ignored: Int[jax.Array, ""]


def prepare(rows: Rows, l: int, *, intercept: bool, needs: Needs) -> Fit:
    """What the methods need of the rows: one pass for the factors, two for the quality."""
    if needs == "rows":
        return Fit(rows, None, None, count_ignored(rows, l=l))
    factors = ridge_factors(*rows, l, intercept=intercept)
    quality = None
    if needs == "quality":
        quality = quality_of(factors, rows, None, criterion="gcv", intercept=intercept)
    return Fit(rows, factors, quality, factors.ignored)


@runtime_checkable
class HeadPath(Protocol):
    """Candidate heads along one strength, the one to prefer among equals first.

    Attributes:
        strength: Ranks or ridges, `(p,)`.
        available: Whether there are candidates at all.
    """

    @property
    def strength(self) -> Float[jax.Array, "p"]: ...  # noqa: D102

    @property
    def available(self) -> Bool[jax.Array, ""]: ...  # noqa: D102

    def head(self, index: jax.Array | int) -> Head:
        """The candidate at one place of the path, as it would be stored."""
        ...

    def over_logits(
        self, feats: jax.Array, reduce: Callable[[jax.Array], jax.Array]
    ) -> Float[jax.Array, "p ..."]:
        """`reduce` of the logits of each candidate, without holding those of all."""
        ...


class HeadByHead:
    """A path whose logits take one product with the features for each candidate."""

    def over_logits(
        self: Any, feats: jax.Array, reduce: Callable[[jax.Array], jax.Array]
    ) -> Float[jax.Array, "p ..."]:
        """`reduce` of the logits of each candidate, one after the other."""

        def at(index: jax.Array) -> jax.Array:
            head = self.head(index)
            return reduce(linalg.logits_of(feats, head.kernel, head.bias))

        return jax.lax.map(at, jnp.arange(self.strength.shape[0], dtype=jnp.int32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class HeadStack(HeadByHead, ShortRepr):
    """A path whose heads are all made: kernels `(p, q, l)`, biases `(p, l)` or None.

    Attributes:
        strength: `(p,)`.
        heads: Kernels and biases with a leading axis.
        available: Whether there are candidates at all.
    """

    strength: Float[jax.Array, "p"]
    heads: Head
    available: Bool[jax.Array, ""]

    def head(self, index: jax.Array | int) -> Head:
        """The candidate at one place of the path."""
        return jax.tree.map(lambda part: part[index], self.heads)


def one_head(head: Head, strength: Any = jnp.nan) -> HeadStack:
    """A path of one head."""
    stacked = jax.tree.map(lambda part: part[None], head)
    return HeadStack(jnp.asarray(strength, jnp.float32).reshape(1), stacked, jnp.asarray(True))


class Settled(NamedTuple):
    """The one head a method makes, at which strength, and the spectra of a refit before and after."""

    head: Head
    strength: Any
    ignored: jax.Array
    s: jax.Array | None = None
    sigma: jax.Array | None = None

    def __repr__(self) -> str:
        return short_repr(self, self._fields)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Readout(ShortRepr):
    """A linear readout, and how it was found.

    Attributes:
        kernel: `(q, l)`, float32 or float64 as the features.
        bias: `(l,)`, or None without intercept.
        scale: The logit scale that is folded in: the least-squares solution of a ridge readout is
            `kernel / scale`, `bias / scale`; 1 for a logistic one. None where there were no rows to fit it
            to: then `kernel` and `bias` give scores, not logits, and `lip_jax.replace_head` refuses them.
        ridge: `λ`, as given or as chosen.
        objective: What was minimised, at the solution, for ridge before it is scaled.
        gap: An estimate of how far the objective is above its minimum; 0 for the closed form.
        steps: L-BFGS steps; 0 for the closed form.
        converged: Whether the gap is within the tolerance, or the objective as low as its precision can tell.
        ignored: How many rows could not be used.
    """

    kernel: Float[jax.Array, "q l"]
    bias: Float[jax.Array, "l"] | None
    scale: Float[jax.Array, ""] | None
    ridge: Float[jax.Array, ""]
    objective: Float[jax.Array, ""]
    gap: Float[jax.Array, ""]
    steps: Int[jax.Array, ""]
    converged: Bool[jax.Array, ""]
    ignored: Int[jax.Array, ""]


def settled_readout(found: Readout, head: Head) -> Settled:
    """A readout in the place of a head, in its dtypes."""
    bias = None if head.bias is None or found.bias is None else found.bias.astype(head.bias.dtype)
    return Settled(Head(found.kernel.astype(head.kernel.dtype), bias), found.ridge, found.ignored)


@runtime_checkable
class Method(Protocol):
    """Any hashable object with this member; the module lists the optional ones."""

    def path(self, head: Head, fit: Fit) -> HeadPath | Head:
        """Candidates in place of a head, fitted to rows."""
        ...


def needs_of(method: Method) -> Needs:
    """What a method needs of the rows."""
    return getattr(method, "needs", "rows")


def most_needed(methods: tuple[Method, ...]) -> Needs:
    """What several methods need together."""
    order: tuple[Needs, ...] = ("rows", "factors", "quality")
    return order[max((order.index(needs_of(method)) for method in methods), default=0)]


def name_of(method: Method) -> str:
    """What a method is called in reports."""
    return getattr(method, "name", type(method).__name__.lower())


def is_refit(method: Method) -> bool:
    """Whether candidates keep directions of the head."""
    return getattr(method, "refits", False)


def check_method(method: Any) -> None:
    """Require an object of the protocol, hashable so that it can be compiled in."""
    if isinstance(method, type) or not callable(getattr(method, "path", None)):
        shown = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise ValueError(
            f"method must be a value such as lip_jax.Published(rank=50), lip_jax.Calibrated() or "
            f"lip_jax.Ridge(), or an object with path(head, fit); got {shown}."
        )
    try:
        hash(method)
    except TypeError:
        raise ValueError(
            f"method must be hashable, as it is compiled in; got {method!r}. Give its options as Python "
            f"numbers, and make a method of your own a frozen dataclass."
        ) from None


def path_of(method: Method, head: Head, fit: Fit) -> HeadPath:
    """The candidates of a method, which must be heads of the shape and dtypes of the one that came."""
    found: Any = method.path(head, fit)
    path: HeadPath = one_head(found) if isinstance(found, Head) else found
    if not callable(getattr(path, "head", None)):
        raise ValueError(
            f"the method {name_of(method)} must return a lip_jax.Head or a path of heads, such as "
            f"lip_jax.methods.HeadStack; got {type(found).__name__}."
        )
    check_made(method, Head(*jax.eval_shape(path.head, 0)), head)
    return path


def check_made(method: Method, made: Head, head: Head) -> None:
    """Require a head of the shape and dtypes of the one that came."""
    expected, got = _parts(head), _parts(made)
    if got != expected:
        raise ValueError(
            f"the method {name_of(method)} must make heads like the one it is given, {expected}; it made "
            f"{got}. Cast the kernel and the bias to the dtypes of the head, and leave out the bias only "
            f"where the head has none."
        )


def _parts(head: Head) -> str:
    bias = "no bias" if head.bias is None else f"bias {describe(head.bias)}"
    return f"kernel {describe(head.kernel)}, {bias}"
