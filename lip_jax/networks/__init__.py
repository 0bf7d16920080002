"""A whole network: at which layer to repair it, and the repair of the head or of what is cut there."""

from lip_jax.networks.repair import Repaired, repair
from lip_jax.networks.report import RepairReport

__all__ = ["RepairReport", "Repaired", "repair"]
