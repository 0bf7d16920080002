"""The speed benchmark: peers compute what the formula says, figures are checked, and verdicts can fail."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from benchmarks import peers, solve, timing
from benchmarks.solve import ALL_RANKS, FLOOR, FLOOR_TAIL, OURS, TORCH
from tests import oracles

TINY = solve.Size("tiny", 300, 24, 5)


@pytest.fixture(params=["class ids", "soft targets"])
def held(request):
    found = solve.problem(TINY.n, TINY.q, TINY.l)
    if request.param == "soft targets":
        found = found._replace(labels=solve.half_smoothed(found.labels, TINY.l))
    return found


@pytest.mark.parametrize("library", ["published_numpy", "published_jax", "published_torch"])
@pytest.mark.parametrize("rank", [0, 2, 4])
def test_peers_compute_the_published_formula(held, library, rank):
    arrays = [np.asarray(part) for part in held]
    if library == "published_torch":
        pytest.importorskip("torch")
        arrays = peers.as_tensors(held)
    found = getattr(peers, library)(*arrays, rank)
    u, s, vt = np.linalg.svd(oracles.f64(held.kernel), full_matrices=False)
    sigma = oracles.tail_sigma(u, s, vt, rank, held.feats, held.labels, rcond=0)
    np.testing.assert_allclose(found, (u * sigma) @ vt, rtol=1e-3, atol=1e-4)


def test_exact_values_are_those_of_the_oracle(held, monkeypatch):
    monkeypatch.setattr(solve, "ORACLE_ROWS", 128)
    split = solve.lip_jax.svd_split(held.kernel, 0)
    expected = oracles.tail_sigma(split.u, split.s, split.vt, 0, held.feats, held.labels)
    np.testing.assert_allclose(solve.exact_sigma(held, split), expected, rtol=1e-9)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(solve, "SIZES", (TINY,))
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "REST", 0.0)


def test_the_table_times_every_rank_dtype_and_kind_of_labels(quick):
    record = {"table": solve.table(None, None)}
    cases = record["table"]["cases"]
    settings = {(case["dtype"], case["labels"], case["rank"]) for case in cases}
    assert len(settings) == len(cases) == 12
    for case in cases:
        spent = case["seconds"]
        rank = {"0": 0, "l/2": 2, "0.9 l": 4}[case["rank"]]
        products = [spent[f"features, rank {rank}"], spent.get(f"targets, rank {rank}", 0)]
        factorisation = min(spent[name] for name in solve.FACTORISATIONS)
        assert spent[FLOOR] == pytest.approx(factorisation + sum(products))
        of_tail = min(factorisation, spent.get(solve.TAIL_FACTORISATION, 0))
        assert spent.get(FLOOR_TAIL, 0) == pytest.approx(of_tail + sum(products) if rank else 0)
        assert spent[OURS] > 0
        assert 0 < case["relative_error"] <= 1e-5
        assert (ALL_RANKS in spent) == (case["rank"] == "0")
    assert {verdict.claim for verdict in solve.verdicts(record)} >= {"at most 1.15 times its own floor"}
    assert "| tiny, 300 × 24 × 5 | bfloat16 | soft targets | 0.9 l |" in solve.tables(record)["time"]


def test_a_wrong_result_stops_the_table(quick, monkeypatch):
    exact = solve.exact_sigma
    monkeypatch.setattr(solve, "exact_sigma", lambda *args: 1.0001 * exact(*args))
    with pytest.raises(AssertionError, match="rank 0: relative error 1"):
        solve.table(None, None)


def peak_of_ones(size):
    return timing.peak_beyond(lambda: np.ones(size, np.uint8).sum())


def test_memory_of_a_call_is_seen():
    size = 64 * 2**20
    # In a process of its own: one that has freed as much takes it again without a rise.
    peak = timing.in_process(1, 1, peak_of_ones, size)
    assert 0.98 * size < peak < 1.5 * size


def case(name="CIFAR-100", n=50_000, rank="l/2", **seconds):
    spent = {OURS: 0.02, FLOOR: 0.019, TORCH: 0.2} | seconds
    size = {"name": name, "n": n, "q": 512, "l": 100, "rank": rank}
    return size | {"dtype": "float32", "labels": "class ids", "seconds": spent, "relative_error": 1e-7}


def test_floors_are_judged_where_both_were_timed():
    judge = partial(solve.near, "claim", call=OURS, bound=FLOOR)
    assert judge([case(), case()]).holds
    verdict = judge([case(), case(n=1, **{OURS: 0.022}), case(n=2, other=1.0)])
    assert not verdict.holds
    assert len(verdict.missed) == 1
    assert verdict.missed[0].endswith("1.16")


def test_memory_of_ours_stands_beside_that_of_pytorch():
    row = {"name": "CIFAR-100", "n": 1, "rank": "0"}
    cases = [row | {"library": name, "bytes": size * 2**20} for name, size in ((OURS, 10), (TORCH, 50))]
    assert solve.tables({"memory": {"cases": cases}})["memory"] == "| CIFAR-100 | 1 | 0 | 10.0 | 50.0 | 5.0 |"
