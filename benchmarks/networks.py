"""Flax networks for the digits, trained end to end with optax, and what their heads see."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import lip_jax
from benchmarks.data import Noise, Part, corrupt, load_digits
from benchmarks.heads import head_of, train_adam

DIGITS_EPOCHS = {"early-stopped": 10, "memorised": 100}


class MLP(nn.Module):
    """Hidden layers on flattened inputs; `named` ones are `hidden_1`, and so on."""

    num_classes: int
    widths: tuple[int, ...] = (128, 64)
    named: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs, train=False):  # noqa: D102
        feats = inputs.reshape(inputs.shape[0], -1)
        for i, width in enumerate(self.widths, 1):
            feats = nn.relu(nn.Dense(width, name=f"hidden_{i}" if self.named else None)(feats))
            feats = nn.Dropout(self.dropout, deterministic=not train)(feats)
        return nn.Dense(self.num_classes, name="head")(feats)


class CNN(nn.Module):
    """Convolutions of given widths and strides on 8×8 images, and a hidden layer; `named` as in `MLP`."""

    num_classes: int
    convolutions: tuple[tuple[int, int], ...] = ((16, 2), (32, 2))
    named: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs, train=False):  # noqa: D102
        maps = inputs.reshape(-1, 8, 8, 1)
        for i, (width, stride) in enumerate(self.convolutions, 1):
            name = f"convolution_{i}" if self.named else None
            maps = nn.relu(nn.Conv(width, (3, 3), strides=stride, name=name)(maps))
        dense = nn.Dense(64, name="dense" if self.named else None)
        feats = nn.relu(dense(maps.reshape(maps.shape[0], -1)))
        feats = nn.Dropout(self.dropout, deterministic=not train)(feats)
        return nn.Dense(self.num_classes, name="head")(feats)


@partial(jax.jit, static_argnames=("model", "epochs", "loss"))
def train_networks(
    keys, feats, labels, *, model: nn.Module, epochs: tuple[int, ...], loss="cross-entropy"
) -> list:
    """Train one network per key on its own rows `(s, n, …)`; the parameters after each of `epochs`.

    One after the other in one compiled call: convolutions with a kernel of their own for each seed are slower
    on a CPU.
    """
    train = partial(train_adam, model=model, epochs=epochs, loss=loss)
    return jax.lax.map(lambda run: train(*run), (keys, feats, labels))


class Network(NamedTuple):
    """The head of a network, what it sees of its noisy training rows and of others, and the true labels."""

    head: lip_jax.Head
    train: Part
    val: Part
    test: Part
    train_true: np.ndarray
    val_true: np.ndarray


def digit_networks(
    model: nn.Module, noise: Noise, seeds: Iterable[int], loss="cross-entropy", epochs=DIGITS_EPOCHS
) -> Iterator[tuple[str, int, Network]]:
    """By regime and seed, networks on the digits, each with a split, a noise and a start of its own."""
    seeds = list(seeds)
    splits = [load_digits(seed) for seed in seeds]
    noisy = [corrupt(noise, seed, split.parts[:2], 10) for seed, split in zip(seeds, splits, strict=True)]
    train_y, val_y = (jnp.stack(labels) for labels in zip(*noisy, strict=True))
    inputs = [jnp.stack(x) for x in zip(*((s.train_x, s.val_x, s.test_x) for s in splits), strict=True)]
    keys, lengths = jax.vmap(jax.random.key)(jnp.array(seeds)), tuple(epochs.values())
    snapshots = train_networks(keys, inputs[0], train_y, model=model, epochs=lengths, loss=loss)
    capture = jax.jit(jax.vmap(partial(lip_jax.capture_features, model, head="head")))
    for regime, params in zip(epochs, snapshots, strict=True):
        train_x, val_x, test_x = (capture(params, part) for part in inputs)
        for i, (seed, split) in enumerate(zip(seeds, splits, strict=True)):
            head = head_of(jax.tree.map(lambda leaf, i=i: leaf[i], params))
            parts = Part(train_x[i], train_y[i]), Part(val_x[i], val_y[i]), Part(test_x[i], split.test_y)
            yield regime, seed, Network(head, *parts, split.train_y, split.val_y)
