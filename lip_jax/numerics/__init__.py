"""Numerics without a word of the domain: products, factorisations, rows in chunks, compensated sums."""
