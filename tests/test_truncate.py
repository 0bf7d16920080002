"""A network cut at a layer: the same features, a readout on them, and of the variables only what it needs."""

import gc
import weakref

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lip_jax
from tests import zoo

N, L = 24, zoo.NUM_CLASSES


class DeepCNN(nn.Module):
    """Convolutions with BatchNorm, an auxiliary output on the way, and three dense layers."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(
            nn.BatchNorm(use_running_average=not train, name="norm_0")(nn.Conv(4, (3, 3), name="conv_0")(x))
        )
        self.sow("intermediates", "auxiliary", nn.Dense(2, name="auxiliary")(x.mean(axis=(1, 2))))
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, name="conv_1")(x))
        x = nn.relu(nn.Dense(8, name="dense_0")(x.reshape(x.shape[0], -1)))
        x = nn.relu(
            nn.BatchNorm(use_running_average=not train, name="norm_1")(nn.Dense(8, name="dense_1")(x))
        )
        return nn.Dense(L, name="head")(nn.Dropout(0.5, deterministic=not train)(x))


class Rematerialised(nn.Module):
    """Every layer inside linen's own remat."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.relu(nn.remat(nn.Dense)(8, name=f"dense_{i}")(x))
        return nn.Dense(L, name="head")(x)


class NnxCNN(nnx.Module):
    """Convolutions with BatchNorm, layers in a list, Dropout with its own random state."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(256, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, L, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.layers[0](x.reshape(x.shape[0], -1)))
        return self.head(self.dropout(nnx.relu(self.layers[1](x))))


@pytest.fixture(scope="module")
def rows():
    return tuple(array[:N] for array in zoo.digits())


@pytest.fixture(scope="module")
def cnn(rows):
    """The CNN with running statistics that are those of no initialisation."""
    variables = jax.jit(DeepCNN().init)(jax.random.key(0), rows[0])
    stats = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    return DeepCNN(), {"params": variables["params"], "batch_stats": stats}


@pytest.fixture
def nnx_cnn():
    model = NnxCNN(nnx.Rngs(0))
    model.norm.mean[...] = model.norm.mean[...] + 0.5
    model.eval()
    return model


def names(params):
    """Paths of the leaves, with slashes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }


def inputs_of(model, variables, x, layer, **options):
    feats = lip_jax.capture_features(model, variables, x, head=layer, **options)
    return feats.reshape(feats.shape[0], -1)


def random_readout(q):
    return jax.random.normal(jax.random.key(1), (q, L)), jnp.arange(L, dtype=jnp.float32)


def moved(params, grads):
    """One small step downhill."""
    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)


CONV_0 = {"params/conv_0/kernel", "params/conv_0/bias"}
NORM_0 = {"params/norm_0/scale", "params/norm_0/bias", "batch_stats/norm_0/mean", "batch_stats/norm_0/var"}
CONV_1 = {"params/conv_1/kernel", "params/conv_1/bias"}
DENSE_0 = {"params/dense_0/kernel", "params/dense_0/bias"}
CUTS = {
    "conv_0": set(),
    "conv_1": CONV_0 | NORM_0,
    "dense_0": CONV_0 | NORM_0 | CONV_1,
    "params/dense_1/kernel": CONV_0 | NORM_0 | CONV_1 | DENSE_0,
}


@pytest.mark.parametrize("layer", CUTS)
def test_a_linen_network_keeps_what_its_features_need_and_computes_their_readout(rows, cnn, layer):
    (x, _), (model, variables) = rows, cnn
    feats = inputs_of(model, variables, x, layer)
    readout = random_readout(feats.shape[1])
    cut = lip_jax.truncate_at(model, variables, x, layer, readout=readout)
    assert names(cut.params) == CUTS[layer] | {"params/readout/kernel", "params/readout/bias"}
    expected = feats @ readout[0] + readout[1][None, :]
    chex.assert_trees_all_close(cut.apply(cut.params, x), expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(jax.jit(cut.apply)(cut.params, x), expected, rtol=1e-4, atol=1e-4)


def test_without_a_readout_it_ends_in_the_features(rows, cnn):
    (x, _), (model, variables) = rows, cnn
    cut = lip_jax.truncate_at(model, variables, x, "conv_1")
    assert names(cut.params) == CUTS["conv_1"]
    chex.assert_trees_all_close(cut.apply(cut.params, x), inputs_of(model, variables, x, "conv_1"))
    assert cut.apply(cut.params, x).shape == (N, 8 * 8 * 4)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_kept_variables_are_the_ones_that_came_and_dropped_ones_are_freed(kind):
    x = jnp.ones((1, 4))
    if kind == "linen":
        model = nn.Sequential([nn.Dense(5), nn.Dense(3)])
        variables = model.init(jax.random.key(0), x)
        before, after = (variables["params"][name]["kernel"] for name in ("layers_0", "layers_1"))
        cut = lip_jax.truncate_at(model, variables, x, "layers_1")
        kept = cut.params["params"]["layers_0"]["kernel"]
        del variables
    else:
        model = nnx.Sequential(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(1)))
        before, after = (layer.kernel[...] for layer in model.layers)
        cut = lip_jax.truncate_at(model, None, x, "layers/1")
        kept = cut.params["layers"][0]["kernel"][...]
    assert kept is before
    held = weakref.ref(after)
    del after, model
    gc.collect()
    assert held() is None


def test_it_can_be_trained_end_to_end(rows, cnn):
    (x, labels), (model, variables) = rows, cnn
    readout = random_readout(8)
    cut = lip_jax.truncate_at(model, variables, x, "dense_1", readout=readout)

    @jax.jit
    def step(params):
        def loss(trained):
            logits = cut.apply({**params, "params": trained}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params["params"])
        return value, {**params, "params": moved(params["params"], grads)}, grads

    before, params, grads = step(cut.params)
    assert all(bool((jnp.abs(leaf) > 0).any()) for leaf in jax.tree.leaves(grads))
    assert float(step(params)[0]) < float(before)


def test_a_cut_network_is_a_pytree_that_jit_takes_whole(rows, cnn):
    (x, _), (model, variables) = rows, cnn
    cut = lip_jax.truncate_at(model, variables, x, "dense_0")
    logits = jax.jit(lambda cut, x: cut.apply(cut.params, x))(cut, x)
    chex.assert_trees_all_close(logits, cut.apply(cut.params, x), rtol=1e-5, atol=1e-5)


def test_the_package_finds_the_readout_in_the_cut_network(rows, cnn):
    (x, labels), (model, variables) = rows, cnn
    feats = inputs_of(model, variables, x, "dense_0")
    readout = lip_jax.linear_readout(feats, labels)
    cut = lip_jax.truncate_at(model, variables, x, "dense_0", readout=readout)
    chex.assert_trees_all_equal(
        cut.params["params"]["readout"], {"kernel": readout.kernel, "bias": readout.bias}
    )
    repaired = lip_jax.apply_readout(cut.params, feats, labels, head="readout")
    logits = cut.apply(repaired, x)
    assert float((jnp.argmax(logits, axis=1) == labels).mean()) > 0.9


@pytest.mark.parametrize(
    ("layer", "kept"),
    [
        ("conv", set()),
        ("layers/0", {"conv/kernel", "conv/bias", "norm/scale", "norm/bias", "norm/mean", "norm/var"}),
        (
            "head",
            {"conv/kernel", "conv/bias", "norm/scale", "norm/bias", "norm/mean", "norm/var"}
            | {f"layers/{i}/{part}" for i in range(2) for part in ("kernel", "bias")},
        ),
    ],
)
def test_an_nnx_network_keeps_what_its_features_need_and_computes_their_readout(rows, nnx_cnn, layer, kept):
    x, _ = rows
    feats = inputs_of(nnx_cnn, None, x, layer)
    readout = random_readout(feats.shape[1])
    cut = lip_jax.truncate_at(nnx_cnn, None, x, layer, readout=readout)
    assert isinstance(cut.params, nnx.State)
    assert names(cut.params) == kept | {"readout/kernel", "readout/bias"}
    expected = feats @ readout[0] + readout[1][None, :]
    chex.assert_trees_all_close(cut.apply(cut.params, x), expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(jax.jit(cut.apply)(cut.params, x), expected, rtol=1e-4, atol=1e-4)


def test_an_nnx_network_is_trained_by_its_params_and_takes_another_state(rows, nnx_cnn):
    x, labels = rows
    other = NnxCNN(nnx.Rngs(1))
    other.eval()
    readout = random_readout(8)
    cut = lip_jax.truncate_at(nnx_cnn, nnx.state(other), x, "layers/1", readout=readout)
    expected = inputs_of(other, None, x, "layers/1") @ readout[0] + readout[1][None, :]
    chex.assert_trees_all_close(cut.apply(cut.params, x), expected, atol=1e-4)

    @jax.jit
    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(cut.apply(params, x), labels).mean()

    grads = jax.grad(loss)(cut.params)
    assert jax.tree.structure(grads) == jax.tree.structure(cut.params)
    assert float(loss(moved(cut.params, grads))) < float(loss(cut.params))
    assert set(nnx.filter_state(cut.params, nnx.Param)["readout"]) == {"kernel", "bias"}


def test_half_precision_and_boxes_are_kept_and_logits_are_single(rows, cnn):
    (x, _), (model, variables) = rows, cnn
    half = jax.tree.map(
        lambda leaf: nn.Partitioned(leaf.astype(jnp.bfloat16), (None,) * leaf.ndim), variables
    )
    readout = (np.ones((8, L), np.float32), None)
    cut = lip_jax.truncate_at(DeepCNN(), half, x.astype(jnp.bfloat16), "dense_1", readout=readout)
    assert isinstance(cut.params["params"]["conv_0"]["kernel"], nn.Partitioned)
    assert cut.params["params"]["conv_0"]["kernel"].value.dtype == jnp.bfloat16
    logits = cut.apply(cut.params, x.astype(jnp.bfloat16))
    assert logits.dtype == jnp.float32
    expected = inputs_of(model, variables, x, "dense_1") @ readout[0]
    assert float(jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)) < 3e-2


def test_arguments_of_the_model_are_taken_at_the_cut_and_at_every_call(rows, cnn):
    (x, _), (model, variables) = rows, cnn
    training = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}
    cut = lip_jax.truncate_at(model, variables, x, "dense_0")
    chex.assert_trees_all_close(
        cut.apply(cut.params, x, **training), inputs_of(model, variables, x, "dense_0", **training), atol=1e-5
    )
    trained = lip_jax.truncate_at(model, variables, x, "dense_0", **training)
    chex.assert_trees_all_close(
        trained.apply(trained.params, x), cut.apply(cut.params, x, **training), atol=1e-5
    )
    # In training mode BatchNorm takes the batch's own statistics, so the running ones are not kept.
    assert names(trained.params) == CONV_0 | CONV_1 | {"params/norm_0/scale", "params/norm_0/bias"}
    with pytest.raises(
        ValueError, match=r"were dropped.*batch_stats/norm_0/mean, batch_stats/norm_0/var.*same arg"
    ):
        trained.apply(trained.params, x, train=False)


def test_layers_within_linens_own_transformations_can_be_cut_at(rows):
    x = rows[0].reshape(N, -1)
    model = Rematerialised()
    variables = model.init(jax.random.key(0), x)
    cut = lip_jax.truncate_at(model, variables, x, "dense_2")
    assert set(cut.params["params"]) == {"dense_0", "dense_1"}
    chex.assert_trees_all_close(cut.apply(cut.params, x), inputs_of(model, variables, x, "dense_2"))


def test_a_cut_may_be_made_inside_jit(rows, cnn):
    (x, _), (model, variables) = rows, cnn
    cut = jax.jit(lambda v, x: lip_jax.truncate_at(model, v, x, "dense_0"))(variables, x)
    assert names(cut.params) == CUTS["dense_0"]
    chex.assert_trees_all_close(
        cut.apply(cut.params, x), inputs_of(model, variables, x, "dense_0"), atol=1e-5
    )


def test_errors_say_what_does_not_fit(rows, cnn, nnx_cnn, unchecked):
    (x, _), (model, variables) = rows, cnn
    with pytest.raises(ValueError, match=r"model must be a flax linen or nnx Module; got function"):
        lip_jax.truncate_at(lambda x: x, None, x, "head")
    with pytest.raises(ValueError, match=r"no kernel that matches a kernel at head = 'dense_9'"):
        lip_jax.truncate_at(model, variables, x, "dense_9")
    with pytest.raises(
        ValueError, match=r"readout's kernel .* q = 96; got float32\[8,10\].*capture_features"
    ):
        lip_jax.truncate_at(model, variables, x, "dense_0", readout=(jnp.zeros((8, L)), None))
    with pytest.raises(ValueError, match=r"a layer 'conv' before the cut.*another name="):
        lip_jax.truncate_at(nnx_cnn, None, x, "head", readout=(jnp.zeros((8, L)), None), name="conv")
    with pytest.raises(ValueError, match=r"a layer 'norm_0' before the cut.*another name="):
        lip_jax.truncate_at(model, variables, x, "dense_0", name="norm_0")
    named = lip_jax.truncate_at(
        model, variables, x, "dense_1", readout=(jnp.zeros((8, L)), None), name="head"
    )
    assert set(named.params["params"]["head"]) == {"kernel"}


def test_what_is_inside_a_transformation_of_nnx_is_refused(rows):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.body, self.head = nnx.Linear(64, 8, rngs=rngs), nnx.Linear(8, L, rngs=rngs)

        def __call__(self, x):
            return nnx.remat(lambda self, x: self.head(self.body(x)))(self, x)

    with pytest.raises(ValueError, match=r"inside a transformation of the model"):
        lip_jax.truncate_at(Model(nnx.Rngs(0)), None, rows[0].reshape(N, -1), "head")


def test_a_readout_may_take_means_over_space():
    model, x = DeepCNN(), jax.random.normal(jax.random.key(0), (N, 6, 6, 2))
    variables = model.init(jax.random.key(1), x)
    feats = lip_jax.models.capture_layers(model, variables, x, head="head")["conv_1"]
    readout = lip_jax.linear_readout(feats, jnp.arange(N) % L)
    cut = lip_jax.truncate_at(model, variables, x[:1], "conv_1", readout=readout, pooled=True)
    expected = zoo.logits_of(feats, {"kernel": readout.kernel, "bias": readout.bias})
    chex.assert_trees_all_close(cut.apply(cut.params, x), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"must have as many rows as the layer has inputs"):
        lip_jax.truncate_at(model, variables, x[:1], "conv_1", readout=readout)
