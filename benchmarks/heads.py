"""Softmax heads and networks as users train them, in the regimes and by the losses of the tables."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lip_jax
from benchmarks.data import Part

STRENGTHS = {"well regularised": 0.01, "lightly regularised": 0.1}  # C of logistic regression


class Softmax(nn.Module):
    """A linear softmax head: parameters `{"params": {"head": {"kernel", "bias"}}}`."""

    num_classes: int

    @nn.compact
    def __call__(self, feats):  # noqa: D102
        return nn.Dense(self.num_classes, name="head")(feats)


def generalised_cross_entropy(logits: jax.Array, labels: jax.Array, power: float = 0.7) -> jax.Array:
    """`(1 − p_y^q)/q` of each row: cross-entropy as q → 0, the mean absolute error at q = 1."""
    log_p = -optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return -jnp.expm1(power * log_p) / power


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, share: float = 0.1) -> jax.Array:
    """Cross-entropy of each row with `share` of its target spread over all classes."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype), share)
    return optax.softmax_cross_entropy(logits, targets)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cross-entropy": optax.softmax_cross_entropy_with_integer_labels,
    "generalised cross-entropy": generalised_cross_entropy,
    "label smoothing": smoothed_cross_entropy,
}


def train_regularised(feats, labels, *, num_classes: int, c: float = 0.01) -> Any:
    """Minimise `½‖W‖² + c · Σ cross-entropy`: scikit-learn's logistic regression with C = c."""
    options = {"solver": "logistic", "ridge": 1 / c, "tolerance": 1e-8}
    found = lip_jax.linear_readout(feats, labels, num_classes=num_classes, **options)
    # At the minimum the kernel's rows have mean 0; the solver stops a little beside it.
    kernel = found.kernel - found.kernel.mean(axis=1, keepdims=True)
    return {"params": {"head": {"kernel": kernel, "bias": found.bias}}}


@partial(jax.jit, static_argnames=("model", "epochs", "loss", "batch_size"))
def train_adam(
    key, feats, labels, *, model, epochs: Sequence[int], loss="cross-entropy", batch_size=50, rate=2e-3
) -> list:
    """Minimise one of `LOSSES` by Adam without any decay; the parameters after each of `epochs`."""
    optimizer, steps = optax.adam(rate), feats.shape[0] // batch_size
    lengths = [after - before for before, after in zip((0, *epochs), epochs, strict=False)]
    init_key, *epoch_keys = jax.random.split(key, 1 + len(lengths))
    params = model.init(init_key, feats[:1])
    carry, snapshots = (params, optimizer.init(params)), []

    # Others have no argument that says so.
    dropout = getattr(model, "dropout", 0)

    def mean_loss(params, rows):
        # A key of their own for the rows of each step.
        options = {"train": True, "rngs": {"dropout": jax.random.fold_in(key, rows[0])}} if dropout else {}
        return LOSSES[loss](jnp.asarray(model.apply(params, feats[rows], **options)), labels[rows]).mean()

    def step(carry, rows):
        params, state = carry
        updates, state = optimizer.update(jax.grad(mean_loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, feats.shape[0])[: steps * batch_size]
        return jax.lax.scan(step, carry, order.reshape(steps, batch_size))

    for epoch_key, length in zip(epoch_keys, lengths, strict=True):
        carry, _ = jax.lax.scan(epoch, carry, jax.random.split(epoch_key, length))
        snapshots.append(carry[0])
    return snapshots


def train_overfitted(key, feats, labels, *, num_classes: int, epochs: int = 60, loss: str = "cross-entropy"):
    """A softmax head trained long enough to memorise wrong labels."""
    options = {"model": Softmax(num_classes), "epochs": (epochs,), "batch_size": 256, "rate": 1e-2}
    return train_adam(key, jnp.asarray(feats), jnp.asarray(labels), loss=loss, **options)[0]


def head_of(params: Any) -> lip_jax.Head:
    """The head of a network whose last layer is called `head`."""
    head = params["params"]["head"]
    return lip_jax.Head(head["kernel"], head["bias"])


def train_head(regime: str, loss: str, seed: int, rows: Part, num_classes: int) -> lip_jax.Head:
    """A softmax head on given features."""
    if regime == "overfitted":
        return head_of(train_overfitted(jax.random.key(seed), *rows, num_classes=num_classes, loss=loss))
    return head_of(train_regularised(*rows, num_classes=num_classes, c=STRENGTHS[regime]))


def logits(head: Any, x: Any) -> jax.Array:
    """Of a head or a readout, at full precision."""
    return jnp.matmul(x, head.kernel, precision=jax.lax.Precision.HIGHEST) + head.bias[None, :]


def right(head: Any, test: Part) -> np.ndarray:
    """Which test rows a head or a readout gets right."""
    return np.asarray(jnp.argmax(logits(head, test.x), axis=1) == test.y)


def accuracy(head: Any, test: Part) -> float:
    """The share of test rows a head or a readout gets right, in points."""
    return 100 * float(right(head, test).mean())
