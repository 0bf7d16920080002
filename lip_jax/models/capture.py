"""The inputs of a head, as the model computes them."""

from collections.abc import Callable
from typing import Any

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

# The collection of a linen model in which the inputs of its head are kept.
SOWN = "lip_jax_head"


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
        head: A path or predicate as in `lip_jax.apply`; a path may also name a convolution, or any other
            layer with a kernel. None: the only kernel with `num_classes` outputs.
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
    from flax import linen, nnx

    check_model(model)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    if isinstance(model, linen.Module):
        variables = variables if "params" in variables else {"params": variables}
        leaves = open_tree(variables).leaves
        leaf = _find_captured(leaves, head, num_classes, layout)
        calls = _record_linen(model, variables, args, without_params(leaf.path)[:-1], apply_kwargs)
    else:
        model = nnx.clone(model)
        if variables is not None:
            nnx.update(model, variables)
        leaves = open_tree(model).leaves
        leaf = _find_captured(leaves, head, num_classes, layout)
        calls = _record_nnx(model, args, leaf.path[:-1], apply_kwargs)
    q = None if _is_convolution(leaf, layout) else matrix_shape(leaf.value.shape, layout)[0]
    if len(calls) != 1 or q not in (None, calls[0].shape[-1]):
        shapes = ", ".join(map(describe, calls)) or "no call"
        if not calls and isinstance(model, linen.Module):
            shapes += f" (inside nn.scan or nn.vmap give these variable_axes={{'{SOWN}': 0, ...}} to see it)"
        raise ValueError(
            f"the module of the head {leaf.name} must be called once, with inputs (..., {q or 'channels'}); "
            f"got {shapes}. Name another head=, or compute its inputs yourself."
        )
    seen = is_concrete(*jax.tree.leaves((args, apply_kwargs)), *(leaf.value for leaf in leaves))
    if seen and not is_concrete(calls[0]):
        raise ValueError(
            f"the head {leaf.name} is called inside a transformation of the model (nnx.jit, nnx.scan, "
            f"nnx.remat), out of which its inputs cannot be taken. Transform the whole model instead."
        )
    return calls[0]


def check_model(model: Any) -> None:
    """Require a flax module of either kind."""
    from flax import linen, nnx

    if not isinstance(model, (linen.Module, nnx.Module)):
        raise ValueError(f"model must be a flax linen or nnx Module; got {type(model).__name__}.")


def _find_captured(leaves: list[Leaf], head: Any, num_classes: int | None, layout: Layout) -> Leaf:
    if head is None and num_classes is None:
        raise ValueError("head or num_classes must be given, to know which layer is the head.")
    if head is None:
        head = lambda _, leaf: matrix_shape(leaf.shape, layout)[1] == num_classes  # noqa: E731
    if isinstance(head, str) and num_classes is None:
        convolutions = named([leaf for leaf in searched(leaves) if _is_convolution(leaf, layout)], head)
        if len(convolutions) == 1:
            return convolutions[0]
    return find_head(leaves, head, layout, None, None, num_classes)


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
    model: Any, variables: Any, args: tuple[Any, ...], path: tuple[str, ...], kwargs: dict[str, Any]
) -> list[jax.Array]:
    from flax import linen
    from flax.core.scope import union_filters

    def record(call: Callable, call_args: Any, call_kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.path == path and context.method_name == _called_method(module):
            # Sown, not kept aside: so it survives linen's own jit and remat, and scan where that is told to.
            module.sow(SOWN, "inputs", _first(call_args, call_kwargs))
        return call(*call_args, **call_kwargs)

    mutable = union_filters(kwargs.pop("mutable", None) or False, SOWN)
    with linen.intercept_methods(record):
        _, state = model.apply(variables, *args, mutable=mutable, **kwargs)
    # The first layer takes what the model was given, an array of NumPy perhaps.
    return [jnp.asarray(call) for call in jax.tree.leaves(state.get(SOWN, {}))]


def _record_nnx(
    model: Any, args: tuple[Any, ...], path: tuple[str, ...], kwargs: dict[str, Any]
) -> list[jax.Array]:
    module = model
    for part in path:
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    calls = []
    method = _called_method(module)

    def record(self: Any, *call_args: Any, **call_kwargs: Any) -> Any:
        calls.append(jnp.asarray(_first(call_args, call_kwargs)))
        return getattr(super(recording, self), method)(*call_args, **call_kwargs)

    # Python looks a call up on the class, so the copied head gets one of its own.
    recording = type(type(module).__name__, (type(module),), {method: record})
    object.__setattr__(module, "__class__", recording)
    method_name = kwargs.pop("method", None)
    (getattr(model, method_name) if method_name else model)(*args, **kwargs)
    return calls
