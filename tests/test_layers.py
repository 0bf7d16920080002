"""Predictive power: test accuracy of readouts, against refits of every row left out in float64."""

import json

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest

import lip_jax
from tests import oracles, zoo

N, M, L = 30, 50, 3
RIDGE = 2.0
PART, REST = slice(75), slice(75, 150)


def make_rows(rng, n, q=5, spread=1.5):
    """Features of three clusters and their ids."""
    labels = rng.integers(0, L, n).astype(np.int32)
    feats = rng.normal(size=(n, q)) + spread * np.eye(L, q)[labels]
    return feats.astype(np.float32), labels


def ridge_with_intercept(feats, targets, weights, ridge):
    """Kernel and bias that minimise `Σ w ‖xᵀW + b − y‖² + λ ‖W‖²`, by the normal equations of both."""
    design = np.concatenate([oracles.f64(feats), np.ones((len(feats), 1))], axis=1)
    penalty = ridge * np.diag([1.0] * feats.shape[1] + [0.0])
    weighted = weights[:, None] * design
    solution = np.linalg.solve(weighted.T @ design + penalty, weighted.T @ targets)
    return solution[:-1], solution[-1]


def scaled_logits(feats, labels, weights, test_feats, ridge):
    """Test logits of a ridge readout, scaled by the scores of rows left out by refitting."""
    targets, labelled = oracles.as_targets(labels, L)
    weights = np.where(labelled, np.ones(len(targets)) if weights is None else oracles.f64(weights), 0)
    left_out = []
    for row in range(len(targets)):
        others = weights * (np.arange(len(targets)) != row)
        kernel, bias = ridge_with_intercept(feats, targets, others, ridge)
        left_out.append(oracles.f64(feats[row]) @ kernel + bias)
    scale = oracles.best_scale(np.stack(left_out), labels, weights)
    kernel, bias = ridge_with_intercept(feats, targets, weights, ridge)
    return scale * (oracles.f64(test_feats) @ kernel + bias)


def assert_measures(power, index, logits, labels):
    expected = oracles.metrics(logits, labels)
    for name, value in expected.items():
        assert float(getattr(power, name)[index]) == pytest.approx(value, rel=2e-3, abs=1e-6), name
    targets, labelled = oracles.as_targets(labels, L)
    hits = targets[np.arange(len(targets)), logits.argmax(axis=1)][labelled]
    error = hits.std() / np.sqrt(len(hits))
    assert float(power.standard_error[index]) == pytest.approx(error, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", ["ids", "ids and weights, some unlabelled", "targets"])
def test_one_layer_is_measured_as_by_refits_in_float64(rng, kind):
    (feats, labels), (test_feats, test_labels) = make_rows(rng, N), make_rows(rng, M)
    weights = None
    if kind == "targets":
        labels = (0.8 * np.eye(L)[labels] + 0.2 / L).astype(np.float32)
        test_labels = np.eye(L, dtype=np.float32)[test_labels]
    elif kind != "ids":
        weights = (rng.random(N) * (rng.random(N) > 0.2)).astype(np.float32)
        labels[:3], test_labels[:4] = -1, -1
    power = lip_jax.predictive_power(
        feats, labels, test_feats, test_labels, num_classes=L, ridge=RIDGE, weights=weights
    )
    assert power.layers == ("features",)
    assert power.width.tolist() == [5]
    assert_measures(power, 0, scaled_logits(feats, labels, weights, test_feats, RIDGE), test_labels)


def test_several_layers_are_measured_side_by_side_each_flattened(rng):
    (feats, labels), (test_feats, test_labels) = make_rows(rng, N), make_rows(rng, M)
    noise = (2 * rng.normal(size=x.shape).astype(np.float32) for x in (feats, test_feats))
    maps, test_maps = (
        (x + more).reshape(-1, 5, 1) for x, more in zip((feats, test_feats), noise, strict=True)
    )
    # Test features in another order: layers go by their names.
    power = lip_jax.predictive_power(
        {"maps": maps, "clusters": feats},
        labels,
        {"clusters": test_feats, "maps": test_maps},
        test_labels,
        ridge=RIDGE,
    )
    assert power.layers == ("maps", "clusters")
    assert power.width.tolist() == [5, 5]
    for index, (fit, test) in enumerate([(maps, test_maps), (feats, test_feats)]):
        fit, test = fit.reshape(N, -1), test.reshape(M, -1)
        assert_measures(power, index, scaled_logits(fit, labels, None, test, RIDGE), test_labels)
    assert float(power.accuracy[1]) > float(power.accuracy[0]) + 0.2


def test_the_readouts_are_those_of_linear_readout(rng):
    (feats, labels), (test_feats, test_labels) = make_rows(rng, N), make_rows(rng, M)
    for solver, ridge in (("ridge", None), ("logistic", 1.0)):
        options = {"solver": solver, "ridge": ridge}
        power = lip_jax.predictive_power(feats, labels, test_feats, test_labels, **options)
        readout = lip_jax.linear_readout(feats, labels, **options)
        scores = test_feats @ readout.kernel + readout.bias[None, :]
        metrics = lip_jax.head_metrics(scores, test_labels)
        assert float(power.accuracy[0]) == float(metrics.accuracy)
        assert float(power.log_loss[0]) == pytest.approx(float(metrics.log_loss), rel=1e-5)


def test_the_classes_are_those_of_both_sets(rng):
    (feats, labels), (test_feats, test_labels) = make_rows(rng, N), make_rows(rng, M)
    few = np.where(labels < 2, labels, -1)
    found = lip_jax.predictive_power(feats, few, test_feats, test_labels, ridge=RIDGE)
    told = lip_jax.predictive_power(feats, few, test_feats, test_labels, ridge=RIDGE, num_classes=L)
    chex.assert_trees_all_equal(found, told)


def test_works_inside_jit_where_rows_that_cannot_be_used_count_for_nothing(rng):
    (feats, labels), (test_feats, test_labels) = make_rows(rng, N), make_rows(rng, M)
    jitted = jax.jit(lambda *rows: lip_jax.predictive_power(*rows, num_classes=L, ridge=RIDGE))
    expected = lip_jax.predictive_power(feats, labels, test_feats, test_labels, ridge=RIDGE)
    found = jitted({"features": feats}, labels, {"features": test_feats}, test_labels)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    spoiled = (
        np.concatenate([test_feats, np.full((2, 5), np.nan, np.float32)]),
        np.append(test_labels, [0, 1]),
    )
    found = jitted({"features": feats}, labels, {"features": spoiled[0]}, spoiled[1].astype(np.int32))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_prints_as_a_table_and_as_plain_values(rng):
    (feats, labels), (test_feats, test_labels) = make_rows(rng, N), make_rows(rng, M)
    names = {"conv": 1.0, "a_longer_name": 2.0}
    power = lip_jax.predictive_power(
        {name: factor * feats for name, factor in names.items()},
        labels,
        {name: factor * test_feats for name, factor in names.items()},
        test_labels,
    )
    head, *lines = str(power).splitlines()
    assert head.split() == ["layer", "width", "accuracy", "±", "s.e.", "balanced", "log-loss", "ECE"]
    assert len({len(line) for line in (head, *lines)}) == 1
    assert [line.split()[:3] for line in lines] == [
        [name, "5", f"{float(power.accuracy[i]):.4f}"] for i, name in enumerate(names)
    ]
    plain = json.loads(json.dumps(power.as_dict()))
    assert plain["layers"] == list(names)
    assert plain["accuracy"] == power.accuracy.tolist()


def test_layers_of_a_network_are_captured_and_measured():
    x, labels = (array[:150] for array in zoo.digits())
    x = x.reshape(150, -1)
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(L)])
    variables = model.init(jax.random.key(0), x[:1])
    layers = {
        name: lip_jax.capture_features(model, variables, x, head=name) for name in ("layers_0", "layers_2")
    }
    fit, test = (jax.tree.map(lambda feats, part=part: feats[part], layers) for part in (PART, REST))
    power = lip_jax.predictive_power(fit, labels[PART], test, labels[REST], ridge=RIDGE)
    assert power.width.tolist() == [64, 64]
    assert bool((power.accuracy > 0.7).all())


def test_errors_name_the_layer_and_the_rows(rng, unchecked):
    (feats, labels), (test_feats, test_labels) = make_rows(rng, N), make_rows(rng, M)
    power = lip_jax.predictive_power
    with pytest.raises(ValueError, match=r"must name the same layers.*\['a'\] and \['b'\].*Capture both"):
        power({"a": feats}, labels, {"b": test_feats}, test_labels)
    with pytest.raises(ValueError, match=r"must name the same layers, at least one; got \[\] and \[\]"):
        power({}, labels, {}, test_labels)
    with pytest.raises(ValueError, match=r"layer 'a': feats must be floating point; got int64\[30,5\]"):
        power({"a": feats.astype(int)}, labels, {"a": test_feats}, test_labels)
    with pytest.raises(ValueError, match=r"layer 'features': feats must be a JAX or NumPy array.*got list"):
        power(feats.tolist(), labels, test_feats, test_labels)
    with pytest.raises(ValueError, match=r"layer 'features', test rows: feats .*q = 5; got float32\[50,4\]"):
        power(feats, labels, test_feats[:, 1:], test_labels)
    with pytest.raises(ValueError, match=r"layer 'features', test rows: feats must be finite; row 3"):
        power(feats, labels, np.where(np.arange(M)[:, None] == 3, np.nan, test_feats), test_labels)
    with pytest.raises(ValueError, match=r"labels of two axes must be float targets"):
        power(feats, labels, test_feats, np.eye(L, dtype=int)[test_labels])
    with pytest.raises(ValueError, match=r"solver must be 'ridge' or 'logistic'; got 'lasso'"):
        power(feats, labels, test_feats, test_labels, solver="lasso")
    with pytest.raises(ValueError, match=r"num_classes must be a positive integer.*got 2\.5"):
        power(feats, labels, test_feats, test_labels, num_classes=2.5)
    with pytest.raises(ValueError, match=r"cannot be seen under jit. Pass num_classes="):
        jax.jit(power)(feats, labels, test_feats, test_labels)


def test_gradients_are_finite_where_every_test_row_is_right(rng):
    labels = np.arange(12, dtype=np.int32) % 3
    feats = (10 * np.eye(3, dtype=np.float32))[labels] + rng.normal(size=(12, 3)).astype(np.float32)

    def total(feats, test_feats):
        power = lip_jax.predictive_power(feats, labels, test_feats, labels, num_classes=3)
        return power.accuracy.sum() + power.standard_error.sum() + power.calibration_error.sum()

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(feats, feats)
    assert value >= 1
    chex.assert_tree_all_finite(gradients)
