"""Products, factorisations, chunks of rows and compensated sums."""
