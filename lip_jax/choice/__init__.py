"""The choice among methods, by evidence: nothing is taken that is not shown to be better."""

from lip_jax.choice.compare import DEFAULT_METHODS, Choice, select
from lip_jax.choice.imitation import Imitation
from lip_jax.choice.report import Selection, SelectionReport

__all__ = ["DEFAULT_METHODS", "Choice", "Imitation", "Selection", "SelectionReport", "select"]
