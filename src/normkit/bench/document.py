"""The file that a benchmark writes: strict JSON with the machine, the versions and every row."""

import ctypes
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from ..errors import ResultsError
from ..files import write_atomically
from ..lab.record import commit, versions

__all__ = ["SCHEMA", "new_document", "read_document", "reuse_memory", "write_document"]

SCHEMA = "normkit-bench/1"

_SECTIONS: dict[str, type] = {
    "date": str, "complete": bool, "settings": dict, "machine": dict, "versions": dict,
    "rows": list, "wrong": list, "skipped": list, "training": list, "imports": list,
}  # fmt: skip
_ROW = frozenset(
    {"set", "shape", "count", "dtype", "layout", "work", "chain", "activation", "elements", "bytes", "backend",
     "kernel", "peers"}
)  # fmt: skip
_PEERS = frozenset({"torch", "normkit"})

# glibc's names for two of its settings, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def new_document(settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """Return a document without rows yet.

    ``complete`` is for whoever fills it to set: an interrupted run keeps what was measured, and says so.
    """
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": False,
        "settings": settings,
        "machine": _machine() | {"threads": threads},
        "versions": versions() | {name: version(name) for name in ("numba", "llvmlite")},
        "commit": commit(),
        "rows": [],
        "wrong": [],
        "skipped": [],
        "training": [],
        "imports": [],
    }


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Write a document, whole or not at all."""
    content = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    write_atomically(path, lambda beside: beside.write_bytes(content), force=True)


def read_document(path: Path) -> dict[str, Any]:
    """Read a document that `write_document` wrote.

    Raises:
        ResultsError: it is missing, damaged, or another kind of file.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ResultsError(f"{path}: no such file") from error
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ResultsError(f"{path}: not written by `normkit bench --json` (schema {SCHEMA})")
    for name, kind in _SECTIONS.items():
        if not isinstance(document.get(name), kind):
            raise ResultsError(f"{path}: {name!r} is missing or not a {kind.__name__}")
    for number, row in enumerate(document["rows"]):
        if not isinstance(row, dict) or not row.keys() >= _ROW or not row["peers"].keys() >= _PEERS:
            raise ResultsError(f"{path}: row {number} is not complete")
    return document


def reuse_memory() -> bool:
    """Have this process keep the memory it frees; return False where its C library is not glibc.

    Left alone, glibc gives large blocks back to the system and every large output is paid for in page faults.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1))


def _machine() -> dict[str, Any]:
    """Return what the numbers hang on besides the software; the load tells whether the machine was quiet."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "last_level_cache": _last_level_cache(),
        "memory": psutil.virtual_memory().total,
        "load": round(psutil.getloadavg()[0], 2),
    }


def _processor() -> str:
    """Return the processor's name; Python itself knows it on macOS and Windows only."""
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _last_level_cache() -> int | None:
    """Return the bytes of the largest cache, or None where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in found if size[-1:] in units), default=None)
