"""The table of repaired networks: a draw end to end, and the verdicts."""

import jax
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import lip_jax
from benchmarks import frame, repair
from benchmarks.data import load_digits
from benchmarks.frame import Cell, Draw
from benchmarks.networks import MLP


@pytest.mark.slow
def test_a_network_that_memorised_is_repaired_end_to_end(monkeypatch):
    # Purified readouts take long to compile.
    few = lip_jax.Choice((lip_jax.Ridge(),))
    whole, head = lip_jax.repair, lip_jax.apply
    monkeypatch.setattr(lip_jax, "repair", lambda *args, **options: whole(*args, choice=few, **options))
    monkeypatch.setattr(lip_jax, "apply", lambda *args, **options: head(*args, method=few, **options))
    model = MLP(10, (128, 64), named=True, dropout=0.05)
    # As JAX comes: linen's dropout does not hold to the strict regime of the tests.
    with jax.numpy_dtype_promotion("standard"):
        (network,) = repair.trained(model, repair.MEMORISED, [load_digits(0)])
    draw = repair.measure(Cell("digits MLP", *repair.MEMORISED, "with dropout"), 0, network)
    values = draw.values
    assert values["agreement"] > 90 > values["base"] + 10
    assert values["repaired"] >= values["head"] - 1
    assert values["gain"] == pytest.approx(values["repaired"] - values["base"])
    assert values["gain"] > 5
    assert draw.chosen.split(": ")[0] in ("head", "hidden_1", "hidden_2")


def record(*cells):
    """A record of made-up draws: data, rate, accuracy and gain of each cell."""
    draws = []
    for i, (rate, repaired, gain) in enumerate(cells):
        values = dict.fromkeys(("agreement", "base", "head"), 60.0) | {"repaired": repaired}
        values |= {"gain": gain, "gain error": 0.1}
        draws.append(
            Draw(Cell(f"digits {i}", "symmetric", rate, "without dropout"), 0, values, "head: ridge")
        )
    return {"digits": frame.as_json(frame.summarise(draws, repair.derived))}


def test_networks_are_judged_by_their_mean_where_they_memorised_and_by_what_they_lose():
    holding = repair.verdicts(record((0.4, 92.0, 5.0), (0.4, 94.5, 5.0), (0.0, 98.0, -0.29)))
    assert [verdict.holds for verdict in holding] == [True, True, True]
    assert holding[0].figure.startswith("93.2 (digits 0")
    missed = repair.verdicts(record((0.4, 92.0, -0.5), (0.4, 93.5, 5.0), (0.0, 98.0, -0.31)))
    assert [verdict.holds for verdict in missed] == [False, False, False]
    assert missed[2].figure == "1 of 2 cells (50.0%); worst draw -0.50"
    assert len(repair.tables(record((0.4, 92.0, 5.0)))["cells"].splitlines()) == 1
