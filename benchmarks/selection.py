"""What selection costs, and how often it errs on heads that need nothing.

python -m benchmarks.selection redraws [--data DIR]
python -m benchmarks.selection cost
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer

import lip_jax
from benchmarks.data import Dataset, load_clinc150
from benchmarks.heads import train_regularised
from benchmarks.record import machine, write_json
from benchmarks.timing import medians, problem
from lip_jax.choice import compare as selection

RESULTS = Path(__file__).parent / "results"
LIP_FAMILIES = ("published", "calibrated")
CLOSED_FORM = (*LIP_FAMILIES, "ridge")
# Draws of validation rows that are chosen by in one call.
AT_ONCE = 50

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def redraws(
    data: Annotated[str | None, typer.Option(help="The data folder; default LIP_JAX_DATA.")] = None,
    out: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS,
    draws: Annotated[int, typer.Option(help="Validation sets per case.")] = 300,
) -> None:
    """Redraw the validation rows of a clean, well regularised CLINC150 head, and count harmful switches."""
    clinc = load_clinc150(data)
    params = train_regularised(clinc.train_x, clinc.train_y, num_classes=150)["params"]["head"]
    head = lip_jax.Head(params["kernel"], params["bias"])
    base = float(_accuracy(clinc.test_x, clinc.test_y, *head))
    cases = []
    for rows in (300, 1000):
        for flip_rate in (0.0, 0.2):
            keys = jax.random.split(jax.random.key(rows), draws)
            found = [
                redrawn(head, clinc, keys[start : start + AT_ONCE], flip_rate, rows=rows)
                for start in range(0, draws, AT_ONCE)
            ]
            chosen, accuracy = (np.concatenate(part) for part in zip(*found, strict=True))
            losses = base - accuracy
            case = {
                "validation_rows": rows,
                "validation_flip_rate": flip_rate,
                "draws": draws,
                "switched": int((chosen != 0).sum()),
                "lost_over_0.3_points": int((losses > 0.003).sum()),
                "worst_loss_points": round(100 * float(losses.max()), 2),
                "mean_gain_points": round(-100 * float(losses.mean()), 3),
            }
            cases.append(case)
            print(case, flush=True)
    result = {"base_accuracy": base, "families": selection.DEFAULT_FAMILIES, "cases": cases}
    _write(out / "selection_redraws.json", result)


@partial(jax.jit, static_argnames=("rows", "families"))
def redrawn(
    head: lip_jax.Head,
    data: Dataset,
    keys: jax.Array,
    flip_rate: float,
    *,
    rows: int,
    families: tuple[str, ...] = selection.DEFAULT_FAMILIES,
) -> tuple[jax.Array, jax.Array]:
    """Which family is chosen by as many draws of validation rows as there are keys, and its test accuracy.

    Over all of them candidates are fitted once.
    """
    num_classes = head.kernel.shape[1]

    def choose(key):
        row_key, noise_key = jax.random.split(key)
        drawn = jax.random.permutation(row_key, data.val_y.shape[0])[:rows]
        labels = lip_jax.noise.symmetric(noise_key, data.val_y[drawn], flip_rate, num_classes=num_classes)
        validation = data.val_x[drawn], labels
        return lip_jax.select(*head, data.train_x, data.train_y, validation=validation, families=families)

    found = jax.vmap(choose)(keys)
    score = partial(_accuracy, data.test_x, data.test_y)
    return found.report.chosen, jax.lax.map(lambda head: score(*head), (found.kernel, found.bias))


@app.command()
def cost(
    out: Annotated[Path, typer.Option(help="Where results go.")] = RESULTS,
    repeats: Annotated[int, typer.Option(help="Timed calls of each; medians are reported.")] = 11,
    n: int = 50_000,
    q: int = 512,
    l: int = 100,
    validation_rows: int = 5_000,
) -> None:
    """Time selection over all ranks of both LIP families against one rank-0 solve, SVD included."""
    kernel, feats, labels = problem(n + validation_rows, q, l)
    bias, fit, val = jnp.zeros(l), (feats[:n], labels[:n]), (feats[n:], labels[n:])
    calls = {
        "rank-0 solve": lambda: lip_jax.refine(kernel, *fit, 0),
        "selection, LIP families": lambda: (
            lip_jax.select(kernel, bias, *fit, validation=val, families=LIP_FAMILIES).kernel
        ),
        "selection, families in closed form": lambda: (
            lip_jax.select(kernel, bias, *fit, validation=val, families=CLOSED_FORM).kernel
        ),
    }
    spent = medians(calls, rounds=repeats, seconds=np.inf)
    baseline = spent["rank-0 solve"]
    rows = {
        name: {"ms": round(1e3 * seconds, 1), "times_the_solve": round(seconds / baseline, 2)}
        for name, seconds in spent.items()
    }
    temporary = _path_memory(kernel, bias, val)
    logits = validation_rows * l * 4
    result = {
        "n": n,
        "q": q,
        "l": l,
        "validation_rows": validation_rows,
        "timings": rows,
        "all_ranks_temporary_bytes": temporary,
        "validation_logits_bytes": logits,
        "memory_ratio": round(temporary / logits, 2),
    }
    print(json.dumps(result, indent=2))
    _write(out / "selection_cost.json", result)


def _path_memory(kernel, bias, val) -> int:
    """Bytes that scoring every rank of a family takes beside its inputs, on the half that chooses."""
    feats, labels = val
    choose, _ = selection.halves(selection.Rows(feats, labels, None))
    spectrum = selection.calibrated_spectrum(kernel, *choose, bias, 0.0, None)
    scores = jax.jit(selection.rank_scores, static_argnames="metric")
    compiled = scores.lower(selection.Head(kernel, bias), spectrum, choose, metric="accuracy").compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this platform does not report the memory of compiled programs")
    return analysis.temp_size_in_bytes


def _accuracy(feats, labels, kernel, bias) -> jax.Array:
    return lip_jax.head_metrics(jnp.asarray(feats) @ kernel + bias[None, :], labels).accuracy


def _write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({**result, "machine": machine()}, path)


if __name__ == "__main__":
    app()
