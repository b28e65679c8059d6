"""What an operation did to a model, and what it left alone and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from torch import nn

from ..anatomy import norm_layers
from ..anatomy.select import Where
from ..errors import ArgumentError, SurgeryError
from ..printable import printable

__all__ = ["Exactness", "Model", "Record", "refuse_if_nothing_is_left"]

Exactness = Literal["exact", "approximate", "retrain"]


# The class of the model that was given: the record's model has it too.
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, repr=False)
class Record(Generic[Model]):
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
        example: the batch that the operation was given, which :meth:`export` runs the model on.
        called: whether it went into the model through ``call=``, which a program does not hold.
    """

    operation: str
    model: Model
    touched: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    largest_change: float | None = None
    measure: str = ""
    exactness: Exactness = "exact"
    notes: tuple[str, ...] = ()
    example: Any = None
    called: bool = False

    def __repr__(self) -> str:
        """Say in one line what happened."""
        return f"<{type(self).__name__}: {printable(self._headline(), keep='')}>"

    def _headline(self) -> str:
        change = "" if self.largest_change is None else f", largest change {self.largest_change:.3g} ({self.measure})"
        return f"{self.operation}: {self._counted()} touched, {self.exactness}{change}"

    def __str__(self) -> str:
        """Say in a few lines what happened."""
        lines = [self._headline()]
        lines += [f"  touched {path or '(the model itself)'}" for path in self.touched[:10]]
        if len(self.touched) > 10:
            lines.append(f"  and {len(self.touched) - 10} more")
        lines += [f"  left {path or '(the model itself)'}: {reason}" for path, reason in self.refused.items()]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(printable(line, keep="") for line in lines)

    def _counted(self) -> str:
        """Say how many layers; where some were left, that it is a part."""
        done, left = len(self.touched), len(self.refused)
        return f"in part: {done} of {_count(done + left, 'layer')}" if left else _count(done, "layer")

    def export(self, path: str | Path, example: Any = None, *, force: bool = False) -> Path:
        """Write the model as a program that runs without its Python code, as ``normkit fold --out`` does.

        Args:
            path: ``.onnx``, or ``.pt2`` for ``torch.export``'s form.
            example: one batch, of any form that goes into the model; the record's own if left out.
            force: replace the file if it is there.

        Returns:
            The path.

        Raises:
            ArgumentError: the ending is another, the file is there already, there is no model or no example that goes
                into it without ``call=``, or onnx and onnxscript are not installed.
            OSError: the disk is full, or may not be written.
            SurgeryError: the model cannot be exported.

        >>> import tempfile, torch, normkit
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
        >>> record = normkit.fold(model, torch.randn(2, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = record.export(f"{folder}/model.pt2")
        ...     torch.export.load(written).module()(torch.randn(5, 3)).shape
        torch.Size([5, 4])
        """
        from .program import write_program

        if not isinstance(self.model, nn.Module):
            raise ArgumentError(f"the record of {self.operation} holds no model to export")
        given = self.example if example is None else example
        if given is None:
            raise ArgumentError("an export runs the model once; give example=")
        if example is None and self.called:
            raise ArgumentError(
                f"the example of {self.operation} went into the model through call=, which a program does not hold; "
                "give example= that goes into forward: a tensor, a tuple of its arguments, or a dict with their names"
            )
        return write_program(self.model, given, path, force=force)


def refuse_if_nothing_is_left(
    operation: str, chosen: int, refused: Mapping[str, str], model: nn.Module, where: Where = None
) -> None:
    """Raise where an operation has no layer to work on, with the reasons.

    Args:
        operation: its name.
        chosen: how many layers it has.
        refused: of every layer that ``where`` takes, why it is none of them.
        model: whose layers they are.
        where: which of them were asked for.

    Raises:
        ArgumentError: ``where`` takes no layer of a model that has some.
        SurgeryError: ``chosen`` is 0 for another reason.
    """
    if chosen:
        return
    reasons = [f"{path or '(the model itself)'}: {reason}" for path, reason in refused.items()]
    if not reasons:
        layers = norm_layers(model)
        if layers and where is not None:
            named = ", ".join(map(str, layers[:5])) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
            raise ArgumentError(f"{operation}: where= takes none of the model's normalization layers; they are {named}")
        assert not layers, "each of them was to be refused with its reason"
        reasons = ["The model has no normalization layer"]
    more = [f"and {len(reasons) - 5} more layers"] if len(reasons) > 5 else []
    raise SurgeryError(f"{operation}: no layer to work on. {'; '.join([*reasons[:5], *more])}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
