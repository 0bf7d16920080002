"""Heads in files: an orbax folder, a `.safetensors` or an `.npz` file, read and written without the model.

Only the arrays of the head are held, and only they are written: into a copy of everything else as it was. (A
`.safetensors` file is written from memory, all of it at once.)
"""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lip_jax._checks import check_floating, check_label_kind, describe, is_floating
from lip_jax._commands.files import check_out, opened_npz, written_whole
from lip_jax.labels import Rows
from lip_jax.selection import Head
from lip_jax.trees import Layout, Leaf, as_matrix, bias_of, find_head, matrix_shape, open_tree, searched

Kind = Literal["orbax", "safetensors", "npz"]
Names = tuple[str, ...]

# What optimisers keep has the shapes of the parameters and is none.
NO_PARAMETERS = ("opt_state", "optimizer")


class Stored(NamedTuple):
    """Where one array is: under which key, and for orbax in which folder of the checkpoint, as which zarr."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    folder: Path = Path()
    driver: str = ""


Changes = list[tuple[Stored, np.ndarray]]


@dataclass(frozen=True)
class Checkpoint:
    """The floating arrays of a checkpoint by the names on the way to them.

    Attributes:
        path: The file or folder.
        kind: Of which kind it is.
        arrays: Where each array is.
        left_out: Names in the folder that belong to other steps.
    """

    path: Path
    kind: Kind
    arrays: dict[Names, Stored]
    left_out: tuple[str, ...] = ()


class StoredHead(NamedTuple):
    """A head as it was found: kernel and bias in a tree of their own, and as `(q, l)` and `(l,)`."""

    name: str
    dtype: np.dtype
    tree: dict[str, Any]
    kernel: jax.Array
    bias: jax.Array | None


def open_checkpoint(path: Path) -> Checkpoint:
    """What arrays there are, by the kind of the path."""
    if path.is_dir():
        return _open_orbax(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file and no folder.")
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(
            f"{path} must be the folder of an orbax checkpoint, a .safetensors or an .npz file. Save the "
            f"parameters as one of these: orbax.checkpoint.StandardCheckpointer().save(folder, variables)."
        )
    kind: Kind = "npz" if path.suffix == ".npz" else "safetensors"
    with _readable(path, f"as {path.suffix}"):
        arrays = _npz_arrays(path) if kind == "npz" else _safetensors_arrays(path)
        found = [Stored(key, array.shape, array.dtype) for key, array in arrays]
    # Dots are the custom where no key has a slash.
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
    """The head that is named, or else the only one that fits the rows, or without rows the only kernel."""
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
    bias = bias_of(leaves, leaf, matrix_shape(leaf.value.shape, layout)[1])
    arrays = {part.path: load(checkpoint, part.path) for part in (leaf, bias) if part is not None}
    tree = _nested(arrays)
    return StoredHead(leaf.name, leaf.value.dtype, tree, *head_in(tree, leaf.name, layout))


def head_in(tree: Mapping[str, Any], name: str, layout: Layout) -> Head:
    """The head as `(q, l)` and `(l,)`, in a tree that holds nothing else."""
    arrays = {leaf.name: jnp.asarray(leaf.value) for leaf in open_tree(tree).leaves}
    kernel = as_matrix(arrays.pop(name), layout)
    return Head(kernel, next((bias.reshape(-1) for bias in arrays.values()), None))


def load(checkpoint: Checkpoint, names: Names) -> np.ndarray:
    """One array, by its names."""
    stored = _stored(checkpoint, names)
    with _readable(checkpoint.path, "in full"):
        if checkpoint.kind == "npz":
            with opened_npz(checkpoint.path) as held:
                return held[stored.key]
        if checkpoint.kind == "safetensors":
            with _opened_safetensors(checkpoint.path) as held:
                return held.get_tensor(stored.key)
        return np.asarray(_zarr(checkpoint.path, stored).read().result())


def check_place(checkpoint: Checkpoint, out: Path, *, force: bool) -> None:
    """Require a path for a checkpoint of the same kind, and not inside the old one, nor around it."""
    if checkpoint.kind != "orbax" and out.suffix != checkpoint.path.suffix:
        raise ValueError(f"--out {out} must end in {checkpoint.path.suffix}, as {checkpoint.path} does.")
    old, new = checkpoint.path.resolve(), out.resolve()
    if old in new.parents or new in old.parents:
        raise ValueError(f"--out {out} must lie beside {checkpoint.path}, not inside or around it.")
    check_out(out, force=force, replaceable=_is_orbax if checkpoint.kind == "orbax" else Path.is_file)


def write_head(
    checkpoint: Checkpoint, head: StoredHead, tree: Mapping[str, Any], out: Path, *, force: bool
) -> bool:
    """A copy of the checkpoint with the head of this tree; whether that differs from the head it had."""
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
        except Exception as error:  # tensorstore and safetensors raise their own where a disk is full
            raise OSError(f"{out}: {error}") from error
    return bool(changes)


def _is_orbax(path: Path) -> bool:
    try:
        return path.is_dir() and bool(_open_orbax(path).arrays)
    except ValueError:
        return False


def _only_kernel(leaves: list[Leaf], layout: Layout, num_classes: int | None) -> Leaf:
    kernels = [
        leaf
        for leaf in searched(leaves)
        if (len(leaf.value.shape) == 2 or "..." in layout)
        and num_classes in (None, matrix_shape(leaf.value.shape, layout)[1])
    ]
    if len(kernels) == 1:
        return kernels[0]
    listed = "\n".join(f"  {leaf.name}: {describe(leaf.value)}" for leaf in kernels or leaves) or "  (none)"
    if kernels:
        raise ValueError(f"{len(kernels)} kernels could be the head; name one with --head PATH:\n{listed}")
    raise ValueError(f"none of these could be the kernel of a head (see --layout, --num-classes):\n{listed}")


def _without_box(names: Names) -> Names:
    """The names without that of the value in the box of an nnx.Variable or nn.Partitioned."""
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
    """Whatever a library says of a file it cannot read, in a sentence that names the file."""
    try:
        yield
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} needs the package safetensors to be read and written: pip install 'lip_jax[cli]'."
        ) from None
    except Exception as error:  # orbax, tensorstore, safetensors and zipfile each raise their own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read {how}: {first}") from error


def _npz_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """One after the other, so that memory holds one."""
    with opened_npz(path) as held:
        for key in held.files:
            try:
                array = held[key]
            except ValueError:
                # An array of pickled objects is copied along, and no head.
                continue
            yield key, array


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


def _safetensors_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """One after the other, so that memory holds one."""
    with _opened_safetensors(path) as held:
        for key in held.keys():  # noqa: SIM118, as it is no mapping
            yield key, held.get_tensor(key)


def _write_safetensors(checkpoint: Checkpoint, changes: Changes, path: Path) -> None:
    from safetensors.numpy import save_file

    with _opened_safetensors(checkpoint.path) as held:
        about = held.metadata()
    changed = {stored.key: np.ascontiguousarray(array) for stored, array in changes}
    save_file(dict(_safetensors_arrays(checkpoint.path)) | changed, path, metadata=about)


def _open_orbax(path: Path) -> Checkpoint:
    """A tree, several named ones beside each other, or the newest step of a `CheckpointManager`."""
    import orbax.checkpoint as ocp

    folder, left_out = path, ()
    items = _items(path)
    if not items:
        steps = {child: int(found[1]) for child, found in _numbered(path) if _items(child)}
        if not steps:
            raise ValueError(
                f"{path} holds no tree saved by orbax (no file _METADATA in it, nor in a folder in it). Name "
                f"the folder that orbax saved to, or one step of it."
            )
        folder = max(steps, key=lambda child: steps[child])
        left_out = tuple(child.name for child in steps if child != folder)
        items = _items(folder)
    arrays = {}
    for item in items:
        with _readable(item, "by orbax"):
            # Older versions of orbax tell everything of a tree but which zarr it is in.
            zarr3 = json.loads((item / "_METADATA").read_text()).get("use_zarr3", False)
            found = ocp.PyTreeCheckpointHandler().metadata(item.resolve())  # pyright: ignore[reportArgumentType]
        prefix = () if len(items) == 1 else (item.name,)
        for leaf in open_tree(found.tree).leaves:
            if is_floating(leaf.value) and leaf.value.shape:
                arrays[(*prefix, *leaf.path)] = Stored(
                    leaf.value.name,
                    tuple(leaf.value.shape),
                    np.dtype(leaf.value.dtype),
                    item.relative_to(path),
                    "zarr3" if zarr3 else "zarr",
                )
    return Checkpoint(path, "orbax", arrays, left_out)


def _items(folder: Path) -> list[Path]:
    """The folders that hold one tree each: this one, or those in it."""
    if (folder / "_METADATA").is_file():
        return [folder]
    return sorted(child for child in folder.iterdir() if (child / "_METADATA").is_file())


def _numbered(folder: Path) -> Iterable[tuple[Path, re.Match[str]]]:
    for child in sorted(folder.iterdir()):
        found = re.fullmatch(r"(?:\w+[_.-])?(\d+)", child.name)
        if child.is_dir() and found:
            yield child, found


def _write_orbax(checkpoint: Checkpoint, changes: Changes, path: Path) -> None:
    top = str(checkpoint.path)
    shutil.copytree(
        checkpoint.path, path, ignore=lambda folder, _: checkpoint.left_out if folder == top else ()
    )
    for stored, array in changes:
        _zarr(path, stored).write(array).result()


def _zarr(path: Path, stored: Stored) -> Any:
    """One array of an orbax checkpoint, opened where orbax put it."""
    import tensorstore

    item = (path / stored.folder).resolve()
    files = {"driver": "file", "path": f"{item}/"}
    if (item / "manifest.ocdbt").exists():
        place = {"driver": "ocdbt", "base": files, "path": f"{stored.key}/"}
    else:
        place = files | {"path": f"{item / stored.key}/"}
    # Without the last option zeros would not be stored, and orbax would miss them.
    spec = {"driver": stored.driver, "kvstore": place, "store_data_equal_to_fill_value": True}
    return tensorstore.open(spec, open=True).result()
