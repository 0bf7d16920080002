"""The commands of `lip-jax`: one module for each command, and what they share."""

from typing import Annotated

import typer

import lip_jax
from lip_jax.commands import demo, diagnose, purify, readout, refine

app = typer.Typer(
    name="lip-jax",
    help="Repair the head of a classifier trained on inaccurate labels, in closed form.",
    epilog="Exit codes: 0 done; 1 an unexpected error, please report it; 2 arguments or files that cannot be "
    "used; 3 a result that cannot be written.\n\n"
    "Compiled programs are kept in your cache folder, so that a second command starts sooner. "
    "JAX_COMPILATION_CACHE_DIR=FOLDER keeps them elsewhere, JAX_ENABLE_COMPILATION_CACHE=false nowhere.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command()(demo.demo)
app.command(epilog=diagnose.EXAMPLES)(diagnose.diagnose)
app.command(epilog=refine.EXAMPLES)(refine.refine)
app.command(epilog=purify.EXAMPLES)(purify.purify)
app.command(epilog=readout.EXAMPLES)(readout.readout)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"lip_jax {lip_jax.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that belong to no command."""
