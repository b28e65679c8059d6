"""Where a layer stands among the modules that hold it, by which ranks tell layers of equal settings apart.

A layer that is called does not know its name. But modules know what they hold, and all that are alive can be asked. The
name may be shorter than that in ``state_dict``, never another one: it ends where a module is held by several.
"""

import gc
from typing import Any
from weakref import ReferenceType, ref

from torch import nn

__all__ = ["asleep_beside", "may_be_one", "path_of"]

# By the identity of a module, which another may have later: itself, and those that hold it, each with the name there.
_HOLDERS: dict[int, tuple[ReferenceType[nn.Module], list[tuple[ReferenceType[nn.Module], str]]]] = {}


def path_of(layer: nn.Module) -> str:
    """Return the name of a layer in the outermost module that holds it, as far as it is the only one.

    >>> inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    >>> model = nn.ModuleDict({"body": inner})
    >>> path_of(inner[1])
    'body.1'
    """
    return _climb(layer)[0]


def asleep_beside(layer: nn.Module) -> list[str]:
    """Return the names of the layers of its class, in the outermost module that holds it, that are in evaluation."""
    _, top = _climb(layer)
    return [name for name, module in top.named_modules() if type(module) is type(layer) and not module.training]


def may_be_one(paths: list[str]) -> bool:
    """Tell whether names that may each lack some of their beginning can be those of one layer.

    >>> may_be_one(["module.body.1", "body.1", ""]), may_be_one(["body.1", "body.2"]), may_be_one(["a.12", "2"])
    (True, False, False)
    """
    parts = [path.split(".")[::-1] if path else [] for path in paths]
    longest = max(parts, key=len)
    return all(longest[: len(part)] == part for part in parts)


def _climb(layer: nn.Module) -> tuple[str, nn.Module]:
    """Return the name, and the outermost module in which it has it."""
    if _holders(layer) is None:
        _ask_all()
    names: list[str] = []
    top, above = layer, _holders(layer)
    while above and len(names) < 100 and len({name for _, name in above}) == 1:
        names.append(above[0][1])
        top = above[0][0]
        # What holds it under one name in several places is one layer still, whose place there is not known.
        above = _holders(top) if len(above) == 1 else None
    return ".".join(reversed(names)), top


def _holders(module: nn.Module) -> list[tuple[nn.Module, str]] | None:
    """Return the modules that hold this one, each with its name there; None where that is not, or no longer, known."""
    itself, known = _HOLDERS.get(id(module), (None, []))
    if itself is None or itself() is not module:
        return None
    found = [(holder, name) for kept, name in known if (holder := kept()) is not None]
    if any(holder._modules.get(name) is not module for holder, name in found) or len(found) < len(known):
        return None
    return found


def _ask_all() -> None:
    """Ask every module that is alive what it holds."""
    _HOLDERS.clear()
    # By the type: an object may answer isinstance with code of its own.
    alive: list[Any] = [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]
    for module in alive:
        _HOLDERS.setdefault(id(module), (ref(module), []))
        held = vars(module).get("_modules")
        for name, child in held.items() if isinstance(held, dict) else ():
            if child is not None:
                _HOLDERS.setdefault(id(child), (ref(child), []))[1].append((ref(module), name))
