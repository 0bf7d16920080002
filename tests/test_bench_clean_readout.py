"""Readouts of a few clean labels: rows, verdicts, and a small comparison end to end."""

import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from benchmarks import clean_readout, frame
from benchmarks.data import Part
from benchmarks.frame import Cell, Summary


def blobs(rng, per_class, num_classes=4, q=16):
    """Classes told apart by one feature each, with much noise."""
    labels = np.tile(np.arange(num_classes, dtype=np.int32), per_class)
    feats = rng.normal(size=(len(labels), q)).astype(np.float32)
    feats[np.arange(len(labels)), labels] += 2.5
    return Part(feats, labels)


def head(gains, rate=0.2):
    """A head of 80 points and the gains of ridge readouts over it, with a standard error of 1."""
    mean = {"head": 80.0}
    for count, gain in gains.items():
        mean |= {f"ridge {count}": 80 + gain, f"ridge {count} gain": gain, f"ridge {count} gain error": 1.0}
    return Summary(Cell("CLINC150", "symmetric", rate, "overfitted"), 5, mean, {})


@pytest.fixture
def ridge_alone(monkeypatch):
    # The other solver takes long to compile.
    monkeypatch.setattr(clean_readout, "SOLVERS", ("ridge",))


def test_a_readout_beats_a_head_from_where_no_larger_one_fails():
    assert clean_readout.beats_from(head({1: -5.0, 2: 2.5, 5: 1.9, 10: 2.1, 100: 9.0}), "ridge") == 10
    assert clean_readout.beats_from(head({1: 3.0, 100: 2.0}), "ridge") == "never"


def test_clean_rows_are_nested_and_balanced():
    labels = np.random.default_rng(0).integers(0, 5, 300)
    few, more = (clean_readout.clean_rows(labels, count, 3) for count in (2, 7))
    assert set(few) <= set(more)
    assert np.bincount(labels[more]).tolist() == [7] * 5
    assert len(clean_readout.clean_rows(labels, 300, 0)) == 300


def test_heads_are_compared_with_readouts_seed_by_seed(ridge_alone):
    rng = np.random.default_rng(0)
    clean, test = blobs(rng, 20), blobs(rng, 50)
    found = clean_readout.readouts(clean, test, (2, 20), range(3))
    noisy = clean._replace(y=rng.permutation(clean.y))
    right = clean_readout.right(clean_readout.noisy_ridge(noisy, 4), test)
    (row,) = clean_readout.compare("CIFAR-10N", ("human", 0.4), {"given head": [right] * 3}, found)
    few, whole = row.at("ridge 2"), row.at("ridge 20")
    assert whole.mean > 85 > few.mean
    assert whole.std == 0 < few.std
    gain = row.at("ridge 20 gain")
    assert gain.mean == pytest.approx(whole.mean - row.mean["head"])
    # One fit of all rows for every seed: the error is that of the common test rows.
    assert gain.error == pytest.approx(frame.paired(found["ridge", 20][0], right)[1])
    record = {"cifar10n": frame.as_json([row])}
    assert "| CIFAR-10N | given head | human 0.4 |" in clean_readout.tables(record)["heads"]
