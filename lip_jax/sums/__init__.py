"""Sums of fixed size over rows: moments, their accumulators, and the factors of ridge readouts."""

from lip_jax.sums.moments import Accumulator, Moments, moment_accumulator, tail_accumulator
from lip_jax.sums.tail import TailMoments

__all__ = ["Accumulator", "Moments", "TailMoments", "moment_accumulator", "tail_accumulator"]
