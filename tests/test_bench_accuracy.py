"""The accuracy table: official CIFAR files, small networks, single cells end to end, and the verdicts."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks import accuracy, accuracy_report, cifar, heads, networks
from benchmarks.accuracy_report import Cell, Draw

PER_BATCH = 24


def pickled_as_python_2(content) -> bytes:
    """A pickle as the official files hold: protocol 2, and arrays under NumPy's older name."""
    return pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core")


@pytest.fixture(scope="module")
def pixels():
    """Images of 4 classes told apart by their mean colour, as the rows of 7 batches."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (7, PER_BATCH))
    images = rng.integers(0, 100, (7, PER_BATCH, 3, 1024)) + 35 * labels[:, :, None, None]
    return images.reshape(7, PER_BATCH, 3072).astype(np.uint8), labels


@pytest.fixture
def cifar10(tmp_path, pixels):
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, data, labels in zip(names, *pixels, strict=False):
        batch = {b"data": data, b"labels": labels.tolist(), b"batch_label": name.encode(), b"filenames": []}
        (tmp_path / name).write_bytes(pickled_as_python_2(batch))
    return tmp_path


@pytest.fixture
def cifar100(tmp_path, pixels):
    for name, data, labels in zip(("train", "test"), *pixels, strict=False):
        batch = {b"data": data, b"fine_labels": labels.tolist(), b"coarse_labels": [0] * PER_BATCH}
        (tmp_path / name).write_bytes(pickled_as_python_2(batch))
    return tmp_path


def test_cifar10_files_are_read_in_order_with_colour_planes_last(cifar10, pixels):
    images = cifar.load_cifar(cifar10)
    assert images.train_x.shape == (5 * PER_BATCH, 32, 32, 3)
    assert images.test_x.shape == (PER_BATCH, 32, 32, 3)
    np.testing.assert_array_equal(images.train_y, pixels[1][:5].ravel())
    np.testing.assert_array_equal(images.test_y, pixels[1][5])
    restored = np.rint(255 * (images.train_x * cifar.STD + cifar.MEAN))
    # Row-major planes: red, then green, then blue.
    batch, image, colour, row, column = 3, 7, 2, 20, 11
    expected = pixels[0][batch, image, 1024 * colour + 32 * row + column]
    assert restored[batch * PER_BATCH + image, row, column, colour] == expected


def test_cifar100_files_give_their_fine_labels(cifar100, pixels):
    images = cifar.load_cifar(cifar100)
    np.testing.assert_array_equal(images.train_y, pixels[1][0])
    np.testing.assert_array_equal(images.test_y, pixels[1][1])


def test_a_folder_without_the_files_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_batch_1"):
        cifar.load_cifar(tmp_path)


def test_a_pickle_that_names_a_function_is_refused(cifar10):
    (cifar10 / "data_batch_2").write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(pickle.UnpicklingError, match="print"):
        cifar.load_cifar(cifar10)


def test_the_resnet_has_34_layers():
    model = networks.ResNet(10)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    paths = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    kernels = [leaf for path, leaf in paths if path[-1].key == "kernel"]
    projections = [kernel for kernel in kernels if kernel.ndim == 4 and kernel.shape[:2] == (1, 1)]
    assert len(kernels) - len(projections) == 34
    assert variables["params"]["head"]["kernel"].shape == (512, 10)


def test_a_small_resnet_goes_from_files_to_problems(cifar10):
    model = networks.ResNet(4, blocks=(1,), width=8)
    options = {"epochs": {"memorised": 1}, "noises": [("symmetric", 0.2)], "batch_size": 54}
    tasks = list(accuracy.cifar(cifar10, [0], model=model, **options))
    assert [(cell.regime, cell.rows) for cell, _, _ in tasks] == [
        ("memorised", "training"),
        ("memorised", "held-out"),
    ]
    problem = tasks[1][2]
    assert [part.x.shape for part in problem[1:]] == [(6, 8), (6, 8), (PER_BATCH, 8)]
    assert problem.head.kernel.shape == (8, 4)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(problem))


def test_noise_of_all_parts_follows_one_model():
    rng = np.random.default_rng(0)
    feats, labels = rng.normal(size=(4000, 6)).astype(np.float32), rng.integers(0, 5, 4000).astype(np.int32)
    parts = [accuracy.Part(feats[:3000], labels[:3000]), accuracy.Part(feats[3000:], labels[3000:])]
    for kind in ("symmetric", "asymmetric", "instance"):
        noisy = accuracy.corrupt((kind, 0.3), 0, parts, 5)
        assert [part.shape for part in noisy] == [(3000,), (1000,)]
        for part, given in zip(parts, noisy, strict=True):
            assert np.mean(part.y != np.asarray(given)) == pytest.approx(0.3, abs=0.05)


def test_robust_losses_are_what_their_names_say():
    logits, labels = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), jnp.array([0, 2])
    p = jax.nn.softmax(logits)[jnp.arange(2), labels]
    np.testing.assert_allclose(heads.generalised_cross_entropy(logits, labels, 1.0), 1 - p, rtol=1e-5)
    np.testing.assert_allclose(heads.generalised_cross_entropy(logits, labels, 1e-4), -jnp.log(p), rtol=1e-3)
    everywhere = -jax.nn.log_softmax(logits).mean(axis=1)
    smoothed = heads.smoothed_cross_entropy(logits, labels, 0.1)
    np.testing.assert_allclose(smoothed, -0.9 * jnp.log(p) + 0.1 * everywhere, rtol=1e-5)


@pytest.fixture(scope="module")
def digit_draws():
    """The MLP on clean labels, early-stopped and memorised, with one seed."""
    # optax's Adam takes a float to an integer power, which strict dtype promotion forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("raise"):
        return [accuracy.measure(task) for task in itertools.islice(accuracy.digits(None, [0]), 2)]


def test_digits_cells_end_to_end(digit_draws):
    clean_stopped, clean_memorised = digit_draws[:2]
    assert clean_stopped.cell == Cell(
        "digits MLP", "symmetric", 0.0, "early-stopped", "cross-entropy", "training"
    )
    assert clean_memorised.cell.regime == "memorised"
    for draw in digit_draws:
        values = draw.values
        assert values["base"] > 80
        assert values["best"] >= max(values[name] for name in ("base", *accuracy.FAMILIES))
        assert values["gain"] == pytest.approx(values["choice"] - values["base"])
        assert values["regret"] == pytest.approx(values["best"] - values["choice"])
        assert (draw.family == "unchanged") <= (values["gain"] == 0)


def test_tables_come_back_from_csv_and_are_judged(digit_draws, tmp_path):
    summaries = accuracy_report.summarise(digit_draws)
    path = tmp_path / "accuracy_digits.csv"
    accuracy_report.write_csv(summaries, path)
    held = accuracy_report.read_csv(path)
    assert [row.cell for row in held] == [row.cell for row in summaries]
    for row, again in zip(summaries, held, strict=True):
        assert again.std == pytest.approx(row.std, abs=1e-4)
        assert again.mean == pytest.approx({name: row.mean[name] for name in again.mean}, abs=1e-4)
    text = accuracy_report.markdown(held)
    assert "## digits MLP" in text
    assert f"| {len(held)} of {len(held)} cells (100.0%); lowest gain" in text
    accuracy_report.draw(held, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 0


def test_tables_of_other_columns_are_refused_before_anything_is_measured(tmp_path):
    path = tmp_path / "accuracy_clinc150.csv"
    path.write_text("dataset,base,base std\nCLINC150,1,1\n")
    with pytest.raises(ValueError, match=r"accuracy_clinc150.csv lacks the columns \['published at 3r/4'"):
        accuracy.main(None, tmp_path, "digits", 1, None, None)


CELL = Cell("CLINC150", "symmetric", 0.2, "well regularised", "cross-entropy", "training")


def hand_made(cell=CELL, seed=0, family="ridge", **changed):
    """A draw with base 80, choice 81, best 81.5, and the given values in place of those."""
    names = (*accuracy_report.COLUMNS, "LIP choice", "default")
    values = dict.fromkeys(names, 80.0) | {"choice": 81.0, "best": 81.5}
    values |= {"gain": 1.0, "gain error": 0.2, "regret": 0.5, "regret error": 0.2, "published gain": 0.0}
    values |= {"least regret": 0.0, "LIP gain": 0.0, "default gain": 0.0}
    values |= {"log-loss base": 1.0, "log-loss choice": 1.0}
    return Draw(cell, seed, values | {name.replace("_", " "): x for name, x in changed.items()}, family)


def cells(*changes):
    """One summary for each set of changes, at rates of their own."""
    draws = [hand_made(CELL._replace(rate=0.1 * i), **change) for i, change in enumerate(changes)]
    return accuracy_report.summarise(draws)


def test_a_loss_counts_beyond_three_tenths_and_two_errors():
    verdict = accuracy_report.never_worse(
        cells({"gain": -0.29}, {"gain": -0.5, "gain_error": 0.3}, {"gain": -0.5, "gain_error": 0.2})
    )
    assert not verdict.holds
    assert [missed.startswith(str(CELL._replace(rate=0.2))) for missed in verdict.missed] == [True]
    assert verdict.figure.startswith("2 of 3 cells (66.7%)")
    assert accuracy_report.never_worse(cells({"gain": -0.29}, {})).holds


def test_one_cell_in_ten_may_be_far_from_the_best():
    far, near = {"regret": 1.5, "regret_error": 0.6}, {"regret": 1.5, "regret_error": 0.8}
    assert accuracy_report.near_best(cells(far, *[near] * 9)).holds
    assert not accuracy_report.near_best(cells(far, far, *[near] * 9)).holds


def test_cells_that_a_rule_which_knew_the_best_family_would_meet_are_counted():
    missed = {"regret": 1.5, "least_regret": 0.9}, {"regret": 1.5, "least_regret": 1.5}
    figure = accuracy_report.near_best(cells({}, *missed)).figure
    assert figure.startswith("1 of 3 cells (33.3%); 2 of 3 cells (66.7%) if the best family were known")


def test_what_validation_rows_can_show_takes_three_errors_of_them_all():
    x, clean = np.eye(2, dtype=np.float32)[np.arange(200) % 2], np.arange(200) % 2
    kernels = ([[1.0, 0]] * 2, [[1.0, 0], [0, 1]])
    always_0, right = (accuracy.Head(jnp.array(kernel), jnp.zeros(2)) for kernel in kernels)
    for shown, better in ((False, 9), (True, 11)):
        # On rows of class 1 both are wrong, but for the first few.
        y = np.where((clean == 1) & (np.cumsum(clean) > better), 2, clean).astype(np.int32)
        assert (better > 3 * np.sqrt(better * (1 - better / 200) + 1)) == shown
        for labels in (y, np.eye(3, dtype=np.float32)[y]):
            problem = accuracy.Problem(always_0, None, accuracy.Part(x, labels), None)
            assert accuracy.can_be_shown(right, problem) == shown


def test_errors_of_a_cell_shrink_with_its_draws():
    row = accuracy_report.summarise([hand_made(seed=seed, gain_error=0.4) for seed in range(4)])[0]
    assert row.mean["gain error"] == pytest.approx(0.2)
    assert row.draws == 4


def test_log_loss_may_rise_by_two_percent():
    risen = [f"log-loss {1 + rise:.3f}" for rise in (0.019, 0.021)]
    draws = [
        hand_made(CELL._replace(dataset=name))._replace(
            values=hand_made().values | {"log-loss choice": float(name.split()[-1])}
        )
        for name in risen
    ]
    verdict = accuracy_report.log_loss_kept(accuracy_report.summarise(draws))
    assert not verdict.holds
    assert len(verdict.missed) == 1


def test_one_losing_draw_breaks_never():
    draws = [hand_made(seed=seed, default_gain=gain) for seed, gain in enumerate((1.0, 1.0, -0.2))]
    verdict = accuracy_report.default_never_loses(accuracy_report.summarise(draws), "never")
    assert not verdict.holds
    assert "worst draw -0.20" in verdict.figure


def test_mean_gain_takes_its_error_from_the_spread_within_cells():
    draws = [hand_made(seed=seed, published_gain=gain) for seed, gain in enumerate((1.0, 3.0))]
    constant = [hand_made(CELL._replace(rate=0.4), seed=seed, published_gain=10.0) for seed in range(2)]
    mean, error = accuracy_report.mean_gain(accuracy_report.summarise(draws + constant), "published gain")
    assert mean == pytest.approx(6.0)
    assert error == pytest.approx(0.5)  # √(2/2)/2
    assert not accuracy_report.published_claim(cells({"published_gain": -0.1})).holds
