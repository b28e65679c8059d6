"""Rows as TensorBoard reads them: one run per cell, one curve per number that is measured."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ArgumentError
from .claim import Row

__all__ = ["check_tensorboard", "write_cell"]

# Columns of every row that are no measurements.
NOT_MEASURED = frozenset({"seed", "row", "rows", "epoch"})


def check_tensorboard() -> None:
    """Refuse to go on without TensorBoard, before anything is run.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ArgumentError('--tensorboard needs tensorboard: pip install "normkit[tensorboard]"') from error


def write_cell(folder: Path, rows: Sequence[Row]) -> None:
    """Write one cell's numbers under its key, unless an earlier run has.

    A number per row becomes a point at its epoch, or at its row where there are no epochs. A list of numbers becomes a
    curve of its own, one point per step over all rows.
    """
    from torch.utils.tensorboard.writer import SummaryWriter

    place = folder / str(rows[0]["cell"])
    if place.exists() and any(place.iterdir()):
        return
    steps: dict[str, int] = {}
    with SummaryWriter(str(place)) as writer:
        for row in rows:
            for name, value in row.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and name not in NOT_MEASURED:
                    writer.add_scalar(name, value, row.get("epoch", row["row"]))
                elif isinstance(value, list) and all(isinstance(number, int | float) for number in value):
                    for number in value:
                        steps[name] = steps.get(name, 0) + 1
                        writer.add_scalar(f"{name}/step", number, steps[name])
