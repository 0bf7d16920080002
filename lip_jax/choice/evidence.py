"""Evidence: what rows say of a candidate that was chosen and fitted without them.

Rows that judge lie in folds, blocks `(k, m, …)`. Every block is scored by the candidate that the other blocks
chose, so that all rows judge and none judges what it chose. Two differences to the head as it came are pooled
over all rows, each with its standard error:

- that of the metric, such as accuracy, and
- that of the log-likelihood of the labels, `log Σ_i softmax(a z)_i T[i, y]`, where `T = P(given | true)` is
  the estimated label noise and `a` the logit scale that suits each of the two.

The likelihood often needs far fewer rows than accuracy, but it depends on the estimate of `T`. So neither is
believed against the other.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
Source = Literal["validation", "unseen rows", "imitation"]

# The stand-in for a head is fitted anew for each fold, which takes as long as all else.
FOLDS: dict[Source, int] = {"validation": 5, "unseen rows": 5, "imitation": 3}
# Logit scales are single numbers: so many rows fit them closely enough.
SCALE_ROWS = 2000

# Standard errors by which the weaker of the two kinds of evidence must support the stronger. Where rows fit
# and judge as well, folds share what they were fitted to.
SUPPORT: dict[Source, float] = {"validation": 1.0, "unseen rows": 1.5, "imitation": 1.0}
# A class that the head got right so often must not be lost altogether.
RECALLED = 5


class Paired(NamedTuple):
    """The mean over rows of what a head scores above another, with its standard error."""

    difference: jax.Array
    error: jax.Array

    @property
    def z(self) -> jax.Array:
        """In standard errors."""
        return self.difference / jnp.where(self.error > 0, self.error, 1)


def logits_on(head: Head, rows: Rows) -> jax.Array:
    """The logits of a head on rows, `(n, l)`."""
    return linalg.logits_of(rows.feats, head.kernel, head.bias)


def fold_places(n: int, folds: int) -> np.ndarray:
    """Places of `n` rows in folds `(k, m)`, by a fixed permutation; −1 where no row is left."""
    order = np.random.default_rng(0).permutation(n)
    padded = np.full(folds * -(-n // folds), -1)
    padded[:n] = order
    return padded.reshape(-1, folds).T.astype(np.int32)


def in_folds(rows: Rows, places: np.ndarray, first: jax.Array | None = None) -> Rows:
    """Rows in blocks `(k, m, …)`. Where there is no row, or a row came before, the weight is 0."""
    dtype = linalg.compute_dtype(rows.feats)
    n = rows.feats.shape[0]
    weights = jnp.ones(n, dtype) if rows.weights is None else rows.weights.astype(dtype)
    if first is not None:
        weights = jnp.where(first == jnp.arange(n, dtype=first.dtype), weights, 0)
    take = jnp.maximum(places, 0)
    return Rows(rows.feats[take], rows.labels[take], jnp.where(places >= 0, weights[take], 0))


def flat(folded: Rows) -> Rows:
    """The rows of all folds, `(k m, …)`."""
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), folded)


def out_of_fold(heads: Head, folded: Rows) -> jax.Array:
    """Logits of each block by its own head, `(k m, l)`."""
    logits = jax.vmap(linalg.logits_of)(folded.feats, heads.kernel, heads.bias)
    return logits.reshape(-1, logits.shape[-1])


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


def fold_scorer(base: jax.Array, rows: Rows, metric: Metric, folds: int) -> Callable[[jax.Array], jax.Array]:
    """`Σ w score` of each block, `(k,)`, for many candidates; `base` tells which rows are usable."""
    weights = contributions(base, rows, metric)[1]

    def sums(logits: jax.Array) -> jax.Array:
        if metric == "log_loss" or (metric == "balanced_accuracy" and rows.labels.ndim == 2):
            scores, used = contributions(logits, rows, metric)
        else:
            # In memory, as logits that XLA computes once for each use may be rounded otherwise.
            scores = correct_by_comparing(jax.lax.optimization_barrier(logits), rows.labels)
            used = weights
        return jnp.where(used > 0, used * scores, 0).reshape(folds, -1).sum(axis=1)

    return sums


def paired(scores: jax.Array, base: jax.Array, weights: jax.Array) -> Paired:
    """What rows score above `base`."""
    difference = jnp.where(weights > 0, scores - base, 0)
    mean = weighted_mean(difference, weights)
    return Paired(mean, error_of_mean(difference, mean, weights))


def paired_difference(logits: jax.Array, base: jax.Array, rows: Rows, metric: Metric) -> Paired:
    """The paired difference of two heads in a metric."""
    of_head, weights = contributions(logits, rows, metric)
    return paired(of_head, contributions(base, rows, metric)[0], weights)


def noise_losses(logits: jax.Array, labels: jax.Array, transition: jax.Array | None) -> jax.Array:
    """Log-loss of each row under label noise, or of the labels as they are."""
    if transition is None:
        return losses(logits, labels)
    return corrected_losses(logits, labels, transition)


def scale_of(logits: jax.Array, rows: Rows, transition: jax.Array | None) -> jax.Array:
    """The logit scale of logits `(n, l)`, by rows spread evenly over all."""
    n = logits.shape[0]
    few = min(n, SCALE_ROWS)
    # In NumPy, as the product exceeds int32 for millions of rows.
    place = (np.arange(few, dtype=np.int64) * n // max(few, 1)).astype(np.int32)
    part = jax.tree.map(lambda part: part[place], (logits, rows.labels, rows.weights))
    return logit_scale(*part, transition)


def likelier_noise(logits: jax.Array, rows: Rows, transition: jax.Array) -> jax.Array:
    """`transition`, or that of no noise if the labels of the rows are likelier under it.

    Labels that judge may be cleaner than those that were fitted. Under too much noise the log-loss takes
    sharp logits for good ones.
    """
    weights = row_weights(logits, rows.labels, rows.weights)

    def loss(noise: jax.Array) -> jax.Array:
        scaled = scale_of(logits, rows, noise) * logits
        return weighted_mean(corrected_losses(scaled, rows.labels, noise), weights)

    none = jnp.eye(transition.shape[0], dtype=transition.dtype)
    found = jax.lax.map(loss, jnp.stack([none, transition]))
    return jnp.where(found[0] < found[1], none, transition)


def recalled(logits: jax.Array, rows: Rows) -> jax.Array:
    """How many rows of each class a head gets right, `(l,)`."""
    ids = rows.labels if rows.labels.ndim == 1 else jnp.argmax(rows.labels, axis=1)
    counted = row_weights(jnp.zeros_like(logits), rows.labels, rows.weights) > 0
    hits = jnp.where(counted, correct(logits, ids.astype(jnp.int32)), 0)
    return jnp.zeros(logits.shape[1], hits.dtype).at[jnp.clip(ids, 0, logits.shape[1] - 1)].add(hits)


def informed(logits: jax.Array, rows: Rows) -> jax.Array:
    """Whether predictions agree with labels more than they would if the two were independent.

    `Σ_c P(predicted c) P(given c)` is the agreement of chance; three standard errors above it are asked for.
    """
    hits, weights = contributions(logits, rows, "accuracy")
    share = weights / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)
    l = logits.shape[1]
    shares = jnp.zeros(l, share.dtype).at[jnp.argmax(logits, axis=1)].add(share)
    if rows.labels.ndim == 1:
        chance = jnp.sum(share * shares[jnp.clip(rows.labels, 0, l - 1)])
    else:
        targets = jnp.where(jnp.isfinite(rows.labels), rows.labels, 0).astype(share.dtype)
        chance = jnp.sum(shares * jnp.sum(share[:, None] * targets, axis=0))
    error = jnp.sqrt(jnp.maximum(chance * (1 - chance), 0) * jnp.sum(share**2))
    return (jnp.sum(share * hits) - chance > 3 * error) & (jnp.sum(weights) > 0)
