"""What the features of a layer tell about the classes, by a linear readout learned on them [li2020].

Labels that are wrong spoil the layers of a network unequally: the last ones fit the noise first. The
predictive power of a layer, the test accuracy of a readout learned from a small clean set, shows which.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Integer

from lip_jax._checks import check_floating
from lip_jax._results import STATIC, ShortRepr
from lip_jax._types import Array, Labels, Scalar, Weights
from lip_jax.methods.protocol import Readout
from lip_jax.methods.readout import Solver, linear_readout
from lip_jax.numerics import linalg
from lip_jax.rows.checks import check_label_kind, check_num_classes, check_rows, raise_if_ignored
from lip_jax.rows.labels import as_rows, class_count, label_use, row_use
from lip_jax.rows.metrics import compute_metrics, correct, row_weights, weighted_mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class PredictivePower(ShortRepr):
    """What a linear readout of each layer gets right on test rows.

    Attributes:
        layers: Names, `k` of them.
        width: Features of each.
        accuracy: Test accuracy of the readout: the predictive power.
        standard_error: Of the accuracy, `√(Σ w²(c − accuracy)²)/Σ w`, `c` what is correct of a row.
        balanced_accuracy: See `lip_jax.rows.Metrics`.
        log_loss: Likewise.
        calibration_error: Likewise.
    """

    layers: tuple[str, ...] = field(metadata=STATIC)
    width: Int[jax.Array, "k"]
    accuracy: Float[jax.Array, "k"]
    standard_error: Float[jax.Array, "k"]
    balanced_accuracy: Float[jax.Array, "k"]
    log_loss: Float[jax.Array, "k"]
    calibration_error: Float[jax.Array, "k"]

    def as_dict(self) -> dict:
        """Plain Python values, for JSON."""
        return {name: np.asarray(value).tolist() for name, value in asdict(self).items()}

    def __str__(self) -> str:
        longest = max(map(len, ("layer", *self.layers)))
        lines = [f"{'layer':{longest}}   width  accuracy  ± s.e.  balanced  log-loss     ECE"]
        for i, name in enumerate(self.layers):
            lines.append(
                f"{name:{longest}}{int(self.width[i]):>8}{float(self.accuracy[i]):>10.4f}"
                f"{float(self.standard_error[i]):>8.4f}{float(self.balanced_accuracy[i]):>10.4f}"
                f"{float(self.log_loss[i]):>10.4f}{float(self.calibration_error[i]):>8.4f}"
            )
        return "\n".join(lines)


_MEASURED = tuple(name for name in PredictivePower.__annotations__ if name != "layers")


def predictive_power(
    feats: Float[Array, "n ..."] | Mapping[str, Float[Array, "n ..."]],
    labels: Labels,
    test_feats: Float[Array, "m ..."] | Mapping[str, Float[Array, "m ..."]],
    test_labels: Integer[Array, "m"] | Float[Array, "m l"],
    *,
    num_classes: int | None = None,
    solver: Solver = "ridge",
    ridge: Scalar | None = None,
    weights: Weights | None = None,
) -> PredictivePower:
    """The test accuracy of linear readouts of one or several layers: how good the representations are.

    For each layer `lip_jax.linear_readout` is fitted to `feats`, which may be few, with `labels`, which
    should be clean, and judged on the test rows. Both kinds of readout give logits.

    Args:
        feats: The inputs of a layer, as `lip_jax.capture_features` gives them, or a mapping from names of
            layers to such arrays. Axes after the first are flattened into one, `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)` (`lip_jax.rows`).
        test_feats: As `feats`, of rows the readout has not seen.
        test_labels: Their labels; unlabelled rows count for nothing.
        num_classes: `l`; needed under `jit` where labels are ids. None: the width of targets, or the largest
            id of both sets plus one.
        solver: Which readout: `"ridge"`, or `"logistic"`, which is slower. Take it for classes that
            are ordered along one direction: least squares masks the middle ones.
        ridge: `λ ≥ 0`; None: as `lip_jax.linear_readout` chooses it, for each layer.
        weights: Weight of each fitting row `(n,)`.

    Returns:
        `PredictivePower`, one entry per layer in the order of the mapping; prints as a table.

    Raises:
        ValueError: If the sets name different layers, shapes do not fit or, where values can be seen, a row
            cannot be used.

    Example:
        >>> import jax
        >>> import lip_jax
        >>> labels = jax.random.randint(jax.random.key(0), (300,), 0, 3)
        >>> noise = jax.random.normal(jax.random.key(1), (300, 6))
        >>> layers = {"good": noise + 4 * jax.nn.one_hot(labels, 6), "spoiled": noise}
        >>> clean, test = jax.tree.map(lambda x: x[:60], layers), jax.tree.map(lambda x: x[60:], layers)
        >>> power = lip_jax.predictive_power(clean, labels[:60], test, labels[60:])
        >>> [round(float(accuracy), 1) for accuracy in power.accuracy]
        [1.0, 0.3]

    Reference:
        [li2020], predictive power in representations.
    """
    layers, tested = _by_layer(feats), _by_layer(test_feats)
    if set(layers) != set(tested) or not layers:
        raise ValueError(
            f"feats and test_feats must name the same layers, at least one; got {sorted(layers)} and "
            f"{sorted(tested)}. Capture both sets from the same layers."
        )
    check_label_kind(labels)
    check_label_kind(test_labels)
    check_num_classes(num_classes)
    l = max(class_count(labels, num_classes), class_count(test_labels, num_classes))
    measured = []
    for name in layers:
        try:
            readout = linear_readout(
                flat(layers[name]), labels, num_classes=l, solver=solver, ridge=ridge, weights=weights
            )
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        try:
            measured.append(_measure(readout, flat(tested[name]), test_labels))
        except ValueError as error:
            raise ValueError(f"layer {name!r}, test rows: {error}") from None
    columns = {what: jnp.stack([column[what] for column in measured]) for what in _MEASURED}
    return PredictivePower(layers=tuple(layers), **columns)


def flat(feats: Any) -> Any:
    """Features with one axis after the first, `(n, q)`."""
    shape = getattr(feats, "shape", ())
    return feats.reshape(shape[0], math.prod(shape[1:])) if len(shape) > 2 else feats


def _by_layer(feats: Any) -> Mapping[str, Any]:
    return feats if isinstance(feats, Mapping) else {"features": feats}


def _measure(readout: Readout, feats: Any, labels: Any) -> dict[str, jax.Array]:
    q, l = readout.kernel.shape
    check_floating(feats, "feats", "n q")
    check_rows(q, l, feats, labels, None, None, 0.0, "current")
    rows, ids_or_targets, _, _ = as_rows(feats, labels, None, None)
    measured, ignored = _measure_arrays(readout, rows, ids_or_targets)
    raise_if_ignored(ignored, feats, labels, None, l)
    return measured


@jax.jit
def _measure_arrays(
    readout: Readout, feats: jax.Array, labels: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    logits = linalg.logits_of(feats, readout.kernel, readout.bias)
    metrics = compute_metrics(logits, labels, None)
    weights = row_weights(logits, labels, None)
    total = jnp.sum(weights)
    variance = weighted_mean(weights * (correct(logits, labels) - metrics.accuracy) ** 2, weights)
    # Its derivative is infinite where all rows agree: there, 0 is used.
    varies = variance > 0
    error = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1) / jnp.where(total > 0, total, 1)), 0)
    energy = jnp.sum(feats.astype(logits.dtype) ** 2, axis=1)
    ignored = row_use(energy, label_use(labels, logits.shape[1]), None).ignored
    width = jnp.asarray(feats.shape[1], jnp.int32)
    return {**vars(metrics), "standard_error": error, "width": width}, ignored
