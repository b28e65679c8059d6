"""Results on disk: one JSON object per line, only ever appended to, whole cells at a time.

A finished cell's rows go to the file in one write that is forced to the disk before the next cell counts as done.
What a kill or a full disk leaves half-written is the end of the file; reading drops it and says so. When all cells
are done the file is put in the plan's order, atomically, so that the same run gives the same bytes whatever the number
of processes and however often it was killed.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ResultsError
from .claim import Row
from .files import atomic_write

# The name of a row's digest; rows of versions before it have none.
DIGEST = "digest"

__all__ = ["Loaded", "append_rows", "atomic_write", "locked", "read_cells", "rewrite"]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a results file holds.

    Attributes:
        cells: the rows of every finished cell, by the cell's key.
        dropped: what was left out because it is unfinished, in words; empty when nothing was.
    """

    cells: Mapping[str, list[dict[str, Any]]]
    dropped: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order of the file."""
        return [row for cell in self.cells.values() for row in cell]


def read_cells(path: Path) -> Loaded:
    """Read the finished cells; a missing file holds none.

    Raises:
        ResultsError: a line that is not the last is no row of results: the file was damaged by something else.
    """
    content = path.read_bytes() if path.exists() else b""
    *lines, torn = content.split(b"\n")
    cells: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(lines, start=1):
        row = _parse(line, path, number)
        cells.setdefault(row["cell"], []).append(row)
    whole = {
        key: rows for key, rows in cells.items() if [r["row"] for r in rows] == list(range(1, rows[0]["rows"] + 1))
    }
    notes = []
    if torn:
        notes.append("a last line that was cut off")
    if len(whole) < len(cells):
        notes.append(f"{len(cells) - len(whole)} unfinished cell: " + ", ".join(sorted(cells.keys() - whole.keys())))
    return Loaded(cells=whole, dropped=" and ".join(notes))


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append one cell's rows and force them to the disk.

    Raises:
        OSError: the disk is full or may not be written; the file is as it was.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        size = os.lseek(file, 0, os.SEEK_END)
        try:
            _write_all(file, b"".join(_line(row) for row in rows))
            os.fsync(file)
        except OSError as error:
            os.ftruncate(file, size)
            told = f"{error.strerror}; finished cells are kept: make room and run the same command again"
            raise OSError(error.errno, told, str(path)) from error
        except BaseException:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def rewrite(path: Path, rows: Iterable[Row]) -> None:
    """Put these rows in the place of the file's content, atomically; an unchanged file is left alone."""
    content = b"".join(_line(row) for row in rows)
    if not path.exists() or path.read_bytes() != content:
        atomic_write(path, content)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one run; the lock ends with the process, however that ends.

    Raises:
        ResultsError: another run holds it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ResultsError(f"{folder}: another run is writing here; wait for it or choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def _line(row: Row) -> bytes:
    """Return the row as one line of JSON, with null for what is not finite, and with its digest at the end."""
    content = _finite(row)
    return json.dumps({**content, DIGEST: _digest(content)}, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _digest(content: Mapping[str, Any]) -> str:
    """Return sixteen digits that change with every number and every word of a row."""
    words = json.dumps(content, ensure_ascii=False, allow_nan=False, sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by ``None``: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ResultsError(f"{path}, line {number}: not a row of results ({error}); the file is damaged") from error
    needed = ("cell", "row", "rows")
    if not isinstance(row, dict) or any(name not in row for name in needed):
        raise ResultsError(f"{path}, line {number}: not a row of results; expected an object with {', '.join(needed)}")
    digest = row.pop(DIGEST, None)
    if digest is not None and digest != _digest(row):
        raise ResultsError(
            f"{path}, line {number}: altered after it was written: its digest does not fit what it holds; remove the "
            f"lines of {row['cell']} and run the same command again"
        )
    return row


def _write_all(file: int, content: bytes) -> None:
    """Write every byte: a nearly full disk takes a part and reports no error."""
    while content:
        content = content[os.write(file, content) :]
