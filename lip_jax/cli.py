"""The `lip-jax` command; the commands themselves are in `lip_jax._commands`."""

import sys


def main() -> None:
    """Run the command line, or say what to install where the packages of the extra `demo` are missing."""
    try:
        from lip_jax._commands import app

        app()
    except ModuleNotFoundError as error:
        print(
            f"lip-jax: the package {error.name!r} is missing. The command line needs the extra 'demo':\n"
            "  pip install 'lip_jax[demo]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
