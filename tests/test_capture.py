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
