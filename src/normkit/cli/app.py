"""The commands under ``normkit``."""

from typing import Annotated

import typer
from typer.exceptions import TyperException

from .. import __version__
from ..errors import ArgumentError
from .bench import bench
from .doctor import doctor
from .lab import lab
from .native import native
from .surgery import add_commands
from .terminal import echo

__all__ = ["app", "call"]

_INTERRUPTED = 130  # what typer makes of Ctrl-C, without a word

app = typer.Typer(
    name="normkit",
    help="Batch normalization and its family: a doctor and surgery for models, experiments with verdicts, benchmarks.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lab, name="lab")
app.add_typer(native, name="native")
app.command("doctor")(doctor)
app.command("bench")(bench)
add_commands(app)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Batch normalization and its family: a doctor and surgery for models, experiments with verdicts, benchmarks."""
    if version:
        echo(f"normkit {__version__}")
    elif context.invoked_subcommand is None:
        echo(context.get_help())


def call() -> int:
    """Parse the arguments, run the command and return its exit code.

    Raises:
        ArgumentError: the arguments cannot be parsed.
    """
    try:
        code = app(prog_name="normkit", standalone_mode=False)
    except TyperException as error:
        raise ArgumentError(f"{error.format_message()} Try `normkit --help`.") from error
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    return int(code or 0)
