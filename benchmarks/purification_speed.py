"""Time and memory of purification, beside cleanlab and scikit-learn where they can do the same."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lip_jax
from benchmarks.accuracy import Part
from benchmarks.timing import clustered, peak_bytes, timed
from lip_jax.sums.ridge import PATH_POINTS, ridge_factors, ridge_grid


def objective(feats, labels, kernel, bias, c: float) -> float:
    """`Σ CE + ‖W‖²/(2C)` per row, in double precision."""
    feats, kernel = np.asarray(feats, np.float64), np.asarray(kernel, np.float64)
    logits = feats @ kernel + np.asarray(bias, np.float64)
    top = logits.max(axis=1)
    losses = top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return float((losses.sum() + (kernel**2).sum() / (2 * c)) / len(labels))


def time_case(
    rows: Part, test: Part, c: float, model: Any, accuracy: Callable, repeats: int
) -> dict[str, Any]:
    """Seconds of everything on one set of rows, and how good what came out is."""
    from sklearn.linear_model import LogisticRegression, RidgeClassifierCV

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
    path = ridge_factors(*held, None, l, intercept=True)
    theirs = {
        "CleanLearning": model,
        "RidgeClassifierCV": RidgeClassifierCV(alphas=np.asarray(ridge_grid(path, PATH_POINTS), np.float64)),
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

    purified, ridge, logistic = (results[name] for name in list(ours)[1:])
    points = {
        "purified readout": accuracy(purified.readout.kernel, purified.readout.bias, test),
        "ridge readout": accuracy(ridge.kernel, ridge.bias, test),
        "logistic readout": accuracy(logistic.kernel, logistic.bias, test),
        **{name: 100 * float((results[name].predict(test.x) == test.y).mean()) for name in theirs},
    }
    regression = results["LogisticRegression"]
    heads = {
        "logistic readout": (logistic.kernel, logistic.bias),
        "LogisticRegression": (regression.coef_.T, regression.intercept_),
    }
    return {
        "cores": len(os.sched_getaffinity(0)),
        "openblas_threads": int(os.environ["OPENBLAS_NUM_THREADS"]),
        "seconds": seconds,
        "compilation": compilation,
        "copying": copying,
        "accuracy": points,
        "objective": {name: objective(*rows, *head, c) for name, head in heads.items()},
        "ridge": {
            "ridge readout": float(ridge.ridge),
            "RidgeClassifierCV": float(results["RidgeClassifierCV"].alpha_),
        },
        "steps": {
            "purified readout": int(purified.readout.steps),
            "logistic readout": int(logistic.steps),
            "LogisticRegression": int(regression.n_iter_.max()),
        },
    }


# What each step of `label_quality` adds to its result: asked only for these, XLA leaves out all later steps.
STEPS = {
    "sums, eigendecomposition, GCV": ("ridge",),
    "first leave-one-out pass": ("given", "margin", "rank"),
    "structure, sharpness": ("sharpness",),
    "second leave-one-out pass": ("trust", "suggested", "noise_rate", "transition"),
}


def step_seconds(feats, labels, l: int) -> dict[str, float]:
    """How much longer `label_quality` takes for each step that its result needs."""

    @partial(jax.jit, static_argnames="fields")
    def part(feats, labels, fields):
        quality = lip_jax.label_quality(feats, labels, num_classes=l)
        return [getattr(quality, field) for field in fields]

    seconds, before = {}, 0.0
    fields: tuple[str, ...] = ()
    for name, added in STEPS.items():
        fields += added
        compiled = part.lower(feats, labels, fields).compile()
        _, until = timed(partial(compiled, feats, labels))
        seconds[name], before = until - before, until
    return seconds


def purify_large(n: int, q: int, l: int, rate: float) -> dict[str, Any]:
    """Purify synthetic rows, refit, and say what it took."""
    peaks = {"imports": peak_bytes()}
    centre_key, row_key, noise_key, test_key = jax.random.split(jax.random.key(0), 4)
    centres = 0.3 * jax.random.normal(centre_key, (l, q))
    feats, true = clustered(row_key, centres, n)
    given = lip_jax.noise.symmetric(noise_key, true, rate, num_classes=l)
    jax.block_until_ready((feats, given))
    peaks["data"] = peak_bytes()

    def purify(quality=None):
        return lip_jax.purify(feats, given, num_classes=l, quality=quality)

    def refit(weights=None):
        return lip_jax.linear_readout(feats, given, num_classes=l, weights=weights)

    purified, first = timed(purify)
    peaks["purify"] = peak_bytes()
    _, again = timed(purify)
    readout = jax.block_until_ready(refit(purified.weights))
    peaks["purified ridge readout"] = peak_bytes()
    gram = feats[: 2 * q].T @ feats[: 2 * q]
    jax.block_until_ready(jnp.linalg.eigh(gram))
    seconds = {
        "purify": again,
        "its compilation": first - again,
        **step_seconds(feats, given, l),
        "eigendecomposition alone": timed(lambda: jnp.linalg.eigh(gram))[1],
        "rule, given the quality": timed(lambda: purify(purified.quality))[1],
        "purified ridge readout": timed(lambda: refit(purified.weights))[1],
    }
    trusted, wrong = np.asarray(purified.trusted), np.asarray(given != true)
    test_x, test_y = clustered(test_key, centres, 2 * l)

    def accuracy(readout):
        scores = test_x @ readout.kernel + readout.bias[None, :]
        return 100 * float((scores.argmax(axis=1) == test_y).mean())

    points = {
        "rows trusted": trusted.mean(),
        "right among the trusted": (~wrong[trusted]).mean(),
        "trusted among the right": trusted[~wrong].mean(),
        "wrong found (recall)": (~trusted[wrong]).mean(),
    }
    return {
        "n": n,
        "q": q,
        "l": l,
        "rate": rate,
        "dtype": str(feats.dtype),
        "cores": len(os.sched_getaffinity(0)),
        "seconds": seconds,
        "peak_bytes": peaks,
        "points": {name: 100 * float(share) for name, share in points.items()}
        | {"test accuracy, purified ridge": accuracy(readout), "all noisy labels": accuracy(refit())},
    }
