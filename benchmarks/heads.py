"""Softmax heads as users train them: a Flax `Dense` on frozen features, in the regimes of the tables."""

from collections.abc import Callable
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


@partial(jax.jit, static_argnames=("num_classes", "steps"))
def train_regularised(feats, labels, *, num_classes: int, c: float = 0.01, steps: int = 200):
    """Minimise `½‖W‖² + c · Σ cross-entropy` by L-BFGS: scikit-learn's logistic regression with C = c."""
    model = Softmax(num_classes)
    feats, labels = jnp.asarray(feats), jnp.asarray(labels)
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), feats[:1]))

    def loss(params):
        logits = jnp.asarray(model.apply(params, feats))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        kernel = params["params"]["head"]["kernel"]
        return losses.mean() + 0.5 * jnp.sum(kernel**2) / (c * feats.shape[0])

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(grad)

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return params


@partial(jax.jit, static_argnames=("num_classes", "epochs", "batch_size", "loss"))
def train_overfitted(
    key,
    feats,
    labels,
    *,
    num_classes: int,
    epochs: int = 60,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    loss: str = "cross-entropy",
):
    """Minimise one of `LOSSES` by Adam without any decay, long enough to memorise wrong labels."""
    model = Softmax(num_classes)
    feats, labels = jnp.asarray(feats), jnp.asarray(labels)
    init_key, order_key = jax.random.split(key)
    params = model.init(init_key, feats[:1])
    optimizer = optax.adam(learning_rate)
    steps = feats.shape[0] // batch_size

    def mean_loss(params, rows):
        logits = jnp.asarray(model.apply(params, feats[rows]))
        return LOSSES[loss](logits, labels[rows]).mean()

    def step(carry, rows):
        params, state = carry
        updates, state = optimizer.update(jax.grad(mean_loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, feats.shape[0])[: steps * batch_size]
        return jax.lax.scan(step, carry, order.reshape(steps, batch_size))

    keys = jax.random.split(order_key, epochs)
    (params, _), _ = jax.lax.scan(epoch, (params, optimizer.init(params)), keys)
    return params


def head_of(params: Any) -> lip_jax.Head:
    """The head of a network whose last layer is called `head`."""
    head = params["params"]["head"]
    return lip_jax.Head(head["kernel"], head["bias"])


def train_head(regime: str, loss: str, seed: int, rows: Part, num_classes: int) -> lip_jax.Head:
    """A softmax head on given features."""
    if regime == "overfitted":
        key = jax.random.key(seed)
        return head_of(train_overfitted(key, rows.x, rows.y, num_classes=num_classes, loss=loss))
    # By 60 steps L-BFGS has converged at either strength: 200 give the same accuracies.
    c = STRENGTHS[regime]
    return head_of(train_regularised(rows.x, rows.y, num_classes=num_classes, c=c, steps=60))


def logits(head: Any, x: Any) -> jax.Array:
    """Of a head or a readout, at full precision."""
    return jnp.matmul(x, head.kernel, precision=jax.lax.Precision.HIGHEST) + head.bias[None, :]


def right(head: Any, test: Part) -> np.ndarray:
    """Which test rows a head or a readout gets right."""
    return np.asarray(jnp.argmax(logits(head, test.x), axis=1) == test.y)
