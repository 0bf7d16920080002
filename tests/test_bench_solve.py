"""The speed benchmark: peers compute what the formula says, figures are checked, and verdicts can fail."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from rich.console import Console

from benchmarks import peers, solve, solve_report, timing
from benchmarks.solve_report import ALL_RANKS, FLOOR, FLOOR_TAIL, OURS, TORCH
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


def test_the_table_times_every_rank_dtype_and_kind_of_labels(quick, tmp_path):
    solve.table(tmp_path)
    record = json.loads((tmp_path / "solve_cpu.json").read_text())
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
    assert {row["claim"] for row in record["verdicts"]} >= {"at most 1.15 times its own floor"}
    text = (tmp_path / "solve_cpu.md").read_text()
    assert "| tiny, 300 × 24 × 5 | bfloat16 | soft targets | 0.9 l |" in text


def test_sizes_asked_for_join_what_is_on_record(quick, tmp_path, monkeypatch):
    small, other = (TINY._replace(name=name, every=False) for name in ("tiny", "tiny, other"))

    def table(only):
        solve.table(tmp_path, only)
        return json.loads((tmp_path / "solve_cpu.json").read_text())["table"]["cases"]

    monkeypatch.setattr(solve, "SIZES", (small, other))
    first = table(["tiny, other"])
    both = table(["tiny"])
    assert [case["name"] for case in both] == 3 * ["tiny"] + 3 * ["tiny, other"]
    assert both[3:] == first
    with pytest.raises(
        typer.BadParameter, match="names \\['none such'\\]; there are \\['tiny', 'tiny, other'\\]"
    ):
        table(["tiny", "none such"])


def test_a_wrong_result_stops_the_table(quick, tmp_path, monkeypatch):
    exact = solve.exact_sigma
    monkeypatch.setattr(solve, "exact_sigma", lambda *args: 1.0001 * exact(*args))
    with pytest.raises(AssertionError, match="rank 0: relative error 1"):
        solve.table(tmp_path)


def test_growth_is_fitted_and_drawn(quick, tmp_path, monkeypatch):
    grows = {name: [TINY._replace(**{name: k * getattr(TINY, name)}) for k in (1, 2, 4)] for name in "nql"}
    monkeypatch.setattr(solve, "GROWTH", grows)
    solve.growth(tmp_path)
    record = json.loads((tmp_path / "solve_cpu.json").read_text())
    assert len(record["growth"]["cases"]) == 9
    assert (tmp_path / "solve_cpu.png").stat().st_size > 10_000
    assert "## Growth" in (tmp_path / "solve_cpu.md").read_text()


def test_memory_of_a_call_is_seen():
    jax.block_until_ready(jnp.zeros(3) + 1)
    size = 64 * 2**20
    peak = timing.peak_beyond(lambda: np.ones(size, np.uint8).sum())
    assert 0.98 * size < peak < 1.5 * size


def case(name="CIFAR-100", n=50_000, rank="l/2", **seconds):
    spent = {OURS: 0.02, FLOOR: 0.019, TORCH: 0.2} | seconds
    return {
        "name": name,
        "n": n,
        "q": 512,
        "l": 100,
        "rank": rank,
        "dtype": "float32",
        "labels": "class ids",
        "seconds": spent,
        "relative_error": 1e-7,
    }


def test_speed_is_judged_at_half_rank_of_the_asked_sizes():
    judge = solve_report.faster_than_published
    (held,) = judge([case(), case(rank="0", **{TORCH: 0.01}), case(n=200_000)])
    assert held.holds
    assert held.figure.startswith("10.0 times (200 / 20.0 ms)")
    (missed,) = judge([case(**{TORCH: 0.1})])
    assert not missed.holds


def test_floors_are_judged_where_both_were_timed():
    judge = partial(solve_report.near, "claim", call=OURS, bound=FLOOR)
    assert judge([case(), case()]).holds
    verdict = judge([case(), case(**{OURS: 0.022})])
    assert not verdict.holds
    assert len(verdict.missed) == 1
    assert verdict.missed[0].endswith("1.16")


def test_memory_is_judged_at_the_sizes_of_the_paper():
    row = {"name": "CIFAR-100", "rank": "0"}
    ours, theirs = row | {"library": OURS, "bytes": 10}, row | {"library": TORCH, "bytes": 50}
    assert solve_report.memory_verdict([ours, theirs]).holds
    assert not solve_report.memory_verdict([ours | {"bytes": 11}, theirs]).holds


def test_growth_is_judged_by_its_exponent():
    def rows(power, whole=1.0):
        seconds = lambda n: {"pass over the rows": n**power, "all": n**whole}  # noqa: E731
        return [{"grows": "n", "n": n, "seconds": seconds(n)} for n in (1, 2, 4, 8)]

    assert solve_report.growth_verdict(rows(1.0)).holds
    assert not solve_report.growth_verdict(rows(1.2)).holds
    assert not solve_report.growth_verdict(rows(1.0, whole=1.2)).holds
    assert solve_report.exponents(rows(2.0), "n", "pass over the rows") == pytest.approx(2)


def test_a_section_keeps_the_others(tmp_path):
    row = {"name": "CIFAR-100", "n": 1, "rank": "0", "bytes": 1}
    memory = {"cases": [row | {"library": library} for library in (OURS, TORCH)]}
    sizes = [{"n": k, "q": k, "l": k, "seconds": dict.fromkeys(solve_report.STAGES, k)} for k in (1, 2, 4)]
    growth = {"cases": [size | {"grows": name} for name in "nql" for size in sizes]}
    solve_report.write("memory", memory, tmp_path, Console(quiet=True))
    solve_report.write("growth", growth, tmp_path, Console(quiet=True))
    record = json.loads((tmp_path / "solve_cpu.json").read_text())
    assert set(record) == {"command", "memory", "growth", "verdicts"}
