"""What labels may be, and what each kind means.

| `labels` | dtype, shape | a row that counts for nothing |
|---|---|---|
| class ids | any integer, `(n,)` | a negative id (unlabelled) |
| targets: soft, multi-label, regression | floating, `(n, l)` | NaN throughout (unlabelled) |
| candidate sets (partial labels) | `candidate_targets(mask)`, floating, `(n, l)` | an empty set |

`weights (n,)` go with every kind; a row of weight 0 counts for nothing, whatever it holds. A head with
one output, `(q, 1)`, takes targets `(n, 1)`. Class ids stand for one-hot rows, which are never built.

Rows that cannot be used are: an id of `l` or more, a NaN or infinite feature, a target row with some
(not all) entries NaN or any infinite, a negative or non-finite weight. Where values can be seen they
raise a `ValueError`; under `jit`, `vmap` and `grad` they count for nothing and are counted in `ignored`.
Likewise a bias `b` of `Y − b` must be finite; under `jit` an entry that is not counts as 0.
"""

from lip_jax.rows.labels import Rows, candidate_targets
from lip_jax.rows.metrics import Metrics, head_metrics

__all__ = ["Metrics", "Rows", "candidate_targets", "head_metrics"]
