"""The head inside a parameter tree: find it, refit it, put it back, and see its inputs.

A tree may be a linen `params` dict, a whole variables dict `{"params": …, "batch_stats": …}` (only its
parameters are searched), a `FrozenDict`, an `nnx.State`, an `nnx.Module`, or any pytree whose keys spell
a path such as `params/Dense_2/kernel`. What comes back has the same structure, types, dtypes and
sharding, and shares every leaf but the head's kernel.

Which kernel is the head is never guessed: it is named, or it is the only one of the right shape.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from lip_jax._checks import check_floating, check_label_kind, describe, is_concrete, is_floating, see
from lip_jax._types import Array, Feats, Labels, Rank, Scalar, Weights
from lip_jax.calibrate import refine_calibrated
from lip_jax.refit import raise_if_ignored, refit_kernel
from lip_jax.selection import Family, Metric, SelectionReport, select, select_seen

HeadName = str | Sequence[str] | Callable[[str, Any], bool] | None
Layout = Literal["q l", "l q", "q ...", "... q"]


@dataclass(frozen=True)
class HeadReport:
    """What a refit at a given rank did to one head.

    Attributes:
        path: Where its kernel is, such as `params/head/kernel`.
        shape: `(q, l)`.
        rank: How many leading components were preserved.
        s: Singular values before, `(r,)`.
        sigma: Singular values after, in the order of `s`, `(r,)`.
        ignored: How many rows could not be used (see `lip_jax.labels`); 0 outside `jit`.
    """

    path: str
    shape: tuple[int, int]
    rank: Rank
    s: Float[jax.Array, "r"]
    sigma: Float[jax.Array, "r"]
    ignored: Int[jax.Array, ""]

    def __str__(self) -> str:
        change = float(jnp.linalg.norm(self.sigma - self.s) / jnp.maximum(jnp.linalg.norm(self.s), 1e-30))
        return (
            f"{self.path} {self.shape}: {int(self.rank)} of {self.s.shape[0]} components preserved, "
            f"the rest refitted; relative change of the kernel {change:.3g}"
        )


jax.tree_util.register_dataclass(
    HeadReport, data_fields=("rank", "s", "sigma", "ignored"), meta_fields=("path", "shape")
)


Report = HeadReport | SelectionReport


def apply(
    params: PyTree,
    feats: Feats | Mapping[str, Feats],
    labels: Labels | Mapping[str, Labels],
    *,
    rank: Rank | Mapping[str, Rank] | None = None,
    validation: tuple | Mapping[str, tuple] | None = None,
    head: HeadName = None,
    num_classes: int | None = None,
    weights: Weights | Mapping[str, Weights] | None = None,
    method: Literal["published", "calibrated"] = "published",
    families: Sequence[str | Family] = ("published", "calibrated", "ridge"),
    metric: Metric = "accuracy",
    level: float = 3.0,
    use_bias: bool = False,
    ridge: Scalar = 0.0,
    ridge_to: Literal["current", "zero"] = "current",
    rcond: Scalar | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> PyTree:
    """Repair the head inside a model's parameters, or leave it as it is where that is better.

    - With `validation=`, `lip_jax.select` chooses among refits, readouts and the head as it came, by labels
      the head has not seen. This is the way to use it.
    - With `rank=`, exactly that refit is made: `lip_jax.refine`, or with `method="calibrated"`
      `lip_jax.refine_calibrated`.
    - With neither, the same choice is made on the given rows, which the head has seen: candidates are fitted
      on one half and judged on the other, where the head is favoured, and if it agrees with those labels far
      more than a readout that has not seen them, they look memorised: the head comes back unchanged, with a
      warning. Deterministic, and conservative: mostly the head comes back as it was.

    Where the body of the network memorised its training labels, pass rows held out from it for `feats` and
    `labels` too. Works inside `jax.jit`, with the head named or `num_classes` given; there the report tells
    what the warning would.

    Args:
        params: The parameters, in any of the forms this module's docstring lists.
        feats: Inputs of the head `(n, q)`, as `lip_jax.capture_features` gives them. With several
            heads: one array for all, or a mapping from the names in `head` to arrays.
        labels: Class ids `(n,)` or targets `(n, l)` (`lip_jax.labels`); for several heads as `feats`.
        rank: How many leading components are preserved, 0 to `min(q, l)`; for several heads as `feats`.
        validation: `(feats, labels)` or `(feats, labels, weights)` to choose by; for several heads as
            `feats`.
        head: A path to the head, with or without the leading `params/` and the leaf's name (`"Dense_2"`,
            `"params/head/kernel"`); several paths; or a predicate `(path, leaf) -> bool` that holds for
            one leaf. None: the only kernel of shape `(q, l)`, with `l` from `num_classes`, the width of
            targets, or the largest id plus one.
        num_classes: `l`, needed under `jit` where `head` is None and labels are ids.
        weights: Weight of each row `(n,)`; for several heads as `feats`.
        method: Which refit `rank=` makes: the paper's, of the kernel alone, or the calibrated one for softmax
            heads, of kernel and bias.
        families: What to choose among, as in `lip_jax.select`.
        metric: By which metric, as in `lip_jax.select`.
        level: By how many standard errors, as in `lip_jax.select`.
        use_bias: For the published refit take `Y − b` for targets, with `b` the head's bias if it has one,
            which itself is not changed. False is the strict paper.
        ridge: `λ ≥ 0`, as in `lip_jax.solve_tail_sigma`.
        ridge_to: `"current"` or `"zero"`.
        rcond: Default `eps · max(q, l)`; 0 is the literal paper.
        layout: How the kernel is stored: `"q l"` (Flax), `"l q"` (transposed), `"q ..."` or `"... q"`
            (several output axes, taken as one of `l` outputs).
        allow_tied: Refit a kernel that is also used elsewhere (an embedding, a shared parameter).

    Returns:
        New parameters; for an `nnx.Module`, a new module.

    Raises:
        ValueError: If no kernel or several could be the head (all are listed), the kernel is tied, or
            as `lip_jax.refine` and `lip_jax.select`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> params = {"hidden": {"kernel": jnp.ones((4, 8))}, "head": {"kernel": jnp.eye(8, 3)}}
        >>> feats, labels = jax.random.normal(jax.random.key(0), (100, 8)), jnp.arange(100) % 3
        >>> repaired = lip_jax.apply(params, feats, labels, rank=2)
        >>> [bool(jnp.array_equal(repaired[name]["kernel"], params[name]["kernel"])) for name in params]
        [True, False]

    Reference:
        [si2025], the label inaccuracy processor; [li2020], readouts.
    """
    repaired, _ = apply_with_report(
        params,
        feats,
        labels,
        rank=rank,
        validation=validation,
        head=head,
        num_classes=num_classes,
        weights=weights,
        method=method,
        families=families,
        metric=metric,
        level=level,
        use_bias=use_bias,
        ridge=ridge,
        ridge_to=ridge_to,
        rcond=rcond,
        layout=layout,
        allow_tied=allow_tied,
    )
    return repaired


def apply_with_report(
    params: PyTree,
    feats: Feats | Mapping[str, Feats],
    labels: Labels | Mapping[str, Labels],
    *,
    rank: Rank | Mapping[str, Rank] | None = None,
    validation: tuple | Mapping[str, tuple] | None = None,
    head: HeadName = None,
    num_classes: int | None = None,
    weights: Weights | Mapping[str, Weights] | None = None,
    method: Literal["published", "calibrated"] = "published",
    families: Sequence[str | Family] = ("published", "calibrated", "ridge"),
    metric: Metric = "accuracy",
    level: float = 3.0,
    use_bias: bool = False,
    ridge: Scalar = 0.0,
    ridge_to: Literal["current", "zero"] = "current",
    rcond: Scalar | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> tuple[PyTree, Report | dict[str, Report]]:
    """`apply`, and a report of what was done: `(params, report)`.

    Args:
        params: As in `apply`, and so are all arguments below.
        feats: Inputs of the head `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`.
        rank: How many leading components are preserved.
        validation: Rows to choose by.
        head: A path, several, a predicate, or None.
        num_classes: `l`.
        weights: Weight of each row `(n,)`.
        method: Which refit `rank=` makes.
        families: What to choose among.
        metric: By which metric.
        level: By how many standard errors.
        use_bias: Take `Y − b` for targets.
        ridge: `λ ≥ 0`.
        ridge_to: `"current"` or `"zero"`.
        rcond: Default `eps · max(q, l)`.
        layout: How the kernel is stored.
        allow_tied: Refit a kernel that is also used elsewhere.

    Returns:
        New parameters and a report: a `HeadReport` for `rank=`, else a `SelectionReport`; where `head` is a
        sequence, a dict of reports by name.

    Raises:
        ValueError: As `apply`.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> params = {"head": {"kernel": jnp.diag(jnp.array([3.0, 2.0]))}}
        >>> _, report = lip_jax.apply_with_report(params, jnp.eye(2), jnp.array([0, 1]), rank=1)
        >>> print(report)
        head/kernel (2, 2): 1 of 2 components preserved, the rest refitted; relative change of the
        kernel 0.277

    Reference:
        [si2025], the label inaccuracy processor.
    """
    opened = _open(params)
    several = isinstance(head, Sequence) and not isinstance(head, str)
    names = list(head) if isinstance(head, Sequence) and not isinstance(head, str) else [head]
    reports, changed = {}, {}
    for name in names:
        given = {
            what: _for_head(value, name, what)
            for what, value in {
                "feats": feats,
                "labels": labels,
                "weights": weights,
                "rank": rank,
                "validation": validation,
            }.items()
        }
        check_floating(given["feats"], "feats", "n q")
        check_label_kind(given["labels"])
        leaf = _find_head(opened.leaves, name, layout, given["feats"], given["labels"], num_classes)
        ties = _ties(opened, leaf)
        if ties and not allow_tied:
            raise ValueError(
                f"the head's kernel {leaf.name} is tied: {ties}, so refitting it would change more than the "
                f"head. Untie it, or pass allow_tied=True if that is meant."
            )
        if leaf.path in changed:
            raise ValueError(f"head = {names} names the kernel {leaf.name} more than once.")
        kernel = _as_matrix(jnp.asarray(leaf.value), layout)
        bias_leaf = _bias_leaf(opened.leaves, leaf, kernel.shape[1])
        bias = None if bias_leaf is None else jnp.asarray(bias_leaf.value).reshape(-1)
        try:
            if given["rank"] is None:
                kernel, bias, report = _select(
                    kernel, bias, **given, families=families, metric=metric, level=level
                )
            elif given["validation"] is not None:
                raise ValueError("rank and validation exclude each other: rank= refits at that rank unasked.")
            else:
                kernel, bias, report = _refit(
                    kernel, bias, leaf.name, **given, method=method, use_bias=use_bias,
                    ridge=ridge, ridge_to=ridge_to, rcond=rcond,
                )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"head {leaf.name}: {error}") from None
        stored = _like(_from_matrix(kernel, leaf.value.shape, layout), leaf.value)
        changed.update({twin.path: stored for twin in _twins(opened.leaves, leaf)})
        if bias_leaf is not None and bias is not None:
            changed[bias_leaf.path] = _like(bias.reshape(bias_leaf.value.shape), bias_leaf.value)
        reports[name] = report
    repaired = opened.rebuild([changed.get(leaf.path, leaf.value) for leaf in opened.leaves])
    return repaired, reports if several else reports[names[0]]


def _refit(
    kernel, bias, path, *, feats, labels, weights, rank, validation, method, use_bias, ridge, ridge_to, rcond
) -> tuple[jax.Array, jax.Array | None, HeadReport]:
    """Exactly the refit that was asked for."""
    if method == "calibrated":
        if ridge_to != "current" or use_bias:
            raise ValueError("ridge_to='zero' and use_bias belong to method='published'; leave them out.")
        head = refine_calibrated(kernel, bias, feats, labels, rank, weights=weights, ridge=ridge, rcond=rcond)
        report = HeadReport(path, kernel.shape, rank, head.s, head.sigma, head.ignored)
        return head.kernel, head.bias, report
    if method != "published":
        raise ValueError(f"method must be 'published' or 'calibrated'; got {method!r}.")
    refit = refit_kernel(
        kernel,
        feats,
        labels,
        rank,
        weights=weights,
        bias=bias if use_bias else None,
        ridge=ridge,
        ridge_to=ridge_to,
        rcond=rcond,
    )
    raise_if_ignored(refit.ignored, feats, labels, weights, kernel.shape[1])
    return refit.kernel, bias, HeadReport(path, kernel.shape, rank, refit.s, refit.sigma, refit.ignored)


def _select(
    kernel, bias, *, feats, labels, weights, rank, validation, families, metric, level
) -> tuple[jax.Array, jax.Array | None, SelectionReport]:
    """The choice by validation rows, or the default without any."""
    if validation is not None:
        chosen = select(
            kernel,
            bias,
            feats,
            labels,
            validation=validation,
            weights=weights,
            families=families,
            metric=metric,
            level=level,
        )
        return chosen.kernel, chosen.bias, chosen.report
    chosen = select_seen(
        kernel, bias, feats, labels, weights=weights, families=families, metric=metric, level=level
    )
    if is_concrete(chosen.report.memorised) and bool(chosen.report.memorised):
        warnings.warn(
            "the head agrees with these labels far more than a readout that has not seen them: it has "
            "memorised them, so they cannot tell what would repair it. It is returned unchanged. Pass "
            "validation=(feats, labels) of rows it was not trained on; their labels may be noisy.",
            stacklevel=4,
        )
    return chosen.kernel, chosen.bias, chosen.report


class _Leaf(NamedTuple):
    path: tuple[str, ...]
    value: Any

    @property
    def name(self) -> str:
        return "/".join(self.path)


class _Opened(NamedTuple):
    """A tree as named leaves, with the way back; `shared` holds the paths one nnx variable has."""

    leaves: list[_Leaf]
    rebuild: Callable[[list[Any]], PyTree]
    shared: list[list[tuple[str, ...]]]


def _open(params: PyTree) -> _Opened:
    shared: list[list[tuple[str, ...]]] = []
    wrap: Callable[[PyTree], PyTree] = lambda tree: tree  # noqa: E731
    if _is_nnx_module(params):
        from flax import nnx

        duplicates = nnx.find_duplicates(params)
        shared = [[tuple(map(str, path)) for path in paths] for paths in duplicates]
        graphdef, params = nnx.split(params)
        wrap = lambda state: nnx.merge(graphdef, state)  # noqa: E731
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [_Leaf(_path_names(path), value) for path, value in with_paths]
    return _Opened(leaves, lambda values: wrap(jax.tree_util.tree_unflatten(treedef, values)), shared)


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


def _searched(leaves: list[_Leaf]) -> list[_Leaf]:
    """The leaves that may be kernels: in a variables dict, only the parameters."""
    inside = [leaf for leaf in leaves if leaf.path[0] == "params" and len(leaf.path) > 1]
    return [leaf for leaf in inside or leaves if is_floating(leaf.value) and len(leaf.value.shape) >= 2]


def _find_head(
    leaves: list[_Leaf],
    head: Any,
    layout: Layout,
    feats: Any,
    labels: Any,
    num_classes: int | None,
) -> _Leaf:
    if layout not in ("q l", "l q", "q ...", "... q"):
        raise ValueError(f"layout must be 'q l', 'l q', 'q ...' or '... q'; got {layout!r}.")
    kernels = [leaf for leaf in _searched(leaves) if len(leaf.value.shape) == 2 or "..." in layout]
    if head is None:
        q, l = feats.shape[1], _class_count(labels, num_classes)
        found = [leaf for leaf in kernels if _matrix_shape(leaf.value.shape, layout) == (q, l)]
        sought = f"a kernel ({layout}) with q = {q} (width of feats) and l = {l} (classes)"
    elif callable(head):
        found = [leaf for leaf in kernels if head(leaf.name, leaf.value)]
        sought = "a kernel for which the predicate head holds"
    else:
        found = _named(kernels, head)
        sought = f"a kernel at head = {head!r}"
    if len(found) == 1:
        leaf = found[0]
        outputs = _matrix_shape(leaf.value.shape, layout)[1]
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
    if len(labels.shape) == 2:
        return labels.shape[1]
    if not is_concrete(labels):
        raise ValueError(
            "head is not named and num_classes is not given, and the largest class id cannot be seen under "
            "jit. Pass head= or num_classes=."
        )
    return int(see(lambda: jnp.asarray(labels).max(initial=-1))) + 1


def _named(kernels: list[_Leaf], head: str) -> list[_Leaf]:
    """The leaf at this very path, or else the kernel of the module at this path."""
    wanted = _without_params(tuple(part for part in head.split("/") if part))
    exact = [leaf for leaf in kernels if _without_params(leaf.path) == wanted]
    inside = [leaf for leaf in kernels if _without_params(leaf.path)[:-1] == wanted]
    return exact or [leaf for leaf in inside if leaf.path[-1] == "kernel"] or inside


def _without_params(path: tuple[str, ...]) -> tuple[str, ...]:
    return path[1:] if path[:1] == ("params",) else path


def _ties(opened: _Opened, leaf: _Leaf) -> str:
    """Where else the kernel is used, in words; empty if nowhere."""
    for paths in opened.shared:
        # A duplicate may be the variable itself or a module that holds it.
        if any(leaf.path[: len(path)] == path for path in paths):
            return "it is shared between " + " and ".join("/".join(path) for path in paths)
    twins = _twins(opened.leaves, leaf)
    if len(twins) > 1:
        return "the same array stands at " + " and ".join(twin.name for twin in twins)
    if leaf.path[-1] == "embedding":
        return "an embedding is read by ids as well"
    return ""


def _twins(leaves: list[_Leaf], leaf: _Leaf) -> list[_Leaf]:
    """The leaf itself and every parameter that is the very same array."""
    return [other for other in _searched(leaves) if other.value is leaf.value]


def _bias_leaf(leaves: list[_Leaf], kernel: _Leaf, l: int) -> _Leaf | None:
    path = (*kernel.path[:-1], "bias")
    return next((leaf for leaf in leaves if leaf.path == path and leaf.value.size == l), None)


def _matrix_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    if layout in ("q l", "q ..."):
        return shape[0], int(np.prod(shape[1:]))
    return shape[-1], int(np.prod(shape[:-1]))


def _as_matrix(kernel: jax.Array, layout: Layout) -> jax.Array:
    q, l = _matrix_shape(kernel.shape, layout)
    return kernel.reshape(q, l) if layout in ("q l", "q ...") else kernel.reshape(l, q).T


def _from_matrix(matrix: jax.Array, shape: tuple[int, ...], layout: Layout) -> jax.Array:
    return (matrix if layout in ("q l", "q ...") else matrix.T).reshape(shape)


def _like(array: jax.Array, original: Any) -> Any:
    """The array as the original is held: in NumPy, or on the same devices with the same sharding."""
    if isinstance(original, np.ndarray) and is_concrete(array):
        return np.asarray(array)
    if is_concrete(array, original) and isinstance(original, jax.Array):
        return jax.device_put(array, original.sharding)
    return array


def _for_head(value: Any, name: Any, what: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(
            f"{what} is a mapping by head name and lacks {name!r}; it holds {sorted(value)}. "
            f"Its keys must be the names given in head=."
        )
    return value[name]


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
    for speed: `jax.jit(lambda x: capture_features(model, variables, x, head="head"))`.

    Args:
        model: A linen module, or an `nnx.Module` (which is copied, not touched).
        variables: For linen the variables dict, or its params. For nnx None, or an `nnx.State` to use in
            place of the module's own.
        inputs: The model's input, or a tuple of its positional arguments.
        head: A path or predicate as in `lip_jax.apply`. None: the only kernel with `num_classes` outputs.
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

    args = inputs if isinstance(inputs, tuple) else (inputs,)
    if isinstance(model, linen.Module):
        variables = variables if "params" in variables else {"params": variables}
        leaf = _find_captured(_open(variables).leaves, head, num_classes, layout)
        calls = _record_linen(model, variables, args, _without_params(leaf.path)[:-1], apply_kwargs)
    elif isinstance(model, nnx.Module):
        model = nnx.clone(model)
        if variables is not None:
            nnx.update(model, variables)
        leaf = _find_captured(_open(model).leaves, head, num_classes, layout)
        calls = _record_nnx(model, args, leaf.path[:-1], apply_kwargs)
    else:
        raise ValueError(f"model must be a flax linen or nnx Module; got {type(model).__name__}.")
    q = _matrix_shape(leaf.value.shape, layout)[0]
    if len(calls) != 1 or calls[0].shape[-1] != q:
        shapes = ", ".join(map(describe, calls)) or "no call"
        raise ValueError(
            f"the module of the head {leaf.name} must be called once, with inputs (..., {q}); got {shapes}. "
            f"Name another head=, or compute its inputs yourself."
        )
    if is_concrete(*jax.tree.leaves((args, leaf.value))) and not is_concrete(calls[0]):
        raise ValueError(
            f"the head {leaf.name} is called inside a transformation of the model (nnx.jit, nnx.scan, "
            f"nnx.remat), out of which its inputs cannot be taken. Transform the whole model instead."
        )
    return calls[0]


def _find_captured(leaves: list[_Leaf], head: Any, num_classes: int | None, layout: Layout) -> _Leaf:
    if head is None and num_classes is None:
        raise ValueError("head or num_classes must be given, to know which layer is the head.")
    if head is None:
        head = lambda _, leaf: _matrix_shape(leaf.shape, layout)[1] == num_classes  # noqa: E731
    return _find_head(leaves, head, layout, None, None, num_classes)


def _called_method(module: Any) -> str:
    """An embedding acts as a head through `attend`."""
    return "attend" if hasattr(module, "attend") else "__call__"


def _record_linen(model, variables, args, path, kwargs) -> list[jax.Array]:
    from flax import linen

    collection = "lip_jax_head"

    def record(call, call_args, call_kwargs, context):
        module = context.module
        if module.path == path and context.method_name == _called_method(module):
            # Sown, not kept aside: so it survives linen's own jit, remat and scan.
            module.sow(collection, "inputs", call_args[0])
        return call(*call_args, **call_kwargs)

    mutable = kwargs.pop("mutable", [])
    mutable = [mutable] if isinstance(mutable, str) else list(mutable or [])
    with linen.intercept_methods(record):
        _, state = model.apply(variables, *args, mutable=[*mutable, collection], **kwargs)
    return jax.tree.leaves(state.get(collection, {}))


def _record_nnx(model, args, path, kwargs) -> list[jax.Array]:
    module = model
    for part in path:
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    calls = []
    method = _called_method(module)

    def record(self, x, *call_args, **call_kwargs):
        calls.append(x)
        return getattr(super(recording, self), method)(x, *call_args, **call_kwargs)

    # Python looks a call up on the class, so the copied head gets one of its own.
    recording = type(type(module).__name__, (type(module),), {method: record})
    object.__setattr__(module, "__class__", recording)
    method_name = kwargs.pop("method", None)
    (getattr(model, method_name) if method_name else model)(*args, **kwargs)
    return calls
