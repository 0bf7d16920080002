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

from benchmarks import purification, purification_speed
from benchmarks import purification_report as report
from benchmarks.purification_report import CLEANLAB, Cell, Draw

FROZEN = Cell("CLINC150", "symmetric", 0.2, "frozen", "training")


@pytest.fixture(scope="module")
def tasks():
    """The MLP after a few epochs on its own rows and, as if it had memorised those, on the others."""
    # optax's Adam takes a float to an integer power, which strict dtype promotion forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("raise"):
        found = purification.digits(None, [0], noises=[("symmetric", 0.2)], epochs={"memorised": 5})
        return list(itertools.islice(found, 2))


@pytest.fixture(scope="module")
def draw(tasks):
    # As in every test, so that what is compiled here serves them too.
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return purification.measure(tasks[0])


def test_a_cell_end_to_end(draw):
    values = draw.values
    assert set(report.FIGURES) == set(values)
    assert values["wrong"] == pytest.approx(20, abs=5)
    assert min(values[name] for name in report.ACCURACIES) > 60
    assert values["purified"] > values["noisy"]
    for who in report.DETECTORS:
        assert values[f"{who} AUROC"] > 90
        assert values[f"{who} right among kept"] > 90
    assert values["memorised"] == values["memorised by held-out rows"] == 0


def test_where_a_body_memorised_the_held_out_rows_are_judged_too(tasks):
    (trained_cell, _, trained), (held_cell, _, held) = tasks
    assert (trained_cell.rows, held_cell.rows) == ("training", "held-out")
    assert trained.rows.x.shape == (1000, 64)
    assert held.rows is trained.network.held
    assert held.network is None
    for problem in (trained, held):
        assert problem.true.shape == problem.rows.y.shape
        assert np.mean(problem.true != problem.rows.y) == pytest.approx(0.2, abs=0.05)


def test_cells_come_back_from_csv_and_are_written(draw, tmp_path):
    unknown = dict.fromkeys(report.MEMORISED, float("nan"))
    frozen = draw._replace(cell=FROZEN, values=draw.values | unknown)
    summaries = report.summarise([draw, frozen])
    path = tmp_path / "purification.csv"
    report.write_cells(summaries, path)
    again = report.read_cells(path)
    assert [row.cell for row in again] == [row.cell for row in summaries]
    for row, held in zip(summaries, again, strict=True):
        np.testing.assert_allclose([held.mean[name] for name in row.mean], list(row.mean.values()), atol=1e-4)
    text = report.markdown(again, {})
    assert "| digits MLP, memorised | symmetric 0.2 |" in text
    report.draw(again, tmp_path / "purification.png")
    assert (tmp_path / "purification.png").stat().st_size > 0


def test_a_mask_is_scored_by_what_it_flags_and_what_it_keeps():
    wrong, flagged = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool), np.array([1, 1, 0, 1, 0, 0, 0, 0], bool)
    found = purification.detection(wrong, np.array([9, 8, 3, 7, 2, 2, 1, 1.0]), flagged)
    assert found["precision"] == found["recall"] == found["F1"] == pytest.approx(200 / 3)
    assert found["kept"] == pytest.approx(62.5)
    assert found["right among kept"] == pytest.approx(80)
    assert found["AUROC"] == pytest.approx(100 * 14 / 15)
    assert purification.detection(wrong, wrong * 1.0, np.zeros(8, bool))["F1"] == 0


def cells(*changes, cell=FROZEN):
    """One summary for each set of changes to figures that are all 80, at rates of their own."""
    return report.summarise(
        Draw(cell._replace(rate=0.1 * i), 0, dict.fromkeys(report.FIGURES, 80.0) | change)
        for i, change in enumerate(changes)
    )


def test_half_a_point_below_cleanlearning_counts():
    near = report.never_far_below(cells({"purified": 79.6}, {"purified": 90.0}))
    assert near.holds
    assert near.figure.startswith("lowest -0.40")
    far = report.never_far_below(cells({"purified": 79.4}, {"purified": 90.0}))
    assert not far.holds
    assert len(far.missed) == 1


def test_averages_are_judged_and_losing_cells_listed():
    rows = cells({"lip_jax F1": 79.0}, {"lip_jax F1": 82.0})
    verdict = report.compared(rows, "", "lip_jax F1", f"{CLEANLAB} F1")
    assert verdict.holds
    assert [missed.endswith("-1.00") for missed in verdict.missed] == [True]
    assert verdict.figure.startswith("+0.50 points; below in 1 of 2 cells")
    assert not report.compared(rows, "", f"{CLEANLAB} F1", "lip_jax F1").holds


def test_one_draw_that_is_not_recognised_counts():
    name = "memorised by held-out rows"
    body = FROZEN._replace(body="memorised")
    assert report.recognised(cells({name: 100.0}, cell=body), "memorised", said=True).holds
    assert not report.recognised(cells({name: 90.0}, cell=body), "memorised", said=True).holds
    assert not report.recognised(cells({name: 10.0}, cell=body), "memorised", said=False).holds
    assert report.recognised(cells({name: 0.0}, cell=body), "memorised", said=False).holds


def test_ten_and_fifty_times_faster_in_every_case():
    case = {
        "data": "CLINC150",
        "cores": 1,
        "seconds": {CLEANLAB: 20.0, "purified readout": 1.9, "purify": 0.5},
    }
    slower = {**case, "cores": 2, "seconds": {**case["seconds"], "purified readout": 2.1}}
    readout, certification = report.verdicts([], {"speed": {"cases": [case, slower]}})
    assert not readout.holds
    assert readout.missed == ["CLINC150, 2 cores: 9.5 times"]
    assert readout.figure.endswith("each at its fastest: 10.5 (CLINC150)")
    assert not certification.holds
    assert report.verdicts([], {"speed": {"cases": [case]}})[0].holds


def test_other_strengths_are_compared_each_at_its_best():
    figures = dict.fromkeys(report.BY_STRENGTH, 80.0)
    rows = [
        {"cell": "digits", "C": 1.0, **figures, "purified": 90.0},
        {"cell": "digits", "C": 0.1, **figures, CLEANLAB: 92.0},
    ]
    text = report.markdown([], {"strengths": {"rows": rows}})
    assert "| digits | 80.0 (1) | 90.0 (1) | 92.0 (0.1) | 80.0 (1) | -2.00 |" in text
    assert "Mean lead -2.00 points; below in 1 of 1 cells." in text


def test_timings_of_a_small_case(tasks):
    rows, _, test, c, _ = tasks[0][2]
    model = purification.clean_learning(c, 0)
    case = purification_speed.time_case(rows, test, c, model, purification.accuracy, repeats=1)
    assert case["objective"]["logistic readout"] == pytest.approx(
        case["objective"]["LogisticRegression"], rel=1e-3
    )
    assert all(seconds > 0 for seconds in case["seconds"].values())
    assert all(points > 60 for points in case["accuracy"].values())
    record = {"cases": [{"data": "small", **case}], "repeats": 1, "machine": {"processor": ""}}
    assert "| small |" in report.markdown([], {"speed": record})


def test_a_small_version_of_the_large_problem(monkeypatch):
    # Four programs more to compile.
    monkeypatch.setattr(purification_speed, "step_seconds", lambda *_: {})
    large = purification_speed.purify_large(1500, 32, 6, 0.2)
    assert large["points"]["right among the trusted"] > 95
    assert large["peak_bytes"]["imports"] <= large["peak_bytes"]["purify"]
    # The peak is that of this process, which other tests have used too.
    within = large | {"peak_bytes": {"purify": 2**32}}
    assert report.verdicts([], {"large": within})[0].holds
    assert "## n = 1,500, q = 32, l = 6" in report.markdown([], {"large": large})
    beyond = large | {"peak_bytes": {"purify": 2**32 + 1}}
    assert not report.verdicts([], {"large": beyond})[0].holds
