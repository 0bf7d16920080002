"""What `lip-jax demo` computes: LIP at every rank on real data, and how far label noise turned the head.

A `Case` holds two heads on the same frozen features, one trained on the given, partly wrong labels and one
on the clean labels. LIP refits the first from the given labels alone. The clean head and the test labels only
judge it. A case is a small CNN trained on digits (`digits_case`), or precomputed features from a file
(`features_case`):

| key of the `.npz` file | holds |
|---|---|
| `train_x`, `test_x` | features `(n, q)` and `(m, q)`, floating |
| `train_y`, `test_y` | clean class ids `(n,)` and `(m,)`, integer, from 0 |
| `train_y_noisy` (optional) | the given ids `(n,)`; without it symmetric noise is added to `train_y` |
| `kernel`, `bias` (optional) | a head `(q, l)`, `(l,)` trained on `train_y_noisy`; otherwise one is trained |
"""

from lip_jax.demo.data import Data, hold_out, load_digits, load_features
from lip_jax.demo.measure import Study, choose, study
from lip_jax.demo.training import Case, Training, digits_case, features_case

__all__ = [
    "Case",
    "Data",
    "Study",
    "Training",
    "choose",
    "digits_case",
    "features_case",
    "hold_out",
    "load_digits",
    "load_features",
    "study",
]
