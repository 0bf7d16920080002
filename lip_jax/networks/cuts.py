"""Readouts of earlier layers, each held against the head as it came and as it was repaired."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lip_jax.choice.compare import Choice, Decision, tried_by, tried_within
from lip_jax.choice.evidence import SUPPORT, noise_losses, out_of_fold, scale_of
from lip_jax.choice.judge import Case, Evidence, Rule, Standard, weigh
from lip_jax.methods.protocol import Head
from lip_jax.rows.labels import Rows

# Better than the head as it came, a cut does no harm. Better than its repair it must be, but not so surely.
NO_HAIR = 1.0


class Cuts(NamedTuple):
    """The readouts of one layer, one for each method: as stored, and what the rows say of them.

    `evidence` is against the head as it came, `over` against what was taken in its place.
    """

    head: Head
    strength: jax.Array
    available: jax.Array
    evidence: Evidence
    over: Evidence


def weigh_cuts(
    rows: Rows, val_feats: jax.Array | None, decision: Decision, choice: Choice, level: float
) -> Cuts:
    """Readouts of one layer, against the head as it came and as it was repaired, on the same rows.

    Args:
        rows: Features of the layer `(n, q)`, labels and weights.
        val_feats: Those of the validation rows `(m, q)`, or None where all rows judge.
        decision: What was decided of the head, with the logits that were compared.
        choice: The readouts to try.
        level: How many standard errors to ask for.
    """
    source = decision.selection.report.source
    rule = Rule(choice.metric, level, SUPPORT[source])
    if val_feats is None or decision.val is None:
        return _weigh_within(rows, decision.first, decision.standards, choice, rule)
    val = decision.val._replace(feats=val_feats)
    return _weigh_by(rows, val, decision.first, decision.standards, choice, rule, also=decision.also)


@partial(jax.jit, static_argnames=("choice", "rule", "also"))
def _weigh_by(
    rows: Rows,
    val: Rows,
    first: jax.Array | None,
    standards: tuple[Standard, Standard],
    choice: Choice,
    rule: Rule,
    *,
    also: bool,
) -> Cuts:
    case, _ = tried_by(_nothing(rows, standards[0]), rows, val, first, choice, also=also)
    return _weighed(case, standards, rule)


@partial(jax.jit, static_argnames=("choice", "rule"))
def _weigh_within(
    rows: Rows, first: jax.Array | None, standards: tuple[Standard, Standard], choice: Choice, rule: Rule
) -> Cuts:
    case, _ = tried_within(_nothing(rows, standards[0]), rows, first, choice, "unseen rows", None)
    return _weighed(case, standards, rule)


def _nothing(rows: Rows, standard: Standard) -> Head:
    """A head of zeros: a readout has no head to start from at this layer."""
    q, l = rows.feats.shape[1], standard.logits.shape[1]
    return Head(jnp.zeros((q, l), standard.logits.dtype), jnp.zeros(l, standard.logits.dtype))


def _weighed(case: Case, standards: tuple[Standard, Standard], rule: Rule) -> Cuts:
    came, taken = standards
    better = Rule(rule.metric, NO_HAIR, 0.0)

    def of_one(part: tuple) -> Cuts:
        trial, known = part
        logits = out_of_fold(trial.heads, case.folded)
        scale = scale_of(logits, came.rows, came.transition)
        logits = scale * logits
        losses = noise_losses(logits, came.rows.labels, came.transition)
        evidence, over = weigh(logits, losses, came, rule), weigh(logits, losses, taken, better)
        # Nothing of the head is left to which a class that cannot be judged could be left.
        available = trial.available & known.all() & jnp.isfinite(logits).all()
        # The two are one where the head stays as it came.
        stays = (logits.shape[0] > 0) & jnp.array_equal(taken.losses, came.losses)
        passes = evidence.passes & (over.passes | stays) & available
        head = jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), trial.head)
        return Cuts(head, trial.strength, available, evidence._replace(passes=passes), over)

    return jax.lax.map(of_one, (case.trials, case.known))
