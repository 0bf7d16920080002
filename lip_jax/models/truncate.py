"""A network cut short at a layer, with a readout in the place of what came after [li2020].

The paper's readout replaces the final dense layers, plural: the features of an earlier layer are often
cleaner than those of the last. What the shortened network needs of the variables is read off the jaxpr of its
features: a variable from which no path leads to them is dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lip_jax._checks import describe
from lip_jax._results import STATIC, ShortRepr
from lip_jax._types import Array
from lip_jax.models.capture import capture_features, check_model
from lip_jax.models.capture import pooled as averaged
from lip_jax.models.layers import flat
from lip_jax.models.lens import AnyHead, as_head
from lip_jax.models.trees import Layout
from lip_jax.numerics import linalg

Path = tuple[Any, ...]

# Primitives whose inner jaxpr takes and gives what they do, in order. All others, known or not, count as
# using whatever enters them.
_CALLS = ("jit", "pjit", "remat2", "checkpoint")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Truncated(ShortRepr):
    """A network up to the input of a layer, and a readout in place of the rest.

    Attributes:
        params: What it needs: for linen a variables dict, for nnx an `nnx.State`.
        apply: `apply(params, inputs, **kwargs)` gives logits `(n, l)`, or features without a readout.
            It holds no arrays: only those in `params` stay alive.
    """

    params: PyTree
    apply: Callable[..., jax.Array] = field(metadata=STATIC)


def truncate_at(
    model: Any,
    variables: PyTree,
    inputs: Array | tuple[Any, ...],
    layer: str | Callable[[str, Any], bool],
    *,
    readout: AnyHead | None = None,
    name: str = "readout",
    pooled: bool = False,
    layout: Layout = "q l",
    **apply_kwargs: Any,
) -> Truncated:
    """Cut a network at the input of a layer, and put a readout there: a network of fewer variables.

    `apply(params, x)` is the readout of `capture_features(model, variables, x, head=layer)`, with all axes
    after the first taken as one. It can be differentiated with respect to `params`, and put under `jax.jit`,
    where what comes after the layer is not computed. The readout stands in `params` like any other layer, so
    that `lip_jax.apply` and `lip_jax.replace_head` find it by `head="readout"`.

    Args:
        model: A linen module, or an `nnx.Module` (which is not touched).
        variables: For linen the variables dict, or its params. For nnx None, or an `nnx.State` to use in
            place of the module's own.
        inputs: An example of the model's input, or a tuple of its positional arguments; a row is enough.
        layer: The first layer to leave out: a path or predicate as `head` in `lip_jax.capture_features`.
        readout: What a readout function returns, or another pair of kernel `(q, l)` and bias `(l,)` or
            None, fitted to the features of this layer (`lip_jax.linear_readout`). None: the network ends in
            the features.
        name: What the readout is called in `params`.
        pooled: Whether the readout takes means over the axes between rows and features, such as those of
            images, as `lip_jax.models.capture_layers` gives them. Else these axes are flattened.
        layout: How the layer's kernel is stored, as in `lip_jax.apply`.
        **apply_kwargs: Passed to the model, e.g. `train=False`; those given to `apply` are put above them.

    Returns:
        A `Truncated`. The variables it keeps are those that came.

    Raises:
        ValueError: If the layer is not found or not called exactly once, the readout does not fit its input,
            or the network has a layer of the readout's name; from `apply`, if its arguments make variables
            count that were dropped.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8), nn.relu, nn.Dense(3)])
        >>> x, labels = jax.random.normal(jax.random.key(0), (60, 4)), jnp.arange(60) % 3
        >>> variables = model.init(jax.random.key(1), x)
        >>> feats = lip_jax.capture_features(model, variables, x, head="layers_2")
        >>> readout = lip_jax.linear_readout(feats, labels)
        >>> cut = lip_jax.truncate_at(model, variables, x[:1], "layers_2", readout=readout)
        >>> sorted(cut.params["params"]), cut.apply(cut.params, x).shape
        (['layers_0', 'readout'], (60, 3))

    Reference:
        [li2020], a linear model in the place of the final layers.
    """
    check_model(model)
    network, given = _open_linen(model, variables) if _is_linen(model) else _open_nnx(model, variables)

    def features(leaves: dict[Path, Any], inputs: Any, kwargs: dict[str, Any]) -> jax.Array:
        return network.features(leaves, inputs, {"head": layer, "layout": layout, **apply_kwargs, **kwargs})

    # One real pass: it tells the width, and what cannot be captured says so.
    arranged = averaged if pooled else flat
    width = arranged(features(given, inputs, {})).shape[1]
    used = _used(lambda leaves: features(leaves, inputs, {}), given)
    kept = {path: leaf for path, leaf in given.items() if path in used}
    dropped = {
        path: jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), leaf)
        for path, leaf in given.items()
        if path not in used
    }
    top = (*network.root, name)
    if any(path[: len(top)] == top for path in kept):
        raise ValueError(
            f"the network has a layer {name!r} before the cut, so the readout cannot be called so. Give it "
            f"another name=."
        )

    head = {}
    if readout is not None:
        kernel, bias = as_head(readout)
        if kernel.shape[0] != width:
            raise ValueError(
                f"the readout's kernel must have as many rows as the layer has inputs, flattened: "
                f"q = {width}; got {describe(kernel)}. Fit it to lip_jax.capture_features(model, variables, "
                f"x, head=layer), reshaped to (n, q)."
            )
        held = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
        head = {(*top, part): network.box(jnp.asarray(array)) for part, array in held.items()}

    # Paths alone: `apply` must not keep the arrays alive.
    parts = tuple(head)

    def apply(params: PyTree, inputs: Any, **kwargs: Any) -> jax.Array:
        leaves = network.flatten(params)
        readout = {path[-1]: jax.tree.leaves(leaves.pop(path))[0] for path in parts}
        counting = _used(lambda filled: features({**filled, **leaves}, inputs, kwargs), dropped)
        if counting:
            raise ValueError(
                f"with these arguments the features depend on variables that were dropped when the network "
                f"was cut: {', '.join(sorted('/'.join(map(str, path)) for path in counting))}. Pass the same "
                f"arguments to lip_jax.truncate_at."
            )
        filled = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), dropped)
        feats = arranged(features({**filled, **leaves}, inputs, kwargs))
        return linalg.logits_of(feats, readout["kernel"], readout.get("bias")) if readout else feats

    return Truncated(network.nest({**kept, **head}), apply)


class _Network(NamedTuple):
    """How a tree of variables becomes variables by path, and back, and the features that they give.

    `root` is where its layers stand in the tree, and `box` makes an array a variable of it.
    """

    flatten: Callable[[PyTree], dict[Path, Any]]
    nest: Callable[[dict[Path, Any]], PyTree]
    features: Callable[[dict[Path, Any], Any, dict[str, Any]], jax.Array]
    root: Path
    box: Callable[[jax.Array], Any]


def _is_linen(model: Any) -> bool:
    from flax import linen

    return isinstance(model, linen.Module)


def _open_linen(model: Any, variables: PyTree) -> tuple[_Network, dict[Path, Any]]:
    from flax.traverse_util import flatten_dict, unflatten_dict

    variables = variables if "params" in variables else {"params": variables}
    network = _Network(
        flatten=flatten_dict,
        # A network may need no parameters at all; linen asks for the collection even so.
        nest=lambda leaves: {"params": {}, **unflatten_dict(leaves)},
        features=lambda leaves, inputs, options: capture_features(
            model, unflatten_dict(leaves), inputs, **options
        ),
        root=("params",),
        box=lambda array: array,
    )
    return network, flatten_dict(variables)


def _open_nnx(model: Any, variables: PyTree) -> tuple[_Network, dict[Path, Any]]:
    from flax import nnx

    if variables is not None:
        model = nnx.clone(model)
        nnx.update(model, variables)
    graphdef, state = nnx.split(model)
    nest = lambda leaves: nnx.from_flat_state(leaves)  # noqa: E731
    flatten = lambda state: dict(nnx.to_flat_state(state))  # noqa: E731
    network = _Network(
        flatten=flatten,
        nest=nest,
        features=lambda leaves, inputs, options: capture_features(
            nnx.merge(graphdef, nest(leaves)), None, inputs, **options
        ),
        root=(),
        box=nnx.Param,
    )
    return network, flatten(state)


def _used(function: Callable[[dict[Path, Any]], jax.Array], leaves: dict[Path, Any]) -> set[Path]:
    """The paths on which the result may depend."""
    # Not a dict: JAX sorts its keys, and those of nnx, integers and strings, have no order.
    paths = list(leaves)
    jaxpr = jax.make_jaxpr(lambda values: function(dict(zip(paths, values, strict=True))))(
        list(leaves.values())
    ).jaxpr
    owners = [path for path in paths for _ in jax.tree.leaves(leaves[path])]
    reaches = _inputs_that_reach(jaxpr, [True] * len(jaxpr.outvars))
    return {path for path, reached in zip(owners, reaches, strict=True) if reached}


def _inputs_that_reach(jaxpr: Any, wanted: list[bool]) -> list[bool]:
    """Which inputs of a jaxpr the wanted ones of its outputs may depend on."""
    reaching = set(_variables(jaxpr.outvars, wanted))
    for equation in reversed(jaxpr.eqns):
        outputs = [var in reaching for var in equation.outvars]
        if not any(outputs):
            continue
        if equation.primitive.name in _CALLS:
            inner = equation.params["jaxpr"]
            inputs = _inputs_that_reach(getattr(inner, "jaxpr", inner), outputs)
        else:
            inputs = [True] * len(equation.invars)
        reaching.update(_variables(equation.invars, inputs))
    return [var in reaching for var in jaxpr.invars]


def _variables(atoms: Sequence[Any], wanted: list[bool]) -> list[Any]:
    """The wanted ones, without literals, which have a value."""
    return [atom for atom, want in zip(atoms, wanted, strict=True) if want and not hasattr(atom, "val")]
