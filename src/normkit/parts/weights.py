"""Whether a model's weights are what they were, asked often and cheaply."""

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

__all__ = ["Weights"]

_PROBED = 8
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Weights:
    """The weights of a model at one moment, of which a few values each are looked at again.

    What puts other weights in for a while, such as averages, changes nearly all values. It may do so through ``.data``,
    of which torch's count of writes knows nothing, so that the values themselves are compared, by their bits.

    Args:
        model: the weights are its.
    """

    def __init__(self, model: nn.Module) -> None:
        probes: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            # Weights that ranks share out, and others of a class of their own, have no storage to look into.
            if type(parameter) in (nn.Parameter, Tensor) and parameter.numel() and not parameter.is_meta:
                for view in _probe(parameter.detach()):
                    probes.setdefault((view.device, view.dtype), []).append((name, view))
        self._names = [[name for name, view in same for _ in view] for same in probes.values()]
        self._views = [[view for _, view in same] for same in probes.values()]
        self._before = [torch.cat(views) for views in self._views]

    def check(self, part: int, place: str) -> None:
        """Refuse where a weight is not what it was.

        Raises:
            ArgumentError: it was changed in place.
        """
        for names, views, before in zip(self._names, self._views, self._before, strict=True):
            now = torch.cat(views)
            if not torch.equal(now, before):
                name = names[int((now != before).nonzero()[0])]
                raise ArgumentError(
                    f"accumulate: {name} was changed inside loss, in micro-batch {part}, and is another {place}, where "
                    "the next micro-batch would compute with it. Change weights before accumulate; or let loss call "
                    "torch.func.functional_call(model, other weights, (x,)), which each micro-batch has for itself; or "
                    'use kind="statistics"'
                )


def _probe(values: Tensor) -> list[Tensor]:
    """Return a view of some values from the first on, evenly far from each other in memory, as integers."""
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
