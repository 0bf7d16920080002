"""Metrics of a head against scikit-learn and a NumPy calibration error."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

import lip_jax
from lip_jax.rows.metrics import correct, correct_by_comparing
from tests import oracles

N, L = 400, 6


@pytest.fixture
def case(rng):
    """Logits that lean to their labels, class ids of unequal frequency, and weights, some of them 0."""
    labels = np.minimum(rng.geometric(0.4, N) - 1, L - 1).astype(np.int32)
    logits = 2 * rng.normal(size=(N, L)) + 1.5 * np.eye(L)[labels]
    return logits, labels, rng.random(N) * (rng.random(N) > 0.2)


def plain(metrics):
    return {name: float(value) for name, value in dataclasses.asdict(metrics).items()}


def test_metrics_are_scikit_learns(case, x64):
    logits, labels, weights = case
    used = weights > 0
    for sample_weight in (None, weights):
        metrics = lip_jax.head_metrics(logits, labels, weights=sample_weight)
        rows = used if sample_weight is not None else np.ones(N, bool)
        predicted, w = logits.argmax(axis=1)[rows], None if sample_weight is None else weights[rows]
        chances = oracles.softmax(logits)[rows]
        for value, expected in (
            (metrics.accuracy, accuracy_score(labels[rows], predicted, sample_weight=w)),
            (metrics.balanced_accuracy, balanced_accuracy_score(labels[rows], predicted, sample_weight=w)),
            (metrics.log_loss, log_loss(labels[rows], chances, sample_weight=w, labels=range(L))),
        ):
            assert float(value) == pytest.approx(expected, rel=1e-13)


def test_every_metric_is_the_oracles_for_ids_and_targets(case, rng, x64):
    logits, labels, weights = case
    labels = np.where(rng.random(N) < 0.15, -1, labels).astype(np.int32)
    soft = rng.dirichlet(np.ones(L) / 3, N)
    soft[:9] = np.nan
    for given in (labels, soft):
        for w in (None, weights):
            metrics = plain(lip_jax.head_metrics(logits, given, weights=w))
            assert metrics == pytest.approx(oracles.metrics(logits, given, w), rel=1e-12)


def test_metrics_in_float32_and_bfloat16_err_by_rounding_alone(case):
    logits, labels, weights = case
    for dtype in ("float32", "bfloat16"):
        stored = jnp.asarray(logits, dtype)
        metrics = lip_jax.head_metrics(stored, labels, weights=weights.astype(np.float32))
        assert {value.dtype for value in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}
        expected = oracles.metrics(stored, labels, weights.astype(np.float32))
        assert plain(metrics) == pytest.approx(expected, rel=2e-6)


def test_class_ids_are_their_one_hot_targets(case, x64):
    logits, labels, weights = case
    by_id, by_target = (
        lip_jax.head_metrics(logits, given, weights=weights) for given in (labels, np.eye(L)[labels])
    )
    chex.assert_trees_all_close(by_id, by_target, rtol=1e-13)


def test_balanced_accuracy_counts_only_classes_that_are_present(x64):
    logits = np.eye(4)[[0, 0, 1, 1, 1]] * 3
    labels = np.array([0, 0, 0, 1, 1], np.int32)
    metrics = lip_jax.head_metrics(logits, labels)
    assert float(metrics.balanced_accuracy) == pytest.approx((2 / 3 + 1) / 2, rel=1e-14)
    assert float(metrics.accuracy) == pytest.approx(4 / 5, rel=1e-14)


def test_calibration_error_is_0_for_calibrated_and_the_gap_for_overconfident_logits(x64):
    labels = np.array([0] * 7 + [1] * 3, np.int32)
    calibrated = np.tile([np.log(0.7), np.log(0.3)], (10, 1))
    assert float(lip_jax.head_metrics(calibrated, labels).calibration_error) == pytest.approx(0, abs=1e-15)
    certain = np.tile([800.0, 0.0], (10, 1))
    assert float(lip_jax.head_metrics(certain, labels).calibration_error) == pytest.approx(0.3, rel=1e-14)


def test_of_equal_logits_the_first_class_is_the_prediction(x64):
    metrics = lip_jax.head_metrics(np.zeros((3, 2)), np.array([0, 0, 1], np.int32))
    assert float(metrics.accuracy) == pytest.approx(2 / 3, rel=1e-15)
    assert float(metrics.log_loss) == pytest.approx(np.log(2), rel=1e-15)


def test_hits_by_comparing_are_those_of_argmax_and_of_equals_the_first(rng):
    logits = jnp.asarray(np.round(rng.normal(size=(N, L))), jnp.float32)
    labels = jnp.asarray(rng.integers(-2, L + 2, N), jnp.int32)
    for given in (labels, jnp.asarray(rng.random((N, L)), jnp.float32)):
        np.testing.assert_array_equal(correct_by_comparing(logits, given), correct(logits, given))
    highest = np.sort(logits)[:, -2:]
    assert (highest[:, 0] == highest[:, 1]).sum() > 100


@pytest.mark.parametrize("kind", ["class ids", "targets"])
def test_rows_that_cannot_be_used_count_for_nothing(case, kind):
    logits, labels, _ = case
    logits = jnp.asarray(logits, jnp.float32)
    given = jnp.asarray(labels) if kind == "class ids" else jnp.eye(L)[labels]
    without = jnp.ones(N).at[jnp.array([1, 2, 3, 4])].set(0)
    expected = lip_jax.head_metrics(logits, given, weights=without)
    spoilt = logits.at[1].set(jnp.nan).at[2, 3].set(jnp.inf).at[4, 0].set(-jnp.inf)
    given = given.at[3].set(L + 2) if kind == "class ids" else given.at[3, 1].set(jnp.inf)
    for metrics in (lip_jax.head_metrics(spoilt, given), jax.jit(lip_jax.head_metrics)(spoilt, given)):
        chex.assert_tree_all_finite(metrics)
        chex.assert_trees_all_close(metrics, expected, rtol=1e-5)
    bad_weights = jnp.ones(N).at[jnp.array([1, 2, 3, 4])].set(jnp.array([jnp.nan, -1.0, jnp.inf, 0.0]))
    chex.assert_trees_all_close(lip_jax.head_metrics(logits, given, weights=bad_weights), expected, rtol=1e-5)


def test_without_rows_that_count_everything_is_0(case):
    logits, labels, _ = case
    logits = logits.astype(np.float32)
    nothing = (
        lip_jax.head_metrics(logits, labels, weights=np.zeros(N, np.float32)),
        lip_jax.head_metrics(logits, np.full_like(labels, -1)),
        lip_jax.head_metrics(logits[:0], labels[:0]),
    )
    for metrics in nothing:
        assert plain(metrics) == dict.fromkeys(plain(metrics), 0.0)


def test_vmap_over_heads_is_one_by_one(case, x64):
    logits, labels, _ = case
    stack = jnp.stack([jnp.asarray(logits) * scale for scale in (0.3, 1.0, -2.0)])
    stacked = jax.vmap(lip_jax.head_metrics, in_axes=(0, None))(stack, jnp.asarray(labels))
    for i in range(3):
        one = jax.tree.map(lambda value: value[i], stacked)  # noqa: B023
        chex.assert_trees_all_close(one, lip_jax.head_metrics(stack[i], labels), rtol=1e-12)


def test_errors_say_what_does_not_fit(unchecked):
    logits = jnp.ones((5, 3))
    with pytest.raises(ValueError, match=r"labels must have one row .* n = 5; got int32\[4\]"):
        lip_jax.head_metrics(logits, jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match=r"one column per class, l = 3; got float32\[5,2\]"):
        lip_jax.head_metrics(logits, jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"weights must have shape \(n,\) = \(5,\)"):
        lip_jax.head_metrics(logits, jnp.zeros(5, jnp.int32), weights=jnp.ones(2))
    one = r"logits must have at least two columns, for a softmax; got float32\[5,1\].*columns 0 and z"
    for labels in (jnp.zeros((5, 1)), jnp.zeros(5, jnp.int32)):
        with pytest.raises(ValueError, match=one):
            lip_jax.head_metrics(logits[:, :1], labels)
    with pytest.raises(ValueError, match=r"logits must have 2 axes \(n, l\); got float32\[3\]"):
        lip_jax.head_metrics(logits[0], jnp.zeros(5, jnp.int32))


def test_balanced_accuracy_of_soft_targets_gives_a_constant_its_one_class():
    labels = np.array([0] * 90 + list(range(1, 10)) + [0], np.int32)
    smoothed = (0.9 * np.eye(10)[labels] + 0.01).astype(np.float32)
    constant = np.tile(np.eye(10, dtype=np.float32)[0], (100, 1))
    assert float(lip_jax.head_metrics(constant, labels).balanced_accuracy) == pytest.approx(0.1)
    assert float(lip_jax.head_metrics(constant, smoothed).balanced_accuracy) == pytest.approx(0.1, rel=1e-5)
    hard = np.eye(10, dtype=np.float32)[labels]
    right = lip_jax.head_metrics(5 * hard, hard).balanced_accuracy
    assert float(right) == pytest.approx(1, rel=1e-6)
