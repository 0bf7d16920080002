"""Purified readouts beside cleanlab: accuracy, wrong labels found, time, and memory at many rows and classes.

    python -m benchmarks.purification table|speed|large|render --data DIR

All logistic models of a data set have one L2 strength, which was fixed beforehand. Labels that are judged and
fitted to carry the noise; true labels of these rows make the oracle and say which labels are wrong.
"""

import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lip_jax
from benchmarks import frame
from benchmarks.data import Noise, Part, corrupt, load_cifar10n, load_clinc150
from benchmarks.frame import Benchmark, Cell, Draw, Measured, Record, Summary, Verdict
from benchmarks.heads import accuracy
from benchmarks.networks import CNN, DIGITS_EPOCHS, MLP, digit_networks
from benchmarks.timing import clustered, held_bytes, in_process, timed
from lip_jax.sums.ridge import PATH_POINTS, ridge_factors, ridge_grid

RATES = {"symmetric": (0.1, 0.2, 0.4, 0.6), "asymmetric": (0.2, 0.4)}
CLINC_NOISES: tuple[Noise, ...] = tuple((kind, rate) for kind, rates in RATES.items() for rate in rates)
DIGITS_NOISES: tuple[Noise, ...] = (("symmetric", 0.2), ("symmetric", 0.4), ("asymmetric", 0.4))
# C of every logistic regression on a data set.
STRENGTHS = {"clinc150": 0.03, "cifar10n": 0.01, "digits": 1.0}
SEEDS = {"clinc150": 3, "cifar10n": 3, "digits": 10}
FOLDS = 5
REPEATS = 5
LARGE = {"n": 200_000, "q": 512, "l": 4_000, "rate": 0.3}

CLEANLAB = "CleanLearning"
ACCURACIES = ("noisy", "purified", "purified ridge", CLEANLAB, "oracle")
DETECTED = ("AUROC", "F1", "precision", "recall", "kept", "right among kept")
DETECTORS = ("lip_jax", CLEANLAB)
# What is timed beside CleanLearning; and what of ours beside whose of scikit-learn.
TIMED = ("purified readout", "purify")
SCIKIT_LEARN = (
    ("ridge", "ridge readout", "RidgeClassifierCV"),
    ("objective", "logistic readout", "LogisticRegression"),
)


class Problem(NamedTuple):
    """Rows whose labels are judged, the true labels, clean test rows, and a head trained on the rows."""

    rows: Part
    true: np.ndarray
    test: Part
    c: float
    head: lip_jax.Head | None = None


Task = tuple[Cell, int, Problem]


def clinc150(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Sentence embeddings that no label has touched."""
    train, _, test = load_clinc150(data).parts
    for noise in CLINC_NOISES:
        for seed in seeds:
            rows = train._replace(y=np.asarray(corrupt(noise, seed, [train], 150)[0]))
            problem = Problem(rows, train.y, test, STRENGTHS["clinc150"])
            yield Cell("CLINC150", *noise, "frozen"), seed, problem


def cifar10n(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Human label errors, on 45,000 of the rows, which come ordered by class."""
    (x, y), test, _, true = load_cifar10n(data)
    for seed in seeds:
        drawn = np.random.default_rng(seed).permutation(len(y))[:45000]
        problem = Problem(Part(x[drawn], y[drawn]), true[drawn], test, STRENGTHS["cifar10n"])
        yield Cell("CIFAR-10N", "human", 0.402, "frozen"), seed, problem


def digits(
    _: str | None, seeds: Iterable[int], *, noises: Iterable[Noise] = DIGITS_NOISES, epochs=DIGITS_EPOCHS
) -> Iterator[Task]:
    """Features of networks trained on the noisy labels; of those that memorised also the held-out rows."""
    models = ("digits MLP", MLP(10)), ("digits CNN", CNN(10))
    for (name, model), noise in ((model, noise) for model in models for noise in noises):
        for regime, seed, network in digit_networks(model, noise, seeds, epochs=epochs):
            train, held, test = (Part(*map(np.asarray, part)) for part in network[1:4])
            cell, c = Cell(name, *noise, regime), STRENGTHS["digits"]
            yield cell, seed, Problem(train, network.train_true, test, c, network.head)
            if regime == "memorised":
                yield cell._replace(rows="held-out rows"), seed, Problem(held, network.val_true, test, c)


SETS = {"clinc150": clinc150, "cifar10n": cifar10n, "digits": digits}


def clean_learning(c: float, seed: int) -> Any:
    """CleanLearning at its defaults, around scikit-learn's logistic regression."""
    from cleanlab.classification import CleanLearning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=5000)
    # One process, as a fork beside JAX's threads may hang; the result is the same.
    return CleanLearning(model, seed=seed, cv_n_folds=FOLDS, find_label_issues_kwargs={"n_jobs": 1})


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


def measure(task: Task) -> Draw:
    """One draw of a cell."""
    cell, seed, (rows, true, test, c, head) = task
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
    values = {name: accuracy(found, test) for name, found in readouts.items()}
    cleaned = clean_learning(c, seed).fit(*rows)
    values[CLEANLAB] = 100 * float((cleaned.predict(test.x) == test.y).mean())
    issues = cleaned.get_label_issues()
    trust, trusted = np.asarray(purified.purified.quality.trust), np.asarray(purified.purified.trusted)
    found = {
        "lip_jax": detection(wrong, -trust, ~trusted),
        CLEANLAB: detection(wrong, -issues["label_quality"].to_numpy(), issues["is_label_issue"].to_numpy()),
    }
    values |= {f"{who} {what}": x for who, figures in found.items() for what, x in figures.items()}
    if head is not None:
        values["memorised"] = 100 * float(lip_jax.memorised(head.kernel, *rows, bias=head.bias).memorised)
    return Draw(cell, seed, values | {"wrong": 100 * float(wrong.mean())})


def speed(data: str | None, *_: Any) -> Measured:
    """Time lip_jax, cleanlab and scikit-learn on one core and on all, in a process for each number."""
    counts = sorted({1, len(os.sched_getaffinity(0))})
    cases = [case for cores in counts for case in in_process(cores, cores, time_cases, data)]
    return {"repeats": REPEATS, "cases": cases}


def time_cases(data: str | None) -> list[Measured]:
    """The timings of CLINC150 at 40% symmetric noise and of CIFAR-10N."""
    clinc = next(task for task in clinc150(data, [0]) if task[0].labels == "symmetric 0.4")
    tasks = clinc, next(cifar10n(data, [0]))
    return [{"data": f"{cell.data}, {cell.labels}", **time_case(problem)} for cell, _, problem in tasks]


def objective(rows: Part, kernel, bias, c: float) -> float:
    """`Σ CE + ‖W‖²/(2C)` per row, in double precision."""
    kernel = np.asarray(kernel, np.float64)
    logits = np.asarray(rows.x, np.float64) @ kernel + np.asarray(bias, np.float64)
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(rows.y)), rows.y]
    return float((losses.sum() + (kernel**2).sum() / (2 * c)) / len(rows.y))


def time_case(problem: Problem, repeats: int = REPEATS) -> Measured:
    """Seconds of everything on one set of rows, and what ours and scikit-learn's readouts come to.

    `value` is the ridge that is chosen, or the objective that logistic regression reaches.
    """
    from sklearn.linear_model import LogisticRegression, RidgeClassifierCV

    rows, _, test, c, _ = problem
    l = int(rows.y.max()) + 1
    # Each library gets features as it would have them: JAX arrays as a Flax body leaves them, or NumPy's.
    held = jnp.asarray(rows.x), jnp.asarray(rows.y)
    fit = partial(lip_jax.linear_readout, *held, num_classes=l)
    ours = {
        "purify": partial(lip_jax.purify, *held, num_classes=l),
        "purified readout": partial(lip_jax.purified_readout, *held, num_classes=l, ridge=1 / c),
        "ridge readout": fit,
        "logistic readout": partial(fit, solver="logistic", ridge=1 / c),
    }
    grid = ridge_grid(ridge_factors(*held, None, l, intercept=True), PATH_POINTS)
    theirs = {
        CLEANLAB: clean_learning(c, 0),
        "RidgeClassifierCV": RidgeClassifierCV(alphas=np.asarray(grid, np.float64)),
        "LogisticRegression": LogisticRegression(C=c, max_iter=1000),
    }
    seconds, compilation, found = {}, {}, {}
    for name, call in ours.items():
        found[name], first = timed(call)
        seconds[name] = float(np.median([timed(call)[1] for _ in range(repeats)]))
        compilation[name] = first - seconds[name]
    for name, estimator in theirs.items():
        found[name], seconds[name] = timed(partial(estimator.fit, *rows))
    logistic, regression = (found[name] for name in ("logistic readout", "LogisticRegression"))
    points = {name: accuracy(found[name], test) for name in ("ridge readout", "logistic readout")}
    for name in ("RidgeClassifierCV", "LogisticRegression"):
        points[name] = 100 * float((found[name].predict(test.x) == test.y).mean())
    values = {
        "ridge readout": float(found["ridge readout"].ridge),
        "RidgeClassifierCV": float(found["RidgeClassifierCV"].alpha_),
        "logistic readout": objective(rows, logistic.kernel, logistic.bias, c),
        "LogisticRegression": objective(rows, regression.coef_.T, regression.intercept_, c),
    }
    made = {"cores": len(os.sched_getaffinity(0)), "seconds": seconds, "compilation": compilation}
    return made | {"accuracy": points, "value": values}


def purify_large(n: int, q: int, l: int, rate: float) -> Measured:
    """Purify synthetic rows of many classes, refit, and say what it took."""
    centre_key, row_key, noise_key, test_key = jax.random.split(jax.random.key(0), 4)
    centres = 0.3 * jax.random.normal(centre_key, (l, q))
    feats, true = clustered(row_key, centres, n)
    given = jax.block_until_ready(lip_jax.noise.symmetric(noise_key, true, rate, num_classes=l))
    peaks = {"data": held_bytes("VmHWM")}
    purify = partial(lip_jax.purify, feats, given, num_classes=l)
    purified, first = timed(purify)
    peaks["purify"] = held_bytes("VmHWM")
    seconds = {"purify": timed(purify)[1]}
    refit = partial(lip_jax.linear_readout, feats, given, num_classes=l)
    readout = jax.block_until_ready(refit(weights=purified.weights))
    seconds["its compilation"] = first - seconds["purify"]
    seconds["purified ridge readout"] = timed(lambda: refit(weights=purified.weights))[1]
    trusted, wrong = np.asarray(purified.trusted), np.asarray(given != true)
    test = Part(*clustered(test_key, centres, 2 * l))
    found = detection(wrong, -np.asarray(purified.quality.trust), ~trusted)
    points = {name: found[name] for name in ("recall", "kept", "right among kept")}
    points["test accuracy, purified ridge"] = accuracy(readout, test)
    points["all noisy labels"] = accuracy(refit(), test)
    made = {"n": n, "q": q, "l": l, "rate": rate, "dtype": str(feats.dtype)}
    made |= {"cores": len(os.sched_getaffinity(0))}
    return {**made, "step_seconds": seconds, "peak_bytes": peaks, "points": points}


def large(*_: Any) -> Measured:
    """Many rows of many classes, in a process of its own: time by step, and peak memory."""
    return in_process(len(os.sched_getaffinity(0)), 1, purify_large, **LARGE)


def mean_lead(rows: list[Summary], ours: str, theirs: str) -> float:
    """Mean over the cells of how far one figure is above another."""
    return float(np.mean([row.lead(ours, theirs) for row in rows]))


def compared(rows: list[Summary], claim: str, ours: str, theirs: str) -> Verdict:
    """One figure is at least another on average over the cells; those where it is not are listed."""
    leads = sorted((row.lead(ours, theirs), str(row.cell)) for row in rows)
    below = [f"{cell}: {lead:+.2f}" for lead, cell in leads if lead < 0]
    lead, frozen = mean_lead(rows, ours, theirs), [row for row in rows if row.cell.regime == "frozen"]
    figure = f"{lead:+.2f} points; below in {len(below)} of {len(rows)} cells"
    if frozen:
        figure += f"; {mean_lead(frozen, ours, theirs):+.2f} on the {len(frozen)} of frozen features"
    return Verdict(claim, lead >= 0, figure, below)


def verdicts(record: Record) -> list[Verdict]:
    """Purification beside cleanlab, over the cells of the table."""
    rows = frame.summaries(record, SETS)
    claims = {"purified readout at least CleanLearning on average": ("purified", CLEANLAB)}
    for quantity in ("AUROC", "F1"):
        claim = f"{quantity} of wrong labels at least cleanlab's on average"
        claims[claim] = (f"lip_jax {quantity}", f"{CLEANLAB} {quantity}")
    return [compared(rows, claim, *pair) for claim, pair in claims.items()] if rows else []


def tables(record: Record) -> dict[str, str]:
    """Every figure."""
    named = {"speed": speed_tables, "large": large_tables}
    rows, parts = frame.summaries(record, SETS), {}
    for name, say in named.items():
        parts |= say(record[name]) if name in record else {}
    return parts | (cell_tables(rows) if rows else {})


def cell_tables(rows: list[Summary]) -> dict[str, str]:
    """Test accuracy and detection."""
    cells, detected = [], []
    for row in rows:
        said = f"{row.mean['memorised']:.0f}%" if "memorised" in row.mean else ""
        lead = f"{row.lead('purified', CLEANLAB):+.2f}"
        cells.append((row.cell.head, row.cell.labels, *map(row.at, ACCURACIES), lead, said))
        found = (better(row, quantity) for quantity in DETECTED)
        detected.append((row.cell.head, row.cell.labels, f"{row.mean['wrong']:.1f}", *found))
    return {"accuracy": frame.rows_of(cells), "detection": frame.rows_of(detected)}


def better(row: Summary, quantity: str) -> str:
    """Ours and theirs, the better in bold."""
    values = [round(row.mean[f"{name} {quantity}"], 1) for name in DETECTORS]
    best = max(values) if quantity != "kept" and values[0] != values[1] else None
    return " / ".join(f"**{value:.1f}**" if value == best else f"{value:.1f}" for value in values)


def speed_tables(held: Measured) -> dict[str, str]:
    """Beside CleanLearning, also with each on the cores that suit it best, and beside scikit-learn."""
    beside, pairs = [], []
    for data, cases in frame.grouped(held["cases"], lambda case: case["data"]).items():
        fastest = {name: min(case["seconds"][name] for case in cases) for name in cases[0]["seconds"]}
        best = {"cores": "best of each", "seconds": fastest, "compilation": {}}
        for case in (*cases, best):
            spent = case["seconds"]
            seconds = (f"{spent[name]:.3g}" for name in (*TIMED, CLEANLAB))
            times = ", ".join(f"{spent[CLEANLAB] / spent[name]:.1f}" for name in TIMED)
            compilation = case["compilation"]
            compiled = ", ".join(f"{compilation[name]:.1f}" for name in TIMED if name in compilation)
            beside.append((data, case["cores"], *seconds, times, compiled))
    for case in held["cases"]:
        for what, *both in SCIKIT_LEARN:
            ours, theirs = (case["seconds"][name] for name in both)
            reached = " / ".join(f"{case['accuracy'][name]:.2f}" for name in both)
            value = " / ".join(f"{case['value'][name]:.6g}" for name in both)
            spent = f"{ours:.3g}", f"{theirs:.3g}", f"{theirs / ours:.1f}"
            pairs.append((case["data"], case["cores"], what, *spent, reached, value))
    repeats = str(held["repeats"])
    return {"speed": frame.rows_of(beside), "scikit_learn": frame.rows_of(pairs), "repeats": repeats}


def large_tables(held: Measured) -> dict[str, str]:
    """Time, memory and detection."""
    said = lambda part, unit: ", ".join(f"{name} {x / unit:.2f}" for name, x in held[part].items())
    text = (
        f"n = {held['n']:,}, q = {held['q']}, l = {held['l']:,}: clustered {held['dtype']} features, "
        f"{held['rate']:.0%} symmetric noise, {held['cores']} cores, one thread of OpenBLAS. Seconds: "
        f"{said('step_seconds', 1)}. Peak resident memory in GiB, after: {said('peak_bytes', 2**30)}."
    )
    return {"large": text, "points": frame.rows_of((name, f"{x:.2f}") for name, x in held["points"].items())}


SECTIONS = {name: frame.section(name, SETS[name], SEEDS[name], measure) for name in SETS}
SECTIONS |= {"speed": speed, "large": large}
PACKAGES = ("cleanlab", "scikit-learn", "scipy")
GROUPS = {"table": tuple(SETS)}
BENCHMARK = Benchmark("purification", SECTIONS, verdicts, tables, groups=GROUPS, packages=PACKAGES)

if __name__ == "__main__":
    BENCHMARK.run()
