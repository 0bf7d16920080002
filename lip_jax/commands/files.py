"""Results that appear whole or not at all, and replace nothing unasked; archives of arrays."""

import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile


def no_file(path: Path) -> str:
    """That a file must not take the place of what is there, in words; empty if that is a file too."""
    return "" if path.is_file() else "is no file"


def check_out(
    out: Path,
    *,
    force: bool,
    spared: Callable[[Path], str] = no_file,
    inputs: Sequence[Path | None] = (),
) -> None:
    """Require a path where a result may be written, before the work it comes from.

    Not even with `force` does it take the place of one of the `inputs`, nor of what is `spared`, which says
    why: a wrong path must not cost a folder of other things.
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
    except OSError:  # said when it is read
        return False


@contextmanager
def written_whole(out: Path, *, force: bool) -> Iterator[Path]:
    """A path beside `out` to write a file or folder to, which at the end is renamed to `out`.

    Where the work fails, nothing stays behind and `out` is as it was.
    """
    out = out.resolve()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as near:
        fresh, replaced = Path(near) / out.name, Path(near) / f"{out.name}.replaced"
        yield fresh
        if out.exists() and not force:
            raise FileExistsError(f"{out} has come to be while its place was being filled")
        if not out.is_dir():
            fresh.replace(out)
            return
        # A folder cannot be renamed onto another.
        try:
            out.rename(replaced)
            fresh.rename(out)
        except BaseException:  # an interruption too must not cost what was there
            if replaced.exists() and not out.exists():
                replaced.rename(out)
            raise


@contextmanager
def opened_npz(path: Path) -> Iterator[NpzFile]:
    """The arrays of an `.npz`, none of them pickled objects."""
    # Opened here, as NumPy would leave the file of a broken archive open.
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no .npz archive, or not the whole of one")
        file.seek(0)
        with np.load(file, allow_pickle=False) as held:
            yield held
