"""Every array function lowers for CPU, CUDA and TPU (lowered, not run), and rows may be sharded."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import export

import lip_jax
from lip_jax.sums.tail import PROBES
from tests.test_contract import CASES, cast

PLATFORMS = ("cpu", "cuda", "tpu")
SHARDED = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import lip_jax

assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
kernel = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
feats = jnp.asarray(rng.normal(size=(64, 6)), jnp.float32)
labels = jnp.asarray(rng.integers(-1, 4, 64), jnp.int32)
weights = jnp.asarray(rng.random(64), jnp.float32)
mesh = Mesh(np.array(jax.devices()), ("rows",))
over_rows, everywhere = NamedSharding(mesh, P("rows")), NamedSharding(mesh, P())

def refine(kernel, feats, labels, weights):
    return lip_jax.refine(kernel, feats, labels, 1, weights=weights, ridge=0.5)

single = refine(kernel, feats, labels, weights)
rows = jax.device_put((feats, labels, weights), over_rows)
for sharded in (refine(kernel, *rows), jax.jit(refine)(jax.device_put(kernel, everywhere), *rows)):
    np.testing.assert_allclose(sharded, single, rtol=1e-5, atol=1e-6)
    assert sharded.sharding.is_fully_replicated
text = jax.jit(refine).lower(jax.device_put(kernel, everywhere), *rows).compile().as_text()
assert "all-reduce" in text and "f32[64,6]" not in text, "the rows were gathered"
# One row that no device but its own sees is still found and named.
try:
    refine(kernel, rows[0], rows[1].at[37].set(9), rows[2])
except ValueError as error:
    assert "got 9 at row 37" in str(error), error
else:
    raise AssertionError("the bad row went unnoticed")
"""


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_every_platform(name):
    function, arguments = CASES[name][:2]
    specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in cast(arguments, "float32")]
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*specs)
    assert exported.platforms == PLATFORMS
    for platform in PLATFORMS:
        assert export.export(jax.jit(function), platforms=[platform])(*specs).platforms == (platform,)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_products_of_the_refit_are_lowered_at_full_precision(platform):
    function, arguments = CASES["refine"][:2]
    specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in cast(arguments, "float32")]
    text = export.export(jax.jit(function), platforms=[platform])(*specs).mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line and "12x6" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_each_platform_gets_its_own_chunks_and_products(platform):
    # On the CPU 25 chunks of 2,000 rows, columns in blocks of 64 unless rows are looked through for unusable
    # ones. On accelerators all rows and columns at once.
    n, q, l = 50_000, 1_030, 70
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((q, l), (n, q))]
    specs.append(jax.ShapeDtypeStruct((n,), jnp.int32))
    refine = jax.jit(lambda kernel, feats, labels: lip_jax.refine(kernel, feats, labels, 0))
    text = export.export(refine, platforms=[platform])(*specs).mlir_module()
    products = re.findall(rf"dot_general.*tensor<(\d+)x{q}xf32>, tensor<{q}x(\d+)xf32>", text)
    on_cpu = {(2_000, 64), (2_000, l + PROBES - 64), (2_000, l + PROBES)}
    expected = on_cpu if platform == "cpu" else {(n, l + PROBES)}
    assert {(int(rows), int(columns)) for rows, columns in products} - {(l, l)} == expected


def test_rows_sharded_over_eight_devices_give_the_single_device_result():
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
