"""A lens for heads: find the head in a tree, read it as `(q, l)` and `(l,)`, put another back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lip_jax._checks import all_finite, check_bias, check_kernel, describe, is_concrete, see
from lip_jax._types import Array, Bias, Kernel
from lip_jax.methods.protocol import Head, Readout
from lip_jax.models.trees import (
    Layout,
    Leaf,
    OpenedTree,
    bias_of,
    check_unaltered,
    find_head,
    matrix_shape,
    open_tree,
    stored_like,
    ties_of,
    twins_of,
)

OneHead = str | Callable[[str, Any], bool] | None
HeadName = OneHead | Sequence[str]


@dataclass(frozen=True)
class HeadLens:
    """One head of a tree.

    Attributes:
        head: What its leaves hold, as `(q, l)` and `(l,)`.
        name: The path of the kernel.
    """

    head: Head
    opened: OpenedTree
    kernel_leaf: Leaf
    bias_leaf: Leaf | None
    layout: Layout

    @property
    def name(self) -> str:
        """The path of the kernel, such as `params/head/kernel`."""
        return self.kernel_leaf.name

    def put(self, head: Head) -> PyTree:
        """The tree with another head: its kernel, wherever that stands, and its bias if both have one."""
        opened, kernel_leaf, bias_leaf = self.opened, self.kernel_leaf, self.bias_leaf
        kernel = from_matrix(head.kernel, kernel_leaf.value.shape, self.layout)
        stored = stored_like(kernel, kernel_leaf.value)
        changed = {twin.path: stored for twin in twins_of(opened.leaves, kernel_leaf)}
        if bias_leaf is not None and head.bias is not None:
            value = bias_leaf.value
            changed[bias_leaf.path] = stored_like(head.bias.reshape(value.shape), value)
        for value in changed.values():
            if is_concrete(value) and not see(lambda value=value: all_finite(value)):
                raise ValueError(
                    f"the new head must be finite in the dtype of {self.name}; got values beyond the range "
                    f"of {value.dtype}. Store the head in bfloat16 or float32."
                )
        return opened.rebuild([changed.get(leaf.path, leaf.value) for leaf in opened.leaves])

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors of what is done to the head begin with its name."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"head {self.name}: {error}") from None


def head_lens(
    params: PyTree,
    head: OneHead,
    *,
    q: int | None,
    labels: Any = None,
    num_classes: int | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> HeadLens:
    """The head that is named, or the only kernel `(q, l)`, with `l` from `num_classes` or the labels."""
    opened = open_tree(params)
    leaf = find_head(opened.leaves, head, layout, q, labels, num_classes)
    check_unaltered(opened.leaves, leaf)
    ties = ties_of(opened, leaf)
    if ties and not allow_tied:
        raise ValueError(
            f"the head's kernel {leaf.name} is tied: {ties}, so changing it would change more than the "
            f"head. Untie it, or pass allow_tied=True if that is meant."
        )
    kernel = as_matrix(jnp.asarray(leaf.value), layout)
    bias_leaf = bias_of(opened.leaves, leaf, kernel.shape[1])
    bias = None if bias_leaf is None else jnp.asarray(bias_leaf.value).reshape(-1)
    return HeadLens(Head(kernel, bias), opened, leaf, bias_leaf, layout)


@runtime_checkable
class LinearHead(Protocol):
    """Whatever has a kernel `(q, l)` and a bias `(l,)` or None, such as a `Readout` or a `Head`."""

    @property
    def kernel(self) -> Any: ...  # noqa: D102

    @property
    def bias(self) -> Any: ...  # noqa: D102


AnyHead = LinearHead | tuple[Kernel, Bias | None]


def as_head(given: Any) -> tuple[Array, Array | None]:
    """Kernel and bias of what a function of this package returns, or of a pair; finite, of one width."""
    # A purified readout holds its readout beside the rows it was fitted to.
    given = getattr(given, "readout", given)
    if isinstance(given, Readout) and given.scale is None:
        raise ValueError(
            "the readout gives scores, no logits: it was made from moments without rows to fit a logit scale "
            "to. Make it with lip_jax.linear_readout_from(moments, validation=(feats, labels))."
        )
    if isinstance(given, LinearHead):
        kernel, bias = given.kernel, given.bias
    elif isinstance(given, tuple) and len(given) == 2:
        kernel, bias = given
    else:
        raise ValueError(
            f"readout must be what a readout function or lip_jax.select returns, a lip_jax.Head, or a pair "
            f"(kernel, bias) with bias None where there is none; got {type(given).__name__}."
        )
    check_kernel(kernel, "the readout's kernel")
    check_bias(bias, kernel.shape[1])
    return kernel, bias


def check_fits(kernel: Array, bias: Any, lens: HeadLens) -> Head:
    """Require a head that the leaves of another can hold; a bias that is lacking becomes 0."""
    if kernel.shape != lens.head.kernel.shape:
        raise ValueError(
            f"the readout's kernel must have the shape of the head {lens.name}, (q, l) = "
            f"{lens.head.kernel.shape}; got {describe(kernel)}. Fit it to the inputs of this head "
            f"(lip_jax.capture_features), with num_classes={lens.head.kernel.shape[1]}."
        )
    if bias is None and lens.head.bias is not None:
        bias = jnp.zeros_like(lens.head.bias)
    if bias is not None and lens.head.bias is None:
        if not is_concrete(bias) or see(lambda: (jnp.asarray(bias) != 0).any()):
            raise ValueError(
                f"the readout has a bias, but the head {lens.name} has none to hold it. Fit the readout "
                f"without: lip_jax.linear_readout(..., intercept=False)."
            )
        bias = None
    # Arrays of NumPy stay such: on their way through JAX doubles would lose half their digits.
    return Head(kernel, bias)  # pyright: ignore[reportArgumentType]


def as_matrix(kernel: jax.Array, layout: Layout) -> jax.Array:
    """A stored kernel as `(q, l)`."""
    q, l = matrix_shape(kernel.shape, layout)
    return kernel.reshape(q, l) if layout in ("q l", "q ...") else kernel.reshape(l, q).T


def from_matrix(matrix: Array, shape: tuple[int, ...], layout: Layout) -> Array:
    """A `(q, l)` matrix as it is stored."""
    return (matrix if layout in ("q l", "q ...") else matrix.T).reshape(shape)
