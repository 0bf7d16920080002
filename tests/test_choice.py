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
from lip_jax.choice.candidates import best_places
from lip_jax.choice.evidence import (
    Paired,
    fold_places,
    fold_scorer,
    in_folds,
    informed,
    logits_on,
    paired_difference,
)
from lip_jax.choice.judge import SHARES, blend
from lip_jax.methods import calibrated
from lip_jax.quality.trust import evident_transition
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
    sums = path.over_logits(val.feats, fold_scorer(logits_on(head, val), val, metric, 1))[::-1, 0]
    _, weights = oracles.scores(logits_of(*head, val.feats), val.labels, metric, val.weights)
    expected = [score(*calibrated_at(kernel, bias, fit, rank), val, metric) for rank in range(L + 1)]
    np.testing.assert_allclose(sums / weights.sum(), expected, rtol=1e-12)
    assert len(set(np.round(expected, 6))) >= 3


def test_of_equal_ranks_the_highest_is_taken(x64):
    kernel, bias, fit, val = problem(0)
    nothing = (fit[0][:0], fit[1][:0])
    chosen = lip_jax.select(kernel, *nothing, bias=bias, validation=val, methods=(lip_jax.Published(),))
    assert float(chosen.report.strength[1]) == L
    np.testing.assert_array_equal(chosen.kernel, kernel)


# The report.


def likely(logits, labels, transition):
    """The log-likelihood of each label under the noise."""
    chances = np.exp(oracles.log_softmax(logits)) @ transition
    return np.log(chances[np.arange(len(labels)), labels])


def out_of_fold(head_at, options, val, fold, metric):
    """The logits of each row by the candidate that the other folds prefer, and the option that all prefer."""
    logits = np.stack([logits_of(*head_at(option), val.feats) for option in options])
    values = []
    for z in logits:
        scores, weights = oracles.scores(z, val.labels, metric, val.weights)
        values.append([(weights * scores)[fold == k].sum() for k in range(5)])
    values = np.array(values)
    others = np.stack([np.delete(values, k, axis=1).sum(axis=1) for k in range(5)])
    chosen = np.argmax(others, axis=1)
    return logits[chosen[fold], np.arange(len(fold))], int(np.argmax(values.sum(axis=1)))


def recalled(logits, labels, weights):
    right = (logits.argmax(axis=1) == labels) & (weights > 0)
    return np.bincount(labels[right], minlength=L)


def blended(share, new, old, held):
    """A blend in the classes `held`, at the level of the others; these stay as they are."""
    new = oracles.f64(new)
    off = 0 if held.all() else (old - new)[..., held].mean(axis=-1, keepdims=True)
    return share * np.where(held, new + off, old) + (1 - share) * old


def raised(z, base, held, weights):
    """How far the classes `held` must rise for their mean `log Σ exp` to be that of the base."""
    if held.all():
        return 0
    level = np.logaddexp.reduce(base[:, held], axis=1) - np.logaddexp.reduce(z[:, held], axis=1)
    return np.where(held, np.average(level, weights=weights), 0)


def expected_report(kernel, bias, fit, val, metric, level):
    """Candidates, blends, choice and numbers, all in NumPy, scikit-learn and scipy, on the same folds."""
    fold = np.empty(N_VAL, int)
    for k, places in enumerate(fold_places(N_VAL, 5)):
        fold[places] = k
    quality = lip_jax.label_quality(
        fit.feats, fit.labels, num_classes=L, weights=fit.weights, intercept=bias is not None
    )
    off = oracles.f64(fit.feats)
    off = off - (0 if bias is None else np.average(off, axis=0, weights=fit.weights))
    eigenvalue = (oracles.f64(fit.weights)[:, None] * off**2).sum() / Q
    ranks, strengths = range(L, -1, -1), eigenvalue * 10.0 ** np.linspace(-4, 2, 13)
    tested, heads, strength = [], [], [np.nan]
    for family, options in ((published_at, ranks), (calibrated_at, ranks), (ridge_at, strengths)):
        head_at = partial(family, kernel, bias, fit)
        logits, best = out_of_fold(head_at, options, val, fold, metric)
        tested.append(logits)
        heads.append(head_at(options[best]))
        strength.append(options[best])
    base = logits_of(kernel, bias, val.feats)
    labels, weights = np.asarray(val.labels), oracles.f64(val.weights)
    mean = partial(np.average, weights=weights)
    transition = likelier_noise([base, *tested], labels, weights, oracles.f64(evident_transition(quality)))
    base_scale = oracles.best_scale(base, labels, weights, transition)
    known = likely(base_scale * base, labels, transition)
    rows = [{"share": 0.0, "loss": -mean(known), "scale": base_scale, "z": [0.0, 0.0], "logits": base}]
    found = [(kernel, bias)]
    for logits, head in zip(tested, heads, strict=True):
        scale = oracles.best_scale(logits, labels, weights, transition)
        # A class that the head tells and the candidate never does stays with the head.
        held = ~((recalled(base, labels, weights) >= 5) & (recalled(logits, labels, weights) == 0))
        offers = []
        for share in SHARES:
            z = blended(share, scale * logits, base_scale * base, held)
            up = 0 if bias is None else raised(z, base_scale * base, held, weights)
            z = z + up
            pairs = [oracles.paired_difference(z, base, labels, metric, weights)]
            gain = likely(z, labels, transition) - known
            share_of = weights / weights.sum()
            error = np.sqrt((share_of**2 * (gain - mean(gain)) ** 2).sum() + (share_of**2).sum() ** 2)
            pairs.append((mean(gain), error))
            zs = [difference / error for difference, error in pairs]
            losses = {"log_loss": oracles.metrics(z, labels, weights)["log_loss"]}
            loss = losses.get(metric, -mean(likely(z, labels, transition)))
            passes = zs[0] > level if metric == "log_loss" else max(zs) > level and min(zs) >= 1
            offers.append(
                {
                    "share": share,
                    "loss": loss,
                    "scale": scale,
                    "pairs": pairs,
                    "passes": passes,
                    "logits": z,
                    "up": up,
                    "kept": ~held,
                }
            )
        passing = [offer for offer in offers if offer["passes"]] or offers
        best = min(passing, key=lambda offer: offer["loss"])
        rows.append(best)
        kernel_made, bias_made = (
            None if new is None else blended(best["share"], scale * new, base_scale * oracles.f64(old), held)
            for new, old in zip(head, (kernel, bias), strict=True)
        )
        found.append((kernel_made, None if bias is None else bias_made + best["up"]))
    passing = [i for i in range(1, 4) if rows[i]["passes"]]
    winner = min(passing or range(1, 4), key=lambda i: rows[i]["loss"])
    metrics = [oracles.metrics(row["logits"], labels, weights) for row in rows]
    numbers = {"strength": strength, "noise_loss": [row["loss"] for row in rows]}
    numbers |= {name: [row[name] for row in rows] for name in ("scale", "share")}
    numbers |= {name: [m[name] for m in metrics] for name in metrics[0]}
    if metric == "log_loss":
        numbers["noise_loss"][0] = metrics[0]["log_loss"]
    for i, name in enumerate(("difference", "likelihood_difference")):
        numbers[name] = [0.0, *(row["pairs"][i][0] for row in rows[1:])]
    for i, name in enumerate(("standard_error", "likelihood_error")):
        numbers[name] = [row["pairs"][i][1] for row in rows[1:]]
    return found, numbers, winner, winner if passing else 0, rows[winner]["kept"]


def likelier_noise(offered, labels, weights, transition):
    """The noise or none, under which the labels are likelier by the most accurate logits."""
    right = [np.average(z.argmax(axis=1) == labels, weights=weights) for z in offered]
    logits = offered[int(np.argmax(right))]

    def loss(noise):
        scale = oracles.best_scale(logits, labels, weights, noise)
        return -np.average(likely(scale * logits, labels, noise), weights=weights)

    return min(transition, np.eye(L), key=loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "with_bias"),
    [("accuracy", True), ("balanced_accuracy", True), ("log_loss", True), ("accuracy", False)],
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
            trust_feats=True,
        )
        report = chosen.report
        level = np.sqrt(0.25 + 2 * np.log(3))
        assert report.level == pytest.approx(level)
        rows = lip_jax.Rows(*fit), lip_jax.Rows(*val)
        heads, numbers, winner, choice, kept = expected_report(kernel, bias, *rows, metric, level)
        assert report.available.all()
        for name, expected in numbers.items():
            # The error of "unchanged" against itself has a test of its own.
            found = getattr(report, name)[-len(expected) :]
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7, err_msg=name)
        assert (int(report.winner), int(report.chosen), int(report.tested)) == (winner, choice, N_VAL)
        assert report.methods == ("unchanged", "published", "calibrated", "ridge")
        for candidate, expected in zip(chosen.candidates, heads, strict=True):
            assert oracles.relative_error(candidate.kernel, expected[0]) <= 1e-5
            if with_bias:
                np.testing.assert_allclose(candidate.bias, expected[1], rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_equal((chosen.kernel, chosen.bias), tuple(chosen.candidates[choice]))
        np.testing.assert_array_equal(report.kept, kept)
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
    w = oracles.f64(val[2])
    np.testing.assert_allclose(report.standard_error, [(w**2).sum() / w.sum() ** 2], rtol=1e-12)
    assert float(report.difference[0]) == 0


# The rule, on constructed cases: features are indicators of patterns, so that a kernel's rows are the logits
# of each pattern and a candidate may be anything.

PATTERNS = 4  # 0, 3: both right; 1: the base is wrong, mildly; 2: both are wrong
BASE = np.array([[4.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0], [0, 4.0, 0]], np.float32)
BETTER = np.array([[4.0, 0, 0], [0, 4.0, 0], [1.0, 0, 0], [0, 4.0, 0]], np.float32)
# Never says 1, though it gains elsewhere.
FORGETS = np.array([[4.0, 0, 0], [0, 0, 0], [0, 0, 4.0], [4.0, 0, 0]], np.float32)
TRUTH = np.array([0, 1, 2, 1], np.int32)


def choose_between(candidate, counts, **options):
    """The choice between `BASE` and a candidate by so many validation rows of each pattern."""
    patterns = np.repeat(np.arange(PATTERNS), counts)
    # Each row is another, but for the logits: equal rows count as one.
    feats = np.concatenate([np.eye(PATTERNS)[patterns], np.arange(len(patterns))[:, None]], axis=1)
    idle = np.zeros((1, 3), np.float32)
    fitting = np.concatenate([candidate, idle]).T
    return lip_jax.select(
        jnp.asarray(np.concatenate([BASE, idle])),
        jnp.asarray(np.tile(fitting, (2, 1))),
        jnp.tile(jnp.arange(3, dtype=jnp.int32), 2),
        bias=None,
        validation=(jnp.asarray(feats, jnp.float32), jnp.asarray(TRUTH[patterns])),
        methods=(own_methods.FromRows(),),
        **options,
    )


RULE = {
    "taken": (
        (BETTER, (80, 19, 1, 20)),
        1,
        r"^from_rows: better than unchanged by \+0\.1583 ± 0\.0344 in accuracy and \+0\.\d+ ± 0\.\d+ in",
    ),
    "nothing better": (
        (BASE, (80, 19, 1, 20)),
        0,
        r"^unchanged: .* \+0\.0000 ± 0\.0083 in accuracy .*enough$",
    ),
    "worse": (
        (BASE[:, ::-1], (80, 19, 1, 20)),
        0,
        r"^unchanged: .* was best, but \+0\.0000 .* and -0\.\d+ ± .* is not enough$",
    ),
    "too few rows better": (
        (BETTER, (80, 3, 0, 20)),
        0,
        r"^unchanged: .*from_rows was best, but \+0\.0291 .* is not enough on 103 rows; were the gain real, "
        r"some \d+ would show it$",
    ),
}


@pytest.mark.parametrize("case", RULE)
def test_rule_and_its_reason(case):
    arguments, chosen, reason = RULE[case]
    taken = choose_between(*arguments, trust_feats=True)
    assert int(taken.report.chosen) == chosen, taken.report
    assert re.search(reason, taken.report.reason), taken.report.reason
    if chosen == 0:
        assert np.asarray(taken.kernel)[:PATTERNS].tobytes() == BASE.tobytes()


def test_a_class_that_would_be_lost_keeps_its_logits():
    taken = choose_between(FORGETS, (80, 0, 60, 10), trust_feats=True)
    assert int(taken.report.chosen) == 1
    assert taken.report.kept.tolist() == [False, True, False]
    logits = np.eye(PATTERNS, PATTERNS + 1) @ np.asarray(taken.kernel)
    assert logits.argmax(axis=1)[[0, 2, 3]].tolist() == [0, 2, 1]
    # Whole it would be likelier, as it is right on more rows; but of class 1 there would be nothing left.
    assert np.all(FORGETS.argmax(axis=1) != 1)


def test_more_or_fewer_standard_errors_can_be_asked_for():
    case = (BETTER, (80, 6, 1, 20))
    chosen = [int(choose_between(*case, num_standard_errors=n).report.chosen) for n in (1.0, 5.0)]
    assert chosen == [1, 0]


def test_several_methods_are_asked_for_more():
    assert lip_jax.Choice((lip_jax.Ridge(),)).level == 2
    assert lip_jax.Choice().level == pytest.approx(np.sqrt(4 + 2 * np.log(4)))
    assert lip_jax.Choice(()).level == 2


def test_log_loss_as_the_metric_takes_a_head_for_its_scale():
    # Right on 3 rows of 4, with logits ten times too large: at its scale the same head has the same hits.
    rng = np.random.default_rng(0)
    feats = np.concatenate([np.ones((400, 1)), 1e-3 * rng.normal(size=(400, 1))], axis=1).astype(np.float32)
    labels = rng.choice(3, 400, p=[0.75, 0.15, 0.1]).astype(np.int32)
    kernel = np.array([[60.0, 0, 0], [0, 0, 0]], np.float32)

    def choose(metric):
        options = {"bias": None, "validation": (feats[200:], labels[200:]), "trust_feats": True}
        methods = (own_methods.Shrunk((1.0,)),)
        return lip_jax.select(
            kernel, feats[:200], labels[:200], metric=metric, methods=methods, **options
        ).report

    assert int(choose("accuracy").chosen) == 0
    report = choose("log_loss")
    assert int(report.chosen) == 1
    best = oracles.best_scale(feats[200:] @ kernel, labels[200:])
    assert float(report.scale[1]) == pytest.approx(best, rel=1e-3)
    assert float(report.log_loss[1]) < 0.2 * float(report.log_loss[0])


def test_a_candidate_that_is_not_finite_is_left_out(default):
    class Diverged:
        def path(self, head, fit):
            return lip_jax.Head(head.kernel.at[1, 1].set(jnp.nan), head.bias)

    (kernel, bias, fit, val), _ = default
    methods = (Diverged(), lip_jax.Ridge())
    # By log-loss, as logits that are not finite count for nothing and nothing has a log-loss of 0.
    options = {"bias": bias, "validation": val, "methods": methods, "metric": "log_loss"}
    chosen = lip_jax.select(2 * kernel, *fit[:2], **options)
    assert chosen.report.available.tolist() == [True, False, True]
    assert (int(chosen.report.winner), int(chosen.report.chosen)) == (2, 2)
    assert "diverged      left out: it is undefined" in str(chosen.report)


# Classes.


def rows_of_classes(seed, n, classes=range(L), dtype=jnp.float32):
    """Rows of some of `L` classes that a linear head tells apart, the head that does, and a worse one."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array(classes), n).astype(np.int32)
    feats = rng.normal(size=(n, Q)) + 3 * np.eye(L, Q)[labels]
    return jnp.asarray(feats, dtype), jnp.asarray(labels)


def test_a_class_without_rows_keeps_its_logits_and_is_named():
    rng = np.random.default_rng(5)
    kernel = jnp.asarray(3 * np.eye(Q, L) + 2 * rng.normal(size=(Q, L)), jnp.float32)
    bias = jnp.zeros(L)
    fit, val, test = (
        rows_of_classes(i, n, range(m)) for i, (n, m) in enumerate(((400, 3), (400, 3), (4000, 4)))
    )
    with pytest.warns(
        UserWarning, match=r"^classes 3 keep the logits of the head as it came: they have too few"
    ):
        repaired, report = lip_jax.apply_with_report(
            {"head": {"kernel": kernel, "bias": bias}}, *fit, validation=val, num_classes=L,
            method=lip_jax.Choice(CLOSED_FORM),
        )  # fmt: skip
    assert report.kept.tolist() == [False, False, False, True]
    assert "classes left to the head as it came: 3" in str(report)
    chosen = lip_jax.select(kernel, *fit, bias=bias, validation=val, methods=CLOSED_FORM)
    assert int(report.chosen) > 0
    # Its column is that of the head at the head's own scale.
    column, came = chosen.kernel[:, 3], kernel[:, 3]
    np.testing.assert_allclose(column / jnp.linalg.norm(column), came / jnp.linalg.norm(came), rtol=1e-5)
    head = repaired["head"]
    predicted = jnp.argmax(test[0] @ head["kernel"] + head["bias"][None, :], axis=1)
    before = jnp.argmax(test[0] @ kernel, axis=1)
    recall = [float((of == 3)[test[1] == 3].mean()) for of in (before, predicted)]
    accuracy = [float((of == test[1]).mean()) for of in (before, predicted)]
    assert recall[1] > 0.5 * recall[0] > 0
    assert accuracy[1] > accuracy[0]


def test_a_class_that_should_have_come_to_judge_and_did_not_keeps_its_logits():
    fit, val = rows_of_classes(0, 400), rows_of_classes(1, 200, range(3))
    kernel = jnp.eye(Q, L) + 0.5
    few = jax.tree.map(lambda part: part[:12], val)
    kept = [
        lip_jax.select(kernel, *fit, bias=None, validation=held, methods=CLOSED_FORM).report.kept.tolist()
        for held in (val, few)
    ]
    assert kept == [[False, False, False, True], [False] * 4]


def test_blended_logits_of_unknown_classes_are_those_of_the_head():
    rng = np.random.default_rng(0)
    old, new = (
        lip_jax.Head(*map(jnp.asarray, (rng.normal(size=(Q, L)), rng.normal(size=L)))) for _ in range(2)
    )
    known = jnp.array([True, False, True, True])
    old, new = jax.tree.map(lambda part: part.astype(jnp.float32), (old, new))
    made = blend(old, jnp.float32(2), new, jnp.float32(3), jnp.float32(0.75), known)
    np.testing.assert_allclose(made.kernel[:, 1], 2 * old.kernel[:, 1], rtol=1e-6)
    np.testing.assert_allclose(made.bias[1], 2 * old.bias[1], rtol=1e-6)
    # Differences between known classes are blended, and their level is that of the head.
    off = lambda part: part - part[..., :1]  # noqa: E731
    rest = jnp.array([0, 2, 3])
    for found, ours, theirs in zip(made, old, new, strict=True):
        expected = 0.75 * 3 * off(theirs[..., rest]) + 0.25 * 2 * off(ours[..., rest])
        np.testing.assert_allclose(off(found[..., rest]), expected, rtol=1e-4, atol=1e-5)
        level = 2 * ours[..., rest].mean(axis=-1)
        np.testing.assert_allclose(found[..., rest].mean(axis=-1), level, rtol=1e-4, atol=1e-5)


# Rows that are not independent.


def test_validation_rows_that_also_fit_do_not_judge(default):
    (kernel, bias, fit, val), _ = default
    options = {"bias": bias, "methods": CLOSED_FORM}
    shared = jax.tree.map(lambda mine, theirs: jnp.concatenate([theirs[:40], mine]), val, fit)
    with pytest.warns(UserWarning, match=r"^40 of 160 validation rows are also in feats"):
        found = lip_jax.select(kernel, *fit[:2], validation=shared, **options).report
    assert (int(found.shared), int(found.tested)) == (40, N_VAL)
    with pytest.warns(
        UserWarning, match=r"^70 of 70 validation rows .* no row is left to judge by.*seen=False"
    ):
        found = lip_jax.select(kernel, *fit[:2], validation=fit, **options).report
    assert (int(found.chosen), int(found.tested)) == (0, 0)
    assert found.reason == "unchanged: no row is left to judge by"


@pytest.mark.parametrize("mode", ["validation", "unseen rows"])
def test_repeated_rows_count_as_one(mode, default):
    (kernel, bias, fit, val), _ = default
    few = jax.tree.map(lambda part: part[:30], val)
    repeated = jax.tree.map(lambda part: jnp.tile(part, (20,) + (1,) * (part.ndim - 1)), few)
    if mode == "validation":
        report = lip_jax.select(kernel, *fit[:2], bias=bias, validation=repeated, methods=CLOSED_FORM).report
    else:
        report = lip_jax.select(kernel, *repeated[:2], bias=bias, seen=False, methods=CLOSED_FORM).report
    assert int(report.tested) == 30
    alone = lip_jax.Rows(few[0], few[1])
    error = paired_difference(
        logits_on(lip_jax.Head(kernel, bias), alone), jnp.zeros((30, L)), alone, "accuracy"
    )
    assert float(report.standard_error[3]) > 0.2 * float(error.error)


def test_equal_rows_lie_in_one_fold():
    first = np.array([0, 1, 0, 3, 1, 5, 6, 7, 8, 0], np.int32)
    fold = compare._fold_of_rows(fold_places(10, 5), first)
    assert len(set(np.asarray(fold)[[0, 2, 9]].tolist())) == 1
    assert int(fold[1]) == int(fold[4])


# Features that say nothing.


def test_a_head_that_predicts_no_better_than_chance_is_left_alone(default):
    (_, bias, fit, val), _ = default
    kernel = jax.random.normal(jax.random.key(9), (Q, L)) * 1e-3
    off = bias.at[0].set(100.0)
    options = {"bias": off, "validation": val, "methods": CLOSED_FORM}
    report = lip_jax.select(kernel, *fit[:2], **options).report
    assert (bool(report.informed), int(report.chosen)) == (False, 0)
    assert report.reason.startswith("unchanged: the head predicts these labels no better than chance")
    trusting = lip_jax.select(kernel, *fit[:2], trust_feats=True, **options).report
    assert int(trusting.chosen) > 0
    with pytest.warns(UserWarning, match=r"returned as it came: the head predicts .* no better than chance"):
        lip_jax.apply(
            {"kernel": kernel, "bias": off}, *fit[:2], validation=val, method=lip_jax.Choice(CLOSED_FORM)
        )


def test_chance_is_the_agreement_of_independent_predictions():
    # 90% of one class: a head that always says so is right on 90%, and knows nothing.
    labels = jnp.asarray(np.repeat([0, 1], [180, 20]).astype(np.int32))
    rows = lip_jax.Rows(jnp.zeros((200, 1)), labels, jnp.ones(200))
    always = jnp.tile(jnp.array([[1.0, 0.0]]), (200, 1))
    knows = always.at[180:190].set(jnp.array([0.0, 1.0]))
    assert not bool(informed(always, rows))
    assert bool(informed(knows, rows))


# What may vary.


@pytest.fixture(scope="module")
def default():
    """The default choice among all methods in float32, for the tests that only look at it."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        kernel, bias, fit, val = problem(1, "float32", noise=1.5)
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
    compiled = compare._choose_by._cache_size()
    other = problem(2, "float32")
    choose(*other)
    again = lip_jax.select(other[0], *other[2][:2], bias=other[1], weights=other[2][2], validation=other[3])
    assert compare._choose_by._cache_size() == compiled
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
    assert report.available[:3].tolist() == [True, True, False]
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
    assert (chosen.kernel.dtype, chosen.bias.dtype) == (jnp.bfloat16, jnp.float32)
    for candidate in chosen.candidates:
        assert candidate.kernel.dtype == jnp.bfloat16


def test_what_is_judged_is_what_is_stored():
    # A path of one head has the same out of fold: in bfloat16 the figures are those of the rounded kernel.
    kernel, bias, fit, val = problem(1, "float32", noise=2.5)
    methods = (own_methods.Shrunk((0.5,)),)
    half = kernel.astype(jnp.bfloat16)
    chosen = lip_jax.select(half, *fit[:2], bias=bias, validation=val, methods=methods, metric="log_loss")
    for i, candidate in enumerate(chosen.candidates):
        expected = oracles.metrics(logits_of(*candidate, val[0]), val[1], val[2])
        for name, value in expected.items():
            assert float(getattr(chosen.report, name)[i]) == pytest.approx(value, rel=1e-4), name


def test_a_method_may_be_any_object_of_the_protocol(default):
    (kernel, bias, fit, val), _ = default
    methods = (own_methods.Shrunk(), own_methods.Shrunk((0.25,)))
    chosen = lip_jax.select(kernel, *fit[:2], bias=bias, validation=val, methods=methods)
    assert chosen.report.methods == ("unchanged", "Shrunk(factors=(0.5,))", "Shrunk(factors=(0.25,))")
    np.testing.assert_allclose(chosen.report.strength[1:], [0.5, 0.25])
    # A multiple of the head is the head once it has its scale.
    np.testing.assert_allclose(chosen.report.scale[2] / chosen.report.scale[1], 2, rtol=1e-4)
    chex.assert_trees_all_close(chosen.candidates[1], chosen.candidates[2], rtol=1e-4)


def test_a_path_of_a_users_own_class_goes_through_folds(default):
    (kernel, bias, _, val), _ = default
    own, stack = (
        lip_jax.select(kernel, *val[:2], bias=bias, seen=False, methods=(method,))
        for method in (own_methods.OwnPath(), own_methods.Shrunk((0.5, 0.25)))
    )
    chex.assert_trees_all_close(own.candidates[1], stack.candidates[1], rtol=1e-5)


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
        trust_feats=True,
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
    assert len(lines) == 8
    assert [line[2:14].strip() for line in lines][1:6] == held["methods"]
    marked = [i for i, line in enumerate(lines) if line.startswith("* ")]
    assert marked == [1 + int(chosen.report.chosen)]
    assert f"{held['log_loss'][3]:.4f}" in lines[4]
    assert lines[-2] == f"judged by {N_VAL} validation rows"
    assert lines[-1] == chosen.report.reason


@pytest.mark.parametrize("n", [2, 21, 100])
def test_folds_are_disjoint_complete_and_fixed(n):
    places = fold_places(n, 5)
    assert sorted(places[places >= 0].tolist()) == list(range(n))
    assert np.ptp((places >= 0).sum(axis=1)) <= 1
    np.testing.assert_array_equal(places, fold_places(n, 5))
    rows = lip_jax.Rows(jnp.arange(n, dtype=jnp.float32)[:, None], jnp.arange(n, dtype=jnp.int32))
    folded = in_folds(rows, places)
    assert float(folded.weights.sum()) == n
    np.testing.assert_array_equal(folded.feats[..., 0], folded.labels)


def test_each_fold_is_given_what_the_others_prefer():
    # The first strength is best on all but for its luck in fold 0; without that fold the second is.
    places, place = best_places(jnp.array([[9.0, 1.0, 1.0], [2.0, 3.0, 3.0], [5.0, jnp.nan, 5.0]]))
    assert (places.tolist(), int(place)) == ([1, 0, 0], 0)


def test_evidence_is_in_standard_errors():
    assert float(Paired(jnp.float32(0.3), jnp.float32(0.1)).z) == pytest.approx(3)


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
    # Not for want of candidates that looked better.
    assert int((chosen.report.difference[:, 1:].max(axis=1) > 0).sum()) > 20


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
        methods=(lip_jax.Purified(),),
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
    share, scales = float(report.report.share[1]), report.report.scale.tolist()
    base = logits_of(kernel, bias, val[0])
    ours = logits_of(found.kernel, found.bias, val[0]) - (1 - share) * scales[0] * base
    ours = ours / (share * scales[1])
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
    np.testing.assert_allclose(report.noise_loss[1], report.log_loss[1], rtol=1e-5)
    # What is left to sharpen or to flatten.
    logits = feats[6000:] @ chosen.kernel + chosen.bias[None, :]
    # A blend of two heads is a little less sure than the better of them.
    assert 0.9 < float(lip_jax.fit_logit_scale(logits, true[6000:])) < 1.2


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
