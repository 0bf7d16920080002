"""Moments of a `jax.distributed` run, merged over its processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lip_jax.numerics import compensated
from lip_jax.sums import additive, moments, tail
from lip_jax.sums.moments import State
from lip_jax.sums.tail import TailMoments

# Numbers gathered from every process at once. It bounds memory for many processes with large states.
GATHERED = 2**22


def merge_processes(state: State) -> State:
    """The moments of the rows of all processes, equal in each."""
    if jax.process_count() == 1:
        return state
    with _reaching("has passed its batches"):
        return _merged(state)


def check_in_step(folder: str | Path, batches: int, spread: bool) -> None:
    """Require all processes to resume at the same batch if batches are sharded over them."""
    if jax.process_count() == 1:
        return
    with _reaching("is about to pass its batches"):
        done, of_all = _gather(np.array([batches, spread], np.int32)).T
    if of_all.any() and len(set(done)) > 1:
        raise ValueError(
            f"checkpoint {folder} is of batches sharded over all processes, which must resume at the same "
            f"batch, but they last saved after {', '.join(map(str, done))} batches. Delete the folder to "
            f"start again."
        )


@contextmanager
def _reaching(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"process {jax.process_index()} of {jax.process_count()} {what}, but cannot "
            f"reach the others: one of them is gone. Restart all processes: with checkpoint= each resumes."
        ) from error


def _gather(array: Any) -> np.ndarray:
    """The array of every process, stacked: `(processes, …)`."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.asarray(array)))


def _merged(state: State) -> State:
    about: Any = tail.about if isinstance(state, TailMoments) else moments.about
    # All moments are taken about the origin of the first process that has rows.
    first = int((_gather(state.total) > 0).argmax())
    state = about(state, *(_gather(part)[first] for part in state.origin))
    pairs = [_added(value, small) for value, small in zip(state.sums, state.compensation, strict=True)]
    sums, compensation = zip(*pairs, strict=True)
    ignored = _gather(state.ignored).sum(dtype=np.int32)
    merged = additive.from_sums(type(state), sums, state.origin, ignored, compensation)
    return jax.tree.map(jnp.asarray, merged)


def _added(value: jax.Array, small: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """One sum and its compensation over all processes, a piece at a time."""
    flat = np.asarray(value).reshape(-1), np.asarray(small).reshape(-1)
    found = [np.empty_like(part) for part in flat]
    for start in range(0, flat[0].size, GATHERED):
        place = slice(start, start + GATHERED)
        values, smalls = (_gather(part[place]) for part in flat)
        total, compensation = np.zeros_like(values[0]), np.zeros_like(smalls[0])
        for term, rest in zip(values, smalls, strict=True):
            total, compensation = compensated.add(total, compensation + rest, term)
        found[0][place], found[1][place] = total, compensation
    return found[0].reshape(value.shape), found[1].reshape(value.shape)
