"""The head in a tree: the right one is found, in every form a tree may come in, and nothing else changes."""

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from tests import zoo

RANK = 4


def test_cnn_variables_change_only_in_the_head_kernel(cnn):
    model, _, variables, x, noisy, feats = cnn
    repaired = lip_jax.apply(variables, feats, noisy, rank=RANK)
    assert zoo.changed_paths(variables, repaired) == {"params/Dense_1/kernel"}
    expected = lip_jax.refine(variables["params"]["Dense_1"]["kernel"], feats, noisy, RANK)
    chex.assert_trees_all_close(repaired["params"]["Dense_1"]["kernel"], expected)
    logits = feats @ expected + variables["params"]["Dense_1"]["bias"][None, :]
    chex.assert_trees_all_close(model.apply(repaired, x), logits, atol=1e-4)


def test_train_state_takes_the_repaired_params(cnn):
    _, state, variables, x, noisy, feats = cnn
    repaired = state.replace(params=lip_jax.apply(state.params, feats, noisy, rank=RANK))
    assert zoo.changed_paths(state, repaired) == {"params/Dense_1/kernel"}
    logits = repaired.apply_fn({"params": repaired.params, "batch_stats": variables["batch_stats"]}, x)
    assert bool(jnp.isfinite(logits).all())


def test_frozen_dict_comes_back_frozen(cnn):
    _, _, variables, _, noisy, feats = cnn
    frozen = flax.core.freeze(variables)
    repaired = lip_jax.apply(frozen, feats, noisy, rank=RANK)
    assert isinstance(repaired, flax.core.FrozenDict)
    assert zoo.changed_paths(frozen, repaired) == {"params/Dense_1/kernel"}


def test_numpy_leaves_stay_numpy_and_unmodified(cnn):
    _, _, variables, _, noisy, feats = cnn
    held = jax.tree.map(np.array, variables)
    kept = jax.tree.map(np.copy, held)
    repaired = lip_jax.apply(held, np.asarray(feats), np.asarray(noisy), rank=RANK)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(repaired))
    assert zoo.changed_paths(held, repaired) == {"params/Dense_1/kernel"}
    chex.assert_trees_all_equal(held, kept)


def test_bfloat16_params_stay_bfloat16(cnn):
    _, _, variables, _, noisy, feats = cnn
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    repaired = lip_jax.apply(half, feats, noisy, rank=RANK)
    assert zoo.changed_paths(half, repaired) == {"params/Dense_1/kernel"}
    full = lip_jax.apply(variables, feats, noisy, rank=RANK)["params"]["Dense_1"]["kernel"]
    error = jnp.linalg.norm(repaired["params"]["Dense_1"]["kernel"].astype(jnp.float32) - full)
    assert float(error / jnp.linalg.norm(full)) < 2e-2


def test_partitioned_boxes_stay_boxed(cnn):
    _, _, variables, _, noisy, feats = cnn
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, names=(None,) * leaf.ndim), variables["params"])
    repaired = lip_jax.apply(boxed, feats, noisy, rank=RANK, head="Dense_1")
    assert zoo.changed_paths(boxed, repaired) == {"Dense_1/kernel/value"}


def test_sharding_is_kept(cnn):
    _, _, variables, _, noisy, feats = cnn
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    params = variables["params"]
    kernel = jax.device_put(params["Dense_1"]["kernel"], sharding)
    params = {**params, "Dense_1": {**params["Dense_1"], "kernel": kernel}}
    repaired = lip_jax.apply(params, feats, noisy, rank=RANK)
    assert repaired["Dense_1"]["kernel"].sharding == sharding


def test_nnx_module_comes_back_new_and_differs_only_in_the_head(nnx_model):
    model, x, noisy, feats = nnx_model
    before = nnx.state(nnx.clone(model))
    repaired = lip_jax.apply(model, feats, noisy, rank=RANK)
    assert type(repaired) is type(model)
    assert repaired is not model
    assert zoo.changed_paths(before, nnx.state(model)) == set()
    assert zoo.changed_paths(before, nnx.state(repaired)) == {"head/kernel/value"}
    chex.assert_trees_all_close(
        repaired(x), feats @ repaired.head.kernel[...] + repaired.head.bias[...][None, :], atol=1e-4
    )


def test_nnx_state_gives_the_same_as_the_module(nnx_model):
    model, _, noisy, feats = nnx_model
    state = lip_jax.apply(nnx.state(model), feats, noisy, rank=RANK)
    assert isinstance(state, nnx.State)
    module = lip_jax.apply(model, feats, noisy, rank=RANK)
    chex.assert_trees_all_equal(
        state.to_pure_dict()["head"]["kernel"], nnx.state(module).to_pure_dict()["head"]["kernel"]
    )


@pytest.mark.parametrize(
    "head",
    [
        "Dense_1",
        "params/Dense_1",
        "Dense_1/kernel",
        "params/Dense_1/kernel",
        lambda path, leaf: path.endswith("Dense_1/kernel"),
        lambda path, leaf: leaf.shape == (32, 10),
    ],
)
def test_every_way_of_naming_finds_the_same_head(cnn, head):
    _, _, variables, _, noisy, feats = cnn
    repaired = lip_jax.apply(variables, feats, noisy, rank=RANK, head=head)
    assert zoo.changed_paths(variables, repaired) == {"params/Dense_1/kernel"}


@pytest.mark.parametrize("head", ["Dense_0", "Conv_0", "Dense", "ense_1", "Dense_1/bias", "", "params"])
def test_a_wrong_name_is_an_error_never_another_kernel(cnn, head):
    _, _, variables, _, noisy, feats = cnn
    with pytest.raises(ValueError, match=r"Dense_0"):
        lip_jax.apply(variables, feats, noisy, rank=RANK, head=head)


def test_no_kernel_of_the_right_shape_lists_them_all(cnn):
    _, _, variables, _, noisy, feats = cnn
    few = jnp.where(noisy < 5, noisy, -1)
    with pytest.raises(ValueError, match=r"(?s)q = 32.*l = 5.*num_classes.*Dense_1/kernel: float32\[32,10\]"):
        lip_jax.apply(variables, feats, few, rank=RANK)


def test_a_predicate_that_holds_for_several_lists_them(cnn):
    _, _, variables, _, noisy, feats = cnn
    with pytest.raises(ValueError, match=r"(?s)2 kernels match.*Dense_0/kernel.*Dense_1/kernel"):
        lip_jax.apply(variables, feats, noisy, rank=RANK, head=lambda path, _: "Dense" in path)


def test_many_square_kernels_are_never_guessed_among():
    x, labels = zoo.digits()
    model = zoo.Transformer()
    variables = model.init(jax.random.key(0), x[:1])
    feats = lip_jax.capture_features(model, variables, x[:200], head="head")
    with pytest.raises(
        ValueError, match=r"(?s)5 kernels match.*Block_0/Dense_0.*Block_1/Dense_1.*head/kernel"
    ):
        lip_jax.apply(variables, feats, labels[:200], rank=RANK)
    repaired = lip_jax.apply(variables, feats, labels[:200], rank=RANK, head="head")
    assert zoo.changed_paths(variables, repaired) == {"params/head/kernel"}
    logits = zoo.logits_of(feats, repaired["params"]["head"])
    chex.assert_trees_all_close(model.apply(repaired, x[:200]), logits, atol=1e-4)


def test_optimizer_state_beside_the_params_is_not_mistaken_for_them(cnn):
    _, state, _, _, noisy, feats = cnn
    with pytest.raises(ValueError, match=r"num_classes = 11"):
        lip_jax.apply(state.params, feats, noisy, rank=RANK, head="Dense_1", num_classes=11)
    tree = {"params": state.params, "opt_state": state.opt_state[0].mu}
    repaired = lip_jax.apply(tree, feats, noisy, rank=RANK)
    assert zoo.changed_paths(tree, repaired) == {"params/Dense_1/kernel"}


def test_tied_embedding_is_refused_unless_allowed():
    ids = jax.random.randint(jax.random.key(0), (300,), 0, zoo.NUM_CLASSES)
    model = zoo.TiedLanguageModel()
    variables = model.init(jax.random.key(1), ids)
    feats = lip_jax.capture_features(model, variables, ids, head="Embed_0", layout="l q")
    embedding = variables["params"]["Embed_0"]["embedding"]
    chex.assert_trees_all_close(feats @ embedding.T, model.apply(variables, ids), atol=1e-5)
    options = {"rank": 2, "head": "Embed_0", "layout": "l q"}
    with pytest.raises(ValueError, match=r"Embed_0/embedding is tied.*read by ids.*allow_tied=True"):
        lip_jax.apply(variables, feats, ids, **options)
    repaired = lip_jax.apply(variables, feats, ids, **options, allow_tied=True)
    expected = lip_jax.refine(embedding.T, feats, ids, 2).T
    chex.assert_trees_all_close(repaired["params"]["Embed_0"]["embedding"], expected)


def test_shared_nnx_layer_is_refused_unless_allowed_and_stays_shared():
    x, labels = zoo.digits()
    model = zoo.NnxShared(nnx.Rngs(0))
    feats = nnx.relu(model.body(x.reshape(-1, 64)))
    with pytest.raises(ValueError, match=r"tied.*shared between.*auxiliary_head"):
        lip_jax.apply(model, feats, labels, rank=RANK)
    repaired = lip_jax.apply(model, feats, labels, rank=RANK, allow_tied=True)
    assert repaired.head is repaired.auxiliary_head
    assert not bool(jnp.array_equal(repaired.head.kernel[...], model.head.kernel[...]))


def test_the_same_array_at_two_paths_changes_at_both_where_allowed(cnn):
    _, _, variables, _, noisy, feats = cnn
    kernel = variables["params"]["Dense_1"]["kernel"]
    params = {"a": {"kernel": kernel}, "b": {"kernel": kernel}}
    with pytest.raises(ValueError, match=r"the same array stands at a/kernel and b/kernel"):
        lip_jax.apply(params, feats, noisy, rank=RANK, head="a")
    repaired = lip_jax.apply(params, feats, noisy, rank=RANK, head="a", allow_tied=True)
    assert repaired["a"]["kernel"] is repaired["b"]["kernel"]


@pytest.mark.parametrize(
    ("layout", "shape"), [("l q", (10, 32)), ("q ...", (32, 2, 5)), ("... q", (2, 5, 32))]
)
def test_other_layouts_give_the_same_head(cnn, layout, shape):
    _, _, variables, _, noisy, feats = cnn
    kernel = variables["params"]["Dense_1"]["kernel"]
    stored = (kernel if layout.startswith("q") else kernel.T).reshape(shape)
    bias = variables["params"]["Dense_1"]["bias"].reshape(shape[1:] if layout == "q ..." else (10,))
    repaired = lip_jax.apply(
        {"head": {"kernel": stored, "bias": bias}},
        feats,
        noisy,
        method=lip_jax.Published(RANK, use_bias=True),
        layout=layout,
    )
    expected = lip_jax.refine(kernel, feats, noisy, RANK, bias=bias.reshape(10))
    expected = (expected if layout.startswith("q") else expected.T).reshape(shape)
    chex.assert_trees_all_close(repaired["head"]["kernel"], expected, rtol=1e-4, atol=1e-5)


def test_unknown_layout_is_refused(cnn, unchecked):
    _, _, variables, _, noisy, feats = cnn
    with pytest.raises(ValueError, match=r"layout must be .* got 'q'"):
        lip_jax.apply(variables, feats, noisy, rank=RANK, layout="q")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("within", "the adapter head/lora.*lora_a adds to it"),
        ("around", "the adapter head/lora_a adds to it"),
        ("normalised", "head normalises it"),
    ],
)
def test_a_kernel_the_model_does_not_multiply_by_is_refused(rng, kind, why):
    model = zoo.Adapted(kind, nnx.Rngs(0))
    feats, labels = rng.normal(size=(30, 5)).astype(np.float32), np.arange(30) % 4
    readout = lip_jax.linear_readout(feats, labels)
    for call in (
        lambda: lip_jax.apply(model, feats, labels, rank=2),
        lambda: lip_jax.apply(nnx.state(model), feats, labels, rank=2),
        lambda: lip_jax.replace_head(model, readout),
    ):
        with pytest.raises(ValueError, match=f"is not what the model multiplies by: {why}.*Merge both"):
            call()
    # An adapter of another layer is no reason.
    other = zoo.Adapted("within", nnx.Rngs(0))
    other.body, other.head = (
        nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(1)),
        nnx.Linear(5, 4, rngs=nnx.Rngs(2)),
    )
    lip_jax.apply(other, feats, labels, rank=2)
    inside = {
        "kernel": jnp.eye(5, 4),
        "body": {"kernel": jnp.eye(6, 5), "lora": {"lora_a": jnp.ones((6, 2))}},
    }
    lip_jax.apply({"params": inside}, feats, labels, rank=2)
    lip_jax.apply(inside, feats, labels, rank=2)


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_linen_kernels_that_are_normalised_are_refused(rng, wrapper):
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = wrapper(nn.Dense(4))
            return layer(x) if wrapper is nn.WeightNorm else layer(x, update_stats=False)

    feats, labels = rng.normal(size=(30, 5)).astype(np.float32), np.arange(30) % 4
    variables = Normalised().init(jax.random.key(0), feats)
    with pytest.raises(ValueError, match=r"is not what the model multiplies by: .* rescales it"):
        lip_jax.apply(variables, feats, labels, rank=2)


def test_a_key_may_hold_slashes(rng):
    params = {
        "mlp/~/linear_0": {"w": jnp.ones((6, 5)), "b": jnp.zeros(5)},
        "mlp/~/linear_1": {"w": jnp.eye(5, 4)},
    }
    feats, labels = rng.normal(size=(30, 5)).astype(np.float32), np.arange(30) % 4
    for head in ("mlp/~/linear_1/w", "mlp/~/linear_1"):
        assert zoo.changed_paths(params, lip_jax.apply(params, feats, labels, rank=2, head=head)) == {
            "mlp/~/linear_1/w"
        }


def test_a_bare_array_is_no_tree_with_a_named_head(rng):
    feats, labels = rng.normal(size=(30, 5)).astype(np.float32), np.arange(30) % 4
    with pytest.raises(ValueError, match="params must be a tree whose arrays have names; got a bare"):
        lip_jax.apply(jnp.eye(5, 4), feats, labels, rank=2)


def test_under_jit_a_kernel_that_may_be_tied_is_refused_unless_allowed(rng):
    feats, labels = rng.normal(size=(30, 5)).astype(np.float32), np.arange(30) % 4
    kernel = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    tied = {"a": {"kernel": kernel}, "b": {"kernel": kernel}}

    def repair(params, **options):
        return jax.jit(lambda p: lip_jax.apply(p, feats, labels, rank=2, head="a", **options))(params)

    with pytest.raises(ValueError, match=r"a/kernel is tied: under jit nothing .* b/kernel.*allow_tied"):
        repair(tied)
    with pytest.raises(ValueError, match=r"a/kernel is tied: under jit nothing tells"):
        jax.jit(lambda p: lip_jax.replace_head(p, (kernel, None), head="a"))(tied)
    # What is known is changed; the other leaf may be another array.
    assert zoo.changed_paths(tied, repair(tied, allow_tied=True)) == {"a/kernel"}
    others = {
        "another shape": jnp.ones((4, 5)),
        "another dtype": kernel.astype(jnp.bfloat16),
        "other axes": jnp.ones((5, 2, 2)),
    }
    for other in others.values():
        params = {"a": {"kernel": kernel}, "b": {"kernel": other}}
        assert zoo.changed_paths(params, repair(params)) == {"a/kernel"}
    # Closed over, arrays can be told apart.
    apart = {"a": {"kernel": kernel}, "b": {"kernel": kernel + 1}}
    inside = jax.jit(lambda f: lip_jax.apply(apart, f, labels, rank=2, head="a"))(feats)
    assert zoo.changed_paths(apart, inside) == {"a/kernel"}
