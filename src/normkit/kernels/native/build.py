"""Where the native part is built and kept: one file per torch, Python, processor and source.

It is built when it is asked for, `normkit native build`, never at import and never inside a forward. The compiler
writes beside the file's place and the result is moved there in one step, so that two builders, or one that is killed,
leave nothing half-written.
"""

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from ...errors import BackendError

__all__ = [
    "FOLDER_VARIABLE",
    "MODULE",
    "VARIABLE",
    "build",
    "candidates",
    "fault",
    "load",
    "missing",
    "not_loaded",
    "path",
]

VARIABLE = "NORMKIT_NATIVE"  # 0 turns the native part off
FOLDER_VARIABLE = "NORMKIT_NATIVE_FOLDER"  # where it is kept instead of the user's cache
MODULE = "normkit_native"

_HERE = Path(__file__).parent
_LIMIT = 600  # seconds that a compiler may take
_OFF = ("0", "false", "off", "no")
# Stands behind what the linker wrote, where no loader looks, before the digest of it: a file that was cut short would
# end the process that maps it.
_MARK = b"normkit native sha256 "


@functools.cache
def _sources() -> tuple[Path, ...]:
    return tuple(sorted([*_HERE.glob("*.cpp"), *_HERE.glob("*.h")]))


@functools.cache
def filename() -> str:
    """Name the file by all that it hangs on: torch, Python, processor and source."""
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    python = sysconfig.get_config_var("SOABI") or f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"{MODULE}-torch{torch.__version__}-{python}-{platform.machine()}-{digest.hexdigest()[:12]}.so"


def folder() -> Path:
    """Return where a built file is kept: the user's cache, or where the variable says."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "normkit" / "native"


def candidates() -> tuple[Path, ...]:
    """Return where a built file may lie: beside the sources, as a wheel brings it, or in the user's cache."""
    found = [_HERE / filename()]
    with contextlib.suppress(RuntimeError):  # no home
        found.append(folder() / filename())
    return tuple(found)


def path() -> Path | None:
    """Return the built file for this torch, Python, processor and source, or None where there is none to be loaded."""
    return next((candidate for candidate in candidates() if candidate.exists() and fault(candidate) is None), None)


def fault(file: Path) -> str | None:
    """Return why a file that is there is not loaded: others could have written it, or it is damaged."""
    try:
        # Loading what another user could have put there would run their code. The sticky bit keeps others' hands off.
        status, around = file.stat(), file.parent.stat().st_mode
        if status.st_uid not in (0, os.getuid()):
            return f"{file} belongs to another user"
        if status.st_mode & 0o022:
            return f"other users may write to {file}; type: chmod go-w {file}"
        if around & 0o002 and not around & stat.S_ISVTX:
            return f"other users may write to {file.parent}; type: chmod o-w {file.parent}"
        content = file.read_bytes()
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    library, mark, digest = content.rpartition(_MARK)
    if not mark or digest != hashlib.sha256(library).hexdigest().encode():
        return f"{file} is damaged; type: normkit native build"
    return None


def compiler() -> str | None:
    """Return the C++ compiler, $CXX or g++, or None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def missing() -> str | None:
    """Return why the native part cannot be built here, or None where it can."""
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, this is {sys.platform}"
    if compiler() is None:
        return "no C++ compiler was found: install g++, or say which with CXX"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers were not found: install python3-dev, or your Python's equivalent"
    return None


def build(into: Path | None = None) -> Path:
    """Compile the native part, half a minute of one core, and return its file; nothing is done where a sound one is.

    Args:
        into: a folder to keep it in; by default the user's cache.

    Raises:
        BackendError: no compiler, no headers, what the compiler said, or a folder that others may write to.
    """
    target = (folder() if into is None else into) / filename()
    if target.exists() and fault(target) is None:
        return target
    reason = missing()
    if reason is not None:
        raise BackendError(f"the native part cannot be built: {reason}. normkit works without it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as place:
        made = Path(place) / target.name
        done = subprocess.run(  # noqa: S603  the command is ours
            _command(made), capture_output=True, text=True, timeout=_LIMIT, check=False
        )
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            first = next((line for line in said if "error" in line), said[0] if said else "no word")
            raise BackendError(f"the native part could not be compiled: {first}. normkit works without it")
        library = made.read_bytes()
        made.write_bytes(library + _MARK + hashlib.sha256(library).hexdigest().encode())
        made.chmod(0o755)
        made.replace(target)
    left = fault(target)
    if left is not None:
        raise BackendError(f"the native part was built and is not loaded: {left}")
    return target


def _command(target: Path) -> list[str]:
    from torch.utils import cpp_extension

    includes = [f"-isystem{place}" for place in cpp_extension.include_paths()]
    libraries = [f"-L{place}" for place in cpp_extension.library_paths()]
    return [
        compiler() or "g++", "-O2", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *includes, f"-isystem{sysconfig.get_paths()['include']}", str(_HERE / "module.cpp"),
        *libraries, "-lc10", "-ltorch_cpu", "-ltorch_python", "-o", str(target),
    ]  # fmt: skip


def not_loaded() -> str:
    """Say why nothing is loaded, and what to type."""
    if _is_off():
        return f"the native part is turned off by {VARIABLE}={os.environ[VARIABLE]}"
    for candidate in candidates():
        reason = fault(candidate) if candidate.exists() else None
        if reason is not None:
            return f"the native part is not loaded: {reason}"
    return "the native part is not built for this torch and Python; type: normkit native build"


def _is_off() -> bool:
    return os.environ.get(VARIABLE, "").strip().lower() in _OFF


def load() -> ModuleType | None:
    """Load the native part, or return None where it is turned off or not built."""
    if _is_off():
        return None
    found = path()
    if found is None:
        return None
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(found))
    specification = importlib.util.spec_from_loader(MODULE, loader)
    assert specification is not None
    module = importlib.util.module_from_spec(specification)
    loader.exec_module(module)
    return module
