"""``normkit native``: build the quick way to the kernels, and say which way calls go."""

from typing import Annotated

import typer

from .. import native as subject
from .examples import explained

__all__ = ["native"]

native = typer.Typer(
    help="The native part: a quicker way to the CPU kernels, built where a C++ compiler is found.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@native.command()
def build(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also compile the common kernels, so that no first call waits.")
    ] = False,
) -> None:
    """Build the native part, half a minute of one core; nothing is done where it is built already."""
    typer.echo("building the native part, about half a minute")
    typer.echo(f"built: {subject.build()}")
    if kernels:
        for done, of, name in subject.compile_kernels():
            typer.echo(f"compiled {done} of {of}: {name}")


@native.command(cls=explained("native status"))
def status() -> None:
    """Say which way calls to the CPU kernels go, why, and what to type for the other."""
    typer.echo(str(subject.status()))
