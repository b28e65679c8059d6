"""The command line: parse, call, print.

Exit codes: 0 done; 2 misuse, with one line that says what is allowed; 130 interrupted by Ctrl-C; 1 anything else. A
user's mistake, code of the user's that fails, a full disk or a damaged file never ends in a traceback; ``--traceback``,
or NORMKIT_TRACEBACK=1, shows it after the line.
"""

import contextlib
import errno
import io
import os
import sys
import traceback
from pathlib import Path

from ..errors import ArgumentError, NormkitError
from ..extras import LAB_MODULES
from ..printable import printable

__all__ = ["main"]

VARIABLE = "NORMKIT_TRACEBACK"
OPTION = "--traceback"
COMPLETION = "_NORMKIT_COMPLETE"
INTERRUPTED = 130  # as a shell says of a command that Ctrl-C ended


def main() -> None:
    """Run the command line and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no Chinese shows numbers
            stream.reconfigure(errors="backslashreplace")
    code = _run()
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would flush again while it ends, and say so at length.
        with contextlib.suppress(OSError, io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1 if isinstance(error, BrokenPipeError) else _complain(f"standard output: {error.strerror}", 1)
    sys.exit(code)


def _run() -> int:
    """Call the command and turn what may go wrong into one line and a code."""
    try:
        code = _call()
    except BaseException as error:
        code = _explained(error)
        if _wants_traceback() and not isinstance(error, BrokenPipeError):
            traceback.print_exception(error)
    return code


def _call() -> int:
    from .app import call

    return call([word for word in sys.argv[1:] if word != OPTION])


def _wants_traceback() -> bool:
    return OPTION in sys.argv or bool(os.environ.get(VARIABLE))


def _explained(failure: BaseException) -> int:
    """Say in one line what went wrong, and return the exit code."""
    try:
        raise failure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LAB_MODULES:
            return _tell(error)
        return _complain(f'this command needs {error.name}: pip install "normkit[lab]"', 1)
    except ArgumentError as error:
        return _complain(str(error), 2)
    except NormkitError as error:
        return _complain(str(error), 1)
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does; there is nobody to tell.
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", 1)
    except SystemExit as error:
        # A shell that asks for completions is answered and left; a function of the user's has no business to leave.
        if COMPLETION in os.environ:
            return 0
        # typer leaves so, too, where whoever read our output has left.
        cause = error.__context__
        return 1 if isinstance(cause, OSError) and cause.errno == errno.EPIPE else _tell(error)
    except KeyboardInterrupt:
        return _complain("interrupted; no file was left half written", INTERRUPTED)
    except Exception as error:
        return _tell(error)


def _tell(error: BaseException) -> int:
    """Say in one line what failed that was not foreseen, most often a function of the user's, and where."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_the_users(frame.filename)]
    place = f", in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return _complain(f"{type(error).__name__}: {error}{place} ({OPTION} shows more)", 2 if frames else 1)


def _is_the_users(file: str) -> bool:
    """Say whether a file is neither of this package nor of an installed one, nor of Python itself."""
    ours = Path(__file__).parents[1]
    return not (Path(file).is_relative_to(ours) or "site-packages" in file or file.startswith((sys.base_prefix, "<")))


def _complain(message: str, code: int) -> int:
    """Print one line to standard error and return the exit code."""
    sys.stderr.write(f"normkit: {printable(' '.join(message.split()), keep='')}\n")
    return code
