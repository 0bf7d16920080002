"""Purified readouts beside cleanlab: accuracy, wrong labels found, time, and memory at many rows and classes.

    python -m benchmarks.purification table --data DIR
    python -m benchmarks.purification strengths --data DIR
    python -m benchmarks.purification speed --data DIR
    python -m benchmarks.purification large

All logistic models of a data set have one L2 strength, which was fixed beforehand. Labels that are judged and
fitted to carry the noise; true labels of these rows make the oracle and say which labels are wrong.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.progress import track

import lip_jax
from benchmarks import purification_report as report
from benchmarks import purification_speed
from benchmarks.accuracy import DIGITS_EPOCHS, Noise, Part, corrupt, head_of
from benchmarks.data import load_cifar10n, load_clinc150, load_digits
from benchmarks.networks import CNN, MLP, head_inputs, train_networks
from benchmarks.purification_report import CLEANLAB, MEMORISED, Cell, Draw
from benchmarks.timing import in_process
from lip_jax import Head

RESULTS = Path(__file__).parent / "results"
NOISES: dict[str, tuple[Noise, ...]] = {
    "clinc150": (
        *(("symmetric", rate) for rate in (0.1, 0.2, 0.4, 0.6)),
        *(("asymmetric", rate) for rate in (0.2, 0.4)),
    ),
    "digits": (("symmetric", 0.2), ("symmetric", 0.4), ("asymmetric", 0.4)),
}
# C of every logistic regression on a data set.
STRENGTHS = {"clinc150": 0.03, "cifar10n": 0.01, "digits": 1.0}
# What C is multiplied by to see how much hangs on it, and on how many draws of a cell.
FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
STRENGTH_SEEDS = {"clinc150": 1, "cifar10n": 1, "digits": 3}
SEEDS = {"clinc150": 3, "cifar10n": 3, "digits": 10}
FOLDS = 5

DataOption = Annotated[str | None, typer.Option(help="Data folder; default: LIP_JAX_DATA.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the results.")]

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


class Network(NamedTuple):
    """The head of a network, the rows it was trained on, and held-out rows with labels as noisy."""

    head: Head
    trained: Part
    held: Part


class Problem(NamedTuple):
    """Rows whose labels are judged, the true labels, clean test rows, and the network behind the features."""

    rows: Part
    true: np.ndarray
    test: Part
    c: float
    network: Network | None = None


Task = tuple[Cell, int, Problem]


def clinc150(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Sentence embeddings that no label has touched."""
    held = load_clinc150(data)
    train, test = Part(held.train_x, held.train_y), Part(held.test_x, held.test_y)
    for noise in NOISES["clinc150"]:
        for seed in seeds:
            (given,) = corrupt(noise, seed, [train], 150)
            rows = train._replace(y=np.asarray(given))
            problem = Problem(rows, train.y, test, STRENGTHS["clinc150"])
            yield Cell("CLINC150", *noise, "frozen", "training"), seed, problem


def cifar10n(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Human label errors, on 45,000 of the rows, which come ordered by class."""
    held = load_cifar10n(data)
    for seed in seeds:
        drawn = np.random.default_rng(seed).permutation(held.train_y.shape[0])[:45000]
        rows = Part(held.train_x[drawn], held.train_y[drawn])
        test = Part(held.test_x, held.test_y)
        problem = Problem(rows, held.train_true[drawn], test, STRENGTHS["cifar10n"])
        yield Cell("CIFAR-10N", "human", 0.402, "frozen", "training"), seed, problem


def digits(
    data: str | None,
    seeds: Iterable[int],
    *,
    noises: Iterable[Noise] = NOISES["digits"],
    epochs: dict[str, int] = DIGITS_EPOCHS,
) -> Iterator[Task]:
    """Features of networks trained on the noisy labels; of those that memorised also the held-out rows."""
    del data  # comes with scikit-learn
    seeds = list(seeds)
    splits = [load_digits(seed) for seed in seeds]
    clean = [[Part(split.train_x, split.train_y), Part(split.val_x, split.val_y)] for split in splits]
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    inputs = [
        jnp.stack([getattr(split, part) for split in splits]) for part in ("train_x", "val_x", "test_x")
    ]
    for name, model in (("digits MLP", MLP(10)), ("digits CNN", CNN(10))):
        capture = jax.jit(jax.vmap(partial(head_inputs, model)))
        for noise in noises:
            noisy = [corrupt(noise, seed, parts, 10) for seed, parts in zip(seeds, clean, strict=True)]
            train_y = jnp.stack([labels for labels, _ in noisy])
            snapshots = train_networks(keys, inputs[0], train_y, model=model, epochs=tuple(epochs.values()))
            for body, params in zip(epochs, snapshots, strict=True):
                feats = [np.asarray(capture(params, part)) for part in inputs]
                for i, seed in enumerate(seeds):
                    train, held = (Part(feats[k][i], np.asarray(noisy[i][k])) for k in (0, 1))
                    test = Part(feats[2][i], splits[i].test_y)
                    head = head_of(jax.tree.map(lambda leaf, i=i: leaf[i], params))
                    network = Network(head, train, held)
                    cell, c = Cell(name, *noise, body, "training"), STRENGTHS["digits"]
                    yield cell, seed, Problem(train, splits[i].train_y, test, c, network)
                    if body == "memorised":
                        yield cell._replace(rows="held-out"), seed, Problem(held, splits[i].val_y, test, c)


SETS = {"clinc150": clinc150, "cifar10n": cifar10n, "digits": digits}
ALL_SETS = ",".join(SETS)


def clean_learning(c: float, seed: int) -> Any:
    """CleanLearning at its defaults, around scikit-learn's logistic regression."""
    from cleanlab.classification import CleanLearning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=5000)
    # One process, as a fork beside JAX's threads may hang; the result is the same.
    return CleanLearning(model, seed=seed, cv_n_folds=FOLDS, find_label_issues_kwargs={"n_jobs": 1})


def accuracy(kernel, bias, test: Part) -> float:
    """Test accuracy in points."""
    logits = np.asarray(test.x) @ np.asarray(kernel) + np.asarray(bias)
    return 100 * float((logits.argmax(axis=1) == test.y).mean())


def detection(wrong: np.ndarray, score: np.ndarray, flagged: np.ndarray) -> dict[str, float]:
    """How well a score and a mask find the wrong labels, and what the mask leaves, in points."""
    from sklearn.metrics import roc_auc_score

    found = (wrong & flagged).sum()
    shares = {
        "AUROC": roc_auc_score(wrong, score),
        "F1": 2 * found / max(wrong.sum() + flagged.sum(), 1),
        "precision": found / max(flagged.sum(), 1),
        "recall": found / max(wrong.sum(), 1),
        "kept": (~flagged).mean(),
        "right among kept": (~wrong[~flagged]).mean(),
    }
    return {name: 100 * float(share) for name, share in shares.items()}


def memorisation(network: Network | None) -> dict[str, float]:
    """What `lip_jax.memorised` says, by leave-one-out scores and by held-out rows: 100 for yes."""
    if network is None:
        return dict.fromkeys(MEMORISED, float("nan"))
    head, trained, held = network
    said = [lip_jax.memorised(*head, *trained, validation=rows).memorised for rows in (None, held)]
    return {name: 100 * float(yes) for name, yes in zip(MEMORISED, said, strict=True)}


def measure(task: Task) -> Draw:
    """One draw of a cell."""
    cell, seed, (rows, true, test, c, network) = task
    l = int(max(rows.y.max(), true.max(), test.y.max())) + 1
    wrong = rows.y != true
    purify = partial(lip_jax.purified_readout, *rows, num_classes=l)
    fit = partial(lip_jax.linear_readout, *rows, num_classes=l, solver="logistic", ridge=1 / c)
    purified = purify(solver="logistic", ridge=1 / c)
    readouts = {
        "noisy": fit(),
        "purified": purified.readout,
        "purified ridge": purify(solver="ridge").readout,
        "oracle": fit(weights=(~wrong).astype(np.float32)),
    }
    values = {name: accuracy(found.kernel, found.bias, test) for name, found in readouts.items()}
    cleaned = clean_learning(c, seed).fit(*rows)
    values[CLEANLAB] = 100 * float((cleaned.predict(test.x) == test.y).mean())
    issues = cleaned.get_label_issues()
    trust, trusted = np.asarray(purified.purified.quality.trust), np.asarray(purified.purified.trusted)
    found = {
        "lip_jax": detection(wrong, -trust, ~trusted),
        CLEANLAB: detection(wrong, -issues["label_quality"].to_numpy(), issues["is_label_issue"].to_numpy()),
    }
    values |= {f"{who} {what}": x for who, figures in found.items() for what, x in figures.items()}
    return Draw(cell, seed, values | {"wrong": 100 * float(wrong.mean())} | memorisation(network))


@app.command()
def table(
    data: DataOption = None,
    out: OutOption = RESULTS,
    only: Annotated[str, typer.Option(help="Which sets to measure; others keep their rows.")] = ALL_SETS,
    seeds: Annotated[int | None, typer.Option(help="Seeds per cell; default: 3, on digits 10.")] = None,
) -> None:
    """Test accuracy and wrong labels found, in every cell of data, body and noise."""
    out.mkdir(parents=True, exist_ok=True)
    names = only.split(",")
    unknown = sorted(set(names) - set(SETS))
    if unknown:
        raise typer.BadParameter(f"--only names {unknown}; there are {sorted(SETS)}.")
    path = out / "purification.csv"
    cells = {row.cell: row for row in (report.read_cells(path) if path.exists() else [])}
    seconds = {}
    for name in names:
        start = time.perf_counter()
        tasks = SETS[name](data, range(seeds or SEEDS[name]))
        draws = [measure(task) for task in track(tasks, name)]
        cells |= {row.cell: row for row in report.summarise(draws)}
        seconds[name] = round(time.perf_counter() - start)
        report.write_cells(list(cells.values()), path)
    settings = {
        "C": STRENGTHS,
        "folds": FOLDS,
        "seeds": {row.cell.dataset: f"0 to {row.draws - 1}" for row in cells.values()},
        "seconds": seconds,
        "threads": {"XLA": len(os.sched_getaffinity(0)), "OpenBLAS": os.environ["OPENBLAS_NUM_THREADS"]},
    }
    report.write("table", settings, out, Console(width=160))


@app.command()
def strengths(data: DataOption = None, out: OutOption = RESULTS) -> None:
    """How much hangs on the strength of logistic regression, under the heaviest noise."""
    out.mkdir(parents=True, exist_ok=True)
    draws: dict[float, list[Draw]] = defaultdict(list)
    for name, count in STRENGTH_SEEDS.items():
        for cell, seed, problem in track(SETS[name](data, range(count)), name):
            # On the rows that a body memorised no strength helps.
            if cell.rate >= 0.4 and (cell.body, cell.rows) != ("memorised", "training"):
                for c in (factor * problem.c for factor in FACTORS):
                    draws[c].append(measure((cell, seed, problem._replace(c=c, network=None))))
    rows = [
        {"cell": str(row.cell), "C": c} | {name: round(row.mean[name], 2) for name in report.BY_STRENGTH}
        for c, found in draws.items()
        for row in report.summarise(found)
    ]
    report.write("strengths", {"seeds": STRENGTH_SEEDS, "rows": rows}, out, Console(width=160))


@app.command()
def speed(
    data: DataOption = None,
    out: OutOption = RESULTS,
    repeats: Annotated[int, typer.Option(help="Timed calls of lip_jax; medians are reported.")] = 5,
) -> None:
    """Time lip_jax, cleanlab and scikit-learn on one core and on all, each alone in a process."""
    out.mkdir(parents=True, exist_ok=True)
    counts = sorted({1, len(os.sched_getaffinity(0))})
    cases = [case for cores in counts for case in in_process(cores, cores, time_cases, data, repeats=repeats)]
    report.write("speed", {"repeats": repeats, "cases": cases}, out, Console(width=160))


def time_cases(data: str | None, *, repeats: int) -> list[dict[str, Any]]:
    """The timings of CLINC150 at 40% symmetric noise and of CIFAR-10N."""
    clinc = next(task for task in clinc150(data, [0]) if task[0].labels == "symmetric 0.4")
    cases = []
    for cell, seed, problem in (clinc, next(cifar10n(data, [0]))):
        model = clean_learning(problem.c, seed)
        case = purification_speed.time_case(problem.rows, problem.test, problem.c, model, accuracy, repeats)
        cases.append({"data": f"{cell.dataset}, {cell.labels}", **case})
    return cases


@app.command()
def large(
    out: OutOption = RESULTS,
    n: int = 200_000,
    q: int = 512,
    l: int = 4_000,
    rate: Annotated[float, typer.Option(help="Share of labels flipped.")] = 0.3,
) -> None:
    """Purify many rows of many classes in a process of its own: time by step, and peak memory."""
    out.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    measured = in_process(cores, 1, purification_speed.purify_large, n, q, l, rate)
    report.write("large", measured, out, Console(width=160))


if __name__ == "__main__":
    app()
