"""What the choice costs, and how often it errs on a head that needs nothing.

python -m benchmarks.selection redraws|cost|render [--data DIR]
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import lip_jax
from benchmarks import frame
from benchmarks.data import Dataset, load_clinc150
from benchmarks.frame import Benchmark, Measured, Record
from benchmarks.heads import head_of, train_regularised
from benchmarks.timing import medians, problem
from lip_jax import Calibrated, Head, Published, Purified, Ridge
from lip_jax.choice.evidence import FOLDS, fold_scorer
from lip_jax.methods.calibrated import calibrated_path
from lip_jax.numerics.linalg import logits_of
from lip_jax.rows.labels import Rows

LIP = (Published(), Calibrated())
CLOSED_FORM = (*LIP, Ridge())
ALL = (*CLOSED_FORM, Purified())
# Validation sets per case, and how many are chosen by in one call.
DRAWS, AT_ONCE = 300, 50
# Rows to fit, features, classes, and validation rows.
SIZES = 50_000, 512, 100, 5_000
ROUNDS = 11


def redraws(data: str | None, seeds: int | None) -> Measured:
    """Redraw the validation rows of a clean, well regularised CLINC150 head, and count harmful switches."""
    clinc = load_clinc150(data)
    head = head_of(train_regularised(clinc.train_x, clinc.train_y, num_classes=150))
    base, cases = float(_accuracy(clinc, head)), []
    for rows, flip_rate in ((rows, rate) for rows in (300, 1000) for rate in (0.0, 0.2)):
        draws = seeds or DRAWS
        parts = np.split(np.arange(draws), range(AT_ONCE, draws, AT_ONCE))
        keys = jax.random.split(jax.random.key(rows), draws)
        found = [redrawn(head, clinc, keys[part], flip_rate, rows=rows) for part in parts]
        chosen, accuracy = (np.concatenate(part) for part in zip(*found, strict=True))
        case = {"validation_rows": rows, "validation_flip_rate": flip_rate, "draws": draws}
        case |= {
            "switched": int((chosen != 0).sum()),
            "lost_over_0.3_points": int((base - accuracy > 0.003).sum()),
        }
        case |= {"worst_loss_points": round(100 * float((base - accuracy).max()), 2)}
        cases.append(case | {"mean_gain_points": round(100 * float((accuracy - base).mean()), 3)})
        print(cases[-1], flush=True)
    return {
        "base_accuracy": base,
        "methods": [type(method).__name__.lower() for method in ALL],
        "cases": cases,
    }


@partial(jax.jit, static_argnames=("rows", "methods"))
def redrawn(head: Head, data: Dataset, keys: jax.Array, flip_rate: float, *, rows: int, methods=ALL):
    """Which method is chosen by as many draws of validation rows as there are keys, and its test accuracy.

    Over all of them candidates are fitted once.
    """

    def choose(key):
        row_key, noise_key = jax.random.split(key)
        drawn, l = jax.random.permutation(row_key, data.val_y.shape[0])[:rows], head.kernel.shape[1]
        labels = lip_jax.noise.symmetric(noise_key, data.val_y[drawn], flip_rate, num_classes=l)
        fit, val = (data.train_x, data.train_y), (data.val_x[drawn], labels)
        return lip_jax.select(head.kernel, *fit, bias=head.bias, validation=val, methods=methods)

    found = jax.vmap(choose)(keys)
    taken = Head(found.kernel, found.bias)
    return found.report.chosen, jax.lax.map(partial(_accuracy, data), taken)


def _accuracy(data: Dataset, head: Head) -> jax.Array:
    assert head.bias is not None
    scores = jnp.asarray(data.test_x) @ head.kernel + head.bias[None, :]
    return lip_jax.head_metrics(scores, data.test_y).accuracy


def cost(
    data: str | None, seeds: int | None, sizes: tuple[int, int, int, int] = SIZES, rounds: int = ROUNDS
) -> Measured:
    """Time selection over all ranks of both LIP methods against one rank-0 solve, SVD included."""
    del data, seeds
    n, q, l, seen = sizes
    kernel, feats, labels = problem(n + seen, q, l)
    bias, fit, val = jnp.zeros(l), (feats[:n], labels[:n]), (feats[n:], labels[n:])
    select = partial(lip_jax.select, kernel, *fit, bias=bias, validation=val)
    calls = {
        "rank-0 solve": lambda: lip_jax.refine(kernel, *fit, 0),
        "selection, LIP methods": lambda: select(methods=LIP).kernel,
        "selection, methods in closed form": lambda: select(methods=CLOSED_FORM).kernel,
    }
    spent = medians(calls, rounds=rounds, seconds=np.inf)
    times = {name: round(seconds / spent["rank-0 solve"], 2) for name, seconds in spent.items()}
    timings = {name: {"ms": round(1e3 * x, 1), "times_the_solve": times[name]} for name, x in spent.items()}
    temporary, of_logits = path_memory(Head(kernel, bias), Rows(*val, None)), seen * l * 4
    result = {"n": n, "q": q, "l": l, "validation_rows": seen, "timings": timings}
    result |= {"all_ranks_temporary_bytes": temporary, "validation_logits_bytes": of_logits}
    return result | {"memory_ratio": round(temporary / of_logits, 2)}


def path_memory(head: Head, val: Rows) -> int:
    """Bytes that scoring every rank of a method takes beside its inputs."""
    folds = FOLDS["validation"]
    path = calibrated_path(head, val, 0.0, None)
    scores = jax.jit(
        lambda path, head, rows: path.over_logits(
            rows.feats, fold_scorer(logits_of(rows.feats, *head), rows, "accuracy", folds)
        )
    )
    analysis = scores.lower(path, head, val).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError("this platform does not report the memory of compiled programs")
    return analysis.temp_size_in_bytes


def tables(record: Record) -> dict[str, str]:
    """What was counted, and what was timed."""
    parts = {}
    if "redraws" in record:
        parts["redraws"] = frame.rows_of(case.values() for case in record["redraws"]["cases"])
    if "cost" in record:
        held = record["cost"]
        parts["cost"] = frame.rows_of((name, *spent.values()) for name, spent in held["timings"].items())
        sizes = f"{held['n']:,} rows, {held['q']} features, {held['l']} classes"
        parts["sizes"] = f"{sizes} and {held['validation_rows']:,} validation rows"
        parts["memory"] = str(held["memory_ratio"])
    return parts


SECTIONS = {"redraws": redraws, "cost": cost}
BENCHMARK = Benchmark("selection", SECTIONS, lambda record: [], tables)

if __name__ == "__main__":
    BENCHMARK.run()
