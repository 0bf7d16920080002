"""What benchmarks share: spreads, verdicts, the record; and what is on record makes the committed pages."""

import json
from importlib import import_module

import numpy as np
import pytest
import typer

pytest.importorskip("optax")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks import frame, peers
from benchmarks.frame import Cell, Draw, Spread, Verdict

NAMES = (
    "accuracy",
    "clean_readout",
    "predictive_power",
    "purification",
    "repair",
    "selection",
    "solve",
    "spectra",
    "stream",
)
CELL = Cell("CLINC150", "symmetric", 0.2, "well regularised")


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_page_is_what_the_record_says(name):
    benchmark = import_module(f"benchmarks.{name}").BENCHMARK
    record = benchmark.load()
    assert set(record) == set(benchmark.sections)
    for held in record.values():
        assert held["commit"]
        assert held["date"]
        assert held["machine"]["versions"]["jax"]
    page = benchmark.path(frame.RESULTS, ".md").read_text(encoding="utf-8")
    assert benchmark.markdown(record) == page
    picture = benchmark.path(frame.RESULTS, ".png")
    assert (benchmark.draw(record) is not None) == picture.exists()


def test_an_error_shared_by_all_seeds_does_not_shrink_with_them():
    assert frame.spread([1.0, 3.0]) == pytest.approx((2.0, np.sqrt(2), 1.0))
    assert frame.spread([1.0, 3.0], [3.0, np.sqrt(21)]).error == pytest.approx(4.0)
    assert frame.spread([2.0]) == (2.0, 0.0, 0.0)


def test_a_verdict_lists_the_cells_that_miss_it():
    found = {"a": Spread(1.0, 0.9, 0.4), "b": Spread(1.0, 1.2, 0.6)}
    verdict = frame.judge_gain("a claim", found)
    assert not verdict.holds
    assert verdict.missed == ["b: +1.0 ± 0.6"]
    assert frame.judge_gain("a claim", {"a": found["a"]}).holds
    page = frame.verdict_table([verdict])
    assert "| a claim | **missed** | 1 of 2; least" in page
    assert "<summary>Against “a claim”: 1</summary>" in page


def test_a_claim_may_tolerate_a_share_of_the_cells():
    cells = dict(zip("abcd", (1, 2, 3, 4), strict=True))
    judged = [
        frame.judge("claim", cells, lambda x: x < 4, "{:d}!".format, "{met}; more", tolerated)
        for tolerated in (0.0, 0.25)
    ]
    assert judged[0] == Verdict("claim", False, "3 of 4 cells (75.0%); more", ["d: 4!"])
    assert judged[1].holds


def test_cells_come_back_from_the_record(tmp_path):
    values = ({"gain": 1.0, "bound": np.inf, "none": np.nan}, {"gain": 3.0, "bound": np.inf, "none": np.nan})
    draws = [Draw(CELL, seed, held, chosen="ridge") for seed, held in enumerate(values)]
    other = Draw(CELL._replace(rate=0.0, rows="held-out rows"), 0, {"gain": 0.123456789})
    rows = frame.summarise([*draws, other], lambda values: {"worst": float(values["gain"].min())})
    record = json.loads(frame.dump({"set": frame.as_json(rows)}))
    first, second = frame.summaries(record)
    assert first._replace(std=rows[0].std) == rows[0]
    assert first.at("gain") == (2.0, pytest.approx(np.sqrt(2), rel=1e-5), 0.0)
    assert (first.chosen, first.mean["bound"], first.mean["worst"]) == ("ridge 2", np.inf, 1.0)
    assert "none" not in first.mean
    assert second.mean["gain"] == 0.123457
    assert str(second.cell) == "CLINC150, well regularised, held-out rows, clean"


@pytest.fixture
def toy(monkeypatch, tmp_path):
    (tmp_path / "toy.md").write_text(
        "# Toy\n\n{verdicts}\n\n## First\n\n{one}\n\n## Second\n\n{two}\n\n{record}\n"
    )
    monkeypatch.setattr(frame, "PAGES", tmp_path)
    return frame.Benchmark(
        "toy",
        {
            name: lambda data, seeds, name=name: {"value": [name, data, seeds]}
            for name in ("one", "two", "three")
        },
        lambda record: [Verdict("measured", True, ", ".join(record))],
        lambda record: {name: str(held["value"]) for name, held in record.items()},
        groups={"both": ("one", "two")},
    )


def test_a_section_keeps_the_others_and_rendering_keeps_all(toy, tmp_path):
    out = tmp_path / "results"
    toy.main(["two"], "folder", out, 3)
    page = (out / "toy.md").read_text()
    assert "## Second\n\n['two', 'folder', 3]" in page
    assert "## First" not in page
    toy.main(["one"], None, out, None)
    record = toy.load(out)
    assert list(record) == ["one", "two"]
    assert record["two"]["value"] == ["two", "folder", 3]
    assert set(record["one"]) == {"value", "seconds", "commit", "date", "machine"}
    page = (out / "toy.md").read_text()
    (out / "toy.md").unlink()
    toy.main(["render"], None, out, None)
    assert (out / "toy.md").read_text() == page
    assert toy.load(out) == record
    toy.main(["both"], None, out, None)
    assert toy.load(out)["two"]["value"] == ["two", None, None]
    with pytest.raises(typer.BadParameter, match=r"no section \['four'\]; there are .*'both', 'render'"):
        toy.main(["four"], None, out, None)


def test_short_and_flat_values_stand_on_one_line():
    value = {"curve": list(range(60)), "cells": [{"a": {"b": 1}}, {"a": {"b": "é" * 100}}], "rest": (1, 2)}
    text = frame.dump(value)
    assert json.loads(text) == value | {"rest": [1, 2]}
    assert text.splitlines()[1].startswith(' "curve": [0, 1, 2,')
    assert '  {"a": {"b": 1}},' in text.splitlines()


def test_peers_are_named_where_they_are_installed():
    assert import_module("benchmarks.solve").BENCHMARK.packages == ("torch",) * peers.torch_installed()
