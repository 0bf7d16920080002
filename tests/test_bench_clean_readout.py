"""The tables of clean readouts: one cell of each end to end, verdicts, and the graphs with their networks."""

import csv

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks import clean_readout, graphs, tables
from benchmarks import predictive_power as power
from benchmarks.accuracy import Part
from benchmarks.clean_readout import Row
from benchmarks.predictive_power import PLAIN, ROBUST, Cell, Measured
from benchmarks.tables import Spread, spread


def blobs(rng, per_class, num_classes=4, q=16):
    """Classes told apart by one feature each, with much noise."""
    labels = np.tile(np.arange(num_classes, dtype=np.int32), per_class)
    feats = rng.normal(size=(len(labels), q)).astype(np.float32)
    feats[np.arange(len(labels)), labels] += 2.5
    return Part(feats, labels)


def read(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_an_error_shared_by_all_seeds_does_not_shrink_with_them():
    assert spread([1.0, 3.0]) == pytest.approx((2.0, np.sqrt(2), 1.0))
    assert spread([1.0, 3.0], [3.0, np.sqrt(21)]).error == pytest.approx(4.0)
    assert spread([2.0]) == (2.0, 0.0, 0.0)


def test_a_verdict_lists_the_cells_that_miss_it():
    found = {"a": Spread(1.0, 0.9, 0.4), "b": Spread(1.0, 1.2, 0.6)}
    verdict = tables.judge("a claim", found)
    assert not verdict.holds
    assert verdict.missed == ["b: +1.0 ± 0.6"]
    assert tables.judge("a claim", found, lambda gain: gain.mean > 0.5).holds
    assert "| a claim | **missed** | 1 of 2; least" in "\n".join(tables.verdict_lines([verdict]))


def readout_row(per_class, gain, solver="ridge", rate=0.2):
    """A readout beside a head of 80 points, with a standard error of 1."""
    accuracy, base = Spread(80 + gain, 1.0, 0.5), Spread(80.0, 1.0, 0.5)
    return Row(
        "CLINC150", "symmetric", rate, "overfitted", solver, per_class, accuracy, base, Spread(gain, 1.0, 1.0)
    )


def test_a_readout_beats_a_head_from_where_no_larger_one_fails():
    gains = {1: -5.0, 2: 2.5, 5: 1.9, 10: 2.1, 100: 9.0}
    assert clean_readout.beats_from([readout_row(*item) for item in gains.items()]) == 10
    assert clean_readout.beats_from([readout_row(1, 3.0), readout_row(100, 2.0)]) is None


def test_a_tenth_of_the_labels_must_do_at_every_rate():
    rows = [
        readout_row(count, gain, rate=rate)
        for rate, at_ten in ((0.2, 1.0), (0.6, 5.0))
        for count, gain in ((10, at_ten), (100, 9.0))
    ]
    (verdict,) = clean_readout.verdicts(rows)
    assert verdict.missed == ["symmetric 0.2: +1.0 ± 1.0"]
    assert clean_readout.verdicts(rows[2:])[0].holds


def test_clean_rows_are_nested_and_balanced():
    labels = np.random.default_rng(0).integers(0, 5, 300)
    few, more = (clean_readout.clean_rows(labels, count, 3) for count in (2, 7))
    assert set(few) <= set(more)
    assert np.bincount(labels[more]).tolist() == [7] * 5
    assert len(clean_readout.clean_rows(labels, 300, 0)) == 300


def test_clean_readouts_end_to_end(tmp_path, monkeypatch):
    def tiny(data, seeds):
        rng = np.random.default_rng(0)
        clean, test = blobs(rng, 20), blobs(rng, 50)
        found = clean_readout.readouts(clean, test, (2, 20), seeds)
        noisy = clean._replace(y=rng.permutation(clean.y))
        right = clean_readout.hits(clean_readout.noisy_ridge(noisy, 4), test)
        heads = {"given head": [right] * 3, clean_readout.CONTROL: [right] * 3}
        return clean_readout.compare("CIFAR-10N", [clean_readout.Heads(("human", 0.4), heads)], found)

    monkeypatch.setattr(clean_readout, "SETS", {"tiny": tiny})
    # The other solver takes long to compile.
    monkeypatch.setattr(clean_readout, "SOLVERS", ("ridge",))
    clean_readout.main(None, tmp_path, 3)
    rows = read(tmp_path / "clean_readout.csv")
    assert [(row["head"], row["solver"], row["per_class"]) for row in rows] == [
        (head, "ridge", count) for head in ("given head", clean_readout.CONTROL) for count in ("2", "20")
    ]
    for row in rows:
        assert float(row["gain"]) == pytest.approx(
            float(row["accuracy"]) - float(row["head accuracy"]), abs=1e-3
        )
    assert float(rows[1]["accuracy"]) > 85 > float(rows[0]["accuracy"])
    assert float(rows[1]["accuracy std"]) == 0 < float(rows[0]["accuracy std"])
    text = (tmp_path / "clean_readout.md").read_text(encoding="utf-8")
    assert "CIFAR-10N: a ridge readout of 2 clean labels a class beats the noisy head (given head)" in text
    assert (tmp_path / "clean_readout.png").stat().st_size > 0


def measured(powers, own, loss=PLAIN, noise="symmetric", rate=0.4, network="MLP", task="digits"):
    """Four layers of the last regime; a pair of figures is one for each of two seeds."""
    layers = tuple(power.MLP_LAYERS)
    values = np.array([np.broadcast_to(value, 2) for value in powers], float).T
    cell = Cell(task, network, power.REGIMES[-1], loss, noise, rate)
    own = np.broadcast_to(np.asarray(own, float), 2)
    by_solver = dict.fromkeys(power.SOLVERS, values)
    return Measured(cell, ("input", *layers), (16, 16, 16, 16), layers[1], by_solver, own, own)


def table_of(*cells):
    return {found.cell: found for found in cells}


def test_a_representation_is_held_against_the_network_and_the_input():
    held = table_of(
        measured((90, 91, 95, 80), 97, rate=0.0),
        measured((90, 91, 94, 80), 80, rate=0.2),
        measured((90, 91, (86, 92), 80), (70, 76), rate=0.6),
    )
    (network,) = power.beyond_network(held)
    assert network.holds
    assert network.figure == "2 of 2; least +14.0 ± 0.0 (symmetric 0.2)"
    (raw,) = power.beyond_input(held)
    assert raw.missed == ["symmetric 0.6: -1.0 ± 3.0"]


def test_layers_are_compared_by_what_noise_took_from_each():
    clean = measured((90, 93, 95, 97), 98, rate=0.0)
    (verdict,) = power.later_spoiled(
        table_of(
            clean, measured((90, 92, 94, 90), 60, rate=0.2), measured((90, 91, 94, (94, 95)), 60, rate=0.6)
        )
    )
    assert not verdict.holds
    assert verdict.figure == "1 of 2; least +0.5 ± 0.5 (symmetric 0.6)"


def test_the_suited_network_is_held_against_the_others():
    def both(suited, unsuited, rate):
        return [
            measured((50, 50, value, 50), 40, rate=rate, network=network, task="graphs")
            for network, value in ((power.SUITED, suited), (power.UNSUITED[0], unsuited))
        ]

    kept, less, more = power.suited_keeps(
        table_of(*both(99, 60, 0.0), *both(95, 50, 0.2), *both(93, 57, 0.4))
    )
    assert kept.missed == ["symmetric 0.4: -6.0 ± 0.0"]
    assert less.holds
    assert more.missed == ["max, then max, symmetric 0.4: -3.0 ± 0.0"]


def test_other_noise_and_another_loss_are_held_against_the_usual():
    usual = measured((50, 50, 60, 50), 40, network=power.SUITED, task="graphs")
    told = measured((50, 50, 58, 50), 40, noise="node-feature", network=power.SUITED, task="graphs")
    smoothed = measured((50, 50, 59, 50), 40, loss=ROBUST, network=power.SUITED, task="graphs")
    held = table_of(usual, told, smoothed)
    assert [verdict.holds for verdict in power.aligned_noise(held)] == [True]
    assert [verdict.missed for verdict in power.robust_helps(held)] == [["symmetric 0.4: -1.0 ± 0.0"]]


class Small(nn.Module):
    """Features as wide as the input, so that readouts of both compile once."""

    @nn.compact
    def __call__(self, feats):
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(16)(feats)))


def test_predictive_power_end_to_end(tmp_path, monkeypatch):
    network = power.Network("MLP", Small(), {"hidden": "head"}, "hidden")

    def tiny(seeds):
        rng = np.random.default_rng(0)
        splits = [power.Split(blobs(rng, 50), blobs(rng, 5), blobs(rng, 50)) for _ in range(seeds)]
        return [
            found
            for noise in (("symmetric", 0.0), ("symmetric", 0.4))
            for found in power.measure("digits", network, noise, PLAIN, splits, epochs=(3, 30), num_classes=4)
        ]

    monkeypatch.setattr(power, "TASKS", {"digits": tiny})
    monkeypatch.setattr(power, "SOLVERS", ("ridge",))
    monkeypatch.setattr(power, "JUDGED", "ridge")
    # optax's Adam takes a float to an integer power, which strict dtype promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        power.main(tmp_path, 2)
    rows = read(tmp_path / "predictive_power.csv")
    assert len(rows) == 2 * 2 * 2  # noise, regime, layer
    assert [row["layer"] for row in rows[:2]] == ["input", "hidden"]
    assert [row["representation"] for row in rows[:2]] == ["False", "True"]
    assert all(float(row["power"]) > 50 for row in rows)
    fit = {(row["regime"], row["rate"]): float(row["training fit"]) for row in rows}
    assert fit["trained long", "0.4"] < fit["trained long", "0.0"]
    text = (tmp_path / "predictive_power.md").read_text(encoding="utf-8")
    assert "digits, MLP, trained long: the readout of the representation beats the network" in text
    assert (tmp_path / "predictive_power.png").stat().st_size > 0


@pytest.fixture(scope="module")
def some_graphs():
    return graphs.random_graphs(np.random.default_rng(0), 300, nodes=9)


def test_degrees_are_counted_on_the_edges(some_graphs):
    path = np.zeros((4, 4), np.float32)
    for u, v in ((0, 1), (1, 2), (1, 3)):
        path[u, v] = path[v, u] = 1
    np.fill_diagonal(path, 0.5)
    assert graphs.max_degree(path[None]).tolist() == [3]
    for graph, degree in zip(some_graphs, graphs.max_degree(some_graphs), strict=True):
        nodes = [u for u in range(9) if graph[u, u] > 0]
        assert degree == max(sum(graph[u, v] > 0 for v in range(9) if v != u) for u in nodes)
        assert (graph == graph.T).all()
        assert set(np.flatnonzero(graph.sum(axis=0))) == set(nodes)


def test_graphs_are_balanced_and_parts_do_not_overlap():
    first, second = graphs.load_graphs(0, (60, 24), degrees=6)
    for part, count in ((first, 10), (second, 4)):
        np.testing.assert_array_equal(part.y, graphs.max_degree(part.x) - 1)
        assert np.bincount(part.y).tolist() == [count] * 6
    assert not any((graph == first.x).all(axis=(1, 2)).any() for graph in second.x)


def test_the_largest_feature_makes_equal_classes(some_graphs):
    classes = graphs.max_feature_class(some_graphs, 6)
    assert np.bincount(classes).tolist() == [50] * 6
    largest = np.diagonal(some_graphs, axis1=1, axis2=2).max(axis=1)
    assert largest[classes == 1].min() >= largest[classes == 0].max()


@pytest.mark.parametrize("aggregate", ["sum", "max"])
@pytest.mark.parametrize("readout", ["sum", "max"])
def test_graph_networks_do_not_see_the_order_of_nodes(some_graphs, aggregate, readout):
    batch = some_graphs[:20]
    model = graphs.GraphNet(5, aggregate, readout)
    variables = model.init(jax.random.key(0), batch[:1])
    order = np.random.default_rng(1).permutation(9)
    logits = jnp.asarray(model.apply(variables, batch))
    relabelled = model.apply(variables, batch[:, order][:, :, order])
    np.testing.assert_allclose(logits, relabelled, atol=1e-4)
    assert float(jnp.std(logits)) > 0
    # Places without a node count for nothing.
    padded = np.pad(batch, ((0, 0), (0, 3), (0, 3)))
    np.testing.assert_allclose(logits, model.apply(variables, padded), atol=1e-4)
