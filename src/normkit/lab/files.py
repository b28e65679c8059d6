"""Files that are written whole or not at all."""

from pathlib import Path

from ..files import write_atomically

__all__ = ["atomic_write"]


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    write_atomically(path, lambda beside: beside.write_bytes(content), force=True)
