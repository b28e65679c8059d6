"""Inputs on which a model's code may take another branch than on its example: other values, and long samples."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..anatomy import Call
from ..anatomy.batches import is_finite, tensors
from .outputs import as_double, beyond_rounding, jittered, mapped, measured, outputs_of, plain
from .transaction import copied

__all__ = ["OtherValues"]

# A long sample has more than this along one axis, and no more elements than a small batch of images.
_LONG = 256
_MOST_ELEMENTS = 2**18


@dataclass(frozen=True)
class _Given:
    """An input that the model takes, how to name it, and what the model gives for it."""

    words: str
    example: Any
    output: Any


class OtherValues:
    """Compares changed copies of a model with it on other values and on long samples.

    What the model itself refuses, or answers by what is not finite, is no evidence and is left. All runs on the CPU:
    an index that is out of range is an error there, and the end of the process's context on an accelerator.

    Args:
        model: what is right, in float64 where it runs in that.
        examples: what it takes, each with how to name it; the smallest is varied. Without any nothing is compared.
        call: how they go into the model.
        change: how far two outputs are from each other.
        floor: the change that is allowed, whatever the rounding.
        exactly: whether the model is in float64.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: list[tuple[Any, str]],
        call: Call | None,
        change: Callable[[Any, Any], float],
        floor: float,
        *,
        exactly: bool,
    ) -> None:
        self._call, self._change, self._floor, self._exactly = call, change, floor, exactly
        self._model, self._taken = model, []
        if examples:
            self._model = _on_cpu(model)
            example, name = min(examples, key=lambda given: sum(tensor.numel() for tensor in tensors(given[0])))
            self._taken = list(self._tried(example, name))

    @property
    def note(self) -> str:
        """Say on what was compared."""
        if not self._taken:
            return (
                "code that may branch on values was compared on those of the example alone: the model takes no others"
            )
        return f"compared too, since code may branch on values, on {'; '.join(given.words for given in self._taken)}"

    def against(self, changed: nn.Module) -> str | None:
        """Say on which input a changed copy, in the type of ``model``, gives something else, or return None."""
        if not self._taken:
            return None
        changed = _on_cpu(changed)
        for given in self._taken:

            def rounding(given: _Given = given) -> float | None:
                return self._from(given, self._moved)

            by = beyond_rounding(self._from(given, changed), self._floor, rounding)
            if by is not None:
                return f"it changes the output{by} on {given.words}"
        return None

    @functools.cached_property
    def _moved(self) -> nn.Module:
        """The model itself, its weights moved a little."""
        return jittered(copied(self._model), 1e-13 if self._exactly else None)

    def _tried(self, example: Any, name: str) -> Iterator[_Given]:
        for varied, words in _variants(mapped(example, Tensor.cpu), name):
            given = as_double(varied) if self._exactly else varied
            try:
                output = outputs_of(self._model, given, self._call)
                if is_finite(plain(output)) and self._change(output, output) == 0:
                    yield _Given(words, given, output)
            except Exception:  # noqa: S112  whatever the model's code raises at what it was not written for
                continue

    def _from(self, given: _Given, changed: nn.Module) -> float | None:
        return measured(self._change, given.output, outputs_of(changed, given.example, self._call))


def _variants(example: Any, name: str) -> Iterator[tuple[Any, str]]:
    floating = [tensor for tensor in tensors(example) if tensor.is_floating_point() and tensor.numel()]
    if not floating:
        return
    for factor in (-3, 0.01):
        yield mapped(example, lambda tensor, factor=factor: _changed(tensor, factor, 0)), f"{name} times {factor}"
    yield mapped(example, lambda tensor: _changed(tensor, 1, 10)), f"{name} plus 10 times its largest value"
    for axis in (-1, -2, -3):
        sizes = [tensor.shape[axis] for tensor in floating if tensor.ndim + axis >= 2]
        if not sizes or not 0 < max(sizes) <= _LONG:
            continue
        times = _LONG // max(sizes) + 1
        if max(tensor[0].numel() for tensor in floating if tensor.ndim) * times <= _MOST_ELEMENTS:
            long = mapped(example, lambda tensor, axis=axis, times=times: _long(tensor, axis, times))
            yield long, f"a sample of {name} repeated to size {max(sizes) * times} along dimension {axis}"


def _changed(tensor: Tensor, factor: float, shift: float) -> Tensor:
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    largest = tensor.nan_to_num(posinf=0.0, neginf=0.0).abs().max()
    return tensor * factor + shift * largest


def _long(tensor: Tensor, axis: int, times: int) -> Tensor:
    sample = tensor[:1] if tensor.ndim else tensor
    if tensor.ndim + axis < 2:
        return sample
    return sample.repeat(*(times if place == tensor.ndim + axis else 1 for place in range(tensor.ndim)))


def _on_cpu(model: nn.Module) -> nn.Module:
    """Return a model, or a copy of it on the CPU where it is elsewhere."""
    there = all(value.device.type == "cpu" for value in chain(model.parameters(), model.buffers()))
    return model if there else copied(model).cpu()
