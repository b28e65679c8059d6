"""Whether a model's weights are what they were, asked often and cheaply."""

import ctypes
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

__all__ = ["Weights"]

# Devices whose memory this process reads as its own.
_READABLE = ("cpu",)
# How many values of a weight are looked at.
_PROBED = 3
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CELLS: dict[int, Any] = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
_value = operator.attrgetter("value")


class Weights:
    """The weights of a model at one moment, of which a few values each are looked at again.

    What puts other weights in for a while, such as averages, changes nearly all values. It may do so through ``.data``,
    of which torch's count of writes knows nothing, so that the values themselves are compared, by their bits.

    Args:
        model: the weights are its.
    """

    def __init__(self, model: nn.Module) -> None:
        # An embedding with max_norm shortens each row before it is used, whoever uses it: that is no other weight.
        shortened = {
            id(each.weight)
            for each in model.modules()
            if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.max_norm
        }
        # Weights that ranks share out, and others of a class of their own, have no storage to look into.
        self._parameters = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if type(parameter) in (nn.Parameter, Tensor)
            and parameter.numel()
            and not parameter.is_meta
            and id(parameter) not in shortened
        ]
        self._prepare()
        self._before = [look() for look in self._looks]

    def check(self, part: int, place: str) -> None:
        """Refuse where a weight is not what it was.

        Raises:
            ArgumentError: it was changed in place.
        """
        if [parameter.data_ptr() for _, parameter in self._parameters] != self._places:
            self._prepare()
        for names, look, before in zip(self._names, self._looks, self._before, strict=True):
            now = look()
            if not (torch.equal(now, before) if isinstance(now, Tensor) else now == before):
                changed = (number for number, (new, old) in enumerate(zip(now, before, strict=True)) if new != old)
                _refuse(names[next(changed)], part, place)

    def _prepare(self) -> None:
        """Find where the values lie."""
        cells: list[tuple[str, Any]] = []
        views: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for name, parameter in self._parameters:
            for view in _probe(parameter.detach()):
                if view.device.type in _READABLE:
                    cells += [(name, cell) for cell in _cells(view)]
                else:
                    views.setdefault((view.device, view.dtype), []).append((name, view))
        # What the cells lie in must not be given back.
        self._storages = [parameter.untyped_storage() for _, parameter in self._parameters]
        self._places = [parameter.data_ptr() for _, parameter in self._parameters]
        self._looks: list[Callable[[], Any]] = [_look_at([cell for _, cell in cells])]
        self._names = [[name for name, _ in cells]]
        for same in views.values():
            self._looks.append(_look_at_all([view for _, view in same]))
            self._names.append([name for name, view in same for _ in view])


def _refuse(name: str, part: int, place: str) -> None:
    raise ArgumentError(
        f"accumulate: {name} was changed inside loss, in micro-batch {part}, and is another {place}, where the next "
        "micro-batch would compute with it. Change weights before accumulate; or let loss call "
        "torch.func.functional_call(model, other weights, (x,)), which each micro-batch has for itself; or use "
        'kind="statistics"'
    )


def _look_at(cells: list[Any]) -> Callable[[], list[int]]:
    """Return a function that reads memory, which takes a hundredth of what an operation of torch's does."""
    return lambda: list(map(_value, cells))


def _look_at_all(views: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: torch.cat(views)


def _cells(view: Tensor) -> list[Any]:
    size = view.element_size()
    step = view.stride(0) * size
    return [_CELLS[size].from_address(view.data_ptr() + place * step) for place in range(len(view))]


def _probe(values: Tensor) -> list[Tensor]:
    """Return a view of some values, evenly far from each other in memory, as integers; none of what is no number."""
    if values.is_complex():
        values = torch.view_as_real(values)
    dtype = _INTEGERS.get(values.element_size())
    if dtype is None or values.is_sparse or not values.is_floating_point():
        return []
    # The elements in memory; those of a tensor that is spread out lie elsewhere, and its first is enough.
    number = min(values.numel(), _PROBED) if _is_dense(values) else 1
    step = max(values.numel() // number, 1)
    return [values.as_strided((number,), (step,), values.storage_offset()).view(dtype)]


def _is_dense(values: Tensor) -> bool:
    """Tell whether the elements fill a stretch of memory, in whatever order."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    return reach == values.numel()
