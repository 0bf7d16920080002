"""How results are made: frozen dataclasses that are pytrees and print short."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax

from lip_jax._checks import describe, is_concrete

# `field(metadata=STATIC)`: compiled in, part of the pytree's structure and not one of its leaves.
STATIC = {"static": True}


class ShortRepr:
    """A dataclass whose `repr` shows the dtype and shape of an array in place of its entries."""

    def __repr__(self) -> str:
        return short_repr(self, [each.name for each in fields(self)])  # pyright: ignore[reportArgumentType]


def short_repr(held: Any, names: list[str] | tuple[str, ...]) -> str:
    """`Name(field=float32[3,4], …)`; scalars are shown by value."""
    return f"{type(held).__name__}({', '.join(f'{name}={_short(getattr(held, name))}' for name in names)})"


def _short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if value.shape or not is_concrete(value):
            return describe(value)
        return f"{value.item():.4g}" if isinstance(value.item(), float) else repr(value.item())
    # Results within results, and the sums behind them.
    if isinstance(value, ShortRepr) or len(getattr(value, "_fields", ())) > 3:
        return f"{type(value).__name__}(…)"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {len(jax.tree.leaves(value))} arrays"
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return f"({', '.join([*map(_short, value[:3]), *(['…'] if len(value) > 3 else [])])})"
    return repr(value)
