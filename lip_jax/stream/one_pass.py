"""One pass over data of any size: any iterator of batches, on one device or many, resumable.

`accumulate` takes the moments of all batches. Batches may come from a list, a generator, a loader of grain,
`tf.data` or PyTorch, `array_batches` of memory maps, `shard_batches` of files, or `feature_batches`, which
runs a Flax model on raw inputs. All batches get one shape, so that one program serves them. The next batch is
read while the device computes.
"""

import itertools
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

from lip_jax._checks import describe
from lip_jax.rows.checks import raise_for_bad_rows
from lip_jax.rows.labels import Rows, int32_ids
from lip_jax.stream.batches import check_count, is_local, jax_or_numpy, pad_rows, placed, rounded
from lip_jax.stream.processes import check_in_step, merge_processes
from lip_jax.sums.moments import Accumulator, State

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

    With `jax.distributed` running, each process passes its own share of the batches, and all processes return
    the moments of all shares: at the end `O(r)` or `O(q² + ql)` numbers travel between them. Batches that are
    arrays sharded over all processes are passed by all processes in step.

    Args:
        accumulator: A `moment_accumulator` or a `tail_accumulator`.
        batches: Of `(feats, labels)` or `(feats, labels, weights)`, as tuples or as mappings by these names,
            with any number of rows, 0 included. Or a function from a number of batches to the batches after
            them, so that a resumed pass need not read those again.
        batch_rows: Rows per update: larger batches are cut, smaller ones padded. None: as many as the first
            batch has, or as before where a pass resumes.
        unusable: What to do with a row that cannot be used (`lip_jax.rows`): `"raise"`, naming the batch, or
            `"skip"`, which counts it in `ignored` of the result.
        sharding: Where the rows of a batch are put, such as `NamedSharding(mesh, PartitionSpec("data"))`;
            `batch_rows` is rounded up to a multiple of its devices. None: on the default device, but JAX
            arrays stay where they are.
        checkpoint: A folder in which state and position are saved with orbax. If it holds a position, the
            pass resumes there, with the same result as without an interruption. The position is a number of
            batches, so the batches must be the same, in the same order. A folder belongs to one pass over
            one set of batches: if that pass is finished, its moments are returned and no batch is read. With
            `jax.distributed` all processes need a folder or none does, and each must see what it saved.
        every: How many batches to pass between saves.
        progress: Whether to show a progress bar on stderr (needs rich); None: if stderr is a terminal.

    Returns:
        `Moments` or `TailMoments`.

    Raises:
        ValueError: If a batch does not fit, a row cannot be used, or the checkpoint is of another pass.
        RuntimeError: If another process of the run is gone.

    Warns:
        UserWarning: If the batches of a resumed pass differ in size from those before.

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
    check_count("every", every)
    if batch_rows is not None:
        check_count("batch_rows", batch_rows)
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
                # The update starts before the last one is checked, so that the device never waits. At most
                # three batches are in memory.
                finish(begun)
                # A copy, because the next update reuses the state's memory.
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
    """The rows of one update, if any.

    `place` is the index of their batch, `of` its number of rows, and `last` whether they are its last rows.
    """

    rows: Rows | None
    place: int
    of: int
    last: bool
    batch_rows: int | None


class _Position(NamedTuple):
    """The number of batches that are done, and what is known of their sizes.

    `smallest` and `largest` are the extreme numbers of rows of batches that have any. `spread` is whether
    batches are sharded over all processes, so that sums need no merging.
    """

    batches: int = 0
    batch_rows: int | None = None
    smallest: int = 0
    largest: int = 0
    spread: bool = False

    def after(self, piece: _Piece) -> "_Position":
        """The position after the batch of a piece."""
        return _Position(
            batches=piece.place + 1,
            batch_rows=piece.batch_rows,
            smallest=min(self.smallest or piece.of, piece.of or self.smallest),
            largest=max(self.largest, piece.of),
            spread=self.spread or (piece.rows is not None and not is_local(piece.rows.feats)),
        )


def _checkpoints(
    stack: ExitStack, folder: str | Path | None, accumulator: Accumulator[State]
) -> tuple[Callable[[State, dict[str, Any]], None], State, _Position]:
    """A function that saves, and the last saved state and position, or those at the start."""
    if folder is None:
        return lambda state, position: None, accumulator.init(), _Position()
    try:
        from lip_jax.stream.checkpoint import identity_of, opened, restored, save
    except ImportError:
        raise ValueError("checkpoint= needs orbax: pip install orbax-checkpoint.") from None
    manager = stack.enter_context(opened(folder))
    identity = identity_of(accumulator)
    found = restored(manager, accumulator, identity)
    state, at = (accumulator.init(), _Position()) if found is None else (found[0], _Position(**found[1]))
    check_in_step(folder, at.batches, at.spread)
    return partial(save, manager, identity), state, at


def _length(batches: Any) -> int | None:
    """The number of batches, if known: loaders of unknown length have a `__len__` that raises."""
    try:
        return len(batches)
    except TypeError:
        return None


def _batches(given: Iterable[Any], was: _Position) -> Iterator[tuple[int, Rows]]:
    """Batches with their indices, and a warning if their sizes differ from those of an interrupted pass."""
    sizes: list[int] = []
    for index, batch in enumerate(given, was.batches):
        batch = _as_batch(batch, index)
        n = batch.feats.shape[0]
        if n and len(sizes) < 2:
            sizes.append(n)
            # The last batch, also of a shard, may be small, so that only two small batches are a sign.
            if 0 < was.largest < n if len(sizes) == 1 else max(sizes) < was.smallest:
                warnings.warn(
                    f"batches look different from those of the interrupted pass, of which {was.batches} "
                    f"were summed: the next has {sizes[0]} rows, those had {was.smallest} to {was.largest}. "
                    f"If they are cut differently, rows count twice or not at all: resume with the same "
                    f"batches, or use another checkpoint folder.",
                    stacklevel=4,
                )
        yield index, batch


def _pieces(batches: Iterator[tuple[int, Rows]], size: int | None, sharding: Any) -> Iterator[_Piece]:
    """Batches cut and padded to one number of rows, on their devices."""
    for index, batch in batches:
        n = batch.feats.shape[0]
        if not is_local(batch.feats):
            yield _Piece(batch, index, n, True, size)
            continue
        if not n:
            yield _Piece(None, index, n, True, size)
            continue
        size = rounded(size or n, sharding)
        if batch.weights is None:
            # Always with weights, so that one program serves all batches.
            batch = batch._replace(weights=np.ones(n, np.float32))
        for start in range(0, n, size):
            part = batch
            if n > size:
                part = Rows(*(whole[start : start + size] for whole in batch))
            part = pad_rows(part, size)
            part = part._replace(labels=int32_ids(part.labels))
            yield _Piece(placed(part, sharding), index, n, start + size >= n, size)


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
    batch = Rows(*(None if part is None else jax_or_numpy(part) for part in given))
    for name, part in batch._asdict().items():
        if part is not None and (part.ndim < 1 or part.shape[0] != batch.feats.shape[0]):
            raise ValueError(
                f"batch {index}: {name} must have a row for each of feats {describe(batch.feats)}; got "
                f"{describe(part)}."
            )
    return batch


def _updated(accumulator: Accumulator[State], state: State, rows: Rows, place: int) -> State:
    try:
        return accumulator.update(state, *rows)
    except ValueError as error:
        raise ValueError(f"batch {place}: {error}") from None


def _raise_for(rows: Rows, place: int, l: int) -> None:
    if not is_local(rows.feats):
        raise ValueError(
            f"batch {place}: some rows cannot be used (see lip_jax.rows). They cannot be named in arrays "
            f"sharded over processes. Give these rows the weight 0, or pass unusable='skip'."
        )
    try:
        raise_for_bad_rows(rows.feats, rows.labels, rows.weights, l)
    except ValueError as error:
        raise ValueError(f"batch {place}: {error} Or pass unusable='skip'.") from None


@contextmanager
def _bar(progress: bool | None, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of batches that are done."""
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
