"""The commands on real checkpoints: they write what the library computes, and leave all else as it was."""

import base64
import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.image
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import lip_jax
from lip_jax.commands import app
from lip_jax.commands.checkpoints import open_checkpoint, stored_head, write_head
from lip_jax.commands.files import written_whole
from tests import zoo

TRAIN, HELD, TEST = slice(0, 1000), slice(1000, 1400), slice(1400, None)
COMMANDS = ("diagnose", "refine", "purify", "readout")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run_json(*arguments):
    result = run(*arguments, "--json")
    return json.loads(result.stdout), result.stderr


def fails(command, *arguments):
    """The sentence on stderr of a command that cannot go on."""
    result = run(command, *arguments, code=2)
    assert result.stderr.startswith(f"lip-jax {command}: "), result.output
    assert result.stdout == ""
    assert "Traceback" not in result.output
    return result.stderr


class Mlp(nn.Module):
    """A dense layer and the head's."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def restored(path):
    """Every array of an orbax checkpoint by its path, as NumPy."""
    handler = ocp.PyTreeCheckpointHandler()
    args = ocp.checkpoint_utils.construct_restore_args(handler.metadata(path.absolute()).tree)
    args = jax.tree.map(lambda arg: ocp.RestoreArgs(restore_type=np.ndarray), args)
    tree = handler.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=args))
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}


def changed(before, after):
    """Names of the arrays that differ in any byte."""
    assert before.keys() == after.keys()
    assert all(np.asarray(before[name]).dtype == np.asarray(after[name]).dtype for name in before)
    return {
        name for name in before if np.asarray(before[name]).tobytes() != np.asarray(after[name]).tobytes()
    }


class Trained(NamedTuple):
    """What there is before anything is saved."""

    state: train_state.TrainState
    module: nnx.Module
    x: jax.Array
    given: jax.Array
    clean: jax.Array
    feats: jax.Array
    nnx_feats: jax.Array


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


def rows(path):
    with np.load(path) as held:
        return held["feats"], held["labels"]


def head_of(path, module="['params']['Dense_1']"):
    arrays = restored(path)
    return arrays[module + "['kernel']"], arrays[module + "['bias']"]


def test_a_refit_of_a_train_state_changes_the_kernel_of_its_head_and_no_other_byte(folder, tmp_path):
    out = tmp_path / "out"
    result = run("refine", folder / "state", "--feats", folder / "train.npz", "--rank", 5, "--out", out)
    before, after = restored(folder / "state"), restored(out)
    assert changed(before, after) == {"['params']['Dense_1']['kernel']"}
    expected = lip_jax.refine(before["['params']['Dense_1']['kernel']"], *rows(folder / "train.npz"), 5)
    np.testing.assert_array_equal(after["['params']['Dense_1']['kernel']"], expected)
    assert "5 of 10 components preserved" in result.stdout
    assert f"Written: {out}; only the head params/Dense_1/kernel differs" in result.stdout
    assert any("mu" in name and "Dense_1" in name for name in before), "the optimiser's state is there"


def test_what_was_written_restores_into_the_model(folder, trained, tmp_path):
    out = tmp_path / "out"
    run("refine", folder / "state", "--feats", folder / "train.npz", "--rank", 5, "--out", out)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, trained.state)
    with ocp.StandardCheckpointer() as checkpointer:
        again = checkpointer.restore(out.absolute(), abstract)
    assert type(again) is type(trained.state)
    assert int(again.step) == 60
    np.testing.assert_array_equal(again.params["Dense_1"]["kernel"], head_of(out)[0])


def test_the_newest_step_of_a_manager_is_repaired_and_the_rest_of_it_copied(folder, tmp_path):
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
    expected = lip_jax.refine_calibrated(*head_of(folder / "state"), *rows(folder / "train.npz"), 0)
    np.testing.assert_allclose(held["model"]["params"]["Dense_1"]["kernel"], expected.kernel, rtol=1e-6)
    names = changed(restored(folder / "steps/20/model"), restored(out / "20/model"))
    assert names == {"['params']['Dense_1']['kernel']", "['params']['Dense_1']['bias']"}


def test_nnx_state_with_its_random_keys(folder, trained, tmp_path):
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


def test_paths_may_lead_through_parents_and_links(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder / "state")
    monkeypatch.chdir(tmp_path / "link")
    for path in ("../nnx", tmp_path / "link"):
        run("diagnose", path, "--head", "head" if path == "../nnx" else "Dense_1")


def test_zeros_are_written_so_that_orbax_finds_them(folder, tmp_path):
    source = open_checkpoint(folder / "state")
    head = stored_head(source, "Dense_1", "q l", None, rows=None)
    zeros = jax.tree.map(np.zeros_like, head.tree)
    assert write_head(source, head, zeros, tmp_path / "out", force=False)
    assert not np.any(head_of(tmp_path / "out")[0])
    assert not np.any(head_of(tmp_path / "out")[1])


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
def test_however_orbax_stores_arrays(options, folder, tmp_path):
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


def test_selection_by_validation_is_that_of_the_library(folder, tmp_path):
    out = tmp_path / "out"
    options = ("--feats", folder / "train.npz", "--validation", folder / "held.npz", "--out", out)
    families = ("calibrated", "ridge")
    found, stderr = run_json("refine", folder / "state", *options, "--families", ",".join(families))
    kernel, bias = head_of(folder / "state")
    held = rows(folder / "held.npz")
    expected = lip_jax.select(kernel, bias, *rows(folder / "train.npz"), validation=held, families=families)
    assert found["report"]["reason"] == expected.report.reason
    assert found["report"]["families"] == list(expected.report.families)
    np.testing.assert_allclose(found["report"]["accuracy"], expected.report.accuracy)
    np.testing.assert_array_equal(head_of(out)[0], expected.kernel)
    np.testing.assert_array_equal(head_of(out)[1], expected.bias)
    assert found["changed"] == bool(expected.report.chosen)
    assert stderr == ""


def test_rows_held_out_are_warned_of(folder, tmp_path):
    options = ("--feats", folder / "train.npz", "--families", "ridge", "--hold-out", 0.4, "--seed", 7)
    found, stderr = run_json("refine", folder / "state", *options, "--out", tmp_path / "out")
    assert stderr.startswith("lip-jax refine: warning: rows are held out of those given.")
    assert found["report"]["families"] == ["unchanged", "ridge"]


def test_a_memorised_head_is_left_as_it_is_with_a_warning(tmp_path):
    rng = np.random.default_rng(0)
    feats, labels = rng.normal(size=(400, 200)).astype(np.float32), rng.integers(0, 4, 400)
    kernel = (np.linalg.pinv(feats) @ np.eye(4)[labels]).astype(np.float32)
    np.savez(tmp_path / "head.npz", kernel=kernel)
    np.savez(tmp_path / "rows.npz", feats=feats, labels=labels)
    options = ("--feats", tmp_path / "rows.npz", "--families", "ridge", "--out", tmp_path / "o.npz")
    result = run("refine", tmp_path / "head.npz", *options)
    assert "warning: the head agrees with these labels far more" in result.stderr
    assert "labels look memorised, so they cannot judge; pass --validation" in result.stdout
    assert f"nothing differs from {tmp_path / 'head.npz'}" in result.stdout
    with np.load(tmp_path / "o.npz") as held:
        np.testing.assert_array_equal(held["kernel"], kernel)


def as_npz(path, arrays):
    np.savez_compressed(path, **arrays)


def as_safetensors(path, arrays):
    save_file(
        {key: np.ascontiguousarray(part) for key, part in arrays.items()}, path, metadata={"by": "test"}
    )


def from_npz(path):
    with np.load(path) as held:
        return dict(held)


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
def test_heads_in_files(suffix, write, read, keys, head, layout, folder, tmp_path):
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


def test_bfloat16_in_safetensors(folder, tmp_path):
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


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_purified_labels_go_on_into_a_readout(suffix, folder, tmp_path):
    out, again = tmp_path / f"purified{suffix}", tmp_path / "readout"
    feats, labels = folder / "feats.npy", folder / "labels.npy"
    found, _ = run_json(
        "purify", "--feats", feats, "--labels", labels, "--checkpoint", folder / "clean", "--out", out
    )
    expected = lip_jax.purify(*rows(folder / "train.npz"), num_classes=10)
    memorised = lip_jax.memorised(*head_of(folder / "clean"), *rows(folder / "train.npz"))
    assert found["trusted"] == int(expected.trusted.sum())
    assert found["memorised"]["memorised"] == bool(memorised.memorised)
    if suffix == ".csv":
        with out.open() as file:
            lines = list(csv.DictReader(file))
        columns = {name: np.array([float(line[name]) for line in lines]) for name in lines[0]}
    else:
        columns = from_npz(out)
    given = np.load(labels)
    np.testing.assert_array_equal(columns["trusted"], expected.trusted)
    np.testing.assert_array_equal(columns["suggested"], expected.quality.suggested)
    np.testing.assert_allclose(columns["trust"], expected.quality.trust, rtol=1e-6)
    np.testing.assert_array_equal(columns["labels"], np.where(expected.trusted, given, -1))

    run("readout", folder / "state", "--feats", feats, "--labels", out, "--out", again)
    kernel, bias = head_of(folder / "state")
    trusted = jnp.where(expected.trusted, given, -1)
    readout = lip_jax.apply_readout({"kernel": kernel, "bias": bias}, np.load(feats), trusted)
    np.testing.assert_allclose(head_of(again)[0], readout["kernel"], rtol=1e-5, atol=1e-6)


def test_purification_finds_wrong_labels_and_says_so(folder, tmp_path):
    out = tmp_path / "purified.npz"
    result = run("purify", "--feats", folder / "train.npz", "--out", out)
    right = np.load(folder / "labels.npy") == np.load(folder / "clean_labels.npy")
    trusted = from_npz(out)["trusted"]
    assert right[trusted].mean() > right.mean() + 0.2
    kept, offered = map(int, re.search(r"(\d+) of (\d+) rows trusted", result.stdout).groups())
    assert (kept, offered) == (trusted.sum(), 1000)


def test_a_readout_of_clean_labels_is_judged_by_validation_rows(folder, tmp_path):
    out = tmp_path / "out"
    found, _ = run_json(
        "readout",
        folder / "state",
        "--feats",
        folder / "feats.npy",
        "--labels",
        folder / "clean_labels.npy",
        "--validation",
        folder / "test.npz",
        "--out",
        out,
    )
    feats, labels = rows(folder / "test.npz")
    for when, path in (("before", folder / "state"), ("after", out)):
        kernel, bias = head_of(path)
        metrics = lip_jax.head_metrics(jnp.asarray(feats @ kernel + bias), jnp.asarray(labels))
        assert found["validation"][when]["accuracy"] == pytest.approx(float(metrics.accuracy), abs=2e-3)
        assert found["validation"][when]["log_loss"] == pytest.approx(float(metrics.log_loss), rel=1e-3)
    assert found["rows"] == 1000


def test_diagnosis_in_json_is_what_the_library_says(folder):
    found, stderr = run_json(
        "diagnose", folder / "state", "--against", folder / "clean", "--feats", folder / "train.npz"
    )
    kernel, bias = head_of(folder / "state")
    clean, _ = head_of(folder / "clean")
    feats, labels = rows(folder / "train.npz")
    np.testing.assert_allclose(found["singular_values"], np.linalg.svd(kernel, compute_uv=False), rtol=1e-4)
    s = jnp.asarray(found["singular_values"])
    assert found["effective_rank"]["entropy"] == pytest.approx(
        float(lip_jax.spectrum.effective_rank(s).entropy)
    )
    assert found["rank_for_energy"]["0.9"] == int(lip_jax.spectrum.rank_for_energy(s, 0.9))
    grid = lip_jax.spectrum.kernel_similarity_grid(kernel, clean)
    np.testing.assert_allclose(found["against"]["similarity"], np.diagonal(grid), rtol=1e-5)
    for name, gap in (("Wedin, mixed gap", "mixed"), ("Wedin, own gap", "own")):
        bound = found["against"]["bounds"][name]
        for k in range(1, 11):
            wedin = lip_jax.bounds.wedin_bound(clean, kernel, k, gap=gap)
            assert bound["vacuous"][k - 1] == bool(wedin.vacuous)
            finite = bool(jnp.isfinite(wedin.value))
            assert bound["value"][k - 1] == (pytest.approx(float(wedin.value), rel=1e-3) if finite else None)
    memorised = lip_jax.memorised(kernel, bias, feats, labels)
    assert found["rows"]["memorised"]["agreement"] == pytest.approx(float(memorised.agreement))
    quality = lip_jax.label_quality(feats, labels)
    np.testing.assert_allclose(found["rows"]["noise_rate"], quality.noise_rate, rtol=1e-5)
    assert 0.2 < found["rows"]["wrong"] < 0.6
    assert stderr == ""


def test_bounds_of_the_noise_hold_for_the_ridge_readout_they_are_of(folder):
    """With the true flip rate in place of the estimated one: readouts of clean and given labels."""
    found, _ = run_json("diagnose", folder / "state", "--feats", folder / "train.npz")
    given, clean = np.load(folder / "labels.npy"), np.load(folder / "clean_labels.npy")
    feats = np.load(folder / "feats.npy").astype(np.float64)
    gram = feats.T @ feats + found["rows"]["ridge"] * np.eye(feats.shape[1])
    noisy, true = (np.linalg.solve(gram, feats.T @ np.eye(10)[ids]) for ids in (given, clean))
    u, s, _ = np.linalg.svd(noisy, full_matrices=False)
    u_true, _, _ = np.linalg.svd(true, full_matrices=False)
    scale = np.sqrt((given != clean).mean() / found["rows"]["wrong"])
    sigma = np.linalg.svd(feats, compute_uv=False)
    gain = (sigma / (sigma**2 + found["rows"]["ridge"])).max()
    for k in range(1, 11):
        sine = np.linalg.norm(u_true[:, :k] - u[:, :k] @ (u[:, :k].T @ u_true[:, :k]), 2)
        value = found["rows"]["bounds"]["filter"]["value"][k - 1]
        change = np.sqrt(2 * len(given) * found["rows"]["wrong"])
        gap = s[k - 1] - (s[k] if k < 10 else 0)
        assert value == pytest.approx(2 * gain * change / gap, rel=1e-2)
        assert sine <= value * scale


def test_the_diagnosis_on_the_terminal_says_what_is_vacuous(folder):
    options = ("--against", folder / "clean", "--feats", folder / "train.npz")
    text = run("diagnose", folder / "state", *options, "--validation", folder / "held.npz").stdout
    found, _ = run_json("diagnose", folder / "state", *options)
    shown = [k - 1 for k in map(int, re.findall(r"^ *(\d+) +\d\.\d\d +\d\.\d\d *$", text, re.MULTILINE))]
    assert len(shown) == 8
    bounds = [*found["against"]["bounds"].values(), *found["rows"]["bounds"].values()]
    vacuous = sum(bound["vacuous"][k] for bound in bounds for k in shown)
    assert len(re.findall(r"vacuous\s+(?:\d|inf)", text)) == vacuous > 0
    for words in ("Effective rank", "labels, about", "memorised:", "held-out labels", "bounds are vacuous"):
        assert words in text, words


def test_reports(folder, tmp_path):
    options = ("--against", folder / "clean", "--feats", folder / "train.npz")
    text = run("diagnose", folder / "state", *options, "--out", tmp_path / "report.html").stdout
    page = (tmp_path / "report.html").read_text()
    picture = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    assert matplotlib.image.imread(io.BytesIO(picture)).shape == (1104, 1536, 4)
    assert "Effective rank" in page
    assert "http" not in page
    assert f"Report: {tmp_path / 'report.html'}" in text
    for options, shape in (((), (552, 768, 4)), (("--feats", folder / "train.npz"), (552, 1536, 4))):
        out = tmp_path / f"report{len(options)}.png"
        run("diagnose", folder / "state", "--head", "Dense_1", *options, "--out", out)
        assert matplotlib.image.imread(out).shape == shape


def test_nothing_is_overwritten_without_force(folder, tmp_path):
    for command, name in (
        ("refine", "out"),
        ("readout", "out.npz"),
        ("purify", "p.csv"),
        ("diagnose", "r.png"),
    ):
        out = tmp_path / name
        source = () if command == "purify" else (folder / ("head.npz" if name == "out.npz" else "state"),)
        extra = ("--rank", 3) if command == "refine" else ()
        options = (*source, "--feats", folder / "train.npz", *extra, "--out", out)
        run(command, *options)
        before = {path: path.stat().st_mtime_ns for path in (out, *out.rglob("*"))}
        assert f"--out {out} exists. Name another, or pass --force" in fails(command, *options)
        assert before == {path: path.stat().st_mtime_ns for path in (out, *out.rglob("*"))}
        run(command, *options, "--force")
        assert out.stat().st_mtime_ns > before[out]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.npz", "p.csv", "r.png"]


def test_force_replaces_a_checkpoint_by_itself_repaired(folder, tmp_path):
    out = tmp_path / "out"
    for rank, force in ((8, ()), (3, ("--force",))):
        source = out if force else folder / "state"
        run("refine", source, "--feats", folder / "train.npz", "--rank", rank, "--out", out, *force)
    kernel, _ = head_of(folder / "state")
    twice = lip_jax.refine(
        lip_jax.refine(kernel, *rows(folder / "train.npz"), 8), *rows(folder / "train.npz"), 3
    )
    np.testing.assert_allclose(head_of(out)[0], twice, rtol=1e-5, atol=1e-6)


def test_force_spares_what_is_no_checkpoint(folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("dear")
    options = ("--feats", folder / "train.npz", "--force", "--out")
    assert "not even --force" in fails("refine", folder / "state", *options, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "dear"
    assert "not inside or around it" in fails("refine", folder / "state", *options, folder)
    assert "not inside or around it" in fails("refine", folder / "state", *options, folder / "state" / "new")


def contents(path):
    """Every file below a path, and what is in it."""
    return {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}


def test_force_spares_a_folder_that_merely_holds_a_checkpoint(folder, tmp_path):
    for name in ("results", "noted", "outer"):
        shutil.copytree(folder / "clean", tmp_path / name / ("repaired" if name == "results" else ""))
    (tmp_path / "results" / "report.html").write_text("long work")
    (tmp_path / "noted" / "notes.txt").write_text("which seed this was")
    shutil.copytree(folder / "clean", tmp_path / "outer" / "inner")
    shutil.copytree(folder / "clean", tmp_path / "runs" / "run_1")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for name in ("results", "noted", "outer", "runs", "empty"):
        options = ("--feats", folder / "train.npz", "--force", "--out", tmp_path / name)
        assert "is no checkpoint of orbax, or holds other things too" in fails(
            "readout", folder / "state", *options
        )
    assert contents(tmp_path) == before


def test_force_spares_other_steps(folder, tmp_path):
    run_folder, options = tmp_path / "run", ("--feats", folder / "train.npz", "--force", "--out")
    shutil.copytree(folder / "steps", run_folder)
    before = contents(tmp_path)
    for source in (folder / "state", folder / "steps", run_folder):
        assert "holds 2 steps (3, 20) where the result is one, so not even --force" in fails(
            "readout", source, *options, run_folder
        )
    assert contents(tmp_path) == before
    run("readout", run_folder / "20", *options, run_folder / "20")
    after = contents(tmp_path)
    assert {path.relative_to(run_folder).parts[0] for path in after if after[path] != before.get(path)} == {
        "20"
    }
    with ocp.CheckpointManager(run_folder) as manager:
        assert sorted(manager.all_steps()) == [3, 20]


def save_with_manager(path, tree):
    with ocp.CheckpointManager(path, metadata={"by": "test"}) as manager:
        about = ocp.args.JsonSave({"step": 7})
        manager.save(7, args=ocp.args.Composite(model=ocp.args.StandardSave(tree), about=about))


def save_items(path, tree):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, ocp.args.Composite(model=ocp.args.StandardSave(tree)))


SAVED = {
    "tree": lambda path, tree: ocp.PyTreeCheckpointer().save(path, tree),
    "files": lambda path, tree: ocp.PyTreeCheckpointer(use_ocdbt=False).save(path, tree),
    "zarr3": lambda path, tree: ocp.PyTreeCheckpointer(use_zarr3=True).save(path, tree),
    "items": save_items,
    "manager": save_with_manager,
    "v1": lambda path, tree: ocp.v1.save_pytree(path, tree),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAVED)
def test_force_replaces_whatever_orbax_saved_and_nothing_beside_it(kind, folder, tmp_path):
    kernel, bias = head_of(folder / "state")
    tree = {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}, "steps": 3, "note": "text"}
    if kind in ("items", "manager", "v1"):
        tree.pop("note")
    SAVED[kind](tmp_path / "out", tree)
    options = ("--feats", folder / "train.npz", "--force", "--out", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("dear")
    assert "not even --force" in fails("readout", folder / "clean", *options)
    (tmp_path / "out" / "notes.txt").unlink()
    for source in (tmp_path / "out", folder / "clean"):
        run("readout", source, *options)
    assert head_of(tmp_path / "out")[0].shape == (32, 10)


def test_force_spares_files_that_are_no_heads(folder, tmp_path):
    for name in ("train.npz", "held.npz", "feats.npy", "head.npz"):
        shutil.copy(folder / name, tmp_path / name)
    as_safetensors(tmp_path / "head.safetensors", {"kernel": head_of(folder / "state")[0]})
    as_safetensors(tmp_path / "rows.safetensors", {"feats": np.load(folder / "feats.npy")})
    np.savetxt(tmp_path / "labels.csv", np.load(folder / "labels.npy"), fmt="%d")
    (tmp_path / "text.npz").write_text("no arrays")
    before = contents(tmp_path)
    rows = ("--feats", tmp_path / "train.npz")
    apart = ("--feats", tmp_path / "feats.npy", "--labels", tmp_path / "labels.csv")
    for command, arguments, out, words in (
        (
            "readout",
            (tmp_path / "head.npz", *rows),
            "held.npz",
            "holds feats, the inputs of a head, so not even",
        ),
        ("readout", (tmp_path / "head.npz", *rows), "text.npz", "is no .npz file that can be read"),
        ("readout", (tmp_path / "head.npz", *rows), "train.npz", "train.npz, which this command reads"),
        ("readout", (tmp_path / "head.safetensors", *rows), "rows.safetensors", "holds feats"),
        ("purify", rows, "held.npz", "holds feats"),
        ("purify", apart, "labels.csv", "labels.csv, which this command reads"),
        ("purify", (*rows, "--checkpoint", tmp_path / "head.npz"), "head.npz", "which this command reads"),
    ):
        assert words in fails(command, *arguments, "--force", "--out", tmp_path / out)
    assert contents(tmp_path) == before
    run("readout", tmp_path / "head.npz", *rows, "--force", "--out", tmp_path / "head.npz")


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


def altered_heads():
    """Parameters of models that multiply by another kernel than the stored one, and what makes it another."""
    x, rngs = jnp.ones((2, 32)), nnx.Rngs(0)
    linear = lambda: nnx.Linear(32, 10, rngs=rngs)  # noqa: E731
    normal = {wrapper: wrapper(linear(), rngs=rngs) for wrapper in (nnx.WeightNorm, nnx.SpectralNorm)}
    yield Wrapped(nn.WeightNorm).init(jax.random.key(0), x), "kernel/scale rescales it"
    yield Wrapped(nn.SpectralNorm).init(jax.random.key(0), x), "kernel/sigma rescales it"
    yield nnx.state(nnx.LoRALinear(32, 10, lora_rank=2, rngs=rngs)), "lora_a adds to it"
    yield nnx.state(nnx.LoRA(32, 2, 10, base_module=linear(), rngs=rngs)), "lora_a adds to it"
    for module in normal.values():
        module(x)
        yield nnx.state({"head": module}), "normalises it"


@pytest.mark.filterwarnings("ignore")
def test_heads_that_the_model_does_not_multiply_by_are_refused(folder, tmp_path):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        cases = list(altered_heads())
    for number, (tree, words) in enumerate(cases):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / f"in{number}", tree)
        options = ("--feats", folder / "train.npz", "--out", tmp_path / "out")
        message = fails("readout", tmp_path / f"in{number}", *options)
        assert "is not what the model multiplies by" in message
        assert words in message, (words, message)
    flat = {
        "/".join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(cases[1][0])
    }
    np.savez(tmp_path / "flat.npz", **flat)
    options = ("--feats", folder / "train.npz", "--out", tmp_path / "out.npz")
    assert cases[1][1] in fails("readout", tmp_path / "flat.npz", *options)


def test_scalars_are_no_heads_and_not_offered(tmp_path):
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"temperature": jnp.float32(2), "scale": np.ones(3)})
    message = fails("diagnose", tmp_path / "in")
    assert "scale: float64[3]" in message
    assert "temperature" not in message


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ["ids", "sets", "weights"])
@pytest.mark.parametrize("n", [900, 1100])
def test_rows_of_another_number_than_the_labels_are_not_cut(kind, n, folder, tmp_path):
    labels = np.resize(np.load(folder / "labels.npy"), n)
    array = {"ids": labels, "sets": np.eye(10)[labels] > 0, "weights": np.ones(n, np.float32)}[kind]
    np.save(tmp_path / "part.npy", array)
    name = "weights" if kind == "weights" else "labels"
    options = ("--feats", folder / "train.npz", f"--{name}", tmp_path / "part.npy", "--hold-out", 0.2)
    message = fails("readout", folder / "state", *options, "--out", tmp_path / "out")
    assert f"{name} must have one row per row of feats" in message
    assert f"part.npy holds {array.dtype}[{n}" in message


def test_what_cannot_be_read_is_no_result_that_cannot_be_written(folder, tmp_path, monkeypatch):
    whole = Path.iterdir

    def locked(path):
        if path == folder / "steps":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "iterdir", locked)
    long = tmp_path / ("a" * 300)
    for arguments in (
        (folder / "steps", "--feats", folder / "train.npz"),
        (long, "--feats", folder / "train.npz"),
        (folder / "state", "--feats", long.with_suffix(".npy")),
    ):
        assert "cannot be read" in fails("readout", *arguments, "--out", tmp_path / "out")


def test_an_interruption_leaves_the_old_folder_where_it_was(tmp_path, monkeypatch):
    out, whole = tmp_path / "replaced", Path.rename
    out.mkdir()

    def interrupted(path, target):
        if target == out and path.name == "replaced":
            raise KeyboardInterrupt
        return whole(path, target)

    (out / "part").write_text("first")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt), written_whole(out, force=True) as fresh:
            fresh.mkdir()
    assert (out / "part").read_text() == "first"
    with written_whole(out, force=True) as fresh:
        fresh.mkdir()
        (fresh / "part").write_text("second")
    assert (out / "part").read_text() == "second"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_result_appears_whole_or_not_at_all(is_folder, tmp_path):
    out = tmp_path / "out"

    def write(path, text):
        if is_folder:
            path.mkdir()
            path = path / "part"
        path.write_text(text)

    def held():
        return (out / "part" if is_folder else out).read_text()

    def fail(force):
        with written_whole(out, force=force) as fresh:
            write(fresh, "half")
            assert not out.exists() or held() == "first"
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk"):
        fail(force=False)
    assert list(tmp_path.iterdir()) == []
    with written_whole(out, force=False) as fresh:
        write(fresh, "first")
    with pytest.raises(RuntimeError, match="disk"):
        fail(force=True)
    assert held() == "first"
    with written_whole(out, force=True) as fresh:
        write(fresh, "second")
    assert held() == "second"
    with pytest.raises(FileExistsError), written_whole(out, force=False) as fresh:
        write(fresh, "third")
    assert held() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_cannot_be_written_is_told_by_its_own_exit_code(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    options = ("--feats", folder / "train.npz", "--rank", 3, "--out", tmp_path / "out")
    result = run("refine", folder / "state", *options, code=3)
    assert "the result could not be written" in result.stderr
    assert "No space left" in result.stderr
    assert list(tmp_path.iterdir()) == []


def bad_inputs(folder, tmp_path):
    """Arguments that cannot be used, and what is said of them."""
    feats, labels = rows(folder / "train.npz")
    kernel, bias = head_of(folder / "state")
    state, train, out = folder / "state", folder / "train.npz", ("--out", tmp_path / "out")
    np.savez(
        tmp_path / "nan.npz", feats=np.where(np.arange(1000)[:, None] == 7, np.nan, feats), labels=labels
    )
    np.savez(tmp_path / "no_labels.npz", feats=feats)
    np.savez(tmp_path / "wide.npz", feats=np.ones((50, 33), np.float32), labels=labels[:50])
    np.savez(tmp_path / "uneven.npz", feats=feats, labels=labels[:-1])
    np.savez(tmp_path / "other_keys.npz", x=feats, y=labels)
    np.savez(tmp_path / "ids.npz", feats=feats, labels=np.where(labels == 9, 12, labels))
    np.savez(tmp_path / "diverged.npz", kernel=np.full_like(kernel, np.nan), bias=bias)
    np.savez(tmp_path / "two.npz", **{"a/kernel": kernel, "b/kernel": kernel})
    np.savez(tmp_path / "float16.npz", kernel=kernel.astype(np.float16))
    np.save(tmp_path / "objects.npy", np.array([None] * 1000), allow_pickle=True)
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "cut.npz").write_bytes(train.read_bytes()[:3000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.csv").write_text("labels\ncat\n")
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "large.csv").write_text(f"labels\n3\n{2**63}\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "_METADATA").write_text("{")
    yield "diagnose", (tmp_path / "absent",), "is no file and no folder"
    yield "diagnose", (tmp_path / "empty",), "holds no tree saved by orbax"
    yield "diagnose", (tmp_path / "broken",), "cannot be read by orbax"
    yield "diagnose", (tmp_path / "names.csv",), "must be the folder of an orbax checkpoint"
    yield "diagnose", (tmp_path / "text.npz",), "cannot be read as .npz: it is no .npz archive"
    yield "diagnose", (tmp_path / "cut.safetensors",), "cannot be read as .safetensors"
    yield "diagnose", (tmp_path / "diverged.npz",), "kernel must be finite"
    yield "diagnose", (tmp_path / "two.npz",), "2 kernels could be the head; name one with --head PATH:"
    yield "diagnose", (state, "--head", "nowhere"), "no kernel that matches a kernel at head = 'nowhere'"
    yield "diagnose", (state, "--labels", train), "go with --feats, which is missing"
    yield (
        "diagnose",
        (state, "--head", "Dense_1", "--out", "nowhere/r.png"),
        "name a file in an existing folder",
    )
    yield "diagnose", (state, "--head", "Dense_1", "--out", "r.doc"), "must end in one of"
    yield "diagnose", (state, "--head", "Dense_1", "--against-head", "x"), "came without --against"
    yield "diagnose", (state, "--head", "Dense_1", "--validation-labels", train), "came without --validation"
    yield "refine", (state, "--feats", tmp_path / "absent.npy", *out), "absent.npy is no file"
    yield "refine", (state, "--feats", tmp_path / "cut.npz", *out), "cannot be read as .npz"
    yield "refine", (state, "--feats", tmp_path / "other_keys.npz", *out), "must hold the array feats (n, q)"
    yield "refine", (state, "--feats", tmp_path / "no_labels.npz", *out), "holds no labels (feats)"
    yield "refine", (state, "--feats", tmp_path / "wide.npz", *out), "no kernel that matches a kernel (q l)"
    yield "refine", (state, "--feats", tmp_path / "uneven.npz", *out), "labels must have one row per row of"
    yield "refine", (state, "--feats", tmp_path / "nan.npz", "--rank", 3, *out), "feats must be finite; row 7"
    yield "refine", (state, "--feats", tmp_path / "ids.npz", "--head", "Dense_1", *out), "below l = 10"
    yield "refine", (state, "--feats", train, "--rank", 11, *out), "rank must lie in [0, 10]"
    yield "refine", (state, "--feats", train, "--families", "magic", *out), "families must name some of"
    yield "refine", (state, "--feats", train, "--method", "calibrated", *out), "Pass --rank with it"
    yield "refine", (state, "--feats", train, "--hold-out", 1.5, *out), "a share between 0 and 1; got 1.5"
    yield (
        "refine",
        (state, "--feats", train, "--validation", train, "--hold-out", 0.5, *out),
        "exclude each other",
    )
    yield "refine", (state, "--feats", train, "--rank", 2, "--validation", train, *out), "exclude each other"
    yield "refine", (folder / "head.npz", "--feats", train, "--out", tmp_path / "a.npy"), "must end in .npz"
    yield "refine", (state, "--feats", train, "--out", tmp_path / "no" / "a"), "is no folder. Make it first"
    yield (
        "readout",
        (state, "--feats", train, "--validation", tmp_path / "wide.npz", *out),
        "validation: feats",
    )
    yield "purify", ("--feats", train, "--out", tmp_path / "p.txt"), "must end in .npz or .csv"
    yield (
        "purify",
        ("--feats", train, "--top", 2, "--out", tmp_path / "p.csv"),
        "top belongs to --rule top; got --rule posterior",
    )
    yield (
        "purify",
        ("--feats", train, "--head", "x", "--out", tmp_path / "p.csv"),
        "came without --checkpoint",
    )
    purify = ("--feats", folder / "feats.npy", "--out", tmp_path / "p.csv", "--labels")
    yield "purify", purify[:-1], "holds no labels"
    yield "purify", (*purify, tmp_path / "names.csv"), "line 2 must hold a class id, a whole number"
    yield "purify", (*purify, tmp_path / "large.csv"), "line 3 must hold a class id, a whole number"
    yield "purify", (*purify, tmp_path / "columns.csv"), "2 columns and none named labels"
    yield "purify", (*purify, tmp_path / "objects.npy"), "objects.npy cannot be read"
    yield "purify", (*purify, tmp_path / "no_labels.npz"), "must hold the array labels; it holds feats"


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_used_meets_a_sentence(folder, tmp_path):
    made = None
    for command, arguments, words in bad_inputs(folder, tmp_path):
        made = made or sorted(tmp_path.iterdir())
        message = fails(command, *arguments)
        assert words in message, (words, message)
        assert not re.search(r"\b(head|rank|validation|num_classes)=[^=]", message), message
    assert sorted(tmp_path.iterdir()) == made


def test_labels_in_csv(tmp_path, folder):
    given = np.load(folder / "labels.npy")
    given[5] = -1
    given[7] = -1
    texts = {
        "plain": "\n".join(map(str, given)),
        "blank": "labels\n" + "".join(f"{label if label >= 0 else ''}\n" for label in given) + "\n",
        "spaced": "".join(f" {label if label >= 0 else ''} \n" for label in given),
        "named": "id,labels\n" + "\n".join(f"x,{label if label >= 0 else ''}" for label in given),
    }
    found = []
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text)
        options = ("--feats", folder / "feats.npy", "--labels", tmp_path / f"{name}.csv")
        found.append(run_json("purify", *options, "--out", tmp_path / f"{name}.npz")[0])
        assert from_npz(tmp_path / f"{name}.npz")["given"][5] == -1
    assert all(other | {"out": ""} == found[0] | {"out": ""} for other in found)
    (tmp_path / "odd.csv").write_text("labels\n--5\n")
    assert "line 2 must hold a class id" in fails(
        "purify", *options[:3], tmp_path / "odd.csv", "--out", "p.npz"
    )


def test_sets_of_candidates(tmp_path, folder):
    given, clean = np.load(folder / "labels.npy"), np.load(folder / "clean_labels.npy")
    np.save(tmp_path / "sets.npy", (np.eye(10)[given] + np.eye(10)[clean]) > 0)
    options = (
        "--feats",
        folder / "feats.npy",
        "--labels",
        tmp_path / "sets.npy",
        "--out",
        tmp_path / "p.npz",
    )
    run("purify", *options)
    assert (from_npz(tmp_path / "p.npz")["given"] == clean).mean() > 0.9


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    text = run(command, "--help").stdout
    assert "Examples:" in text
    assert f"lip-jax {command} " in text
    assert "--json" in text


def test_help_tells_exit_codes_and_commands():
    text = " ".join(run("--help").stdout.split())
    assert "2 arguments or files that cannot be used" in text
    assert all(command in text for command in (*COMMANDS, "demo", "--install-completion"))


def test_a_shell_completes_commands(monkeypatch):
    environment = {"_LIP_JAX_COMPLETE": "complete_bash", "COMP_WORDS": "lip-jax di", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], env=environment, prog_name="lip-jax")
    assert result.stdout.strip() == "diagnose"


def test_a_head_and_features_of_clinc150(clinc150, tmp_path):
    from benchmarks import heads

    # A third of the rows: what is tested is the way there and back, not how well it does.
    train_x, train_y = clinc150.train_x[::3], jnp.asarray(clinc150.train_y)[::3]
    given = lip_jax.noise.symmetric(jax.random.key(0), train_y, 0.4, num_classes=150)
    variables = heads.train_regularised(train_x, given, num_classes=150, steps=40)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", variables)
    np.savez(tmp_path / "train.npz", feats=train_x, labels=given)
    options = ("--feats", tmp_path / "train.npz")
    purified, _ = run_json("purify", *options, "--out", tmp_path / "p.npz")
    right, trusted = np.asarray(given == train_y), from_npz(tmp_path / "p.npz")["trusted"]
    assert right[trusted].mean() > 0.9
    assert right[~trusted].mean() < 0.2
    assert purified["wrong"] == pytest.approx(0.4, abs=0.1)
    diagnosis, _ = run_json("diagnose", tmp_path / "run", *options)
    assert diagnosis["shape"] == [384, 150]
    assert diagnosis["null_components"] == 1
    assert all(diagnosis["rows"]["bounds"]["paper"]["vacuous"])
    out = tmp_path / "out"
    refined, _ = run_json("refine", tmp_path / "run", *options, "--rank", 112, "--out", out)
    assert refined["head"] == "params/head/kernel"
    assert changed(restored(tmp_path / "run"), restored(out)) == {"['params']['head']['kernel']"}
    kernel = variables["params"]["head"]["kernel"]
    expected = lip_jax.refine(kernel, jnp.asarray(train_x), given, 112)
    np.testing.assert_array_equal(restored(out)["['params']['head']['kernel']"], expected)
