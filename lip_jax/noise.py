"""Label noise as pure functions of a PRNG key, for experiments with known truth.

All take clean class ids `(n,)` and return noisy ids of the same dtype; negative (unlabelled) ids stay.
`rate` is the flip rate: the expected share of labelled samples whose label becomes a *different* class.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, Key, UInt32

from lip_jax._checks import check_floating, check_fraction, describe, is_concrete, see
from lip_jax._types import Array, ClassIds, Feats, Scalar
from lip_jax.numerics import linalg
from lip_jax.rows.labels import as_labels

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]

NoisyIds = Integer[jax.Array, "n"]


def _check_ids(labels: Array, num_classes: int) -> jax.Array:
    if (
        not hasattr(labels, "shape")
        or len(labels.shape) != 1
        or not jnp.issubdtype(labels.dtype, jnp.integer)
    ):
        got = describe(labels) if hasattr(labels, "dtype") else type(labels).__name__
        raise ValueError(f"labels must be integer class ids (n,); got {got}.")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2; got {num_classes}.")
    if num_classes - 1 > jnp.iinfo(labels.dtype).max:
        raise ValueError(
            f"labels must have a dtype that holds num_classes = {num_classes} ids; got {describe(labels)}. "
            f"Cast them with labels.astype(jnp.int32)."
        )
    largest = int(see(lambda: as_labels(labels).max(initial=0))) if is_concrete(labels) else 0
    if largest >= num_classes:
        raise ValueError(f"labels must be class ids below num_classes = {num_classes}; got {largest}.")
    return as_labels(labels)


def _replace(labels: Array, where: jax.Array, other: jax.Array) -> jax.Array:
    labels = jnp.asarray(labels)
    return jnp.where(where & (labels >= 0), other.astype(labels.dtype), labels)


def _happens(key: PRNGKey, shape: tuple[int, ...], rate: Scalar | Array) -> jax.Array:
    # Always in float32: the same key gives the same noise with and without x64.
    return jax.random.uniform(key, shape, jnp.float32) < jnp.asarray(rate, jnp.float32)


def _one_hot(ids: jax.Array, num_classes: int) -> jax.Array:
    return ids[:, None] == jnp.arange(num_classes, dtype=ids.dtype)[None, :]


def symmetric(key: PRNGKey, labels: ClassIds, rate: Scalar, *, num_classes: int) -> NoisyIds:
    """With probability `rate` a label becomes one of the other classes, uniformly.

    `P(y' = c | y) = rate / (l − 1)` for `c ≠ y`.

    Args:
        key: PRNG key.
        labels: Clean class ids `(n,)`.
        rate: Flip rate, 0 to 1.
        num_classes: `l`.

    Returns:
        Noisy ids `(n,)`, same dtype.

    Raises:
        ValueError: If `labels` are no class ids below `num_classes`, or `rate` is out of range.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> labels = jnp.zeros(1000, jnp.int32)
        >>> noisy = lip_jax.noise.symmetric(jax.random.key(0), labels, 0.4, num_classes=10)
        >>> round(float((noisy != labels).mean()), 1)
        0.4

    Reference:
        [natarajan2013]; the model of the experiments in [si2025].
    """
    ids = _check_ids(labels, num_classes)
    check_fraction(rate, "rate")
    flip_key, shift_key = jax.random.split(key)
    flipped = _happens(flip_key, ids.shape, rate)
    shift = jax.random.randint(shift_key, ids.shape, 1, num_classes, jnp.int32)
    return _replace(labels, flipped, (ids + shift) % num_classes)


def asymmetric(
    key: PRNGKey,
    labels: ClassIds,
    rate: Scalar,
    *,
    num_classes: int,
    partner: Integer[Array, "l"] | None = None,
) -> NoisyIds:
    """With probability `rate` a label becomes its class's partner: pair flips.

    `P(y' = partner[c] | y = c) = rate`. The default partner is the next class, cyclically.

    Args:
        key: PRNG key.
        labels: Clean class ids `(n,)`.
        rate: Flip rate, 0 to 1.
        num_classes: `l`.
        partner: The class that each class is mistaken for, `(l,)`. A class that is its own partner is
            never flipped, as in the usual noise for CIFAR-10.

    Returns:
        Noisy ids `(n,)`, same dtype.

    Raises:
        ValueError: As `symmetric`, or if `partner` does not name a class for each class.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> lip_jax.noise.asymmetric(jax.random.key(0), jnp.array([0, 1, 2]), 1.0, num_classes=3).tolist()
        [1, 2, 0]

    Reference:
        [patrini2017].
    """
    ids = _check_ids(labels, num_classes)
    check_fraction(rate, "rate")
    if partner is None:
        partner = (jnp.arange(num_classes, dtype=jnp.int32) + 1) % num_classes
    partner = jnp.asarray(partner)
    if partner.shape != (num_classes,):
        raise ValueError(
            f"partner must hold a class id for each of num_classes = {num_classes} classes; "
            f"got {describe(partner)}."
        )
    if is_concrete(partner) and not see(lambda: ((partner >= 0) & (partner < num_classes)).all()):
        raise ValueError(
            f"partner must hold class ids from 0 to {num_classes - 1}; got {see(lambda: partner).tolist()}. "
            f"A class that is never mistaken is its own partner."
        )
    flipped = _happens(key, ids.shape, rate)
    return _replace(labels, flipped, partner[jnp.clip(ids, 0, num_classes - 1)])


def transition(key: PRNGKey, labels: ClassIds, transition: Float[Array, "l l"]) -> NoisyIds:
    """Draw each label from its class's row of a transition matrix: `P(y' = c | y) = T[y, c]`.

    Args:
        key: PRNG key.
        labels: Clean class ids `(n,)`.
        transition: `T (l, l)`, rows non-negative and summing to 1.

    Returns:
        Noisy ids `(n,)`, same dtype.

    Raises:
        ValueError: If `T` is not square and row-stochastic (where values can be seen), or labels do not fit.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> lip_jax.noise.transition(jax.random.key(0), jnp.array([0, 1, -1]), swap).tolist()
        [1, 0, -1]

    Reference:
        [patrini2017].
    """
    check_floating(transition, "transition", "l l")
    if transition.shape[0] != transition.shape[1]:
        raise ValueError(f"transition must be square, (l, l); got {describe(transition)}.")
    ids = _check_ids(labels, transition.shape[0])
    transition = jnp.asarray(transition)
    if is_concrete(transition):
        row_sums = see(lambda: transition.astype(jnp.float32).sum(axis=1))
        if not (see(lambda: (transition >= 0).all()) and np.all(np.abs(row_sums - 1) < 1e-2)):
            raise ValueError(
                "transition must be row-stochastic: entries at least 0, rows summing to 1. "
                f"Divide each row by its sum; sums range {float(row_sums.min()):.3g} to "
                f"{float(row_sums.max()):.3g}."
            )
    # Gumbel noise in float16 has too short a tail for rare classes.
    log_rows = jnp.log(transition.astype(jnp.float32))[jnp.clip(ids, 0, transition.shape[0] - 1)]
    return _replace(labels, jnp.ones(ids.shape, bool), jax.random.categorical(key, log_rows))


def instance(key: PRNGKey, feats: Feats, labels: ClassIds, rate: Scalar, *, num_classes: int) -> NoisyIds:
    """Noise that depends on the sample: a random linear map of its features says what it is mistaken for.

    Each sample has its own flip rate `ρ_n`, normal around `rate` with standard deviation 0.1, truncated
    symmetrically to `[max(0, 2·rate − 1), min(1, 2·rate)]` so that its mean stays `rate`. Where it
    flips, `P(y' = c | x, y) ∝ exp((x A)_c)` over `c ≠ y`, with `A (q, l)` standard normal and the rows
    of `x` scaled to unit norm. [xia2020] draws one `A` per class; a common `A` needs `l` times less memory
    and also makes the error depend on the sample.

    Args:
        key: PRNG key.
        feats: Features `(n, q)`.
        labels: Clean class ids `(n,)`.
        rate: Mean flip rate, 0 to 1.
        num_classes: `l`.

    Returns:
        Noisy ids `(n,)`, same dtype.

    Raises:
        ValueError: As `symmetric`, or if `feats` do not match `labels`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> feats = jax.random.normal(jax.random.key(1), (2000, 8))
        >>> labels = jnp.zeros(2000, jnp.int32)
        >>> noisy = lip_jax.noise.instance(jax.random.key(0), feats, labels, 0.3, num_classes=5)
        >>> round(float((noisy != labels).mean()), 1)
        0.3

    Reference:
        [xia2020], algorithm 2, with one projection in place of l.
    """
    check_floating(feats, "feats", "n q")
    ids = _check_ids(labels, num_classes)
    if feats.shape[0] != ids.shape[0]:
        raise ValueError(
            f"labels must have one row per row of feats, n = {feats.shape[0]}; got {describe(ids)}."
        )
    check_fraction(rate, "rate")
    rate_key, flip_key, view_key, class_key = jax.random.split(key, 4)
    rate = jnp.asarray(rate, jnp.float32)
    half_width = jnp.minimum(rate, 1 - rate) / 0.1
    spread = jax.random.truncated_normal(rate_key, -half_width, half_width, ids.shape, jnp.float32)
    flipped = _happens(flip_key, ids.shape, rate + 0.1 * spread)
    feats = jnp.asarray(feats).astype(jnp.float32)
    norms = jnp.linalg.norm(feats, axis=1, keepdims=True)
    feats = feats / jnp.where(norms > 0, norms, 1)
    view = jax.random.normal(view_key, (feats.shape[1], num_classes), jnp.float32)
    # At full precision: the same key gives the same labels on every platform.
    scores = linalg.matmul(feats, view)
    other = jax.random.categorical(class_key, jnp.where(_one_hot(ids, num_classes), -jnp.inf, scores))
    return _replace(labels, flipped, other)


def candidate_sets(
    key: PRNGKey, labels: ClassIds, rate: Scalar, *, num_classes: int
) -> Bool[jax.Array, "n l"]:
    """Partial labels: the true class, and each other class independently with probability `rate`.

    Args:
        key: PRNG key.
        labels: Clean class ids `(n,)`; an unlabelled row gets an empty set.
        rate: Probability of each false candidate, 0 to 1.
        num_classes: `l`.

    Returns:
        Candidate mask `(n, l)`, for `lip_jax.candidate_targets`.

    Raises:
        ValueError: As `symmetric`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> lip_jax.noise.candidate_sets(jax.random.key(0), jnp.array([1, -1]), 0.0, num_classes=3).tolist()
        [[False, True, False], [False, False, False]]

    Reference:
        [feng2020], uniform sampling of candidate sets.
    """
    ids = _check_ids(labels, num_classes)
    check_fraction(rate, "rate")
    false_candidates = _happens(key, (ids.shape[0], num_classes), rate)
    return (_one_hot(ids, num_classes) | false_candidates) & (ids >= 0)[:, None]
