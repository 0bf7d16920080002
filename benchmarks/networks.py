"""Flax networks trained end to end with optax: an MLP and a CNN for digits, a ResNet-34 for CIFAR."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lip_jax
from benchmarks.heads import LOSSES


class MLP(nn.Module):
    """Two hidden layers; the head's inputs are 64 wide."""

    num_classes: int

    @nn.compact
    def __call__(self, feats):  # noqa: D102
        for width in (128, 64):
            feats = nn.relu(nn.Dense(width)(feats))
        return nn.Dense(self.num_classes, name="head")(feats)


class CNN(nn.Module):
    """Two strided convolutions and a hidden layer on flattened 8×8 images; the head's inputs are 64 wide."""

    num_classes: int

    @nn.compact
    def __call__(self, feats):  # noqa: D102
        maps = feats.reshape(-1, 8, 8, 1)
        for width in (16, 32):
            maps = nn.relu(nn.Conv(width, (3, 3), strides=2)(maps))
        hidden = nn.relu(nn.Dense(64)(maps.reshape(maps.shape[0], -1)))
        return nn.Dense(self.num_classes, name="head")(hidden)


@partial(jax.jit, static_argnames=("model", "epochs", "loss", "batch_size"))
def train_networks(
    keys: jax.Array,
    feats: jax.Array,
    labels: jax.Array,
    *,
    model: nn.Module,
    epochs: Sequence[int],
    loss: str = "cross-entropy",
    batch_size: int = 50,
    learning_rate: float = 2e-3,
) -> list:
    """Train one network per key on its own rows `(s, n, …)` by Adam; the parameters after each of `epochs`.

    The networks train one after the other in one compiled call: convolutions with a kernel of their own
    for each seed are slower on a CPU.
    """
    optimizer = optax.adam(learning_rate)
    lengths = [after - before for before, after in zip((0, *epochs), epochs, strict=False)]

    def train(run):
        key, feats, labels = run
        init_key, *epoch_keys = jax.random.split(key, 1 + len(lengths))
        params = model.init(init_key, feats[:1])
        carry, snapshots = (params, optimizer.init(params)), []

        def mean_loss(params, rows):
            return LOSSES[loss](jnp.asarray(model.apply(params, feats[rows])), labels[rows]).mean()

        def step(carry, rows):
            params, state = carry
            updates, state = optimizer.update(jax.grad(mean_loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, key):
            order = jax.random.permutation(key, feats.shape[0])
            steps = feats.shape[0] // batch_size
            return jax.lax.scan(step, carry, order[: steps * batch_size].reshape(steps, batch_size))

        for epoch_key, length in zip(epoch_keys, lengths, strict=True):
            carry, _ = jax.lax.scan(epoch, carry, jax.random.split(epoch_key, length))
            snapshots.append(carry[0])
        return snapshots

    return jax.lax.map(train, (keys, feats, labels))


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut, which is projected where the shape changes."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, maps, train: bool):  # noqa: D102
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = partial(nn.Conv, self.width, use_bias=False)
        inner = nn.relu(norm()(conv((3, 3), self.stride)(maps)))
        inner = norm()(conv((3, 3))(inner))
        if maps.shape != inner.shape:
            maps = norm()(conv((1, 1), self.stride)(maps))
        return nn.relu(maps + inner)


class ResNet(nn.Module):
    """ResNet-34 with the 3×3 stem that suits 32×32 images."""

    num_classes: int
    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64

    @nn.compact
    def __call__(self, images, train: bool = False):  # noqa: D102
        maps = nn.Conv(self.width, (3, 3), use_bias=False)(images)
        maps = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(maps))
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                maps = Block(self.width * 2**stage, stride)(maps, train)
        return nn.Dense(self.num_classes, name="head")(maps.mean(axis=(1, 2)))


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image mirrored or not, and shifted by up to 4 pixels."""
    flip_key, shift_key = jax.random.split(key)
    flipped = jax.random.bernoulli(flip_key, shape=(images.shape[0],))
    images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(shift_key, (images.shape[0], 2), 0, 9)
    crop = lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])  # noqa: E731
    return jax.vmap(crop)(padded, corners)


@partial(jax.jit, static_argnames=("model", "epochs", "batch_size"))
def train_resnet(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    model: ResNet,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 0.1,
):
    """Train by SGD with momentum, a cosine schedule, weight decay and augmentation; the variables."""
    steps = images.shape[0] // batch_size
    total = epochs * steps
    schedule = lambda step: learning_rate * (1 + jnp.cos(jnp.pi * step.astype(jnp.float32) / total)) / 2  # noqa: E731
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9, nesterov=True))
    init_key, order_key = jax.random.split(key)
    variables = model.init(init_key, images[:1])

    def mean_loss(params, stats, key, rows):
        held = {"params": params, "batch_stats": stats}
        logits, new = model.apply(held, augment(key, images[rows]), train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels[rows])
        return losses.mean(), new["batch_stats"]

    def step(carry, batch):
        params, stats, state = carry
        grad, stats = jax.grad(mean_loss, has_aux=True)(params, stats, *batch)
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), stats, state), None

    def epoch(carry, key):
        order_key, augment_key = jax.random.split(key)
        order = jax.random.permutation(order_key, images.shape[0])[: steps * batch_size]
        batches = jax.random.split(augment_key, steps), order.reshape(steps, batch_size)
        return jax.lax.scan(step, carry, batches)

    start = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))
    (params, stats, _), _ = jax.lax.scan(epoch, start, jax.random.split(order_key, epochs))
    return {"params": params, "batch_stats": stats}


def head_inputs(
    model: nn.Module, variables, inputs: jax.Array | np.ndarray, batch_size: int = 1000
) -> jax.Array:
    """The inputs of the layer called `head`, in batches."""
    capture = jax.jit(lambda batch: lip_jax.capture_features(model, variables, batch, head="head"))
    batches = [capture(inputs[i : i + batch_size]) for i in range(0, inputs.shape[0], batch_size)]
    return jnp.concatenate(batches)
