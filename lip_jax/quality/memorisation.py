"""Whether a head has memorised the labels it was trained on [zhang2017]."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from lip_jax._checks import check_softmax_kernel
from lip_jax._results import STATIC, ShortRepr
from lip_jax._types import Bias, Feats, Kernel, Labels, Weights
from lip_jax.numerics import linalg
from lip_jax.quality.left_out import left_out, strength
from lip_jax.rows.checks import check_rows, check_validation, count_ignored, raise_if_ignored
from lip_jax.rows.labels import Rows, as_rows
from lip_jax.rows.metrics import correct, error_of_mean, row_weights, weighted_mean
from lip_jax.sums.ridge import ridge_factors

# How much more a head may agree with labels it has seen than a readout that has not, before they count as
# memorised: 0.06 to 0.08 on well regularised CLINC150 heads, 0.11 to 0.23 on overfitted ones.
MEMORISED_MARGIN = 0.1
# Where the head agrees with so many labels, and what has not seen them with so many, the labels are clean or
# the body memorised them. Rows that were seen cannot tell which.
NEAR_TOTAL = 0.95, 0.9


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Memorisation(ShortRepr):
    """Whether a head agrees with labels more than it should if it had not memorised them.

    Attributes:
        agreement: Share of the labels that the head predicts.
        reference: The share to expect of a head that has not seen them.
        standard_error: Of the difference of the two.
        memorised: Whether the agreement is known to be above the reference by 0.1 and 3 standard errors more.
        can_tell: Whether there is anything to tell by: labelled rows on both sides and, without held-out
            rows, less than near-total agreement of both. Clean labels and memorised ones have that in common.
        held_out: Whether the reference is from held-out rows, else from leave-one-out scores.
    """

    agreement: Float[jax.Array, ""]
    reference: Float[jax.Array, ""]
    standard_error: Float[jax.Array, ""]
    memorised: Bool[jax.Array, ""]
    can_tell: Bool[jax.Array, ""]
    held_out: bool = field(metadata=STATIC)

    def __str__(self) -> str:
        if not bool(self.can_tell) and float(self.agreement) > 0 and not self.held_out:
            return (
                f"cannot tell whether the network memorised these labels: the head agrees with "
                f"{float(self.agreement):.1%} of them, leave-one-out with {float(self.reference):.1%}: "
                f"they are clean, or the body memorised them; validation= rows it was not trained on can tell"
            )
        if not bool(self.can_tell):
            return "cannot tell whether the head memorised these labels: no labelled row counts on one side"
        source = "it agrees with held-out labels" if self.held_out else "leave-one-out scores agree"
        found = (
            f"the head agrees with {float(self.agreement):.1%} of the labels, {source} "
            + ("for" if self.held_out else "with")
            + f" {float(self.reference):.1%} (difference ± {float(self.standard_error):.1%})"
        )
        if bool(self.memorised):
            return (
                f"memorised: {found}. These rows cannot judge this head, nor labels by its features: repair "
                f"it with validation= rows it was not trained on, purify with features of a body stopped "
                f"early, or fit on held-out rows."
            )
        return f"not memorised: {found}"


def memorised(
    kernel: Kernel,
    feats: Feats,
    labels: Labels,
    *,
    bias: Bias | None,
    weights: Weights | None = None,
    validation: tuple | None = None,
) -> Memorisation:
    """Whether head and body have memorised these labels, so that rows with them can judge neither.

    The head's agreement with labels it was trained on is held against its agreement with held-out labels of
    the same noise or, without any, against that of leave-one-out scores on the same features. The latter see
    what the head memorised; of a body that memorised they see only a part (digits after 200 epochs at 40%
    noise: head 1.0, leave-one-out .82, held out .48), so held-out rows are worth having.

    Args:
        kernel: `(q, l)`, `l ≥ 2`.
        feats: Features of rows the head was trained on `(n, q)`.
        labels: Their labels, of any kind.
        bias: The head's bias `(l,)`, or None where it has none.
        weights: Weight of each row `(n,)`.
        validation: `(feats, labels)` of rows neither head nor body was trained on, with labels as noisy.

    Returns:
        A `Memorisation`, which prints what to do.

    Raises:
        ValueError: If shapes do not fit, or, where values can be seen, a row cannot be used.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> feats, labels = jax.random.normal(jax.random.key(0), (200, 100)), jnp.arange(200) % 2
        >>> kernel = jnp.linalg.pinv(feats) @ jax.nn.one_hot(labels, 2)  # labels without any sense
        >>> bool(lip_jax.memorised(kernel, feats, labels, bias=None).memorised)
        True

    Reference:
        [zhang2017] on memorised labels; the test is this package's.
    """
    check_softmax_kernel(kernel)
    q, l = kernel.shape
    check_rows(q, l, feats, labels, weights, bias, 0.0, "zero")
    rows = Rows(*as_rows(feats, labels, weights, None)[:3])
    held = None if validation is None else check_validation(validation, q, l)[0]
    bias = None if bias is None else jnp.asarray(bias)
    found = memorisation_of(jnp.asarray(kernel), bias, rows, held)
    raise_if_ignored(count_ignored(rows, l=l), feats, labels, weights, l)
    return found


@jax.jit
def memorisation_of(kernel: jax.Array, bias: jax.Array | None, rows: Rows, held: Rows | None) -> Memorisation:
    """`memorised` on checked arguments."""

    def agreement(feats: jax.Array, labels: jax.Array, weights: jax.Array | None) -> tuple:
        logits = linalg.logits_of(feats, kernel, bias)
        return correct(logits, labels), row_weights(logits, labels, weights)

    own, use = agreement(*rows)
    agreed = weighted_mean(own, use)
    if held is None:
        intercept = bias is not None
        factors = ridge_factors(*rows, kernel.shape[1], intercept=intercept)
        ridge = strength(factors, rows, None, "gcv", intercept=intercept)
        reference = left_out(
            factors, rows, ridge, lambda scores, y, w: correct(scores, y), intercept=intercept
        )
        difference = jnp.where(use > 0, own - reference, 0)
        mean = weighted_mean(difference, use)
        error = error_of_mean(difference, mean, use)
        expected, judges = weighted_mean(reference, use), use
        near_total = (agreed >= NEAR_TOTAL[0]) & (expected >= NEAR_TOTAL[1])
    else:
        theirs, judges = agreement(*held)
        expected = weighted_mean(theirs, judges)
        near_total = jnp.asarray(False)
        mean = agreed - expected
        error = jnp.hypot(error_of_mean(own, agreed, use), error_of_mean(theirs, expected, judges))
    # Of no rows an agreement is 0, which says nothing.
    can_tell = (jnp.sum(use) > 0) & (jnp.sum(judges) > 0) & ~near_total
    return Memorisation(
        agreement=agreed,
        reference=expected,
        standard_error=error,
        memorised=can_tell & (mean > MEMORISED_MARGIN + 3 * error),
        can_tell=can_tell,
        held_out=held is not None,
    )
