"""Repair of a whole network: where it is cut, what judges that, what comes back, and what is refused."""

import json
import re
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from lip_jax import plot
from lip_jax.networks.report import RepairReport

L, WIDTH = 4, 8
RIDGE = lip_jax.Choice((lip_jax.Ridge(),))


class Net(nn.Module):
    """Features pass `keep`, may be lost in `last`, and are classified by `head`."""

    width: int

    @nn.compact
    def __call__(self, inputs, scale=None):
        feats = nn.relu(nn.Dense(WIDTH, name="keep")(inputs))
        feats = nn.Dense(self.width, name="last")(feats)
        return nn.Dense(L, name="head")(feats if scale is None else feats * scale)


class NnxNet(nnx.Module):
    """The same in nnx."""

    def __init__(self, width, rngs):
        self.keep = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, width, rngs=rngs)
        self.head = nnx.Linear(width, L, rngs=rngs)

    def __call__(self, inputs):
        return self.head(self.last(nnx.relu(self.keep(inputs))))


def rows(seed, n, wrong=0.3):
    """Rows of four classes in eight features; the given labels, and the true ones."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, L, n)
    feats = rng.normal(size=(n, WIDTH)) + 1.5
    feats[np.arange(n), 2 * true] += 3
    given = np.where(rng.random(n) < wrong, rng.integers(0, L, n), true)
    return feats.astype(np.float32), given.astype(np.int32), true


FIT, VAL, TEST = rows(0, 400), rows(1, 300), rows(2, 500)


def weights(width, off=0.0):
    """`last` takes the first `width` features; the head reads them well but for noise of size `off`."""
    rng = np.random.default_rng(3)
    last = np.eye(WIDTH, width)
    feats = FIT[0] @ last
    readout = lip_jax.linear_readout(jnp.asarray(feats, jnp.float32), jnp.asarray(FIT[2], jnp.int32))
    kernel = np.asarray(readout.kernel) + off * rng.normal(size=(width, L))
    layer = lambda kernel, bias: {  # noqa: E731
        "kernel": jnp.asarray(kernel, jnp.float32),
        "bias": jnp.asarray(bias, jnp.float32),
    }
    params = {
        "keep": layer(np.eye(WIDTH), np.zeros(WIDTH)),
        "last": layer(last, np.zeros(width)),
        "head": layer(kernel, readout.bias),
    }
    return {"params": params}


def accuracy(logits, true=TEST[2]):
    return float((np.argmax(logits, axis=1) == true).mean())


def repaired(width, off=0.0, choice=RIDGE, **options):
    given = {"validation": VAL[:2], "head": "head", "choice": choice} | options
    return lip_jax.repair(Net(width), weights(width, off), *FIT[:2], **given)


@pytest.fixture(scope="module")
def cut():
    """Where `last` keeps three of eight features, so that one class in four is lost."""
    return repaired(3)


def test_the_network_is_cut_where_unseen_rows_show_an_earlier_layer_to_be_better(cut):
    model, variables = Net(3), weights(3)
    assert cut.layer in ("keep", "last")
    assert set(cut.params["params"]) == {"readout"} | ({"keep"} if cut.layer == "last" else set())
    assert accuracy(cut.apply(cut.params, TEST[0])) > accuracy(model.apply(variables, TEST[0])) + 0.1
    readout = tuple(cut.params["params"]["readout"][name] for name in ("kernel", "bias"))
    same = lip_jax.truncate_at(model, variables, TEST[0][:1], cut.layer, readout=readout)
    chex.assert_trees_all_equal(cut.params, same.params)
    np.testing.assert_array_equal(cut.apply(cut.params, TEST[0]), same.apply(same.params, TEST[0]))


def test_layers_stand_in_the_order_of_the_calls_with_figures_of_their_own_rows(cut):
    report = cut.report
    assert report.layers == ("keep", "last")
    assert report.methods == ("ridge", "ridge")
    assert report.width.tolist() == [WIDTH, WIDTH]
    assert (report.path, report.head.methods) == ("head", ("unchanged", "ridge"))
    # `keep` sees the inputs, `last` what they are after a relu.
    for i, through in enumerate((lambda x: x, lambda x: np.maximum(x, 0))):
        alone = lip_jax.select(
            jnp.zeros((WIDTH, L)),
            jnp.asarray(through(FIT[0])),
            jnp.asarray(FIT[1]),
            bias=jnp.zeros(L),
            validation=(jnp.asarray(through(VAL[0])), jnp.asarray(VAL[1])),
            methods=(lip_jax.Ridge(),),
        ).report
        np.testing.assert_allclose(report.accuracy[i], alone.accuracy[1], rtol=1e-6)
        np.testing.assert_allclose(report.strength[i], alone.strength[1], rtol=1e-6)


def test_differences_are_to_the_head_as_it_came_and_as_repaired(cut):
    report, head = cut.report, cut.report.head
    np.testing.assert_allclose(report.difference, report.accuracy - float(head.accuracy[0]), atol=1e-6)
    taken = float(head.accuracy[int(head.chosen)])
    np.testing.assert_allclose(report.over_head, report.accuracy - taken, atol=1e-6)
    gained = head.noise_loss[0] - report.noise_loss
    np.testing.assert_allclose(report.likelihood_difference, gained, atol=1e-5)
    lost = head.noise_loss[int(head.chosen)] - report.noise_loss
    np.testing.assert_allclose(report.likelihood_over_head, lost, atol=1e-3)
    # One method for the head, and one for each of two layers.
    assert report.level == pytest.approx(np.sqrt(4 + 2 * np.log(3)))
    best = report.ranked[0]
    assert best == report.chosen
    assert report.noise_loss[best] == min(report.noise_loss)


def test_the_head_stays_where_earlier_layers_are_no_better_than_its_repair():
    whole = repaired(WIDTH, off=1.0)
    assert whole.layer is None
    assert int(whole.report.head.chosen) == 1
    assert whole.report.difference.min() > 0.05
    variables = weights(WIDTH, off=1.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(whole.params, variables)
    for name in ("keep", "last"):
        chex.assert_trees_all_equal(whole.params["params"][name], variables["params"][name])
    before, after = (accuracy(whole.apply(v, TEST[0])) for v in (variables, whole.params))
    assert after > before + 0.05
    assert "stays the last layer: ridge of the input of" in whole.report.reason


def test_nothing_is_lost_on_a_network_that_needs_nothing():
    whole = repaired(WIDTH)
    assert whole.layer is None
    chex.assert_trees_all_equal(whole.params, weights(WIDTH))
    assert not whole.report.passes.any()


def test_rows_the_network_has_seen_cannot_tell_which_layer():
    with pytest.warns(UserWarning, match="the head is returned as it came"):
        whole = lip_jax.repair(Net(3), weights(3, off=3.0), *FIT[:2], head="head", choice=RIDGE)
    assert whole.layer is None
    assert whole.report.layers == ()
    assert "cannot tell whether an earlier one is better" in whole.report.reason
    assert str(whole.report).endswith(whole.report.reason)


def test_unseen_rows_need_no_second_set():
    alone = repaired(3, validation=None, seen=False)
    assert alone.layer in ("keep", "last")
    assert alone.report.head.source == "unseen rows"
    assert int(alone.report.head.tested) == len(FIT[0])
    assert accuracy(alone.apply(alone.params, TEST[0])) > 0.9


def test_batches_of_any_size_give_what_arrays_give(cut):
    batches = [(FIT[0][i : i + 150], FIT[1][i : i + 150]) for i in range(0, 400, 150)]
    judges = [(VAL[0][:7], VAL[1][:7]), (VAL[0][7:], VAL[1][7:], np.ones(293, np.float32))]
    by_batch = lip_jax.repair(
        Net(3), weights(3), iter(batches), validation=iter(judges), head="head", choice=RIDGE, batch_rows=64
    )
    assert by_batch.layer == cut.layer
    chex.assert_trees_all_close(by_batch.params, cut.params, rtol=1e-4, atol=1e-5)


def test_rows_of_weight_0_count_for_nothing(cut):
    x, y = np.concatenate([FIT[0], 100 * FIT[0][:50]]), np.concatenate([FIT[1], FIT[1][:50]])
    used = np.r_[np.ones(400, np.float32), np.zeros(50, np.float32)]
    weighted = lip_jax.repair(
        Net(3), weights(3), [(x, y, used)], validation=VAL[:2], head="head", choice=RIDGE
    )
    assert weighted.layer == cut.layer
    chex.assert_trees_all_close(weighted.params, cut.params, rtol=1e-3, atol=1e-4)


def test_several_inputs_come_as_a_tuple(cut):
    ones = lambda x: np.ones((len(x), 1), np.float32)  # noqa: E731
    both = lip_jax.repair(
        Net(3), weights(3)["params"], (FIT[0], ones(FIT[0])), FIT[1],
        validation=((VAL[0], ones(VAL[0])), VAL[1]), head="head", choice=RIDGE,
    )  # fmt: skip
    assert both.layer == cut.layer
    found = both.apply(both.params, (TEST[0], ones(TEST[0])))
    np.testing.assert_allclose(found, cut.apply(cut.params, TEST[0]), rtol=1e-4, atol=1e-4)


def test_bare_params_come_back_bare():
    variables = weights(WIDTH, off=1.0)["params"]
    whole = lip_jax.repair(
        Net(WIDTH), variables, *FIT[:2], validation=VAL[:2], head="head", choice=RIDGE, layers=["last"]
    )
    assert set(whole.params) == {"keep", "last", "head"}
    assert whole.report.layers == ("last",)
    assert whole.apply(whole.params, TEST[0]).shape == (500, L)


@pytest.mark.parametrize("as_state", [False, True], ids=["module", "state"])
@pytest.mark.parametrize("width", [3, WIDTH], ids=["cut", "head"])
def test_nnx_models_are_repaired_as_linen_ones(width, as_state):
    off = 0.0 if width == 3 else 1.0
    model, params = NnxNet(width, nnx.Rngs(0)), weights(width, off)["params"]
    state = nnx.state(model)
    for name, layer in params.items():
        for part, array in layer.items():
            state[name][part].value = array
    if not as_state:
        nnx.update(model, state)
    before = jax.tree.map(jnp.array, nnx.state(model))
    found = lip_jax.repair(
        model, state if as_state else None, *FIT[:2], validation=VAL[:2], head="head", choice=RIDGE
    )
    linen = repaired(width, off)
    assert found.layer == linen.layer
    assert isinstance(found.params, nnx.State)
    theirs, ours = linen.apply(linen.params, TEST[0]), found.apply(found.params, TEST[0])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(nnx.state(model), before)


class Convolutions(nn.Module):
    """A block of convolutions with statistics, called `block`; a shared layer, called twice."""

    @nn.compact
    def __call__(self, inputs, train=True):
        maps = nn.relu(nn.Conv(WIDTH, (1, 1), name="convolution")(inputs))
        maps = nn.BatchNorm(use_running_average=not train, name="norm")(maps)
        shared = nn.Dense(WIDTH, name="shared")
        feats = shared(shared(maps.mean(axis=(1, 2))))
        return nn.Dense(L, name="head")(nn.Dense(2, name="last")(feats))


def test_spatial_axes_are_averaged_and_layers_called_twice_are_left_out():
    model = Convolutions()
    in_space = lambda x: np.broadcast_to(x[:, None, None, :], (len(x), 2, 3, WIDTH))  # noqa: E731
    x, val_x, test_x = (in_space(part[0]) for part in (FIT, VAL, TEST))
    variables = model.init(jax.random.key(0), x[:1])
    params = variables["params"]
    eye = {"kernel": jnp.eye(WIDTH), "bias": jnp.zeros(WIDTH)}
    params["convolution"]["kernel"] = jnp.eye(WIDTH)[None, None]
    feats = FIT[0][:, :2]
    readout = lip_jax.linear_readout(jnp.asarray(feats), jnp.asarray(FIT[2], jnp.int32))
    params |= {
        "shared": eye,
        "last": {"kernel": jnp.eye(WIDTH, 2), "bias": jnp.zeros(2)},
        "head": {"kernel": readout.kernel, "bias": readout.bias},
    }
    found = lip_jax.repair(
        model, variables, x, FIT[1], validation=(val_x, VAL[1]), head="head", choice=RIDGE, train=False
    )
    # Nor does what has no kernel count as a layer.
    assert found.report.layers == ("convolution", "last")
    assert found.report.width.tolist() == [WIDTH, WIDTH]
    assert found.layer in ("convolution", "last")
    assert accuracy(found.apply(found.params, test_x)) > 0.9
    named = lip_jax.repair(
        model, variables, x, FIT[1], validation=(val_x, VAL[1]), head="head", choice=RIDGE,
        layers=["convolution"], train=False,
    )  # fmt: skip
    assert named.layer == "convolution"
    assert accuracy(named.apply(named.params, test_x)) > 0.9
    with pytest.raises(ValueError, match=r"layers must be called once.* got shared, for which"):
        lip_jax.repair(
            model,
            variables,
            x,
            FIT[1],
            validation=(val_x, VAL[1]),
            head="head",
            layers=["shared"],
            train=False,
        )


def test_a_class_without_rows_leaves_no_cut_to_judge():
    some = FIT[1] != 3
    report = lip_jax.repair(
        Net(3), weights(3), FIT[0][some], FIT[1][some], validation=VAL[:2], head="head", choice=RIDGE
    ).report
    assert not report.available.any()
    assert "left out: some class cannot be fitted or judged" in str(report)
    assert "no readout of another could be fitted and judged" in report.reason


def test_layers_that_are_too_wide_are_left_out_unless_they_are_named(monkeypatch):
    # By its name in full: the function of that name hides the module.
    monkeypatch.setattr(sys.modules["lip_jax.networks.repair"], "WIDEST", WIDTH - 1)
    report = repaired(3).report
    assert (report.layers, report.too_wide) == ((), ("keep", "last"))
    assert "there is no other to try" in report.reason
    assert repaired(3, layers=["last"]).report.layers == ("last",)


def test_refits_alone_leave_nothing_to_try_elsewhere():
    report = repaired(3, choice=lip_jax.Choice((lip_jax.Published(),))).report
    assert report.layers == ()


def test_the_head_is_found_by_the_number_of_classes():
    assert repaired(3, head=None, layers=["last"]).report.path == "head"


def test_the_report_prints_and_goes_to_json(cut):
    report = cut.report
    assert isinstance(report, RepairReport)
    text = str(report)
    assert re.search(rf"^\* {cut.layer} +ridge +{WIDTH} ", text, flags=re.MULTILINE)
    assert text.endswith(report.reason)
    assert f"cut before {cut.layer}, ridge of the input of {cut.layer}: better than head as it came" in text
    assert len(repr(cut)) < 800
    held = json.loads(json.dumps(report.as_dict()))
    assert held["chosen"] == report.chosen
    assert held["layers"] == list(report.layers)
    assert held["head"]["methods"] == ["unchanged", "ridge"]


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (FIT[0], None, "inputs must come with labels, or be batches"),
        ([(FIT[0],)], None, r"batch 0 must be \(inputs, labels\)"),
        ([FIT[0]], None, "batch 0 must be .* got a ndarray"),
        ([], None, "must hold at least one row"),
        ([(FIT[0], FIT[1][:-1])], None, "labels must have a row for each of inputs"),
    ],
)
def test_what_is_no_rows_is_refused(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        lip_jax.repair(Net(3), weights(3), inputs, labels, validation=VAL[:2], head="head")


def test_layers_that_are_not_there_are_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"got nowhere, for which that is not so.*head"):
        repaired(3, layers=["nowhere"])
    with pytest.raises(ValueError, match="model must be a flax linen or nnx Module"):
        lip_jax.repair(lambda x: x, {}, *FIT[:2])


def test_the_picture_rings_what_was_taken(cut):
    whole = repaired(WIDTH, off=1.0)
    for found, place in ((cut, cut.report.layers.index(cut.layer)), (whole, 2)):
        report = found.report
        ax = plot.layers_against_head(report)
        assert [text.get_text() for text in ax.get_xticklabels()] == ["keep", "last", "head"]
        (ring,) = [line for line in ax.get_lines() if line.get_markersize() == 13]
        assert round(float(ring.get_xdata()[0])) == place
        taken = report.head.difference[1] if report.chosen < 0 else report.difference[report.chosen]
        assert float(ring.get_ydata()[0]) == pytest.approx(float(taken))
    lonely = repaired(3, choice=lip_jax.Choice(())).report
    with pytest.raises(ValueError, match="report must hold a candidate that could be judged"):
        plot.layers_against_head(lonely)
