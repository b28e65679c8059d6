"""What an operation did to a model, and what it left alone and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import SurgeryError
from ..printable import printable

__all__ = ["Exactness", "Record", "refuse_if_nothing_is_left"]

Exactness = Literal["exact", "approximate", "retrain"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """The outcome of one operation on a model.

    Attributes:
        operation: the operation's name.
        model: the module to go on with: the given one, or a new one where the structure has changed; None where a state
            was given and not a model.
        touched: the paths of the layers that were changed.
        refused: the paths of the layers that were left alone, each with the reason.
        largest_change: the largest change measured, or None where nothing was measured.
        measure: what ``largest_change`` counts.
        exactness: ``"exact"`` (the function, or the population, is kept up to rounding), ``"approximate"`` (it changes
            by about ``largest_change``) or ``"retrain"`` (the function is another one and must be trained again).
        notes: what a reader of the record should know besides.
    """

    operation: str
    model: Any = field(repr=False)
    touched: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    largest_change: float | None = None
    measure: str = ""
    exactness: Exactness = "exact"
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say in a few lines what happened."""
        lines = [f"{self.operation}: {_count(len(self.touched), 'layer')} touched, {self.exactness}"]
        if self.largest_change is not None:
            lines[0] += f", largest change {self.largest_change:.3g} ({self.measure})"
        lines += [f"  touched {path or '(the model itself)'}" for path in self.touched[:10]]
        if len(self.touched) > 10:
            lines.append(f"  and {len(self.touched) - 10} more")
        lines += [f"  left {path or '(the model itself)'}: {reason}" for path, reason in self.refused.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(printable(line, keep="") for line in lines)


def refuse_if_nothing_is_left(operation: str, chosen: int, refused: Mapping[str, str]) -> None:
    """Raise where an operation has no layer to work on, with the reasons.

    Raises:
        SurgeryError: ``chosen`` is 0.
    """
    if chosen:
        return
    reasons = "; ".join(f"{path or '(the model itself)'}: {reason}" for path, reason in list(refused.items())[:5])
    raise SurgeryError(f"{operation}: no layer to work on. {reasons or 'The model has no normalization layer'}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
