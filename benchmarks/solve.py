"""How long a refit takes: against its floor, against the published formulation, and as sizes grow.

    python -m benchmarks.solve table
    python -m benchmarks.solve memory
    python -m benchmarks.solve growth

The floor of a solve is the factorisation of the kernel and the product `n×q×(r−k)` of features and tail (for
soft targets also `n×l×(r−k)`), each timed alone in the same run. A refit at a known rank needs only the
vectors of its own tail, so there is a lower floor beside it, with a factorisation that makes no others. All
calls of a setting take turns; medians are reported, from arrays of the library's own to the result, after
compilation and warm-up. Runs unchanged on CPU, CUDA and TPU, and keeps a record for each.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console

import lip_jax
from benchmarks import peers
from benchmarks import solve_report as report
from benchmarks.solve_report import FLOOR, FLOOR_0, FLOOR_TAIL, JAX_PORT, NUMPY, OURS, PEERS, TORCH
from benchmarks.timing import Problem, in_process, medians, peak_beyond, problem, wait
from lip_jax.methods.published import refit_kernel
from lip_jax.numerics import linalg
from lip_jax.sums.tail import tail_sums

RESULTS = Path(__file__).parent / "results"


class Size(NamedTuple):
    """Rows, features and classes; whether every kind of rows is timed or class ids in float32 alone.

    With `spread` the columns of the head differ by that factor, which makes its Gram matrix unsafe.
    """

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
SHARES = {"0": 0.0, "l/2": 0.5, "0.9 l": 0.9}
# Rows on which double precision is computed at once.
ORACLE_ROWS = 4096
TOLERANCE = 1e-5

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
OutOption = Annotated[Path, typer.Option(help="Folder for the results.")]


def half_smoothed(labels: jax.Array, l: int) -> jax.Array:
    """Soft targets: half the mass on the label, a quarter on each neighbour."""
    ones = partial(jax.nn.one_hot, num_classes=l)
    return 0.5 * ones(labels) + 0.25 * ones((labels + 1) % l) + 0.25 * ones((labels - 1) % l)


@jax.jit
def product(feats, u):
    """The product no refit can do without."""
    return linalg.matmul(feats.astype(u.dtype), u)


@jax.jit
def direct_svd(kernel):
    """LAPACK's or the accelerator's own."""
    return jnp.linalg.svd(kernel, full_matrices=False)


@jax.jit
def qr_first(kernel):
    """QR of the tall matrix, the kernel or its transpose, then the SVD of the small factor."""
    q, l = kernel.shape
    return linalg.svd_by_qr(kernel if q >= l else kernel.T)


thin_svd = jax.jit(linalg.thin_svd, static_argnames="start")
FACTORISATIONS = {"direct": direct_svd, "QR first": qr_first, "the library's": thin_svd}
TAIL_FACTORISATION = "the library's, vectors of the tail alone"


def product_calls(held: Problem, split: lip_jax.spectrum.SvdSplit, rank: int) -> dict[str, Callable[[], Any]]:
    """The products of the floor, by names that tell the rank.

    Those of float32 features whatever the dtype: in low precision casting them is not part of the floor.
    """
    tail_u, tail_v = split.u[:, rank:], split.vt[rank:].T
    calls = {f"features, rank {rank}": partial(product, held.feats.astype(tail_u.dtype), tail_u)}
    if held.labels.ndim == 2:
        calls[f"targets, rank {rank}"] = partial(product, held.labels, jnp.asarray(tail_v))
    return calls


def floor_of(
    seconds: dict[str, float], rank: int, factorisations: Iterable[str] = tuple(FACTORISATIONS)
) -> float:
    """The fastest factorisation and the products."""
    products = (seconds.get(f"{name}, rank {rank}", 0.0) for name in ("features", "targets"))
    return min(seconds[name] for name in factorisations) + sum(products)


def peer_calls(held: Problem, rank: int) -> dict[str, Callable[[], Any]]:
    """The published formulation in every library at hand, on its own arrays with the same threads."""
    port = jax.jit(peers.published_jax, static_argnames="rank")
    calls: dict[str, Callable[[], Any]] = {JAX_PORT: partial(port, *held, rank=rank)}
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
    options = dict.fromkeys(("weights", "bias", "rcond")) | {"ridge": 0.0, "ridge_to": "current"}
    refit = refit_kernel(*held, rank, **options)
    found = np.asarray(refit.sigma, np.float64)[rank:]
    of_sigma = np.abs(found - exact[rank:]).max() / np.abs(exact[rank:]).max()
    u, s, vt, kernel = (np.asarray(part, np.float64) for part in (split.u, split.s, split.vt, held.kernel))
    expected = kernel + (u[:, rank:] * (exact - s)[rank:]) @ vt[rank:]
    # The kernel is changed by a difference, so its rounding is that of what came.
    of_kernel = np.abs(np.asarray(refit.kernel) - expected).max() / np.abs(kernel).max()
    return float(max(of_sigma, of_kernel))


@jax.jit
def all_ranks(kernel, feats, labels):
    """The refitted value of every component, which holds at every rank."""
    return lip_jax.solve_tail_sigma(lip_jax.svd_split(kernel, 0), feats, labels)


def time_size(size: Size, dtype: str, soft: bool) -> Iterator[dict[str, Any]]:
    """One size and kind of rows, at every rank and at all ranks at once."""
    held = problem(size.n, size.q, size.l)
    sizes = jnp.geomspace(1, 1 / size.spread, size.l)
    held = held._replace(kernel=held.kernel * sizes[None, :], feats=held.feats.astype(dtype))
    if soft:
        held = held._replace(labels=half_smoothed(held.labels, size.l))
    split = lip_jax.svd_split(held.kernel, 0)
    r = split.s.shape[0]
    exact = exact_sigma(held, split)
    setting = {**size._asdict(), "dtype": dtype, "labels": "soft targets" if soft else "class ids"}
    for name, share in SHARES.items():
        rank = int(share * r)
        half = name == "l/2"
        error = relative_error(held, split, rank, exact)
        if error > TOLERANCE:
            raise AssertionError(
                f"{setting}, rank {rank}: relative error {error:.1e} against double precision"
            )
        start = time.perf_counter()
        program = jax.jit(partial(lip_jax.refine, rank=rank)).lower(*held).compile()
        compilation = time.perf_counter() - start
        calls = {OURS: partial(lip_jax.refine, *held, rank)}
        calls |= {name: partial(call, held.kernel) for name, call in FACTORISATIONS.items()}
        calls |= product_calls(held, split, rank)
        if rank == 0:
            calls[report.ALL_RANKS] = partial(all_ranks, *held)
        else:
            calls[TAIL_FACTORISATION] = partial(thin_svd, held.kernel, start=rank)
        traced = half and dtype == "float32"
        if traced:
            calls[report.TRACED] = partial(lip_jax.refine, *held, jnp.int32(rank))
            calls |= product_calls(held, split, 0)
        if dtype == "float32" and (half or (size.every and not soft)):
            calls |= peer_calls(held, rank)
        seconds = medians(calls, peers=PEERS)
        seconds[FLOOR] = floor_of(seconds, rank)
        if rank > 0:
            seconds[FLOOR_TAIL] = floor_of(seconds, rank, (*FACTORISATIONS, TAIL_FACTORISATION))
        if traced or rank == 0:
            seconds[FLOOR_0] = floor_of(seconds, 0)
        memory = program.memory_analysis()
        yield {
            **setting,
            "rank": name,
            "seconds": seconds,
            "compilation": compilation,
            "relative_error": error,
            "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
            "feature_bytes": held.feats.size * held.feats.dtype.itemsize,
        }


@app.command()
def table(
    out: OutOption = RESULTS,
    only: Annotated[
        list[str] | None, typer.Option(help="Name of a size, may be repeated; others keep their cases.")
    ] = None,
) -> None:
    """Time every size, rank, dtype and kind of labels."""
    names = {size.name for size in SIZES}
    unknown = sorted({*(only or ())} - names)
    if unknown:
        raise typer.BadParameter(f"--only names {unknown}; there are {sorted(names)}.")
    out.mkdir(parents=True, exist_ok=True)
    console, cases = Console(width=160), []
    wanted = [size for size in SIZES if not only or size.name in only]
    for size in wanted:
        for dtype in ("float32", "bfloat16") if size.every else ("float32",):
            for soft in (False, True) if size.every else (False,):
                for case in time_size(size, dtype, soft):
                    cases.append(case)
                    console.print(report.line(case), highlight=False)
    copied = jnp.zeros((50_000, 512)) + 1
    copying = medians({"copy": lambda: report.copy(copied)})["copy"]
    if only:
        held = report.kept(out, only) + cases
        cases = [case for size in SIZES for case in held if (case["name"], case["n"]) == (size.name, size.n)]
    record = {"copy_bytes_per_second": 2 * copied.size * 4 / copying, "cases": cases}
    report.write("table", record, out, console)


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


@app.command()
def memory(out: OutOption = RESULTS) -> None:
    """Peak memory beside the inputs, against the published formulation in PyTorch; Linux only."""
    if not peers.has_torch():
        raise typer.BadParameter("this comparison needs PyTorch: pip install lip_jax[bench].")
    out.mkdir(parents=True, exist_ok=True)
    # What is freed goes back to the system, so that it counts anew.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    cores = len(os.sched_getaffinity(0))
    cases = [
        {**size._asdict(), "rank": name, "library": library}
        | {"bytes": in_process(cores, 1, peak_memory, library, size, SHARES[name])}
        for size in SIZES[:4]
        for name in SHARES
        for library in (OURS, TORCH)
    ]
    report.write("memory", {"cases": cases}, out, Console(width=160))


def stage_calls(size: Size) -> dict[str, Callable[[], Any]]:
    """The stages of a solve at rank 0."""
    kernel, feats, labels = problem(size.n, size.q, size.l)
    split = lip_jax.svd_split(kernel, 0)
    return {
        "factorisation": partial(thin_svd, kernel),
        "pass over the rows": partial(tail_sums, split.u, split.vt, feats, labels, None, None),
        "new kernel": partial(product, split.u * split.s[None, :], split.vt),
        "all": partial(lip_jax.refine, kernel, feats, labels, 0),
    }


GROWTH = {
    "n": [Size("", n, 512, 100) for n in (12_500, 25_000, 50_000, 100_000, 200_000)],
    "q": [Size("", 20_000, q, 100) for q in (256, 512, 1024, 2048, 4096)],
    "l": [Size("", 10_000, 2048, l) for l in (125, 250, 500, 1000, 2000)],
}


@app.command()
def growth(out: OutOption = RESULTS) -> None:
    """Time the stages as one of n, q and l grows, and fit exponents to the three largest."""
    out.mkdir(parents=True, exist_ok=True)
    cases = [
        {"grows": name, **size._asdict(), "seconds": medians(stage_calls(size))}
        for name, sizes in GROWTH.items()
        for size in sizes
    ]
    report.write("growth", {"cases": cases}, out, Console(width=160))


if __name__ == "__main__":
    app()
