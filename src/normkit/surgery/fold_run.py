"""One run of a model, recorded as a graph: every call of a layer, and every function between the calls.

Any model that runs can be recorded, whatever its code does; what the run did not do, another branch of the code, is not
in it. Three nets catch all that touches a tensor: hooks on the layers, torch's functions, and below them the operators
that scripted or compiled code calls. What only asks a tensor for its shape or type is no consumer.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from ..anatomy import Call, preserved, run
from ..anatomy.batches import tensors
from .entries import own_copy
from .outputs import plain

__all__ = ["Recording", "record_run"]

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
# Attributes and functions that tell of a tensor's form and not of its values.
_DATA = {"data", "T", "mT", "H", "mH", "real", "imag"}
_FORM = {
    "size",
    "dim",
    "stride",
    "numel",
    "nelement",
    "ndimension",
    "element_size",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "is_tensor",
    "get_device",
    "storage_offset",
    "is_signed",
    "__len__",
    "__hash__",
}


@dataclass
class Recording:
    """What one run did.

    Attributes:
        graph: the calls, in order. A call of a layer is a ``call_module`` of its first path; a node's ``meta`` has the
            ``shape`` it gave; that of a function of one tensor has ``again``, which calls it on another, that of a
            concatenation ``joined``, the dimension.
        nodes: the calls of each layer, by ``id``.
        calls: how often each module was called, inside of other layers too, by ``id``.
        fixed: by ``id``, the arguments of a module's forward that hold no tensor, where all its calls agree in them.
        given: by ``id``, the first input of each layer whose class is not torch's.
        read: the ids of the parameters that code reads past the layer they belong to.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[int, list[fx.Node]] = field(default_factory=dict)
    calls: Counter[int] = field(default_factory=Counter)
    fixed: dict[int, dict[str, Any] | None] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)


def record_run(model: nn.Module, example: Any, call: Call | None, is_layer: Callable[[nn.Module], bool]) -> Recording:
    """Run a model once and return what it did; the model is afterwards as it was.

    Args:
        model: it runs on the example.
        example: one batch.
        call: how it goes into the model.
        is_layer: which modules are one call each, whatever happens inside.
    """
    recorder = _Recorder(model, is_layer)
    with preserved(model), torch.no_grad(), ExitStack() as hooks:
        for module in recorder.paths_of:
            hooks.callback(module.register_forward_pre_hook(recorder.enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(recorder.leave, with_kwargs=True).remove)
        hooks.enter_context(_Operators(recorder))
        hooks.enter_context(_Functions(recorder))
        output = run(model, own_copy(example), call)
        recorder.finish(output)
    return recorder.done


class _Recorder:
    """Builds the graph; ``depth`` is above 0 inside of a layer or a function, whose insides are not recorded."""

    def __init__(self, model: nn.Module, is_layer: Callable[[nn.Module], bool]) -> None:
        self.done = Recording()
        self.depth = 0
        self.paths_of: dict[nn.Module, str] = {}
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self.paths_of[module] = path
        self.layers = {id(module) for module in self.paths_of if is_layer(module)}
        self.parameters = {id(tensor): name for name, tensor in model.named_parameters()}
        self.sources = WeakTensorKeyDictionary()
        self.model = model

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        done = self.done
        done.calls[id(module)] += 1
        if module is self.model:
            for tensor in tensors((args, tuple(kwargs.values()))):
                self.sources[tensor] = done.graph.create_node("placeholder", "input")
        if id(module) in self.layers:
            self.depth += 1
            if not type(module).__module__.startswith("torch.nn.") and id(module) not in done.given:
                first = next(tensors((args, tuple(kwargs.values()))), None)
                if first is not None:
                    done.given[id(module)] = first.detach().clone()
            return
        fixed = _without_tensors(module, args, kwargs)
        seen = done.fixed.setdefault(id(module), fixed)
        if seen is not None and not _same(seen, fixed):
            done.fixed[id(module)] = None

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if id(module) not in self.layers:
            return
        self.depth -= 1
        if self.depth:
            return
        inputs = tuple(self._node(tensor) for tensor in tensors((args, tuple(kwargs.values()))))
        node = self.done.graph.create_node("call_module", self.paths_of[module], inputs)
        node.meta["module"] = module
        node.meta["again"] = lambda probe: type(module).forward(module, probe)
        self.done.nodes.setdefault(id(module), []).append(node)
        self._gives(node, output)

    def called(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note the call of a function or operator."""
        name = getattr(function, "__name__", str(function))
        flat, form = tree_flatten((args, kwargs))
        places = [place for place, value in enumerate(flat) if isinstance(value, Tensor)]
        if name.endswith("_as"):
            places = places[:1]  # the other only lends its shape
        inputs = tuple(self._node(flat[place]) for place in places)
        node = self.done.graph.create_node("call_function", function, inputs)
        if len(places) == 1 and isinstance(output, Tensor):
            shape = tuple(output.shape)
            plainly = tree_map(lambda value: None if isinstance(value, Tensor) else value, flat)

            def again(probe: Tensor) -> Any:
                if name.endswith("_as"):
                    return probe.reshape(shape)
                values = list(plainly)
                values[places[0]] = probe
                given, named = tree_unflatten(values, form)
                return function(*given, **named)

            node.meta["again"] = again
        if function in _CONCATENATIONS and isinstance(output, Tensor) and "out" not in kwargs:
            dimension = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
            node.meta["joined"] = dimension % max(output.ndim, 1)
        self._gives(node, output)
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if in_place and args and isinstance(args[0], Tensor):
            self.sources[args[0]] = node

    def finish(self, output: Any) -> None:
        """Note what the model returns."""
        nodes = tuple(self.sources[tensor] for tensor in tensors(plain(output)) if tensor in self.sources)
        self.done.graph.output(nodes)

    def _node(self, tensor: Tensor) -> fx.Node:
        if tensor not in self.sources:
            name = self.parameters.get(id(tensor))
            if name is not None:
                self.done.read.add(id(tensor))
                return self.done.graph.create_node("get_attr", name)
            self.sources[tensor] = self.done.graph.create_node("placeholder", "unseen")
        node = self.sources[tensor]
        assert isinstance(node, fx.Node)
        return node

    def _gives(self, node: fx.Node, output: Any) -> None:
        for tensor in tensors(plain(output)):
            if id(tensor) not in self.parameters:
                self.sources[tensor] = node
        if isinstance(output, Tensor):
            node.meta["shape"] = tuple(output.shape)


class _Functions(TorchFunctionMode):
    """Notes every function of torch's that the model's own code calls."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if self.recorder.depth or _asks_for_form(func):
            return func(*args, **named)
        self.recorder.depth += 1
        try:
            output = func(*args, **named)
        finally:
            self.recorder.depth -= 1
        self.recorder.called(func, args, named, output)
        return output


class _Operators(TorchDispatchMode):
    """Notes the operators that no function was seen for: those of scripted and compiled code."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if self.recorder.depth:
            return func(*args, **named)
        self.recorder.depth += 1  # the call of an operator is a function too
        try:
            output = func(*args, **named)
        finally:
            self.recorder.depth -= 1
        self.recorder.called(func, args, named, output)
        return output


def _asks_for_form(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "") not in _DATA
    return name in _FORM


def _without_tensors(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the arguments, defaults included, that hold no tensor; None where they cannot be bound."""
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    plainly = {
        name for name, item in signature.parameters.items() if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)
    }
    return {
        name: value for name, value in bound.arguments.items() if name in plainly and next(tensors(value), None) is None
    }


def _same(first: dict[str, Any], second: dict[str, Any] | None) -> bool:
    if second is None or first.keys() != second.keys():
        return False
    return all(_is_equal(first[name], second[name]) for name in first)


def _is_equal(first: Any, second: Any) -> bool:
    try:
        return first is second or bool(first == second)
    except (RuntimeError, TypeError, ValueError):
        return False
