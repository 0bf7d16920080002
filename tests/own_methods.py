"""Methods as a user writes them, right ones and wrong ones."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

import lip_jax
from lip_jax.methods import HeadStack
from lip_jax.methods.protocol import HeadByHead


@dataclass(frozen=True)
class FromRows:
    """A method whose candidate is what the fitting rows hold, so that one compilation serves every case."""

    name: ClassVar[str] = "from_rows"

    def path(self, head, fit):
        return lip_jax.Head(fit.rows.feats[: head.kernel.shape[1]].T, None)


@dataclass(frozen=True)
class Shrunk:
    """Multiples of the head, of which evidence chooses."""

    factors: tuple[float, ...] = (0.5,)
    refits: ClassVar[bool] = True

    def path(self, head, fit):
        factors = jnp.asarray(self.factors, jnp.float32)
        scaled = lambda part: jax.vmap(lambda a: (a * part.astype(a.dtype)).astype(part.dtype))(factors)  # noqa: E731
        return HeadStack(factors, jax.tree.map(scaled, head), jnp.asarray(True))


class ShrunkPath(HeadByHead):
    """A path that is no pytree."""

    def __init__(self, head):
        self.came, self.strength, self.available = (
            head,
            jnp.array([0.5, 0.25], jnp.float32),
            jnp.asarray(True),
        )

    def head(self, index):
        return jax.tree.map(lambda part: self.strength[index].astype(part.dtype) * part, self.came)


@dataclass(frozen=True)
class OwnPath:
    """The same as `Shrunk((0.5, 0.25))` by a path of its own."""

    refits: ClassVar[bool] = True

    def path(self, head, fit):
        return ShrunkPath(head)


@dataclass(frozen=True)
class ClassMeans:
    """Each class by the mean of its features, from the factors of the rows."""

    needs: ClassVar[str] = "factors"

    def path(self, head, fit):
        factors = fit.factors
        cross = factors.basis @ factors.cross + factors.mean_x[:, None] * factors.mass[None, :]
        means = cross / jnp.maximum(factors.mass, 1)[None, :]
        bias = None if head.bias is None else (-0.5 * (means**2).sum(axis=0)).astype(head.bias.dtype)
        return lip_jax.Head(means.astype(head.kernel.dtype), bias)


@dataclass(frozen=True)
class Wrong:
    """A method that makes something else than it is asked for."""

    made: str

    def path(self, head, fit):
        kernel, bias = head
        return {
            "another dtype": lambda: lip_jax.Head(kernel.astype(jnp.float16), bias),
            "another shape": lambda: lip_jax.Head(kernel[:-1], bias),
            "no bias": lambda: lip_jax.Head(kernel, None),
            "a pair": lambda: (kernel, bias),
            "nothing": lambda: None,
        }[self.made]()


@dataclass
class Unhashable:
    """A method that cannot be compiled in."""

    options: list = field(default_factory=list)

    def path(self, head, fit):
        return head


@dataclass(frozen=True)
class Settles:
    """A method with a `settle` of its own, and no path that holds one head."""

    right: bool = True

    def path(self, head, fit):
        return Shrunk((1.0, 0.5)).path(head, fit)

    def settle(self, head, fit):
        made = head if self.right else lip_jax.Head(head.kernel[:, ::-1].astype(jnp.bfloat16), head.bias)
        return lip_jax.methods.Settled(made, jnp.float32(1), fit.ignored)
