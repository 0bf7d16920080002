"""How long a refit takes, against its floor and against the published formulation.

    python -m benchmarks.solve table|memory|render

The floor is the factorisation of the kernel and the product `n×q×(r−k)` of features and tail (for soft
targets also `n×l×(r−k)`), each timed alone in the same run; a lower one makes only the vectors of the tail.
Calls take turns, compiled and warm; medians count. CPU, CUDA and TPU each have a record.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import lip_jax
from benchmarks import frame, peers
from benchmarks.frame import Benchmark, Measured, Record, Verdict, judge
from benchmarks.timing import Problem, in_process, medians, peak_beyond, problem, timed, wait
from lip_jax.methods import Fit, Published
from lip_jax.numerics import linalg
from lip_jax.rows.labels import Rows

OURS, TRACED, ALL_RANKS = "lip_jax", "lip_jax, traced rank", "lip_jax, all ranks"
FLOOR, FLOOR_0, FLOOR_TAIL = "floor", "floor of rank 0", "floor, vectors of the tail alone"
TORCH, NUMPY, JAX_PORT = "published, PyTorch", "published, NumPy", "published, JAX"
PEERS = (TORCH, NUMPY, JAX_PORT)
OVER_FLOOR = 1.15
# At most so many times a floor: a call, and the floor.
NEAR = {
    "at most 1.15 times its own floor": (OURS, FLOOR),
    "stricter: 1.15 times the floor with vectors of the tail alone": (OURS, FLOOR_TAIL),
    "traced rank: at most 1.15 times the floor of rank 0": (TRACED, FLOOR_0),
    "all ranks at once: at most 1.15 times the floor of rank 0": (ALL_RANKS, FLOOR_0),
}

Case = dict[str, Any]
Calls = dict[str, Callable[[], Any]]


class Size(NamedTuple):
    """Of rows; whether every kind of them is timed, and the factor by which columns of the head differ."""

    name: str
    n: int
    q: int
    l: int
    every: bool = True
    spread: float = 1.0


SIZES = (
    Size("CIFAR-100", 50_000, 512, 100),
    Size("CUB-200", 5_994, 2048, 200),
    Size("ImageNet-1k", 50_000, 2048, 1000),
    Size("wide head", 50_000, 384, 4000),
    Size("ImageNet-1k", 200_000, 2048, 1000, every=False),
    Size("CIFAR-100, wide spectrum", 50_000, 512, 100, every=False, spread=1e3),
    Size("CUB-200, wide spectrum", 5_994, 2048, 200, every=False, spread=1e3),
)
DTYPES = ("float32", "bfloat16")
SHARES = {"0": 0.0, "l/2": 0.5, "0.9 l": 0.9}
ORACLE_ROWS = 4096  # in double precision at once
TOLERANCE = 1e-5


def half_smoothed(labels: jax.Array, l: int) -> jax.Array:
    """Soft targets: half the mass on the label, a quarter on each neighbour."""
    ones = partial(jax.nn.one_hot, num_classes=l)
    return 0.5 * ones(labels) + 0.25 * ones((labels + 1) % l) + 0.25 * ones((labels - 1) % l)


# The product no refit can do without.
product = jax.jit(lambda feats, u: linalg.matmul(feats.astype(u.dtype), u))
thin_svd = jax.jit(linalg.thin_svd, static_argnames="start")
FACTORISATIONS = {
    "direct": jax.jit(partial(jnp.linalg.svd, full_matrices=False)),
    "QR first": jax.jit(
        lambda kernel: linalg.svd_by_qr(kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T)
    ),
    "the library's": thin_svd,
}
TAIL_FACTORISATION = "the library's, vectors of the tail alone"


@jax.jit
def all_ranks(kernel, feats, labels):
    """The refitted value of every component, which holds at every rank."""
    return lip_jax.solve_tail_sigma(lip_jax.svd_split(kernel, 0), feats, labels)


def product_calls(held: Problem, split: lip_jax.spectrum.SvdSplit, rank: int) -> Calls:
    """The products of the floor, in float32: casting low precision is not part of it."""
    tail_u = split.u[:, rank:]
    calls = {f"features, rank {rank}": partial(product, held.feats.astype(tail_u.dtype), tail_u)}
    if held.labels.ndim == 2:
        calls[f"targets, rank {rank}"] = partial(product, held.labels, jnp.asarray(split.vt[rank:].T))
    return calls


def floor_of(seconds: dict[str, float], rank: int, factorisations: Iterable[str] = FACTORISATIONS) -> float:
    """The fastest factorisation and the products."""
    products = (seconds.get(f"{name}, rank {rank}", 0.0) for name in ("features", "targets"))
    return min(seconds[name] for name in factorisations) + sum(products)


def peer_calls(held: Problem, rank: int) -> Calls:
    """The published formulation in each library at hand, on its own arrays with the same threads."""
    port = jax.jit(peers.published_jax, static_argnames="rank")
    calls: Calls = {JAX_PORT: partial(port, *held, rank=rank)}
    if jax.default_backend() == "cpu":
        from threadpoolctl import threadpool_limits

        kernel, feats, labels = (np.asarray(part) for part in held)

        def in_numpy():
            with threadpool_limits(len(os.sched_getaffinity(0)), user_api="blas"):
                return peers.published_numpy(kernel, feats, labels, rank)

        calls[NUMPY] = in_numpy
    if peers.has_torch():
        calls[TORCH] = partial(peers.published_torch, *peers.as_tensors(held), rank)
    return calls


def exact_sigma(held: Problem, split: lip_jax.spectrum.SvdSplit) -> np.ndarray:
    """Every component in double precision, given the split."""
    u, vt = (np.asarray(part, np.float64) for part in (split.u, split.vt))
    num, den = np.zeros(u.shape[1]), np.zeros(u.shape[1])
    for start in range(0, held.feats.shape[0], ORACLE_ROWS):
        feats, labels = (np.asarray(part[start : start + ORACLE_ROWS]) for part in held[1:])
        along = feats.astype(np.float64) @ u
        along_v = vt.T[labels] if labels.ndim == 1 else labels.astype(np.float64) @ vt.T
        num += (along * along_v).sum(axis=0)
        den += (along**2).sum(axis=0)
    return num / den


def relative_error(held: Problem, split: lip_jax.spectrum.SvdSplit, rank: int, exact: np.ndarray) -> float:
    """Of what the timed call returned, singular values and kernel, against double precision."""
    fit = Fit(Rows(held.feats, held.labels, None), None, None, jnp.int32(0))
    refit = Published(rank).settle(lip_jax.Head(held.kernel, None), fit)
    u, s, vt, kernel = (np.asarray(part, np.float64) for part in (split.u, split.s, split.vt, held.kernel))
    of_sigma = np.abs(np.asarray(refit.sigma, np.float64) - exact)[rank:].max() / np.abs(exact[rank:]).max()
    expected = kernel + (u[:, rank:] * (exact - s)[rank:]) @ vt[rank:]
    # The kernel is changed by a difference, so its rounding is that of what came.
    of_kernel = np.abs(np.asarray(refit.head.kernel) - expected).max() / np.abs(kernel).max()
    return float(max(of_sigma, of_kernel))


def time_size(size: Size, dtype: str, soft: bool) -> Iterator[Case]:
    """One size and kind of rows, at every rank and at all ranks at once."""
    kernel, feats, labels = problem(size.n, size.q, size.l)
    columns = jnp.geomspace(1, 1 / size.spread, size.l)
    labels = half_smoothed(labels, size.l) if soft else labels
    held = Problem(kernel * columns[None, :], feats.astype(dtype), labels)
    split = lip_jax.svd_split(held.kernel, 0)
    exact = exact_sigma(held, split)
    setting = {**size._asdict(), "dtype": dtype, "labels": "soft targets" if soft else "class ids"}
    for name, share in SHARES.items():
        rank, half = int(share * len(split.s)), name == "l/2"
        error = relative_error(held, split, rank, exact)
        if error > TOLERANCE:
            raise AssertionError(f"{setting}, rank {rank}: relative error {error:.1e} in double precision")
        program = jax.jit(partial(lip_jax.refine, rank=rank))
        _, compilation = timed(lambda program=program: program.lower(*held).compile())
        calls = {OURS: partial(lip_jax.refine, *held, rank)}
        calls |= {name: partial(call, held.kernel) for name, call in FACTORISATIONS.items()}
        calls |= product_calls(held, split, rank)
        if rank == 0:
            calls[ALL_RANKS] = partial(all_ranks, *held)
        else:
            calls[TAIL_FACTORISATION] = partial(thin_svd, held.kernel, start=rank)
        traced = half and dtype == "float32"
        if traced:
            calls[TRACED] = partial(lip_jax.refine, *held, jnp.int32(rank))
            calls |= product_calls(held, split, 0)
        if dtype == "float32" and (half or (size.every and not soft)):
            calls |= peer_calls(held, rank)
        seconds = medians(calls, peers=PEERS)
        seconds[FLOOR] = floor_of(seconds, rank)
        if rank > 0:
            seconds[FLOOR_TAIL] = floor_of(seconds, rank, (*FACTORISATIONS, TAIL_FACTORISATION))
        if traced or rank == 0:
            seconds[FLOOR_0] = floor_of(seconds, 0)
        spent = {"seconds": seconds, "compilation": compilation}
        yield {**setting, "rank": name, **spent, "relative_error": error}


def table(*_: Any) -> Measured:
    """Time every size, rank, dtype and kind of labels."""
    kinds = lambda size: itertools.product(DTYPES[: 1 + size.every], (False, True)[: 1 + size.every])
    settings = [(size, *kind) for size in SIZES for kind in kinds(size)]
    return {"cases": [case for setting in track(settings, "sizes") for case in time_size(*setting)]}


def peak_memory(library: str, size: Size, share: float) -> int:
    """Bytes a solve takes beyond its inputs, in a process of its own."""
    held, planned = problem(size.n, size.q, size.l), 0
    rank = int(share * min(size.q, size.l))
    if library == OURS:
        call = partial(lip_jax.refine, *held, rank)
        # The process may hold on to what the warm-up took, but the program needs what it was compiled for.
        analysis = jax.jit(partial(lip_jax.refine, rank=rank)).lower(*held).compile().memory_analysis()
        planned = 0 if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    else:
        tensors = peers.as_tensors(held)
        del held
        call = partial(peers.published_torch, *tensors, rank)
    wait(call())
    return max(planned, *(peak_beyond(call) for _ in range(3)))


def memory(*_: Any) -> Measured:
    """Peak memory beside the inputs, against the published formulation in PyTorch; Linux only."""
    if not peers.has_torch():
        raise ModuleNotFoundError("this comparison needs PyTorch: pip install lip_jax[bench].")
    # What is freed goes back to the system, so that it counts anew.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    cores = len(os.sched_getaffinity(0))
    cases = []
    for size, (name, share), library in itertools.product(SIZES[:4], SHARES.items(), (OURS, TORCH)):
        peak = in_process(cores, 1, peak_memory, library, size, share)
        cases.append({**size._asdict(), "rank": name, "library": library, "bytes": peak})
    return {"cases": cases}


def size_of(case: Case) -> str:
    """Rows, features and classes."""
    return f"{case['n']:,} × {case['q']} × {case['l']}"


def at(case: Case) -> str:
    """Which rows and rank, in words."""
    return f"{case['name']} ({size_of(case)}), {case['dtype']}, {case['labels']}, rank {case['rank']}"


def near(claim: str, cases: list[Case], call: str, bound: str) -> Verdict:
    """At most 1.15 times a floor, wherever both were timed."""
    both = {at(case): case["seconds"] for case in cases if {call, bound} <= set(case["seconds"])}
    ratios = {where: spent[call] / spent[bound] for where, spent in both.items()}
    worst, met = max(ratios, key=lambda where: ratios[where]), sum(x <= OVER_FLOOR for x in ratios.values())
    figure = f"{met} of {len(ratios)}; median {np.median(list(ratios.values())):.2f}, "
    figure += f"highest {ratios[worst]:.2f} ({worst})"
    return judge(claim, ratios, lambda ratio: ratio <= OVER_FLOOR, "{:.2f}".format, figure)


def verdicts(record: Record) -> list[Verdict]:
    """How near calls are to their floors."""
    return [near(claim, record["table"]["cases"], *of) for claim, of in NEAR.items() if "table" in record]


def tables(record: Record) -> dict[str, str]:
    """What was measured, by section."""
    named = {"table": time_tables, "memory": memory_table}
    return {name: text for part in record for name, text in named[part](record[part]["cases"]).items()}


def time_tables(cases: list[Case]) -> dict[str, str]:
    """Of a call at each rank, and of those that serve every rank."""
    rows, others = [], []
    ms = lambda seconds: "–" if seconds is None else f"{1e3 * seconds:.3g}"
    for case in cases:
        spent = case["seconds"]
        ours, floor = spent[OURS], spent[FLOOR]
        where = (f"{case['name']}, {size_of(case)}", case["dtype"], case["labels"], case["rank"])
        faster = f"{spent[TORCH] / ours:.1f}" if TORCH in spent else "–"
        times = (f"**{ms(ours)}**", ms(floor), f"{ours / floor:.2f}", *map(ms, map(spent.get, PEERS)), faster)
        rows.append((*where, *times, f"{case['relative_error']:.0e}", f"{case['compilation']:.1f}"))
        for other in (spent[name] for name in (ALL_RANKS, TRACED) if name in spent):
            others.append((at(case), ms(other), ms(spent[FLOOR_0]), f"{other / spent[FLOOR_0]:.2f}"))
    return {"time": frame.rows_of(rows), "all_ranks": frame.rows_of(others)}


def memory_table(cases: list[Case]) -> dict[str, str]:
    """Of ours and of PyTorch's, which are on record in this order."""
    rows = []
    for ours, theirs in zip(cases[::2], cases[1::2], strict=True):
        sizes = (f"{case['bytes'] / 2**20:.1f}" for case in (ours, theirs))
        where = (ours["name"], f"{ours['n']:,}", ours["rank"])
        rows.append((*where, *sizes, f"{theirs['bytes'] / ours['bytes']:.1f}"))
    return {"memory": frame.rows_of(rows)}


SECTIONS = {"table": table, "memory": memory}
MADE = {"packages": ("torch",) * peers.torch_installed(), "by_platform": True}
BENCHMARK = Benchmark("solve", SECTIONS, verdicts, tables, **MADE)

if __name__ == "__main__":
    BENCHMARK.run()
