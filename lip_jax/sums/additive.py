"""The common part of moments at both levels: compensated sums about an origin."""

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lip_jax.numerics import compensated


@cache
def _names(kind: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields of a kind of moments that are sums, and those that are origins."""
    named = [field.name for field in fields(kind) if field.name not in ("ignored", "compensation")]
    origin = tuple(name for name in named if name.startswith("origin_"))
    return tuple(name for name in named if name not in origin), origin


class Additive:
    """A frozen dataclass of sums, of origins `origin_…`, of `ignored` and of each sum's `compensation`."""

    ignored: jax.Array
    compensation: tuple[jax.Array, ...]

    @property
    def sums(self) -> tuple[jax.Array, ...]:
        """The sums, in their order."""
        return tuple(getattr(self, name) for name in _names(type(self))[0])

    @property
    def origin(self) -> tuple[jax.Array, ...]:
        """The points that features and targets are measured from."""
        return tuple(getattr(self, name) for name in _names(type(self))[1])


Held = TypeVar("Held", bound=Additive)

Origin = tuple[jax.Array, ...]


def from_sums(
    kind: type[Held], sums: Any, origin: Origin, ignored: jax.Array, compensation: Any = None
) -> Held:
    """Moments from sums in their order, with no compensation unless it is given."""
    compensation = compensated.no_compensation(tuple(sums)) if compensation is None else tuple(compensation)
    named = dict(zip(_names(kind)[0], sums, strict=True)) | dict(zip(_names(kind)[1], origin, strict=True))
    return kind(**named, **{"ignored": ignored, "compensation": compensation})


def no_rows(kind: type[Held], shapes: Any, origin: Any, dtype: jnp.dtype) -> Held:
    """The moments of no rows, given the shapes of sums and origins."""
    # No two leaves share memory, as updates donate it.
    zeros = [jnp.zeros(shape, dtype) for shape in shapes], tuple(jnp.zeros(shape, dtype) for shape in origin)
    return from_sums(kind, *zeros, jnp.zeros((), jnp.int32))


def added(first: Held, second: Held) -> Held:
    """The moments of the rows of both, which have one origin; the first may have no rows instead."""
    compensation = jax.tree.map(jnp.add, first.compensation, second.compensation)
    sums, compensation = compensated.add(first.sums, compensation, second.sums)
    return from_sums(type(second), sums, second.origin, first.ignored + second.ignored, compensation)


def merged(about: Callable[..., Held], first: Held, second: Held) -> Held:
    """The moments of the rows of both, about the origin of the first that has rows."""
    begun = first.sums[0] > 0
    origin = [jnp.where(begun, *pair) for pair in zip(first.origin, second.origin, strict=True)]
    return added(about(first, *origin), about(second, *origin))


def named(moments: Additive) -> dict[str, Any]:
    """All arrays of moments by name."""
    sums, origin = _names(type(moments))
    arrays = {name: getattr(moments, name) for name in (*sums, *origin, "ignored")}
    of_sums = zip(sums, moments.compensation, strict=True)
    return arrays | {f"compensation_{name}": part for name, part in of_sums}


def from_named(kind: type[Held], arrays: dict[str, Any]) -> Held:
    """The moments with such arrays."""
    sums, origin = _names(kind)
    held, points = (tuple(arrays[name] for name in names) for names in (sums, origin))
    return from_sums(kind, held, points, arrays["ignored"], [arrays[f"compensation_{name}"] for name in sums])
