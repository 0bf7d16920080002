"""Checkpoints of every format: what is found in them, and what of them is written."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

import lip_jax
from lip_jax.commands.checkpoints import open_checkpoint, stored_head, write_head
from tests import zoo
from tests.commands.running import (
    TRAIN,
    as_npz,
    as_safetensors,
    changed,
    fails,
    from_npz,
    head_of,
    restored,
    rows,
    run,
    run_json,
)


def test_a_repaired_train_state_restores_into_its_own_type(folder, trained, tmp_path):
    out = tmp_path / "out"
    run("refine", folder / "state", "--feats", folder / "train.npz", "--rank", 5, "--out", out)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, trained.state)
    with ocp.StandardCheckpointer() as checkpointer:
        again = checkpointer.restore(out.absolute(), abstract)
    assert type(again) is type(trained.state)
    assert int(again.step) == 60
    np.testing.assert_array_equal(again.params["Dense_1"]["kernel"], head_of(out)[0])


def test_only_the_newest_step_of_a_manager_is_repaired_and_copied(folder, tmp_path):
    out = tmp_path / "out"
    result, _ = run_json(
        "refine",
        folder / "steps",
        "--feats",
        folder / "train.npz",
        "--rank",
        0,
        "--method",
        "calibrated",
        "--out",
        out,
    )
    assert result["head"] == "params/Dense_1/kernel"
    assert result["left_out"] == ["3"]
    with ocp.CheckpointManager(out) as manager:
        assert manager.all_steps() == [20]
        held = manager.restore(
            20, args=ocp.args.Composite(model=ocp.args.StandardRestore(), about=ocp.args.JsonRestore())
        )
    assert held["about"] == {"step": 20}
    kernel, bias = head_of(folder / "state")
    expected = lip_jax.refine_calibrated(kernel, *rows(folder / "train.npz"), 0, bias=bias)
    np.testing.assert_allclose(held["model"]["params"]["Dense_1"]["kernel"], expected.kernel, rtol=1e-6)
    names = changed(restored(folder / "steps/20/model"), restored(out / "20/model"))
    assert names == {"['params']['Dense_1']['kernel']", "['params']['Dense_1']['bias']"}


def test_nnx_state_restores_into_a_fresh_module_with_the_readout(folder, trained, tmp_path):
    out = tmp_path / "out"
    found, _ = run_json("readout", folder / "nnx", "--feats", folder / "nnx_train.npz", "--out", out)
    assert found["head"] == "head/kernel"
    before, after = restored(folder / "nnx"), restored(out)
    assert changed(before, after) == {"['head']['kernel']['value']", "['head']['bias']['value']"}
    feats, labels = rows(folder / "nnx_train.npz")
    head = {"kernel": before["['head']['kernel']['value']"], "bias": before["['head']['bias']['value']"]}
    expected = lip_jax.apply_readout({"head": head}, feats, labels)["head"]
    np.testing.assert_array_equal(after["['head']['kernel']['value']"], expected["kernel"])
    np.testing.assert_array_equal(after["['head']['bias']['value']"], expected["bias"])
    fresh = zoo.NnxClassifier(nnx.Rngs(1))
    with ocp.StandardCheckpointer() as checkpointer:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(fresh))
        nnx.update(fresh, checkpointer.restore(out.absolute(), abstract))
    fresh.eval()
    logits = feats @ expected["kernel"] + expected["bias"][None, :]
    np.testing.assert_allclose(fresh(trained.x[TRAIN]), logits, atol=1e-4)


def test_paths_through_parents_and_links_are_followed(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder / "state")
    monkeypatch.chdir(tmp_path / "link")
    for path in ("../nnx", tmp_path / "link"):
        run("diagnose", path, "--head", "head" if path == "../nnx" else "Dense_1")


def test_orbax_restores_a_head_of_zeros(folder, tmp_path):
    source = open_checkpoint(folder / "state")
    head = stored_head(source, "Dense_1", "q l", None, rows=None)
    zeros = jax.tree.map(np.zeros_like, head.tree)
    assert write_head(source, head, zeros, tmp_path / "out", force=False)
    assert not np.any(head_of(tmp_path / "out")[0])
    assert not np.any(head_of(tmp_path / "out")[1])


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
def test_only_the_kernel_changes_however_orbax_stores_arrays(options, folder, tmp_path):
    kernel, bias = (part.astype(ml_dtypes.bfloat16) for part in head_of(folder / "state"))
    tree = {
        "head": {"kernel": kernel, "bias": bias},
        "steps": 3,
        "none": None,
        "list": [np.ones(2), np.eye(2)],
    }
    ocp.PyTreeCheckpointer(**options).save(tmp_path / "in", tree)
    out = tmp_path / "out"
    run(
        "refine",
        tmp_path / "in",
        "--feats",
        folder / "train.npz",
        "--rank",
        3,
        "--head",
        "head",
        "--out",
        out,
    )
    before, after = restored(tmp_path / "in"), restored(out)
    assert changed(before, after) == {"['head']['kernel']"}
    expected = lip_jax.refine(kernel, *rows(folder / "train.npz"), 3)
    assert after["['head']['kernel']"].tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize(
    ("suffix", "write", "read"), [(".npz", as_npz, from_npz), (".safetensors", as_safetensors, load_file)]
)
@pytest.mark.parametrize(
    ("keys", "head", "layout"),
    [
        ("kernel bias", None, "q l"),
        ("params/net/head/kernel params/net/head/bias", None, "q l"),
        ("classifier.weight classifier.bias", "classifier", "l q"),
    ],
)
def test_a_readout_changes_only_the_head_in_a_file(suffix, write, read, keys, head, layout, folder, tmp_path):
    kernel, bias = (part.astype(np.float16) for part in head_of(folder / "state"))
    names = keys.split()
    arrays = {names[0]: kernel.T.copy() if layout == "l q" else kernel, names[1]: bias}
    arrays |= {
        names[0].replace("head", "body").replace("kernel", "other").replace("weight", "w"): np.arange(3)
    }
    source, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    write(source, arrays)
    options = ("--feats", folder / "train.npz", "--layout", layout, "--out", out)
    run("readout", source, *options, *(("--head", head) if head else ()))
    after = read(out)
    assert changed(arrays, after) == set(names)
    expected = lip_jax.apply_readout({"kernel": kernel, "bias": bias}, *rows(folder / "train.npz"))
    stored = after[names[0]].T if layout == "l q" else after[names[0]]
    np.testing.assert_array_equal(stored, expected["kernel"])
    np.testing.assert_array_equal(after[names[1]], expected["bias"])
    if suffix == ".safetensors":
        with safe_open(out, framework="numpy") as opened:
            assert opened.metadata() == {"by": "test"}


def test_a_bfloat16_kernel_in_safetensors_is_refitted_as_by_the_library(folder, tmp_path):
    kernel = head_of(folder / "state")[0].astype(ml_dtypes.bfloat16)
    as_safetensors(tmp_path / "in.safetensors", {"kernel": kernel})
    out = tmp_path / "out.safetensors"
    run("refine", tmp_path / "in.safetensors", "--feats", folder / "train.npz", "--rank", 2, "--out", out)
    expected = lip_jax.refine(kernel, *rows(folder / "train.npz"), 2)
    assert load_file(out)["kernel"].tobytes() == np.asarray(expected).tobytes()


def test_without_safetensors_it_says_what_to_install(folder, tmp_path, monkeypatch):
    as_safetensors(tmp_path / "in.safetensors", {"kernel": head_of(folder / "state")[0]})
    for module in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    message = fails("diagnose", tmp_path / "in.safetensors")
    assert "pip install 'lip_jax[cli]'" in message


def test_steps_saved_without_a_manager_are_steps(folder, trained, tmp_path):
    trees = {3: jax.tree.map(jnp.zeros_like, trained.state.params), 20: trained.state.params}
    with ocp.StandardCheckpointer() as checkpointer:
        for step, tree in trees.items():
            checkpointer.save(tmp_path / "run" / f"checkpoint_{step}", {"params": tree})
    out, options = tmp_path / "out", ("--feats", folder / "train.npz", "--rank", 3, "--out")
    text = run("refine", tmp_path / "run", *options, out).stdout
    assert f"differs from {tmp_path / 'run'}. Left out: its other steps, checkpoint_3." in text
    assert [path.name for path in out.iterdir()] == ["checkpoint_20"]
    expected = lip_jax.refine(trees[20]["Dense_1"]["kernel"], *rows(folder / "train.npz"), 3)
    np.testing.assert_array_equal(head_of(out / "checkpoint_20")[0], expected)


def test_numbered_items_of_one_checkpoint_are_no_steps(folder, trained, tmp_path):
    items = {name: ocp.args.StandardSave({"params": trained.state.params}) for name in ("net_1", "net_2")}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "run", ocp.args.Composite(**items))
    options = ("--feats", folder / "train.npz", "--head", "net_2/params/Dense_1", "--out", tmp_path / "out")
    assert run_json("readout", tmp_path / "run", *options)[0]["left_out"] == []
    before, after = (restored(path / "net_1") for path in (tmp_path / "run", tmp_path / "out"))
    assert changed(before, after) == set()
    assert changed(before, restored(tmp_path / "out" / "net_2"))


class Wrapped(nn.Module):
    """A head whose kernel a wrapper of linen normalises."""

    wrapper: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        options = {"update_stats": True} if self.wrapper is nn.SpectralNorm else {}
        return self.wrapper(nn.Dense(10))(x, **options)


def linear():
    return nnx.Linear(32, 10, rngs=nnx.Rngs(0))


def linen_wrapped(wrapper):
    return Wrapped(wrapper).init(jax.random.key(0), jnp.ones((2, 32)))


def nnx_wrapped(wrapper):
    module = wrapper(linear(), rngs=nnx.Rngs(0))
    module(jnp.ones((2, 32)))
    return nnx.state({"head": module})


ALTERED = {
    "linen WeightNorm": (lambda: linen_wrapped(nn.WeightNorm), "kernel/scale rescales it"),
    "linen SpectralNorm": (lambda: linen_wrapped(nn.SpectralNorm), "kernel/sigma rescales it"),
    "nnx LoRALinear": (
        lambda: nnx.state(nnx.LoRALinear(32, 10, lora_rank=2, rngs=nnx.Rngs(0))),
        "lora_a adds to it",
    ),
    "nnx LoRA": (
        lambda: nnx.state(nnx.LoRA(32, 2, 10, base_module=linear(), rngs=nnx.Rngs(0))),
        "lora_a adds to it",
    ),
    "nnx WeightNorm": (lambda: nnx_wrapped(nnx.WeightNorm), "normalises it"),
    "nnx SpectralNorm": (lambda: nnx_wrapped(nnx.SpectralNorm), "normalises it"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALTERED)
def test_a_kernel_that_the_model_does_not_multiply_by_is_refused(name, folder, tmp_path):
    make, words = ALTERED[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tree = make()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", tree)
    options = ("--feats", folder / "train.npz", "--out", tmp_path / "out")
    message = fails("readout", tmp_path / "in", *options)
    assert "is not what the model multiplies by" in message
    assert words in message


@pytest.mark.filterwarnings("ignore")
def test_a_rescaled_kernel_is_refused_in_a_file_of_flat_keys_too(folder, tmp_path):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        leaves = jax.tree_util.tree_leaves_with_path(linen_wrapped(nn.SpectralNorm))
    flat = {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}
    np.savez(tmp_path / "flat.npz", **flat)
    options = ("--feats", folder / "train.npz", "--out", tmp_path / "out.npz")
    assert "kernel/sigma rescales it" in fails("readout", tmp_path / "flat.npz", *options)


def test_scalars_are_not_listed_as_possible_heads(tmp_path):
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"temperature": jnp.float32(2), "scale": np.ones(3)})
    message = fails("diagnose", tmp_path / "in")
    assert "scale: float64[3]" in message
    assert "temperature" not in message
