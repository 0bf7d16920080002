"""Metrics of logits: accuracy, balanced accuracy, log-loss and calibration error.

Labels may be of every kind `lip_jax.rows` lists. With targets `(n, l)` a row is correct to the degree
`y[argmax]`, and its loss is `−Σ_c y_c log p_c`. Rows that cannot be used count for nothing.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lip_jax._checks import check_floating, describe
from lip_jax._results import ShortRepr
from lip_jax._types import Array, Labels, Weights
from lip_jax.numerics.linalg import compute_dtype
from lip_jax.rows.checks import check_labels, check_weights
from lip_jax.rows.labels import as_labels, label_use, row_use

Logits = Float[Array, "n l"]

NUM_BINS = 15


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Metrics(ShortRepr):
    """Scalars over one set of rows.

    Attributes:
        accuracy: Share of rows whose largest logit is the label's; of equal logits the first counts.
        balanced_accuracy: Mean over the classes present of the accuracy within each.
        log_loss: Mean cross-entropy of the softmax.
        calibration_error: Expected calibration error, 15 equal bins of confidence.
    """

    accuracy: Float[jax.Array, ""]
    balanced_accuracy: Float[jax.Array, ""]
    log_loss: Float[jax.Array, ""]
    calibration_error: Float[jax.Array, ""]


def head_metrics(logits: Logits, labels: Labels, *, weights: Weights | None = None) -> Metrics:
    """All four metrics of one head on one set of rows.

    `ECE = Σ_b |Σ_{n∈b} w_n (correct_n − confidence_n)| / Σ w`. Rows that cannot be used, such as those with
    an id of `l` or more or a logit that is not finite, count for nothing even where values can be seen.

    Args:
        logits: `(n, l)`, `l ≥ 2`.
        labels: Class ids `(n,)` or targets `(n, l)`.
        weights: Weight of each row `(n,)`.

    Returns:
        `Metrics`; all 0 where no row counts.

    Raises:
        ValueError: If `logits`, `labels` and `weights` do not fit, or `logits` have one column.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> metrics = lip_jax.head_metrics(jnp.array([[2.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1]))
        >>> float(metrics.accuracy), round(float(metrics.log_loss), 4)
        (0.5, 0.7201)

    Reference:
        Calibration error: [guo2017], equation 3.
    """
    check_floating(logits, "logits", "n l")
    if logits.shape[1] < 2:
        raise ValueError(
            f"logits must have at least two columns, for a softmax; got {describe(logits)}. For a single "
            f"output z and labels of 0 and 1 pass class ids and the columns 0 and z."
        )
    check_labels(labels, *logits.shape)
    check_weights(weights, logits.shape[0])
    return compute_metrics(
        jnp.asarray(logits), as_labels(labels), None if weights is None else jnp.asarray(weights)
    )


@jax.jit
def compute_metrics(logits: jax.Array, labels: jax.Array, weights: jax.Array | None) -> Metrics:
    """`head_metrics` on checked arguments."""
    logits = logits.astype(compute_dtype(logits))
    weights = row_weights(logits, labels, weights)
    hit = correct(logits, labels)
    # The gradient of max tests equality, which logits fail that XLA recomputes with other rounding.
    confidence = jnp.exp(-losses(logits, jnp.argmax(logits, axis=1)))
    bins = jnp.clip((confidence * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)
    gap = jnp.where(weights > 0, weights * (hit - confidence), 0)
    gaps = jnp.zeros(NUM_BINS, logits.dtype).at[bins].add(gap)
    total = jnp.sum(weights)
    return Metrics(
        accuracy=weighted_mean(hit, weights),
        balanced_accuracy=weighted_mean(*balanced_correct(logits, labels, weights)),
        log_loss=weighted_mean(losses(logits, labels), weights),
        calibration_error=jnp.sum(jnp.abs(gaps)) / jnp.where(total > 0, total, 1),
    )


def row_weights(logits: jax.Array, labels: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Effective weights, 0 for rows that cannot be used, such as those with a non-finite logit."""
    finite = jnp.where(jnp.isfinite(logits).all(axis=1), 0, jnp.nan).astype(logits.dtype)
    return row_use(finite, label_use(labels, logits.shape[1]), weights).weights


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The target at the class of the largest logit, `(n,)`: 0 or 1 for class ids."""
    predicted = jnp.argmax(logits, axis=1)
    if labels.ndim == 1:
        return (predicted.astype(labels.dtype) == labels).astype(logits.dtype)
    return jnp.take_along_axis(_finite_targets(labels, logits.dtype), predicted[:, None], axis=1)[:, 0]


def correct_by_comparing(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`correct` for finite logits. Class ids are compared, which takes a ninth of the time on the CPU.

    The logits must be in memory: if XLA recomputes them for each use, their rounding may differ, and either
    of two nearly equal logits may count as the largest.
    """
    if labels.ndim == 2:
        return correct(logits, labels)
    ids = jnp.arange(logits.shape[1], dtype=labels.dtype)[None, :]
    own, own_id = _at_labels(logits, labels)[:, None], labels[:, None]
    below = (logits < own) | ((logits == own) & (ids > own_id)) | (ids == own_id)
    known = (labels >= 0) & (labels < logits.shape[1])
    return (below.all(axis=1) & known).astype(logits.dtype)


def losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each row, `(n,)`."""
    log_z = jax.nn.logsumexp(logits, axis=1)
    if labels.ndim == 1:
        return log_z - _at_labels(logits, labels)
    mass = _finite_targets(labels, logits.dtype).sum(axis=1)
    return mass * log_z - _at_labels(logits, labels)


def corrected_losses(logits: jax.Array, labels: jax.Array, transition: jax.Array) -> jax.Array:
    """Cross-entropy under label noise, `−log Σ_i softmax(z)_i T[i, y]`, `(n,)`."""
    ids = jnp.clip(labels, 0, logits.shape[1] - 1)
    likely = jnp.sum(jax.nn.softmax(logits, axis=1) * transition.T[ids].astype(logits.dtype), axis=1)
    return -jnp.log(jnp.maximum(likely, jnp.finfo(logits.dtype).tiny))


def balanced_correct(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`correct`, with weights under which every class present counts the same.

    A row of targets belongs to each class in proportion. Its weight is the sum of its shares in all classes,
    and it is correct to the degree of its share in the class of the largest logit.
    """
    if labels.ndim == 1:
        return correct(logits, labels), balanced_weights(labels, weights, logits.shape[1])
    target = _finite_targets(labels, weights.dtype)
    per_class = jnp.sum(weights[:, None] * target, axis=0)
    share = target / jnp.where(per_class > 0, per_class, 1)[None, :]
    of_all = jnp.sum(share, axis=1)
    predicted = jnp.argmax(logits, axis=1)[:, None]
    hit = jnp.take_along_axis(share, predicted, axis=1)[:, 0] / jnp.where(of_all > 0, of_all, 1)
    return hit, weights * of_all


def balanced_weights(ids: jax.Array, weights: jax.Array, l: int) -> jax.Array:
    """Weights under which every class present counts the same."""
    ids = jnp.clip(ids, 0, l - 1)
    per_class = jnp.zeros(l, weights.dtype).at[ids].add(weights)
    held = per_class[ids]
    return weights / jnp.where(held > 0, held, 1)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """`Σ w x / Σ w` over the rows with weight, 0 if there are none."""
    total = jnp.sum(weights)
    return jnp.sum(jnp.where(weights > 0, weights * values, 0)) / jnp.where(total > 0, total, 1)


def error_of_mean(values: jax.Array, mean: jax.Array, weights: jax.Array) -> jax.Array:
    """Standard error of a weighted mean, `√(Σ p²(x − mean)² + (Σ p²)²)` with `p = w/Σw`.

    The last term adds one disagreement of size 1 among the `1/Σp²` effective rows: rows that all agree are no
    proof of no variance, nor is one row that outweighs the others.
    """
    total = jnp.sum(weights)
    share = weights / jnp.where(total > 0, total, 1)
    off = jnp.where(weights > 0, share * (values - mean), 0)
    return jnp.sqrt(jnp.sum(off**2) + jnp.sum(share**2) ** 2)


def _at_labels(values: jax.Array, labels: jax.Array) -> jax.Array:
    if labels.ndim == 1:
        ids = jnp.clip(labels, 0, values.shape[1] - 1)
        return jnp.take_along_axis(values, ids[:, None], axis=1)[:, 0]
    return jnp.sum(_finite_targets(labels, values.dtype) * values, axis=1)


def _finite_targets(labels: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Targets, 0 where they are not finite: such rows have no weight, but 0 · NaN is NaN."""
    return jnp.where(jnp.isfinite(labels), labels, 0).astype(dtype)
