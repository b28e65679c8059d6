"""How far two outputs of a model are from each other, whatever objects they are."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..anatomy import Call, preserved, run
from ..anatomy.batches import tensors
from ..errors import SurgeryError
from .entries import own_copy

__all__ = [
    "Taps",
    "apart",
    "as_double",
    "beyond_rounding",
    "difference",
    "has_numbers",
    "jittered",
    "largest_difference",
    "mapped",
    "measured",
    "outputs_of",
    "plain",
]

# A change that is no more than so many times what a tiny move of the weights makes is rounding.
_ROUNDINGS = 10


class Taps:
    """Keeps a few numbers of everything that some layers give: 1,024 of each call, always from the same places."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.seen: dict[str, list[tuple[Tensor, float]]] = {path: [] for path in paths}
        self._layers = {path: model.get_submodule(path) for path in paths}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for path, layer in self._layers.items():
            self._hooks.callback(layer.register_forward_hook(self._keeper(self.seen[path])).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def _keeper(self, kept: list[tuple[Tensor, float]]) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel():
                flat = output.detach().flatten()
                places = torch.arange(0, len(flat), max(1, len(flat) // 1021), device=flat.device)
                kept.append((flat[places].clone(), float(flat.abs().max())))

        return keep


def apart(expected: list[tuple[Tensor, float]], actual: list[tuple[Tensor, float]]) -> float:
    """Return the largest difference of kept numbers, relative to the largest of their tensor."""
    if [len(numbers) for numbers, _ in expected] != [len(numbers) for numbers, _ in actual]:
        return float("inf")
    gaps = (
        float((one - other).abs().max()) / max(largest, torch.finfo(torch.float32).tiny)
        for (one, largest), (other, _) in zip(expected, actual, strict=True)
    )
    return max((gap for gap in gaps if gap == gap), default=0.0)


def measured(measure: Callable[[Any, Any], float], first: Any, second: Any) -> float | None:
    """Return a change, or None where the two have another form."""
    try:
        return measure(first, second)
    except SurgeryError:
        return None


def plain(output: Any) -> Any:
    """Look into objects that hold their outputs as attributes, however deep."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return {key: plain(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [plain(value) for value in output]
    if hasattr(output, "__dict__") and not isinstance(output, type | nn.Module) and not callable(output):
        return {key: plain(value) for key, value in vars(output).items()}
    return output


def has_numbers(output: Any) -> bool:
    """Say whether an output holds something to compare: a finite number, or nothing but whole ones."""
    found = list(tensors(plain(output)))
    floating = [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()]
    return not any(tensor.numel() for tensor in floating) or any(
        bool(torch.isfinite(tensor).any()) for tensor in floating
    )


def difference(first: Any, second: Any) -> float:
    """Return the largest relative difference of two outputs of any form.

    Raises:
        SurgeryError: they differ in number or shape.
    """
    return largest_difference(list(tensors(plain(first))), list(tensors(plain(second))))


def largest_difference(expected: list[Tensor], actual: list[Tensor]) -> float:
    """Return the largest relative difference over all outputs; not finite where one is and the other is not."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        raise SurgeryError("the outputs differ in number or shape; give compare= where rounding decides about that")
    return max((_relative(first, second) for first, second in zip(expected, actual, strict=True)), default=0.0)


def _relative(expected: Tensor, actual: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    first, second = _wide(expected), _wide(actual)
    same = (first == second) | (first.isnan() & second.isnan())
    difference = torch.where(same, 0.0, (first - second).abs()).max().item()
    scale = first[torch.isfinite(first)].abs().max().item() if torch.isfinite(first).any() else 0.0
    return difference / max(scale, torch.finfo(torch.float32).tiny) if difference == difference else float("inf")


def _wide(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.to(torch.complex128)) if tensor.is_complex() else tensor.double()


def as_double(value: Any) -> Any:
    """Return what a model is given, its floating point tensors in float64."""
    return mapped(value, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def mapped(value: Any, function: Any) -> Any:
    """Apply a function to every tensor of a batch."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: mapped(entry, function) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(entry, function) for entry in value)
    return value


def beyond_rounding(change: float | None, floor: float, rounding: Callable[[], float | None]) -> str | None:
    """Say by how much something changed, where rounding does not explain it, or return None.

    Args:
        change: how far apart two values are; None where they have not the same form.
        floor: the change that is allowed, whatever the rounding.
        rounding: how far apart the model's own values are where its weights move a little, asked for only where it
            matters; None where they have not the same form then, so that rounding alone decides it.

    >>> beyond_rounding(0.5, 1e-9, lambda: 1e-12), beyond_rounding(1e-8, 1e-9, lambda: 1e-8)
    (' by 0.5', None)
    """
    if change is not None and change <= floor:
        return None
    moved = rounding()
    if moved is None or (change is not None and change <= _ROUNDINGS * moved):
        return None
    return "" if change is None else f" by {change:.3g}"


def jittered(model: nn.Module, size: float | None) -> nn.Module:
    """Move each weight of a copy by a random part of itself: of ``size``, or of its type's rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                span = torch.finfo(parameter.dtype).eps if size is None else size
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
                exact = parameter.double() * (1 + span * noise.to(parameter.device))
                parameter.copy_(exact)
    return model


def outputs_of(model: nn.Module, example: Any, call: Call | None) -> Any:
    """Return what a model returns, with its tensors kept from what a later call writes; the model is as before."""
    with preserved(model), torch.no_grad():
        output = run(model, own_copy(example), call)
        if next(tensors(plain(output)), None) is None:
            raise SurgeryError(
                f"the output of {type(model).__name__} holds no tensor, so that nothing can be compared; give call= "
                "that returns what matters of it"
            )
        return copy.deepcopy(output) if not isinstance(output, Tensor) else output.detach().clone()
