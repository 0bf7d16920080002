"""The demo: what it prints is what an independent computation gives, and bad input meets a sentence."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

import lip_jax
from lip_jax import cli, demo
from lip_jax.commands import app
from lip_jax.commands.console import thinned
from lip_jax.commands.demo import _ranks
from lip_jax.demo.measure import score_by_rank

TRAINING = demo.Training(seed=3, epochs=8, weight_decay=0.005)
RANKS = np.arange(1, 11)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def strictly(compute):
    """Module fixtures are set up before the regime of `conftest`."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return compute()


@pytest.fixture(scope="module")
def digits():
    return strictly(lambda: demo.load_digits(noise=0.4, seed=TRAINING.seed))


@pytest.fixture(scope="module")
def case(digits):
    data = demo.hold_out(digits, seed=TRAINING.seed)
    return strictly(lambda: demo.digits_case(data, TRAINING))


@pytest.fixture(scope="module")
def found(case):
    return strictly(lambda: demo.study(case, RANKS))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run on the digits: the result and the picture's path."""
    out = tmp_path_factory.mktemp("demo") / "picture.png"
    options = ("--seed", TRAINING.seed, "--epochs", TRAINING.epochs, "--out", out)
    return strictly(lambda: run("demo", *options)), out


@pytest.fixture(scope="module")
def pixels():
    """The digits' pixels as a file of features would hold them."""
    data = strictly(lambda: demo.load_digits(noise=0.3, seed=0))
    return {
        "train_x": np.asarray(data.train.feats).reshape(-1, 64),
        "train_y": np.asarray(data.clean_y),
        "train_y_noisy": np.asarray(data.train.labels),
        "test_x": np.asarray(data.test.feats).reshape(-1, 64),
        "test_y": np.asarray(data.test.labels),
    }


def write(folder, arrays):
    path = folder / "features.npz"
    np.savez(path, **arrays)
    return path


def float64(array):
    return np.asarray(array, dtype=np.float64)


def published_lip(kernel, feats, labels, rank):
    """The paper's formula in float64, with its one-hot targets and its residual."""
    kernel, feats = float64(kernel), float64(feats)
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    principal = (u[:, :rank] * s[:rank]) @ vt[:rank]
    residual = np.eye(kernel.shape[1])[np.asarray(labels)] - feats @ principal
    for i in range(rank, s.shape[0]):
        along = feats @ u[:, i]
        s[i] = along @ residual @ vt[i] / (along @ along)
    return (u * s) @ vt


def accuracy_and_log_loss(kernel, bias, feats, labels):
    logits = float64(feats) @ float64(kernel) + float64(bias)
    logits -= logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    labels = np.asarray(labels)
    return (logits.argmax(axis=1) == labels).mean(), -log_probs[np.arange(labels.size), labels].mean()


def printed_scores(output):
    """Accuracy and log-loss by the name of the row in the first table."""
    number = r"[+-]?\d+\.\d+"
    change = rf"(?:\s+{number} ± {number})?"
    name = r"clean network|clean head|noisy head|rank \d+"
    row = rf"^ *({name}) +({number}){change} +({number}){change} +{number} *$"
    return {name: (float(a), float(b)) for name, a, b in re.findall(row, output, re.MULTILINE)}


def test_the_printed_scores_are_those_of_the_published_formula(ran, case):
    result, _ = ran
    assert result.exit_code == 0, result.output
    (train_x, given, _), (test_x, test_y, _), noisy = case.data.train, case.data.test, case.noisy
    expected = {
        f"rank {k}": accuracy_and_log_loss(
            published_lip(noisy.kernel, train_x, given, k), noisy.bias, test_x, test_y
        )
        for k in range(11)
    }
    for name, head, feats in (
        ("noisy head", noisy, test_x),
        ("clean head", case.clean, test_x),
        ("clean network", case.network.head, case.network.test.feats),
    ):
        expected[name] = accuracy_and_log_loss(head.kernel, head.bias, feats, test_y)
    printed = printed_scores(result.output)
    assert printed.keys() == expected.keys()
    tie = 1 / test_y.shape[0]
    for name, (accuracy, log_loss) in expected.items():
        assert abs(printed[name][0] - accuracy) <= 5.1e-4 + tie, name
        assert abs(printed[name][1] - log_loss) <= 6e-4, name


def test_every_rank_is_what_apply_does_to_a_dense_layer(case, found):
    train, test, layer = case.data.train, case.data.test, nn.Dense(10)
    variables = {"params": {"kernel": case.noisy.kernel, "bias": case.noisy.bias}}
    for k in range(11):
        repaired = lip_jax.apply(variables, train.feats, train.labels, rank=jnp.int32(k))
        metrics = lip_jax.head_metrics(layer.apply(repaired, test.feats), test.labels)
        np.testing.assert_allclose(found.by_rank.log_loss[k], metrics.log_loss, rtol=1e-4)
        assert abs(found.by_rank.accuracy[k] - metrics.accuracy) < 1.5 / test.labels.shape[0]


def test_at_full_rank_the_head_is_unchanged(found):
    scores, noisy = found.by_rank, found.references["noisy head"].scores
    assert scores.accuracy[-1] == noisy.accuracy
    np.testing.assert_allclose(scores.log_loss[-1], noisy.log_loss, rtol=1e-6)
    assert scores.accuracy_gain.mean[-1] == scores.log_loss_gain.mean[-1] == 0


def test_one_compilation_serves_every_rank(case, found):
    assert found.by_rank.accuracy.shape == (11,)
    before = score_by_rank._cache_size()
    demo.study(case, RANKS)
    assert score_by_rank._cache_size() == before


def test_the_networks_learn_and_label_noise_costs(found):
    scores = {name: reference.scores for name, reference in found.references.items()}
    assert scores["clean network"].accuracy > 0.85
    assert scores["noisy head"].log_loss > scores["clean network"].log_loss


def test_the_verdict_follows_from_paired_gains(ran, found):
    result, _ = ran
    text = " ".join(result.output.split())
    for name, gain in (
        ("Accuracy", found.by_rank.accuracy_gain),
        ("Log-loss", found.by_rank.log_loss_gain),
    ):
        clear = float64(gain.mean) / (2 * float64(gain.error))
        assert f"{name}: LIP helped at {_ranks(clear > 1)}, hurt at {_ranks(clear < -1)}, made no" in text
    assert "In hindsight" in text
    assert "nothing here chooses a rank" in text


def test_gains_are_paired_means_with_the_error_that_the_library_gives_them(case, found):
    test = case.data.test
    kernel = lip_jax.refine(case.noisy.kernel, case.data.train.feats, case.data.train.labels, 4)
    rows = np.arange(test.labels.shape[0])
    correct, losses = [], []
    for head in (case.noisy._replace(kernel=kernel), case.noisy):
        logits = float64(test.feats) @ float64(head.kernel) + float64(head.bias)
        correct.append(logits.argmax(axis=1) == np.asarray(test.labels))
        losses.append(np.log(np.exp(logits).sum(axis=1)) - logits[rows, test.labels])
    differences = correct[0] * 1.0 - correct[1], losses[1] - losses[0]
    for gain, difference in zip(found.by_rank[2:], differences, strict=True):
        # The second term is one disagreement, as the library has it.
        error = np.sqrt(difference.var() / rows.size + 1 / rows.size**2)
        np.testing.assert_allclose(gain.mean[4], difference.mean(), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(gain.error[4], error, rtol=1e-3)


def test_measured_sines_are_the_largest_principal_angles(case, found):
    clean, noisy = (lip_jax.svd_split(head.kernel, 0) for head in (case.clean, case.noisy))
    for k in (1, 5, 9):
        for measured, v, v_noisy in (
            (found.softmax.feats_side, clean.u, noisy.u),
            (found.softmax.class_side, clean.vt.T, noisy.vt.T),
        ):
            angle = lip_jax.spectrum.principal_angles(v[:, :k], v_noisy[:, :k])[0]
            np.testing.assert_allclose(measured[k - 1], jnp.sin(angle), atol=2e-5)


def test_bounds_hold_and_are_those_of_the_library(case, found):
    for angles in (found.softmax, found.ridge):
        sine = np.maximum(angles.feats_side, angles.class_side)
        for name, bound in angles.bounds.items():
            assert (sine <= float64(bound) * (1 + 1e-4)).all(), name
    wedin = lip_jax.bounds.wedin_bound(case.clean.kernel, case.noisy.kernel, 4, gap="own")
    np.testing.assert_allclose(found.softmax.bounds["Wedin, own gap"][3], wedin.value, rtol=1e-5)


def test_ridge_heads_solve_the_normal_equations(case, found):
    clean_y, given = np.asarray(case.data.clean_y), np.asarray(case.data.train.labels)
    feats = float64(case.data.train.feats)
    gram = feats.T @ feats + found.ridge_strength * np.eye(feats.shape[1])
    clean, noisy = (np.linalg.solve(gram, feats.T @ np.eye(10)[labels]) for labels in (clean_y, given))
    s_clean, s_noisy = (np.linalg.svd(kernel, compute_uv=False) for kernel in (clean, noisy))
    gap = s_clean[2] - s_noisy[3]
    wedin = np.linalg.norm(clean - noisy, 2) / gap
    np.testing.assert_allclose(found.ridge.bounds["Wedin, mixed gap"][2], wedin, rtol=1e-3)
    s = np.linalg.svd(feats, compute_uv=False)
    change = np.sqrt(2 * np.sum(clean_y != given))
    paper = s[0] * change / (gap * (s[-1] ** 2 + found.ridge_strength))
    filtered = (s / (s**2 + found.ridge_strength)).max() * change / gap
    np.testing.assert_allclose(found.ridge.bounds["paper"][2], paper, rtol=2e-3)
    np.testing.assert_allclose(found.ridge.bounds["filter"][2], filtered, rtol=2e-3)


def test_vacuous_bounds_are_called_so(ran, found):
    result, _ = ran
    bounds = np.concatenate([*found.softmax.bounds.values(), *found.ridge.bounds.values()])
    assert len(re.findall(r"vacuous\s+(?:\d|inf)", result.output)) == (bounds >= 1).sum() > 0
    assert "ridge heads" in result.output


def test_the_picture_is_written_where_it_says(ran):
    result, out = ran
    assert f"Picture: {out}" in result.output
    image = matplotlib.image.imread(out)
    assert image.shape == (552, 1800, 4)
    thirds = np.split(image[:, :, :3], 3, axis=1)
    assert all(third.std() > 0.05 for third in thirds)


def test_a_picture_that_is_there_gives_way_only_to_a_whole_one(pixels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, picture = write(tmp_path, pixels), tmp_path / "lip_jax_demo.png"
    picture.write_bytes(b"of the last run")

    def full(figure, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", full)
        result = run("demo", "--data", path, "--epochs", 1)
    assert result.exit_code == 3
    assert "the picture could not be written: [Errno 28] No space left" in result.stderr
    assert len(printed_scores(result.stdout)) == 13
    assert "Picture:" not in result.stdout
    assert picture.read_bytes() == b"of the last run"
    assert run("demo", "--data", path, "--epochs", 1).exit_code == 0
    assert matplotlib.image.imread(picture).shape == (552, 1800, 4)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["features.npz", "lip_jax_demo.png"]


def test_the_picture_does_not_replace_the_features(pixels, tmp_path):
    path = write(tmp_path, pixels).rename(tmp_path / "features.png")
    result = run("demo", "--data", path, "--out", path)
    assert result.exit_code == 2
    assert "features.png, which this command reads" in result.stderr


def test_progress_is_quiet_where_nobody_watches(ran):
    result, _ = ran
    assert result.stderr == ""


def test_without_noise_both_heads_are_one(pixels, tmp_path):
    arrays = {name: array for name, array in pixels.items() if name != "train_y_noisy"}
    data, head = demo.load_features(write(tmp_path, arrays), noise=0.0, seed=0)
    found = demo.study(demo.features_case(data, head, TRAINING), RANKS)
    similarity = found.references["clean head"].similarity
    assert similarity.max() < 1 + 1e-5
    np.testing.assert_allclose(np.diagonal(similarity), 1, atol=1e-5)
    assert data.flip_rate == 0
    assert max(bound.max() for bound in found.softmax.bounds.values()) == 0


def test_a_fitted_head_does_not_depend_on_the_scale_of_the_features(pixels, tmp_path):
    kernels = []
    for scale in (1, 1e-3, 1e3):
        scaled = {name: pixels[name] * np.float32(scale) for name in ("train_x", "test_x")}
        data, head = demo.load_features(write(tmp_path, pixels | scaled), noise=0.0, seed=0)
        kernels.append(scale * float64(demo.features_case(data, head, TRAINING).noisy.kernel))
    for kernel in kernels[1:]:
        np.testing.assert_allclose(kernel, kernels[0], rtol=0, atol=1e-3 * np.abs(kernels[0]).max())


def test_features_from_a_file(pixels, tmp_path):
    path, out = write(tmp_path, pixels), tmp_path / "picture.svg"
    result = run("demo", "--data", path, "--out", out, "--epochs", 3)
    assert result.exit_code == 0, result.output
    assert "train_y_noisy in the file" in result.output
    assert "a softmax head trained on the given labels, on 64 features" in result.output
    assert "clean network" not in result.output
    assert len(printed_scores(result.output)) == 13
    assert out.read_text().startswith("<?xml")


def test_the_head_in_the_file_is_the_one_refitted(pixels, tmp_path):
    kernel = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float16)
    data, head = demo.load_features(write(tmp_path, pixels | {"kernel": kernel}), noise=0.4, seed=0)
    case = demo.features_case(data, head, TRAINING)
    np.testing.assert_array_equal(case.noisy.kernel, kernel.astype(np.float32))
    assert data.num_classes == 12
    assert case.clean.kernel.shape == kernel.shape
    np.testing.assert_array_equal(case.noisy.bias, 0)
    assert case.noisy_from == "the head in the file"


def test_more_classes_than_features_and_few_rows(rng, tmp_path):
    arrays = {
        "train_x": rng.normal(size=(3, 2)),
        "train_y": np.array([0, 1, 2]),
        "test_x": rng.normal(size=(1, 2)),
        "test_y": np.array([4], np.uint8),
    }
    result = run("demo", "--data", write(tmp_path, arrays), "--out", tmp_path / "a.png", "--epochs", 2)
    assert result.exit_code == 0, result.output
    assert "5 classes" in result.output


@pytest.mark.slow
def test_clinc150_is_thinned_and_says_so(tmp_path):
    folder = os.environ.get("LIP_JAX_DATA")
    if not folder:
        pytest.skip("LIP_JAX_DATA does not name the folder of real data")
    path = Path(folder) / "clinc150_minilm.npz"
    result = run("demo", "--data", path, "--out", tmp_path / "a.png", "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert "150 classes" in result.output
    assert "Thinned: 16 of 151 ranks are shown; what follows counts all." in result.output
    printed = printed_scores(result.output)
    assert {f"rank {k}" for k in range(0, 151, 10)} <= printed.keys()
    assert printed["rank 150"] == printed["noisy head"]


def test_ranks_to_print():
    assert thinned(0, 1, 16) == [0, 1]
    assert thinned(0, 10, 16) == list(range(11))
    assert thinned(0, 150, 16) == list(range(0, 151, 10))


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ([False, False], "no rank"),
        ([False, True], "rank 1"),
        ([True, True, True, False, True], "ranks 0-2, 4"),
    ],
)
def test_ranks_in_words(where, text):
    assert _ranks(np.array(where)) == text


BAD_FILES = [
    ({"train_y": None}, "lacks train_y; it holds test_x, test_y, train_x, train_y_noisy"),
    ({"train_x": np.zeros((4, 2), int)}, "train_x must be floating, with two axes"),
    ({"train_x": np.zeros(4)}, "train_x must be floating, with two axes"),
    ({"train_x": np.full((1258, 64), np.nan)}, "train_x must be finite"),
    ({"train_x": np.full((1258, 64), 1e30)}, "train_x must be finite, squares included"),
    ({"train_x": np.zeros((1258, 64))}, "not zero throughout"),
    ({"test_x": np.ones((539, 63))}, "test_x must have the q = 64 columns of train_x; got float32[539,63]"),
    ({"train_y": np.zeros(7, int)}, "train_y must hold one integer class id per row, n = 1258; got int64[7]"),
    ({"test_y": np.zeros(539)}, "test_y must hold one integer class id per row"),
    ({"train_y_noisy": np.full(1258, -1)}, "train_y_noisy must hold class ids from 0; got -1 to -1"),
    ({"bias": np.zeros(10)}, "bias came without kernel"),
    ({"kernel": np.ones((64, 10)), "train_y_noisy": None}, "kernel came without train_y_noisy"),
    ({"kernel": np.ones((10, 64))}, "kernel must be (q, l), with the q = 64 columns of train_x"),
    ({"kernel": np.ones((64, 9))}, "at least the 10 classes of the labels; got float32[64,9]"),
    ({"kernel": np.ones((64, 10)), "bias": np.zeros(9)}, "bias must be finite and floating, one entry per"),
    (
        {name: np.zeros(n, int) for name, n in (("train_y", 1258), ("test_y", 539), ("train_y_noisy", 1258))},
        "at least two classes",
    ),
    ({"train_y": np.array([None] * 1258)}, "cannot be read"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FILES)
def test_bad_files_meet_a_sentence(changes, message, pixels, tmp_path):
    arrays = {name: array for name, array in (pixels | changes).items() if array is not None}
    out = tmp_path / "a.png"
    result = run("demo", "--data", write(tmp_path, arrays), "--out", out)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not out.exists()


@pytest.mark.parametrize(("name", "message"), [("absent.npz", "is no file"), ("text.npz", "is no .npz file")])
def test_a_path_that_is_no_archive_meets_a_sentence(name, message, tmp_path):
    (tmp_path / "text.npz").write_text("no arrays")
    result = run("demo", "--data", tmp_path / name, "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"lip-jax demo: {tmp_path / name} {message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--noise", 1.5), "--noise"),
        (("--epochs", 0), "--epochs"),
        (("--out", "nowhere/picture.png"), "the picture cannot be written to nowhere/picture.png"),
        (("--out", "picture.xyz"), "the picture picture.xyz must end in one of"),
        (("--out", "picture"), "the picture picture must end in one of"),
        (("--out", "."), "name a file in an existing folder"),
    ],
)
def test_bad_options_meet_a_sentence_before_any_work(options, message):
    result = run("demo", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_version_is_that_of_the_package():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"lip_jax {lip_jax.__version__}\n"


@pytest.mark.parametrize("package", ["typer", "matplotlib", "optax", "flax"])
def test_without_the_extra_it_says_what_to_install(package, monkeypatch, capsys):
    for name in [each for each in sys.modules if each.startswith(("lip_jax.commands", "lip_jax.demo"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lip_jax.plot")
    for name in [each for each in sys.modules if each.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "pip install 'lip_jax[cli]'" in capsys.readouterr().err


def test_the_entry_point_runs_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lip-jax", "--version"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("lip_jax ")


def test_the_same_seed_gives_the_same_case(digits, case):
    again = demo.digits_case(demo.hold_out(digits, seed=TRAINING.seed), TRAINING)
    np.testing.assert_array_equal(again.noisy.kernel, case.noisy.kernel)


def test_another_seed_splits_otherwise(digits):
    other = demo.load_digits(noise=0.4, seed=TRAINING.seed + 1)
    assert not np.array_equal(other.train.feats, digits.train.feats)


def test_held_out_rows_are_kept_from_training(digits):
    data = demo.hold_out(digits, seed=0)
    assert data.held_out.feats.shape[0] == data.held_out.labels.shape[0] == 252
    parts = (data.train.feats, data.held_out.feats, digits.train.feats)
    pixels = [np.reshape(x, (-1, 64)) @ np.arange(64.0) for x in parts]
    np.testing.assert_array_equal(np.sort(np.concatenate(pixels[:2])), np.sort(pixels[2]))


def test_of_few_rows_none_are_held_out(digits):
    few = replace(
        digits, train=jax.tree.map(lambda part: part[:60], digits.train), clean_y=digits.clean_y[:60]
    )
    assert demo.hold_out(few, seed=0) is few


@pytest.mark.slow
def test_the_choice_repairs_an_overfitted_network(tmp_path):
    # In a process that compiles as users do: 200 epochs pay for it.
    options = ["demo", "--epochs", "200", "--weight-decay", "0", "--seed", "3"]
    program = [sys.executable, "-m", "lip_jax.cli", *options]
    users = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [*program, "--out", tmp_path / "picture.png"], capture_output=True, text=True, check=False, env=users
    )
    assert done.returncode == 0, done.stderr
    [chosen] = re.findall(r"^\* (\w+)", done.stdout, re.MULTILINE)
    [(before, after)] = re.findall(r"On the test rows: accuracy (\S+) → (\S+)", done.stdout)
    assert chosen != "unchanged"
    assert float(after) > float(before) + 0.1
