"""The `lip-jax` command; the commands themselves are in `lip_jax._commands`."""

import os
import sys


def main() -> None:
    """Run the command line, or say what to install where the packages of an extra are missing."""
    # LAPACK's threads gain nothing on matrices as small as heads, and wait for each other where other work
    # keeps the cores busy: SVDs then take up to a hundred times as long. Read when SciPy is first loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from lip_jax.commands import app

        app()
    except ModuleNotFoundError as error:
        extra = "demo" if error.name == "sklearn" else "cli"
        print(
            f"lip-jax: the package {error.name!r} is missing. This needs the extra {extra!r}:\n"
            f"  pip install 'lip_jax[{extra}]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
