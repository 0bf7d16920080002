"""Processes of `jax.distributed` over loopback: one answer, a clear end, and a restart that goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
ROWS, Q, L, RANK = 240, 32, 10, 3


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A head, and shards of different sizes about a mean far from 0."""
    folder = tmp_path_factory.mktemp("job")
    rng = np.random.default_rng(0)
    (folder / "shards").mkdir()
    for i in range(9):
        feats = rng.normal(size=(ROWS + 7 * i, Q)) + 30
        labels = rng.integers(-1, L, len(feats))
        np.savez(folder / "shards" / f"{i}.npz", feats=feats.astype(np.float32), labels=labels)
    np.savez(folder / "head.npz", kernel=rng.normal(size=(Q, L)).astype(np.float32))
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(job, count, out, *options):
    """The example as a user starts it, once a process."""
    port = free_port()
    command = [sys.executable, ROOT / "examples/multihost.py", "--shards", job / "shards"]
    command += ["--head", job / "head.npz", "--out", out, "--rank", str(RANK), "--batch-rows", "16"]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", str(count), *options]
    return [opened([*command, "--process-id", index]) for index in range(count)]


def opened(command):
    return subprocess.Popen(
        [*map(str, command)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(processes, seconds=120):
    """What each printed, and its exit status."""
    try:
        return [(process.communicate(timeout=seconds)[0], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def kernel_in(path):
    with np.load(path) as held:
        return held["kernel"]


@pytest.fixture(scope="module")
def alone(job):
    out = job / "alone.npz"
    ((text, status),) = finished(start(job, 1, out))
    assert status == 0, text
    return kernel_in(out)


@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_give_the_answer_of_one(job, alone, count):
    out = job / f"of_{count}.npz"
    ended = finished(start(job, count, out))
    assert [status for _, status in ended] == [0] * count, ended
    rows = sum(ROWS + 7 * i for i in range(9))
    labelled = [text.split("process ")[-1].split(": ")[1].split(" ")[0] for text, _ in ended]
    assert len(set(labelled)) == 1
    assert 0.8 * rows < int(labelled[0].replace(",", "")) < rows
    assert np.abs(alone - kernel_in(job / "head.npz")).max() > 0.1
    np.testing.assert_allclose(kernel_in(out), alone, atol=1e-6 * np.abs(alone).max())


def test_a_killed_process_ends_the_others_and_a_restart_goes_on(job, alone):
    out, saves = job / "restarted.npz", job / "saves"
    options = ("--checkpoint", saves, "--every", "1")
    processes = start(job, 2, out, *options)
    while not all(
        any(path.name.isdigit() for path in saves.glob(f"process_{index}_of_2/*")) for index in range(2)
    ):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    (text, status), (_, of_killed) = finished(processes, seconds=100)
    assert of_killed == -signal.SIGKILL
    assert status != 0
    assert time.monotonic() - killed < 100
    # Whichever is first: the runtime misses its heartbeats, or the sums cannot be gathered.
    assert "another task died" in text or "cannot reach the others: one of them is gone" in text, text
    assert not out.exists()

    ended = finished(start(job, 2, out, *options))
    assert [status for _, status in ended] == [0, 0], ended
    np.testing.assert_allclose(kernel_in(out), alone, atol=1e-6 * np.abs(alone).max())
    with pytest.raises(AssertionError):
        # Another number of processes would share the batches otherwise.
        assert [status for _, status in finished(start(job, 1, out, *options))] == [0]


SPREAD = """
import sys
import jax
import numpy as np
import pytest
import lip_jax

index, folder = int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, index)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
over_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
rng = np.random.default_rng(0)
feats, labels = rng.normal(size=(48, 6)).astype(np.float32), rng.integers(0, 4, 48, dtype=np.int32)
accumulator = lip_jax.moment_accumulator(6, 4)


def spread(array, first):
    own = array[first + 4 * index : first + 4 * index + 4]
    return jax.make_array_from_process_local_data(over_rows, own)


def batches(feats, until=48):
    for first in range(0, until, 8):
        yield spread(feats, first), spread(labels, first)
    if until < 48:
        raise KeyError("killed")


def assert_same(found):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


whole = lip_jax.accumulate(accumulator, batches(feats))
assert float(whole.rows) == 48
alone = accumulator.update(accumulator.init(), feats, labels)
readouts = [lip_jax.linear_readout_from(part, ridge=1.0).kernel for part in (whole, alone)]
np.testing.assert_allclose(*map(np.asarray, readouts), rtol=1e-4, atol=1e-5)

# Finished, and asked again.
for _ in range(2):
    assert_same(lip_jax.accumulate(accumulator, batches(feats), checkpoint=f"{folder}/whole"))

# Broken where all have saved the same.
with pytest.raises(KeyError):
    lip_jax.accumulate(accumulator, batches(feats, 32), checkpoint=f"{folder}/broken", every=3)
assert_same(lip_jax.accumulate(accumulator, batches(feats), checkpoint=f"{folder}/broken"))

# Broken before one has saved, or saved as much as the other.
for every in ((3, 1), (9, 1)):
    options = {"checkpoint": f"{folder}/apart{every[0]}", "every": every[index]}
    with pytest.raises(KeyError):
        lip_jax.accumulate(accumulator, batches(feats, 32), **options)
    saved = "3, 4" if every == (3, 1) else "0, 4"
    with pytest.raises(ValueError, match=f"last saved after {saved} batches. Delete the folder"):
        lip_jax.accumulate(accumulator, batches(feats), **options)

feats[17] = np.nan
with pytest.raises(ValueError, match="batch 2: some rows cannot be used.*unusable='skip'"):
    lip_jax.accumulate(accumulator, batches(feats))
assert int(lip_jax.accumulate(accumulator, batches(feats), unusable="skip").ignored) == 1
print("all is well", flush=True)
"""


def test_batches_spread_over_processes_count_once_and_resume_in_step(tmp_path):
    port = free_port()
    ended = finished([opened([sys.executable, "-c", SPREAD, port, index, tmp_path]) for index in range(2)])
    assert [(status, "all is well" in text) for text, status in ended] == [(0, True)] * 2, ended
