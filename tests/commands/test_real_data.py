"""The commands on a head and features of CLINC150."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lip_jax
from tests.commands.running import changed, from_npz, restored, run_json


@pytest.fixture(scope="module")
def trained(clinc150, tmp_path_factory):
    """A head trained on a third of the rows, 40% of their labels wrong, and what it was trained on."""
    from benchmarks import heads

    folder = tmp_path_factory.mktemp("clinc150")
    feats, clean = clinc150.train_x[::3], jnp.asarray(clinc150.train_y)[::3]
    given = lip_jax.noise.symmetric(jax.random.key(0), clean, 0.4, num_classes=150)
    variables = heads.train_regularised(feats, given, num_classes=150)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "run", variables)
    np.savez(folder / "train.npz", feats=feats, labels=given)
    return folder, variables["params"]["head"]["kernel"], jnp.asarray(feats), given, clean


@pytest.mark.slow
def test_purification_trusts_right_labels(trained, tmp_path):
    folder, _, _, given, clean = trained
    found, _ = run_json("purify", "--feats", folder / "train.npz", "--out", tmp_path / "p.npz")
    right, trusted = np.asarray(given == clean), from_npz(tmp_path / "p.npz")["trusted"]
    assert right[trusted].mean() > 0.9
    assert right[~trusted].mean() < 0.2
    assert found["wrong"] == pytest.approx(0.4, abs=0.1)


@pytest.mark.slow
def test_the_diagnosis_finds_one_null_component_and_vacuous_bounds(trained):
    folder, *_ = trained
    found, _ = run_json("diagnose", folder / "run", "--feats", folder / "train.npz")
    assert found["shape"] == [384, 150]
    assert found["null_components"] == 1
    assert all(found["rows"]["bounds"]["paper"]["vacuous"])


@pytest.mark.slow
def test_a_refit_writes_the_kernel_of_the_library_and_nothing_else(trained, tmp_path):
    folder, kernel, feats, given, _ = trained
    out = tmp_path / "out"
    found, _ = run_json(
        "refine", folder / "run", "--feats", folder / "train.npz", "--rank", 112, "--out", out
    )
    assert found["head"] == "params/head/kernel"
    assert changed(restored(folder / "run"), restored(out)) == {"['params']['head']['kernel']"}
    expected = lip_jax.refine(kernel, feats, given, 112)
    np.testing.assert_array_equal(restored(out)["['params']['head']['kernel']"], expected)
