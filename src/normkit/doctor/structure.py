"""What the structure of a model says of its layers: what stands around them, before them, and in which order."""

from collections.abc import Sequence
from itertools import chain

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..anatomy.attributes import leaves
from ..anatomy.forms import NAMED_STATISTICS
from .examination import Examination
from .subjects import Subject

__all__ = ["in_order", "learning_before", "listed", "out_of_sight", "resting", "weighted_before"]

_LISTED = 8  # names that a note writes out
_STATISTICS = tuple(dict.fromkeys(chain.from_iterable(NAMED_STATISTICS)))
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def resting(model: nn.Module, subjects: Sequence[Subject]) -> dict[str, str]:
    """Return for each layer in training the outermost module around it that is in evaluation, ``""`` for the model."""
    found: dict[str, str] = {}
    for subject in subjects:
        if subject.layer is None or not subject.training or not subject.name:
            continue
        parts = subject.name.split(".")
        above = (".".join(parts[:end]) for end in range(len(parts)))
        holder = next((name for name in above if not model.get_submodule(name).training), None)
        if holder is not None:
            found[subject.name] = holder
    return found


def learning_before(model: nn.Module, subjects: Sequence[Subject]) -> frozenset[str]:
    """Name the layers before which, in the order of registration, a parameter learns."""
    by_module = {id(subject.layer.module): subject.name for subject in subjects if subject.layer is not None}
    learns, found = False, set()
    for module in model.modules():
        if id(module) in by_module and learns:
            found.add(by_module[id(module)])
        learns = learns or any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return frozenset(found)


def weighted_before(model: nn.Module, subjects: Sequence[Subject]) -> frozenset[str]:
    """Name the layers before which, in the order of registration, there is a parameter at all."""
    by_module = {id(subject.layer.module): subject.name for subject in subjects if subject.layer is not None}
    weighted, found = False, set()
    for module in model.modules():
        if id(module) in by_module and weighted:
            found.add(by_module[id(module)])
        weighted = weighted or next(module.parameters(recurse=False), None) is not None
    return frozenset(found)


def out_of_sight(model: nn.Module) -> list[str]:
    """Say which statistics and norms a model keeps where torch does not see them, and what becomes of them so."""
    notes = []
    for path, module in model.named_modules():
        named = f"{path or 'the model'} ({type(module).__name__})"
        loose = [name for name in _STATISTICS if isinstance(vars(module).get(name), Tensor)]
        if loose:
            notes.append(
                f"{named} keeps {' and '.join(loose)} as plain tensors: no state_dict has them and .to() does not move "
                f"them; self.register_buffer({loose[0]!r}, ...) makes them buffers"
            )
        for name, value in vars(module).items():
            held = leaves(value) if isinstance(value, dict | list | tuple) else ()
            if name[0] != "_" and any(isinstance(entry, _NORMS) for entry in held):
                kind = "nn.ModuleDict" if isinstance(value, dict) else "nn.ModuleList"
                notes.append(
                    f"{named} holds normalization layers in a plain {type(value).__name__}, {name}: they are no part "
                    f"of the model, eval() and state_dict() do not reach them; {kind} makes them so"
                )
    return notes


def in_order(examination: Examination) -> list[Subject]:
    """Return the layers in the order in which the batches reach them, where there are any; the others come last."""
    place = {name: index for index, name in enumerate(examination.measured)}
    return sorted(examination.subjects, key=lambda subject: place.get(subject.name, len(place)))


def listed(names: Sequence[str]) -> str:
    """Write names out, of many the first ones."""
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
