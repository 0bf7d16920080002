"""Kinds of labels, and which rows count.

| `labels` | dtype, shape | a row that counts for nothing |
|---|---|---|
| class ids | any integer, `(n,)` | a negative id (unlabelled) |
| targets: soft, multi-label, regression | floating, `(n, l)` | NaN throughout (unlabelled) |
| candidate sets (partial labels) | `candidate_targets(mask)`, floating, `(n, l)` | an empty set |

`weights (n,)` go with every kind; a row of weight 0 counts for nothing, whatever it holds. A head with
one output, `(q, 1)`, takes targets `(n, 1)`. Class ids stand for one-hot rows, which are never built.

A row cannot be used if its id is `l` or more, a feature is NaN or infinite, its targets are partly NaN or
infinite, or its weight is negative or not finite. Where values can be seen, such a row raises a `ValueError`.
Under `jit`, `vmap` and `grad` it counts for nothing and is counted in `ignored`. A bias `b` of `Y − b` must
be finite; under `jit` other entries count as 0.
"""

from lip_jax.rows.labels import Rows, candidate_targets
from lip_jax.rows.metrics import Metrics, head_metrics

__all__ = ["Metrics", "Rows", "candidate_targets", "head_metrics"]
