"""A readout in the place of the head: its parts are those that are stored, and nothing else changes."""

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
from tests.zoo import changed_paths, logits_of

HEAD = {"params/Dense_1/kernel", "params/Dense_1/bias"}
Q, L, N = 32, zoo.NUM_CLASSES, 200


@pytest.fixture(scope="module")
def cnn():
    """A CNN as initialised, images, labels, the features of its head and a readout of them."""
    x, labels = (array[:N] for array in zoo.digits())
    model = zoo.BatchNormCNN()
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        feats = lip_jax.capture_features(model, variables, x, head="Dense_1")
        return model, variables, x, labels, feats, lip_jax.linear_readout(feats, labels)


def accuracy(logits, labels):
    return float((jnp.argmax(logits, axis=1) == labels).mean())


def test_only_the_head_changes_and_the_model_computes_the_readout(cnn):
    model, variables, x, _, feats, readout = cnn
    replaced = lip_jax.replace_head(variables, readout)
    assert changed_paths(variables, replaced) == HEAD
    chex.assert_trees_all_equal(
        replaced["params"]["Dense_1"], {"kernel": readout.kernel, "bias": readout.bias}
    )
    chex.assert_trees_all_close(model.apply(replaced, x), feats @ readout.kernel + readout.bias[None, :])


def test_heads_and_pairs_count_as_readouts(cnn):
    _, variables, _, _, _, readout = cnn
    expected = lip_jax.replace_head(variables, readout)
    pair = readout.kernel, readout.bias
    for given in (pair, lip_jax.Head(*pair), tuple(map(np.asarray, pair))):
        chex.assert_trees_all_equal(lip_jax.replace_head(variables, given), expected)


def test_works_inside_jit(cnn):
    _, variables, _, _, _, readout = cnn
    expected = lip_jax.replace_head(variables, readout)
    chex.assert_trees_all_equal(jax.jit(lip_jax.replace_head)(variables, readout), expected)
    named = jax.jit(lambda r: lip_jax.replace_head(variables, r, head="Dense_1", num_classes=L))
    chex.assert_trees_all_equal(named(readout), expected)


@pytest.mark.parametrize(
    "hold",
    [
        lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree),
        lambda tree: jax.tree.map(np.asarray, tree),
        flax.core.freeze,
        lambda tree: jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), tree),
    ],
    ids=["bfloat16", "NumPy", "FrozenDict", "Partitioned"],
)
def test_trees_of_every_kind_come_back_as_they_were_held(cnn, hold):
    _, variables, _, _, _, readout = cnn
    tree = hold(variables)
    replaced = lip_jax.replace_head(tree, readout, head="Dense_1")
    assert {path.removesuffix("/value") for path in changed_paths(tree, replaced)} == HEAD
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(replaced), strict=True):
        assert type(old) is type(new)
    kernel = jax.tree.leaves(replaced["params"]["Dense_1"])[1]
    chex.assert_trees_all_equal(jnp.asarray(kernel), readout.kernel.astype(kernel.dtype))


def test_numpy_doubles_are_stored_without_a_detour_through_single_precision(rng):
    tree = {"w": rng.normal(size=(Q, L)), "b": rng.normal(size=L)}
    kernel, bias = rng.normal(size=(Q, L)), rng.normal(size=L)
    replaced = lip_jax.replace_head(tree, (kernel, bias))
    chex.assert_trees_all_equal(replaced, {"w": kernel, "b": bias})
    assert replaced["w"].dtype == np.float64


def test_sharding_is_kept(cnn):
    _, variables, _, _, _, readout = cnn
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    head = variables["params"]["Dense_1"]
    params = {"head": {**head, "kernel": jax.device_put(head["kernel"], sharding)}}
    assert lip_jax.replace_head(params, readout)["head"]["kernel"].sharding == sharding


@pytest.mark.parametrize(("layout", "shape"), [("l q", (L, Q)), ("q ...", (Q, 2, 5)), ("... q", (2, 5, Q))])
def test_other_layouts_hold_the_same_head(cnn, layout, shape):
    _, _, _, _, _, readout = cnn
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1:] if layout == "q ..." else (L,))}
    replaced = lip_jax.replace_head({"head": params}, readout, layout=layout)["head"]
    stored = readout.kernel if layout.startswith("q") else readout.kernel.T
    chex.assert_trees_all_equal(replaced["kernel"], stored.reshape(shape))
    chex.assert_trees_all_equal(replaced["bias"].reshape(-1), readout.bias)


def test_nnx_modules_and_states_take_a_readout(cnn):
    x, labels = cnn[2], cnn[3]
    model = zoo.NnxClassifier(nnx.Rngs(0))
    model.eval()
    before = nnx.state(nnx.clone(model))
    feats = lip_jax.capture_features(model, None, x, head="head")
    readout = lip_jax.linear_readout(feats, labels)
    replaced = lip_jax.replace_head(model, readout, head="head")
    assert changed_paths(before, nnx.state(model)) == set()
    assert changed_paths(before, nnx.state(replaced)) == {"head/kernel/value", "head/bias/value"}
    chex.assert_trees_all_close(replaced(x), feats @ readout.kernel + readout.bias[None, :], atol=1e-5)
    state = lip_jax.replace_head(before, readout, head="head")
    chex.assert_trees_all_equal(state.to_pure_dict()["head"], nnx.state(replaced).to_pure_dict()["head"])


def test_a_bias_that_one_side_lacks(cnn):
    _, variables, _, _, _, readout = cnn
    replaced = lip_jax.replace_head(variables, (readout.kernel, None))["params"]["Dense_1"]
    chex.assert_trees_all_equal(replaced, {"kernel": readout.kernel, "bias": jnp.zeros(L)})
    without = {"head": {"kernel": jnp.zeros((Q, L))}}
    replaced = lip_jax.replace_head(without, (readout.kernel, jnp.zeros(L)))
    chex.assert_trees_all_equal(replaced, {"head": {"kernel": readout.kernel}})
    message = r"has a bias, but the head head/kernel has none.*intercept=False"
    with pytest.raises(ValueError, match=message):
        lip_jax.replace_head(without, readout)
    with pytest.raises(ValueError, match=message):
        jax.jit(lip_jax.replace_head)(without, readout)


def test_errors_say_what_does_not_fit(cnn, unchecked):
    _, variables, _, _, _, readout = cnn
    kernel, bias = readout.kernel, readout.bias
    with pytest.raises(ValueError, match=r"readout must be what a readout function .* pair.*got dict"):
        lip_jax.replace_head(variables, {"kernel": kernel, "bias": bias})
    with pytest.raises(
        ValueError, match=r"Dense_1/kernel, \(q, l\) = \(32, 10\); got float32\[31,10\].*num_classes=10"
    ):
        lip_jax.replace_head(variables, (kernel[1:], bias), head="Dense_1")
    with pytest.raises(ValueError, match=r"no kernel that matches a kernel \(q l\) with q = 31"):
        lip_jax.replace_head(variables, (kernel[1:], bias))
    with pytest.raises(ValueError, match=r"num_classes = 11, but the head params/Dense_1/kernel has 10"):
        lip_jax.replace_head(variables, readout, head="Dense_1", num_classes=11)
    with pytest.raises(ValueError, match=r"bias must have one entry per class, l = 10; got float32\[9\]"):
        lip_jax.replace_head(variables, (kernel, bias[1:]))
    with pytest.raises(ValueError, match=r"the readout's kernel must be finite"):
        lip_jax.replace_head(variables, (kernel.at[0, 0].set(jnp.nan), bias))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), variables)
    with pytest.raises(ValueError, match=r"finite in the dtype.*beyond the range of float16.*bfloat16"):
        lip_jax.replace_head(half, (1e6 * kernel, bias))


def test_tied_kernels_are_refused_unless_allowed(cnn):
    readout = cnn[5]
    kernel = jnp.zeros((Q, L))
    params = {"a": {"kernel": kernel}, "b": {"kernel": kernel}}
    pair = readout.kernel, None
    with pytest.raises(ValueError, match=r"a/kernel is tied.*changing it would.*allow_tied=True"):
        lip_jax.replace_head(params, pair, head="a")
    replaced = lip_jax.replace_head(params, pair, head="a", allow_tied=True)
    assert replaced["a"]["kernel"] is replaced["b"]["kernel"]


# Fitted and put in place at once.


def test_apply_readout_stores_the_ridge_readout_at_the_scale_of_logits(cnn):
    _, variables, _, labels, feats, readout = cnn
    repaired = lip_jax.apply_readout(variables, feats, labels)
    assert changed_paths(variables, repaired) == HEAD
    left_out = lip_jax.leave_one_out_scores(feats, labels, ridge=readout.ridge)
    scale = lip_jax.fit_logit_scale(left_out, labels)
    np.testing.assert_allclose(readout.scale, scale, rtol=1e-4)
    expected = {"kernel": readout.kernel, "bias": readout.bias}
    chex.assert_trees_all_close(repaired["params"]["Dense_1"], expected, rtol=1e-4)
    scores = logits_of(feats, expected) / readout.scale
    logits = logits_of(feats, repaired["params"]["Dense_1"])
    assert accuracy(logits, labels) == accuracy(scores, labels) > 0.8
    assert zoo.log_loss(logits, labels) < zoo.log_loss(scores, labels) / 2


def test_apply_readout_stores_the_logistic_readout_as_it_is(cnn):
    _, variables, _, labels, feats, _ = cnn
    weights = jnp.linspace(0.5, 1.5, N)
    method = lip_jax.Logistic(strength=1.0, tolerance=1e-4)
    repaired = lip_jax.apply_readout(variables, feats, labels, method=method, weights=weights)
    head = variables["params"]["Dense_1"]
    readout = lip_jax.linear_readout(
        feats, labels, solver="logistic", ridge=1.0, tolerance=1e-4, weights=weights,
        init=(head["kernel"], head["bias"]),
    )  # fmt: skip
    expected = {"kernel": readout.kernel, "bias": readout.bias}
    chex.assert_trees_all_close(repaired["params"]["Dense_1"], expected, rtol=1e-5)


def test_apply_readout_has_as_many_classes_as_the_head_and_a_bias_where_it_has_one(cnn):
    _, variables, _, labels, feats, _ = cnn
    few = jnp.where(labels < 5, labels, -1)
    kernel = lip_jax.apply_readout(variables, feats, few, head="Dense_1")["params"]["Dense_1"]["kernel"]
    assert kernel.shape == (Q, L)
    without = {"head": {"kernel": jnp.zeros((Q, L))}}
    repaired = lip_jax.apply_readout(without, feats, labels, method=lip_jax.Ridge(2.0))
    readout = lip_jax.linear_readout(feats, labels, ridge=2.0, intercept=False)
    chex.assert_trees_all_close(repaired["head"]["kernel"], readout.kernel, rtol=1e-3, atol=1e-5)


def test_apply_readout_inside_jit_keeps_dtypes_and_rows_without_weight_out(cnn):
    _, variables, _, labels, feats, _ = cnn
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    spoiled, weights = feats.at[7].set(jnp.nan), jnp.ones(N).at[7].set(0)
    jitted = jax.jit(lambda v, f, y, w: lip_jax.apply_readout(v, f, y, weights=w, num_classes=L))
    repaired = jitted(half, spoiled, labels, weights)
    assert changed_paths(half, repaired) == HEAD
    rest = jnp.arange(N) != 7
    expected = lip_jax.apply_readout(variables, feats[rest], labels[rest])["params"]["Dense_1"]["kernel"]
    error = jnp.linalg.norm(repaired["params"]["Dense_1"]["kernel"].astype(jnp.float32) - expected)
    assert float(error / jnp.linalg.norm(expected)) < 1e-2


def test_apply_readout_of_an_nnx_module_gives_a_new_module(cnn):
    x, labels = cnn[2], cnn[3]
    model = zoo.NnxClassifier(nnx.Rngs(0))
    model.eval()
    feats = lip_jax.capture_features(model, None, x, head="head")
    repaired = lip_jax.apply_readout(model, feats, labels, head="head")
    assert repaired is not model
    assert accuracy(repaired(x), labels) > 0.8 > accuracy(model(x), labels)


def test_apply_readout_errors_name_the_head(cnn, unchecked):
    _, variables, _, labels, feats, _ = cnn
    with pytest.raises(
        ValueError, match=r"head params/Dense_1/kernel: labels must be class ids below l = 10"
    ):
        lip_jax.apply_readout(variables, feats, labels.at[3].set(10), head="Dense_1")
    with pytest.raises(ValueError, match=r"head params/Dense_1/kernel: feats .*q = 32.*float32\[200,31\]"):
        lip_jax.apply_readout(variables, feats[:, 1:], labels, head="Dense_1")
    method = lip_jax.Purified(solver="lasso")
    with pytest.raises(ValueError, match=r"head params/Dense_1/kernel: solver must be .* got 'lasso'"):
        lip_jax.apply_readout(variables, feats, labels, method=method)
    with pytest.raises(ValueError, match=r"method must be a readout.*published is a refit"):
        lip_jax.apply_readout(variables, feats, labels, method=lip_jax.Published(2))
    with pytest.raises(ValueError, match=r"Pass head= or num_classes="):
        jax.jit(lambda y: lip_jax.apply_readout(variables, feats, y))(labels)


# What excludes each other.


def test_a_rank_beside_a_method_that_has_one_or_none_to_give_is_refused(cnn):
    _, variables, _, labels, feats, _ = cnn
    for method in (lip_jax.Published(3), lip_jax.Calibrated(0), lip_jax.Ridge(), lip_jax.Choice()):
        with pytest.raises(ValueError, match=r"rank= is the rank of a refit .* open.*got it beside"):
            lip_jax.apply(variables, feats, labels, rank=2, method=method, head="Dense_1")


@pytest.mark.parametrize("method", [lip_jax.Published(), lip_jax.Calibrated()], ids=lambda m: m.name)
def test_a_refit_without_a_rank_and_nothing_to_choose_one_is_refused(cnn, method):
    _, variables, _, labels, feats, _ = cnn
    with pytest.raises(ValueError, match=rf"the method {method.name} leaves its rank open.*Give rank=, or"):
        lip_jax.apply(variables, feats, labels, method=method, head="Dense_1")


@pytest.mark.parametrize(
    "method",
    [lip_jax.Published(2), lip_jax.Calibrated(2), lip_jax.Ridge(1.0), lip_jax.Logistic(1.0)],
    ids=lambda method: method.name,
)
def test_validation_rows_beside_a_method_that_leaves_nothing_open_are_refused(cnn, method):
    _, variables, _, labels, feats, _ = cnn
    with pytest.raises(ValueError, match=rf"nothing to choose: the method {method.name} leaves neither"):
        lip_jax.apply(variables, feats, labels, method=method, validation=(feats, labels), head="Dense_1")


def test_several_heads_may_have_ranks_of_their_own_beside_one_method(cnn):
    _, variables, _, labels, feats, _ = cnn
    heads = {name: dict(variables["params"]["Dense_1"]) for name in "ab"}
    heads["b"]["kernel"] = 2 * heads["b"]["kernel"]
    method, ranks = lip_jax.Calibrated(ridge=1.0), {"a": 2, "b": 3}
    _, reports = lip_jax.apply_with_report(heads, feats, labels, head=["a", "b"], method=method, rank=ranks)
    assert {name: report.strength for name, report in reports.items()} == ranks
