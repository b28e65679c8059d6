"""The command line: parse, call, print.

Exit codes: 0 done; 2 misuse, with one line that says what is allowed; 1 anything else. A user's mistake, a full disk
or a damaged file never ends in a traceback.
"""

import sys

from ..errors import ArgumentError, NormkitError

__all__ = ["main"]

# What the command line and the laboratory need beyond the library itself.
EXTRA_MODULES = frozenset(
    {"filelock", "jinja2", "joblib", "markupsafe", "matplotlib", "pooch", "psutil", "rich", "safetensors", "scipy",
     "sklearn", "typer"}
)  # fmt: skip


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(_run())


def _run() -> int:
    """Call the command and turn what may go wrong into one line and a code."""
    try:
        from .app import call

        return call()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA_MODULES:
            raise
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


def _complain(message: str, code: int) -> int:
    """Print one line to standard error and return the exit code."""
    sys.stderr.write(f"normkit: {' '.join(message.split())}\n")
    return code
