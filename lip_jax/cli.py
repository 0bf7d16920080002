"""The `lip-jax` command; the commands themselves are in `lip_jax.commands`."""

import os
import sys


def main() -> None:
    """Run the command line, or say what to install where the packages of an extra are missing."""
    # On matrices as small as heads LAPACK's threads gain nothing, and on busy cores they wait for each other:
    # an SVD then takes up to a hundred times as long. SciPy reads the variable when it is first loaded.
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
