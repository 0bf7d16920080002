"""Commands that produce every table, figure and timing of this project from named data and fixed seeds."""
