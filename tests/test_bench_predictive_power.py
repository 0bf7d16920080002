"""Predictive power by layer: claims, one small network end to end, and the graphs with their networks."""

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

from benchmarks import frame, graphs
from benchmarks import predictive_power as power
from benchmarks.frame import Cell, Draw
from tests.test_bench_clean_readout import blobs


def draws(powers, own, noise="symmetric", rate=0.4, network="MLP", task="digits"):
    """Input and three layers of the last regime; a pair of figures is one for each of two seeds."""
    cell = Cell(f"{task}, {network}", noise, rate, power.REGIMES[-1])
    names = [f"{layer}, {power.JUDGED}" for layer in ("input", *power.NETWORKS[cell.data].layers)]
    return [
        Draw(
            cell,
            seed,
            {name: float(np.broadcast_to(value, 2)[seed]) for name, value in zip(names, powers, strict=True)}
            | {"network": float(np.broadcast_to(own, 2)[seed])},
        )
        for seed in range(2)
    ]


def claims(title, *cells):
    return [item for item in power.judge([draw for cell in cells for draw in cell]) if title in item.claim]


def test_a_representation_is_held_against_the_network_and_the_input():
    cells = (
        draws((90, 91, 95, 80), 97, rate=0.0),
        draws((90, 91, 94, 80), 80, rate=0.2),
        draws((90, 91, (86, 92), 80), (70, 76), rate=0.6),
    )
    (network,) = claims("beats the network", *cells)
    assert network.claim == "digits, MLP, trained long: the readout of the representation beats the network"
    assert network.holds
    assert network.figure == "2 of 2; least +14.0 ± 0.0 (symmetric 0.2)"
    (raw,) = claims("beats the raw input", *cells)
    assert raw.missed == ["symmetric 0.6: -1.0 ± 3.0"]


def test_layers_are_compared_by_what_noise_took_from_each():
    (verdict,) = claims(
        "last hidden layer",
        draws((90, 93, 95, 97), 98, rate=0.0),
        draws((90, 92, 94, 90), 60, rate=0.2),
        draws((90, 91, 94, (94, 95)), 60, rate=0.6),
    )
    assert not verdict.holds
    assert verdict.figure == "1 of 2; least +0.5 ± 0.5 (symmetric 0.6)"


def test_the_suited_network_is_held_against_the_others():
    def both(suited, unsuited, rate):
        values = ((power.SUITED, suited), (power.UNSUITED[0], unsuited))
        return [
            draw
            for network, value in values
            for draw in draws((50, value, 50), 40, rate=rate, network=network, task="graphs")
        ]

    less, more = claims("unsuited", both(99, 60, 0.0), both(95, 50, 0.2), both(93, 57, 0.4))
    assert less.holds
    assert more.missed == ["max, then max, symmetric 0.4: -3.0 ± 0.0"]


class Small(nn.Module):
    """Features as wide as the input, so that readouts of both compile once."""

    @nn.compact
    def __call__(self, feats):
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(16)(feats)))


def test_a_small_network_end_to_end(monkeypatch):
    network = power.Network(Small(), {"hidden": "head"}, "hidden")
    rng = np.random.default_rng(0)

    def split(seed):
        return power.Split(blobs(rng, 50), blobs(rng, 5), blobs(rng, 50))

    noises = (("symmetric", 0.0), ("symmetric", 0.4))
    task = power.Task("digits", split, {"MLP": network}, noises, 4, (3, 30))
    monkeypatch.setattr(power, "NETWORKS", {"digits, MLP": network})
    monkeypatch.setattr(power, "SOLVERS", ("ridge",))
    monkeypatch.setattr(power, "JUDGED", "ridge")
    # optax's Adam takes a float to an integer power, which strict dtype promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        record = {"digits": power.measured(task, None, 2)}
    rows = frame.summaries(record)
    assert len(rows) == 2 * 2  # noise, regime
    assert all(row.mean["hidden, ridge"] > 50 for row in rows)
    fit = {(row.cell.regime, row.cell.rate): row.mean["training fit"] for row in rows}
    assert fit["trained long", 0.4] < fit["trained long", 0.0]
    assert "| training | labels | input | **hidden** |" in power.tables(record)["networks"]
    assert power.verdicts(record)[0].claim.endswith("the readout of the representation beats the network")


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
