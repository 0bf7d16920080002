"""Eight devices: one answer, and what travels between them does not grow with the rows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import lip_jax
from lip_jax.sums import moments, tail
from lip_jax.rows import Rows

assert len(jax.devices()) == 8
n, q, l = 4096, 12, 10
rng = np.random.default_rng(0)
feats = rng.normal(size=(n, q)).astype(np.float32) + 20
labels = rng.integers(-1, l, n).astype(np.int32)
targets = rng.dirichlet(np.ones(l), n).astype(np.float32)
weights = rng.random(n).astype(np.float32)
kernel = jnp.asarray(rng.normal(size=(q, l)), jnp.float32)
split = lip_jax.svd_split(kernel, 0)
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
over_rows, over_classes = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "model"))
over_all = NamedSharding(mesh, P(("data", "model")))
ITEM = {"f32": 4, "s32": 4, "pred": 1, "u32": 4}


def moved(compiled):
    # The bytes that collectives of a program yield on one device.
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})", compiled)
    shapes = [shape for text, _ in found for shape in re.findall(r"(\\w+)\\[([\\d,]*)\\]", text)]
    return sum(ITEM[kind] * int(np.prod([int(d) for d in dims.split(",") if d])) for kind, dims in shapes)


accumulators = {"moments": lip_jax.moment_accumulator(q, l), "tail": lip_jax.tail_accumulator(split)}
for given in (labels, targets):
    for name, held in accumulators.items():
        single = held.update(held.init(), feats, given, weights)
        for sharding in (over_rows, over_all):
            rows = jax.device_put((feats, given, weights), sharding)
            spread = held.update(held.init(), *rows)
            a, b = (lip_jax.refine_from(kernel, s, 1, split=held.split) for s in (single, spread))
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
            if name == "moments":
                compiled = moments._updated.lower(held.init(), Rows(*rows)).compile().as_text()
                bound = 4 * 3 * (q * q + q * l) + 256 * 4 * (q + l)
            else:
                update = tail.updated.lower(held.init(), split.u, split.vt, Rows(*rows))
                compiled = update.compile().as_text()
                # Twice, for the branch that looks for rows which cannot be used, and 256 rows for the origin.
                bound = 4 * 64 * q + 256 * 4 * (q + l)
            print(name, given.ndim, sharding.spec, moved(compiled), "bytes")
            assert 0 < moved(compiled) < bound < feats.nbytes / 4, (name, moved(compiled), bound)

# Batches from an iterator, spread as they come, the last one short.
batches = [(feats[i : i + 1000], labels[i : i + 1000], weights[i : i + 1000]) for i in range(0, n, 1000)]
streamed = lip_jax.accumulate(accumulators["moments"], batches, sharding=over_rows)
held = accumulators["moments"]
single = held.update(held.init(), feats, labels, weights)
a, b = (lip_jax.refine_from(kernel, s, 1) for s in (single, streamed))
np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

# A head spread over its classes comes back as it was spread.
rows = jax.device_put((feats, labels), over_rows)
wide = jax.device_put(kernel, over_classes)
expected = lip_jax.refine(kernel, feats, labels, 1)
for refine in (lip_jax.refine, jax.jit(lip_jax.refine, static_argnames="rank")):
    found = refine(wide, *rows, rank=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
params = {"head": {"kernel": wide, "bias": jax.device_put(jnp.zeros(l), NamedSharding(mesh, P("model")))}}
repaired = lip_jax.apply(params, *rows, rank=1)
assert repaired["head"]["kernel"].sharding == over_classes, repaired["head"]["kernel"].sharding
from_moments = lip_jax.apply_from(params, single, method=lip_jax.Calibrated(rank=1))
for name in ("kernel", "bias"):
    assert from_moments["head"][name].sharding == params["head"][name].sharding
np.testing.assert_allclose(
    lip_jax.refine_from(wide, single, 1), lip_jax.refine_from(kernel, single, 1), rtol=1e-4, atol=1e-5
)
"""


CHUNKS = """
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import lip_jax
from lip_jax.methods.logistic import fit_logistic
from lip_jax.numerics import chunks
from lip_jax.rows import Rows
from lip_jax.sums import moments, tail
from lip_jax.sums.ridge import ridge_factors

assert len(jax.devices()) == 8
chunks.CHUNK_ROWS = tail.CPU_CHUNK_ROWS = 64
n, q, l = 8 * 2000, 24, 10
rng = np.random.default_rng(0)
kernel = jnp.asarray(rng.normal(size=(q, l)), jnp.float32)
rows = (
    jnp.asarray(rng.normal(size=(n, q)), jnp.float32),
    jnp.asarray(rng.integers(-1, l, n), jnp.int32),
    jnp.asarray(rng.random(n), jnp.float32),
)


def logistic(feats, labels, weights):
    factors = ridge_factors(feats, labels, weights, l, intercept=True)
    return fit_logistic(factors, Rows(feats, labels, weights), 1.0, None, 1e-3, 30, intercept=True).kernel


function = {
    "refine": lambda x, y, w: lip_jax.refine(kernel, x, y, 2, weights=w),
    "calibrated": lambda x, y, w: lip_jax.refine_calibrated(kernel, x, y, 2, bias=None, weights=w).kernel,
    "moments": lambda x, y, w: moments.moments_of(Rows(x, y, w), l, jnp.float32).gram,
    "left_out": lambda x, y, w: lip_jax.leave_one_out_scores(x, y, num_classes=l, weights=w),
    "logistic": logistic,
    "quality": lambda x, y, w: lip_jax.label_quality(x, y, num_classes=l, weights=w).trust,
}[sys.argv[1]]
local = jax.jit(function).lower(*rows).compile()
expected = local(*rows)
# The judgement of labels keeps scores and results of all rows.
held = local.memory_analysis().temp_size_in_bytes
assert sys.argv[1] == "quality" or held < 1.2 * rows[0].nbytes, "rows are not cut into chunks"
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
for axes in ("data", ("data", "model")):
    spread = jax.device_put(rows, NamedSharding(mesh, P(axes)))
    compiled = jax.jit(function).lower(*spread).compile()
    for gathering in ("all-gather", "all-to-all", "collective-permute"):
        assert not re.search(rf"= .* {gathering}(-start)?\\(", compiled.as_text()), gathering
    reduced = re.findall(r"= (.*?) all-reduce", compiled.as_text())
    rows_reduced = {int(size) for text in reduced for size in re.findall(r"\\[(\\d+)", text)}
    # Samples of 256 and 2,000 rows, and sums.
    assert max(rows_reduced) <= 2000, rows_reduced
    np.testing.assert_allclose(compiled(*spread), expected, rtol=1e-3, atol=1e-3)
"""


def on_eight_devices(*arguments):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_eight_devices_give_the_answer_of_one_and_move_no_rows():
    assert len(re.findall(r"bytes", on_eight_devices(PROGRAM))) == 8


@pytest.mark.parametrize("name", ["refine", "calibrated", "moments", "left_out", "logistic", "quality"])
def test_rows_are_cut_into_chunks_where_they_lie(name):
    on_eight_devices(CHUNKS, name)
