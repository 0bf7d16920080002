"""Methods as values: what they leave open, what they say they did, and how often rows are factorised."""

import dataclasses
import importlib
import inspect
from functools import partial
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from lip_jax._results import ShortRepr
from lip_jax.choice import compare
from lip_jax.sums.ridge import ridge_factors
from lip_jax.sums.tail import tail_sums
from tests import oracles, own_methods

N, Q, L = 240, 6, 4


@pytest.fixture(scope="module")
def rows():
    """Features, labels of which a fifth is wrong, and a head."""
    rng = np.random.default_rng(0)
    labels = (np.arange(N) % L).astype(np.int32)
    feats = (rng.normal(size=(N, Q)) + 2 * np.eye(L, Q)[labels]).astype(np.float32)
    labels = np.where(rng.random(N) < 0.2, rng.integers(0, L, N), labels).astype(np.int32)
    return feats, labels, rng.normal(size=(Q, L)).astype(np.float32), rng.normal(size=L).astype(np.float32)


def tree(kernel, bias=None):
    return {"head": {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}}


# Values.


METHODS = (lip_jax.Published, lip_jax.Calibrated, lip_jax.Ridge, lip_jax.Logistic, lip_jax.Purified)


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_values(method):
    assert method() == method()
    assert hash(method()) == hash(method())
    assert len({method(), method()}) == 1
    field = dataclasses.fields(method)[0].name
    assert dataclasses.replace(method(), **{field: 2}) != method()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method(), field, 2)


# One factorisation for each set of rows.


def equations(jaxpr):
    """All equations of a jaxpr and of those within it: of calls, branches and loops."""
    for equation in jaxpr.eqns:
        yield equation
        for held in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(held, "jaxpr", held)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def decompositions(rows, methods):
    """How many eigendecompositions of `(q, q)` matrices, second moments of rows, a choice makes."""
    feats, labels, kernel, bias = map(jnp.asarray, rows)
    half = N // 2
    fit, val = lip_jax.Rows(feats[:half], labels[:half]), lip_jax.Rows(feats[half:], labels[half:])
    program = partial(compare._choose_by, choice=lip_jax.Choice(methods), also=False, keep=False)
    jaxpr = jax.make_jaxpr(program)(lip_jax.Head(kernel, bias), fit, val, None).jaxpr
    made = [e.invars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "eigh"]
    assert made, "not even the heads are decomposed: is the primitive called otherwise?"
    return made.count((Q, Q))


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ((lip_jax.Published(), lip_jax.Calibrated()), 0),
        ((lip_jax.Published(), lip_jax.Ridge()), 1),
        ((lip_jax.Published(), lip_jax.Calibrated(), lip_jax.Ridge(), lip_jax.Logistic()), 1),
        # One for all rows, one for the trusted ones.
        (compare.DEFAULT_METHODS, 2),
    ],
    ids=["refits", "a readout", "without purification", "default"],
)
def test_a_choice_factorises_each_set_of_rows_once(rows, methods, expected):
    assert decompositions(rows, methods) == expected


# Results in a REPL.


def results(rows):
    """One result of each type."""
    feats, labels, kernel, bias = rows
    params = tree(kernel, bias)
    moments = lip_jax.accumulate(lip_jax.moment_accumulator(Q, L), [(feats, labels)])
    split = lip_jax.svd_split(kernel, 2)
    along = lip_jax.accumulate(lip_jax.tail_accumulator(split), [(feats, labels)])
    purified = lip_jax.purified_readout(feats, labels, solver="ridge", ridge=1.0)
    fit = lip_jax.methods.Fit(lip_jax.Rows(*map(jnp.asarray, (feats, labels))), None, None, jnp.int32(0))
    head = lip_jax.Head(jnp.asarray(kernel), jnp.asarray(bias))
    methods = lip_jax.Calibrated(), lip_jax.Ridge()
    selection = lip_jax.select(
        kernel, feats[100:], labels[100:], bias=bias, validation=(feats[:100], labels[:100]), methods=methods
    )
    imitation = lip_jax.select(
        kernel, feats, labels, bias=bias, methods=(), trust_feats=True
    ).report.imitation
    factors = ridge_factors(*fit.rows, L, intercept=True)
    network = nn.Sequential([nn.Dense(Q), nn.Dense(L)])
    variables = network.init(jax.random.key(0), feats)
    return [
        fit,
        imitation,
        head,
        fit.rows,
        moments,
        along,
        split,
        purified,
        purified.readout,
        purified.purified,
        purified.purified.quality,
        selection,
        selection.report,
        tail_sums(split.u, split.vt, *fit.rows, None),
        lip_jax.Calibrated().path(head, fit),
        lip_jax.Calibrated(2).settle(head, fit),
        own_methods.Shrunk().path(head, fit),
        dataclasses.replace(fit, factors=factors),
        lip_jax.Ridge().path(head, dataclasses.replace(fit, factors=factors)),
        lip_jax.memorised(kernel, feats, labels, bias=bias),
        lip_jax.head_metrics(feats @ kernel, labels),
        lip_jax.refine_calibrated(kernel, feats, labels, 2, bias=bias),
        lip_jax.apply_with_report(params, feats, labels, rank=2)[1],
        lip_jax.predictive_power({"a": feats, "b": feats}, labels, {"a": feats, "b": feats}, labels),
        lip_jax.sin_theta_bound(feats, num_classes=L, gap=0.5, flip_rate=0.1),
        lip_jax.spectrum.effective_rank(split.s),
        lip_jax.truncate_at(network, variables, feats, "layers_1"),
    ]


CHAPTERS = ("rows", "spectrum", "sums", "bounds", "quality", "methods", "choice", "models")


def result_types():
    root = Path(lip_jax.__file__).parent
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in (
            "numerics",
            "rows",
            "spectrum",
            "sums",
            "bounds",
            "quality",
            "methods",
            "choice",
            "models",
        ):
            module = importlib.import_module(".".join(("lip_jax", *parts)))
            yield from (held for held in vars(module).values() if inspect.isclass(held))


@pytest.mark.slow
def test_every_result_prints_short(rows):
    made = results(rows)
    types = {kind for kind in result_types() if issubclass(kind, ShortRepr) and kind is not ShortRepr}
    assert types <= {type(result) for result in made}
    for result in made:
        shown = repr(result)
        assert shown.startswith(type(result).__name__ + "(")
        assert len(shown) < 400, shown
        assert "\n" not in shown


# A head of one output.


def single(rows):
    feats, labels, kernel, _ = rows
    return feats, (labels[:, None] == 0).astype(np.float32), kernel[:, :1]


READOUTS = (lip_jax.Ridge(), lip_jax.Logistic(), lip_jax.Purified(), lip_jax.Purified(solver="ridge"))
ONE_CLASS = r"labels must name at least two classes; got one.*num_classes=2.*lip_jax\.refine"
ONE_OUTPUT = r"kernel must be a softmax head's, with at least two outputs; got float32\[6,1\]"
CLASS_IDS = r"labels are class ids, but the kernel has one output \(a sigmoid head\)"


@pytest.mark.parametrize("method", READOUTS, ids=repr)
def test_readouts_refuse_a_head_of_one_output_by_name(rows, method):
    feats, targets, kernel = single(rows)
    for apply in (lip_jax.apply, lip_jax.apply_readout):
        with pytest.raises(ValueError, match=rf"head head/kernel: {ONE_CLASS}"):
            apply(tree(kernel), feats, targets, method=method)
        with pytest.raises(ValueError, match=rf"head head/kernel: {CLASS_IDS}"):
            apply(tree(kernel), feats, rows[1], method=method, head="head")


def test_whatever_judges_classes_refuses_a_single_one_by_name(rows):
    feats, targets, kernel = single(rows)
    for function in (
        lip_jax.label_quality,
        lip_jax.purify,
        lip_jax.purified_readout,
        lip_jax.linear_readout,
        partial(lip_jax.linear_readout, solver="logistic"),
    ):
        with pytest.raises(ValueError, match=ONE_CLASS):
            function(feats, targets)
    for function in (lip_jax.memorised, lip_jax.select):
        with pytest.raises(ValueError, match=ONE_OUTPUT):
            function(kernel, feats, targets, bias=None)
    with pytest.raises(ValueError, match=ONE_OUTPUT):
        lip_jax.apply(tree(kernel), feats, targets, method=lip_jax.Calibrated(0))


def test_a_head_of_one_output_is_refitted_as_published(rows):
    feats, targets, kernel = single(rows)
    u, s, vt = np.linalg.svd(oracles.f64(kernel), full_matrices=False)
    expected = u * oracles.tail_sigma(u, s, vt, 0, feats, targets) @ vt
    assert oracles.relative_error(lip_jax.refine(kernel, feats, targets, 0), expected) <= 1e-5
    applied = lip_jax.apply(tree(kernel), feats, targets, rank=0)["head"]["kernel"]
    assert oracles.relative_error(applied, expected) <= 1e-5


# What a method says it did.


@pytest.mark.parametrize(
    "method",
    [lip_jax.Published(1), lip_jax.Calibrated(1, ridge=0.5), lip_jax.Ridge(2.0)],
    ids=lambda method: method.name,
)
def test_change_is_the_relative_change_of_the_kernel(rows, method):
    feats, labels, kernel, bias = rows
    params, report = lip_jax.apply_with_report(tree(kernel, bias), feats, labels, method=method)
    expected = oracles.relative_error(params["head"]["kernel"], kernel)
    assert float(report.change) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.01
    assert (report.method, report.refit) == (method.name, method.name in ("published", "calibrated"))
    assert float(report.strength) == (2 if method.name == "ridge" else 1)
    assert f"relative change of the kernel {expected:.3g}" in str(report)


def test_change_of_nothing_is_0_and_that_of_a_head_of_zeros_infinite(rows):
    feats, labels, kernel, bias = rows
    method = lip_jax.Calibrated(L)
    assert float(lip_jax.apply_with_report(tree(kernel, bias), feats, labels, method=method)[1].change) == 0

    def of_kernel(kernel):
        repaired = lip_jax.apply_with_report(tree(kernel, bias), feats, labels, method=method, head="head")
        return repaired[1].change

    chex.assert_tree_all_finite(jax.grad(of_kernel)(jnp.asarray(kernel)))
    zeros = tree(0 * kernel, bias)
    for rank, change in ((lip_jax.Ridge(2.0), np.inf), (method, 0)):
        assert float(lip_jax.apply_with_report(zeros, feats, labels, method=rank)[1].change) == change


def test_validation_rows_choose_the_rank_that_is_best_on_them(rows):
    feats, labels, kernel, bias = rows
    half = N // 2
    fit, val = (feats[:half], labels[:half]), (feats[half:], labels[half:])
    method = lip_jax.Calibrated()
    params, report = lip_jax.apply_with_report(tree(kernel, bias), *fit, method=method, validation=val)
    heads = [lip_jax.refine_calibrated(kernel, *fit, rank, bias=bias) for rank in range(L, -1, -1)]
    logits = [val[0] @ head.kernel + head.bias[None, :] for head in heads]
    accuracy = [float(lip_jax.head_metrics(z, val[1]).accuracy) for z in logits]
    best = int(np.argmax(accuracy))
    assert float(report.strength) == L - best
    chex.assert_trees_all_close(params["head"]["kernel"], heads[best].kernel, rtol=1e-4, atol=1e-5)


def test_a_settled_method_needs_no_path_of_one_head(rows):
    feats, labels, kernel, bias = rows
    method = own_methods.Settles()
    params, report = lip_jax.apply_with_report(tree(kernel, bias), feats, labels, method=method)
    np.testing.assert_array_equal(params["head"]["kernel"], kernel)
    assert (report.method, float(report.strength), float(report.change)) == ("settles", 1, 0)


# Readouts are logits.


@pytest.fixture(scope="module")
def known():
    """A problem whose classes overlap: clean and noisy labels to fit, and clean ones held out."""
    rng = np.random.default_rng(1)
    truth = 1.2 * rng.normal(size=(8, L))

    def draw(n):
        feats = rng.normal(size=(n, 8)).astype(np.float32)
        return feats, np.argmax(feats @ truth + rng.gumbel(size=(n, L)), axis=1).astype(np.int32)

    return draw(2000), draw(2000)


def off_scale(logits, labels):
    """Log-loss as it is over that at the best single scale, less 1."""
    best = oracles.best_scale(logits, labels)
    as_is, at_best = (oracles.metrics(a * logits, labels)["log_loss"] for a in (1, best))
    return as_is / at_best - 1


def logits_of(head, feats):
    return oracles.f64(feats) @ oracles.f64(head.kernel) + oracles.f64(head.bias)


def head_in(params):
    return lip_jax.Head(params["head"]["kernel"], params["head"]["bias"])


def moments_of(rows):
    return lip_jax.accumulate(lip_jax.moment_accumulator(8, L), [tuple(rows)])


LOGITS = {
    "linear_readout": lambda rows: lip_jax.linear_readout(*rows),
    "linear_readout, PRESS": lambda rows: lip_jax.linear_readout(*rows, criterion="press"),
    "linear_readout, much ridge": lambda rows: lip_jax.linear_readout(*rows, ridge=1e4),
    "purified_readout": lambda rows: lip_jax.purified_readout(*rows, solver="ridge").readout,
    "apply_readout": lambda rows: head_in(
        lip_jax.apply_readout(tree(np.ones((8, L), np.float32), np.zeros(L, np.float32)), *rows)
    ),
    "linear_readout_from": lambda rows: lip_jax.linear_readout_from(moments_of(rows), validation=rows),
    "linear_readout_from, rows of its own": lambda rows: lip_jax.linear_readout_from(
        moments_of([part[100:] for part in rows]), validation=tuple(part[:100] for part in rows)
    ),
}


@pytest.mark.parametrize("name", LOGITS)
def test_readouts_are_logits(known, name):
    fit, held_out = known
    readout = LOGITS[name](fit)
    assert off_scale(logits_of(readout, held_out[0]), held_out[1]) < 0.1


def test_predictive_power_is_that_of_logits(known):
    (feats, labels), held_out = known
    power = lip_jax.predictive_power(feats, labels, *held_out)
    readout = lip_jax.linear_readout(feats, labels)
    logits = logits_of(readout, held_out[0])
    best = oracles.best_scale(logits, held_out[1])
    at_best = oracles.metrics(best * logits, held_out[1])["log_loss"]
    assert at_best <= float(power.log_loss[0]) < 1.1 * at_best


def test_a_readout_from_moments_without_rows_gives_scores_and_says_so(known):
    fit, held_out = known
    readout = lip_jax.linear_readout_from(moments_of(fit))
    assert readout.scale is None
    assert off_scale(logits_of(readout, held_out[0]), held_out[1]) > 0.5
    of_rows = lip_jax.linear_readout(*fit)
    assert oracles.relative_error(readout.kernel, of_rows.kernel / of_rows.scale) < 1e-4
    with pytest.raises(ValueError, match=r"gives scores, no logits.*validation=\(feats, labels\)"):
        lip_jax.replace_head(tree(np.ones((8, L), np.float32)), readout)
    params, moments = tree(np.ones((8, L), np.float32)), moments_of(fit)
    with pytest.raises(ValueError, match=r"method ridge looks at every row, and moments hold none"):
        lip_jax.apply_from(params, moments, method=lip_jax.Ridge())


def test_the_scale_of_a_ridge_readout_is_folded_in(known):
    (feats, labels), _ = known
    readout = lip_jax.linear_readout(feats, labels, ridge=3.0)
    kernel, bias = oracles.ridge_fit(oracles.f64(feats), np.eye(L)[labels], np.ones(2000), 3.0, True)
    assert oracles.relative_error(readout.kernel / readout.scale, kernel) < 1e-5
    assert oracles.relative_error(readout.bias / readout.scale, bias) < 1e-4
    left_out = lip_jax.leave_one_out_scores(feats, labels, ridge=3.0)
    assert float(readout.scale) == pytest.approx(oracles.best_scale(left_out, labels), rel=1e-3)
