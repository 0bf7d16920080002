"""Results that appear whole or not at all, and replace nothing unasked; archives of arrays."""

import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile


def check_out(out: Path, *, force: bool, replaceable: Callable[[Path], bool] = Path.is_file) -> None:
    """Require a path where a result may be written, before the work it comes from.

    With `force`, only what is `replaceable` is replaced: a wrong path must not cost a folder of other things.
    """
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out} cannot be written: {out.parent} is no folder. Make it first.")
    if not out.exists():
        return
    if not force:
        raise ValueError(f"--out {out} exists. Name another, or pass --force to replace it.")
    if not replaceable(out):
        raise ValueError(
            f"--out {out} is not of the kind that would be written there, so not even --force replaces it."
        )


@contextmanager
def written_whole(out: Path, *, force: bool) -> Iterator[Path]:
    """A path beside `out` to write a file or folder to, which at the end is renamed to `out`.

    Where the work fails, nothing stays behind and `out` is as it was.
    """
    out = out.resolve()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as near:
        fresh, replaced = Path(near) / out.name, Path(near) / "replaced"
        yield fresh
        if out.exists() and not force:
            raise FileExistsError(f"{out} has come to be while its place was being filled")
        if not out.is_dir():
            fresh.replace(out)
            return
        # A folder cannot be renamed onto another.
        out.rename(replaced)
        try:
            fresh.rename(out)
        except OSError:
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
