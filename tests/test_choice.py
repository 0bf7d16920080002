"""The choice: every number of the report against NumPy, every branch of the rule, and no harm done."""

import json
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from sklearn.linear_model import Ridge

import lip_jax
from lip_jax.choice import compare
from lip_jax.choice.compare import halves
from lip_jax.choice.evidence import logits_on, paired_difference, scorer
from lip_jax.methods import calibrated
from tests import oracles, own_methods

Q, L, N_FIT, N_VAL = 6, 4, 70, 120
# Those without a search: a program with the purified readout takes seconds to compile.
CLOSED_FORM = (lip_jax.Published(), lip_jax.Calibrated(), lip_jax.Ridge())
METRICS = ("accuracy", "balanced_accuracy", "log_loss")


def problem(seed, dtype="float64", noise=1.5):
    """A head off its true kernel by `noise`, and fitting and validation rows with 20% wrong labels."""
    rng = np.random.default_rng(seed)
    truth = 2 * rng.normal(size=(Q, L))

    def rows(n):
        feats = rng.normal(size=(n, Q)) + 0.3
        labels = np.argmax(feats @ truth + rng.gumbel(size=(n, L)), axis=1)
        labels = np.where(rng.random(n) < 0.2, rng.integers(0, L, n), labels).astype(np.int32)
        return jnp.asarray(feats, dtype), jnp.asarray(labels), jnp.asarray(rng.random(n) + 0.1, dtype)

    kernel = jnp.asarray(truth + noise * rng.normal(size=(Q, L)), dtype)
    return kernel, jnp.asarray(0.3 * rng.normal(size=L), dtype), rows(N_FIT), rows(N_VAL)


def logits_of(kernel, bias, feats):
    return oracles.f64(feats) @ oracles.f64(kernel) + (0 if bias is None else oracles.f64(bias))


def score(kernel, bias, rows, metric):
    values, weights = oracles.scores(logits_of(kernel, bias, rows.feats), rows.labels, metric, rows.weights)
    return np.average(values, weights=weights)


# Every rank.


def published_at(kernel, bias, fit, rank):
    u, s, vt = np.linalg.svd(oracles.f64(kernel), full_matrices=False)
    sigma = oracles.tail_sigma(u, s, vt, rank, fit.feats, fit.labels, weights=fit.weights)
    return u @ np.diag(sigma) @ vt, bias


def calibrated_at(kernel, bias, fit, rank):
    return oracles.calibrated(kernel, bias, fit.feats, fit.labels, rank, weights=fit.weights)[:2]


def ridge_at(kernel, bias, fit, ridge):
    model = Ridge(alpha=ridge, fit_intercept=bias is not None)
    model.fit(fit.feats, oracles.one_hot(fit.labels, L)[0], sample_weight=fit.weights)
    return model.coef_.T, None if bias is None else model.intercept_


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["bias", "no bias", "soft targets"])
def test_scores_of_all_ranks_are_those_of_each_rank_recomputed(x64, metric, kind):
    kernel, bias, fit, val = problem(0)
    fit, val = lip_jax.Rows(*fit), lip_jax.Rows(*val)
    with_bias = kind != "no bias"
    if kind == "soft targets":
        val = val._replace(labels=0.7 * jax.nn.one_hot(val.labels, L) + 0.3 / L)
    bias = bias if with_bias else None
    head = lip_jax.Head(kernel, bias)
    path = calibrated.calibrated_path(head, fit, 0.0, None)
    scores = path.over_logits(val.feats, scorer(logits_on(head, val), val, metric))[::-1]
    expected = [score(*calibrated_at(kernel, bias, fit, rank), val, metric) for rank in range(L + 1)]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert len(set(np.round(expected, 6))) >= 3


def test_of_equal_ranks_the_highest_is_taken(x64):
    kernel, bias, fit, val = problem(0)
    nothing = (fit[0][:0], fit[1][:0])
    chosen = lip_jax.select(kernel, *nothing, bias=bias, validation=val, methods=(lip_jax.Published(),))
    assert float(chosen.report.strength[1]) == L
    np.testing.assert_array_equal(chosen.kernel, kernel)


# The report.


def expected_report(kernel, bias, fit, val, metric, num_standard_errors):
    """Candidates, choice and numbers, all in NumPy, scikit-learn and scipy, on the same halves."""
    choose, test = halves(val)
    intercept = bias is not None
    quality = lip_jax.label_quality(
        fit.feats, fit.labels, num_classes=L, weights=fit.weights, intercept=intercept
    )
    off = oracles.f64(fit.feats)
    off = off - (0 if bias is None else np.average(off, axis=0, weights=fit.weights))
    eigenvalue = (oracles.f64(fit.weights)[:, None] * off**2).sum() / Q
    ranks, strengths = range(L, -1, -1), eigenvalue * 10.0 ** np.linspace(-4, 2, 13)
    offered, strength = [(kernel, bias)], [np.nan]
    for family, options in ((published_at, ranks), (calibrated_at, ranks), (ridge_at, strengths)):
        offers = [family(kernel, bias, fit, option) for option in options]
        best = int(np.argmax([score(*offer, choose, metric) for offer in offers]))
        offered.append(offers[best])
        strength.append(options[best])
    transition = likelier_noise(offered, choose, oracles.f64(quality.transition))
    heads, scales = [(kernel, bias)], [1.0]
    for head in offered[1:]:
        unscaled = logits_of(*head, choose.feats)
        scale = oracles.best_scale(unscaled, choose.labels, choose.weights, transition)
        heads.append(tuple(None if part is None else scale * oracles.f64(part) for part in head))
        scales.append(scale)
    logits = [logits_of(*head, test.feats) for head in heads]
    pairs = [oracles.paired_difference(z, logits[0], test.labels, metric, test.weights) for z in logits]
    metrics = [oracles.metrics(z, test.labels, test.weights) for z in logits]
    choosing = [score(*head, choose, metric) for head in heads]
    loss = [
        [
            oracles.noise_loss(logits_of(*head, rows.feats), rows.labels, rows.weights, transition)
            for head in heads
        ]
        for rows in (choose, test)
    ]
    eligible = [value if ll <= loss[0][0] else -np.inf for value, ll in zip(choosing, loss[0], strict=True)]
    winner = int(np.argmax(eligible))
    better = pairs[winner][0] > num_standard_errors * pairs[winner][1]
    better = better and loss[1][winner] <= loss[1][0]
    numbers = {name: [m[name] for m in metrics] for name in metrics[0]}
    numbers |= {"noise_loss": loss[1], "strength": strength, "scale": scales, "choosing": choosing}
    numbers |= {"difference": [p[0] for p in pairs], "standard_error": [p[1] for p in pairs]}
    return heads, numbers, winner, winner if better else 0


def likelier_noise(heads, choose, transition):
    """The noise or none, under which the choosing labels are likelier by the most accurate head."""
    best = int(np.argmax([score(*head, choose, "accuracy") for head in heads]))
    logits, labels, weights = logits_of(*heads[best], choose.feats), choose.labels, choose.weights

    def loss(noise):
        return oracles.noise_loss(
            oracles.best_scale(logits, labels, weights, noise) * logits, labels, weights, noise
        )

    return min(transition, np.eye(L), key=loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "with_bias"),
    [("accuracy", True), ("balanced_accuracy", True), ("log_loss", True), ("log_loss", False)],
    ids=str,
)
def test_every_number_of_the_report_is_numpys(x64, metric, with_bias):
    taken = set()
    for seed, noise in ((1, 0.2), (1, 1.5), (3, 2.5)):
        kernel, bias, fit, val = problem(seed, noise=noise)
        bias = bias if with_bias else None
        chosen = lip_jax.select(
            kernel,
            *fit[:2],
            bias=bias,
            weights=fit[2],
            validation=val,
            metric=metric,
            num_standard_errors=0.5,
            methods=CLOSED_FORM,
        )
        report = chosen.report
        rows = lip_jax.Rows(*fit), lip_jax.Rows(*val)
        heads, numbers, winner, choice = expected_report(kernel, bias, *rows, metric, 0.5)
        assert report.available.all()
        for name, expected in numbers.items():
            np.testing.assert_allclose(getattr(report, name), expected, rtol=2e-6, atol=1e-8, err_msg=name)
        assert (int(report.winner), int(report.chosen), int(report.tested)) == (winner, choice, N_VAL // 2)
        assert report.methods == ("unchanged", "published", "calibrated", "ridge")
        for candidate, expected in zip(chosen.candidates, heads, strict=True):
            assert oracles.relative_error(candidate.kernel, expected[0]) <= 1e-6
            if with_bias:
                np.testing.assert_allclose(candidate.bias, expected[1], rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal((chosen.kernel, chosen.bias), tuple(chosen.candidates[choice]))
        taken.add(choice > 0)
    assert taken == {True, False}


@pytest.mark.parametrize("metric", METRICS)
def test_paired_difference_and_its_error_are_numpys(x64, metric):
    kernel, bias, _, val = problem(3)
    rows = lip_jax.Rows(val[0], val[1].at[:9].set(-1), val[2].at[20:30].set(0))
    logits, base = (jnp.asarray(logits_of(k, bias, rows.feats)) for k in (kernel, kernel.at[0].multiply(-1)))
    difference, error = paired_difference(logits, base, rows, metric)
    expected = oracles.paired_difference(logits, base, rows.labels, metric, rows.weights)
    np.testing.assert_allclose((difference, error), expected, rtol=1e-12)


def test_rows_that_all_agree_are_no_proof_of_no_variance(x64):
    kernel, bias, fit, val = problem(0)
    report = lip_jax.select(kernel, *fit[:2], bias=bias, validation=val, methods=()).report
    _, test = halves(lip_jax.Rows(*val))
    w = oracles.f64(test.weights)
    np.testing.assert_allclose(report.standard_error, [(w**2).sum() / w.sum() ** 2], rtol=1e-12)
    assert float(report.difference[0]) == 0


# The rule, on constructed cases: features are indicators of patterns, so that a kernel's rows are the logits
# of each pattern and a candidate may be anything.

PATTERNS = 3  # 0: both right; 1: the base is wrong, mildly; 2: both are wrong
BASE = np.array([[6.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0]], np.float32)
BETTER = np.array([[6.0, 0, 0], [0, 6.0, 0], [1.0, 0, 0]], np.float32)
HARSH = np.array([[6.0, 0, 0], [0, 6.0, 0], [60.0, 0, 0]], np.float32)
TRUTH = np.array([0, 1, 2], np.int32)


def rows_by_halves(choosing, testing):
    """Validation rows with so many of each pattern on the choosing and on the testing half."""
    patterns = [np.repeat(np.arange(PATTERNS), counts) for counts in (choosing, testing)]
    n = sum(map(len, patterns))
    indices = lip_jax.Rows(jnp.arange(n)[:, None], jnp.arange(n), None)
    order = np.concatenate([half.labels for half in halves(indices)])
    pattern = np.empty(n, int)
    pattern[order] = np.concatenate(patterns)
    return jnp.eye(PATTERNS)[pattern], jnp.asarray(TRUTH[pattern])


def choose_between(candidate, choosing, testing, **options):
    return lip_jax.select(
        jnp.asarray(BASE),
        jnp.asarray(candidate.T),
        jnp.zeros(3, jnp.int32),
        bias=None,
        validation=rows_by_halves(choosing, testing),
        methods=(own_methods.FromRows(),),
        **options,
    )


RULE = {
    "taken": (
        (BETTER, (80, 19, 1), (80, 19, 1)),
        1,
        r"^from_rows: better than unchanged by \+0\.1900 ± 0\.0405 in accuracy, at least 3 standard",
    ),
    "nothing better": ((BASE, (80, 19, 1), (80, 19, 1)), 0, r"^unchanged: no candidate .* choosing half$"),
    "worse": ((BASE[:, ::-1], (80, 19, 1), (80, 19, 1)), 0, r"^unchanged: no candidate .* choosing half$"),
    "better, with a worse log-loss on the choosing half": (
        (HARSH, (85, 5, 10), (80, 20, 0)),
        0,
        r"^unchanged: no candidate .* choosing half without a worse log-loss$",
    ),
    "better, with a worse log-loss on the testing half": (
        (HARSH, (80, 20, 0), (70, 20, 10)),
        0,
        r"^unchanged: from_rows was better by \+0\.2000 ± 0\.0412.*but its log-loss is worse$",
    ),
    "too few rows better": (
        (BETTER, (80, 19, 1), (93, 6, 1)),
        0,
        r"^unchanged: from_rows was best, but \+0\.0600 ± 0\.0258 .* less than 3 standard errors "
        r"on 100 rows; were the gain real, some 170 would show it$",
    ),
    "better on the choosing half only": (
        (BETTER, (80, 19, 1), (99, 0, 1)),
        0,
        r"^unchanged: from_rows was best, but \+0\.0000 ± 0\.0100 .* less than 3 standard errors$",
    ),
}


@pytest.mark.parametrize("case", RULE)
def test_rule_and_its_reason(case):
    arguments, chosen, reason = RULE[case]
    taken = choose_between(*arguments)
    assert int(taken.report.chosen) == chosen
    assert re.search(reason, taken.report.reason), taken.report.reason
    if chosen == 0:
        assert np.asarray(taken.kernel).tobytes() == BASE.tobytes()
    else:
        np.testing.assert_allclose(taken.kernel, float(taken.report.scale[1]) * BETTER, rtol=1e-6)


def test_more_or_fewer_standard_errors_can_be_asked_for():
    case = (BETTER, (80, 19, 1), (93, 6, 1))
    chosen = [int(choose_between(*case, num_standard_errors=n).report.chosen) for n in (2.0, 3.0)]
    assert chosen == [1, 0]


def test_log_loss_as_the_metric_takes_a_head_for_its_scale():
    # Right on 3 rows of 4, with logits ten times too large: at its scale the same head has the same hits.
    overconfident = np.array([[60.0, 0, 0], [60.0, 0, 0], [60.0, 0, 0]], np.float32)
    counts = (75, 15, 10), (75, 15, 10)

    def choose(metric):
        chosen = lip_jax.select(
            jnp.asarray(overconfident),
            jnp.asarray(overconfident.T),
            jnp.zeros(3, jnp.int32),
            bias=None,
            validation=rows_by_halves(*counts),
            methods=(own_methods.FromRows(),),
            metric=metric,
        )
        return chosen.report

    assert int(choose("accuracy").chosen) == 0
    report = choose("log_loss")
    assert int(report.chosen) == 1
    best = oracles.best_scale(np.tile(overconfident[0], (100, 1)), np.repeat(TRUTH, counts[0]))
    assert float(report.scale[1]) == pytest.approx(best, rel=1e-3)
    assert float(report.log_loss[1]) < 0.2 * float(report.log_loss[0])


def test_a_candidate_that_is_not_finite_is_left_out():
    class Diverged:
        def path(self, head, fit):
            return lip_jax.Head(head.kernel.at[1, 1].set(jnp.nan), None)

    # By log-loss, as logits that are not finite count for nothing and nothing has a log-loss of 0.
    val = rows_by_halves((80, 19, 1), (80, 19, 1))
    chosen = lip_jax.select(
        jnp.asarray(BASE),
        *val,
        bias=None,
        validation=val,
        methods=(Diverged(), lip_jax.Ridge()),
        metric="log_loss",
    )
    assert chosen.report.available.tolist() == [True, False, True]
    assert (int(chosen.report.winner), int(chosen.report.chosen)) == (2, 2)
    assert "diverged      left out: it is undefined" in str(chosen.report)


# What may vary.


@pytest.fixture(scope="module")
def default():
    """The default choice among all methods in float32, for the tests that only look at it."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        kernel, bias, fit, val = problem(1, "float32", noise=4.0)
        chosen = lip_jax.select(kernel, *fit[:2], bias=bias, weights=fit[2], validation=val)
    return (kernel, bias, fit, val), chosen


@pytest.mark.slow
def test_jit_equals_eager_and_neither_compiles_twice(default):
    (kernel, bias, fit, val), eager = default

    @jax.jit
    @partial(chex.assert_max_traces, n=1)
    def choose(kernel, bias, fit, val):
        return lip_jax.select(kernel, *fit[:2], bias=bias, weights=fit[2], validation=val)

    jitted = choose(kernel, bias, fit, val)
    chex.assert_trees_all_close(jitted, eager, rtol=1e-4, atol=1e-5)
    compiled = compare._compare._cache_size()
    other = problem(2, "float32")
    choose(*other)
    again = lip_jax.select(other[0], *other[2][:2], bias=other[1], weights=other[2][2], validation=other[3])
    assert compare._compare._cache_size() == compiled
    chex.assert_trees_all_close(choose(*other), again, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_lowers_for_every_platform(default):
    arguments, _ = default

    def choose(kernel, bias, fit, val):
        return lip_jax.select(kernel, *fit[:2], bias=bias, weights=fit[2], validation=val).kernel

    for platform in ("cpu", "cuda", "tpu"):
        exported = export.export(jax.jit(choose), platforms=[platform])(*arguments)
        assert exported.platforms == (platform,)


def test_undefined_calibration_is_left_out_with_the_reason(default):
    (kernel, bias, fit, val), _ = default
    # Where logits fall with the labels of the fitting rows, no positive scale is the head's own.
    worst = jnp.argmin(fit[0] @ kernel + bias[None, :], axis=1).astype(jnp.int32)
    options = {"bias": bias, "weights": fit[2], "validation": val, "methods": CLOSED_FORM}
    report = lip_jax.select(kernel, fit[0], worst, **options).report
    assert report.available.tolist() == [True, True, False, True]
    assert int(report.winner) != 2
    assert "calibrated    left out: it is undefined on these rows" in str(report)


def test_rows_without_weight_or_label_count_for_nothing_whatever_they_hold(default):
    (kernel, bias, fit, val), _ = default
    idle = jnp.arange(0, N_FIT, 5), jnp.arange(0, N_VAL, 4)

    def choose(garbage, unlabelled):
        rows = []
        for (feats, labels, weights), rows_idle in zip((fit, val), idle, strict=True):
            feats = feats.at[rows_idle].set(garbage)
            if unlabelled:
                labels = labels.at[rows_idle].set(-1)
            else:
                weights = weights.at[rows_idle].set(0)
            rows.append((feats, labels, weights))
        (feats, labels, weights), held_out = rows
        options = {"bias": bias, "weights": weights, "validation": held_out, "methods": CLOSED_FORM}
        return lip_jax.select(kernel, feats, labels, **options)

    without_weight = choose(0.0, unlabelled=False)
    chex.assert_tree_all_finite(without_weight.candidates)
    for other in (choose(1e6, False), choose(np.nan, False), choose(-50.0, True)):
        chex.assert_trees_all_close(other, without_weight, rtol=1e-5, atol=1e-6)


def test_unusable_rows_under_jit_are_counted_on_both_sides(default):
    (kernel, bias, fit, val), _ = default

    @jax.jit
    def ignored(fit, val):
        options = {"bias": bias, "weights": fit[2], "validation": val, "methods": CLOSED_FORM}
        return lip_jax.select(kernel, *fit[:2], **options).report.ignored

    assert int(ignored(fit, val)) == 0
    spoilt = (fit[0].at[2].set(jnp.nan), *fit[1:]), (val[0], val[1].at[:2].set(L), val[2])
    assert int(ignored(*spoilt)) == 3


def test_bfloat16_heads_are_scored_as_they_are_stored(default):
    (kernel, bias, fit, val), _ = default
    chosen = lip_jax.select(
        kernel.astype(jnp.bfloat16),
        *fit[:2],
        bias=bias,
        weights=fit[2],
        validation=val,
        metric="log_loss",
        methods=CLOSED_FORM,
    )
    assert int(chosen.report.chosen) > 0
    assert (chosen.kernel.dtype, chosen.bias.dtype) == (jnp.bfloat16, jnp.float32)
    _, test = halves(lip_jax.Rows(*val))
    for i, candidate in enumerate(chosen.candidates):
        assert candidate.kernel.dtype == jnp.bfloat16
        expected = oracles.metrics(logits_of(*candidate, test.feats), test.labels, test.weights)
        for name, value in expected.items():
            assert float(getattr(chosen.report, name)[i]) == pytest.approx(value, rel=1e-5)


def test_a_method_may_be_any_object_of_the_protocol(default):
    (kernel, bias, fit, val), _ = default
    methods = (own_methods.Shrunk(), own_methods.Shrunk((0.25,)))
    chosen = lip_jax.select(kernel, *fit[:2], bias=bias, validation=val, methods=methods)
    assert chosen.report.methods == ("unchanged", "Shrunk(factors=(0.5,))", "Shrunk(factors=(0.25,))")
    np.testing.assert_allclose(chosen.report.strength[1:], [0.5, 0.25])
    # A multiple of the head is the head once it has its scale.
    np.testing.assert_allclose(chosen.report.scale[2] / chosen.report.scale[1], 2, rtol=1e-4)
    chex.assert_trees_all_close(chosen.candidates[1], chosen.candidates[2], rtol=1e-4)


def test_a_useless_head_is_replaced_though_validation_labels_are_noisy():
    key = jax.random.split(jax.random.key(0), 4)
    feats = jax.random.normal(key[0], (5000, 8))
    labels = jnp.argmax(feats[:, :4] + 0.2 * jax.random.normal(key[1], (5000, 4)), axis=1).astype(jnp.int32)
    noisy = lip_jax.noise.symmetric(key[2], labels, 0.4, num_classes=4)
    kernel = jax.random.normal(key[3], (8, 4))
    chosen = lip_jax.select(
        kernel,
        feats[:2000],
        noisy[:2000],
        bias=None,
        validation=(feats[2000:3000], noisy[2000:3000]),
        methods=CLOSED_FORM,
    )
    assert int(chosen.report.chosen) > 0
    accuracy = [
        lip_jax.head_metrics(feats[3000:] @ k, labels[3000:]).accuracy for k in (kernel, chosen.kernel)
    ]
    assert float(accuracy[1]) > float(accuracy[0]) + 0.3
    assert float(accuracy[1]) > 0.8


def test_report_is_strict_json_and_prints_a_row_per_method(default):
    _, chosen = default
    held = json.loads(json.dumps(chosen.report.as_dict(), allow_nan=False))
    assert held["strength"][0] is None
    assert held["methods"] == ["unchanged", "published", "calibrated", "ridge", "purified"]
    assert held["reason"] == chosen.report.reason
    assert held["accuracy"] == pytest.approx(np.asarray(chosen.report.accuracy).tolist())
    lines = str(chosen.report).splitlines()
    assert len(lines) == 7
    assert [line[2:14].strip() for line in lines][1:6] == held["methods"]
    marked = [i for i, line in enumerate(lines) if line.startswith("* ")]
    assert marked == [1 + int(chosen.report.chosen)]
    assert f"{held['log_loss'][3]:.4f}" in lines[4]
    assert lines[-1] == chosen.report.reason


def test_halves_are_disjoint_complete_and_fixed():
    rows = lip_jax.Rows(jnp.arange(21.0)[:, None], jnp.arange(21), None)
    first, second = halves(rows)
    assert (len(first.labels), len(second.labels)) == (10, 11)
    assert sorted([*first.labels.tolist(), *second.labels.tolist()]) == list(range(21))
    np.testing.assert_array_equal(first.feats[:, 0], first.labels)
    chex.assert_trees_all_equal(halves(rows), (first, second))


def test_errors_say_what_is_wrong(unchecked):
    kernel, bias, (feats, labels, weights), val = problem(0, "float32")

    def fails(match, *args, validation=val, **options):
        options = {"methods": (), "bias": bias, **options}
        with pytest.raises(ValueError, match=match):
            lip_jax.select(*(args or (kernel, feats, labels)), validation=validation, **options)

    fails(r"validation must be \(feats, labels\) or .*; got a tuple of length 1", validation=(val[0],))
    fails(r"validation must be .*; got a dict", validation={"feats": val[0]})
    fails(r"validation must hold at least 2 rows; got 1", validation=(val[0][:1], val[1][:1]))
    fails(r"^validation: feats must have as many columns .* q = 6", validation=(val[0][:, :3], val[1]))
    fails(r"^validation: labels must have one row per row of feats", validation=(val[0], val[1][:5]))
    bad = val[1].at[11].set(L)
    fails(r"^validation: labels must be class ids below l = 4; got 4 at row 11", validation=(val[0], bad))
    spoilt = val[0].at[3, 0].set(jnp.nan)
    fails(r"^validation: feats must be finite; row 3", validation=(spoilt, val[1]))
    fails(r"^labels must be class ids below l = 4", kernel, feats, labels.at[0].set(9))
    fails(r"method must be a value such as .* or an object with path.*got 'lip'", methods=("lip",))
    fails(r"method must be a value such as .*got the class Ridge", methods=(lip_jax.Ridge,))
    fails(r"num_standard_errors must be at least 0; got -1", num_standard_errors=-1)
    fails(r"metric must be 'accuracy', .*; got 'auc'", metric="auc")
    fails(r"at least two outputs; got float32\[6,1\]", kernel[:, :1], feats, labels, bias=None)
    fails(r"weights must have shape \(n,\) = \(70,\)", weights=weights[:3])


@pytest.mark.slow
def test_a_head_that_needs_nothing_is_hardly_ever_switched_to_something_worse():
    # 100 draws of fitting and validation rows, labels 20% wrong; the head is the one that made the labels.
    def draw_rows(key, n):
        of_feats, of_labels, of_noise = jax.random.split(key, 3)
        feats = jax.random.normal(of_feats, (n, Q))
        labels = jax.random.categorical(of_labels, feats @ truth, axis=1).astype(jnp.int32)
        return feats, labels, of_noise

    truth = 2 * jax.random.normal(jax.random.key(3), (Q, L))

    @jax.jit
    @jax.vmap
    def draw(key):
        feats, labels, of_noise = draw_rows(key, 500)
        labels = lip_jax.noise.symmetric(of_noise, labels, 0.2, num_classes=L)
        held_out = feats[200:], labels[200:]
        options = {"bias": jnp.zeros(L), "validation": held_out, "methods": CLOSED_FORM}
        return lip_jax.select(truth, feats[:200], labels[:200], **options)

    chosen = draw(jax.random.split(jax.random.key(0), 100))
    feats, labels, _ = draw_rows(jax.random.key(1), 20_000)

    def accuracy(kernel, bias):
        return (jnp.argmax(feats @ kernel + bias[None, :], axis=1) == labels).mean()

    loss = accuracy(truth, jnp.zeros(L)) - jax.lax.map(
        lambda head: accuracy(*head), (chosen.kernel, chosen.bias)
    )
    worse = (chosen.report.chosen > 0) & (loss > 0)
    assert int(worse.sum()) < 2
    # Not for want of candidates: something looked better on the choosing half in many of the draws.
    assert int((chosen.report.winner > 0).sum()) > 20


@pytest.mark.slow
def test_pair_flips_do_not_veto_the_better_head(default):
    # The head tells how noisy labels fall, as training on them teaches; the readout tells the true classes.
    rng = np.random.default_rng(0)
    true = rng.integers(0, L, 3000).astype(np.int32)
    feats = jnp.asarray(rng.normal(size=(3000, Q)) + 4 * np.eye(L, Q)[true], jnp.float32)
    given = lip_jax.noise.asymmetric(jax.random.key(0), jnp.asarray(true), 0.4, num_classes=L)
    tells_noise = jnp.asarray(
        np.log(0.6 * np.eye(L) + 0.4 * np.roll(np.eye(L), 1, axis=1) + 1e-3), jnp.float32
    )
    kernel = jnp.zeros((Q, L)).at[:L].set(tells_noise / 4).at[:, 1].add(0.5)
    chosen = lip_jax.select(
        kernel, feats[:2000], given[:2000], bias=jnp.zeros(L), validation=(feats[2000:], given[2000:]),
        methods=(lip_jax.Purified(),), num_standard_errors=2,
    )  # fmt: skip
    report = chosen.report
    assert int(report.chosen) == 1, report.reason
    # By the labels as they come it would have been turned down.
    assert float(report.log_loss[1]) > float(report.log_loss[0])
    assert float(report.noise_loss[1]) < float(report.noise_loss[0])


@pytest.mark.slow
def test_the_purified_candidate_is_the_purified_readout_of_its_strength(x64):
    kernel, bias, fit, val = problem(1)
    options = {"bias": bias, "weights": fit[2], "validation": val, "methods": (lip_jax.Purified(),)}
    report = lip_jax.select(kernel, *fit[:2], **options)
    found = report.candidates[1]
    readout = lip_jax.purified_readout(
        *fit[:2], num_classes=L, weights=fit[2], ridge=report.report.strength[1]
    ).readout
    scale = float(report.report.scale[1])
    ours = logits_of(found.kernel, found.bias, val[0]) / scale
    theirs = logits_of(readout.kernel, readout.bias, val[0])
    off = lambda z: z - z.mean(axis=1, keepdims=True)  # noqa: E731
    assert oracles.relative_error(off(ours), off(theirs)) <= 0.1


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "as noisy"])
def test_validation_labels_cleaner_than_those_that_fitted_do_not_let_sharp_logits_pass(clean):
    rng = np.random.default_rng(0)
    feats = rng.normal(size=(12_000, 4)).astype(np.float32)
    kernel = np.array([[2, -2], [1, -1], [0.5, -0.5], [0, 0]], np.float32) / 2
    true = np.argmax(feats @ kernel + rng.gumbel(size=(12_000, 2)), axis=1).astype(np.int32)
    noisy = lip_jax.noise.symmetric(jax.random.key(1), true, 0.4, num_classes=2)
    base = kernel.copy()
    base[1] = 0
    val = feats[6000:], true[6000:] if clean else noisy[6000:]
    chosen = lip_jax.select(
        base,
        feats[:6000],
        noisy[:6000],
        bias=np.zeros(2, np.float32),
        validation=val,
        methods=(lip_jax.Ridge(),),
    )
    report = chosen.report
    if not clean:
        # Under the noise, which is in these labels too, the readout is the better head.
        assert float(report.noise_loss[1]) < float(report.noise_loss[0])
        assert float(report.log_loss[1]) > float(report.log_loss[0])
        return
    assert int(report.chosen) == 1
    np.testing.assert_allclose(report.noise_loss, report.log_loss, rtol=1e-5)
    # What is left to sharpen or to flatten.
    logits = feats[6000:] @ chosen.kernel + chosen.bias[None, :]
    assert 0.9 < float(lip_jax.fit_logit_scale(logits, true[6000:])) < 1.1


def test_one_heavy_row_is_no_proof():
    rows = lip_jax.Rows(jnp.zeros((501, 1)), jnp.zeros(501, jnp.int32), jnp.ones(501).at[0].set(2000))
    base = jnp.tile(jnp.array([[1.0, 0.0]]), (501, 1)).at[0].set(jnp.array([0.0, 1.0]))
    better = base.at[0].set(jnp.array([1.0, 0.0]))
    difference, error = paired_difference(better, base, rows, "accuracy")
    assert float(difference) == pytest.approx(0.8)
    assert float(difference) < 3 * float(error)
    # Weights mean the same at any scale.
    tiny = rows._replace(weights=rows.weights * 1e-30)
    np.testing.assert_allclose(
        paired_difference(better, base, tiny, "accuracy"), (difference, error), rtol=1e-5
    )


def test_three_rows_of_a_class_are_no_proof_in_balanced_accuracy():
    labels = jnp.array([0] * 3 + [1] * 1000, jnp.int32)
    base = jnp.tile(jnp.array([[0.0, 1.0]]), (1003, 1))
    better = base.at[:3].set(jnp.array([1.0, 0.0]))
    rows = lip_jax.Rows(jnp.zeros((1003, 1)), labels, None)
    difference, error = paired_difference(better, base, rows, "balanced_accuracy")
    assert float(difference) == pytest.approx(0.5)
    assert float(difference) < 3 * float(error)
