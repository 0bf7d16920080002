"""How results are made: frozen dataclasses that are pytrees and print short."""

from dataclasses import field, fields
from typing import Any

from lip_jax._checks import describe, is_concrete


def static() -> Any:
    """A field that is compiled in: part of the pytree's structure, not one of its leaves."""
    return field(metadata={"static": True})


class ShortRepr:
    """A dataclass whose `repr` shows the dtype and shape of an array in place of its entries."""

    def __repr__(self) -> str:
        return short_repr(self, [each.name for each in fields(self)])  # pyright: ignore[reportArgumentType]


def short_repr(held: Any, names: list[str] | tuple[str, ...]) -> str:
    """`Name(field=float32[3,4], …)`; scalars are shown by value."""
    return f"{type(held).__name__}({', '.join(f'{name}={_short(getattr(held, name))}' for name in names)})"


def _short(value: Any) -> str:
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        shown = [_short(each) for each in value[:3]] + ["…"] * (len(value) > 3)
        return f"({', '.join(shown)})"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return repr(value)
    if value.shape == () and is_concrete(value):
        return f"{value.item():.4g}" if isinstance(value.item(), float) else repr(value.item())
    return describe(value)
