# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
"""# Many devices, one answer.

Features spread over the devices of a mesh, a head spread over its classes: `lip_jax` takes both as they
are. Only sums travel between devices, never rows, and a repaired head lies where the old one lay. Every
result here is held against that of one device.

On a TPU or several GPUs this runs on those. Anywhere else the CPU is made to look like eight devices: that
shows what is computed where, and nothing about speed.
"""

# %%
import importlib.util

if importlib.util.find_spec("lip_jax") is None:  # on Colab; instead of the name, the path of a wheel will do
    get_ipython().run_line_magic("pip", "install --quiet 'lip_jax[demo]'")

# %%
import os

# Before JAX is imported. It concerns the CPU alone: where there are accelerators, they are used as they are.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import lip_jax

EPOCHS = 10 if os.environ.get("LIP_JAX_SMALL") else 40  # fewer for tests
print(f"jax {jax.__version__}, {jax.device_count()} devices: {jax.devices()[0].platform}")

# %% [markdown]
"""
## A mesh

Rows of data are split along `data`, classes of the head along `model`. With one device alone both are 1,
and all below still holds.
"""

# %%
model_axis = 2 if jax.device_count() % 2 == 0 else 1
mesh = jax.make_mesh(
    (jax.device_count() // model_axis, model_axis),
    ("data", "model"),
    axis_types=(AxisType.Auto, AxisType.Auto),
)
over_rows = NamedSharding(mesh, PartitionSpec("data"))
over_classes = NamedSharding(mesh, PartitionSpec(None, "model"))
over_bias = NamedSharding(mesh, PartitionSpec("model"))
everywhere = NamedSharding(mesh, PartitionSpec())
print(mesh)

# %% [markdown]
"""
## A network trained on the mesh

Digits, some 40% of their labels wrong. Batches are spread over `data`, the head over `model`; XLA inserts
what has to travel. On a TPU or a recent GPU JAX multiplies float32 in lower precision unless told
otherwise. `lip_jax` does not in its own sums; for the network, the setting below asks for full precision,
so that the comparisons at the end are about devices and not about rounding.
"""

# %%
jax.config.update("jax_default_matmul_precision", "highest")

images, true = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(true))[:1792]  # a multiple of many numbers of devices
images, true = (images[order] / 16).astype(np.float32), true[order].astype(np.int32)
given = np.asarray(lip_jax.noise.symmetric(jax.random.key(0), true, 0.4, num_classes=10))
train, test = slice(0, 1280), slice(1280, None)

model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
optimizer = optax.adam(2e-3)


def placed(params):
    """The head over its classes, all else on every device."""
    head = jax.device_put(params["layers_4"], {"kernel": over_classes, "bias": over_bias})
    return jax.device_put(params, everywhere) | {"layers_4": head}


@jax.jit
def train_step(params, state, x, y):
    """One step of Adam on the mean cross-entropy."""

    def loss(params):
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


params = placed(jax.jit(model.init)(jax.random.key(0), images[:1])["params"])
state = optimizer.init(params)
rng = np.random.default_rng(0)
for _ in range(EPOCHS):
    for rows in rng.permutation(1280).reshape(-1, 64):
        batch = jax.device_put((images[rows], given[rows]), over_rows)
        # One at a time: with many steps queued, eight devices on a few cores can wait for each other.
        params, state = jax.block_until_ready(train_step(params, state, *batch))

jax.debug.visualize_array_sharding(params["layers_4"]["kernel"])

# %% [markdown]
"""
The picture shows which devices hold which columns of the head's kernel (64 features down, 10 classes
across).

## The repair, in place

The features are computed where the images lie, and stay there.
"""

# %%
x, y = jax.device_put((images[train], given[train]), over_rows)
feats = jax.jit(lambda x: lip_jax.capture_features(model, params, x, head="layers_4"))(x)
jax.debug.visualize_array_sharding(feats)

repaired = lip_jax.apply(params, feats, y, method=lip_jax.Calibrated(rank=7), head="layers_4")
for name in ("kernel", "bias"):
    before, after = params["layers_4"][name].sharding, repaired["layers_4"][name].sharding
    print(f"{name:7} {before.spec} before, {after.spec} after")
    assert before == after

# %% [markdown]
"""
## The same as on one device
"""

# %%
one = jax.devices()[0]
params_one, feats_one, y_one = jax.device_put((params, feats, y), one)


def compare(what, many, single):
    """Hold a result of all devices against that of one."""
    many, single = np.asarray(many), np.asarray(single)
    difference = np.abs(many - single).max() / np.abs(single).max()
    print(f"{what:34} largest difference {difference:.1e} of the largest entry")
    np.testing.assert_allclose(many, single, atol=1e-3 * np.abs(single).max())


kernel, kernel_one = params["layers_4"]["kernel"], params_one["layers_4"]["kernel"]
single = lip_jax.apply(params_one, feats_one, y_one, method=lip_jax.Calibrated(rank=7), head="layers_4")
compare("calibrated refit, kernel", repaired["layers_4"]["kernel"], single["layers_4"]["kernel"])
compare("calibrated refit, bias", repaired["layers_4"]["bias"], single["layers_4"]["bias"])

refine = jax.jit(lip_jax.refine)
compare(
    "published refit under jit", refine(kernel, feats, y, 7), lip_jax.refine(kernel_one, feats_one, y_one, 7)
)

readout, readout_one = lip_jax.linear_readout(feats, y), lip_jax.linear_readout(feats_one, y_one)
compare("ridge readout", readout.kernel, readout_one.kernel)

# %% [markdown]
"""
The differences are rounding: sums over devices add in another order.

## Streamed

`accumulate` spreads batches that come from anywhere, `sharding=` says how; the last one is short and is
padded. Each batch is forgotten once its sums are taken, and the sums serve every refit and readout.
"""

# %%
batches = [(images[train][i : i + 200], given[train][i : i + 200]) for i in range(0, 1280, 200)]
streamed = lip_jax.accumulate(
    lip_jax.moment_accumulator(q=64, l=10),
    lip_jax.feature_batches(model, params, batches, head="layers_4", sharding=over_rows),
)
from_sums = lip_jax.apply_from(params, streamed, method=lip_jax.Calibrated(rank=7), head="layers_4")
compare("calibrated refit from sums", from_sums["layers_4"]["kernel"], single["layers_4"]["kernel"])
assert from_sums["layers_4"]["kernel"].sharding == over_classes

# %% [markdown]
"""
The head that came from the sums lies over its classes again. Over several *hosts* every process passes its
own share of the data to the same call: `multihost.py` in this folder is a whole program, and the guide to
scale in the documentation tells the rest.

Was the repair any good? This notebook is not about that, but honesty asks for the line; the others of this
folder look into it.
"""

# %%
for name, found in {"as trained": params, "calibrated refit at rank 7": repaired}.items():
    logits = jax.jit(model.apply)({"params": found}, images[test])
    print(f"{name:28} {np.mean(logits.argmax(axis=1) == true[test]):.1%} of the clean test labels")
