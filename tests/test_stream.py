"""Streams: any iterator and any batches give what all rows give, once each, and a broken pass goes on."""

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lip_jax
from lip_jax.stream import batches as batching
from tests import zoo

N, Q, L = 50, 6, 4
RNG = np.random.default_rng(0)
FEATS, LABELS = RNG.normal(size=(N, Q)).astype(np.float32), RNG.integers(-1, L, N)
WEIGHTS = RNG.random(N).astype(np.float32)


class OfAnotherLibrary:
    """An array as TensorFlow and PyTorch have them: NumPy can read it, and that is all."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def accumulator():
    return lip_jax.moment_accumulator(Q, L)


def cut(size, *arrays):
    return [tuple(array[start : start + size] for array in arrays) for start in range(0, N, size)]


def expected(weights=None):
    state = accumulator()
    return state.update(state.init(), FEATS, LABELS, weights)


def assert_same(moments, weights=None):
    whole = expected(weights)
    kernel = np.ones((Q, L), np.float32) + np.eye(Q, L, dtype=np.float32)
    chex.assert_trees_all_close(moments.total, whole.total, rtol=1e-6)
    found, wanted = (lip_jax.linear_readout_from(part, ridge=1.0).kernel for part in (moments, whole))
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
    found, wanted = (lip_jax.refine_from(kernel, part, 1) for part in (moments, whole))
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


STREAMS = {
    "list": lambda: cut(7, FEATS, LABELS),
    "generator": lambda: (batch for batch in cut(7, FEATS, LABELS)),
    "function": lambda: lambda done: cut(7, FEATS, LABELS)[done:],
    "mappings": lambda: [{"labels": y, "feats": x} for x, y in cut(7, FEATS, LABELS)],
    "lists": lambda: [[x, y] for x, y in cut(7, FEATS, LABELS)],
    "arrays of JAX": lambda: [tuple(map(jnp.asarray, batch)) for batch in cut(7, FEATS, LABELS)],
    "another library": lambda: [tuple(map(OfAnotherLibrary, batch)) for batch in cut(7, FEATS, LABELS)],
    "empty batches": lambda: [(FEATS[:0], LABELS[:0]), *cut(25, FEATS, LABELS), (FEATS[:0], LABELS[:0])],
    "batches of one": lambda: cut(1, FEATS, LABELS),
    "memory": lambda: lip_jax.array_batches(FEATS, LABELS, 7),
}


@pytest.mark.parametrize("name", STREAMS)
def test_any_iterator_of_batches_will_do(name):
    assert_same(lip_jax.accumulate(accumulator(), STREAMS[name]()))


def test_a_pipeline_of_grain_will_do():
    grain = pytest.importorskip("grain")
    rows = grain.MapDataset.range(N).map(lambda i: (FEATS[i], LABELS[i])).batch(7)
    assert_same(lip_jax.accumulate(accumulator(), rows))
    assert_same(lip_jax.accumulate(accumulator(), rows.to_iter_dataset()))


def refilled(feats, labels, size=7):
    """Batches as a loader makes them that fills the same memory again and again, aligned as XLA likes it."""
    raw = np.zeros(4 * size * Q + 64, np.uint8)
    start = -raw.ctypes.data % 64
    held, ids = raw[start : start + 4 * size * Q].view(np.float32).reshape(size, Q), np.zeros(size, np.int32)
    for x, y in cut(size, feats, labels):
        held[: len(x)], ids[: len(y)] = x, y
        yield held[: len(x)], ids[: len(y)]


def test_a_loader_may_not_know_how_many_batches_it_has(capfd):
    class Unknown:
        """As `tf.data` and PyTorch have them."""

        def __len__(self):
            raise TypeError("The dataset length is unknown.")

        def __iter__(self):
            return iter(cut(10, FEATS, LABELS))

    assert_same(lip_jax.accumulate(accumulator(), Unknown(), progress=True))
    assert "5/?" in capfd.readouterr().err


def test_a_loader_may_use_its_memory_again():
    assert_same(lip_jax.accumulate(accumulator(), refilled(FEATS, LABELS)))
    feats = FEATS.copy()
    feats[3] = np.nan
    with pytest.raises(ValueError, match="batch 0: feats must be finite; row 3"):
        lip_jax.accumulate(accumulator(), refilled(feats, LABELS))


def test_batches_of_arrays_are_views_that_cannot_be_written_to():
    feats = FEATS.copy()
    batch = next(lip_jax.array_batches(feats, LABELS, 7))
    assert np.shares_memory(batch.feats, feats)
    with pytest.raises(ValueError, match="read-only"):
        batch.feats[0] = 0
    feats[0] = 0


def test_weights_may_come_with_some_batches_only():
    weights = np.where(np.arange(N) < 20, WEIGHTS, 1)
    batches = [(FEATS[:20], LABELS[:20], WEIGHTS[:20]), (FEATS[20:], LABELS[20:])]
    assert_same(lip_jax.accumulate(accumulator(), batches), weights)


def spied():
    """An accumulator, and the shapes of features it has been given."""
    seen = []
    held = accumulator()

    def update(state, feats, labels, weights):
        seen.append(feats.shape)
        return held.update(state, feats, labels, weights)

    return lip_jax.sums.Accumulator(held.init, update, held.merge, held.shape, None), seen


@pytest.mark.parametrize("rows", [1, 7, 50, 64])
def test_batches_are_cut_and_padded_to_the_rows_asked_for(rows):
    spy, seen = spied()
    assert_same(lip_jax.accumulate(spy, cut(20, FEATS, LABELS), batch_rows=rows))
    assert set(seen) == {(rows, Q)}


def test_no_batch_compiles_after_the_first(compilations):
    batches = iter([(FEATS[:20], LABELS[:20]), (FEATS[20:37], LABELS[20:37]), (FEATS[37:], LABELS[37:])])
    counts = []

    def counted():
        for batch in batches:
            yield batch
            counts.append(compilations())

    assert_same(lip_jax.accumulate(accumulator(), counted()))
    # A batch is read while the one before is computed, after that has been compiled.
    assert len(counts) == 3
    assert counts[1] == counts[2]


def test_rows_that_cannot_be_used_are_named_or_counted():
    feats, labels = FEATS.copy(), LABELS.copy()
    feats[23, 1], labels[24] = np.nan, L
    with pytest.raises(ValueError, match=r"batch 2: labels must be class ids below l = 4; got 4 at row 4"):
        lip_jax.accumulate(accumulator(), cut(10, FEATS, labels))
    with pytest.raises(ValueError, match=r"batch 2: feats must be finite.*unusable='skip'"):
        lip_jax.accumulate(accumulator(), cut(10, feats, LABELS))
    moments = lip_jax.accumulate(accumulator(), cut(10, feats, labels), unusable="skip")
    assert int(moments.ignored) == 2
    used = np.delete(np.arange(N), [23, 24])
    state = accumulator()
    without = state.update(state.init(), FEATS[used], LABELS[used])
    chex.assert_trees_all_close(moments.rows, without.rows)
    found, wanted = (lip_jax.linear_readout_from(part, ridge=1.0).kernel for part in (moments, without))
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


MISTAKES = {
    "no batch": ([FEATS], "batch 0 must be (feats, labels)", "got a ndarray"),
    "too many parts": ([(FEATS,) * 4], "batch 0 must be (feats, labels)", "got a tuple of length 4"),
    "other names": ([{"x": FEATS, "labels": LABELS}], "must hold 'feats', 'labels'", "got ['labels', 'x']"),
    "another length": (
        [(FEATS, LABELS[:9])],
        "batch 0: labels must have a row for each of feats",
        "int64[9]",
    ),
    "another width": ([(FEATS[:, :5], LABELS)], "batch 0: feats must have as many columns", "q = 6"),
    "another kind": (
        [(FEATS, LABELS[:, None])],
        "batch 0: labels of two axes must be float targets",
        "[50,1]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_messages_name_the_batch(name, unchecked):
    batches, *parts = MISTAKES[name]
    with pytest.raises(ValueError) as error:
        lip_jax.accumulate(accumulator(), batches)
    for part in parts:
        assert part in str(error.value)


OPTIONS = {
    "unusable": ({"unusable": "drop"}, "unusable must be 'raise' or 'skip'; got 'drop'"),
    "batch_rows": ({"batch_rows": 0}, "batch_rows must be an int of at least 1; got 0"),
    "every": ({"every": 1.5}, "every must be an int of at least 1; got 1.5"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_checked(name, unchecked):
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        lip_jax.accumulate(accumulator(), [], **options)


def test_a_bar_is_shown_where_asked_for_and_by_default_only_on_a_terminal(capfd):
    lip_jax.accumulate(accumulator(), cut(10, FEATS, LABELS))
    assert capfd.readouterr() == ("", "")
    lip_jax.accumulate(accumulator(), cut(10, FEATS, LABELS), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "5/5" in err


class KilledError(Exception):
    """Stands for the end of the process."""


def broken_after(count, batches):
    for i, batch in enumerate(batches):
        if i == count:
            raise KilledError
        yield batch


@pytest.mark.parametrize("level", ["moments", "tail"])
@pytest.mark.parametrize("seek", [False, True])
def test_a_broken_pass_goes_on_and_ends_with_the_same_numbers(tmp_path, level, seek):
    split = lip_jax.svd_split(np.eye(Q, L, dtype=np.float32), 0)
    held = accumulator() if level == "moments" else lip_jax.tail_accumulator(split)
    batches = cut(7, FEATS, LABELS)
    uninterrupted = lip_jax.accumulate(held, batches)
    options = {"checkpoint": tmp_path / "pass", "every": 2}
    with pytest.raises(KilledError):
        lip_jax.accumulate(held, broken_after(5, batches), **options)
    read = []

    def rest(done):
        read.append(done)
        return batches[done:]

    resumed = lip_jax.accumulate(held, rest if seek else batches, **options)
    # The fifth batch had been read ahead, but only what was computed counts.
    assert read == ([4] if seek else [])
    chex.assert_trees_all_equal(resumed, uninterrupted)
    # All is done: asked again, nothing is read.
    chex.assert_trees_all_equal(lip_jax.accumulate(held, iter(batches), **options), uninterrupted)


def total_resumed(folder, done, rest):
    """The labelled rows of a pass over batches of 10 that broke after `done`, and went on with others."""
    options = {"checkpoint": folder, "every": 1}
    with pytest.raises(KilledError):
        lip_jax.accumulate(accumulator(), broken_after(done, cut(10, FEATS, LABELS)), **options)
    return float(lip_jax.accumulate(accumulator(), lambda done: rest[done:], **options).total)


@pytest.mark.parametrize("size", [4, 12])
def test_a_pass_that_goes_on_with_other_batches_warns(tmp_path, size):
    message = rf"of which 3 were summed: the next has {size} rows, those had 10 to 10\. If they are cut"
    with pytest.warns(UserWarning, match=message):
        total_resumed(tmp_path, 3, cut(size, FEATS, LABELS))


def test_a_pass_that_goes_on_with_the_same_batches_does_not_warn(tmp_path):
    batches = cut(10, FEATS, LABELS)
    empty = FEATS[:0], LABELS[:0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert total_resumed(tmp_path / "same", 3, batches) == (LABELS >= 0).sum()
        # The last batch, and batches without rows, may be smaller.
        total_resumed(tmp_path / "short", 4, [*batches[:4], (FEATS[40:43], LABELS[40:43])])
        total_resumed(tmp_path / "empty", 3, [*batches[:3], empty, *batches[3:]])


def test_a_checkpoint_without_sizes_of_batches_goes_on(tmp_path):
    batches = cut(10, FEATS, LABELS)
    with pytest.raises(KilledError):
        lip_jax.accumulate(accumulator(), broken_after(3, batches), checkpoint=tmp_path, every=1)
    (saved,) = (tmp_path / "process_0_of_1" / "3" / "position").glob("metadata*")
    position = json.loads(saved.read_text())
    for name in ("smallest", "largest", "spread"):
        del position[name]
    saved.write_text(json.dumps(position))
    chex.assert_trees_all_equal(
        lip_jax.accumulate(accumulator(), batches, checkpoint=tmp_path),
        lip_jax.accumulate(accumulator(), batches),
    )


def test_a_resumed_pass_takes_the_rows_asked_for_or_as_before(tmp_path):
    for rows in (5, None):
        options = {"checkpoint": tmp_path / str(rows), "every": 1}
        with pytest.raises(KilledError):
            lip_jax.accumulate(accumulator(), broken_after(3, cut(10, FEATS, LABELS)), **options)
        spy, seen = spied()
        assert_same(lip_jax.accumulate(spy, cut(10, FEATS, LABELS), batch_rows=rows, **options))
        assert set(seen) == {(rows or 10, Q)}


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    batches = cut(7, FEATS, LABELS)
    split = lip_jax.svd_split(np.eye(Q, L, dtype=np.float32), 0)
    other = lip_jax.svd_split(2 * np.eye(Q, L, dtype=np.float32)[::-1], 0)
    lip_jax.accumulate(lip_jax.tail_accumulator(split), batches, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint .* is of another accumulator: split"):
        lip_jax.accumulate(lip_jax.tail_accumulator(other), batches, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="moments TailMoments, not Moments"):
        lip_jax.accumulate(accumulator(), batches, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"shape \[6, 4\], not \[6, 9\]"):
        lip_jax.accumulate(lip_jax.moment_accumulator(Q, 9), batches, checkpoint=tmp_path)
    (tmp_path / "process_0_of_1").rename(tmp_path / "process_0_of_2")
    with pytest.raises(ValueError, match=r"of another number of processes \(process_0_of_2\) than 1"):
        lip_jax.accumulate(lip_jax.tail_accumulator(split), batches, checkpoint=tmp_path)


def test_a_checkpoint_is_restored_by_name_and_one_of_other_sums_is_refused(tmp_path):
    batches = cut(10, FEATS, LABELS)
    with pytest.raises(KilledError):
        lip_jax.accumulate(accumulator(), broken_after(3, batches), checkpoint=tmp_path, every=1)
    saved = tmp_path / "process_0_of_1" / "3"
    with np.load(saved / "state" / "arrays.npz") as held:
        arrays = dict(held)
    np.savez(saved / "state" / "arrays.npz", **dict(reversed(arrays.items())))
    other = shutil.copytree(tmp_path, tmp_path.with_name("other"))
    found = lip_jax.accumulate(accumulator(), batches, checkpoint=tmp_path)
    chex.assert_trees_all_equal(found, lip_jax.accumulate(accumulator(), batches))
    position = next((other / "process_0_of_1" / "3" / "position").glob("metadata*"))
    position.write_text(position.read_text().replace("compensation_gram", "compensation_squares"))
    with pytest.raises(ValueError, match=r"of another accumulator: arrays .*compensation_squares"):
        lip_jax.accumulate(accumulator(), batches, checkpoint=other)


KILLED = """
import sys
import numpy as np
import lip_jax

rng = np.random.default_rng(0)
feats, labels = rng.normal(size=(4000, 16)).astype(np.float32), rng.integers(0, 5, 4000)
batches = lambda done: lip_jax.array_batches(feats, labels, 10, start=done)
moments = lip_jax.accumulate(lip_jax.moment_accumulator(16, 5), batches, checkpoint=sys.argv[1], every=5)
np.savez(sys.argv[2], *moments.sums)
"""


def test_a_killed_process_goes_on_and_ends_with_the_same_numbers(tmp_path):
    def start(name):
        folder, out = tmp_path / name, tmp_path / f"{name}.npz"
        return subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(out)])

    process = start("killed")
    while not any(path.name.isdigit() for path in (tmp_path / "killed").glob("*/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "killed.npz").exists()
    for name in ("killed", "whole"):
        process = start(name)
        assert process.wait(120) == 0
    with np.load(tmp_path / "killed.npz") as killed, np.load(tmp_path / "whole.npz") as whole:
        for name in whole:
            np.testing.assert_array_equal(killed[name], whole[name])


@pytest.mark.parametrize("count", [1, 3, 7])
def test_shares_hold_every_row_once(count):
    rows = [
        batch.labels
        for index in range(count)
        for batch in lip_jax.array_batches(FEATS, np.arange(N), 4, share=(index, count))
    ]
    assert sorted(np.concatenate(rows)) == list(range(N))
    assert max(map(len, rows)) <= 4


def test_memory_maps_are_not_copied(tmp_path):
    np.save(tmp_path / "feats.npy", FEATS)
    feats = np.load(tmp_path / "feats.npy", mmap_mode="r")
    for batch in lip_jax.array_batches(feats, LABELS, 20, weights=WEIGHTS, start=1):
        assert np.shares_memory(batch.feats, feats)
        assert isinstance(batch.feats, np.memmap)
    assert_same(lip_jax.accumulate(accumulator(), lip_jax.array_batches(feats, LABELS, 20)))


@pytest.fixture(params=["npz", "npy", "npz weighted", "npy weighted"])
def shards(request, tmp_path):
    kind, *weighted = request.param.split()
    for i, (feats, labels, weights) in enumerate(cut(13, FEATS, LABELS, WEIGHTS)):
        arrays = {"feats": feats, "labels": labels} | ({"weights": weights} if weighted else {})
        if kind == "npz":
            np.savez(tmp_path / f"part{i}.npz", **arrays)
        else:
            for name, array in arrays.items():
                np.save(tmp_path / f"part{i}.{name}.npy", array)
    return tmp_path, WEIGHTS if weighted else None


def test_folders_of_shards_are_read_in_order(shards):
    folder, weights = shards
    assert_same(lip_jax.accumulate(accumulator(), lip_jax.stream.shard_batches(folder, 5)), weights)
    all_batches = list(lip_jax.stream.shard_batches(folder, 5))
    np.testing.assert_array_equal(np.concatenate([batch.feats for batch in all_batches]), FEATS)
    for start in (0, 2, 3, 7, len(all_batches)):
        rest = list(lip_jax.stream.shard_batches(folder, 5, start=start))
        chex.assert_trees_all_equal(rest, all_batches[start:])
    shares = [
        batch for index in range(3) for batch in lip_jax.stream.shard_batches(folder, 5, share=(index, 3))
    ]
    assert sum(len(batch.labels) for batch in shares) == N


def test_folders_without_shards_and_shards_without_arrays_are_named(tmp_path, unchecked):
    with pytest.raises(
        ValueError, match=r"folder .* holds no shards: neither NAME\.npz nor NAME\.feats\.npy"
    ):
        lip_jax.stream.shard_batches(tmp_path, 5)
    np.savez(tmp_path / "a.npz", feats=FEATS)
    with pytest.raises(ValueError, match=r"a\.npz lacks labels"):
        list(lip_jax.stream.shard_batches(tmp_path, 5))
    (tmp_path / "a.npz").unlink()
    np.save(tmp_path / "b.feats.npy", FEATS)
    with pytest.raises(ValueError, match=r"b\.feats\.npy lacks b\.labels\.npy"):
        list(lip_jax.stream.shard_batches(tmp_path, 5))
    with pytest.raises(ValueError, match=r"share must be \(i, k\) with 0 <= i < k; got \(2, 2\)"):
        lip_jax.stream.shard_batches(tmp_path, 5, share=(2, 2))
    with pytest.raises(
        ValueError, match=r"labels must have a row for each of the 50 of feats; got int64\[9\]"
    ):
        lip_jax.array_batches(FEATS, LABELS[:9], 5)


@pytest.fixture(scope="module")
def digits():
    images, labels = zoo.digits()
    return np.asarray(images[:300]), np.asarray(labels[:300])


def inputs(images, labels, size=64):
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]


def test_a_linen_model_streamed_from_inputs_is_refitted_as_from_stored_features(digits):
    images, labels = digits
    model = zoo.BatchNormCNN()
    variables = model.init(jax.random.key(0), images[:1])
    feats = lip_jax.capture_features(model, variables, images, head="Dense_1")
    stored = lip_jax.apply(variables, feats, labels, rank=4, head="Dense_1")
    features = lip_jax.feature_batches(model, variables, inputs(images, labels), head="Dense_1", train=False)
    moments = lip_jax.accumulate(lip_jax.moment_accumulator(feats.shape[1], 10), features)
    assert float(moments.rows) == 300
    streamed = lip_jax.apply_from(variables, moments, rank=4, head="Dense_1")
    chex.assert_trees_all_close(streamed, stored, rtol=1e-3, atol=1e-5)


def test_a_loader_may_use_the_memory_of_its_inputs_again():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(L)])
    variables = model.init(jax.random.key(0), FEATS[:1])

    def sums(batches):
        features = lip_jax.feature_batches(model, variables, batches, head="layers_2")
        return lip_jax.accumulate(lip_jax.moment_accumulator(8, L), features)

    found, expected = sums(refilled(FEATS, LABELS)), sums(cut(7, FEATS, LABELS))
    chex.assert_trees_all_equal(found, expected)


def test_an_nnx_model_streamed_from_inputs_is_refitted_as_from_stored_features(digits):
    images, labels = digits
    model = zoo.NnxClassifier(nnx.Rngs(0))
    model.eval()
    feats = lip_jax.capture_features(model, None, images, head="head")
    stored = lip_jax.apply(model, feats, labels, rank=4, head="head")
    for state in (None, nnx.state(model)):
        features = lip_jax.feature_batches(model, state, inputs(images, labels), head="head")
        moments = lip_jax.accumulate(lip_jax.moment_accumulator(feats.shape[1], 10), features)
        streamed = lip_jax.apply_from(model, moments, rank=4, head="head")
        chex.assert_trees_all_close(
            nnx.state(streamed, nnx.Param), nnx.state(stored, nnx.Param), rtol=1e-3, atol=1e-5
        )


def test_heads_that_see_tokens_get_a_row_for_each():
    model = zoo.TiedLanguageModel()
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 10, (30, 5)), rng.integers(-1, 10, (30, 5))
    variables = model.init(jax.random.key(0), tokens[:1])
    options = {"head": "Embed_0/embedding", "layout": "l q"}
    feats = lip_jax.capture_features(model, variables, tokens, **options)
    assert feats.shape == (30, 5, 6)
    held = lip_jax.moment_accumulator(6, 10)
    expected = held.update(held.init(), feats.reshape(-1, 6), labels.reshape(-1))
    for weights in (None, np.ones(30), np.ones((30, 5))):
        batches = [
            (tokens[i : i + 8], labels[i : i + 8], None if weights is None else weights[i : i + 8])
            for i in range(0, 30, 8)
        ]
        moments = lip_jax.accumulate(held, lip_jax.feature_batches(model, variables, batches, **options))
        found, wanted = (lip_jax.linear_readout_from(part, ridge=1.0).kernel for part in (moments, expected))
        chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_inputs_that_do_not_fit_are_named(digits):
    images, labels = digits
    model = zoo.BatchNormCNN()
    variables = model.init(jax.random.key(0), images[:1])

    def stream_of(batches, **options):
        return list(lip_jax.feature_batches(model, variables, batches, head="Dense_1", **options))

    with pytest.raises(ValueError, match=r"batch 0 must be \(inputs, labels\).*got a ndarray"):
        stream_of([images])
    with pytest.raises(ValueError, match=r"batch 1 has 20 rows, more than 10. Pass batch_rows="):
        stream_of([(images[:10], labels[:10]), (images[:20], labels[:20])])
    with pytest.raises(ValueError, match=r"labels must have an entry for each input of the head, \(10,\)"):
        stream_of([(images[:10], np.tile(labels[:10, None], 2))])


class Scaled(nn.Module):
    """Two inputs, of which the second may have no rows."""

    @nn.compact
    def __call__(self, x, scale):
        return nn.Dense(L, name="head")(x * jnp.mean(scale))


SCALE = np.ones((N, 1), np.float32)
PARTS = {
    "labels": (((FEATS, SCALE), LABELS[:9]), "labels must have a row for each of inputs[0]"),
    "weights": (((FEATS, SCALE), LABELS, WEIGHTS[:9]), "weights must have a row for each of inputs[0]"),
    "an input": (((FEATS, SCALE[:9]), LABELS), "inputs[1] must have a row for each of inputs[0]"),
    "a number": (((FEATS, np.float32(2)), LABELS), "inputs[1] must have a row for each of inputs[0]"),
    "the first": (((np.float32(2), SCALE), LABELS), "inputs[0] must have a row for each of inputs[1]"),
    "no axes": (((np.float32(2), np.float32(2)), np.int32(0)), "inputs[0] must have a row for each of"),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_batch_without_a_row_for_each_are_named(part):
    batch, message = PARTS[part]
    variables = Scaled().init(jax.random.key(0), FEATS, SCALE)
    good = (FEATS, SCALE), LABELS
    with pytest.raises(ValueError) as error:
        list(lip_jax.feature_batches(Scaled(), variables, [good, batch], head="head"))
    assert f"batch 1: {message}" in str(error.value)
    assert "What has no row for each belongs in apply_kwargs." in str(error.value)
    (rows,) = lip_jax.feature_batches(
        Scaled(), variables, [(FEATS, LABELS)], head="head", scale=np.full(3, 2, np.float32)
    )
    chex.assert_trees_all_close(rows.feats, 2 * FEATS)


def test_batches_without_inputs_stay_batches(tmp_path):
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(L)])
    variables = model.init(jax.random.key(0), FEATS[:1])
    inputs = [(FEATS[:0], LABELS[:0]), *cut(10, FEATS, LABELS)]
    inputs.insert(2, (FEATS[:0], LABELS[:0], WEIGHTS[:0]))

    def features(done):
        return lip_jax.feature_batches(model, variables, inputs[done:], head="layers_2")

    assert [rows.feats.shape for rows in features(0)] == [(0, 8), (10, 8), (0, 8), *[(10, 8)] * 4]
    held, options = lip_jax.moment_accumulator(8, L), {"checkpoint": tmp_path, "every": 1}
    with pytest.raises(KilledError):
        lip_jax.accumulate(held, broken_after(4, features(0)), **options)
    found = lip_jax.accumulate(held, features, **options)
    chex.assert_trees_all_equal(found, lip_jax.accumulate(held, features(0)))
    assert float(found.total) == (LABELS >= 0).sum()


def test_sequences_of_no_rows_have_the_width_of_the_head():
    model = zoo.TiedLanguageModel()
    tokens = np.zeros((0, 5), int)
    variables = model.init(jax.random.key(0), np.zeros((1, 5), int))
    for labels in (tokens, np.zeros((0, 5, 10), np.float32)):
        batches = [(tokens, labels)]
        (rows,) = lip_jax.feature_batches(model, variables, batches, head="Embed_0/embedding", layout="l q")
        assert [part.shape for part in rows] == [(0, 6), (0, *labels.shape[2:]), (0,)]


@pytest.mark.parametrize("mutable", [True, False, "batch_stats", ["batch_stats"], nn.DenyList("params")])
def test_any_filter_of_mutable_collections_will_do(mutable, digits):
    images, labels = digits
    model = zoo.BatchNormCNN()
    variables = model.init(jax.random.key(0), images[:1])
    options = {"head": "Dense_1", "train": False}
    expected = lip_jax.capture_features(model, variables, images, **options)
    (rows,) = lip_jax.feature_batches(model, variables, [(images, labels)], mutable=mutable, **options)
    chex.assert_trees_all_close(rows.feats, expected, atol=1e-6)


class Step(nn.Module):
    """A step of a sequence, with the head inside."""

    @nn.compact
    def __call__(self, carry, x):
        carry = nn.tanh(nn.Dense(8)(jnp.concatenate([carry, x], axis=-1)))
        return carry, nn.Dense(L, name="head")(carry)


class Transformed(nn.Module):
    """A step under one of linen's own transformations."""

    transform: str
    axes: tuple[tuple[str, int], ...] = ()

    @nn.compact
    def __call__(self, x):
        options = {"variable_broadcast": "params", "variable_axes": dict(self.axes), "in_axes": 1}
        options = {**options, "split_rngs": {"params": False}} if self.transform == "scan" else {}
        return getattr(nn, self.transform)(Step, **options)(name="step")(jnp.zeros((N, 8)), x)[1]


def test_heads_inside_transformations_of_linen_are_seen_or_the_message_says_how():
    for transform in ("jit", "remat"):
        model = Transformed(transform)
        variables = model.init(jax.random.key(0), FEATS)
        assert lip_jax.capture_features(model, variables, FEATS, head="step/head").shape == (N, 8)
    steps = np.stack([FEATS, FEATS, FEATS], axis=1)
    model = Transformed("scan")
    variables = model.init(jax.random.key(0), steps)
    with pytest.raises(ValueError, match=r"got no call \(.* variable_axes=\{'lip_jax_head': 0, \.\.\.\}"):
        lip_jax.capture_features(model, variables, steps, head="step/head")
    told = Transformed("scan", (("lip_jax_head", 0),))
    feats = lip_jax.capture_features(told, variables, steps, head="step/head")
    assert feats.shape == (3, N, 8)
    head = variables["params"]["step"]["head"]
    found = feats @ head["kernel"] + head["bias"][None, None, :]
    chex.assert_trees_all_close(found, model.apply(variables, steps), atol=1e-5)


def test_padding_counts_for_nothing():
    rows = batching.pad_rows((FEATS[:3], LABELS[:3], WEIGHTS[:3]), 5)
    assert [part.shape[0] for part in rows] == [5, 5, 5]
    held = accumulator()
    padded, plain = (
        held.update(held.init(), *rows),
        held.update(held.init(), FEATS[:3], LABELS[:3], WEIGHTS[:3]),
    )
    chex.assert_trees_all_close((padded.rows, padded.total), (plain.rows, plain.total))
    assert batching.pad_rows(FEATS, N) is FEATS
    # Memory of its own that nobody writes to need not be copied.
    for part in (rows[0], rows[2]):
        assert batching.placed(part, None).unsafe_buffer_pointer() == part.ctypes.data
