"""One pass over data of any size: any iterator of batches, on one device or many, resumed where it broke off.

`accumulate` takes the moments of all batches. What it iterates over may be a list, a generator, a loader of
grain, `tf.data` or PyTorch, `array_batches` of memory maps, `shard_batches` of files, or `feature_batches`,
which runs a Flax model on raw inputs. All batches go through in one shape, so that one program serves them,
and the next is read while the device computes.
"""

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lip_jax._checks import describe, raise_for_bad_rows
from lip_jax._processes import check_in_step, merge_processes
from lip_jax._types import Array, Feats, Labels, Weights
from lip_jax.capture import capture_features, check_model
from lip_jax.labels import Rows, int32_ids
from lip_jax.moments import Accumulator, State
from lip_jax.trees import Layout

# What JAX asks of memory that it is to use on the CPU without a copy.
ALIGNMENT = 64

_copy = jax.jit(jnp.copy)

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


def accumulate(
    accumulator: Accumulator[State],
    batches: Batches,
    *,
    batch_rows: int | None = None,
    unusable: Literal["raise", "skip"] = "raise",
    sharding: jax.sharding.Sharding | None = None,
    checkpoint: str | Path | None = None,
    every: int = 1000,
    progress: bool | None = None,
) -> State:
    """The moments of all batches, in one pass.

    With `jax.distributed` running each process passes its own share of the batches, as many as it has, and
    all return the moments of all: at the end `O(r)` or `O(q² + ql)` numbers travel between them. (Batches
    that are arrays spread over all processes are taken as they are, by all processes in step.)

    Args:
        accumulator: A `moment_accumulator` or a `tail_accumulator`.
        batches: Of `(feats, labels)` or `(feats, labels, weights)`, tuples or mappings by these names, of any
            number of rows, none included; or a function from a number of batches to the batches after them,
            so that a resumed pass need not read those again.
        batch_rows: Rows that go through at once: larger batches are cut, smaller ones padded. None: as many
            as the first batch has, or as before where a pass resumes.
        unusable: What becomes of a row that cannot be used (`lip_jax.labels`): `"raise"`, naming the batch,
            or `"skip"`: it counts for nothing and is counted in `ignored` of the result.
        sharding: Where the rows of a batch are put, such as `NamedSharding(mesh, PartitionSpec("data"))`;
            `batch_rows` is rounded up to a multiple of its devices. None: on the default device, or, for
            arrays of JAX, where they are.
        checkpoint: A folder in which state and position are saved with orbax. If there is a position in it,
            the pass resumes there, and ends with the result of one that was never interrupted. The position
            is a number of batches, so these must be the same ones again, in the same order. A folder belongs
            to one pass over one set of batches: where that is finished, its moments are returned, and no
            batch of the set is summed again. With `jax.distributed` all processes take a folder or none, and
            each needs to see what it saved before.
        every: After how many batches to save.
        progress: Whether to show a progress bar on stderr (needs rich); None: if that is a terminal.

    Returns:
        `Moments` or `TailMoments`.

    Raises:
        ValueError: If a batch does not fit, a row cannot be used, or the checkpoint is of something else.
        RuntimeError: If another process of the run is gone.

    Warns:
        UserWarning: If the batches of a resumed pass look different from those before.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> batches = ((jnp.eye(2), jnp.array([0, 1])) for _ in range(3))
        >>> moments = lip_jax.accumulate(lip_jax.moment_accumulator(q=2, l=2), batches)
        >>> float(moments.rows)
        6.0

    Reference:
        The sums of [si2025]'s closed form are additive over samples.
    """
    if unusable not in ("raise", "skip"):
        raise ValueError(f"unusable must be 'raise' or 'skip'; got {unusable!r}.")
    _check_count("every", every)
    if batch_rows is not None:
        _check_count("batch_rows", batch_rows)
    with ExitStack() as stack:
        save, state, at = _checkpoints(stack, checkpoint, accumulator)
        following = batches(at.batches) if callable(batches) else itertools.islice(batches, at.batches, None)
        advance = stack.enter_context(_bar(progress, at.batches, _length(batches)))
        saved, before = at.batches, int(state.ignored)

        def finish(begun: tuple[Rows, int, jax.Array] | None) -> None:
            if begun and int(begun[2]) > before and unusable == "raise":
                _raise_for(*begun[:2], accumulator.shape[1])

        begun = None
        for piece in _pieces(_batches(following, at), batch_rows or at.batch_rows, sharding):
            if piece.rows is not None:
                state = _updated(accumulator, state, piece.rows, piece.place)
                # Begun before the last is done, so that the device never waits; no more than three are held.
                finish(begun)
                # A copy, as the next update uses the state's memory anew.
                begun = piece.rows, piece.place, _copy(state.ignored)
            if piece.last:
                at = at.after(piece)
                advance(at.batches)
                if at.batches - saved >= every:
                    finish(begun)
                    save(state, at._asdict())
                    saved = at.batches
        finish(begun)
        if at.batches > saved:
            save(state, at._asdict())
    return state if at.spread else merge_processes(state)


class _Piece(NamedTuple):
    """Rows that go through at once, if any, of the n-th batch of so many, and whether they are its last."""

    rows: Rows | None
    place: int
    of: int
    last: bool
    batch_rows: int | None


class _Position(NamedTuple):
    """How many batches are done, and what tells whether a pass goes on as it began.

    `smallest` and `largest` are the rows of a batch, of those that have any. `spread` is whether batches are
    arrays spread over all processes: sums of them are those of all processes already.
    """

    batches: int = 0
    batch_rows: int | None = None
    smallest: int = 0
    largest: int = 0
    spread: bool = False

    def after(self, piece: _Piece) -> "_Position":
        """The position when the batch of a piece is done."""
        return _Position(
            batches=piece.place + 1,
            batch_rows=piece.batch_rows,
            smallest=min(self.smallest or piece.of, piece.of or self.smallest),
            largest=max(self.largest, piece.of),
            spread=self.spread or (piece.rows is not None and not _is_local(piece.rows.feats)),
        )


def _checkpoints(
    stack: ExitStack, folder: str | Path | None, accumulator: Accumulator[State]
) -> tuple[Callable[[State, dict[str, Any]], None], State, _Position]:
    """How to save, and state and position as they were saved last, or at the beginning."""
    if folder is None:
        return lambda state, position: None, accumulator.init(), _Position()
    try:
        from lip_jax import _checkpoint
    except ImportError:
        raise ValueError("checkpoint= needs orbax: pip install orbax-checkpoint.") from None
    manager = stack.enter_context(_checkpoint.opened(folder))
    identity = _checkpoint.identity(accumulator)
    found = _checkpoint.restored(manager, accumulator, identity)
    state, at = (accumulator.init(), _Position()) if found is None else (found[0], _Position(**found[1]))
    check_in_step(folder, at.batches, at.spread)
    return partial(_checkpoint.save, manager, identity), state, at


def _length(batches: Any) -> int | None:
    """How many there are, if that is known: loaders of unknown length have a `__len__` that raises."""
    try:
        return len(batches)
    except TypeError:
        return None


def _check_count(name: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be an int of at least 1; got {number!r}.")


def _batches(given: Iterable[Any], was: _Position) -> Iterator[tuple[int, Rows]]:
    """Batches with their places, and a warning if they look different from those of an interrupted pass."""
    sizes: list[int] = []
    for index, batch in enumerate(given, was.batches):
        batch = _as_batch(batch, index)
        n = batch.feats.shape[0]
        if n and len(sizes) < 2:
            sizes.append(n)
            # The last of all, or of a shard, may be smaller than those before: it takes two to tell.
            if 0 < was.largest < n if len(sizes) == 1 else max(sizes) < was.smallest:
                warnings.warn(
                    f"batches look different from those of the interrupted pass, of which {was.batches} "
                    f"were summed: the next has {sizes[0]} rows, those had {was.smallest} to {was.largest}. "
                    f"If they are cut otherwise, rows count twice or not at all: resume with the same "
                    f"batches, or take another checkpoint folder.",
                    stacklevel=4,
                )
        yield index, batch


def _pieces(batches: Iterator[tuple[int, Rows]], size: int | None, sharding: Any) -> Iterator[_Piece]:
    """Batches cut and padded to one number of rows, where they are to be computed with."""
    for index, batch in batches:
        n = batch.feats.shape[0]
        if not _is_local(batch.feats):
            yield _Piece(batch, index, n, True, size)
            continue
        if not n:
            yield _Piece(None, index, n, True, size)
            continue
        size = _rounded(size or n, sharding)
        if batch.weights is None:
            # Given or not, and padded or not: one program for all.
            batch = batch._replace(weights=np.ones(n, np.float32))
        for start in range(0, n, size):
            part = batch
            if n > size:
                part = Rows(*(whole[start : start + size] for whole in batch))
            part = pad_rows(part, size)
            part = part._replace(labels=int32_ids(part.labels))
            yield _Piece(_placed(part, sharding), index, n, start + size >= n, size)


def _rounded(size: int, sharding: jax.sharding.Sharding | None) -> int:
    """Up to a multiple of the devices rows are spread over."""
    devices = 1 if sharding is None else len(sharding.device_set)
    return -(-size // devices) * devices


def _as_batch(given: Any, index: int) -> Rows:
    if isinstance(given, Mapping):
        extra = set(given) - set(Rows._fields)
        if extra or not {"feats", "labels"} <= set(given):
            raise ValueError(
                f"batch {index} must hold 'feats', 'labels' and maybe 'weights'; got "
                f"{sorted(map(str, given))}."
            )
        given = Rows(**given)
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        length = f" of length {len(given)}" if isinstance(given, (tuple, list)) else ""
        raise ValueError(
            f"batch {index} must be (feats, labels) or (feats, labels, weights), or a mapping by these "
            f"names; got a {type(given).__name__}{length}."
        )
    batch = Rows(*(None if part is None else as_array(part) for part in given))
    for name, part in batch._asdict().items():
        if part is not None and (part.ndim < 1 or part.shape[0] != batch.feats.shape[0]):
            raise ValueError(
                f"batch {index}: {name} must have a row for each of feats {describe(batch.feats)}; got "
                f"{describe(part)}."
            )
    return batch


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


def _updated(accumulator: Accumulator[State], state: State, rows: Rows, place: int) -> State:
    try:
        return accumulator.update(state, *rows)
    except ValueError as error:
        raise ValueError(f"batch {place}: {error}") from None


def _raise_for(rows: Rows, place: int, l: int) -> None:
    if not _is_local(rows.feats):
        raise ValueError(
            f"batch {place}: some rows cannot be used (see lip_jax.labels); which, cannot be seen in arrays "
            f"that are spread over processes. Give these rows the weight 0. Or pass unusable='skip'."
        )
    try:
        raise_for_bad_rows(rows.feats, rows.labels, rows.weights, l)
    except ValueError as error:
        raise ValueError(f"batch {place}: {error} Or pass unusable='skip'.") from None


@contextmanager
def _bar(progress: bool | None, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Something to call with the number of batches that are done."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda done: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        if progress:
            raise ValueError("progress=True needs rich: pip install rich, or leave progress out.") from None
        yield lambda done: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("batches", total=total, completed=done)
        yield lambda done: bar.update(task, completed=done)


def feature_batches(
    model: Any,
    variables: PyTree,
    batches: Iterable[Any],
    *,
    head: str | Callable[[str, Any], bool] | None = None,
    num_classes: int | None = None,
    layout: Layout = "q l",
    batch_rows: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    **apply_kwargs: Any,
) -> Iterator[Rows]:
    """The inputs of a model's head for batches of the model's inputs, for `accumulate`; none are stored.

    One compiled forward pass a batch, the last padded. Heads that see further axes, such as the tokens of a
    sequence, get a row for each.

    Args:
        model: A linen module, or an `nnx.Module` (which is copied, not touched).
        variables: For linen the variables dict, or its params. For nnx None, or an `nnx.State` to use in
            place of the module's own.
        batches: Of `(inputs, labels)` or `(inputs, labels, weights)`; inputs are the model's, or a tuple of
            its positional arguments. Every array of them has a row for each row of the batch, and so have
            labels and weights, or one for each token. Of a batch of no rows come `Rows` of none.
        head: A path or predicate, as in `lip_jax.capture_features`.
        num_classes: `l`, needed where `head` is None.
        layout: How the head's kernel is stored, as in `lip_jax.apply`.
        batch_rows: Rows of inputs that go through at once, at least as many as any batch has. None: as many
            as the first batch has.
        sharding: Where inputs are put, as in `accumulate`.
        **apply_kwargs: Passed to the model, e.g. `train=False`, and whatever has no row for each of the
            batch; rows must not depend on each other.

    Returns:
        An iterator of `Rows`: features `(n, q)`, labels, and weights, which are 0 for padding.

    Raises:
        ValueError: If a batch does not fit, or as `lip_jax.capture_features`.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> inputs = [(jnp.ones((5, 4)), jnp.zeros(5, jnp.int32)), (jnp.ones((2, 4)), jnp.ones(2, jnp.int32))]
        >>> features = lip_jax.feature_batches(model, variables, inputs, head="layers_2")
        >>> moments = lip_jax.accumulate(lip_jax.moment_accumulator(q=8, l=3), features)
        >>> float(moments.rows)
        7.0

    Reference:
        [li2020], the representation a network learned.
    """
    check_model(model)
    if batch_rows is not None:
        _check_count("batch_rows", batch_rows)
    from flax import linen, nnx

    if not isinstance(model, linen.Module) and variables is None:
        variables = nnx.state(model)

    @jax.jit
    def features(variables, inputs):
        return capture_features(
            model, variables, inputs, head=head, num_classes=num_classes, layout=layout, **apply_kwargs
        )

    return _feature_batches(partial(features, variables), batches, batch_rows, sharding)


def _feature_batches(features: Callable, batches, size: int | None, sharding: Any) -> Iterator[Rows]:
    for index, given in enumerate(batches):
        if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
            raise ValueError(
                f"batch {index} must be (inputs, labels) or (inputs, labels, weights); got a "
                f"{type(given).__name__}. A model with several inputs takes a tuple of them."
            )
        inputs = jax.tree.map(as_array, given[0])
        labels, weights = int32_ids(as_array(given[1])), None if len(given) == 2 else given[2]
        weights = None if weights is None else as_array(weights)
        n = _row_count(inputs, labels, weights, index)
        weights = np.ones(n, np.float32) if weights is None else weights
        if not n:
            # Passed on, as `accumulate` counts batches to know where to resume.
            shape = jax.eval_shape(features, pad_rows(inputs, size or 1))
            yield _flattened(jnp.zeros((0, *shape.shape[1:]), shape.dtype), labels, weights)
            continue
        if size is not None and n > size:
            raise ValueError(
                f"batch {index} has {n} rows, more than {size}. Pass batch_rows= of the largest batch."
            )
        size = _rounded(size or n, sharding)
        inputs, labels, weights = _placed(pad_rows((inputs, labels, weights), size), sharding)
        yield _flattened(features(inputs), labels, weights)


def _row_count(inputs: PyTree, labels: Array, weights: Array | None, index: int) -> int:
    """How many rows a batch has: as many as each of its parts."""
    leaves = jax.tree_util.tree_leaves_with_path(inputs)
    parts = {f"inputs{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves} | {"labels": labels}
    if weights is not None:
        parts["weights"] = weights
    first = next((name for name, part in parts.items() if part.ndim), "labels")
    for name, part in parts.items():
        if not part.ndim or part.shape[:1] != parts[first].shape[:1]:
            raise ValueError(
                f"batch {index}: {name} must have a row for each of {first} {describe(parts[first])}; got "
                f"{describe(part)}. What has no row for each belongs in apply_kwargs."
            )
    return labels.shape[0]


def _flattened(feats: Array, labels: Array, weights: Array) -> Rows:
    """A row for every entry that the head sees."""
    axes, targets = feats.shape[:-1], jnp.issubdtype(labels.dtype, jnp.floating)
    expected = labels.shape[:-1] if targets else labels.shape
    if expected != axes:
        raise ValueError(
            f"labels must have an entry for each input of the head, {axes}; got {describe(labels)}."
        )
    weights = jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (len(axes) - weights.ndim)), axes)
    labels = labels.reshape((-1, labels.shape[-1]) if targets else (-1,))
    return Rows(feats.reshape(-1, feats.shape[-1]), labels, weights.reshape(-1))


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
        ...     [batch.feats.shape[0] for batch in lip_jax.shard_batches(folder, 2)]
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
