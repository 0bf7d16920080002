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
from matplotlib.figure import Figure

import lip_jax
from benchmarks import frame
from benchmarks.data import Noise, Part, corrupt, load_cifar10n, load_clinc150
from benchmarks.frame import Benchmark, Cell, Draw, Measured, Record, Summary, Verdict
from benchmarks.networks import CNN, DIGITS_EPOCHS, MLP, Network, digit_networks
from benchmarks.timing import clustered, in_process, peak_bytes, timed
from lip_jax.plot import COLORS
from lip_jax.sums.ridge import PATH_POINTS, ridge_factors, ridge_grid

CLINC_NOISES: tuple[Noise, ...] = (
    *(("symmetric", rate) for rate in (0.1, 0.2, 0.4, 0.6)),
    *(("asymmetric", rate) for rate in (0.2, 0.4)),
)
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
# Share of draws in which `lip_jax.memorised` says yes, by leave-one-out scores and by held-out rows.
MEMORISED = ("memorised", "memorised by held-out rows")
MOST_BELOW = 0.5
SPEEDUPS = {"purified readout": ("tenth", 10), "purify": ("fiftieth", 50)}
MEMORY_LIMIT = 2**32
# What they choose or reach, and who does it, here and there.
SCIKIT_LEARN = (
    ("ridge", "ridge readout", "RidgeClassifierCV"),
    ("objective", "logistic readout", "LogisticRegression"),
)


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
    train, _, test = load_clinc150(data).parts
    for noise in CLINC_NOISES:
        for seed in seeds:
            rows = train._replace(y=np.asarray(corrupt(noise, seed, [train], 150)[0]))
            yield (
                Cell("CLINC150", *noise, "frozen"),
                seed,
                Problem(rows, train.y, test, STRENGTHS["clinc150"]),
            )


def cifar10n(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Human label errors, on 45,000 of the rows, which come ordered by class."""
    (x, y), test, _, true = load_cifar10n(data)
    for seed in seeds:
        drawn = np.random.default_rng(seed).permutation(len(y))[:45000]
        problem = Problem(Part(x[drawn], y[drawn]), true[drawn], test, STRENGTHS["cifar10n"])
        yield Cell("CIFAR-10N", "human", 0.402, "frozen"), seed, problem


def digits(
    data: str | None,
    seeds: Iterable[int],
    *,
    noises: Iterable[Noise] = DIGITS_NOISES,
    epochs: dict[str, int] = DIGITS_EPOCHS,
) -> Iterator[Task]:
    """Features of networks trained on the noisy labels; of those that memorised also the held-out rows."""
    del data  # comes with scikit-learn
    models = ("digits MLP", MLP(10)), ("digits CNN", CNN(10))
    for (name, model), noise in ((model, noise) for model in models for noise in noises):
        for regime, seed, network in digit_networks(model, noise, seeds, epochs=epochs):
            train, held, test = (Part(*map(np.asarray, part)) for part in network[1:4])
            cell, c = Cell(name, *noise, regime), STRENGTHS["digits"]
            yield cell, seed, Problem(train, network.train_true, test, c, network)
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


def accuracy(readout: Any, test: Part) -> float:
    """Test accuracy in points."""
    logits = np.asarray(test.x) @ np.asarray(readout.kernel) + np.asarray(readout.bias)
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
    (kernel, bias), train, held, *_ = network
    said = [lip_jax.memorised(kernel, *train, bias=bias, validation=rows) for rows in (None, held)]
    return {name: 100 * float(found.memorised) for name, found in zip(MEMORISED, said, strict=True)}


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
    return Draw(cell, seed, values | {"wrong": 100 * float(wrong.mean())} | memorisation(network))


def speed(data: str | None, seeds: int | None) -> Measured:
    """Time lip_jax, cleanlab and scikit-learn on one core and on all, each alone in a process."""
    del seeds
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
    top = logits.max(axis=1)
    losses = top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - logits[np.arange(len(rows.y)), rows.y]
    return float((losses.sum() + (kernel**2).sum() / (2 * c)) / len(rows.y))


def time_case(problem: Problem, repeats: int = REPEATS) -> Measured:
    """Seconds of everything on one set of rows, and how good what came out is."""
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
    seconds, compilation, results = {}, {}, {}
    copying = float(np.median([timed(lambda: jnp.array(rows.x))[1] for _ in range(repeats)]))
    for name, call in ours.items():
        results[name], first = timed(call)
        seconds[name] = float(np.median([timed(call)[1] for _ in range(repeats)]))
        compilation[name] = first - seconds[name]
    for name, estimator in theirs.items():
        results[name], seconds[name] = timed(partial(estimator.fit, *rows))
    purified, ridge, logistic = (
        results["purified readout"].readout,
        *(results[name] for name in list(ours)[2:]),
    )
    named = {"purified readout": purified, "ridge readout": ridge, "logistic readout": logistic}
    points = {name: accuracy(found, test) for name, found in named.items()}
    points |= {name: 100 * float((results[name].predict(test.x) == test.y).mean()) for name in theirs}
    regression = results["LogisticRegression"]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "openblas_threads": int(os.environ["OPENBLAS_NUM_THREADS"]),
        "seconds": seconds,
        "compilation": compilation,
        "copying": copying,
        "accuracy": points,
        "objective": {
            "logistic readout": objective(rows, logistic.kernel, logistic.bias, c),
            "LogisticRegression": objective(rows, regression.coef_.T, regression.intercept_, c),
        },
        "ridge": {
            "ridge readout": float(ridge.ridge),
            "RidgeClassifierCV": float(results["RidgeClassifierCV"].alpha_),
        },
        "steps": {
            "purified readout": int(purified.steps),
            "logistic readout": int(logistic.steps),
            "LogisticRegression": int(regression.n_iter_.max()),
        },
    }


# What each step of `label_quality` adds to its result: asked only for these, XLA leaves out all later steps.
STEPS = {
    "sums, eigendecomposition, GCV": ("ridge",),
    "first leave-one-out pass": ("given", "margin", "num_above"),
    "structure, sharpness": ("sharpness",),
    "second leave-one-out pass": ("trust", "suggested", "noise_rate", "transition"),
}


def step_seconds(feats, labels, l: int) -> dict[str, float]:
    """How much longer `label_quality` takes for each step that its result needs."""

    @partial(jax.jit, static_argnames="fields")
    def part(feats, labels, fields):
        quality = lip_jax.label_quality(feats, labels, num_classes=l)
        return [getattr(quality, field) for field in fields]

    seconds, before, fields = {}, 0.0, ()
    for name, added in STEPS.items():
        fields += added
        _, until = timed(partial(part.lower(feats, labels, fields).compile(), feats, labels))
        seconds[name], before = until - before, until
    return seconds


def purify_large(n: int, q: int, l: int, rate: float) -> Measured:
    """Purify synthetic rows of many classes, refit, and say what it took."""
    peaks = {"imports": peak_bytes()}
    centre_key, row_key, noise_key, test_key = jax.random.split(jax.random.key(0), 4)
    centres = 0.3 * jax.random.normal(centre_key, (l, q))
    feats, true = clustered(row_key, centres, n)
    given = lip_jax.noise.symmetric(noise_key, true, rate, num_classes=l)
    jax.block_until_ready((feats, given))
    peaks["data"] = peak_bytes()
    purify = partial(lip_jax.purify, feats, given, num_classes=l)
    refit = partial(lip_jax.linear_readout, feats, given, num_classes=l)
    purified, first = timed(purify)
    peaks["purify"] = peak_bytes()
    _, again = timed(purify)
    readout = jax.block_until_ready(refit(weights=purified.weights))
    peaks["purified ridge readout"] = peak_bytes()
    gram = feats[: 2 * q].T @ feats[: 2 * q]
    jax.block_until_ready(jnp.linalg.eigh(gram))
    seconds = {
        "purify": again,
        "its compilation": first - again,
        **step_seconds(feats, given, l),
        "eigendecomposition alone": timed(lambda: jnp.linalg.eigh(gram))[1],
        "rule, given the quality": timed(lambda: purify(quality=purified.quality))[1],
        "purified ridge readout": timed(lambda: refit(weights=purified.weights))[1],
    }
    trusted, wrong = np.asarray(purified.trusted), np.asarray(given != true)
    test = Part(*clustered(test_key, centres, 2 * l))
    points = {
        "rows trusted": trusted.mean(),
        "right among the trusted": (~wrong[trusted]).mean(),
        "trusted among the right": trusted[~wrong].mean(),
        "wrong found (recall)": (~trusted[wrong]).mean(),
    }
    points = {name: 100 * float(share) for name, share in points.items()}
    points |= {
        "test accuracy, purified ridge": accuracy(readout, test),
        "all noisy labels": accuracy(refit(), test),
    }
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


def never_far_below(rows: list[Summary]) -> Verdict:
    """The purified readout is at most half a point below CleanLearning, in every cell."""
    leads = {str(row.cell): row.lead("purified", CLEANLAB) for row in rows}
    missed = [f"{cell}: {lead:+.2f}" for cell, lead in leads.items() if lead < -MOST_BELOW]
    worst = min(leads, key=lambda cell: leads[cell])
    claim = f"on frozen features nowhere more than {MOST_BELOW} points below CleanLearning"
    return Verdict(claim, not missed, f"lowest {leads[worst]:+.2f} ({worst}), {len(rows)} cells", missed)


def recognised(rows: list[Summary], regime: str, said: bool) -> Verdict:
    """`lip_jax.memorised` with held-out rows says in every draw whether the body memorised."""
    alone, held = MEMORISED
    rows = [row for row in rows if row.cell.regime == regime and held in row.mean]
    right = lambda share: share if said else 100 - share
    missed = [
        f"{row.cell}: {right(row.mean[held]):.0f}% of draws" for row in rows if right(row.mean[held]) < 100
    ]
    draws = sum(row.draws for row in rows)
    by = {name: sum(right(row.mean[name]) * row.draws for row in rows) / max(draws, 1) for name in MEMORISED}
    figure = f"{by[held]:.1f}% of {draws} draws; by leave-one-out scores alone {by[alone]:.1f}%"
    verb = "recognised" if said else "not taken for memorised"
    return Verdict(f"{regime} networks are {verb}, with held-out rows", not missed, figure, missed)


def times_as_long(case: Measured, name: str) -> float:
    """How many times as long as a call of ours CleanLearning takes."""
    return case["seconds"][CLEANLAB] / case["seconds"][name]


def speed_verdict(cases: list[Measured], name: str) -> Verdict:
    """CleanLearning takes at least so many times as long, in every case.

    More threads may slow it down, so the figure also says how it does with the cores that suit each best.
    """
    share, least = SPEEDUPS[name]
    ratios = {f"{case['data']}, {case['cores']} cores": times_as_long(case, name) for case in cases}
    slow = [f"{case}: {ratio:.1f} times" for case, ratio in ratios.items() if ratio < least]
    figure = ", ".join(f"{ratio:.1f} ({case})" for case, ratio in ratios.items())
    fastest = {
        data: min(case["seconds"][CLEANLAB] for case in held) / min(case["seconds"][name] for case in held)
        for data, held in frame.grouped(cases, lambda case: case["data"]).items()
    }
    best = ", ".join(f"{ratio:.1f} ({data})" for data, ratio in fastest.items())
    claim = f"{name} in at most a {share} of CleanLearning's time"
    return Verdict(claim, not slow, f"times: {figure}; each at its fastest: {best}", slow)


def verdicts(record: Record) -> list[Verdict]:
    """Every claim that what was measured can judge."""
    rows, found = frame.summaries(record, SETS), []
    if rows:
        claim = "purified readout at least CleanLearning on average"
        found.append(compared(rows, claim, "purified", CLEANLAB))
    if frozen := [row for row in rows if row.cell.regime == "frozen"]:
        found.append(never_far_below(frozen))
    for quantity in ("AUROC", "F1") if rows else ():
        claim = f"{quantity} of wrong labels at least cleanlab's on average"
        found.append(compared(rows, claim, f"lip_jax {quantity}", f"{CLEANLAB} {quantity}"))
    for regime, said in (("memorised", True), ("early-stopped", False)):
        if any(row.cell.regime == regime for row in rows):
            found.append(recognised(rows, regime, said))
    if "speed" in record:
        found += [speed_verdict(record["speed"]["cases"], name) for name in SPEEDUPS]
    if "large" in record:
        held = record["large"]
        peak = held["peak_bytes"]["purify"]
        figure = f"peak {peak / 2**30:.2f} GiB, {held['step_seconds']['purify']:.0f} s"
        claim = f"purify of n = {held['n']:,}, q = {held['q']}, l = {held['l']:,} within 4 GiB"
        found.append(Verdict(claim, peak <= MEMORY_LIMIT, figure, [] if peak <= MEMORY_LIMIT else [figure]))
    return found


def tables(record: Record) -> dict[str, str]:
    """Every figure."""
    named = {"speed": speed_tables, "large": large_tables}
    rows, parts = frame.summaries(record, SETS), {}
    for name, say in named.items():
        parts |= say(record[name]) if name in record else {}
    return parts | (cell_tables(rows) if rows else {})


def cell_tables(rows: list[Summary]) -> dict[str, str]:
    """Test accuracy and detection, by cell and by kind of data and body."""
    cells, kinds, detected = [], [], []
    for row in rows:
        said = " / ".join(f"{row.mean[name]:.0f}%" for name in MEMORISED if name in row.mean)
        lead = f"{row.lead('purified', CLEANLAB):+.2f}"
        cells.append((row.cell.head, row.cell.labels, *map(row.at, ACCURACIES), lead, said))
        found = (better(row, quantity) for quantity in DETECTED)
        detected.append((row.cell.head, row.cell.labels, f"{row.mean['wrong']:.1f}", *found))
    for kind, held in [*frame.grouped(rows, lambda row: row.cell.head).items(), ("all", rows)]:
        means = [np.mean([row.mean[name] for row in held]) for name in ACCURACIES]
        lead = f"{mean_lead(held, 'purified', CLEANLAB):+.2f}"
        kinds.append((kind, len(held), *(f"{mean:.2f}" for mean in means), lead))
    listed = {"accuracy": cells, "kinds": kinds, "detection": detected}
    return {name: frame.rows_of(held) for name, held in listed.items()}


def better(row: Summary, quantity: str) -> str:
    """Ours and theirs, the better in bold."""
    values = [round(row.mean[f"{name} {quantity}"], 1) for name in DETECTORS]
    best = max(values) if quantity != "kept" and values[0] != values[1] else None
    return " / ".join(f"**{value:.1f}**" if value == best else f"{value:.1f}" for value in values)


def speed_tables(held: Measured) -> dict[str, str]:
    """Beside CleanLearning, and beside scikit-learn."""
    ours, beside, pairs = tuple(SPEEDUPS), [], []
    for case in held["cases"]:
        where, spent = (case["data"], case["cores"]), case["seconds"]
        times = ", ".join(f"{times_as_long(case, name):.1f}" for name in ours)
        compiled = ", ".join(f"{case['compilation'][name]:.1f}" for name in ours)
        seconds = (f"{spent[name]:.3g}" for name in (*ours, CLEANLAB))
        beside.append((*where, *seconds, times, compiled, f"{case['copying']:.3g}"))
        for what, *both in SCIKIT_LEARN:
            seconds, ratio = (f"{spent[name]:.3g}" for name in both), spent[both[1]] / spent[both[0]]
            reached = " / ".join(f"{case['accuracy'][name]:.2f}" for name in both)
            value = " / ".join(f"{case[what][name]:.6g}" for name in both)
            pairs.append((*where, what, *seconds, f"{ratio:.1f}", reached, value))
    repeats = str(held["repeats"])
    return {"speed": frame.rows_of(beside), "scikit_learn": frame.rows_of(pairs), "repeats": repeats}


def large_tables(held: Measured) -> dict[str, str]:
    """Time by step, memory and detection."""
    memory = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in held["peak_bytes"].items())
    text = (
        f"n = {held['n']:,}, q = {held['q']}, l = {held['l']:,}: clustered {held['dtype']} features, "
        f"{held['rate']:.0%} symmetric noise, {held['cores']} cores, one thread of OpenBLAS. Peak resident "
        f"memory in GiB, after: {memory}."
    )
    figures = lambda part: frame.rows_of((name, f"{x:.2f}") for name, x in held[part].items())
    return {"large": text, "steps": figures("step_seconds"), "points": figures("points")}


# Gains that are drawn; the last two also find wrong labels.
STYLES = {
    "oracle": ("truly clean rows", COLORS[6], "|", 60.0),
    "purified ridge": ("purified, ridge", COLORS[2], "^", 20.0),
    CLEANLAB: (CLEANLAB, COLORS[1], "s", 22.0),
    "purified": ("purified (logistic)", COLORS[0], "o", 20.0),
}


def draw(record: Record) -> Figure | None:
    """Every cell: gain in test accuracy over all noisy labels, and how well wrong labels are found."""
    rows = frame.summaries(record, SETS)
    figure = Figure(layout="constrained", dpi=80)
    gain_ax, *others = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    count = frame.draw_cells(gain_ax, rows, STYLES, lambda row, name: row.lead(name, "noisy"))
    gain_ax.axvline(0, color="0.4", linewidth=0.8)
    gain_ax.set_xlabel("gain over the fit to all noisy labels, points of test accuracy", fontsize=8)
    styles = {CLEANLAB: STYLES[CLEANLAB], "lip_jax": STYLES["purified"]}
    for quantity, ax in zip(("AUROC", "F1"), others, strict=True):
        value = lambda row, name, quantity=quantity: row.mean[f"{name} {quantity}"]
        frame.draw_cells(ax, rows, styles, value, DETECTORS, named=False)
        ax.set_xlabel(f"{quantity} of wrong labels", fontsize=8)
    gain_ax.set_ylim(count - 0.4, -0.6)
    figure.set_size_inches(11, 1.6 + 0.2 * count)
    figure.legend(*gain_ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    return figure if rows else None


SECTIONS = {name: frame.section(name, SETS[name], SEEDS[name], measure) for name in SETS}
SECTIONS |= {"speed": speed, "large": large}
PACKAGES = ("cleanlab", "scikit-learn", "scipy")
GROUPS = {"table": tuple(SETS)}
BENCHMARK = Benchmark("purification", SECTIONS, verdicts, tables, draw, GROUPS, PACKAGES)

if __name__ == "__main__":
    BENCHMARK.run()
