"""What an extra brings, for the rooms that cannot do without: they say which is missing, in one line."""

from importlib.util import find_spec

__all__ = ["LAB_MODULES", "require_lab"]

# What the laboratory, the reports and the command line need beyond the library itself, by the names they import.
LAB_MODULES = (
    "filelock", "jinja2", "joblib", "markupsafe", "matplotlib", "pooch", "psutil", "rich", "safetensors", "scipy",
    "sklearn", "typer",
)  # fmt: skip


def require_lab(room: str) -> None:
    """Refuse to go on without the extra ``lab``.

    Raises:
        ModuleNotFoundError: a module of it is not installed.

    >>> require_lab("normkit.lab")
    """
    missing = [name for name in LAB_MODULES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'{room} needs {", ".join(missing)}: pip install "normkit[lab]"', name=missing[0])
