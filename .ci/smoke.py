"""What an installation without extras must be able to do, run where the sources are not."""

from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp

import lip_jax

assert version("lip_jax") == lip_jax.__version__
assert (Path(lip_jax.__file__).parent / "py.typed").is_file()
refined = lip_jax.refine(jnp.diag(jnp.array([3.0, 2.0])), jnp.eye(2), jnp.array([0, 1]), rank=1)
assert jnp.allclose(refined, jnp.diag(jnp.array([3.0, 1.0])))
