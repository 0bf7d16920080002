"""State and position of a pass over data, saved with orbax so that a killed pass can resume."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lip_jax.sums.additive import from_named, named
from lip_jax.sums.moments import Accumulator, State


class _ArraysHandler(ocp.CheckpointHandler):
    """Named arrays of one process: orbax's own handler writes NumPy arrays on process 0 alone."""

    def save(self, directory: Any, args: "_Arrays") -> None:
        np.savez(directory / "arrays.npz", allow_pickle=False, **args.arrays)

    def restore(self, directory: Any, args: "_Arrays") -> dict[str, np.ndarray]:
        with np.load(directory / "arrays.npz") as held:
            return dict(held)


@ocp.args.register_with_handler(_ArraysHandler, for_save=True, for_restore=True)
@dataclass
class _Arrays(ocp.args.CheckpointArgs):
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@contextmanager
def opened(folder: str | Path) -> Iterator[ocp.CheckpointManager]:
    """The orbax manager of this process's own checkpoints."""
    index, count = jax.process_index(), jax.process_count()
    folder = Path(folder).absolute()
    others = [path.name for path in folder.glob("process_*") if not path.name.endswith(f"_of_{count}")]
    if others:
        raise ValueError(
            f"checkpoint {folder} is of another number of processes ({', '.join(sorted(others))}) than "
            f"{count}, among which batches are shared differently. Resume with as many processes, or use "
            f"another folder."
        )
    own = folder / f"process_{index}_of_{count}"
    own.mkdir(parents=True, exist_ok=True)
    # Processes are not in step, so none may wait for another.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"lip_jax_{index}"
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, create=False, enable_async_checkpointing=False, multiprocessing_options=alone
    )
    handlers = {
        "state": _ArraysHandler(),
        "position": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    with ocp.CheckpointManager(own, options=options, item_handlers=handlers) as manager:
        yield manager


def identity_of(accumulator: Accumulator) -> dict[str, Any]:
    """The properties of an accumulator that a checkpoint must share to be resumed."""
    checksum = 0
    if accumulator.split is not None:
        for part in (accumulator.split.u, accumulator.split.vt):
            checksum = zlib.crc32(np.ascontiguousarray(part).tobytes(), checksum)
    shapes = jax.eval_shape(accumulator.init)
    return {
        "moments": type(shapes).__name__,
        "shape": list(accumulator.shape),
        "dtype": str(shapes.total.dtype),
        "split": checksum,
        "arrays": sorted(named(shapes)),
    }


def restored(
    manager: ocp.CheckpointManager, accumulator: Accumulator[State], wanted: dict[str, Any]
) -> tuple[State, dict[str, Any]] | None:
    """The last saved state and position, if any, which must be of the `wanted` accumulator."""
    step = manager.latest_step()
    if step is None:
        return None
    position = manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]
    differing = [
        f"{name} {position.get(name)}, not {value}"
        for name, value in wanted.items()
        if position.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"checkpoint {manager.directory} is of another accumulator: {'; '.join(differing)}. Use another "
            f"folder, or the head it was made for."
        )
    arrays = manager.restore(step, args=ocp.args.Composite(state=_Arrays()))["state"]
    state = from_named(type(accumulator.init()), {name: jnp.array(part) for name, part in arrays.items()})
    return state, {name: value for name, value in position.items() if name not in wanted}


def save(
    manager: ocp.CheckpointManager, made_by: dict[str, Any], state: State, position: dict[str, Any]
) -> None:
    """Save state and position, with the identity of the accumulator."""
    # Copies, because the next batch reuses the state's memory.
    arrays = {name: np.array(part) for name, part in named(state).items()}
    manager.save(
        position["batches"],
        args=ocp.args.Composite(state=_Arrays(arrays), position=ocp.args.JsonSave({**made_by, **position})),
    )
