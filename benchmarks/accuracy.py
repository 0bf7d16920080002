"""Accuracy of repaired heads under label noise, in every cell of data set, noise, regime and loss.

    python -m benchmarks.accuracy --data DIR

A cell is repeated over seeds. In each draw one head is trained on noisy labels, candidates are fitted and
chosen with labels that carry the same noise, and everything is scored on clean test labels, which choose
nothing but the column `best`, the best family in hindsight. Training settings were fixed before the first
table and are the same at all noise rates.
"""

import time
import warnings
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
from benchmarks import accuracy_report as report
from benchmarks.accuracy_report import Cell, Draw
from benchmarks.cifar import load_cifar
from benchmarks.data import load_cifar10n, load_clinc150, load_digits, load_partial
from benchmarks.heads import train_overfitted, train_regularised
from benchmarks.networks import CNN, MLP, ResNet, head_inputs, train_networks, train_resnet
from lip_jax import Head
from lip_jax.numerics.linalg import logits_of
from lip_jax.rows.metrics import correct
from lip_jax.sums.ridge import ridge_factors, ridge_solution

Noise = tuple[str, float]

NOISES: tuple[Noise, ...] = (
    *(("symmetric", rate) for rate in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6)),
    *((kind, rate) for kind in ("asymmetric", "instance") for rate in (0.2, 0.4)),
)
# Where a regime or a loss is a variation of another.
FEWER_NOISES: tuple[Noise, ...] = (
    *(("symmetric", rate) for rate in (0.0, 0.2, 0.4, 0.6)),
    ("asymmetric", 0.4),
    ("instance", 0.4),
)
ROBUST_LOSSES = ("generalised cross-entropy", "label smoothing")
STRENGTHS = {"well regularised": 0.01, "lightly regularised": 0.1}  # C of logistic regression
PARTIAL_RIDGES = {"well regularised": 0.1, "lightly regularised": 0.001}  # λ/n
DIGITS_EPOCHS = {"early-stopped": 10, "memorised": 100}
CIFAR_EPOCHS = {"early-stopped": 10, "memorised": 100}


class Part(NamedTuple):
    """Inputs of the head, and class ids or targets."""

    x: Any
    y: Any


class Problem(NamedTuple):
    """A trained head and the rows to fit on, to choose by, and to score on; test labels are clean ids."""

    head: Head
    fit: Part
    validation: Part
    test: Part


Task = tuple[Cell, int, Problem]


def corrupt(noise: Noise, seed: int, parts: list[Part], num_classes: int) -> list[jax.Array]:
    """Noisy labels of several parts, drawn at once so that they share one noise model.

    One key for all rates: labels wrong at a lower rate are wrong at the higher ones too.
    """
    kind, rate = noise
    key = jax.random.key(seed)
    labels = jnp.concatenate([jnp.asarray(part.y) for part in parts])
    if kind == "symmetric":
        noisy = lip_jax.noise.symmetric(key, labels, rate, num_classes=num_classes)
    elif kind == "asymmetric":
        noisy = lip_jax.noise.asymmetric(key, labels, rate, num_classes=num_classes)
    else:
        flat = [jnp.asarray(part.x).reshape(part.x.shape[0], -1) for part in parts]
        noisy = lip_jax.noise.instance(key, jnp.concatenate(flat), labels, rate, num_classes=num_classes)
    ends = np.cumsum([part.y.shape[0] for part in parts])
    return [noisy[end - part.y.shape[0] : end] for part, end in zip(parts, ends, strict=True)]


def head_of(params: Any) -> Head:
    """The head of a network whose last layer is called `head`."""
    head = params["params"]["head"]
    return Head(head["kernel"], head["bias"])


def train_head(regime: str, loss: str, seed: int, rows: Part, num_classes: int) -> Head:
    """A softmax head on given features."""
    if regime == "overfitted":
        key = jax.random.key(seed)
        return head_of(train_overfitted(key, rows.x, rows.y, num_classes=num_classes, loss=loss))
    # By 60 steps L-BFGS has converged at either strength: 200 give the same accuracies.
    c = STRENGTHS[regime]
    return head_of(train_regularised(rows.x, rows.y, num_classes=num_classes, c=c, steps=60))


def clinc150(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Heads on sentence embeddings; the 3,000 validation rows carry the noise of the training rows."""
    held = load_clinc150(data)
    train, val = Part(held.train_x, held.train_y), Part(held.val_x, held.val_y)
    test = Part(held.test_x, held.test_y)
    settings = [
        ("well regularised", "cross-entropy", NOISES),
        ("lightly regularised", "cross-entropy", FEWER_NOISES),
        ("overfitted", "cross-entropy", NOISES),
        *(("overfitted", loss, FEWER_NOISES) for loss in ROBUST_LOSSES),
    ]
    for regime, loss, noises in settings:
        for noise in noises:
            for seed in seeds:
                train_y, val_y = corrupt(noise, seed, [train, val], 150)
                rows, validation = train._replace(y=train_y), val._replace(y=val_y)
                head = train_head(regime, loss, seed, rows, 150)
                cell = Cell("CLINC150", *noise, regime, loss, "training")
                yield cell, seed, Problem(head, rows, validation, test)


def fitting_rows(train: Part, val: Part, regime: str) -> Iterator[tuple[str, Part, Part]]:
    """Which rows fit and which validate: for a body that memorised its rows also the halves of the rest."""
    yield "training", train, val
    if regime == "memorised":
        half = val.x.shape[0] // 2
        first, second = (Part(val.x[part], val.y[part]) for part in (slice(half), slice(half, None)))
        yield "held-out", first, second


def digits(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Networks on the digits of scikit-learn, a split, a noise and a start of their own for each seed."""
    del data  # comes with scikit-learn
    settings = [
        ("digits MLP", MLP(10), "cross-entropy", NOISES),
        *(("digits MLP", MLP(10), loss, FEWER_NOISES) for loss in ROBUST_LOSSES),
        ("digits CNN", CNN(10), "cross-entropy", NOISES),
    ]
    seeds = list(seeds)
    splits = [load_digits(seed) for seed in seeds]
    clean = [(Part(split.train_x, split.train_y), Part(split.val_x, split.val_y)) for split in splits]
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    for name, model, loss, noises in settings:
        capture = jax.jit(jax.vmap(partial(head_inputs, model)))
        for noise in noises:
            noisy = [corrupt(noise, seed, list(parts), 10) for seed, parts in zip(seeds, clean, strict=True)]
            train_y, val_y = (jnp.stack(labels) for labels in zip(*noisy, strict=True))
            train_x, val_x, test_x = (
                jnp.stack([getattr(split, part) for split in splits])
                for part in ("train_x", "val_x", "test_x")
            )
            epochs = tuple(DIGITS_EPOCHS.values())
            snapshots = train_networks(keys, train_x, train_y, model=model, epochs=epochs, loss=loss)
            for regime, params in zip(DIGITS_EPOCHS, snapshots, strict=True):
                train = Part(capture(params, train_x), train_y)
                val = Part(capture(params, val_x), val_y)
                test_feats = capture(params, test_x)
                for i, seed in enumerate(seeds):
                    head = head_of(jax.tree.map(lambda leaf, i=i: leaf[i], params))
                    mine = Part(train.x[i], train.y[i]), Part(val.x[i], val.y[i])
                    test = Part(test_feats[i], splits[i].test_y)
                    for rows, fit, validation in fitting_rows(*mine, regime):
                        cell = Cell(name, noise[0], noise[1], regime, loss, rows)
                        yield cell, seed, Problem(head, fit, validation, test)


def cifar10n(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Human label errors: the head that came with the features, and heads trained on 45,000 of the rows.

    The body has seen all 50,000 rows with these labels. So has the given head, also the 5,000 that validate.
    """
    held = load_cifar10n(data)
    test = Part(held.test_x, held.test_y)
    settings = [
        *((regime, "cross-entropy") for regime in (*STRENGTHS, "overfitted")),
        *(("overfitted", loss) for loss in ROBUST_LOSSES),
    ]
    for seed in seeds:
        # Rows come ordered by class.
        order = np.random.default_rng(seed).permutation(held.train_y.shape[0])
        rows, validation = (Part(held.train_x[part], held.train_y[part]) for part in np.split(order, [45000]))
        given = Head(jnp.asarray(held.kernel), jnp.asarray(held.bias))
        cell = Cell("CIFAR-10N", "human", 0.402, "given head", "cross-entropy", "training")
        yield cell, seed, Problem(given, rows, validation, test)
        for regime, loss in settings:
            head = train_head(regime, loss, seed, rows, 10)
            yield cell._replace(regime=regime, loss=loss), seed, Problem(head, rows, validation, test)


def partial_labels(data: str | None, seeds: Iterable[int]) -> Iterator[Task]:
    """Ridge heads on real candidate sets, split 60 / 20 / 20; the sets are the targets throughout."""
    for name in ("lost", "MSRCv2"):
        held = load_partial(name, data)
        n = held.feats.shape[0]
        targets = np.asarray(lip_jax.candidate_targets(held.candidates))
        false_share = 1 - float(targets[np.arange(n), held.labels].mean())
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(n)
            train, val, test = np.split(order, [3 * n // 5, 4 * n // 5])
            rows, validation = (Part(held.feats[part], targets[part]) for part in (train, val))
            path = ridge_factors(rows.x, rows.y, None, targets.shape[1], intercept=True)
            for regime, share in PARTIAL_RIDGES.items():
                head = Head(*ridge_solution(path, jnp.float32(share * len(train))))
                cell = Cell(name, "partial", false_share, regime, "squared error", "training")
                yield cell, seed, Problem(head, rows, validation, Part(held.feats[test], held.labels[test]))


def cifar(
    folder: Path,
    seeds: Iterable[int],
    *,
    model: ResNet | None = None,
    epochs: dict[str, int] = CIFAR_EPOCHS,
    noises: Iterable[Noise] = NOISES,
    batch_size: int = 128,
) -> Iterator[Task]:
    """ResNet-34s trained on nine tenths of CIFAR-10 or CIFAR-100; the tenth validates."""
    held = load_cifar(folder)
    num_classes = int(held.train_y.max()) + 1
    model = model or ResNet(num_classes)
    for noise in noises:
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(held.train_y.shape[0])
            train, val = (
                Part(held.train_x[part], held.train_y[part])
                for part in np.split(order, [9 * order.shape[0] // 10])
            )
            train_y, val_y = corrupt(noise, seed, [train, val], num_classes)
            for regime, length in epochs.items():
                key, options = jax.random.key(seed), {"epochs": length, "batch_size": batch_size}
                variables = train_resnet(key, jnp.asarray(train.x), train_y, model=model, **options)
                capture = partial(head_inputs, model, variables)
                mine = Part(capture(train.x), train_y), Part(capture(val.x), val_y)
                test = Part(capture(held.test_x), held.test_y)
                for rows, fit, validation in fitting_rows(*mine, regime):
                    cell = Cell(f"CIFAR-{num_classes}", *noise, regime, "cross-entropy", rows)
                    yield cell, seed, Problem(head_of(variables), fit, validation, test)


SETS = {"digits": digits, "clinc150": clinc150, "cifar10n": cifar10n, "partial": partial_labels}
ALL_SETS = ",".join(SETS)
FAMILIES = ("published", "calibrated", "ridge", "purified")
READOUTS = FAMILIES[2:]
SEEDS = {"digits": 10, "clinc150": 3, "cifar10n": 3, "partial": 10, "cifar10": 3, "cifar100": 3}


def default_head(problem: Problem) -> Head:
    """What `lip_jax.apply` makes of the head without any validation rows."""
    params = {"head": problem.head._asdict()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the head agrees with these labels", UserWarning)
        repaired = lip_jax.apply(params, *problem.fit, head="head", families=FAMILIES)
    return Head(**repaired["head"])


def choose(problem: Problem) -> tuple[dict[str, Head], str]:
    """Every head of the table's columns, and the family of the automatic choice."""
    head, fit, validation, _ = problem
    chosen = lip_jax.select(*head, *fit, validation=validation, families=FAMILIES)
    families = chosen.report.families
    lip = chosen
    if families[int(chosen.report.winner)] in READOUTS:
        # Otherwise no readout was in the way, and LIP alone comes to much the same.
        lip = lip_jax.select(*head, *fit, validation=validation, families=FAMILIES[:2])
    r = min(head.kernel.shape)
    heads = {
        "base": head,
        "published at 3r/4": Head(lip_jax.refine(head.kernel, *fit, rank=3 * r // 4), head.bias),
        **dict(zip(families[1:], chosen.candidates[1:], strict=True)),
        "choice": Head(chosen.kernel, chosen.bias),
        "LIP choice": Head(lip.kernel, lip.bias),
        "default": default_head(problem),
    }
    return heads, families[int(chosen.report.chosen)]


@jax.jit
def score(heads: list[Head], test: Part) -> tuple[jax.Array, jax.Array]:
    """Of each head: which test rows it gets right `(h, n)`, and its log-loss `(h,)`."""

    def one(head):
        logits = jnp.matmul(test.x, head.kernel, precision=jax.lax.Precision.HIGHEST) + head.bias[None, :]
        log_loss = lip_jax.head_metrics(logits, test.y).log_loss
        return jnp.argmax(logits, axis=1) == test.y, log_loss

    return jax.lax.map(one, jax.tree.map(lambda *leaves: jnp.stack(leaves), *heads))


def paired(better: np.ndarray, worse: np.ndarray) -> tuple[float, float]:
    """Mean difference of two rows of correct in points, and its standard error."""
    difference = 100 * (better.astype(float) - worse)
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def can_be_shown(head: Head, problem: Problem) -> bool:
    """Whether a head beats the base by 3 standard errors on all validation rows, also those that chose it.

    A rule that asks for as much and tests on fewer rows takes the head less often, but for luck.
    """
    x, y = map(jnp.asarray, problem.validation)
    right, base = (np.asarray(correct(logits_of(x, *head), y)) for head in (head, problem.head))
    gain = right - base
    # As in `lip_jax.select`, with one disagreement more than there were.
    return bool(gain.sum() > 3 * np.sqrt(((gain - gain.mean()) ** 2).sum() + 1))


def measure(task: Task) -> Draw:
    """One draw of a cell, in points of test accuracy."""
    cell, seed, problem = task
    heads, family = choose(problem)
    test = Part(*map(jnp.asarray, problem.test))
    right, losses = (np.asarray(part) for part in score(list(heads.values()), test))
    hit = dict(zip(heads, right, strict=True))
    log_loss = dict(zip(heads, losses, strict=True))
    best = max(("base", *FAMILIES), key=lambda name: hit[name].mean())
    gain, gain_error = paired(hit["choice"], hit["base"])
    regret, regret_error = paired(hit[best], hit["choice"])
    values = {name: 100 * float(row.mean()) for name, row in hit.items()}
    shown = best == "base" or can_be_shown(heads[best], problem)
    values |= {
        "best": values[best],
        "gain": gain,
        "gain error": gain_error,
        "regret": regret,
        "regret error": regret_error,
        "least regret": 0.0 if shown else values[best] - values["base"],
        "published gain": values["published"] - values["base"],
        "LIP gain": values["LIP choice"] - values["base"],
        "default gain": values["default"] - values["base"],
        "log-loss base": float(log_loss["base"]),
        "log-loss choice": float(log_loss["choice"]),
    }
    return Draw(cell, seed, values, family)


def main(
    data: Annotated[str | None, typer.Option(help="Data folder; default: LIP_JAX_DATA.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
    only: Annotated[str, typer.Option(help="Which sets to measure; others keep their tables.")] = ALL_SETS,
    seeds: Annotated[int | None, typer.Option(help="Seeds per cell; default: 3, on small sets 10.")] = None,
    cifar10: Annotated[Path | None, typer.Option(help="CIFAR-10, python version, unpacked.")] = None,
    cifar100: Annotated[Path | None, typer.Option(help="CIFAR-100, python version, unpacked.")] = None,
) -> None:
    """Measure the cells, judge them, and write accuracy_*.csv, accuracy.json, .md and .png."""
    out.mkdir(parents=True, exist_ok=True)
    folders = {"cifar10": cifar10, "cifar100": cifar100}
    wanted = [name for name in only.split(",") if name] + [name for name, path in folders.items() if path]
    unknown = sorted(set(wanted) - set(SEEDS))
    if unknown:
        raise typer.BadParameter(f"--only names {unknown}; there are {sorted(SETS)}.")
    for path in out.glob("accuracy_*.csv"):
        if path.stem.removeprefix("accuracy_") not in wanted:
            report.read_csv(path)  # rather now than when all is measured
    seconds: dict[str, int] = {}
    for name in wanted:
        start, count = time.perf_counter(), range(seeds or SEEDS[name])
        folder = folders.get(name)
        tasks = SETS[name](data, count) if folder is None else cifar(folder, count)
        draws = [measure(task) for task in track(tasks, name)]
        report.write_csv(report.summarise(draws), out / f"accuracy_{name}.csv")
        seconds[name] = round(time.perf_counter() - start)
    summaries = [row for path in sorted(out.glob("accuracy_*.csv")) for row in report.read_csv(path)]
    report.write_all(summaries, seconds, out, Console(width=160))


if __name__ == "__main__":
    typer.run(main)
