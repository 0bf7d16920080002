"""Compensated sums, which lose no accuracy however many terms they have.

Each sum is a pair: its value and a compensation, the part below the value's last digit. Addition is Knuth's
two-sum, whose error term is exact whichever of the two is larger [knuth1997].
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def no_compensation(sums: Tree) -> Tree:
    """The compensation of sums that are exact so far."""
    return jax.tree.map(jnp.zeros_like, sums)


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def add(sums: Tree, compensation: Tree, terms: Tree) -> tuple[Tree, Tree]:
    """`sums + compensation + terms`, as new sums and their compensation."""

    def one(value: jax.Array, small: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, error = _two_sum(value, term)
        # The compensation is added at once, so that the value alone is right to its last digit.
        return _two_sum(total, small + error)

    pairs = jax.tree.map(one, sums, compensation, terms)
    structure = jax.tree.structure(sums)
    return tuple(structure.unflatten(part) for part in zip(*structure.flatten_up_to(pairs), strict=True))
