"""The array types of the public signatures: one name for one thing."""

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer, Num

Array = jax.Array | np.ndarray

Kernel = Float[Array, "q l"]

Bias = Float[Array, "l"]

Feats = Float[Array, "n q"]

Weights = Num[Array, "n"] | Bool[Array, "n"]

ClassIds = Integer[Array, "n"]

Targets = Float[Array, "n l"]

Labels = ClassIds | Targets

CandidateMask = Bool[Array, "n l"] | Num[Array, "n l"]

Scalar = float | int | np.floating | np.integer | Num[Array, ""]

Rank = int | np.integer | Integer[Array, ""]
