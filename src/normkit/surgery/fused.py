"""What a fusion leaves in a model, and how it is taken out again.

Three things carry the marks of a fusion: the holder that stands where the batch norm stood and has its names in the
state, a place holder where an activation module stood, and the block whose forward was rewritten, which keeps its
object and gets a subclass of its own class.
"""

import importlib
import inspect
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import SurgeryError
from ..layers import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

__all__ = ["HOLDERS", "Absorbed", "Program", "Rewritten", "hold", "is_ours", "rewrite", "unfuse"]

HOLDERS: dict[int, type[nn.Module]] = {1: BatchNormAct1d, 2: BatchNormAct2d, 3: BatchNormAct3d}
_MARK = "fused_by_convert"
_SETTINGS, _CHECK = "settings_of_the_trace", "_check_settings_of_the_trace"


class Absorbed(nn.Identity):
    """Stands where an activation stood that a fused layer before it now computes."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = (original,)  # in a tuple, so that it is no part of the model
        self.train(original.training)

    def extra_repr(self) -> str:
        """Show what stood here."""
        return f"{type(self.original[0]).__name__} of the layer before it"


def hold(norm: nn.Module, dimensions: int, activation: str) -> nn.Module:
    """Return a fused layer around a batch norm of ours, marked for :func:`unfuse`."""
    holder = HOLDERS[dimensions](int(str(norm.num_features)), activation=activation)
    holder.norm = norm
    setattr(holder, _MARK, True)
    return holder.train(norm.training)


def is_ours(module: nn.Module) -> bool:
    """Say whether a fused layer was put there by a fusion, and not by the one who wrote the model."""
    return bool(vars(module).get(_MARK, False))


@dataclass(frozen=True)
class Program:
    """The text of a forward, and the names it reads: objects, and modules by their own names."""

    source: str
    objects: tuple[tuple[str, Any], ...]
    modules: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, source: str, names: Mapping[str, Any]) -> "Program":
        """Sort the names that torch.fx says a program needs."""
        return cls(
            source,
            tuple((name, value) for name, value in names.items() if not isinstance(value, ModuleType)),
            tuple((name, value.__name__) for name, value in names.items() if isinstance(value, ModuleType)),
        )

    def compiled(self, module: str) -> Any:
        """Return the function ``forward(self, ...)``, as if it stood in a module; it looks at the settings first."""
        names: dict[str, Any] = {name: importlib.import_module(source) for name, source in self.modules}
        names |= dict(self.objects) | {"__name__": module, _CHECK: _check_settings}
        text = re.sub(r"(?m)^(def forward\(.*:\n)", rf"\1    {_CHECK}(self)\n", self.source, count=1)
        exec(text, names)  # noqa: S102  the text is torch.fx's print of a graph traced from the model itself
        return names["forward"]


class Rewritten(nn.Module):
    """Mixed into a block's class by :func:`rewrite`: its forward is a program that uses the fused layers."""

    program: Program

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the class below and the program, because the class exists only in memory."""
        return _rebuild, (_own_class(self), self.program), self.__dict__


_CLASSES: dict[tuple[type, str], type[Rewritten]] = {}


def rewrite(block: nn.Module, program: Program) -> None:
    """Give a block the program as its forward; all else of it stays, also its place in ``isinstance``."""
    vars(block)[_SETTINGS] = _settings(block)
    block.__class__ = _rewritten_class(type(block), program)


def _settings(block: nn.Module) -> dict[str, Any]:
    """Return the plain values that the block's methods name: a program holds them as they were when it was traced."""
    named: set[str] = set()
    for cls in type(block).__mro__:
        if cls is nn.Module:
            break
        codes = [function.__code__ for name, function in vars(cls).items() if inspect.isfunction(function)]
        named.update(*(code.co_names for code in codes if code.co_name != "__init__"))
    plain = (bool, int, float, str)
    return {name: value for name, value in vars(block).items() if name in named - {"training"} and type(value) in plain}


def _check_settings(block: nn.Module) -> None:
    """Refuse to run where a setting is not what the program was written with.

    Raises:
        SurgeryError: which one, and how to go on.
    """
    if torch.compiler.is_compiling():
        return
    own = vars(block)
    for name, value in own.get(_SETTINGS, {}).items():
        if own.get(name) != value:
            raise SurgeryError(
                f"{type(block).__name__}: its forward was written anew with {name}={value!r}, and {name} is "
                f"{own.get(name)!r} now; set it back, or set it on the given model before normkit.convert or "
                "normkit.fold (normkit.convert(model, to='torch') takes a conversion apart)"
            )


def _rewritten_class(base: type[Any], program: Program) -> type[Rewritten]:
    key = (base, repr(program))
    if key not in _CLASSES:
        members = {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "forward": program.compiled(base.__module__),
            "program": program,
        }
        _CLASSES[key] = type(f"Fused{base.__name__}", (Rewritten, base), members)
    return _CLASSES[key]


def _rebuild(base: type[nn.Module], program: Program) -> nn.Module:
    cls = _rewritten_class(base, program)
    return cls.__new__(cls)


def _own_class(block: Rewritten) -> type[nn.Module]:
    return type(block).__mro__[2]


def unfuse(model: nn.Module, chosen: set[int]) -> list[str]:
    """Take every fusion apart that one of the chosen norms (by ``id``) has a part in; return the norms' paths before.

    A block is taken apart as a whole, since its forward is one program.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    held = {
        id(module.norm): module for module in model.modules() if is_ours(module) and isinstance(module.norm, nn.Module)
    }
    wanted = {key for key in held if key in chosen}
    for block in [module for module in model.modules() if isinstance(module, Rewritten)]:
        own = {id(part) for part in _own_norms(block)} & held.keys()
        if own & wanted:
            wanted |= own
            restored: nn.Module = block
            restored.__class__ = _own_class(block)
            vars(restored).pop(_SETTINGS, None)
    _put_activations_back(model, wanted)
    undone = []
    for key in wanted:
        path = paths[id(held[key])]
        norm = held[key].norm
        assert isinstance(norm, nn.Module)
        model.set_submodule(path, norm.train(held[key].training))
        undone.append(path)
    return undone


def _own_norms(block: nn.Module) -> list[nn.Module]:
    """Return the fused norms that a block's own forward may call: all but those inside of other such blocks."""
    found, waiting = [], list(block.children())
    while waiting:
        module = waiting.pop()
        if is_ours(module):
            found.append(module.norm)
        elif not isinstance(module, Rewritten):
            waiting += list(module.children())
    return [norm for norm in found if isinstance(norm, nn.Module)]


def _put_activations_back(model: nn.Module, wanted: set[int]) -> None:
    """Give the activation modules their places back that followed one of these norms in a container."""
    for container in list(model.modules()):
        children = list(container._modules.items())
        for (_, before), (name, module) in itertools.pairwise(children):
            if isinstance(module, Absorbed) and before is not None and is_ours(before) and id(before.norm) in wanted:
                container._modules[name] = module.original[0].train(module.training)
