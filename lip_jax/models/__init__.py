"""Models: the head inside a parameter tree, the features before it, and networks cut short.

A tree may be a linen `params` dict, a whole variables dict `{"params": …, "batch_stats": …}` (only its
parameters are searched), a `FrozenDict`, an `nnx.State`, an `nnx.Module`, or any pytree whose keys spell a
path such as `params/Dense_2/kernel`. What comes back has the same structure, types, dtypes and sharding, and
shares every leaf but the head's.
"""

from lip_jax.models.capture import capture_features, capture_layers
from lip_jax.models.layers import PredictivePower, predictive_power
from lip_jax.models.transform import (
    HeadReport,
    apply,
    apply_from,
    apply_readout,
    apply_with_report,
    replace_head,
)
from lip_jax.models.truncate import Truncated, truncate_at

__all__ = [
    "HeadReport",
    "PredictivePower",
    "Truncated",
    "apply",
    "apply_from",
    "apply_readout",
    "apply_with_report",
    "capture_features",
    "capture_layers",
    "predictive_power",
    "replace_head",
    "truncate_at",
]
