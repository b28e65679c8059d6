"""What modules keep beside values: each micro-batch's own while several take turns."""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["ModuleState"]

# The entries of a module that are registries themselves, in which a forward may put one thing in the place of another
# (torch.func.functional_call), or a hook.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_ABSENT = object()

_Places = list[dict[Any, Any]]
# By place, what differs there from how all was at the beginning.
_Changes = dict[int, dict[Any, Any]]


class ModuleState:
    """Attributes, registered parameters, buffers, modules and hooks of a model, a set for each of several parts.

    Every part finds what there was at the beginning. What it changes is taken off where it waits, and put back
    where it goes on, so that no other sees it. Things are told apart by identity: what is written *into* a tensor, a
    list or a dict that several parts have in common is common to them.

    Args:
        model: the modules are its.
        parts: how many parts.

    >>> model = nn.Identity()
    >>> state = ModuleState(model, parts=2)
    >>> state.begin()
    >>> model.skip = "of part 0"
    >>> state.take_off(0)
    >>> hasattr(model, "skip")
    False
    >>> state.put_on(0)
    >>> model.skip
    'of part 0'
    """

    def __init__(self, model: nn.Module, parts: int) -> None:
        self._model, self._parts = model, parts
        self._begin_with([], [])

    def begin(self) -> None:
        """Take what there is now for the beginning."""
        # Torch's wrapper keeps there what it knows of the step as a whole.
        own = (each for each in self._model.modules() if not isinstance(each, nn.parallel.DistributedDataParallel))
        self._begin_with(list(_places(own, self._model)), list(self._model.parameters()))

    def end(self) -> None:
        """Keep nothing any more."""
        self._begin_with([], [])

    def _begin_with(self, places: _Places, parameters: list[nn.Parameter]) -> None:
        self._places, self._parameters = places, parameters
        self._base = [dict(place) for place in places]
        # Most are empty, and to look into an empty one takes as long as to compare five values.
        self._lengths, self._filled = list(map(len, places)), [place for place in places if place]
        self._values = list(_values(self._filled))
        self._learning = [parameter.requires_grad for parameter in parameters]
        self._changes: list[_Changes] = [{} for _ in range(self._parts)]
        self._turned: list[list[int]] = [[] for _ in range(self._parts)]

    def take_off(self, part: int) -> None:
        """Keep what the part has changed, and put all back as it was at the beginning."""
        self._changes[part], self._turned[part] = {}, []
        if list(map(len, self._places)) != self._lengths or not all(map(is_, _values(self._filled), self._values)):
            for number, (place, base) in enumerate(zip(self._places, self._base, strict=True)):
                changed = _difference(place, base)
                if changed:
                    self._changes[part][number] = changed
                    _write(place, {key: base.get(key, _ABSENT) for key in changed})
        if [parameter.requires_grad for parameter in self._parameters] != self._learning:
            self._turned[part] = [
                number
                for number, (parameter, learns) in enumerate(zip(self._parameters, self._learning, strict=True))
                if parameter.requires_grad != learns
            ]
            self._turn(part)

    def put_on(self, part: int) -> None:
        """Put the part's changes where they were when it began to wait."""
        for number, changed in self._changes[part].items():
            _write(self._places[number], changed)
        self._turn(part)

    @contextlib.contextmanager
    def seen_by(self, part: int) -> Iterator[None]:
        """Look, inside, at the modules as a part that waits does; nothing may be changed there."""
        self.put_on(part)
        try:
            yield
        finally:
            for number, changed in self._changes[part].items():
                base = self._base[number]
                _write(self._places[number], {key: base.get(key, _ABSENT) for key in changed})
            self._turn(part)

    def _turn(self, part: int) -> None:
        for number in self._turned[part]:
            parameter = self._parameters[number]
            parameter.requires_grad_(not parameter.requires_grad)


def _places(modules: Iterable[nn.Module], model: nn.Module) -> Iterator[dict[Any, Any]]:
    # Under fully_shard all micro-batches have the weights in common that are gathered for them: torch exchanges them
    # once, for the first.
    sharded = any(type(module).__name__.startswith("FSDP") for module in model.modules())
    for module in modules:
        own = vars(module)
        yield own
        for name in _REGISTRIES:
            # A scripted module's are no dicts but views of what its program keeps, in which nothing can be replaced.
            if isinstance(own.get(name), dict) and not (sharded and name == "_parameters"):
                yield own[name]
    yield vars(parametrize)
    yield parametrize._cache


def _values(places: _Places) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, places))


def _difference(place: dict[Any, Any], base: dict[Any, Any]) -> dict[Any, Any]:
    """Return the entries that are others than in ``base``, and those that are absent."""
    changed = {key: value for key, value in place.items() if base.get(key, _ABSENT) is not value}
    if len(place) - sum(key not in base for key in changed) < len(base):
        changed.update({key: _ABSENT for key in base if key not in place})
    return changed


def _write(place: dict[Any, Any], entries: dict[Any, Any]) -> None:
    for key, value in entries.items():
        if value is _ABSENT:
            place.pop(key, None)
        else:
            place[key] = value
