"""`apply` with validation rows, and with neither those nor a rank: what changes, is said, is gained."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from lip_jax.sums.ridge import ridge_factors, ridge_solution
from tests import zoo
from tests.zoo import changed_paths

Q, L, N = 32, zoo.NUM_CLASSES, 400
HEAD = {"params/head/kernel", "params/head/bias"}
# Those without a search: a program with the purified readout takes seconds to compile.
CLOSED_FORM = lip_jax.Choice((lip_jax.Published(), lip_jax.Calibrated(), lip_jax.Ridge()))
# For heads as they were initialised.
ONLY_RIDGE = lip_jax.Choice((lip_jax.Ridge(),), trust_feats=True)
NOTHING = lip_jax.Choice((), trust_feats=True)
CANNOT_TELL = r"returned as it came: cannot tell: .* clean, or the body memorised them; pass validation="


class Network(nn.Module):
    """A body and a head, as linen stores them."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(L, name="head")(nn.relu(nn.Dense(Q, name="body")(x)))


def make_rows(seed, n, wrong=0.2):
    """Features of ten clusters, their class, and labels of which some are wrong."""
    keys = jax.random.split(jax.random.key(seed), 3)
    labels = jnp.arange(n, dtype=jnp.int32) % L
    centres = 1.2 * jax.random.normal(jax.random.key(99), (L, Q))
    feats = centres[labels] + jax.random.normal(keys[0], (n, Q))
    return feats, labels, lip_jax.noise.symmetric(keys[1], labels, wrong, num_classes=L)


def fitted(feats, labels, ridge):
    """The ridge readout as a head: memorises where features are many and the strength small."""
    factors = ridge_factors(feats, labels, None, L, intercept=True)
    kernel, bias = ridge_solution(factors, jnp.float32(ridge))
    return {"kernel": 10 * kernel, "bias": 10 * bias}


@pytest.fixture(scope="module")
def rows():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return make_rows(0, N), make_rows(1, N)


@pytest.fixture(scope="module")
def params(rows):
    """Variables whose head was fitted to a few rows only, so that any readout wins."""
    variables = Network().init(jax.random.key(0), jnp.ones((1, 8)))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        head = fitted(*make_rows(3, 60)[::2], ridge=1.0)
    return {"params": {**variables["params"], "head": head}}


def accuracy(head, feats, labels):
    return float((jnp.argmax(feats @ head["kernel"] + head["bias"][None, :], axis=1) == labels).mean())


# With validation rows.


@pytest.mark.slow
def test_a_winner_changes_kernel_and_bias_of_a_linen_tree_and_nothing_else(rows, params):
    (feats, clean, noisy), (val_feats, _, val_noisy) = rows
    repaired, report = lip_jax.apply_with_report(params, feats, noisy, validation=(val_feats, val_noisy))
    assert int(report.chosen) > 0
    assert changed_paths(params, repaired) == HEAD
    expected = lip_jax.select(
        params["params"]["head"]["kernel"],
        feats,
        noisy,
        bias=params["params"]["head"]["bias"],
        validation=(val_feats, val_noisy),
    )
    chex.assert_trees_all_equal(
        repaired["params"]["head"], {"kernel": expected.kernel, "bias": expected.bias}
    )
    chex.assert_trees_all_equal(report, expected.report)
    assert accuracy(repaired["params"]["head"], feats, clean) > 0.9
    only = lip_jax.apply(params, feats, noisy, validation=(val_feats, val_noisy))
    chex.assert_trees_all_equal(only, repaired)


def test_a_winner_changes_kernel_and_bias_of_an_nnx_module_and_nothing_else(rows):
    (feats, clean, noisy), (val_feats, _, val_noisy) = rows
    model = zoo.NnxClassifier(nnx.Rngs(0))
    before = nnx.state(nnx.clone(model))
    options = {"validation": (val_feats, val_noisy), "head": "head", "method": ONLY_RIDGE}
    repaired = lip_jax.apply(model, feats, noisy, **options)
    assert changed_paths(before, nnx.state(model)) == set()
    assert changed_paths(before, nnx.state(repaired)) == {"head/kernel/value", "head/bias/value"}
    assert float((jnp.argmax(repaired.head(feats), axis=1) == clean).mean()) > 0.9


def test_a_head_that_needs_nothing_comes_back_bit_for_bit(rows, params):
    (feats, _, noisy), (val_feats, val_clean, _) = rows
    head = fitted(*make_rows(2, 4000)[:2], ridge=1.0)
    head["bias"] = head["bias"].at[3].set(-0.0)
    tree = {"params": {**params["params"], "head": head}}
    repaired, report = lip_jax.apply_with_report(
        tree, feats, noisy, validation=(val_feats, val_clean), method=CLOSED_FORM
    )
    assert int(report.chosen) == 0
    assert report.reason.startswith("unchanged: ")
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(repaired), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


@pytest.mark.parametrize("names", [("kernel", "bias"), ("w", "b")], ids=str)
def test_numpy_trees_of_double_precision_and_other_names_keep_what_they_are(rows, names):
    (feats, clean, noisy), (val_feats, _, val_noisy) = rows
    rng = np.random.default_rng(0)
    tree = {"linear": {names[0]: rng.normal(size=(Q, L)), names[1]: 5 * rng.normal(size=L)}}
    validation = (np.asarray(val_feats), np.asarray(val_noisy))
    repaired = lip_jax.apply(
        tree, np.asarray(feats), np.asarray(noisy), validation=validation, method=ONLY_RIDGE
    )["linear"]
    assert [type(repaired[name]) for name in names] == [np.ndarray] * 2
    assert [repaired[name].dtype for name in names] == [np.float64] * 2
    head = {"kernel": repaired[names[0]], "bias": repaired[names[1]]}
    assert accuracy(head, np.asarray(feats), np.asarray(clean)) > 0.9
    unchanged = lip_jax.apply(
        tree, np.asarray(feats), np.asarray(noisy), validation=validation, method=NOTHING
    )["linear"]
    chex.assert_trees_all_equal(unchanged, tree["linear"])


@pytest.mark.slow
def test_several_heads_each_by_their_own_validation_rows(rows, params):
    (feats, clean, noisy), (val_feats, val_clean, val_noisy) = rows
    good = fitted(*make_rows(2, 4000)[:2], ridge=1.0)
    tree = {"a": params["params"]["head"], "b": good}
    repaired, reports = lip_jax.apply_with_report(
        tree,
        feats,
        noisy,
        head=["a", "b"],
        validation={"a": (val_feats, val_noisy), "b": (val_feats, val_clean)},
        method=CLOSED_FORM,
    )
    assert (int(reports["a"].chosen) > 0, int(reports["b"].chosen)) == (True, 0)
    assert changed_paths(tree, repaired) == {"a/kernel", "a/bias"}
    assert accuracy(repaired["a"], feats, clean) > 0.9


def test_options_reach_the_choice(rows, params):
    (feats, _, noisy), (val_feats, _, val_noisy) = rows
    _, report = lip_jax.apply_with_report(
        params,
        feats,
        noisy,
        validation=(val_feats, val_noisy),
        method=lip_jax.Choice((lip_jax.Ridge(),), metric="log_loss", num_standard_errors=1e6),
    )
    assert (report.methods, report.metric) == (("unchanged", "ridge"), "log_loss")
    assert report.level == pytest.approx(1e6)
    assert int(report.chosen) == 0
    assert int(report.winner) == 1


def test_under_jit_validation_gives_the_same(rows, params):
    (feats, _, noisy), (val_feats, _, val_noisy) = rows
    options = {"method": ONLY_RIDGE, "head": "head"}
    eager = lip_jax.apply_with_report(params, feats, noisy, validation=(val_feats, val_noisy), **options)
    jitted = jax.jit(lambda p, f, y, v: lip_jax.apply_with_report(p, f, y, validation=v, **options))
    found = jitted(params, feats, noisy, (val_feats, val_noisy))
    assert int(found[1].chosen) == 1
    chex.assert_trees_all_close(found, eager, rtol=1e-4, atol=1e-5)


def test_errors_name_the_head_and_what_is_wrong(rows, params, unchecked):
    (feats, _, noisy), (val_feats, _, val_noisy) = rows
    with pytest.raises(ValueError, match=r"head params/head/kernel: validation= has nothing to choose"):
        lip_jax.apply(params, feats, noisy, rank=3, validation=(val_feats, val_noisy))
    with pytest.raises(ValueError, match=r"head params/head/kernel: validation: labels must be class ids"):
        lip_jax.apply(params, feats, noisy, validation=(val_feats, val_noisy.at[0].set(L)))
    with pytest.raises(ValueError, match=r"validation is a mapping by head name and lacks 'head'"):
        lip_jax.apply(params, feats, noisy, head=["head"], validation={"other": (val_feats, val_noisy)})
    with pytest.raises(ValueError, match=r"feats must hold at least 10 rows .* validation=; got 7"):
        lip_jax.apply(params, feats[:7], noisy[:7], head="head")
    with pytest.raises(ValueError, match=r"at least two outputs.*apply\(rank=\.\.\.\)"):
        lip_jax.apply({"head": {"kernel": jnp.ones((Q, 1))}}, feats, noisy[:, None].astype(jnp.float32))
    with pytest.raises(ValueError, match=r"head params/head/kernel: method must be a value such as"):
        lip_jax.apply(params, feats, noisy, head="head", method="lip")


# With a rank.


def test_calibrated_method_refits_kernel_and_bias_at_that_rank(rows, params):
    (feats, _, noisy), _ = rows
    head = fitted(feats, noisy, ridge=50.0)
    tree = {"params": {**params["params"], "head": head}}
    repaired, report = lip_jax.apply_with_report(tree, feats, noisy, method=lip_jax.Calibrated(3, ridge=2.0))
    assert changed_paths(tree, repaired) == HEAD
    expected = lip_jax.refine_calibrated(head["kernel"], feats, noisy, 3, bias=head["bias"], ridge=2.0)
    chex.assert_trees_all_equal(
        repaired["params"]["head"], {"kernel": expected.kernel, "bias": expected.bias}
    )
    assert (report.path, report.strength) == ("params/head/kernel", 3)
    chex.assert_trees_all_equal((report.s, report.sigma), (expected.s, expected.sigma))


# With neither.


@pytest.fixture(scope="module")
def overfitted(rows):
    """A logistic head that knows its 400 rows with 40% wrong labels better than it should, and these rows."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        keys = jax.random.split(jax.random.key(5), 3)
        labels = jnp.arange(1500, dtype=jnp.int32) % 3
        centres = 0.4 * jax.random.normal(keys[0], (3, 200))
        feats = centres[labels] + jax.random.normal(keys[1], (1500, 200))
        noisy = lip_jax.noise.symmetric(keys[2], labels, 0.4, num_classes=3)
        readout = lip_jax.linear_readout(
            feats[:500], noisy[:500], num_classes=3, solver="logistic", ridge=0.5
        )
        head = {"kernel": readout.kernel, "bias": readout.bias}
        return head, lip_jax.Rows(feats, noisy), labels


def test_default_repairs_an_overfitted_head_by_its_own_rows(overfitted):
    head, (feats, noisy, _), labels = overfitted
    repaired, report = lip_jax.apply_with_report(head, feats[:500], noisy[:500], method=CLOSED_FORM)
    assert report.source == "imitation"
    assert float(report.imitation.cosine) > 0.99
    assert float(report.imitation.agreement) > 0.98
    # The stand-in has the strength that the head was trained with.
    assert float(report.imitation.strength) == pytest.approx(0.5, rel=0.2)
    assert int(report.chosen) > 0
    before, after = (accuracy(each, feats[500:], labels[500:]) for each in (head, repaired))
    assert after > before + 0.05
    assert str(report).splitlines()[-2].startswith("judged by 500 rows, out of fold, against a readout that")


def test_default_is_what_it_is_under_jit(overfitted):
    head, (feats, noisy, _), _ = overfitted
    arguments = head, feats[:500], noisy[:500]
    found = jax.jit(lambda *args: lip_jax.apply_with_report(*args, num_classes=3, method=CLOSED_FORM))(
        *arguments
    )
    expected = lip_jax.apply_with_report(*arguments, num_classes=3, method=CLOSED_FORM)
    assert int(found[1].chosen) == int(expected[1].chosen)
    chex.assert_trees_all_close(found[0], expected[0], rtol=1e-2, atol=1e-3)


def test_a_head_of_other_labels_comes_back_with_a_warning(overfitted):
    head, (feats, noisy, _), labels = overfitted
    other = lip_jax.linear_readout(feats[500:], labels[500:], num_classes=3, solver="logistic", ridge=0.5)
    head = {"kernel": other.kernel, "bias": other.bias}
    with pytest.warns(UserWarning, match=r"no readout of these rows resembles the head \(cosine 0\.\d\d\)"):
        kept, report = lip_jax.apply_with_report(head, feats[:500], noisy[:500], method=CLOSED_FORM)
    assert changed_paths(head, kept) == set()
    assert not bool(report.imitation.resembles)
    assert report.methods == ("unchanged",)


def test_a_body_that_memorised_its_labels_cannot_be_told_from_clean_ones(overfitted):
    # Features that carry the given labels, right and wrong, as those of a network trained too long.
    _, (feats, noisy, _), _ = overfitted
    carried = feats[:500].at[jnp.arange(500), noisy[:500]].add(8.0)
    readout = lip_jax.linear_readout(carried, noisy[:500], num_classes=3, solver="logistic", ridge=0.5)
    head = {"kernel": readout.kernel, "bias": readout.bias}
    with pytest.warns(UserWarning, match=CANNOT_TELL):
        kept, report = lip_jax.apply_with_report(head, carried, noisy[:500], method=CLOSED_FORM)
    assert bool(report.near_total)
    assert changed_paths(head, kept) == set()


def test_unseen_rows_fit_and_judge_in_turn(rows, params):
    (feats, _, noisy), (test_feats, test_clean, _) = rows
    repaired, report = lip_jax.apply_with_report(params, feats, noisy, seen=False, method=CLOSED_FORM)
    assert (report.source, report.imitation) == ("unseen rows", None)
    assert int(report.tested) == N
    assert int(report.chosen) > 0
    head = params["params"]["head"]
    after = accuracy(repaired["params"]["head"], test_feats, test_clean)
    assert after > accuracy(head, test_feats, test_clean) + 0.1
    # What is reported of unseen rows is about what other rows show.
    assert float(report.accuracy[report.chosen]) == pytest.approx(after * 0.82, abs=0.08)


def test_memorised_labels_bring_in_readouts_of_the_validation_rows(overfitted):
    head, (feats, noisy, _), _ = overfitted
    carried = feats[:500].at[jnp.arange(500), noisy[:500]].add(8.0)
    readout = lip_jax.linear_readout(carried, noisy[:500], num_classes=3, solver="logistic", ridge=0.5)
    head = {"kernel": readout.kernel, "bias": readout.bias}
    held = feats[500:], noisy[500:]
    options = {"validation": held, "method": lip_jax.Choice((lip_jax.Published(), lip_jax.Ridge()))}
    _, report = lip_jax.apply_with_report(head, carried, noisy[:500], **options)
    assert bool(report.memorised)
    assert report.methods == ("unchanged", "published", "ridge", "ridge, held out")


# On real features.


@pytest.fixture(scope="module")
def trained(clinc150):
    """Of 50 classes: an overfitted head of 40% wrong labels, a well regularised one of clean labels, rows."""
    from benchmarks import heads

    parts = [tuple(held[part.y < 50] for held in part) for part in clinc150.parts]
    train, val = parts[:2]
    noisy, val_noisy = (
        lip_jax.noise.symmetric(jax.random.key(seed), labels, 0.4, num_classes=50)
        for seed, (_, labels) in enumerate((train, val))
    )
    bad = heads.train_overfitted(jax.random.key(2), train[0], noisy, num_classes=50, epochs=60)
    good = heads.train_regularised(*train, num_classes=50)
    return bad, good, noisy, val_noisy, parts


@pytest.mark.slow
def test_on_clinc150_an_overfitted_head_gains_and_a_well_regularised_one_stays(trained):
    bad, good, noisy, val_noisy, ((train_x, train_y), (val_x, val_y), test) = trained
    validation = {"bad": (val_x, val_noisy), "good": (val_x, val_y)}
    tree = {"bad": bad["params"]["head"], "good": good["params"]["head"]}
    repaired, reports = lip_jax.apply_with_report(
        tree,
        train_x,
        {"bad": noisy, "good": train_y},
        head=["bad", "good"],
        validation=validation,
        method=CLOSED_FORM,
    )
    before, after = (accuracy(t["bad"], *test) for t in (tree, repaired))
    assert after > before + 0.2
    assert after > 0.9
    assert int(reports["good"].chosen) == 0
    assert changed_paths(tree, repaired) == {"bad/kernel", "bad/bias"}
    alone = lip_jax.apply(bad, train_x, noisy, method=CLOSED_FORM)
    assert accuracy(alone["params"]["head"], *test) > 0.9
