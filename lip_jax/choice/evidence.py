"""What rows say of candidate heads: scores, paired differences and their errors, loss under label noise."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from lip_jax.methods.logit_scale import logit_scale
from lip_jax.methods.protocol import Head
from lip_jax.numerics import linalg
from lip_jax.rows.labels import Rows
from lip_jax.rows.metrics import (
    balanced_correct,
    correct,
    correct_by_comparing,
    corrected_losses,
    error_of_mean,
    losses,
    row_weights,
    weighted_mean,
)

Metric = Literal["accuracy", "balanced_accuracy", "log_loss"]


def logits_on(head: Head, rows: Rows) -> jax.Array:
    """The logits of a head on rows, `(n, l)`."""
    return linalg.logits_of(rows.feats, head.kernel, head.bias)


def contributions(logits: jax.Array, rows: Rows, metric: Metric) -> tuple[jax.Array, jax.Array]:
    """Each row's score, higher is better, and the weights under which their mean is the metric."""
    weights = row_weights(logits, rows.labels, rows.weights)
    if metric == "log_loss":
        return -losses(logits, rows.labels), weights
    if metric == "balanced_accuracy":
        return balanced_correct(logits, rows.labels, weights)
    return correct(logits, rows.labels), weights


def score(logits: jax.Array, rows: Rows, metric: Metric) -> jax.Array:
    """The metric, higher is better."""
    return weighted_mean(*contributions(logits, rows, metric))


def scorer(base: jax.Array, rows: Rows, metric: Metric) -> Callable[[jax.Array], jax.Array]:
    """`score` of many candidates on the same rows, of which those can be used that `base` can score."""
    if metric == "log_loss" or (metric == "balanced_accuracy" and rows.labels.ndim == 2):
        return lambda logits: score(logits, rows, metric)
    # Which rows can be used does not hang on the candidate, and looking costs as much as scoring.
    _, weights = contributions(base, rows, metric)

    def fast(logits: jax.Array) -> jax.Array:
        # In memory, as logits that XLA computes once for each use may be rounded otherwise.
        logits = jax.lax.optimization_barrier(logits)
        return weighted_mean(correct_by_comparing(logits, rows.labels), weights)

    return fast


def paired_difference(
    logits: jax.Array, base: jax.Array, rows: Rows, metric: Metric
) -> tuple[jax.Array, jax.Array]:
    """The mean over rows of what a head scores above another, with its standard error."""
    of_head, weights = contributions(logits, rows, metric)
    of_base, _ = contributions(base, rows, metric)
    difference = jnp.where(weights > 0, of_head - of_base, 0)
    mean = weighted_mean(difference, weights)
    return mean, error_of_mean(difference, mean, weights)


def noise_loss(logits: jax.Array, rows: Rows, transition: jax.Array | None) -> jax.Array:
    """Log-loss of what the head says labels are after the noise, or of the labels as they are."""
    if transition is None:
        return -score(logits, rows, "log_loss")
    weights = row_weights(logits, rows.labels, rows.weights)
    return weighted_mean(corrected_losses(logits, rows.labels, transition), weights)


def likelier_noise(rows: Rows, heads: Head, transition: jax.Array) -> jax.Array:
    """`transition`, or that of no noise if the labels of the rows are likelier under it.

    Validation labels may be cleaner than those of the fitting rows. Under too much noise the log-loss takes
    sharp logits for good ones. Judged by the most accurate of the heads, at the scale that suits each.
    """
    accuracy = jax.lax.map(lambda head: score(logits_on(head, rows), rows, "accuracy"), heads)
    logits = logits_on(jax.tree.map(lambda part: part[jnp.argmax(accuracy)], heads), rows)

    def loss(noise: jax.Array) -> jax.Array:
        scale = logit_scale(logits, rows.labels, rows.weights, noise)
        return noise_loss(scale * logits, rows, noise)

    none = jnp.eye(transition.shape[0], dtype=transition.dtype)
    return jnp.where(loss(none) < loss(transition), none, transition)
