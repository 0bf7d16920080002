"""The repair of a whole network: of its head, or of what stands in the place of its last layers.

A network that memorised wrong labels did so in its last layers first. An earlier layer often keeps features
that tell the classes apart, so that a readout of it is better than any repair of the head [li2020]. Which
layer that is, rows that the network has not seen can tell.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lip_jax._results import ShortRepr
from lip_jax._types import Array, Labels
from lip_jax.choice.compare import Choice, Decision, decide, labels_of
from lip_jax.methods.protocol import Head, is_refit
from lip_jax.models.capture import capture_layers, check_model
from lip_jax.models.lens import head_lens
from lip_jax.models.truncate import truncate_at
from lip_jax.networks.cuts import weigh_cuts
from lip_jax.networks.report import RepairReport
from lip_jax.rows.checks import check_label_kind
from lip_jax.rows.labels import Rows, as_rows, class_count
from lip_jax.rows.metrics import Metrics
from lip_jax.stream.batches import check_count, jax_or_numpy, pad_rows
from lip_jax.stream.features import row_count

# A readout of q features needs `(q, q)` second moments and their eigenvectors.
WIDEST = 8192


@dataclass(frozen=True, repr=False)
class Repaired(ShortRepr):
    """A network as it was repaired.

    Attributes:
        params: Its variables: in the structure they came in where the head was repaired, or left as it was;
            those of the shortened network where it was cut. For an nnx model, an `nnx.State`.
        apply: `apply(params, inputs, **kwargs)` gives logits `(n, l)`.
        layer: Before which layer it was cut, as `lip_jax.truncate_at` does; None where the head stays.
        report: Layers and methods, compared.
    """

    params: PyTree
    apply: Callable[..., jax.Array]
    layer: str | None
    report: RepairReport


def repair(
    model: Any,
    variables: PyTree,
    inputs: Array | tuple[Any, ...] | Iterable[Any],
    labels: Labels | None = None,
    *,
    validation: tuple | Iterable[Any] | None = None,
    seen: bool = True,
    head: str | Callable[[str, Any], bool] | None = None,
    layers: Sequence[str] | None = None,
    num_classes: int | None = None,
    choice: Choice | None = None,
    batch_rows: int = 256,
    **apply_kwargs: Any,
) -> Repaired:
    """Repair a network at the layer where unseen rows show that to be best: its head, or an earlier cut.

    One pass takes the inputs of the head and of layers before it. The head is repaired as `lip_jax.apply`
    does. At each earlier layer the readouts among the methods are fitted, and the network cut there is held
    against the network with its repaired head, by the same two kinds of evidence (`lip_jax.select`) and at
    the level that suits all that was tried. Only a cut that is better by more than that level is made.

    Rows the network was trained on cannot tell which of its layers memorised them. Without `validation=` and
    with `seen=True` only the head is repaired.

    Args:
        model: A linen module, or an `nnx.Module`, which is not changed.
        variables: For linen the variables dict, or its params. For nnx None, or an `nnx.State`.
        inputs: The model's input, or a tuple of its positional arguments, `n` rows; or, with `labels=None`,
            batches of `(inputs, labels)` or `(inputs, labels, weights)`.
        labels: Class ids `(n,)` or targets `(n, l)`.
        validation: `(inputs, labels)` or `(inputs, labels, weights)` of rows that the network has not seen,
            or an iterator of such batches. Labels may be noisy.
        seen: Whether the network was trained on `inputs`. With False they need no second set.
        head: A path or predicate as in `lip_jax.apply`. None: the only kernel with `num_classes` outputs.
        layers: Paths of layers or blocks to cut before. None: every dense layer, and every block or layer
            that is a part of the model itself, if its input has at most 8192 features.
        num_classes: `l`. None: the width of targets, or the largest id plus one.
        choice: Methods, metric and level. None: `lip_jax.Choice()`.
        batch_rows: Rows of one forward pass.
        **apply_kwargs: Passed to the model, such as `train=False`.

    Returns:
        `Repaired`. Features of all layers are held in memory while it is made.

    Raises:
        ValueError: As `lip_jax.models.capture_layers`, `lip_jax.select` and `lip_jax.truncate_at`.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(6), nn.relu, nn.Dense(3)])
        >>> x, labels = jax.random.normal(jax.random.key(0), (300, 4)), jnp.arange(300) % 3
        >>> x = x.at[jnp.arange(300), labels].add(4.0)
        >>> variables = model.init(jax.random.key(1), x)
        >>> choice = lip_jax.Choice((lip_jax.Ridge(),), trust_feats=True)
        >>> options = {"head": "layers_4", "choice": choice, "seen": False}
        >>> repaired = lip_jax.repair(model, variables, x, labels, **options)
        >>> repaired.apply(repaired.params, x).shape
        (300, 3)

    Reference:
        [li2020], a linear model in the place of the final layers; the rule is this package's.
    """
    check_model(model)
    check_count("batch_rows", batch_rows)
    choice = Choice() if choice is None else choice
    if labels is not None and head is None and num_classes is None:
        check_label_kind(labels)
        num_classes = class_count(labels, None)
    state = _state(model) if variables is None and not _is_linen(model) else variables
    capture = partial(capture_layers, model, head=head, layers=layers, **apply_kwargs)
    if head is None:
        capture = partial(capture, num_classes=num_classes)
    take = partial(_compiled(capture), state)
    fit = _gathered(take, _batches("inputs", inputs, labels), batch_rows)
    val = None
    if validation is not None:
        given = _batches("validation", *validation) if isinstance(validation, tuple) else validation
        val = _gathered(take, given, batch_rows)
    path = list(fit.feats)[-1]
    lens = head_lens(state, path, q=fit.feats[path].shape[1], num_classes=num_classes)
    with lens.named():
        held_out = None if val is None else val.rows(path)
        decision = decide(lens.head, fit.rows(path), choice, held_out, seen=seen, keep=True)
    for warning in decision.selection.report.warnings:
        warnings.warn(warning, stacklevel=2)
    report, heads = _compared(path, fit, val, decision, choice, named=layers is not None)
    if report.chosen < 0:
        taken = Head(decision.selection.kernel, decision.selection.bias)
        return Repaired(lens.put(taken), _caller(model, apply_kwargs), None, report)
    layer = report.layers[report.chosen]
    cut = truncate_at(
        model, variables, fit.example, layer, readout=heads[report.chosen], pooled=True, **apply_kwargs
    )
    return Repaired(cut.params, cut.apply, layer, report)


def _compiled(capture: Callable[[Any, Any], dict[str, jax.Array]]) -> Callable[[Any, Any], dict]:
    """`capture`, compiled. What leaves `jax.jit` has its keys sorted, and the order of layers counts."""
    order: list[str] = []

    @jax.jit
    def values(state: Any, inputs: Any) -> list[jax.Array]:
        found = capture(state, inputs)
        order[:] = found
        return list(found.values())

    def take(state: Any, inputs: Any) -> dict[str, jax.Array]:
        # First, as the order is known once it has been traced.
        found = values(state, inputs)
        return dict(zip(order, found, strict=True))

    return take


class _Gathered(NamedTuple):
    """Features by layer, labels, weights, and one row of the model's inputs."""

    feats: dict[str, np.ndarray]
    labels: np.ndarray
    weights: np.ndarray
    example: Any

    def rows(self, layer: str) -> Rows:
        return Rows(self.feats[layer], self.labels, self.weights)


def _compared(
    path: str, fit: _Gathered, val: _Gathered | None, decision: Decision, choice: Choice, *, named: bool
) -> tuple[RepairReport, list[Head]]:
    """Every readout of every layer, held against the head that was taken."""
    head = decision.selection.report
    readouts = tuple(method for method in choice.methods if not is_refit(method))
    others = [layer for layer in fit.feats if layer != path]
    wide = () if named else tuple(layer for layer in others if fit.feats[layer].shape[1] > WIDEST)
    layers = [layer for layer in others if layer not in wide]
    if head.source == "imitation" or not readouts:
        layers = []
    names = labels_of(readouts)
    if decision.also:
        names += tuple(f"{name}, held out" for name in names)
    count = len(choice.methods) + len(layers) * len(names)
    level = float(np.sqrt(choice.num_standard_errors**2 + 2 * np.log(max(count, 1))))
    tried = replace(choice, methods=readouts, num_standard_errors=float(choice.num_standard_errors))
    found, heads = [], []
    for layer in layers:
        rows = Rows(*as_rows(*fit.rows(layer), None)[:3])
        cuts = weigh_cuts(
            rows, None if val is None else jnp.asarray(val.feats[layer]), decision, tried, level
        )
        found.append(jax.device_get(cuts._replace(head=None)))
        heads += [jax.tree.map(lambda leaf, i=i: leaf[i], cuts.head) for i in range(len(names))]
    column = lambda of: np.concatenate([np.asarray(of(cuts)) for cuts in found]) if found else np.zeros(0)  # noqa: E731
    passes, loss = column(lambda c: c.evidence.passes).astype(bool), column(lambda c: c.evidence.loss)
    passes &= bool(head.informed)
    chosen = int(np.argmin(np.where(passes, loss, np.inf))) if passes.any() else -1
    report = RepairReport(
        path=path,
        head=head,
        layers=tuple(layer for layer in layers for _ in names),
        methods=names * len(layers),
        width=np.array([fit.feats[layer].shape[1] for layer in layers for _ in names], int),
        strength=column(lambda c: c.strength),
        available=column(lambda c: c.available).astype(bool),
        passes=passes,
        difference=column(lambda c: c.evidence.metric.difference),
        standard_error=column(lambda c: c.evidence.metric.error),
        likelihood_difference=column(lambda c: c.evidence.likelihood.difference),
        likelihood_error=column(lambda c: c.evidence.likelihood.error),
        over_head=column(lambda c: c.over.metric.difference),
        over_head_error=column(lambda c: c.over.metric.error),
        likelihood_over_head=column(lambda c: c.over.likelihood.difference),
        likelihood_over_head_error=column(lambda c: c.over.likelihood.error),
        noise_loss=loss,
        chosen=chosen,
        too_wide=wide,
        level=level,
        **{
            name: column(lambda c, name=name: getattr(c.evidence.metrics, name))
            for name in Metrics.__annotations__
        },
    )
    return report, heads


def _is_linen(model: Any) -> bool:
    from flax import linen

    return isinstance(model, linen.Module)


def _state(model: Any) -> Any:
    from flax import nnx

    return nnx.state(model)


def _caller(model: Any, options: dict[str, Any]) -> Callable[..., jax.Array]:
    """The whole model as a function of its variables and inputs."""

    def apply(params: PyTree, inputs: Any, **kwargs: Any) -> Any:
        args, kwargs = inputs if isinstance(inputs, tuple) else (inputs,), {**options, **kwargs}
        if _is_linen(model):
            return model.apply(params if "params" in params else {"params": params}, *args, **kwargs)
        from flax import nnx

        whole, method = nnx.clone(model), kwargs.pop("method", None)
        nnx.update(whole, params)
        return (getattr(whole, method) if method else whole)(*args, **kwargs)

    return apply


def _batches(name: str, inputs: Any, labels: Any = None, weights: Any = None) -> Iterable[Any]:
    """What was given as batches, or arrays as one."""
    if labels is not None:
        return [(inputs, labels, weights)]
    if isinstance(inputs, tuple) or hasattr(inputs, "shape"):
        raise ValueError(f"{name} must come with labels, or be batches of (inputs, labels).")
    return inputs


def _gathered(take: Callable[[Any], dict[str, jax.Array]], batches: Iterable[Any], size: int) -> _Gathered:
    """The features of all rows, by passes of so many rows."""
    feats: dict[str, list] = {}
    labels, weights, example = [], [], None
    for index, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise ValueError(
                f"batch {index} must be (inputs, labels) or (inputs, labels, weights); got a "
                f"{type(batch).__name__}."
            )
        inputs, own = jax.tree.map(jax_or_numpy, batch[0]), np.asarray(batch[1])
        held = np.ones(own.shape[:1], np.float32) if len(batch) < 3 or batch[2] is None else batch[2]
        n = row_count(inputs, own, np.asarray(held), index)
        if n and example is None:
            example = jax.tree.map(lambda part: part[:1], inputs)
        for start in range(0, n, size):
            part = jax.tree.map(lambda part, at=start: part[at : at + size], inputs)
            rows = min(size, n - start)
            for layer, found in take(pad_rows(part, size)).items():
                feats.setdefault(layer, []).append(np.asarray(found)[:rows])
        labels.append(own)
        weights.append(np.asarray(held))
    if example is None:
        raise ValueError("inputs and validation must hold at least one row; got none.")
    whole = {layer: np.concatenate(parts) for layer, parts in feats.items()}
    return _Gathered(whole, np.concatenate(labels), np.concatenate(weights), example)
