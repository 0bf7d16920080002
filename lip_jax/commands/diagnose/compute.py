"""The numbers of a diagnosis: the spectrum of a head, another head beside it, the quality of the labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import lip_jax
from lip_jax._types import Array
from lip_jax.bounds.angles import Angles, compare_heads, ridge_bounds
from lip_jax.commands.checkpoints import StoredHead
from lip_jax.commands.rows import count_labelled, head_scores, share_wrong
from lip_jax.methods.protocol import Head
from lip_jax.numerics.linalg import svd_tolerance
from lip_jax.quality import LabelQuality, Memorisation
from lip_jax.quality.left_out import strength
from lip_jax.rows import Metrics, Rows
from lip_jax.spectrum import EffectiveRank
from lip_jax.sums.ridge import ridge_factors, ridge_solution

ENERGIES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Comparison:
    """A head beside another.

    Attributes:
        checkpoint: The other checkpoint.
        head: The path of the head in it.
        singular_values: Of the other head, `(m,)`.
        similarity: `φ(i, j)` of this head and the other, `(r, m)`.
        angles: Angles and bounds at ranks 1 to r; None where the kernels have different shapes.
    """

    checkpoint: Path
    head: str
    singular_values: Float[Array, "m"]
    similarity: Float[Array, "r m"]
    angles: Angles | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the similarity at equal ranks alone."""
        shown, angles = dict(vars(self)), self.angles
        del shown["angles"]
        return shown | {
            "similarity": np.diagonal(np.asarray(self.similarity)),
            "sin_theta": angles and {"features": angles.feats_side, "classes": angles.class_side},
            "bounds": angles and _marked(angles.bounds),
        }


@dataclass(frozen=True)
class OnRows:
    """A head on labelled rows.

    Attributes:
        labelled: How many rows have a label.
        metrics: Of the head, by these labels.
        quality: How far the labels can be trusted.
        memorised: Whether the head has memorised them.
        wrong: The estimated share of wrong labels.
        ridge: Strength of the ridge readout that the bounds are for; None where there are no bounds.
        bounds: How far so many wrong labels can turn its leading subspaces, at ranks 1 to r.
    """

    labelled: int
    metrics: Metrics
    quality: LabelQuality
    memorised: Memorisation
    wrong: float
    ridge: float | None
    bounds: dict[str, Float[Array, "r"]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: of the quality only the rates by class."""
        shown = dict(vars(self))
        quality = shown.pop("quality")
        return shown | {"noise_rate": quality.noise_rate, "bounds": _marked(self.bounds)}


@dataclass(frozen=True)
class Diagnosis:
    """Everything `lip-jax diagnose` reports.

    Attributes:
        checkpoint: The checkpoint.
        head: The path of the head in it.
        shape: `(q, l)`.
        dtype: As stored.
        bias: Whether the head has one.
        singular_values: Of the kernel, `(r,)`.
        effective_rank: By entropy, and stable.
        rank_for_energy: How many components hold each share of energy in `ENERGIES`.
        null_components: How many singular values are at rounding level; refits keep them.
        against: The comparison with another head.
        rows: The head on labelled rows.
    """

    checkpoint: Path
    head: str
    shape: tuple[int, int]
    dtype: str
    bias: bool
    singular_values: Float[Array, "r"]
    effective_rank: EffectiveRank
    rank_for_energy: dict[float, int]
    null_components: int
    against: Comparison | None
    rows: OnRows | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        parts = {
            "against": self.against and self.against.as_dict(),
            "rows": self.rows and self.rows.as_dict(),
        }
        return {"command": "diagnose"} | vars(self) | parts


def _marked(bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds with a mark for the vacuous ones."""
    return {name: {"value": values, "vacuous": np.asarray(values) >= 1} for name, values in bounds.items()}


def diagnosed(
    checkpoint: Path,
    stored: StoredHead,
    other: tuple[Path, StoredHead] | None,
    rows: Rows | None,
    held: Rows | None,
) -> Diagnosis:
    """The diagnosis of a head, with another head and rows where they are given."""
    kernel, bias = stored.head
    q, l = kernel.shape
    s = jnp.asarray(lip_jax.svd_split(kernel, 0).s)
    return Diagnosis(
        checkpoint=checkpoint,
        head=stored.name,
        shape=(q, l),
        dtype=str(stored.dtype),
        bias=bias is not None,
        singular_values=s,
        effective_rank=lip_jax.spectrum.effective_rank(s),
        rank_for_energy={share: int(lip_jax.spectrum.rank_for_energy(s, share)) for share in ENERGIES},
        null_components=int((s <= svd_tolerance(s, q, l)).sum()),
        against=None if other is None else _compare(kernel, *other),
        rows=None if rows is None else _on_rows(stored.head, rows, held),
    )


def _compare(kernel: jax.Array, checkpoint: Path, stored: StoredHead) -> Comparison:
    other = stored.head.kernel
    ranks = jnp.arange(1, min(kernel.shape) + 1)
    return Comparison(
        checkpoint,
        stored.name,
        lip_jax.svd_split(other, 0).s,
        lip_jax.spectrum.kernel_similarity_grid(kernel, other),
        compare_heads(other, kernel, ranks) if kernel.shape == other.shape else None,
    )


def _on_rows(head: Head, rows: Rows, held: Rows | None) -> OnRows:
    (kernel, bias), (feats, labels, weights) = head, rows
    l = kernel.shape[1]
    quality = lip_jax.label_quality(feats, labels, num_classes=l, weights=weights)
    counted, wrong = np.asarray(quality.given) >= 0, share_wrong(quality)
    ridge, bounds = None, {}
    if weights is None and counted.any():
        ridge, bounds = _noise_bounds(jnp.asarray(feats)[counted], quality.given[counted], l, wrong)
    return OnRows(
        labelled=count_labelled(rows),
        metrics=head_scores(head, rows),
        quality=quality,
        memorised=lip_jax.memorised(kernel, feats, labels, bias=bias, weights=weights, validation=held),
        wrong=wrong,
        ridge=ridge,
        bounds=bounds,
    )


def _noise_bounds(
    feats: jax.Array, labels: jax.Array, l: int, flip_rate: float
) -> tuple[float, dict[str, Any]]:
    """Bounds for a ridge readout of these labels against one of the true labels, at every rank.

    The mixed gap needs the clean head, which nobody has. The gap of the noisy head can replace it, with a
    factor of 2. Bounds are inversely proportional to the gap, so half the spectrum accounts for the factor.
    """
    factors = ridge_factors(feats, labels, None, l, intercept=False)
    ridge = strength(factors, None, None, "gcv", intercept=False)
    s = lip_jax.svd_split(ridge_solution(factors, ridge)[0], 0).s
    n, q = feats.shape
    # With fewer rows than features XᵀX has eigenvalues 0 that the thin SVD leaves out.
    values = jnp.pad(lip_jax.bounds.feature_singular_values(feats), (0, max(q - n, 0)))
    terms = {"num_samples": n, "num_classes": l, "flip_rate": flip_rate, "ridge": ridge}
    ranks = jnp.arange(1, s.shape[0] + 1)
    return float(ridge), {
        form: ridge_bounds(values, s / 2, s / 2, ranks, form=form, **terms) for form in ("paper", "filter")
    }
