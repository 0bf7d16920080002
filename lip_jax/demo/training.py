"""A small CNN and softmax heads, trained on given and on clean labels by SGD with momentum."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lip_jax
from lip_jax._types import Array
from lip_jax.demo.data import Data
from lip_jax.methods.protocol import Head
from lip_jax.rows.labels import Rows

HEAD_IN_FILE = "the head in the file"


@dataclass(frozen=True)
class Training:
    """How networks and heads are trained.

    Attributes:
        seed: Of parameters and batches, so that networks on clean and on given labels start alike.
        epochs: Passes over the training rows.
        weight_decay: Training adds `½ · weight_decay · ‖params‖²` to the mean cross-entropy.
        on_epoch: Called after each epoch with the name of what is being trained.
    """

    seed: int
    epochs: int
    weight_decay: float
    on_epoch: Callable[[str], object] = lambda stage: None


class CleanNetwork(NamedTuple):
    """The network trained on clean labels: its head, and its own features of the test rows."""

    head: Head
    test: Rows


@dataclass(frozen=True)
class Case:
    """Two heads on the same features.

    Attributes:
        data: The features with their labels.
        noisy: The head trained on the given labels, which LIP refits.
        clean: A head trained on the clean labels.
        noisy_from: Where the noisy head comes from, in words.
        network: For comparison, a network whose body saw no wrong label either.
    """

    data: Data
    noisy: Head
    clean: Head
    noisy_from: str
    network: CleanNetwork | None = None


def digits_case(digits: Data, training: Training) -> Case:
    """Train the same CNN on clean and on given labels, and a clean head on the latter's features [li2020].

    `digits` are images `(n, 8, 8, 1)` from `load_digits`. The case is on the noisy network's features.
    """
    model = _DigitsNet(digits.num_classes)
    train = partial(_train, model, digits.train.feats, learning_rate=0.03, training=training)
    clean = train(digits.clean_y, stage="network on clean labels")
    noisy = train(digits.train.labels, stage="network on given labels")

    def seen_by(variables: Any, rows: Rows) -> Rows:
        return rows._replace(feats=lip_jax.capture_features(model, variables, rows.feats, head="head"))

    data = replace(
        digits,
        train=seen_by(noisy, digits.train),
        test=seen_by(noisy, digits.test),
        held_out=digits.held_out and seen_by(noisy, digits.held_out),
    )
    return Case(
        data,
        noisy=Head(**noisy["params"]["head"]),
        clean=_fit_head(data.train.feats, data.clean_y, data.num_classes, "clean head", training),
        noisy_from="the head of the CNN trained on the given labels",
        network=CleanNetwork(Head(**clean["params"]["head"]), seen_by(clean, digits.test)),
    )


def features_case(data: Data, head: Head | None, training: Training) -> Case:
    """Train the heads that precomputed features lack: the clean one, and the noisy one if `head` is None."""
    # At unit mean square the weight decay means the same for every file; the kernel takes the scale back.
    scale = jnp.sqrt(jnp.mean(jnp.asarray(data.train.feats) ** 2))

    def fit(labels: Any, stage: str) -> Head:
        fitted = _fit_head(data.train.feats / scale, labels, data.num_classes, stage, training)
        return fitted._replace(kernel=fitted.kernel / scale)

    noisy_from = HEAD_IN_FILE
    if head is None:
        head, noisy_from = fit(data.train.labels, "noisy head"), "a softmax head trained on the given labels"
    return Case(data, head, fit(data.clean_y, "clean head"), noisy_from)


class _DigitsNet(nn.Module):
    """A small CNN for 8×8 images, with 64 features before its head."""

    num_classes: int

    @nn.compact
    def __call__(self, images: Array) -> jax.Array:
        hidden = nn.relu(nn.Conv(16, (3, 3), strides=(2, 2))(images))
        hidden = nn.relu(nn.Conv(32, (3, 3), strides=(2, 2))(hidden))
        feats = nn.relu(nn.Dense(64)(hidden.reshape(hidden.shape[0], -1)))
        return nn.Dense(self.num_classes, name="head")(feats)


def _fit_head(feats: Any, labels: Any, num_classes: int, stage: str, training: Training) -> Head:
    # The curvature of the loss is at most (mean ‖x‖² + 1)/2, where the 1 is the bias's. Its inverse is a
    # learning rate for any features.
    feats = jnp.asarray(feats)
    learning_rate = 2 / (float(jnp.mean(jnp.sum(feats**2, axis=1))) + 1)
    model = nn.Dense(num_classes)
    variables = _train(model, feats, labels, learning_rate=learning_rate, stage=stage, training=training)
    return Head(**variables["params"])


def _train(
    model: nn.Module, inputs: Any, labels: Any, *, learning_rate: float, stage: str, training: Training
) -> Any:
    """Minimise the penalised cross-entropy; the learning rate falls linearly to 0."""
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
    n = inputs.shape[0]
    batch_size = min(n, max(64, min(n // 64, 256)))
    steps = training.epochs * (n // batch_size)
    init_key, order_key = jax.random.split(jax.random.key(training.seed))
    variables = model.init(init_key, inputs[:1])
    settings = (steps, training.weight_decay, learning_rate)
    state = _optimizer(*settings).init(variables)
    train_epoch = partial(_train_epoch, model=model, settings=settings, batch_size=batch_size)
    for key in jax.random.split(order_key, training.epochs):
        variables, state = jax.block_until_ready(train_epoch(variables, state, inputs, labels, key))
        training.on_epoch(stage)
    return variables


def _optimizer(steps: int, weight_decay: float, learning_rate: float) -> optax.GradientTransformation:
    # The schedules of optax mix int32 steps with floats, which strict dtype promotion refuses.
    def schedule(step: Any) -> jax.Array:
        return learning_rate * (1 - jnp.asarray(step).astype(jnp.float32) / steps)

    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=0.9))


@partial(jax.jit, static_argnames=("model", "settings", "batch_size"))
def _train_epoch(
    variables: Any,
    state: Any,
    inputs: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    model: nn.Module,
    settings: tuple[int, float, float],
    batch_size: int,
) -> tuple[Any, Any]:
    optimizer = _optimizer(*settings)

    def loss(variables: Any, rows: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, inputs[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
        variables, state = carry
        updates, state = optimizer.update(jax.grad(loss)(variables, rows), state, variables)
        return (optax.apply_updates(variables, updates), state), None

    batches = inputs.shape[0] // batch_size
    order = jax.random.permutation(key, inputs.shape[0])[: batches * batch_size]
    carry, _ = jax.lax.scan(step, (variables, state), order.reshape(batches, batch_size))
    return carry
