"""LIP at every rank on one case: test scores, spectra, and how far label noise turned the head."""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

import lip_jax
from lip_jax._types import Array
from lip_jax.bounds.angles import Angles, compare_heads, ridge_bounds
from lip_jax.choice import SelectionReport
from lip_jax.choice.evidence import logits_on, paired_difference
from lip_jax.demo.data import Data
from lip_jax.demo.training import Case
from lip_jax.methods import Published
from lip_jax.methods.protocol import Fit, Head
from lip_jax.methods.refit_path import RefitPath
from lip_jax.rows.labels import Rows
from lip_jax.rows.metrics import compute_metrics
from lip_jax.sums.ridge import ridge_factors, ridge_solution


class Gain(NamedTuple):
    """The mean paired gain over the noisy head with its standard error; positive is better."""

    mean: Float[Array, "*ranks"]
    error: Float[Array, "*ranks"]

    @property
    def helped(self) -> Bool[Array, "*ranks"]:
        """Where the gain exceeds two standard errors."""
        return np.asarray(self.mean > 2 * self.error)

    @property
    def hurt(self) -> Bool[Array, "*ranks"]:
        """Where the loss exceeds two standard errors."""
        return np.asarray(self.mean < -2 * self.error)


class Scores(NamedTuple):
    """Test scores of a head, or of one head for each rank, and what each gains over the noisy head."""

    accuracy: Float[Array, "*ranks"]
    log_loss: Float[Array, "*ranks"]
    accuracy_gain: Gain
    log_loss_gain: Gain


class Reference(NamedTuple):
    """A head that is not refitted: test scores, spectrum `(r,)`, and `φ(i, j)` with the noisy head."""

    scores: Scores
    s: Float[Array, "r"]
    similarity: Float[Array, "r r"]


@dataclass(frozen=True)
class Study:
    """Everything the demo reports.

    Attributes:
        by_rank: Test scores of the refined head at ranks 0 to r.
        references: The clean network, if there is one, the clean head and the noisy head, by name.
        sigma: The refitted singular values `(r,)`; rank k keeps the first k of the noisy head instead.
        softmax: Angles between the clean and the noisy head.
        ridge: Angles between ridge heads on the same features, for clean and for given labels.
        ridge_strength: Their `λ`.
    """

    by_rank: Scores
    references: dict[str, Reference]
    sigma: Float[Array, "r"]
    softmax: Angles
    ridge: Angles
    ridge_strength: float


def study(case: Case, ranks: Int[Array, "k"]) -> Study:
    """Apply LIP [si2025] at every rank, and measure angles at the given ranks, 1 to r.

    LIP is the published method: the tail is refitted to the given labels, one-hot, and the bias stays.
    """
    data, noisy = case.data, case.noisy
    ranks = jnp.asarray(ranks)
    sigma, by_rank = score_by_rank(noisy, data.train, data.test)
    heads: dict[str, tuple[Head, Rows]] = {}
    if case.network is not None:
        heads["clean network"] = case.network.head, case.network.test
    heads |= {"clean head": (case.clean, data.test), "noisy head": (noisy, data.test)}
    references = {
        name: Reference(
            score_head(head, test, noisy, data.test),
            lip_jax.svd_split(head.kernel, 0).s,
            lip_jax.spectrum.kernel_similarity_grid(head.kernel, noisy.kernel),
        )
        for name, (head, test) in heads.items()
    }
    ridge = 0.01 * float(jnp.mean(jnp.sum(jnp.asarray(data.train.feats) ** 2, axis=0)))
    return Study(
        by_rank=by_rank,
        references=references,
        sigma=sigma,
        softmax=compare_heads(case.clean.kernel, noisy.kernel, ranks),
        ridge=_compare_ridge_heads(data, ridge, ranks),
        ridge_strength=ridge,
    )


def choose(case: Case) -> tuple[SelectionReport, Scores]:
    """The report of `lip_jax.select` by the held-out given labels, and test scores of the head it takes."""
    (kernel, bias), train, held_out = case.noisy, case.data.train, case.data.held_out
    if held_out is None:
        raise ValueError("case.data.held_out is None: there are no labels to choose by. Use hold_out.")
    chosen = lip_jax.select(kernel, train.feats, train.labels, bias=bias, validation=held_out)
    test = case.data.test
    return chosen.report, score_head(Head(chosen.kernel, chosen.bias), test, case.noisy, test)


@jax.jit
def score_head(head: Head, rows: Rows, noisy: Head, noisy_rows: Rows) -> Scores:
    """Test scores of a head beside the noisy one, which may have other features of the same rows."""
    return _scores(logits_on(head, rows), logits_on(noisy, noisy_rows), rows)


@jax.jit
def score_by_rank(noisy: Head, train: Rows, test: Rows) -> tuple[jax.Array, Scores]:
    """The refitted singular values, and test scores at ranks 0 to r: one solve, and one compilation."""
    path = Published().path(noisy, Fit(train, None, None, jnp.zeros((), jnp.int32)))
    assert isinstance(path, RefitPath)
    base = logits_on(noisy, test)

    def scored(logits: jax.Array) -> jax.Array:
        return jnp.stack(jax.tree.leaves(_scores(logits, base, test)))

    # The path begins at the full rank.
    accuracy, log_loss, *gains = path.over_logits(test.feats, scored)[::-1].T
    return path.sigma, Scores(accuracy, log_loss, Gain(*gains[:2]), Gain(*gains[2:]))


def _scores(logits: jax.Array, base: jax.Array, test: Rows) -> Scores:
    metrics = compute_metrics(logits, test.labels, None)
    of_accuracy, of_log_loss = (
        Gain(*paired_difference(logits, base, test, metric)) for metric in ("accuracy", "log_loss")
    )
    return Scores(metrics.accuracy, metrics.log_loss, of_accuracy, of_log_loss)


def _compare_ridge_heads(data: Data, ridge: float, ranks: jax.Array) -> Angles:
    """Angles between ridge heads without intercept for clean and for given labels, and their bounds."""
    feats = jnp.asarray(data.train.feats)
    kernel, kernel_noisy = (
        ridge_solution(
            ridge_factors(feats, jnp.asarray(labels), None, data.num_classes, intercept=False),
            jnp.asarray(ridge, feats.dtype),
        )[0]
        for labels in (data.clean_y, data.train.labels)
    )
    angles = compare_heads(kernel, kernel_noisy, ranks)
    n, q = feats.shape
    bound = partial(
        ridge_bounds,
        # With fewer rows than features XᵀX has eigenvalues 0 that the thin SVD leaves out.
        jnp.pad(lip_jax.bounds.feature_singular_values(feats), (0, max(q - n, 0))),
        lip_jax.svd_split(kernel, 0).s,
        lip_jax.svd_split(kernel_noisy, 0).s,
        ranks,
        num_samples=n,
        num_classes=data.num_classes,
        flip_rate=data.flip_rate,
        ridge=ridge,
    )
    mixed = angles.bounds["Wedin, mixed gap"]
    forms = {form: bound(form=form) for form in ("paper", "filter")}
    return replace(angles, bounds={"Wedin, mixed gap": mixed} | forms)
