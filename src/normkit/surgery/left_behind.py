"""What a forward leaves on its modules to be read later: tensors in attributes, in lists and dicts, in buffers."""

import functools
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, preserved, run
from ..anatomy.places import places_of
from .entries import own_copy
from .outputs import as_double, beyond_rounding, difference, jittered, measured
from .transaction import copied

__all__ = ["LeftBehind"]

_REGISTRIES = {"_parameters", "_modules", "_buffers"}
_Place = tuple[str, str]  # the path of a module, and the name of its attribute


class LeftBehind:
    """Compares what a forward of changed copies leaves on the modules with what that of the model leaves.

    Args:
        model: what is right, in float64 where it runs in that.
        example: what it takes.
        call: how that goes into the model.
        floor: the change that is allowed, whatever the rounding.
        exactly: whether the model is in float64.
        is_block: which modules are looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        call: Call | None,
        floor: float,
        *,
        exactly: bool,
        is_block: Callable[[nn.Module], bool],
    ) -> None:
        self._model, self._call, self._floor, self._exactly = model, call, floor, exactly
        self._example = as_double(example) if exactly else example
        self._paths = [path for path, module in places_of(model) if is_block(module)]
        self._left = self._after(model) if self._paths else {}

    def against(self, changed: nn.Module) -> str | None:
        """Say what a forward of a changed copy, in the type of ``model``, leaves otherwise, or return None."""
        if not self._left:
            return None
        found = self._after(changed)
        for place, given in self._left.items():

            def rounding(place: _Place = place, given: list[Tensor] = given) -> float | None:
                return measured(difference, given, self._moved.get(place, []))

            by = beyond_rounding(measured(difference, given, found.get(place, [])), self._floor, rounding)
            if by is not None:
                return f"it changes what forward leaves in {'.'.join(filter(None, place))}{by}"
        return None

    @functools.cached_property
    def _moved(self) -> dict[_Place, list[Tensor]]:
        """What the model itself leaves where its weights move a little."""
        return self._after(jittered(copied(self._model), 1e-13 if self._exactly else None))

    def _after(self, model: nn.Module) -> dict[_Place, list[Tensor]]:
        """Run a model and return the tensors that its modules hold and did not before; it is as it was then."""
        modules = {path: model.get_submodule(path) for path in self._paths}
        with preserved(model), torch.no_grad():
            # The tensors stay in memory, so that no other gets the same id.
            before = {path: [(tensor, tensor._version) for _, tensor in _held(one)] for path, one in modules.items()}
            known = {path: {(id(tensor), version) for tensor, version in held} for path, held in before.items()}
            run(model, own_copy(self._example), self._call)
            left: dict[_Place, list[Tensor]] = {}
            for path, module in modules.items():
                for name, tensor in _held(module):
                    if (id(tensor), tensor._version) not in known[path]:
                        left.setdefault((path, name), []).append(tensor.detach().clone())
        return left


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in chain(vars(module).items(), module._buffers.items()):
        if name not in _REGISTRIES:
            for tensor in _inside(value):
                if not tensor.is_inference():
                    yield name, tensor


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) is dict:
        yield from chain.from_iterable(map(_inside, value.values()))
    elif type(value) in (list, tuple):
        yield from chain.from_iterable(map(_inside, value))
