"""Flax models as people write them, briefly trained on scikit-learn's digits, and what changed in a tree."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state
from sklearn.datasets import load_digits

NUM_CLASSES = 10


def digits() -> tuple[jax.Array, jax.Array]:
    """Images `(1797, 8, 8, 1)` in [0, 1] and class ids."""
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32), jnp.asarray(labels, jnp.int32)


class BatchNormCNN(nn.Module):
    """Convolutions, BatchNorm, Dropout and two dense layers."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        for width in (8, 16):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = x.mean(axis=(1, 2)) if x.shape[1] > 8 else x.reshape(x.shape[0], -1)[:, ::8]
        x = nn.relu(nn.Dense(32)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(NUM_CLASSES)(x)


class Block(nn.Module):
    """A transformer block whose kernels are all square, of the width it is given."""

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(width)(nn.gelu(nn.Dense(width)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """Rows of an image as tokens; as wide as it has classes, so that every dense kernel is 10 × 10."""

    width: int = NUM_CLASSES

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="embed")(x[..., 0])
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(NUM_CLASSES, name="head")(x.mean(axis=1))


class TiedLanguageModel(nn.Module):
    """An embedding that also is the output layer, stored `(l, q)`."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(NUM_CLASSES, 6)
        return embed.attend(nn.tanh(nn.Dense(6)(embed(ids))))


class NnxClassifier(nnx.Module):
    """Layers in a list, BatchNorm and Dropout with its own random state."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)])
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(32, NUM_CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.layers[0](x.reshape(x.shape[0], -1)))
        x = self.dropout(nnx.relu(self.norm(self.layers[1](x))))
        return self.head(x)


class NnxShared(nnx.Module):
    """Two names for one output layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(64, 32, rngs=rngs)
        self.head = nnx.Linear(32, NUM_CLASSES, rngs=rngs)
        self.auxiliary_head = self.head

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x.reshape(x.shape[0], -1))))


class Adapted(nnx.Module):
    """A head with a low-rank adapter, within it or around it."""

    def __init__(self, kind: str, rngs: nnx.Rngs):
        self.body = nnx.Linear(6, 5, rngs=rngs)
        self.head = {
            "within": lambda: nnx.LoRALinear(5, 4, lora_rank=2, rngs=rngs),
            "around": lambda: nnx.LoRA(5, 2, 4, base_module=nnx.Linear(5, 4, rngs=rngs), rngs=rngs),
            "normalised": lambda: nnx.WeightNorm(nnx.Linear(5, 4, rngs=rngs), rngs=rngs),
        }[kind]()

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


def train_linen(model: nn.Module, x, labels, *, steps: int = 60) -> train_state.TrainState:
    """A `TrainState` (with `batch_stats` where the model has them) after some full-batch Adam steps."""
    variables = model.init(jax.random.key(0), x[:1])
    stats = variables.get("batch_stats", {})
    train = {"train": True} if stats else {}
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.adamw(1e-2, weight_decay=1e-3)
    )

    @jax.jit
    def step(carry, key):
        state, stats = carry

        def loss(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats},
                x,
                **train,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated.get("batch_stats", {})

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), stats

    # Not in a loop of XLA's: as the suite compiles, convolutions take 15 times as long there.
    for key in jax.random.split(jax.random.key(1), steps):
        state, stats = step((state, stats), key)
    return state, stats


def train_nnx(model: nnx.Module, x, labels, *, steps: int = 60) -> nnx.Module:
    """The module after some full-batch Adam steps, in evaluation mode."""
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    model.train()

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(steps):
        step(model, optimizer)
    model.eval()
    return model


def log_loss(logits, labels) -> float:
    """Mean cross-entropy in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_z = np.log(np.exp(shifted).sum(axis=1))
    return float((log_z - shifted[np.arange(len(labels)), np.asarray(labels)]).mean())


def changed_paths(before, after) -> set[str]:
    """Paths of the leaves whose values differ; structure, dtypes and shapes must agree."""
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in pairs
        if not bool(jnp.array_equal(_raw(old), _raw(new)))
    }


def _raw(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf)


def logits_of(feats, head):
    """Features times kernel plus bias."""
    return feats @ head["kernel"] + head["bias"][None, :]
