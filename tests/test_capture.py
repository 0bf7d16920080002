"""The features before a head: those that the model multiplies by it, in linen and nnx."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from tests import zoo

RANK = 4


def test_features_times_head_are_the_models_logits(cnn):
    model, _, variables, x, _, feats = cnn
    head = variables["params"]["Dense_1"]
    chex.assert_trees_all_close(zoo.logits_of(feats, head), model.apply(variables, x), atol=1e-5)


def test_capture_under_jit_and_by_class_count(cnn, nnx_model):
    model, _, variables, x, _, feats = cnn
    captured = jax.jit(lambda v, x: lip_jax.capture_features(model, v, x, num_classes=10))(variables, x)
    chex.assert_trees_all_close(captured, feats, atol=1e-5)
    module, x, _, feats = nnx_model
    chex.assert_trees_all_close(lip_jax.capture_features(module, None, x, num_classes=10), feats)


def test_capture_passes_the_models_own_arguments(cnn):
    model, _, variables, x, _, feats = cnn
    trained = lip_jax.capture_features(
        model,
        variables,
        x,
        head="Dense_1",
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
    )
    assert trained.shape == feats.shape
    assert not bool(jnp.allclose(trained, feats))


def test_capture_leaves_an_nnx_module_alone(nnx_model):
    model, x, _, _ = nnx_model
    before, kind = nnx.clone(model), type(model.head)
    lip_jax.capture_features(model, None, x[:8], head="head")
    assert type(model.head) is kind
    assert zoo.changed_paths(nnx.state(before), nnx.state(model)) == set()


def test_capture_with_another_nnx_state(nnx_model):
    model, x, _, _ = nnx_model
    other = zoo.NnxClassifier(nnx.Rngs(7))
    other.eval()
    expected = lip_jax.capture_features(other, None, x, head="head")
    chex.assert_trees_all_close(
        lip_jax.capture_features(model, nnx.state(other), x, head="head"), expected, atol=1e-6
    )


def test_capture_says_why_it_cannot(cnn, nnx_model):
    model, _, variables, x, _, _ = cnn
    with pytest.raises(ValueError, match=r"head or num_classes must be given"):
        lip_jax.capture_features(model, variables, x)
    with pytest.raises(ValueError, match=r"no kernel that matches a kernel at head = 'Dense_9'"):
        lip_jax.capture_features(model, variables, x, head="Dense_9")
    with pytest.raises(ValueError, match=r"model must be a flax linen or nnx Module; got function"):
        lip_jax.capture_features(lambda x: x, variables, x, head="head")

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="head")
            return layer(layer(x))

    twice = Twice()
    inputs = jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"must be called once.*float32\[2,4\], float32\[2,4\]"):
        lip_jax.capture_features(twice, twice.init(jax.random.key(0), inputs), inputs, head="head")

    class Jitted(zoo.NnxClassifier):
        def __call__(self, x):
            return nnx.jit(lambda module, x: zoo.NnxClassifier.__call__(module, x))(self, x)

    with pytest.raises(ValueError, match=r"inside a transformation of the model"):
        lip_jax.capture_features(Jitted(nnx.Rngs(0)), None, nnx_model[1], head="head")


def test_capture_survives_linens_own_jit_and_remat():
    x, _ = zoo.digits()

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(zoo.NUM_CLASSES, name="head")(nn.relu(nn.Dense(12)(x.reshape(x.shape[0], -1))))

    plain = Inner()
    for lifted in (nn.jit(Inner), nn.remat(Inner)):
        model = nn.Sequential([lifted()])
        variables = model.init(jax.random.key(0), x[:1])
        inner = variables["params"]["layers_0"]
        expected = lip_jax.capture_features(plain, inner, x[:50], head="head")
        captured = lip_jax.capture_features(model, variables, x[:50], head="layers_0/head")
        chex.assert_trees_all_close(captured, expected, atol=1e-6)


def test_a_head_called_by_keyword_is_captured(rng):
    class ByKeyword(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="head")(inputs=nn.relu(nn.Dense(5, name="body")(x)))

    x = rng.normal(size=(7, 6)).astype(np.float32)
    model = ByKeyword()
    variables = model.init(jax.random.key(0), x)
    feats = lip_jax.capture_features(model, variables, x, head="head")
    np.testing.assert_allclose(
        feats, nn.relu(x @ variables["params"]["body"]["kernel"]), rtol=1e-5, atol=1e-6
    )

    class NnxByKeyword(zoo.Adapted):
        def __call__(self, x):
            return self.head(inputs=nnx.relu(self.body(inputs=x)))

    module = NnxByKeyword("within", nnx.Rngs(0))
    module.head = nnx.Linear(5, 4, rngs=nnx.Rngs(1))
    feats = lip_jax.capture_features(module, None, x, head="head")
    np.testing.assert_allclose(feats, nnx.relu(x @ module.body.kernel[...]), rtol=1e-5, atol=1e-6)


class Block(nn.Module):
    """A convolution."""

    width: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(self.width, (3, 3))(x))


class Blocks(nn.Module):
    """Two blocks of layers on images, and a head."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(4 + i, name=f"z_block_{1 - i}")(x)
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(6, name="dense")(x.reshape(x.shape[0], -1))))


class NnxBlocks(nnx.Module):
    """The same in nnx, and a list of layers."""

    def __init__(self, rngs):
        self.z_block_1 = nnx.Sequential(nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.relu)
        self.z_block_0 = nnx.Sequential(nnx.Conv(4, 5, (3, 3), rngs=rngs), nnx.relu)
        self.dense = nnx.List([nnx.Linear(80, 6, rngs=rngs)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.z_block_0(self.z_block_1(x))
        return self.head(nnx.relu(self.dense[0](x.reshape(x.shape[0], -1))))


def test_layers_come_in_the_order_of_their_calls_with_means_over_space():
    model, x = Blocks(), jax.random.normal(jax.random.key(0), (5, 4, 4, 2))
    variables = model.init(jax.random.key(1), x)
    found = lip_jax.models.capture_layers(model, variables, x, head="head")
    # A block and its first layer take the same.
    shapes = {"z_block_1": (5, 2), "z_block_0": (5, 4), "dense": (5, 80), "head": (5, 6)}
    assert {path: feats.shape for path, feats in found.items()} == shapes
    assert list(found) == list(shapes)
    chex.assert_trees_all_close(found["z_block_1"], x.mean(axis=(1, 2)))
    chex.assert_trees_all_close(found["head"], lip_jax.capture_features(model, variables, x, head="head"))
    inside = lip_jax.capture_features(model, variables, x, head="z_block_0")
    chex.assert_trees_all_close(inside.mean(axis=(1, 2)), found["z_block_0"], atol=1e-6)
    of_layer = lip_jax.capture_features(model, variables, x, head="z_block_0/Conv_0")
    chex.assert_trees_all_equal(inside, of_layer)
    named = lip_jax.models.capture_layers(
        model, variables, x, head="head", layers=["params/dense", "z_block_0/Conv_0"]
    )
    assert list(named) == ["z_block_0/Conv_0", "dense", "head"]


def test_layers_of_nnx_are_those_of_linen():
    model, x = NnxBlocks(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (5, 4, 4, 2))
    found = lip_jax.models.capture_layers(model, None, x, num_classes=3)
    assert [feats.shape for feats in found.values()] == [(5, 2), (5, 4), (5, 80), (5, 6)]
    assert list(found)[1:] == ["z_block_0", "dense/0", "head"]
    inside = lip_jax.capture_features(model, None, x, head="z_block_0")
    chex.assert_trees_all_close(inside.mean(axis=(1, 2)), found["z_block_0"], atol=1e-6)


def test_a_head_that_sees_more_than_rows_has_no_layers_to_compare():
    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.Dense(4, name="dense")(x))

    x = jnp.ones((2, 7, 5))
    variables = Tokens().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"must be called once, with inputs \(n, 4\); got float32\[2,7,4\]"):
        lip_jax.models.capture_layers(Tokens(), variables, x, head="head")
