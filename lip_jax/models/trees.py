"""A parameter tree as named leaves: finding the head's kernel and its bias, and writing them back.

Which kernel is the head is never guessed: it is named, or it is the only one of the right shape.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lip_jax._checks import describe, is_concrete, is_floating
from lip_jax.rows.labels import class_count

Layout = Literal["q l", "l q", "q ...", "... q"]


class Leaf(NamedTuple):
    """One leaf of a tree and its path."""

    path: tuple[str, ...]
    value: Any

    @property
    def name(self) -> str:
        """The path with slashes, as people write it."""
        return "/".join(self.path)


class OpenedTree(NamedTuple):
    """A tree as named leaves, with the way back; `shared` holds the paths one nnx variable has."""

    leaves: list[Leaf]
    rebuild: Callable[[list[Any]], PyTree]
    shared: list[list[tuple[str, ...]]]


def open_tree(params: PyTree) -> OpenedTree:
    """Flatten any supported tree into named leaves."""
    shared: list[list[tuple[str, ...]]] = []
    wrap: Callable[[PyTree], PyTree] = lambda tree: tree  # noqa: E731
    if _is_nnx_module(params):
        from flax import nnx

        duplicates = nnx.find_duplicates(params)
        shared = [[tuple(map(str, path)) for path in paths] for paths in duplicates]
        graphdef, params = nnx.split(params)
        wrap = lambda state: nnx.merge(graphdef, state)  # noqa: E731
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [Leaf(_path_names(path), value) for path, value in with_paths]
    if any(not leaf.path for leaf in leaves):
        raise ValueError(
            f"params must be a tree whose arrays have names; got a bare {type(params).__name__}. A kernel "
            f"alone is refitted by lip_jax.refine."
        )
    return OpenedTree(leaves, lambda values: wrap(jax.tree_util.tree_unflatten(treedef, values)), shared)


def _is_nnx_module(params: Any) -> bool:
    # What is an nnx.Module has had nnx imported: no need to import it for a plain dict.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(params, nnx.Module)


def _path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Path entries as strings, without the box (nnx.Variable, nn.Partitioned) around the array."""
    if len(path) > 1 and getattr(path[-1], "name", None) in ("value", "raw_value"):
        path = path[:-1]
    return tuple(
        str(next(getattr(entry, field) for field in ("key", "name", "idx") if hasattr(entry, field)))
        for entry in path
    )


def searched(leaves: list[Leaf]) -> list[Leaf]:
    """The leaves that may be kernels: in a variables dict, only the parameters."""
    inside = [leaf for leaf in leaves if leaf.path[:1] == ("params",) and len(leaf.path) > 1]
    return [leaf for leaf in inside or leaves if is_floating(leaf.value) and len(leaf.value.shape) >= 2]


def find_head(
    leaves: list[Leaf],
    head: Any,
    layout: Layout,
    q: int | None,
    labels: Any,
    num_classes: int | None,
) -> Leaf:
    """The one leaf that is the head's kernel, or a `ValueError` that lists what there is.

    Where `head` is None, `q` and either `labels` or `num_classes` tell its shape.
    """
    if layout not in ("q l", "l q", "q ...", "... q"):
        raise ValueError(f"layout must be 'q l', 'l q', 'q ...' or '... q'; got {layout!r}.")
    kernels = [leaf for leaf in searched(leaves) if len(leaf.value.shape) == 2 or "..." in layout]
    if head is None:
        l = _class_count(labels, num_classes)
        found = [leaf for leaf in kernels if matrix_shape(leaf.value.shape, layout) == (q, l)]
        sought = f"a kernel ({layout}) with q = {q} (width of feats) and l = {l} (classes)"
    elif callable(head):
        found = [leaf for leaf in kernels if head(leaf.name, leaf.value)]
        sought = "a kernel for which the predicate head holds"
    else:
        found = named(kernels, head)
        sought = f"a kernel at head = {head!r}"
    if len(found) == 1:
        leaf = found[0]
        outputs = matrix_shape(leaf.value.shape, layout)[1]
        if num_classes is not None and outputs != num_classes:
            raise ValueError(
                f"num_classes = {num_classes}, but the head {leaf.name} has {outputs} outputs "
                f"({describe(leaf.value)}). Name another head, or leave num_classes out."
            )
        return leaf
    candidates = found or kernels
    listed = "\n".join(f"  {leaf.name}: {describe(leaf.value)}" for leaf in candidates) or "  (none)"
    if found:
        raise ValueError(f"{len(found)} kernels match {sought}; name one with head=:\n{listed}")
    raise ValueError(
        f"params hold no kernel that matches {sought}. Name the head with head=, give num_classes if "
        f"labels lack the last classes, or change layout= if it is stored otherwise. Kernels:\n{listed}"
    )


def _class_count(labels: Any, num_classes: int | None) -> int:
    if num_classes is not None:
        return num_classes
    if len(labels.shape) == 1 and not is_concrete(labels):
        raise ValueError(
            "head is not named and num_classes is not given, and the largest class id cannot be seen under "
            "jit. Pass head= or num_classes=."
        )
    return class_count(labels, None)


def named(kernels: list[Leaf], head: str) -> list[Leaf]:
    """The leaf at this very path, or else the kernel of the module at this path."""
    # Joined, as a key may hold slashes of its own: Haiku's do.
    joined = lambda path: "/".join(without_params(path))  # noqa: E731
    wanted = joined(tuple(part for part in head.split("/") if part))
    exact = [leaf for leaf in kernels if joined(leaf.path) == wanted]
    inside = [leaf for leaf in kernels if joined(leaf.path[:-1]) == wanted]
    return exact or [leaf for leaf in inside if leaf.path[-1] == "kernel"] or inside


def without_params(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path inside the `params` collection."""
    return path[1:] if path[:1] == ("params",) else path


def ties_of(opened: OpenedTree, leaf: Leaf) -> str:
    """Where else the kernel is used, in words; empty if nowhere."""
    for paths in opened.shared:
        # A duplicate may be the variable itself or a module that holds it.
        if any(leaf.path[: len(path)] == path for path in paths):
            return "it is shared between " + " and ".join("/".join(path) for path in paths)
    twins = twins_of(opened.leaves, leaf)
    if len(twins) > 1:
        return "the same array stands at " + " and ".join(twin.name for twin in twins)
    if leaf.path[-1] == "embedding":
        return "an embedding is read by ids as well"
    if not is_concrete(leaf.value):
        alike = [other.name for other in searched(opened.leaves) if _may_be_one(other, leaf)]
        if alike:
            names = " or ".join(alike)
            return f"under jit nothing tells whether it is the same array as {names}, which has its shape"
    return ""


def _may_be_one(other: Leaf, leaf: Leaf) -> bool:
    """Whether a leaf that is traced may hold the array of another: arguments of `jit` are all told apart."""
    shapes = (other.value.shape, other.value.dtype), (leaf.value.shape, leaf.value.dtype)
    return other.path != leaf.path and shapes[0] == shapes[1] and not is_concrete(other.value)


def check_unaltered(leaves: list[Leaf], leaf: Leaf) -> None:
    """Require a stored kernel that is the one the model multiplies by."""
    altered = _altered_by(leaves, leaf)
    if altered:
        raise ValueError(
            f"the head's kernel {leaf.name} is not what the model multiplies by: {altered}. Merge both into "
            f"one dense layer first, and take the parameters of that."
        )


def _altered_by(leaves: list[Leaf], leaf: Leaf) -> str:
    """What makes another kernel of the stored one as the model runs, in words; empty if nothing.

    An adapter beside it (LoRA), or normalised weights, by the names that flax gives them.
    """
    module = leaf.path[:-1]
    if module[-1:] == ("layer_instance",):
        return f"{'/'.join(module[:-1])} normalises it"
    around = module[:-1] if module[-1:] == ("base_module",) else module
    scales = ["/".join((*leaf.path[-2:], name)) for name in ("scale", "sigma")]
    for other in leaves:
        if other.path[-1] in scales:
            return f"{other.name} rescales it"
        beside = other.path[:-1] in (module, (*module, "lora"), around)
        if beside and other.path[-1] in ("lora_a", "lora_b"):
            return f"the adapter {other.name} adds to it"
    return ""


def twins_of(leaves: list[Leaf], leaf: Leaf) -> list[Leaf]:
    """The leaf itself and every parameter that is the very same array."""
    return [other for other in searched(leaves) if other.value is leaf.value]


def bias_of(leaves: list[Leaf], kernel: Leaf, l: int) -> Leaf | None:
    """The bias beside a kernel, if it has one of `l` entries: `bias`, or `b` as Haiku calls it."""
    paths = [(*kernel.path[:-1], name) for name in ("bias", "b")]
    return next((leaf for leaf in leaves if leaf.path in paths and leaf.value.size == l), None)


def matrix_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """`(q, l)` of a kernel stored in this layout."""
    if layout in ("q l", "q ..."):
        return shape[0], int(np.prod(shape[1:]))
    return shape[-1], int(np.prod(shape[:-1]))


def stored_like(array: Any, original: Any) -> Any:
    """The array as the original is held: its dtype, and in NumPy or on the same devices, sharded alike."""
    if isinstance(original, np.ndarray) and is_concrete(array):
        # JAX may compute in half the precision: what did not change keeps its own.
        unchanged = np.array_equal(np.asarray(jnp.asarray(original)), np.asarray(array))
        return original if unchanged else np.asarray(array).astype(original.dtype)
    array = jnp.asarray(array).astype(jax.dtypes.canonicalize_dtype(original.dtype))
    if is_concrete(array, original) and isinstance(original, jax.Array):
        return jax.device_put(array, original.sharding)
    return array
