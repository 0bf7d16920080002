"""Leave-one-out scores of a ridge readout [allen1974]."""

from functools import partial
from typing import Any

import jax
from jaxtyping import Float

from lip_jax._checks import check_floating
from lip_jax._types import Feats, Labels, Scalar, Weights
from lip_jax.rows.checks import check_label_kind, check_num_classes, check_rows, raise_if_ignored
from lip_jax.rows.labels import Rows, as_rows, class_count
from lip_jax.sums.ridge import Criterion, left_out, ridge_factors, strength


def leave_one_out_scores(
    feats: Feats,
    labels: Labels,
    *,
    num_classes: int | None = None,
    weights: Weights | None = None,
    ridge: Scalar | None = None,
    criterion: Criterion = "gcv",
    intercept: bool = True,
) -> Float[jax.Array, "n l"]:
    """What a ridge readout of all other rows predicts for each row, exactly and without refitting.

    `ŷ_n + h_n/(1 − h_n) (ŷ_n − y_n)`, `h_n = w_n (1/Σw + x̃_nᵀ(G + λI)⁻¹x̃_n)`; a row leaves with its whole
    weight. Rows go through in chunks: beside the result, memory does not grow with `n`.

    These scores are out of sample for the readout only. If the body that made the features was trained on
    these very labels long enough to memorise them, the features of a row carry its wrong label, and no
    linear model on top can tell: see `lip_jax.memorised`, or take features of a body stopped early.

    Args:
        feats: Features `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`; the kinds are told in `lip_jax.rows`.
        num_classes: `l`; None: the width of targets, or the largest id plus one.
        weights: Weight of each row `(n,)`, at least 0.
        ridge: `λ ≥ 0`; None: by `criterion`, over six decades about the mean eigenvalue of `G`.
        criterion: `"gcv"`, from the sums alone, or `"press"`, the exact leave-one-out error, which costs one
            more pass over the rows for each of the 61 strengths.
        intercept: Whether the readout has an intercept, which is not penalised.

    Returns:
        Scores `(n, l)`, on the scale of targets: no logits. An unlabelled row, and one of weight 0, gets the
        plain prediction; one in whose direction there is no other (`h = 1`) the mean target of the others.

    Raises:
        ValueError: If shapes do not fit, or, where values can be seen, a row cannot be used. Under `jit` such
            rows count for nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> feats = jnp.array([[-1.0], [-1.1], [1.0], [1.1], [0.9]])
        >>> scores = lip_jax.leave_one_out_scores(feats, jnp.array([0, 0, 1, 1, 0]), ridge=0.1)
        >>> jnp.argmax(scores, axis=1).tolist()  # the last label disagrees with its neighbours
        [0, 0, 1, 1, 1]

    Reference:
        [allen1974], the PRESS statistic; [golub1979] for GCV.
    """
    l = check_readout_rows(feats, labels, num_classes, weights, ridge, criterion)
    rows = Rows(*as_rows(feats, labels, weights, None)[:3])
    scores, ignored = _scores(rows, ridge, l=l, criterion=criterion, intercept=intercept)
    raise_if_ignored(ignored, feats, labels, weights, l)
    return scores


def check_readout_rows(
    feats: Any, labels: Any, num_classes: int | None, weights: Any, ridge: Scalar | None, criterion: str
) -> int:
    """Require rows and options a readout can be fitted to, and return `l`."""
    check_floating(feats, "feats", "n q")
    check_label_kind(labels)
    check_num_classes(num_classes)
    l = class_count(labels, num_classes)
    check_rows(feats.shape[1], l, feats, labels, weights, None, 0.0 if ridge is None else ridge, "zero")
    if criterion not in ("gcv", "press"):
        raise ValueError(f"criterion must be 'gcv' or 'press'; got {criterion!r}.")
    return l


@partial(jax.jit, static_argnames=("l", "criterion", "intercept"))
def _scores(
    rows: Rows, ridge: Scalar | None, *, l: int, criterion: Criterion, intercept: bool
) -> tuple[jax.Array, jax.Array]:
    factors = ridge_factors(*rows, l, intercept=intercept)
    ridge = strength(factors, rows, ridge, criterion, intercept=intercept)
    scores = left_out(factors, rows, ridge, lambda scores, y, w: scores, intercept=intercept)
    return scores, factors.ignored
