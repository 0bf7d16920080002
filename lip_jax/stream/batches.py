"""Sources of batches: arrays, memory maps and folders of files; batches padded and put on devices."""

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

# Alignment in bytes at which JAX uses memory on the CPU without a copy.
ALIGNMENT = 64


def check_count(name: str, number: Any) -> None:
    """Require an int of at least 1."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be an int of at least 1; got {number!r}.")


def rounded(size: int, sharding: jax.sharding.Sharding | None) -> int:
    """`size` rounded up to a multiple of the devices that rows are sharded over."""
    devices = 1 if sharding is None else len(sharding.device_set)
    return -(-size // devices) * devices


def jax_or_numpy(given: Any) -> Array:
    """A JAX array unchanged; any other array, such as one of TensorFlow or PyTorch, as a NumPy array."""
    return given if isinstance(given, jax.Array) else np.asarray(given)


def is_local(array: Array) -> bool:
    """Whether this process holds the whole array."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def placed(rows: PyTree, sharding: jax.sharding.Sharding | None) -> PyTree:
    """Arrays on the devices of `sharding`.

    A loader may reuse the memory of a batch when it is asked for the next, so writeable arrays are copied.
    Others, such as memory maps opened for reading, are used where they are.
    """

    def kept(array: Array) -> Array:
        # Copied by NumPy: device_put on the CPU may alias memory even if told not to, and jnp.array waits for
        # the batch that is being computed.
        if isinstance(array, np.ndarray) and array.flags.writeable:
            return _padded(array, array.shape[0])
        return array

    return jax.device_put(jax.tree.map(kept, rows), sharding)


def pad_rows(rows: PyTree, size: int) -> PyTree:
    """Arrays padded with rows of zeros to `size` rows."""

    def padded(array: Array) -> Array:
        missing = size - array.shape[0]
        if not missing:
            return array
        if isinstance(array, jax.Array):
            return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        return _padded(array, size)

    return jax.tree.map(padded, rows)


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """A read-only copy, aligned so that JAX on the CPU uses it without another copy."""
    # Untouched zeros take no memory.
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
    """Batches of arrays or memory maps (`numpy.load(path, mmap_mode="r")`), without a copy.

    Batches of NumPy arrays are read-only views, which `accumulate` does not copy either. Do not change the
    arrays until the pass is over.

    Args:
        feats: `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`.
        batch_rows: Rows in a batch.
        weights: Weight of each row `(n,)`.
        start: How many batches to skip, for `accumulate` to resume:
            `lambda done: array_batches(feats, labels, rows, start=done)`.
        share: `(i, k)`: the i-th of k even shares of the rows. None: the share of this process, which is all
            rows unless `jax.distributed` is running.

    Returns:
        An iterator of `Rows`.

    Raises:
        ValueError: If arrays have different numbers of rows, or the share is not valid.

    Example:
        >>> import numpy as np
        >>> import lip_jax
        >>> batches = lip_jax.array_batches(np.ones((5, 2)), np.zeros(5, int), 2)
        >>> [batch.feats.shape[0] for batch in batches]
        [2, 2, 1]

    Reference:
        The sums of [si2025]'s closed form are additive over samples.
    """
    check_count("batch_rows", batch_rows)
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
    """Batches from a folder of shards, in the order of their names; one shard is open at a time.

    A shard is `NAME.npz` with arrays `feats`, `labels` and optionally `weights`, which is read as a whole, or
    files `NAME.feats.npy`, `NAME.labels.npy` and optionally `NAME.weights.npy`, which are memory-mapped.

    Args:
        folder: The folder of the shards.
        batch_rows: Rows in a batch; the last of a shard may have fewer.
        start: How many batches to skip, as in `array_batches`.
        share: `(i, k)`: every k-th shard, from the i-th. None: the share of this process.

    Returns:
        An iterator of `Rows`.

    Raises:
        ValueError: If the folder holds no shards, a shard lacks an array, or the share is not valid.

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
    check_count("batch_rows", batch_rows)
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
            # In an archive only labels are read to count its batches.
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
