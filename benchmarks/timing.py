"""How benchmarks measure: calls in turns, fresh processes, peak memory, and rows to measure with."""

import multiprocessing
import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

import lip_jax
from benchmarks.peers import pytorch

Result = TypeVar("Result")

# A call takes part in so many rounds, or in fewer once it has had its seconds; but in two at least.
ROUNDS = 45
SECONDS = 3.0
# After calls of other libraries, whose threads spin for a while when they are done.
REST = 0.3


def wait(result: Any) -> Any:
    """Block until a result of any library is there."""
    if type(result).__module__.startswith("torch"):
        if result.is_cuda:
            pytorch().cuda.synchronize()
        return result
    return jax.block_until_ready(result)


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """A result, and the seconds until it is there."""
    start = time.perf_counter()
    result = wait(call())
    return result, time.perf_counter() - start


def medians(
    calls: dict[str, Callable[[], Any]], *, peers: Collection[str] = (), rounds: int = 0, seconds=SECONDS
) -> dict[str, float]:
    """Median seconds of each call, taken in turns after a warm-up, so that drift hits all alike.

    Each turn has an order of its own, so that none always follows the same other. After a call of `peers`
    there is a rest.
    """
    for call in calls.values():
        wait(call())
    rng, names = np.random.default_rng(0), list(calls)
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds or ROUNDS):
        for name, call in ((names[i], calls[names[i]]) for i in rng.permutation(len(names))):
            if turn < 2 or sum(spent[name]) < seconds:
                if name not in peers:
                    # What the call before left in caches and to threads is not this one's to pay.
                    wait(call())
                spent[name].append(timed(call)[1])
                if name in peers:
                    time.sleep(REST)
    return {name: float(np.median(times)) for name, times in spent.items()}


def in_process(cores: int, openblas: int, call: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """Call in a fresh process that may use so many cores, as XLA will, and so many threads of OpenBLAS."""
    affinity, before = os.sched_getaffinity(0), os.environ.get("OPENBLAS_NUM_THREADS", "1")
    try:
        # What a process starts with: XLA counts the cores it may use, OpenBLAS reads the variable.
        os.sched_setaffinity(0, sorted(affinity)[:cores])
        os.environ["OPENBLAS_NUM_THREADS"] = str(openblas)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(call, *args, **options).result()
    finally:
        os.sched_setaffinity(0, affinity)
        os.environ["OPENBLAS_NUM_THREADS"] = before


def held_bytes(field: str) -> int:
    """Memory of this process by a field of its status, such as `RssAnon`; Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def peak_beyond(call: Callable[[], Any]) -> int:
    """By how many bytes the resident memory of this process peaks during a call; Linux only."""
    # Resets the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = held_bytes("VmRSS")
    wait(call())
    return held_bytes("VmHWM") - before


@partial(jax.jit, static_argnames="n")
def clustered(key: jax.Array, centres: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Rows about the centres of their classes, made a few at a time where they will stay."""
    label_key, key = jax.random.split(key)
    labels = jax.random.randint(label_key, (n,), 0, centres.shape[0], jax.numpy.int32)
    row = lambda key, label: centres[label] + jax.random.normal(key, centres.shape[1:])
    feats = jax.lax.map(lambda part: row(*part), (jax.random.split(key, n), labels), batch_size=1000)
    return feats, labels


class Problem(NamedTuple):
    """A head that half knows its classes, and rows with a fifth of the labels wrong."""

    kernel: jax.Array
    feats: jax.Array
    labels: jax.Array


def problem(n: int, q: int, l: int) -> Problem:
    """Clustered rows, of class ids."""
    centre_key, row_key, noise_key, head_key = jax.random.split(jax.random.key(0), 4)
    centres = 0.3 * jax.random.normal(centre_key, (l, q))
    feats, true = clustered(row_key, centres, n)
    labels = lip_jax.noise.symmetric(noise_key, true, 0.2, num_classes=l)
    kernel = centres.T + 0.1 * jax.random.normal(head_key, (q, l))
    return jax.block_until_ready(Problem(kernel, feats, labels))
