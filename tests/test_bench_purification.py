"""The purification benchmark: cells end to end, what counts as a detection, and the verdicts."""

import itertools

import jax
import numpy as np
import pytest

pytest.importorskip("cleanlab")
pytest.importorskip("matplotlib")
pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

from benchmarks import frame, purification
from benchmarks.frame import Cell, Draw
from benchmarks.purification import CLEANLAB

FROZEN = Cell("CLINC150", "symmetric", 0.2, "frozen")


@pytest.fixture(scope="module")
def tasks():
    """The MLP after a few epochs on its own rows and, as if it had memorised those, on the others."""
    # optax's Adam takes a float to an integer power, which strict dtype promotion forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("raise"):
        found = purification.digits(None, [0], noises=[("symmetric", 0.2)], epochs={"memorised": 5})
        return list(itertools.islice(found, 2))


def test_a_cell_end_to_end(tasks):
    draw = purification.measure(tasks[0])
    values = draw.values
    assert values["wrong"] == pytest.approx(20, abs=5)
    assert min(values[name] for name in purification.ACCURACIES) > 60
    assert values["purified"] > values["noisy"]
    for who in purification.DETECTORS:
        assert values[f"{who} AUROC"] > 90
        assert values[f"{who} right among kept"] > 90
    assert values["memorised"] == 0
    record = {"digits": frame.as_json(frame.summarise([draw]))}
    parts = purification.tables(record)
    assert parts["accuracy"].startswith("| digits MLP, memorised | symmetric 0.2 |")
    assert parts["accuracy"].endswith("| 0% |")


def test_where_a_body_memorised_the_held_out_rows_are_judged_too(tasks):
    (trained_cell, _, trained), (held_cell, _, held) = tasks
    assert (trained_cell.rows, held_cell.rows) == ("", "held-out rows")
    assert trained.rows.x.shape == (1000, 64)
    assert held.rows.x.shape == (300, 64)
    assert trained.head is not None
    assert held.head is None
    for problem in (trained, held):
        assert problem.true.shape == problem.rows.y.shape
        assert np.mean(problem.true != problem.rows.y) == pytest.approx(0.2, abs=0.05)


def test_a_mask_is_scored_by_what_it_flags_and_what_it_keeps():
    wrong, flagged = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool), np.array([1, 1, 0, 1, 0, 0, 0, 0], bool)
    found = purification.detection(wrong, np.array([9, 8, 3, 7, 2, 2, 1, 1.0]), flagged)
    assert found["precision"] == found["recall"] == found["F1"] == pytest.approx(200 / 3)
    assert found["kept"] == pytest.approx(62.5)
    assert found["right among kept"] == pytest.approx(80)
    assert found["AUROC"] == pytest.approx(100 * 14 / 15)
    assert purification.detection(wrong, wrong * 1.0, np.zeros(8, bool))["F1"] == 0


def test_averages_are_judged_and_losing_cells_listed():
    values = [{"lip_jax F1": ours, f"{CLEANLAB} F1": 80.0} for ours in (79.0, 82.0)]
    rows = frame.summarise(Draw(FROZEN._replace(rate=0.1 * i), 0, held) for i, held in enumerate(values))
    verdict = purification.compared(rows, "", "lip_jax F1", f"{CLEANLAB} F1")
    assert verdict.holds
    assert [missed.endswith("-1.00") for missed in verdict.missed] == [True]
    assert verdict.figure.startswith("+0.50 points; below in 1 of 2 cells")
    assert not purification.compared(rows, "", f"{CLEANLAB} F1", "lip_jax F1").holds


def test_each_library_is_also_timed_on_the_cores_that_suit_it():
    case = {"data": "CLINC150", "cores": 1, "compilation": {"purify": 4.0, "purified readout": 2.0}}
    case["seconds"] = {CLEANLAB: 20.0, "purified readout": 2.5, "purify": 0.5}
    other = {**case, "cores": 2, "seconds": {CLEANLAB: 30.0, "purified readout": 2.0, "purify": 1.0}}
    kinds = ("ridge readout", "RidgeClassifierCV", "logistic readout", "LogisticRegression")
    for held in (case, other):
        held["seconds"] |= dict.fromkeys(kinds, 1.0)
        held |= {"accuracy": dict.fromkeys(kinds, 80.0), "value": dict.fromkeys(kinds, 2.0)}
    rows = purification.tables({"speed": {"cases": [case, other], "repeats": 5}})["speed"].splitlines()
    assert rows[0] == "| CLINC150 | 1 | 2.5 | 0.5 | 20 | 8.0, 40.0 | 2.0, 4.0 |"
    assert rows[2] == "| CLINC150 | best of each | 2 | 0.5 | 20 | 10.0, 40.0 |  |"


def test_timings_of_a_small_case(tasks):
    case = purification.time_case(tasks[0][2], repeats=1)
    value = case["value"]
    assert value["logistic readout"] == pytest.approx(value["LogisticRegression"], rel=1e-3)
    assert value["ridge readout"] == pytest.approx(value["RidgeClassifierCV"], rel=1e-3)
    assert all(seconds > 0 for seconds in case["seconds"].values())
    assert all(points > 60 for points in case["accuracy"].values())
    parts = purification.tables({"speed": {"cases": [{"data": "small", **case}], "repeats": 1}})
    assert parts["scikit_learn"].startswith("| small |")


def test_a_small_version_of_the_large_problem():
    large = purification.purify_large(1500, 32, 6, 0.2)
    assert large["points"]["right among kept"] > 95
    assert large["peak_bytes"]["data"] <= large["peak_bytes"]["purify"]
    assert purification.tables({"large": large})["large"].startswith("n = 1,500, q = 32, l = 6: ")
