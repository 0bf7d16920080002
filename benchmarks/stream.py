"""One pass over more rows than memory should hold: throughput, memory, and what sizes far beyond would take.

    python -m benchmarks.stream [stream|render]

Writes clustered rows of float16 to a memory map, which stays in the cache of the system (the disk is not what
is measured), and passes over them with `lip_jax.accumulate`. Throughput is compared with the same products on
an array in memory, in turns in one process. Memory is read in processes of their own, several for each number
of rows, as those that do the same differ by tens of MiB. Rows are written to a temporary folder (TMPDIR).
"""

import os
import tempfile
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lip_jax
from benchmarks import frame
from benchmarks.frame import Benchmark, Measured, Record
from benchmarks.timing import held_bytes, in_process, timed, wait
from lip_jax.numerics import linalg
from lip_jax.numerics.chunks import fold_rows
from lip_jax.sums.tail import CPU_CHUNK_ROWS

SIZES = 10_000_000, 512, 100
LEVELS = ("tail", "moments")
BATCH_ROWS = 65_536
# Rows in memory that the products are timed on, and how often each side has its turn.
HELD_ROWS = 500_000
TURNS = 5
# Processes whose peaks the median is of.
PROCESSES = 3
# Memory is read at a tenth, at half and at all of the rows: the peak of a process still rises after a tenth.
READ_AT = (10, 2, 1)
# Rows, features and classes of the sizing table; the first is measured.
BEYOND = ((1_281_167, 2048, 1000), (100_000_000, 1024, 10_000), (1_000_000_000, 4096, 100_000))


def write_rows(folder: Path, n: int, q: int, l: int) -> None:
    """Rows about the centres of their classes, at a mean of 1."""
    rng = np.random.default_rng(0)
    centres = (1 + 0.3 * rng.standard_normal((l, q))).astype(np.float32)
    labels = rng.integers(0, l, n).astype(np.int32)
    feats = np.lib.format.open_memmap(folder / "feats.npy", "w+", np.float16, (n, q))
    for start in range(0, n, BATCH_ROWS):
        ids = labels[start : start + BATCH_ROWS]
        feats[start : start + BATCH_ROWS] = centres[ids] + rng.standard_normal((len(ids), q), np.float32)
    np.save(folder / "labels.npy", labels)


def read_rows(folder: Path, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first rows, as a memory map."""
    return np.load(folder / "feats.npy", mmap_mode="r")[:n], np.load(folder / "labels.npy")[:n]


def accumulator(level: str, q: int, l: int) -> lip_jax.sums.Accumulator[Any]:
    """Of either level."""
    if level == "moments":
        return lip_jax.moment_accumulator(q, l)
    kernel = jax.random.normal(jax.random.key(0), (q, l))
    return lip_jax.tail_accumulator(lip_jax.svd_split(kernel, 0))


def pass_over(level: str, feats: np.ndarray, labels: np.ndarray, l: int) -> Any:
    """What is measured."""
    held = accumulator(level, feats.shape[1], l)
    return wait(lip_jax.accumulate(held, lip_jax.array_batches(feats, labels, BATCH_ROWS)))


@partial(jax.jit, static_argnames="level")
def products(feats: jax.Array, u: jax.Array, level: str) -> Any:
    """The products of a level and their sums alone, chunk by chunk, in float32."""

    def step(sums, rows, fresh):
        x = rows.astype(u.dtype)
        if level == "moments":
            return jax.tree.map(jnp.add, sums, linalg.gram_blocks(x, x)), None
        return sums + jnp.sum(linalg.matmul(x, u) ** 2, axis=0), None

    nothing = jnp.zeros((0, feats.shape[1]), u.dtype)
    empty = linalg.gram_blocks(nothing, nothing) if level == "moments" else jnp.zeros(u.shape[1], u.dtype)
    return fold_rows(step, empty, feats, CPU_CHUNK_ROWS)[0]


def throughput(folder: Path, level: str, n: int, l: int) -> Measured:
    """Rows a second, streamed from the map and multiplied in memory, in turns."""
    feats, labels = read_rows(folder, n)
    held, some = jnp.asarray(feats[:HELD_ROWS]), min(n, HELD_ROWS)
    split = lip_jax.svd_split(jax.random.normal(jax.random.key(0), (feats.shape[1], l)), 0)
    multiply = partial(products, held, split.u, level)
    # The first calls compile, and leave the map in the cache.
    wait(multiply())
    pass_over(level, feats, labels, l)
    rates: dict[str, list[float]] = {"in memory": [], "streamed": []}
    for _ in range(TURNS):
        rates["in memory"].append(some / np.median([timed(multiply)[1] for _ in range(5)]))
        rates["streamed"].append(n / timed(partial(pass_over, level, feats, labels, l))[1])
    return {name: float(np.median(rate)) for name, rate in rates.items()} | {"turns": rates}


def peak_anonymous(folder: Path, level: str, n: int, l: int) -> int:
    """By how much anonymous memory peaks during a pass, its compilation included."""
    feats, labels = read_rows(folder, n)
    wait(jnp.zeros(3) + 1)
    base, seen, ended = held_bytes("RssAnon"), [0], threading.Event()

    def watch():
        while not ended.wait(0.005):
            seen.append(held_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    pass_over(level, feats, labels, l)
    ended.set()
    watcher.join()
    return max(seen) - base


def stream(*_: Any, sizes: tuple[int, int, int] = SIZES) -> Measured:
    """Measure both levels."""
    (n, q, l), cores, cases = sizes, len(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writing = timed(lambda: write_rows(folder, n, q, l))[1]
        for level in LEVELS:
            rates = in_process(cores, 1, throughput, folder, level, n, l)
            peak = partial(in_process, cores, 1, peak_anonymous, folder, level)
            peaks = {str(n // part): [peak(n // part, l) for _ in range(PROCESSES)] for part in READ_AT}
            cases.append({"level": level, "rates": rates, "peaks": peaks})
    return {"n": n, "q": q, "l": l, "writing_seconds": round(writing), "cases": cases}


def per_row(level: str, q: int, l: int) -> tuple[float, float]:
    """Operations on a row, and bytes of the state."""
    r = min(q, l)
    if level == "tail":
        return 2 * q * r + 8 * r, 4 * (2 * (4 * r + 2) + 2 * r)
    return 1.5 * q * q + 4 * q, 4 * (2 * (q * q + q * l + q + l + 3) + q + l)


def tables(record: Record) -> dict[str, str]:
    """What was measured, and what other sizes would take; times at the rate of operations measured here."""
    held, passes, rows = record["stream"], [], []
    measured = (held["n"], held["q"], held["l"])
    for case in held["cases"]:
        rates, peaks = case["rates"], case["peaks"].values()
        share = f"{rates['streamed'] / rates['in memory']:.0%}"
        medians = (f"{np.median(readings) / 2**20:.0f}" for readings in peaks)
        differ = max(max(readings) - min(readings) for readings in peaks) / 2**20
        pace = (f"{rates[name]:,.0f}" for name in ("streamed", "in memory"))
        passes.append((case["level"], *pace, share, *medians, f"{differ:.0f}"))
    read_at = (f"MiB at {int(n):,} rows" for n in held["cases"][0]["peaks"])
    header = ("level", "rows a second", "the products in memory", "share", *read_at, "processes differ by")
    for (n, q, l), case in ((sizes, case) for sizes in (measured, *BEYOND) for case in held["cases"]):
        level, (operations, state) = case["level"], per_row(case["level"], q, l)
        seconds = n * operations / (per_row(level, *measured[1:])[0] * case["rates"]["streamed"])
        sizes = (f"{operations / 1e6:.3g}", f"{state / 2**20:,.3f}", f"{2 * n * q / 2**30:,.1f}")
        rows.append((f"{n:,} × {q:,} × {l:,}", level, *sizes, timedelta(seconds=round(seconds))))
    sizes = f"{measured[0]:,} × {measured[1]} float16 features, {measured[2]} classes, {BATCH_ROWS:,} at once"
    return {"sizes": sizes, "passes": frame.table(header, passes), "beyond": frame.rows_of(rows)}


BENCHMARK = Benchmark("stream", {"stream": stream}, lambda record: [], tables)

if __name__ == "__main__":
    BENCHMARK.run()
