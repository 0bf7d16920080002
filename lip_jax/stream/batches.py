"""TODO."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lip_jax._checks import describe
from lip_jax._types import Array, Feats, Labels, Weights
from lip_jax.rows.labels import Rows

# What JAX asks of memory that it is to use on the CPU without a copy.
ALIGNMENT = 64


def _check_count(name: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be an int of at least 1; got {number!r}.")


def _rounded(size: int, sharding: jax.sharding.Sharding | None) -> int:
    """Up to a multiple of the devices rows are spread over."""
    devices = 1 if sharding is None else len(sharding.device_set)
    return -(-size // devices) * devices


def as_array(given: Any) -> Array:
    """An array of JAX as it is; of any other library, such as TensorFlow or PyTorch, as NumPy sees it."""
    return given if isinstance(given, jax.Array) else np.asarray(given)


def _is_local(array: Array) -> bool:
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _placed(rows: PyTree, sharding: jax.sharding.Sharding | None) -> PyTree:
    """Arrays where they are computed with.

    A loader may fill the memory of an array again as soon as it is asked for the next batch: that is copied.
    What cannot be written to, such as a memory map for reading, is used where it is.
    """

    def kept(array: Array) -> Array:
        # Not by JAX: device_put on the CPU uses memory where it is even if it is told not to, and a copy by
        # jnp.array waits for the batch that is being computed.
        if isinstance(array, np.ndarray) and array.flags.writeable:
            return _padded(array, array.shape[0])
        return array

    return jax.device_put(jax.tree.map(kept, rows), sharding)


def pad_rows(rows: PyTree, size: int) -> PyTree:
    """Arrays with zeros after their rows, up to a number of them."""

    def padded(array: Array) -> Array:
        missing = size - array.shape[0]
        if not missing:
            return array
        if isinstance(array, jax.Array):
            return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        return _padded(array, size)

    return jax.tree.map(padded, rows)


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """A copy that nobody else writes to, and that JAX on the CPU can use where it is."""
    # Zeros that are never touched take no memory.
    nbytes = size * math.prod(array.shape[1:]) * array.dtype.itemsize
    memory = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    held = memory[start : start + nbytes].view(array.dtype).reshape(size, *array.shape[1:])
    held[: array.shape[0]] = array
    held.flags.writeable = False
    return held


def array_batches(
    feats: Feats,
    labels: Labels,
    batch_rows: int,
    *,
    weights: Weights | None = None,
    start: int = 0,
    share: tuple[int, int] | None = None,
) -> Iterator[Rows]:
    """Batches of arrays, or of memory maps (`numpy.load(path, mmap_mode="r")`), of which nothing is copied.

    They are views, and of NumPy's arrays views that cannot be written to, which `accumulate` need not copy
    either: leave the arrays as they are until the pass is over.

    Args:
        feats: `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`.
        batch_rows: Rows in a batch.
        weights: Weight of each row `(n,)`.
        start: How many batches to leave out, for `accumulate` to resume:
            `lambda done: array_batches(feats, labels, rows, start=done)`.
        share: `(i, k)`: the i-th of k even shares of the rows. None: the share of this process, which is
            everything unless `jax.distributed` is running.

    Returns:
        An iterator of `Rows`.

    Raises:
        ValueError: If arrays have different numbers of rows, or the share makes no sense.

    Example:
        >>> import numpy as np
        >>> import lip_jax
        >>> batches = lip_jax.array_batches(np.ones((5, 2)), np.zeros(5, int), 2)
        >>> [batch.feats.shape[0] for batch in batches]
        [2, 2, 1]

    Reference:
        The sums of [si2025]'s closed form are additive over samples.
    """
    _check_count("batch_rows", batch_rows)
    n = feats.shape[0]
    for name, array in (("labels", labels), ("weights", weights)):
        if array is not None and array.shape[0] != n:
            raise ValueError(f"{name} must have a row for each of the {n} of feats; got {describe(array)}.")
    index, count = _share(share)
    first, stop = n * index // count, n * (index + 1) // count
    edges = range(first + start * batch_rows, stop, batch_rows)

    def cut(array: Any, edge: int) -> Any:
        if array is None:
            return None
        part = array[edge : min(edge + batch_rows, stop)]
        if isinstance(part, np.ndarray):
            part.flags.writeable = False
        return part

    return (Rows(*(cut(array, edge) for array in (feats, labels, weights))) for edge in edges)


def _share(share: tuple[int, int] | None) -> tuple[int, int]:
    index, count = (jax.process_index(), jax.process_count()) if share is None else share
    if not 0 <= index < count:
        raise ValueError(f"share must be (i, k) with 0 <= i < k; got {share}.")
    return index, count


def shard_batches(
    folder: str | Path,
    batch_rows: int,
    *,
    start: int = 0,
    share: tuple[int, int] | None = None,
) -> Iterator[Rows]:
    """Batches from a folder of files, in the order of their names; one file is open at a time.

    A shard is either `NAME.npz` with arrays `feats`, `labels` and maybe `weights`, which is read whole, or
    files `NAME.feats.npy`, `NAME.labels.npy` and maybe `NAME.weights.npy`, which are mapped into memory.

    Args:
        folder: Where the shards are.
        batch_rows: Rows in a batch; the last of a shard may have fewer.
        start: How many batches to leave out, as in `array_batches`.
        share: `(i, k)`: every k-th shard from the i-th on. None: the share of this process.

    Returns:
        An iterator of `Rows`.

    Raises:
        ValueError: If the folder holds no shards, one lacks an array, or the share makes no sense.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> import lip_jax
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in "ab":
        ...         np.savez(f"{folder}/{name}.npz", feats=np.ones((3, 2)), labels=np.zeros(3, int))
        ...     [batch.feats.shape[0] for batch in lip_jax.stream.shard_batches(folder, 2)]
        [2, 1, 2, 1]

    Reference:
        The sums of [si2025]'s closed form are additive over samples.
    """
    _check_count("batch_rows", batch_rows)
    index, count = _share(share)
    folder = Path(folder)
    shards = sorted([*folder.glob("*.npz"), *folder.glob("*.feats.npy")])
    if not shards:
        raise ValueError(f"folder {folder} holds no shards: neither NAME.npz nor NAME.feats.npy.")
    return _shard_batches(shards[index::count], batch_rows, start)


def _shard_batches(shards: list[Path], batch_rows: int, start: int) -> Iterator[Rows]:
    for shard in shards:
        with ExitStack() as stack:
            if shard.suffix == ".npz":
                held = stack.enter_context(np.load(shard))
                missing = [name for name in ("feats", "labels") if name not in held]
            else:
                held, missing = _mapped(shard)
            if missing:
                raise ValueError(f"shard {shard} lacks {' and '.join(missing)}.")
            # Of an archive only labels are read to see whether anything of it is wanted.
            batches = -(-held["labels"].shape[0] // batch_rows)
            if start >= batches:
                start -= batches
                continue
            arrays = {name: held[name] for name in Rows._fields if name in held}
            yield from array_batches(**arrays, batch_rows=batch_rows, start=start, share=(0, 1))
            start = 0


def _mapped(shard: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    stem = shard.name.removesuffix(".feats.npy")
    paths = {name: shard.with_name(f"{stem}.{name}.npy") for name in Rows._fields}
    held = {name: np.load(path, mmap_mode="r") for name, path in paths.items() if path.exists()}
    return held, [str(paths["labels"].name)] if "labels" not in held else []
