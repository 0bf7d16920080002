"""The stream benchmark: it passes over what it wrote, and sizes are by the formulas."""

import mmap

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from benchmarks import stream, timing

N, Q, L = 3000, 16, 5


@pytest.fixture
def folder(tmp_path):
    stream.write_rows(tmp_path, N, Q, L)
    return tmp_path


@pytest.mark.parametrize("level", stream.LEVELS)
def test_the_pass_takes_every_row_of_the_map(folder, level, monkeypatch):
    monkeypatch.setattr(stream, "BATCH_ROWS", 700)
    feats, labels = stream.read_rows(folder, 2500)
    assert feats.dtype == np.float16
    assert isinstance(feats, np.memmap)
    assert set(labels) == set(range(L))
    moments = stream.pass_over(level, feats, labels, L)
    assert float(moments.total) == 2500
    # Within half a unit of 1, where the rows are.
    assert abs(float(feats.astype(np.float32).mean()) - 1) < 0.5


def test_products_are_those_of_the_level(folder):
    feats = np.asarray(stream.read_rows(folder, N)[0])
    u = np.linalg.qr(np.random.default_rng(0).normal(size=(Q, L)))[0].astype(np.float32)
    exact = feats.astype(np.float64)
    np.testing.assert_allclose(stream.products(feats, u, "tail"), ((exact @ u) ** 2).sum(axis=0), rtol=1e-5)
    upper, lower, last = stream.products(feats, u, "moments")
    whole = np.block([[upper, np.asarray(lower).T], [lower, last]])
    np.testing.assert_allclose(whole, exact.T @ exact, rtol=1e-5)


def test_both_levels_are_measured(monkeypatch):
    # In this process: another would not be as quick, nor see these numbers.
    monkeypatch.setattr(stream, "in_process", lambda cores, openblas, call, *args: call(*args))
    monkeypatch.setattr(stream, "TURNS", 1)
    monkeypatch.setattr(stream, "PROCESSES", 2)
    held = stream.stream(sizes=(N, Q, L))
    assert [case["level"] for case in held["cases"]] == list(stream.LEVELS)
    for case in held["cases"]:
        assert case["rates"]["streamed"] > 0
        readings = {n: len(found) for n, found in case["peaks"].items()}
        assert readings == {str(N // 10): 2, str(N // 2): 2, str(N): 2}
    parts = stream.tables({"stream": held})
    assert len(parts["passes"].splitlines()) == 2 + 2
    assert "| 1,000,000,000 × 4,096 × 100,000 | moments |" in parts["beyond"]


def test_anonymous_memory_is_seen():
    before = timing.held_bytes("RssAnon")
    # Not from NumPy, which may get memory that is resident already.
    memory = mmap.mmap(-1, 32 * 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held = np.frombuffer(memory, np.uint8)
    held[:] = 1
    assert 0.9 * held.nbytes < timing.held_bytes("RssAnon") - before < 1.5 * held.nbytes


def record():
    tenth, whole = ([peak * 2**20 for peak in readings] for readings in ((100, 90, 140), (110, 105, 150)))
    rates = {"in memory": 100.0, "streamed": 90.0}
    case = {"level": "tail", "rates": rates, "peaks": {"10": tenth, "100": whole}}
    return {"stream": {"n": 3600, "q": 512, "l": 100, "cases": [case]}}


def test_a_pass_stands_beside_the_products_and_memory_by_rows():
    rows = stream.tables(record())["passes"].splitlines()
    assert rows[0].endswith("| MiB at 10 rows | MiB at 100 rows | processes differ by |")
    assert rows[2] == "| tail | 90 | 100 | 90% | 100 | 110 | 50 |"


def test_sizes_beyond_are_by_the_formulas():
    operations, state = stream.per_row("moments", 4096, 100_000)
    assert operations == pytest.approx(1.5 * 4096**2, rel=1e-3)
    # Two of each number: the sum, and what rounding took from it.
    assert state == pytest.approx(8 * (4096**2 + 4096 * 100_000), rel=1e-3)
    assert stream.per_row("tail", 512, 100)[1] < 8192
    assert stream.tables(record())["beyond"].splitlines()[0].endswith("| 0:00:40 |")
