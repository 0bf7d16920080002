"""Files: results written whole or not at all, what they may replace, and archives of arrays."""

import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile


def no_file(path: Path) -> str:
    """Why a file must not replace the path, in words; empty if the path is a file too."""
    return "" if path.is_file() else "is no file"


def check_out(
    out: Path,
    *,
    force: bool,
    spared: Callable[[Path], str] = no_file,
    inputs: Sequence[Path | None] = (),
) -> None:
    """Require a path where a result may be written, before the result is computed.

    Even with `force` it must not replace one of the `inputs`, nor anything for which `spared` gives a reason.
    """
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out} cannot be written: {out.parent} is no folder. Make it first.")
    if not out.exists():
        return
    for path in inputs:
        if path is not None and _holds(out, path):
            raise ValueError(f"--out {out} would replace {path}, which this command reads. Name another.")
    if not force:
        raise ValueError(f"--out {out} exists. Name another, or pass --force to replace it.")
    why = spared(out)
    if why:
        raise ValueError(f"--out {out} {why}, so not even --force replaces it. Name another.")


def _holds(out: Path, path: Path) -> bool:
    """Whether what is at `out` is this file or folder, or has it inside."""
    try:
        return out.samefile(path) or out.resolve() in path.resolve().parents
    except OSError:  # an error when the file is read
        return False


@contextmanager
def written_whole(out: Path, *, force: bool) -> Iterator[Path]:
    """A path beside `out` to write a file or folder to; at the end it is renamed to `out`.

    If writing fails, `out` is as it was and nothing else is left.
    """
    out = out.resolve()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as near:
        fresh, replaced = Path(near) / out.name, Path(near) / f"{out.name}.replaced"
        yield fresh
        if out.exists() and not force:
            raise FileExistsError(f"{out} was created by another program in the meantime")
        if not out.is_dir():
            fresh.replace(out)
            return
        # A folder cannot be renamed onto another.
        try:
            out.rename(replaced)
            fresh.rename(out)
        except BaseException:  # put the old folder back, after an interruption too
            if replaced.exists() and not out.exists():
                replaced.rename(out)
            raise


@contextmanager
def opened_npz(path: Path) -> Iterator[NpzFile]:
    """The arrays of an `.npz`; pickled objects are refused."""
    # Opened here, since NumPy leaves the file of a broken archive open.
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no .npz archive, or not the whole of one")
        file.seek(0)
        with np.load(file, allow_pickle=False) as held:
            yield held
