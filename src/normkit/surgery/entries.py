"""Other ways into a model's code than the one its example takes: public methods, and arguments that are switches."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, preserved, run
from ..anatomy.batches import tensors
from ..anatomy.places import places_of

__all__ = ["Entries", "Entry", "entries_of", "own_copy", "own_functions"]


@dataclass(frozen=True)
class Entry:
    """One call of a module inside of a model, with what it was given in a run of the whole.

    Attributes:
        path: the module.
        method: the method that is called.
        args, kwargs: what with.
        words: how to name it.
    """

    path: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    words: str

    def __call__(self, model: nn.Module, convert: Callable[[Any], Any]) -> Any:
        """Make the call in a model or a copy of it, with the arguments converted."""
        module = model.get_submodule(self.path)
        function = module if self.method == "forward" else getattr(module, self.method)
        return function(*convert(self.args), **convert(self.kwargs))


@dataclass
class Entries:
    """What was found.

    Attributes:
        found: the calls.
        alone: of arguments that are no switches, and of attributes that are, the one value that they have, in words.
        steps: methods of blocks that only the block's own code calls; nothing is known of what they give.
    """

    found: list[Entry] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def without(self, failed: list[Entry]) -> "Entries":
        """Return what is left where some calls cannot be made."""
        names = {entry.words for entry in failed}
        kept = [entry for entry in self.found if entry.words not in names]
        return Entries(kept, [*self.alone, *(f"{name}, which fails" for name in sorted(names))], self.steps)


def entries_of(model: nn.Module, example: Any, call: Call | None, wanted: set[int]) -> Entries:
    """Run a model once and return the other ways into those of its modules that hold a wanted one.

    Those are the public methods that the code calls, with what it gave them, and forward with the other value of each
    argument that is True or False. A method that nothing calls is not called here either: it may do anything. Inside of
    the model, one that only its own block calls is a step on that block's way and no other way into it.

    Args:
        model: it is afterwards as it was.
        example: one batch.
        call: how it goes into the model.
        wanted: the ids of layers.
    """
    blocks = {
        path: block
        for path, block in places_of(model)
        if not type(block).__module__.startswith("torch.nn.")
        and not isinstance(block, torch.jit.ScriptModule)
        and id(block) not in wanted
        and any(id(part) in wanted for part in block.modules())
    }
    seen: dict[int, tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
    entries, methods = Entries(), Entries()
    with preserved(model), torch.no_grad(), ExitStack() as undo:
        for path, block in blocks.items():

            def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                seen.setdefault(id(module), (path, module, own_copy(args), own_copy(kwargs)))

            undo.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
            for name in _methods(block):
                _watch(path, block, name, methods, undo)
        run(model, own_copy(example), call)
    entries.found += methods.found
    for path, block, args, kwargs in seen.values():
        _of_forward(path, block, args, kwargs, entries)
    entries.alone += methods.alone
    entries.steps += [step for step in methods.steps if step not in {entry.words for entry in methods.found}]
    for path, block in blocks.items():
        entries.alone += [f"{_named(path, name)}={value}" for name, value in _flags(block)]
    return entries


def _flags(block: nn.Module) -> Iterator[tuple[str, bool]]:
    """Name the attributes that are True or False and that a module's forward asks for; they are not varied."""
    asked = getattr(getattr(type(block).forward, "__code__", None), "co_names", ())
    for name, value in vars(block).items():
        if isinstance(value, bool) and name in asked and name != "training":
            yield name, value


def _of_forward(path: str, block: nn.Module, args: Any, kwargs: Any, entries: Entries) -> None:
    """Add what forward's arguments that hold no tensor say."""
    try:
        signature = inspect.signature(block.forward)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        item = signature.parameters[name]
        if item.kind in (item.VAR_POSITIONAL, item.VAR_KEYWORD) or _holds_tensors(value):
            continue
        if not isinstance(value, bool):
            entries.alone.append(f"{_named(path, 'forward')}({name}={_short(value)})")
            continue
        other = signature.bind(*args, **kwargs)
        other.apply_defaults()
        other.arguments[name] = not value
        words = f"{_named(path, 'forward')}({name}={not value})"
        entries.found.append(Entry(path, "forward", other.args, other.kwargs, words))


def _watch(path: str, block: nn.Module, name: str, entries: Entries, undo: ExitStack) -> None:
    """Put a function in the place of a method, on the object, that notes its first call."""
    bound = getattr(block, name)
    called: list[str] = []

    # With the method's own signature: there is code that asks for it before it calls.
    @functools.wraps(bound)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if path and _is_method_of(block, sys._getframe(1)):
            if _named(path, name) not in entries.steps:
                entries.steps.append(_named(path, name))
        elif not called:
            called.append(name)
            entries.found.append(Entry(path, name, own_copy(args), own_copy(kwargs), _named(path, name)))
            entries.alone.extend(_settings(path, name, bound, args, kwargs))
        return bound(*args, **kwargs)

    vars(block)[name] = watched
    undo.callback(vars(block).pop, name, None)


def _is_method_of(block: nn.Module, frame: FrameType) -> bool:
    """Tell whether code that runs is a method of this module: its first argument, or what it calls ``self``."""
    return any(frame.f_locals.get(name) is block for name in (*frame.f_code.co_varnames[:1], "self"))


def _settings(path: str, name: str, bound: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[str]:
    """Name what a method's arguments were left at; they are not varied, since a method may do anything."""
    try:
        signature = inspect.signature(bound)
        given = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return
    given.apply_defaults()
    for argument, value in given.arguments.items():
        if signature.parameters[argument].default is not inspect.Parameter.empty and not _holds_tensors(value):
            yield f"{_named(path, name)}({argument}={_short(value)})"


def _holds_tensors(value: Any) -> bool:
    return next(tensors(value), None) is not None


def _methods(block: nn.Module) -> Iterator[str]:
    """Name the public methods of a module's own class."""
    known = {*dir(nn.Module), "forward"}
    for name, _ in own_functions(block):
        if name[0] != "_" and name not in known and name not in vars(block):
            known.add(name)
            yield name


def own_functions(block: nn.Module) -> Iterator[tuple[str, FunctionType]]:
    """Yield the functions of a module's own classes, those of torch's left out, with their names."""
    for cls in type(block).__mro__:
        if cls is nn.Module or cls.__module__.startswith("torch.nn."):
            return
        yield from ((name, value) for name, value in vars(cls).items() if isinstance(value, FunctionType))


def own_copy(value: Any) -> Any:
    """Return what a call is given with tensors that it may write; what is no plain container stays as it is.

    >>> given = {"x": torch.zeros(1)}
    >>> own_copy(given)["x"].add_(1.0), given
    (tensor([1.]), {'x': tensor([0.])})
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: own_copy(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(own_copy(entry) for entry in value)
    return value


def _named(path: str, method: str) -> str:
    return f"{path}.{method}" if path else method


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 40 else f"{said[:37]}..."
