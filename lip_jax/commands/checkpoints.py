"""Heads in files: an orbax folder, a `.safetensors` or an `.npz` file, read and written without the model.

Only the arrays of the head are held in memory. They are written into a copy of the checkpoint, which is
otherwise unchanged. A `.safetensors` file is the exception: it is held and written as a whole.
"""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lip_jax._checks import check_floating, describe, is_floating
from lip_jax.commands.files import check_out, no_file, opened_npz, written_whole
from lip_jax.methods.protocol import Head
from lip_jax.models.lens import head_lens
from lip_jax.models.trees import (
    Layout,
    Leaf,
    bias_of,
    check_unaltered,
    find_head,
    matrix_shape,
    open_tree,
    searched,
)
from lip_jax.rows.checks import check_label_kind
from lip_jax.rows.labels import Rows

Kind = Literal["orbax", "safetensors", "npz"]

Names = tuple[str, ...]

# The state of an optimiser has arrays of the shapes of parameters.
NO_PARAMETERS = ("opt_state", "optimizer")

# Files and folders that orbax puts beside the arrays of a tree or the items of a step; others begin with "_".
ORBAX_FILES = ("manifest.ocdbt", "commit_success.txt", "checkpoint", "orbax.checkpoint")

ORBAX_FOLDERS = ("array_metadatas", "d")


class Stored(NamedTuple):
    """Where one array is: its key, and for orbax the folder in the checkpoint and the zarr driver."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    folder: Path = Path()
    driver: str = ""


Changes = list[tuple[Stored, np.ndarray]]


@dataclass(frozen=True)
class Checkpoint:
    """The floating arrays of a checkpoint by their paths.

    Attributes:
        path: The file or folder.
        kind: Its format.
        arrays: Where each array is.
        left_out: Names of the other steps in the folder.
    """

    path: Path
    kind: Kind
    arrays: dict[Names, Stored]
    left_out: tuple[str, ...] = ()


class StoredHead(NamedTuple):
    """A head as it is stored, in a tree of its own, and as `(q, l)` and `(l,)`."""

    name: str
    dtype: np.dtype
    tree: dict[str, Any]
    head: Head


def open_checkpoint(path: Path) -> Checkpoint:
    """The arrays of a checkpoint, in the format of its path."""
    with _readable(path, "as a checkpoint"):
        is_folder, is_file = path.is_dir(), path.is_file()
    if is_folder:
        return _open_orbax(path)
    if not is_file:
        raise ValueError(f"{path} is no file and no folder.")
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(
            f"{path} must be the folder of an orbax checkpoint, a .safetensors or an .npz file. Save the "
            f"parameters as one of these: orbax.checkpoint.StandardCheckpointer().save(folder, variables)."
        )
    kind: Kind = "npz" if path.suffix == ".npz" else "safetensors"
    with _readable(path, f"as {path.suffix}"):
        found = [Stored(key, array.shape, array.dtype) for key, array in _arrays(path)]
    # Where no key has a slash, dots separate names.
    separator = "/" if any("/" in stored.key for stored in found) else "."
    named = {tuple(stored.key.split(separator)): stored for stored in found if is_floating(stored)}
    return Checkpoint(path, kind, named)


def stored_head(
    checkpoint: Checkpoint,
    head: str | None,
    layout: Layout,
    num_classes: int | None,
    *,
    rows: Rows | None,
) -> StoredHead:
    """The head that is named, or else the only one that fits the rows, or the only kernel without rows."""
    leaves = [
        Leaf(_without_box(names), jax.ShapeDtypeStruct(stored.shape, stored.dtype))
        for names, stored in checkpoint.arrays.items()
        if not any(name in NO_PARAMETERS for name in names)
    ]
    if head is not None and head not in {leaf.name for leaf in leaves} and "/" not in head:
        head = head.replace(".", "/")
    if rows is not None:
        check_floating(rows.feats, "feats", "n q")
        check_label_kind(rows.labels)
        leaf = find_head(leaves, head, layout, rows.feats.shape[1], rows.labels, num_classes)
    elif head is not None:
        leaf = find_head(leaves, head, layout, None, None, num_classes)
    else:
        leaf = _only_kernel(leaves, layout, num_classes)
    check_unaltered(leaves + _with_slashes(leaves), leaf)
    bias = bias_of(leaves, leaf, matrix_shape(leaf.value.shape, layout)[1])
    arrays = {part.path: load(checkpoint, part.path) for part in (leaf, bias) if part is not None}
    tree = _nested(arrays)
    return StoredHead(leaf.name, leaf.value.dtype, tree, head_in(tree, leaf.name, layout))


def head_in(tree: Mapping[str, Any], name: str, layout: Layout) -> Head:
    """The head as `(q, l)` and `(l,)`, in a tree that holds nothing else."""
    return head_lens(tree, name, q=None, layout=layout, allow_tied=True).head


def load(checkpoint: Checkpoint, names: Names) -> np.ndarray:
    """One array, by its names."""
    stored = _stored(checkpoint, names)
    with _readable(checkpoint.path, "in full"):
        if checkpoint.kind == "orbax":
            return np.asarray(_zarr(checkpoint.path, stored).read().result())
        with _archive(checkpoint.path) as (_, read):
            return read(stored.key)


def check_place(
    checkpoint: Checkpoint, out: Path, *, force: bool, inputs: Sequence[Path | None] = ()
) -> None:
    """Require a path for a checkpoint of the same kind, neither inside nor around the old one."""
    if checkpoint.kind != "orbax" and out.suffix != checkpoint.path.suffix:
        raise ValueError(f"--out {out} must end in {checkpoint.path.suffix}, as {checkpoint.path} does.")
    old, new = checkpoint.path.resolve(), out.resolve()
    if old in new.parents or new in old.parents:
        raise ValueError(f"--out {out} must lie beside {checkpoint.path}, not inside or around it.")
    spared = _spared_folder if checkpoint.kind == "orbax" else spared_file
    check_out(out, force=force, spared=spared, inputs=inputs)


def spared_file(path: Path) -> str:
    """Why a file must not be replaced, in words; empty for an archive that opens and holds no features."""
    if no_file(path) or path.suffix not in (".npz", ".safetensors"):
        return no_file(path)
    try:
        with _readable(path, f"as {path.suffix}"), _archive(path) as (keys, _):
            pass
    except ValueError:
        return f"is no {path.suffix} file that can be read"
    return "holds feats, the inputs of a head" if "feats" in keys else ""


def write_head(
    checkpoint: Checkpoint, head: StoredHead, tree: Mapping[str, Any], out: Path, *, force: bool
) -> bool:
    """Write a copy of the checkpoint with the head of this tree; return whether the head differs."""
    old, new = (open_tree(part).leaves for part in (head.tree, tree))
    changes = [
        (_stored(checkpoint, after.path), np.asarray(after.value))
        for before, after in zip(old, new, strict=True)
        if before.value.tobytes() != np.asarray(after.value).tobytes()
    ]
    write = {"npz": _write_npz, "safetensors": _write_safetensors, "orbax": _write_orbax}[checkpoint.kind]
    with written_whole(out, force=force) as fresh:
        try:
            write(checkpoint, changes, fresh)
        except OSError:
            raise
        except Exception as error:  # tensorstore and safetensors have their own errors for a full disk
            raise OSError(f"{out}: {error}") from error
    return bool(changes)


def _spared_folder(path: Path) -> str:
    """Why a folder must not be replaced, in words; empty for one whole tree or one whole step."""
    if not path.is_dir():
        return "is no folder"
    try:
        with _readable(path, "as a folder"):
            if _is_tree(path) or _is_step(path):
                return ""
            steps = _steps(path)
            if len(steps) > 1:
                names = ", ".join(step.name for step in steps)
                return f"holds {len(steps)} steps ({names}) where the result is one"
            others = [child for child in path.iterdir() if child not in steps and not _is_about_steps(child)]
            if steps and not others and all(map(_is_step, steps)):
                return ""
    except ValueError:
        pass
    return "is no checkpoint of orbax, or holds other things too"


def _is_tree(folder: Path) -> bool:
    """Whether the folder holds one tree that orbax saved, and nothing else."""
    if not (folder / "_METADATA").is_file():
        return False
    # Without OCDBT each array has a folder of its name.
    arrays = {leaf.value.name.split("/")[0] for leaf in _saved_leaves(folder)}
    return all(
        child.name in ORBAX_FOLDERS or child.name.startswith("ocdbt.process_") or child.name in arrays
        if child.is_dir()
        else _is_orbax_file(child)
        for child in folder.iterdir()
    )


def _is_step(folder: Path) -> bool:
    """Whether the folder holds items that orbax saved, at least one of them a tree, and nothing else."""
    about = folder / "_CHECKPOINT_METADATA"
    if not about.is_file() or not _items(folder):
        return False
    # For a single tree this is the name of its handler.
    items = json.loads(about.read_text()).get("item_handlers")
    return isinstance(items, dict) and all(
        child.name in items if child.is_dir() else _is_orbax_file(child) for child in folder.iterdir()
    )


def _is_orbax_file(path: Path) -> bool:
    return path.name.startswith("_") or path.name in ORBAX_FILES


def _is_about_steps(path: Path) -> bool:
    """Whether the path is the metadata that a `CheckpointManager` keeps beside its steps."""
    return path.name == "metadata" and [child.name for child in path.iterdir()] == ["_ROOT_METADATA"]


def _only_kernel(leaves: list[Leaf], layout: Layout, num_classes: int | None) -> Leaf:
    kernels = [
        leaf
        for leaf in searched(leaves)
        if (len(leaf.value.shape) == 2 or "..." in layout)
        and num_classes in (None, matrix_shape(leaf.value.shape, layout)[1])
    ]
    if len(kernels) == 1:
        return kernels[0]
    shown = kernels or [leaf for leaf in leaves if leaf.value.shape]
    listed = "\n".join(f"  {leaf.name}: {describe(leaf.value)}" for leaf in shown) or "  (none)"
    if kernels:
        raise ValueError(f"{len(kernels)} kernels could be the head; name one with --head PATH:\n{listed}")
    raise ValueError(f"none of these could be the kernel of a head (see --layout, --num-classes):\n{listed}")


def _with_slashes(leaves: list[Leaf]) -> list[Leaf]:
    """The leaves with the last three names joined by slashes: flax has such names, and keys were split."""
    return [leaf._replace(path=(*leaf.path[:-3], "/".join(leaf.path[-3:]))) for leaf in leaves]


def _without_box(names: Names) -> Names:
    """The names without the last one, where that is the value of an nnx.Variable or nn.Partitioned."""
    return names[:-1] if len(names) > 1 and names[-1] in ("value", "raw_value") else names


def _stored(checkpoint: Checkpoint, names: Names) -> Stored:
    return next(stored for given, stored in checkpoint.arrays.items() if _without_box(given) == names)


def _nested(arrays: Mapping[Names, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for names, array in arrays.items():
        inside = tree
        for name in names[:-1]:
            inside = inside.setdefault(name, {})
        inside[names[-1]] = array
    return tree


@contextmanager
def _readable(path: Path, how: str) -> Iterator[None]:
    """Turn any error of a library that reads a file into one that names the file."""
    try:
        yield
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} needs the package safetensors to be read and written: pip install 'lip_jax[cli]'."
        ) from None
    except Exception as error:  # orbax, tensorstore, safetensors and zipfile have errors of their own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read {how}: {first}") from error


@contextmanager
def _archive(path: Path) -> Iterator[tuple[list[str], Callable[[str], np.ndarray]]]:
    """The keys of an `.npz` or `.safetensors` file, and a function that reads one array."""
    if path.suffix == ".npz":
        with opened_npz(path) as held:
            yield list(held.files), held.__getitem__
    else:
        with _opened_safetensors(path) as held:
            yield list(held.keys()), held.get_tensor


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of an archive by key, one in memory at a time."""
    with _archive(path) as (keys, read):
        for key in keys:
            # In an .npz, pickled objects are no head; they are copied with the rest.
            with suppress(ValueError):
                yield key, read(key)


def _write_npz(checkpoint: Checkpoint, changes: Changes, path: Path) -> None:
    changed = {stored.key: array for stored, array in changes}
    with zipfile.ZipFile(checkpoint.path) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            array = changed.get(member.filename.removesuffix(".npy"))
            if array is None:
                new.writestr(member, old.read(member))
            else:
                held = io.BytesIO()
                np.lib.format.write_array(held, array, allow_pickle=False)
                new.writestr(member, held.getvalue())


def _opened_safetensors(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="numpy")


def _write_safetensors(checkpoint: Checkpoint, changes: Changes, path: Path) -> None:
    from safetensors.numpy import save_file

    with _opened_safetensors(checkpoint.path) as held:
        about = held.metadata()
    changed = {stored.key: np.ascontiguousarray(array) for stored, array in changes}
    save_file(dict(_arrays(checkpoint.path)) | changed, path, metadata=about)


def _open_orbax(path: Path) -> Checkpoint:
    """One tree, several named trees, or the newest of several steps."""
    left_out = ()
    with _readable(path, "as a folder"):
        items, steps = _items(path), _steps(path)
        # Numbered trees are steps, unless orbax saved them as items of one checkpoint.
        numbered = len(steps) > 1 and steps.keys() >= set(items)
        if steps and (not items or (numbered and not (path / "_CHECKPOINT_METADATA").is_file())):
            *older, newest = steps
            left_out = tuple(step.name for step in older)
            items = _items(newest)
    if not items:
        raise ValueError(
            f"{path} holds no tree saved by orbax: there is no file _METADATA in it, nor in a folder in it. "
            f"Name the folder that orbax saved to, or one of its steps."
        )
    arrays = {}
    for item in items:
        leaves = _saved_leaves(item)
        with _readable(item, "by orbax"):
            # The metadata of older versions of orbax lacks the version of zarr.
            zarr3 = json.loads((item / "_METADATA").read_text()).get("use_zarr3", False)
        prefix = () if len(items) == 1 else (item.name,)
        for leaf in leaves:
            if is_floating(leaf.value):
                arrays[(*prefix, *leaf.path)] = Stored(
                    leaf.value.name,
                    tuple(leaf.value.shape),
                    np.dtype(leaf.value.dtype),
                    item.relative_to(path),
                    "zarr3" if zarr3 else "zarr",
                )
    return Checkpoint(path, "orbax", arrays, left_out)


def _items(folder: Path) -> list[Path]:
    """The folders that hold one tree each: this folder, or folders in it."""
    if (folder / "_METADATA").is_file():
        return [folder]
    return sorted(child for child in folder.iterdir() if (child / "_METADATA").is_file())


def _steps(folder: Path) -> dict[Path, int]:
    """The numbered folders in it that hold trees, with their numbers, in order."""
    named = [(child, re.fullmatch(r"(?:\w+[_.-])?(\d+)", child.name)) for child in folder.iterdir()]
    steps = [(child, int(found[1])) for child, found in named if found and child.is_dir() and _items(child)]
    return dict(sorted(steps, key=lambda step: step[1]))


def _saved_leaves(item: Path) -> list[Leaf]:
    """Names, shapes and dtypes of the arrays in a folder that holds one tree."""
    import orbax.checkpoint as ocp

    with _readable(item, "by orbax"):
        found = ocp.PyTreeCheckpointHandler().metadata(item.resolve())  # pyright: ignore[reportArgumentType]
    return open_tree(found.tree).leaves


def _write_orbax(checkpoint: Checkpoint, changes: Changes, path: Path) -> None:
    top = str(checkpoint.path)
    shutil.copytree(
        checkpoint.path, path, ignore=lambda folder, _: checkpoint.left_out if folder == top else ()
    )
    for stored, array in changes:
        _zarr(path, stored).write(array).result()


def _zarr(path: Path, stored: Stored) -> Any:
    """One array of an orbax checkpoint, opened in place."""
    import tensorstore

    item = (path / stored.folder).resolve()
    files = {"driver": "file", "path": f"{item}/"}
    if (item / "manifest.ocdbt").exists():
        place = {"driver": "ocdbt", "base": files, "path": f"{stored.key}/"}
    else:
        place = files | {"path": f"{item / stored.key}/"}
    # Without the last option chunks of zeros are not stored, and orbax reports them missing.
    spec = {"driver": stored.driver, "kvstore": place, "store_data_equal_to_fill_value": True}
    return tensorstore.open(spec, open=True).result()
