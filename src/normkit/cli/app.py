"""The commands under ``normkit``."""

from typing import Annotated

import typer
from typer.exceptions import TyperException

from .. import __version__
from ..errors import ArgumentError
from .bench import bench
from .doctor import doctor
from .examples import explained
from .lab import lab
from .native import native
from .plan import plan
from .surgery import add_commands
from .terminal import INTERRUPTED, TOLD_INTERRUPT, echo

__all__ = ["app", "call"]

app = typer.Typer(
    name="normkit",
    help="Batch normalization and its family: a doctor and surgery for models, experiments with verdicts, benchmarks.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lab, name="lab")
app.add_typer(native, name="native")
app.command("doctor", cls=explained("doctor"))(doctor)
app.command("plan", cls=explained("plan"))(plan)
app.command("bench", cls=explained("bench"))(bench)
add_commands(app)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    trace: Annotated[
        bool,
        # Taken off the command line before it is parsed, wherever it stands: see normkit.cli.
        typer.Option("--traceback", help="After the line that says what failed, print where; with any command."),
    ] = False,
) -> None:
    """Batch normalization and its family: a doctor and surgery for models, experiments with verdicts, benchmarks."""
    if version:
        echo(f"normkit {__version__}")
    elif context.invoked_subcommand is None:
        echo(context.get_help())


def call(arguments: list[str] | None = None) -> int:
    """Parse the arguments, those of the process if none are given, run the command and return its exit code.

    Raises:
        ArgumentError: the arguments cannot be parsed.
    """
    try:
        code = app(arguments, prog_name="normkit", standalone_mode=False)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        command = "normkit" if context is None else context.command_path
        raise ArgumentError(f"{error.format_message().rstrip('.')}. Try `{command} --help`.") from error
    if code == INTERRUPTED:  # what typer makes of Ctrl-C, without a word
        raise KeyboardInterrupt
    return INTERRUPTED if code == TOLD_INTERRUPT else int(code or 0)
