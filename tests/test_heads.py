"""The tree level: only the head changes, the right head, and in every form a tree may come in."""

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


@pytest.fixture(scope="module")
def digits():
    return zoo.digits()


@pytest.fixture(scope="module")
def cnn(digits):
    """A trained CNN: model, variables, images, noisy labels and the features of its head."""
    x, labels = digits
    noisy = lip_jax.noise.symmetric(jax.random.key(5), labels, 0.3, num_classes=zoo.NUM_CLASSES)
    model = zoo.BatchNormCNN()
    state, stats = zoo.train_linen(model, x[:600], noisy[:600])
    variables = {"params": state.params, "batch_stats": stats}
    feats = lip_jax.capture_features(model, variables, x, head="Dense_1")
    return model, state, variables, x, noisy, feats


@pytest.fixture(scope="module")
def nnx_model(digits):
    x, labels = digits
    noisy = lip_jax.noise.symmetric(jax.random.key(5), labels, 0.3, num_classes=zoo.NUM_CLASSES)
    model = zoo.train_nnx(zoo.NnxClassifier(nnx.Rngs(0)), x[:600], noisy[:600])
    feats = lip_jax.capture_features(model, None, x, head="head")
    return model, x, noisy, feats


def changed_paths(before, after) -> set[str]:
    """Paths of the leaves whose values differ; structure, dtypes and shapes must agree."""
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in pairs
        if not bool(jnp.array_equal(raw(old), raw(new)))
    }


def logits_of(feats, head):
    return feats @ head["kernel"] + head["bias"][None, :]


def raw(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf)


def test_features_times_head_are_the_models_logits(cnn):
    model, _, variables, x, _, feats = cnn
    head = variables["params"]["Dense_1"]
    chex.assert_trees_all_close(logits_of(feats, head), model.apply(variables, x), atol=1e-5)


def test_cnn_variables_change_only_in_the_head_kernel(cnn):
    model, _, variables, x, noisy, feats = cnn
    repaired = lip_jax.apply(variables, feats, noisy, rank=RANK)
    assert changed_paths(variables, repaired) == {"params/Dense_1/kernel"}
    expected = lip_jax.refine(variables["params"]["Dense_1"]["kernel"], feats, noisy, RANK)
    chex.assert_trees_all_close(repaired["params"]["Dense_1"]["kernel"], expected)
    logits = feats @ expected + variables["params"]["Dense_1"]["bias"][None, :]
    chex.assert_trees_all_close(model.apply(repaired, x), logits, atol=1e-4)


def test_train_state_takes_the_repaired_params(cnn):
    _, state, variables, x, noisy, feats = cnn
    repaired = state.replace(params=lip_jax.apply(state.params, feats, noisy, rank=RANK))
    assert changed_paths(state, repaired) == {"params/Dense_1/kernel"}
    logits = repaired.apply_fn({"params": repaired.params, "batch_stats": variables["batch_stats"]}, x)
    assert bool(jnp.isfinite(logits).all())


def test_frozen_dict_comes_back_frozen(cnn):
    _, _, variables, _, noisy, feats = cnn
    frozen = flax.core.freeze(variables)
    repaired = lip_jax.apply(frozen, feats, noisy, rank=RANK)
    assert isinstance(repaired, flax.core.FrozenDict)
    assert changed_paths(frozen, repaired) == {"params/Dense_1/kernel"}


def test_numpy_leaves_stay_numpy_and_unmodified(cnn):
    _, _, variables, _, noisy, feats = cnn
    held = jax.tree.map(np.array, variables)
    kept = jax.tree.map(np.copy, held)
    repaired = lip_jax.apply(held, np.asarray(feats), np.asarray(noisy), rank=RANK)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(repaired))
    assert changed_paths(held, repaired) == {"params/Dense_1/kernel"}
    chex.assert_trees_all_equal(held, kept)


def test_bfloat16_params_stay_bfloat16(cnn):
    _, _, variables, _, noisy, feats = cnn
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    repaired = lip_jax.apply(half, feats, noisy, rank=RANK)
    assert changed_paths(half, repaired) == {"params/Dense_1/kernel"}
    full = lip_jax.apply(variables, feats, noisy, rank=RANK)["params"]["Dense_1"]["kernel"]
    error = jnp.linalg.norm(repaired["params"]["Dense_1"]["kernel"].astype(jnp.float32) - full)
    assert float(error / jnp.linalg.norm(full)) < 2e-2


def test_partitioned_boxes_stay_boxed(cnn):
    _, _, variables, _, noisy, feats = cnn
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, names=(None,) * leaf.ndim), variables["params"])
    repaired = lip_jax.apply(boxed, feats, noisy, rank=RANK, head="Dense_1")
    assert changed_paths(boxed, repaired) == {"Dense_1/kernel/value"}


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
    assert changed_paths(before, nnx.state(model)) == set()
    assert changed_paths(before, nnx.state(repaired)) == {"head/kernel/value"}
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


def test_works_inside_jit_with_the_head_named_or_counted(cnn):
    _, _, variables, _, noisy, feats = cnn
    eager = lip_jax.apply(variables, feats, noisy, rank=RANK)
    for options in ({"head": "Dense_1"}, {"num_classes": 10}):
        jitted = jax.jit(lambda v, f, y, k, o=options: lip_jax.apply(v, f, y, rank=k, **o))
        chex.assert_trees_all_close(jitted(variables, feats, noisy, RANK), eager, rtol=1e-4, atol=1e-5)
        jitted(variables, feats, noisy, RANK + 1)
        assert jitted._cache_size() == 1


def test_jit_without_head_or_count_says_what_to_pass(cnn):
    _, _, variables, _, noisy, feats = cnn
    with pytest.raises(ValueError, match=r"Pass head= or num_classes="):
        jax.jit(lambda y: lip_jax.apply(variables, feats, y, rank=RANK))(noisy)


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
    assert changed_paths(variables, repaired) == {"params/Dense_1/kernel"}


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


def test_many_square_kernels_are_never_guessed_among(digits):
    x, labels = digits
    model = zoo.Transformer()
    variables = model.init(jax.random.key(0), x[:1])
    feats = lip_jax.capture_features(model, variables, x[:200], head="head")
    with pytest.raises(
        ValueError, match=r"(?s)5 kernels match.*Block_0/Dense_0.*Block_1/Dense_1.*head/kernel"
    ):
        lip_jax.apply(variables, feats, labels[:200], rank=RANK)
    repaired = lip_jax.apply(variables, feats, labels[:200], rank=RANK, head="head")
    assert changed_paths(variables, repaired) == {"params/head/kernel"}
    logits = logits_of(feats, repaired["params"]["head"])
    chex.assert_trees_all_close(model.apply(repaired, x[:200]), logits, atol=1e-4)


def test_optimizer_state_beside_the_params_is_not_mistaken_for_them(cnn):
    _, state, _, _, noisy, feats = cnn
    with pytest.raises(ValueError, match=r"num_classes = 11"):
        lip_jax.apply(state.params, feats, noisy, rank=RANK, head="Dense_1", num_classes=11)
    tree = {"params": state.params, "opt_state": state.opt_state[0].mu}
    repaired = lip_jax.apply(tree, feats, noisy, rank=RANK)
    assert changed_paths(tree, repaired) == {"params/Dense_1/kernel"}


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


def test_shared_nnx_layer_is_refused_unless_allowed_and_stays_shared(digits):
    x, labels = digits
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
        {"head": {"kernel": stored, "bias": bias}}, feats, noisy, rank=RANK, layout=layout, use_bias=True
    )
    expected = lip_jax.refine(kernel, feats, noisy, RANK, bias=bias.reshape(10))
    expected = (expected if layout.startswith("q") else expected.T).reshape(shape)
    chex.assert_trees_all_close(repaired["head"]["kernel"], expected, rtol=1e-4, atol=1e-5)


def test_use_bias_takes_the_heads_own_bias(cnn):
    _, _, variables, _, noisy, feats = cnn
    head = variables["params"]["Dense_1"]
    repaired = lip_jax.apply(variables, feats, noisy, rank=RANK, use_bias=True)
    expected = lip_jax.refine(head["kernel"], feats, noisy, RANK, bias=head["bias"])
    chex.assert_trees_all_close(repaired["params"]["Dense_1"]["kernel"], expected)
    without = {"kernel": head["kernel"]}
    chex.assert_trees_all_close(
        lip_jax.apply(without, feats, noisy, rank=RANK, use_bias=True)["kernel"],
        lip_jax.refine(head["kernel"], feats, noisy, RANK),
    )


def test_options_reach_the_refit(cnn):
    _, _, variables, _, noisy, feats = cnn
    options = {"ridge": 50.0, "ridge_to": "zero", "rcond": 0.0, "weights": jnp.linspace(0, 1, len(noisy))}
    repaired = lip_jax.apply(variables, feats, noisy, rank=RANK, **options)
    expected = lip_jax.refine(variables["params"]["Dense_1"]["kernel"], feats, noisy, RANK, **options)
    chex.assert_trees_all_close(repaired["params"]["Dense_1"]["kernel"], expected)


def test_several_heads_each_with_their_own_rows():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "species": {"kernel": jax.random.normal(keys[0], (12, 5))},
        "sex": {"kernel": jax.random.normal(keys[1], (8, 2))},
        "body": {"kernel": jnp.ones((3, 3))},
    }
    feats = {
        "species": jax.random.normal(keys[2], (60, 12)),
        "sex": jax.random.normal(keys[3], (40, 8)),
    }
    labels = {"species": jnp.arange(60) % 5, "sex": jnp.arange(40) % 2}
    repaired, reports = lip_jax.apply_with_report(
        params, feats, labels, head=["species", "sex"], rank={"species": 2, "sex": 0}
    )
    for name, rank in (("species", 2), ("sex", 0)):
        expected = lip_jax.refine(params[name]["kernel"], feats[name], labels[name], rank)
        chex.assert_trees_all_close(repaired[name]["kernel"], expected)
        assert reports[name].path == f"{name}/kernel"
    assert changed_paths(params, repaired) == {"species/kernel", "sex/kernel"}
    with pytest.raises(ValueError, match=r"rank is a mapping by head name and lacks 'sex'"):
        lip_jax.apply(params, feats, labels, head=["species", "sex"], rank={"species": 2})
    with pytest.raises(ValueError, match=r"more than once"):
        lip_jax.apply(params, feats["sex"], labels["sex"], head=["sex", "sex/kernel"], rank=0)


def test_report_tells_the_spectrum_before_and_after(cnn):
    _, _, variables, _, noisy, feats = cnn
    repaired, report = lip_jax.apply_with_report(variables, feats, noisy, rank=RANK)
    split = lip_jax.svd_split(variables["params"]["Dense_1"]["kernel"], RANK)
    chex.assert_trees_all_close(report.s, split.s, rtol=1e-5)
    chex.assert_trees_all_close(report.sigma, lip_jax.solve_tail_sigma(split, feats, noisy), rtol=1e-4)
    after = jnp.linalg.svd(repaired["params"]["Dense_1"]["kernel"], compute_uv=False)
    chex.assert_trees_all_close(jnp.sort(jnp.abs(report.sigma))[::-1], after, rtol=1e-4, atol=1e-5)
    assert int(report.ignored) == 0
    assert "params/Dense_1/kernel (32, 10): 4 of 10 components preserved" in str(report)


def test_rows_ignored_under_jit_are_counted_in_the_report(cnn):
    _, _, variables, _, noisy, feats = cnn
    bad = noisy.at[:3].set(10).at[3:5].set(-1)
    spoiled = feats.at[7, 2].set(jnp.nan)
    refit = jax.jit(lambda y, f: lip_jax.apply_with_report(variables, f, y, rank=RANK, head="Dense_1"))
    repaired, report = refit(bad, spoiled)
    assert int(report.ignored) == 4
    kept = jnp.ones(len(noisy), jnp.float32).at[:5].set(0).at[7].set(0)
    expected = lip_jax.apply(variables, feats, noisy, rank=RANK, weights=kept)
    chex.assert_trees_all_close(repaired, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"head params/Dense_1/kernel: labels must be class ids below l = 10"
    ):
        lip_jax.apply(variables, feats, bad, rank=RANK, head="Dense_1")


def test_features_of_the_wrong_width_name_the_head(cnn, unchecked):
    _, _, variables, _, noisy, feats = cnn
    with pytest.raises(ValueError, match=r"head params/Dense_1/kernel: feats .*q = 32.*float32\[1797,31\]"):
        lip_jax.apply(variables, feats[:, :31], noisy, rank=RANK, head="Dense_1")


def test_unknown_layout_is_refused(cnn, unchecked):
    _, _, variables, _, noisy, feats = cnn
    with pytest.raises(ValueError, match=r"layout must be .* got 'q'"):
        lip_jax.apply(variables, feats, noisy, rank=RANK, layout="q")


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
    assert changed_paths(nnx.state(before), nnx.state(model)) == set()


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


def test_capture_survives_linens_own_jit_and_remat(digits):
    x, _ = digits

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


class Adapted(nnx.Module):
    """A head with a low-rank adapter, within it or around it."""

    def __init__(self, kind, rngs):
        self.body = nnx.Linear(6, 5, rngs=rngs)
        self.head = {
            "within": lambda: nnx.LoRALinear(5, 4, lora_rank=2, rngs=rngs),
            "around": lambda: nnx.LoRA(5, 2, 4, base_module=nnx.Linear(5, 4, rngs=rngs), rngs=rngs),
            "normalised": lambda: nnx.WeightNorm(nnx.Linear(5, 4, rngs=rngs), rngs=rngs),
        }[kind]()

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("within", "the adapter head/lora.*lora_a adds to it"),
        ("around", "the adapter head/lora_a adds to it"),
        ("normalised", "head normalises it"),
    ],
)
def test_a_kernel_the_model_does_not_multiply_by_is_refused(rng, kind, why):
    model = Adapted(kind, nnx.Rngs(0))
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
    other = Adapted("within", nnx.Rngs(0))
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

    class NnxByKeyword(Adapted):
        def __call__(self, x):
            return self.head(inputs=nnx.relu(self.body(inputs=x)))

    module = NnxByKeyword("within", nnx.Rngs(0))
    module.head = nnx.Linear(5, 4, rngs=nnx.Rngs(1))
    feats = lip_jax.capture_features(module, None, x, head="head")
    np.testing.assert_allclose(feats, nnx.relu(x @ module.body.kernel[...]), rtol=1e-5, atol=1e-6)


def test_a_key_may_hold_slashes(rng):
    params = {
        "mlp/~/linear_0": {"w": jnp.ones((6, 5)), "b": jnp.zeros(5)},
        "mlp/~/linear_1": {"w": jnp.eye(5, 4)},
    }
    feats, labels = rng.normal(size=(30, 5)).astype(np.float32), np.arange(30) % 4
    for head in ("mlp/~/linear_1/w", "mlp/~/linear_1"):
        assert changed_paths(params, lip_jax.apply(params, feats, labels, rank=2, head=head)) == {
            "mlp/~/linear_1/w"
        }


def test_a_refit_beyond_the_dtype_of_the_head_is_an_error(rng):
    feats, labels = 1e-6 * rng.normal(size=(300, 8)).astype(np.float32), np.arange(300) % 3
    params = {"head": {"kernel": np.eye(8, 3, dtype=np.float16)}}
    with pytest.raises(ValueError, match=r"must be finite in the dtype of head/kernel.* range of float16"):
        lip_jax.apply(params, feats, labels, rank=0)
    moments = lip_jax.accumulate(lip_jax.moment_accumulator(8, 3), [(feats, labels)])
    with pytest.raises(ValueError, match=r"range of float16\. Store the head in bfloat16 or float32"):
        lip_jax.apply_from(params, moments, 0)


def test_a_bare_array_is_no_tree_with_a_named_head(rng):
    feats, labels = rng.normal(size=(30, 5)).astype(np.float32), np.arange(30) % 4
    with pytest.raises(ValueError, match="params must be a tree whose arrays have names; got a bare"):
        lip_jax.apply(jnp.eye(5, 4), feats, labels, rank=2)
