"""Importing the package, and using its matrix level, loads JAX, NumPy and jaxtyping only."""

import subprocess
import sys

HEAVY = ("flax", "optax", "chex", "orbax", "matplotlib", "rich", "typer", "sklearn", "beartype")
MATRIX_LEVEL = """
import jax.numpy as jnp
import lip_jax

kernel = jnp.diag(jnp.array([3.0, 2.0]))
refined = lip_jax.refine(kernel, jnp.eye(2), jnp.array([0, 1]), rank=1)
assert refined.tolist() == [[3.0, 0.0], [0.0, 1.0]], refined
assert float(lip_jax.bounds.wedin_bound(kernel, refined, 1).value) == 0.5
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_matrix_level_loads_no_optional_dependency():
    report = f"import sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    assert run(MATRIX_LEVEL + report) == []


def test_matrix_level_works_where_optional_dependencies_are_not_installed():
    # None in sys.modules makes an import of that name fail.
    block = f"import sys\nsys.modules.update(dict.fromkeys({HEAVY}))\n"
    assert run(block + MATRIX_LEVEL + "print('done')") == ["done"]
