"""Candidates out of fold: one head for each fold, that has not seen its rows, and one for all.

There are two ways. Held-out rows only choose the strength of candidates that were fitted elsewhere
(`chosen_out_of_fold`). Rows that fit as well are left out of the fits that they judge (`fitted_out_of_fold`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lip_jax.choice.evidence import Metric, flat, fold_scorer, logits_on
from lip_jax.methods.protocol import Fit, Head, HeadPath, HeadStack, Method, Needs, path_of, prepare
from lip_jax.quality.trust import evident_transition
from lip_jax.rows.labels import Rows


class Trial(NamedTuple):
    """A candidate, its strength, whether there is any, and the head `(k, …)` that is judged on each fold."""

    head: Head
    strength: jax.Array
    available: jax.Array
    heads: Head


def best_places(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where `Σ score` of each strength and fold `(p, k)` is best: without each fold `(k,)`, and over all."""
    sums = jnp.where(jnp.isnan(sums), -jnp.inf, sums)
    # Summed anew for each fold: less than the total by that fold, equal strengths would differ by rounding.
    own = jnp.eye(sums.shape[1], dtype=bool)
    others = jnp.sum(jnp.where(own[None, :, :], 0, sums[:, None, :]), axis=2)
    return jnp.argmax(others, axis=0).astype(jnp.int32), jnp.argmax(jnp.sum(sums, axis=1)).astype(jnp.int32)


def chosen_out_of_fold(
    head: Head, fit: Fit, methods: tuple[Method, ...], folded: Rows, metric: Metric
) -> list[Trial]:
    """Candidates fitted to other rows, each at the strength that the folds choose for one another."""
    rows = flat(folded)
    scorer = fold_scorer(logits_on(head, rows), rows, metric, folded.weights.shape[0])
    found = []
    for method in methods:
        path = path_of(method, head, fit)
        places, place = best_places(path.over_logits(rows.feats, scorer))
        made = jax.lax.map(path.head, jnp.append(places, place))
        heads, last = jax.tree.map(lambda part: part[:-1], made), jax.tree.map(lambda part: part[-1], made)
        found.append(Trial(last, path.strength[place].astype(jnp.float32), path.available, heads))
    return found


class FittedTrials(NamedTuple):
    """Candidates fitted without each fold, and the heads `(k, …)` that they are held against."""

    bases: Head
    trials: list[Trial]
    transition: jax.Array | None
    ignored: jax.Array


def fitted_out_of_fold(
    head: Head,
    rows: Rows,
    methods: tuple[Method, ...],
    folded: Rows,
    fold: jax.Array,
    metric: Metric,
    needs: Needs,
    stand_in: Callable[[Rows], Head] | None,
) -> FittedTrials:
    """Candidates that are fitted to all rows, and without each fold in turn.

    `fold` is that of each row `(n,)`. What is fitted without a fold is held against the head as it came, or
    against its `stand_in`, which is made from the same rows.
    """
    l = head.kernel.shape[1]
    k, n = folded.weights.shape[0], fold.shape[0]
    dtype = folded.weights.dtype
    weights = jnp.ones(n, dtype) if rows.weights is None else rows.weights.astype(dtype)

    def without(i: jax.Array) -> tuple:
        # The last round leaves out none: one program for the folds and for the whole.
        some = rows._replace(weights=jnp.where(fold == i, 0, weights))
        base = head if stand_in is None else jax.lax.cond(i < k, stand_in, lambda _: head, some)
        fit = prepare(some, l, intercept=head.bias is not None, needs=needs)
        block = jax.tree.map(lambda whole: whole[jnp.minimum(i, k - 1)], folded)
        scorer = fold_scorer(logits_on(base, block), block, metric, 1)
        paths = [_as_tree(path_of(method, base, fit)) for method in methods]
        sums = [path.over_logits(block.feats, scorer)[:, 0] for path in paths]
        transition = None if fit.quality is None else evident_transition(fit.quality)
        return base, paths, sums, transition, fit.ignored

    made = jax.lax.map(without, jnp.arange(k + 1, dtype=jnp.int32))
    first = lambda tree: jax.tree.map(lambda part: part[:-1], tree)  # noqa: E731
    last = lambda tree: jax.tree.map(lambda part: part[-1], tree)  # noqa: E731
    bases, paths, sums, transition, ignored = made
    found = []
    for held, scores in zip(paths, sums, strict=True):
        places, place = best_places(scores[:-1].T)
        heads = jax.vmap(lambda path, at: path.head(at))(first(held), places)
        path = last(held)
        strength = path.strength[place].astype(jnp.float32)
        found.append(
            Trial(path.head(place), strength, jax.vmap(lambda path: path.available)(held).all(), heads)
        )
    return FittedTrials(first(bases), found, None if transition is None else transition[-1], ignored[-1])


def _as_tree(path: Any) -> HeadPath:
    """A path that a loop may hand on: a pytree as it is, another with all its heads made."""
    leaves = jax.tree.leaves(path)
    if len(leaves) == 1 and leaves[0] is path:
        heads = jax.lax.map(path.head, jnp.arange(path.strength.shape[0], dtype=jnp.int32))
        return HeadStack(path.strength, heads, path.available)
    return path
