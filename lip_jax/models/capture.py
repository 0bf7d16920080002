"""The inputs of layers, as the model computes them."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, PyTree

from lip_jax._checks import describe, is_concrete
from lip_jax._types import Array
from lip_jax.models.trees import (
    Layout,
    Leaf,
    find_head,
    matrix_shape,
    named,
    open_tree,
    searched,
    without_params,
)

# The collection of a linen model in which the inputs of layers are kept, and their name in it.
SOWN = "lip_jax_head"
SOWN_NAME = "lip_jax_inputs"

LayerPath = tuple[str, ...]


class Call(NamedTuple):
    """One call of a layer: which, and with what; equal `identity` is the same array within the model."""

    path: LayerPath
    inputs: jax.Array
    identity: int


def capture_features(
    model: Any,
    variables: PyTree,
    inputs: Array | tuple[Any, ...],
    *,
    head: str | Callable[[str, Any], bool] | None = None,
    num_classes: int | None = None,
    layout: Layout = "q l",
    **apply_kwargs: Any,
) -> Float[jax.Array, "... q"]:
    """The inputs of the head, as the model computes them: one forward pass, the model unchanged.

    The call of the head's module is intercepted. Put a large set through in batches, under `jax.jit`
    for speed: `jax.jit(lambda x: capture_features(model, variables, x, head="head"))`. Inside `nn.scan` and
    `nn.vmap` set `variable_axes={"lip_jax_head": 0, ...}`: the features are stacked along that axis.

    Args:
        model: A linen module, or an `nnx.Module` (which is copied, not touched).
        variables: For linen the variables dict, or its params. For nnx None, or an `nnx.State` to use in
            place of the module's own.
        inputs: The model's input, or a tuple of its positional arguments.
        head: A path or predicate as in `lip_jax.apply`; a path may also name a convolution, any other layer
            with a kernel, or a block of layers. None: the only kernel with `num_classes` outputs.
        num_classes: `l`, needed where `head` is None.
        layout: How the head's kernel is stored, as in `lip_jax.apply`.
        **apply_kwargs: Passed to the model, e.g. `train=False`, `rngs=…`, `method=…`.

    Returns:
        The features `(…, q)`, with the leading axes the head sees.

    Raises:
        ValueError: If no kernel or several could be the head, or its module is not called exactly once.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> lip_jax.capture_features(model, variables, jnp.ones((5, 4)), head="layers_2").shape
        (5, 8)

    Reference:
        [li2020], the representation a network learned.
    """
    called = _opened(model, variables, inputs)
    path, q = _find_captured(called.leaves, head, num_classes, layout)
    calls = called.record({path}, apply_kwargs)
    if len(calls) != 1 or q not in (None, calls[0].inputs.shape[-1]):
        shapes = ", ".join(describe(call.inputs) for call in calls) or "no call"
        if not calls and called.is_linen:
            shapes += f" (inside nn.scan or nn.vmap give these variable_axes={{'{SOWN}': 0, ...}} to see it)"
        raise ValueError(
            f"the module of the head {'/'.join(path)} must be called once, with inputs (..., "
            f"{q or 'channels'}); got {shapes}. Name another head=, or compute its inputs yourself."
        )
    seen = is_concrete(*jax.tree.leaves((called.args, apply_kwargs)), *(leaf.value for leaf in called.leaves))
    if seen and not is_concrete(calls[0].inputs):
        raise ValueError(
            f"the head {'/'.join(path)} is called inside a transformation of the model (nnx.jit, nnx.scan, "
            f"nnx.remat), out of which its inputs cannot be taken. Transform the whole model instead."
        )
    return calls[0].inputs


def capture_layers(
    model: Any,
    variables: PyTree,
    inputs: Array | tuple[Any, ...],
    *,
    head: str | Callable[[str, Any], bool] | None = None,
    layers: Sequence[str] | None = None,
    num_classes: int | None = None,
    **apply_kwargs: Any,
) -> dict[str, Float[jax.Array, "n q"]]:
    """The inputs of the head and of layers before it, in one forward pass and in the order of the calls.

    Axes between the rows and the features, such as those of images, are averaged over. A layer is left out
    if it is called more than once or not at all, if its input is not floating with a row for each row of the
    head's input, or is that of a layer before it in the list.

    Args:
        model: A linen module, or an `nnx.Module` (which is copied, not touched).
        variables: As in `capture_features`.
        inputs: The model's input, or a tuple of its positional arguments.
        head: As in `capture_features`.
        layers: Paths of layers or blocks. None: every dense layer, and every block or layer that is a part of
            the model itself.
        num_classes: `l`, needed where `head` is None.
        **apply_kwargs: Passed to the model.

    Returns:
        From paths to features, the head last.

    Raises:
        ValueError: If the head is not found, is not called exactly once with inputs `(n, q)`, or a layer that
            is named has no input to take before it.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(6), nn.relu, nn.Dense(3)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> found = lip_jax.models.capture_layers(model, variables, jnp.ones((5, 4)), head="layers_4")
        >>> {path: feats.shape for path, feats in found.items()}
        {'layers_0': (5, 4), 'layers_2': (5, 8), 'layers_4': (5, 6)}

    Reference:
        [li2020], the representations of layers.
    """
    called = _opened(model, variables, inputs)
    own, q = _find_captured(called.leaves, head, num_classes, "q l")
    if layers is None:
        dense = {leaf.path[:-1] for leaf in called.kernels if leaf.value.ndim == 2}
        wanted = dense | {leaf.path[:1] for leaf in called.kernels}
    else:
        wanted = {tuple(layer.strip("/").removeprefix("params/").split("/")) for layer in layers}
    calls = called.record(wanted | {own}, apply_kwargs)
    at = [place for place, call in enumerate(calls) if call.path == own]
    if len(at) != 1 or calls[at[0]].inputs.ndim != 2 or calls[at[0]].inputs.shape[1] != q:
        shapes = ", ".join(describe(calls[place].inputs) for place in at) or "no call"
        raise ValueError(
            f"the module of the head {'/'.join(own)} must be called once, with inputs (n, {q}); got "
            f"{shapes}. Name another head=."
        )
    last = calls[at[0]]
    paths = [call.path for call in calls]
    found, known = {}, {last.identity}
    for call in calls[: at[0]]:
        feats, floating = call.inputs, jnp.issubdtype(call.inputs.dtype, jnp.floating)
        fits = floating and feats.ndim > 1 and feats.shape[0] == last.inputs.shape[0]
        if fits and paths.count(call.path) == 1 and (layers is not None or call.identity not in known):
            found["/".join(call.path)] = pooled(feats)
            known.add(call.identity)
    missing = [] if layers is None else [p for p in map("/".join, wanted - {own}) if p not in found]
    if missing:
        raise ValueError(
            f"layers must be called once, before the head {'/'.join(own)}, with floating inputs (n, ..., "
            f"features); got {', '.join(sorted(missing))}, for which that is not so. Of this model "
            f"{', '.join(sorted({'/'.join(path) for path in paths}))} are called."
        )
    return {**found, "/".join(own): last.inputs}


def pooled(feats: jax.Array) -> jax.Array:
    """The mean over all axes between the first and the last."""
    return feats.mean(axis=tuple(range(1, feats.ndim - 1))) if feats.ndim > 2 else feats


class _Opened(NamedTuple):
    """A model with its variables, ready to be called."""

    is_linen: bool
    args: tuple[Any, ...]
    leaves: list[Leaf]
    record: Callable[[Collection[LayerPath], dict[str, Any]], list[Call]]

    @property
    def kernels(self) -> list[Leaf]:
        """Leaves of more than one axis that belong to a layer, without `params`."""
        found = [Leaf(without_params(leaf.path), leaf.value) for leaf in searched(self.leaves)]
        return [leaf for leaf in found if len(leaf.path) > 1 and getattr(leaf.value, "ndim", 0) > 1]


def _opened(model: Any, variables: PyTree, inputs: Any) -> _Opened:
    from flax import linen, nnx

    check_model(model)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    if isinstance(model, linen.Module):
        variables = variables if "params" in variables else {"params": variables}
        record = partial(_record_linen, model, variables, args)
        return _Opened(True, args, open_tree(variables).leaves, record)
    model = nnx.clone(model)
    if variables is not None:
        nnx.update(model, variables)
    return _Opened(False, args, open_tree(model).leaves, partial(_record_nnx, model, args))


def check_model(model: Any) -> None:
    """Require a flax module of either kind."""
    from flax import linen, nnx

    if not isinstance(model, (linen.Module, nnx.Module)):
        raise ValueError(f"model must be a flax linen or nnx Module; got {type(model).__name__}.")


def _find_captured(
    leaves: list[Leaf], head: Any, num_classes: int | None, layout: Layout
) -> tuple[LayerPath, int | None]:
    """The path of the layer, and how many features it takes, where its kernel says so."""
    if head is None and num_classes is None:
        raise ValueError("head or num_classes must be given, to know which layer is the head.")
    if head is None:
        head = lambda _, leaf: matrix_shape(leaf.shape, layout)[1] == num_classes  # noqa: E731
    if isinstance(head, str) and num_classes is None:
        convolutions = named([leaf for leaf in searched(leaves) if _is_convolution(leaf, layout)], head)
        if len(convolutions) == 1:
            return without_params(convolutions[0].path)[:-1], None
        block = without_params(tuple(head.strip("/").split("/")))
        inside = [without_params(leaf.path)[len(block) :] for leaf in searched(leaves)
                  if without_params(leaf.path)[: len(block)] == block]  # fmt: skip
        if inside and all(len(rest) > 1 for rest in inside):
            return block, None
    leaf = find_head(leaves, head, layout, None, None, num_classes)
    q = None if _is_convolution(leaf, layout) else matrix_shape(leaf.value.shape, layout)[0]
    return without_params(leaf.path)[:-1], q


def _is_convolution(leaf: Leaf, layout: Layout) -> bool:
    """Whether the kernel has more axes than one of inputs and one of outputs, and no layout that says why."""
    return len(leaf.value.shape) > 2 and "..." not in layout


def _called_method(module: Any) -> str:
    """An embedding acts as a head through `attend`."""
    return "attend" if hasattr(module, "attend") else "__call__"


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a call, which may come by its name."""
    return args[0] if args else next(iter(kwargs.values()))


def _record_linen(
    model: Any,
    variables: Any,
    args: tuple[Any, ...],
    paths: Collection[LayerPath],
    kwargs: dict[str, Any],
) -> list[Call]:
    from flax import linen
    from flax.core.scope import union_filters
    from flax.traverse_util import flatten_dict

    order: list[tuple[LayerPath, int]] = []

    def record(call: Callable, call_args: Any, call_kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.path in paths and context.method_name == _called_method(module):
            # Sown, not kept aside: so it survives linen's own jit and remat, and scan where that is told to.
            given = _first(call_args, call_kwargs)
            module.sow(SOWN, SOWN_NAME, given)
            order.append((module.path, id(given)))
        return call(*call_args, **call_kwargs)

    mutable = union_filters(kwargs.pop("mutable", None) or False, SOWN)
    with linen.intercept_methods(record):
        _, state = model.apply(variables, *args, mutable=mutable, **kwargs)
    sown = {path[:-1]: list(jax.tree.leaves(v)) for path, v in flatten_dict(state.get(SOWN, {})).items()}
    # A scan calls a layer once for all its turns, so that what was sown may be less than what was called.
    # The first layer takes what the model was given, an array of NumPy perhaps.
    return [
        Call(path, jnp.asarray(sown[path].pop(0)), identity) for path, identity in order if sown.get(path)
    ]


def _record_nnx(
    model: Any, args: tuple[Any, ...], paths: Collection[LayerPath], kwargs: dict[str, Any]
) -> list[Call]:
    calls = []
    for path in paths:
        module = model
        for part in path:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        if callable(module):
            _spy(module, path, calls)
    method_name = kwargs.pop("method", None)
    (getattr(model, method_name) if method_name else model)(*args, **kwargs)
    return calls


def _spy(module: Any, path: LayerPath, calls: list[Call]) -> None:
    """Have a module note what it is called with."""
    method = _called_method(module)

    def record(self: Any, *call_args: Any, **call_kwargs: Any) -> Any:
        given = _first(call_args, call_kwargs)
        calls.append(Call(path, jnp.asarray(given), id(given)))
        return getattr(super(recording, self), method)(*call_args, **call_kwargs)

    # Python looks a call up on the class, so the copied module gets one of its own.
    recording = type(type(module).__name__, (type(module),), {method: record})
    object.__setattr__(module, "__class__", recording)
