"""The `lip-jax` command; the commands themselves are in `lip_jax.commands`."""

import os
import sys


def keep_programs() -> None:
    """Compiled programs are kept between processes, unless the environment says where or that they are not.

    Compiling takes most of the time of a command, and the next one compiles the same.
    """
    import jax
    from platformdirs import user_cache_dir

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", user_cache_dir("lip-jax", appauthor=False))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def main() -> None:
    """Run the command line, or say what to install where the packages of an extra are missing."""
    # On matrices as small as heads LAPACK's threads gain nothing, and on busy cores they wait for each other:
    # an SVD then takes up to a hundred times as long. SciPy reads the variable when it is first loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        keep_programs()
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
