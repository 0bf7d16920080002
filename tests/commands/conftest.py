"""Checkpoints of two trained networks, which the tests of the commands share."""

from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state

import lip_jax
from tests import zoo
from tests.commands.running import HELD, TEST, TRAIN


class Mlp(nn.Module):
    """A dense layer and the head's."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class Trained(NamedTuple):
    """Two networks, the data, and what their heads see."""

    state: train_state.TrainState
    module: nnx.Module
    x: jax.Array
    given: jax.Array
    clean: jax.Array
    feats: jax.Array
    nnx_feats: jax.Array


@pytest.fixture(scope="session")
def trained():
    """A linen and an nnx network trained on digits with 40% wrong labels, and what their heads see."""
    x, clean = zoo.digits()
    order = np.random.default_rng(0).permutation(len(clean))
    x, clean = x[order], clean[order]
    given = lip_jax.noise.symmetric(jax.random.key(0), clean, 0.4, num_classes=10)
    model = Mlp()
    state, _ = zoo.train_linen(model, x[TRAIN], given[TRAIN])
    module = zoo.train_nnx(zoo.NnxClassifier(nnx.Rngs(0)), x[TRAIN], given[TRAIN], steps=20)
    feats = lip_jax.capture_features(model, state.params, x, head="Dense_1")
    nnx_feats = lip_jax.capture_features(module, None, x, head="head")
    return Trained(state, module, x, given, clean, feats, nnx_feats)


@pytest.fixture(scope="session")
def folder(trained, tmp_path_factory):
    """Checkpoints of two networks trained on digits with 40% wrong labels, and their features in files."""
    folder = tmp_path_factory.mktemp("runs")
    feats, given, clean = trained.feats, trained.given, trained.clean
    readout = lip_jax.linear_readout(feats[TRAIN], clean[TRAIN])
    clean_head = {"kernel": readout.kernel, "bias": readout.bias}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", trained.state)
        checkpointer.save(folder / "clean", {"params": {"Dense_1": clean_head}})
        checkpointer.save(folder / "nnx", nnx.state(trained.module))
    with ocp.CheckpointManager(folder / "steps") as manager:
        for step in (3, 20):
            tree = {"params": jax.tree.map(lambda leaf, step=step: leaf * (step == 20), trained.state.params)}
            manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(tree), about=ocp.args.JsonSave({"step": step})
                ),
            )
    for name, part in {"train": TRAIN, "held": HELD, "test": TEST}.items():
        labels = (clean if name == "test" else given)[part]
        np.savez(folder / f"{name}.npz", feats=feats[part], labels=labels)
    np.savez(folder / "nnx_train.npz", feats=trained.nnx_feats[TRAIN], labels=given[TRAIN])
    np.save(folder / "feats.npy", feats[TRAIN])
    np.save(folder / "labels.npy", given[TRAIN])
    np.save(folder / "clean_labels.npy", clean[TRAIN])
    np.savez(folder / "head.npz", **trained.state.params["Dense_1"])
    return folder
