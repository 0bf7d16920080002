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
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lip_jax
from benchmarks import frame
from benchmarks.frame import Benchmark, Measured, Record, Verdict
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
ALLOWED_BYTES = 300 * 2**20
# By how much the median peak may differ between a tenth of the rows and more, and still be called flat.
FLAT_BYTES = 32 * 2**20
SHARE = 0.8
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


def verdicts(record: Record) -> list[Verdict]:
    """What the figures say."""
    found = []
    for case in record["stream"]["cases"]:
        level, (held, streamed) = case["level"], (case["rates"][name] for name in ("in memory", "streamed"))
        figure = f"{streamed / held:.0%} ({streamed:,.0f} of {held:,.0f} rows a second)"
        claim = f"{level}: at least {SHARE:.0%} of the throughput of the same products in memory"
        found.append(Verdict(claim, streamed / held >= SHARE, figure))
        peaks = {int(n): readings for n, readings in case["peaks"].items()}
        medians = {n: float(np.median(readings)) for n, readings in peaks.items()}
        figure = ", ".join(f"{peak / 2**20:.0f} MiB at {n:,} rows" for n, peak in medians.items())
        spread = max(max(readings) - min(readings) for readings in peaks.values())
        figure += f" (medians; processes differ by {spread / 2**20:.0f} MiB)"
        within = max(map(max, peaks.values())) < ALLOWED_BYTES
        flat = max(medians.values()) - min(medians.values()) < FLAT_BYTES
        found.append(Verdict(f"{level}: anonymous memory under 300 MiB", within, figure))
        found.append(Verdict(f"{level}: memory flat in n", flat, figure))
    return found


def amount(number: float, unit: str, step: float = 1000.0) -> str:
    """A number with the prefix that suits it."""
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    place = 0
    while number >= step and place < len(prefixes) - 1:
        number, place = number / step, place + 1
    return f"{number:.3g} {prefixes[place]}{'i' if step == 1024 and place else ''}{unit}"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


def per_row(level: str, q: int, l: int) -> tuple[float, float]:
    """Operations on a row, and bytes of the state."""
    r = min(q, l)
    if level == "tail":
        return 2 * q * r + 8 * r, 4 * (2 * (4 * r + 2) + 2 * r)
    return 1.5 * q * q + 4 * q, 4 * (2 * (q * q + q * l + q + l + 3) + q + l)


def tables(record: Record) -> dict[str, str]:
    """What was read, and what other sizes would take; times at the rate of operations measured here."""
    held, rows = record["stream"], []
    measured = (held["n"], held["q"], held["l"])
    for (n, q, l), case in ((sizes, case) for sizes in (measured, *BEYOND) for case in held["cases"]):
        level, (operations, state) = case["level"], per_row(case["level"], q, l)
        seconds = n * operations / (per_row(level, *measured[1:])[0] * case["rates"]["streamed"])
        bytes_of = [amount(size, "B", 1024) for size in (2 * q, state, 2.0 * n * q)]
        took = amount(operations, "FLOP"), *bytes_of[1:], duration(seconds), f"{operations / (2 * q):,.0f}"
        rows.append((f"{n:,} × {q:,} × {l:,}", level, bytes_of[0], *took))
    sizes = f"{measured[0]:,} × {measured[1]} float16 features, {measured[2]} classes, {BATCH_ROWS:,} at once"
    return {"sizes": sizes, "beyond": frame.rows_of(rows)}


BENCHMARK = Benchmark("stream", {"stream": stream}, verdicts, tables)

if __name__ == "__main__":
    BENCHMARK.run()
