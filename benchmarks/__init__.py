"""Commands that produce every table, figure and timing of this project from named data and fixed seeds."""

import os

# JAX's LAPACK on the CPU is SciPy's OpenBLAS. On matrices as small as heads its threads gain nothing, and
# beside XLA's own they wait for each other: an SVD then takes up to a hundred times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
