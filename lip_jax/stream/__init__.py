"""One pass over data of any size: sources of batches, the pass, its checkpoints and processes."""

from lip_jax.stream.batches import array_batches, shard_batches
from lip_jax.stream.features import feature_batches
from lip_jax.stream.one_pass import accumulate

__all__ = ["accumulate", "array_batches", "feature_batches", "shard_batches"]
