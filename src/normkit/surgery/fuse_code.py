"""The code of one block as a graph, if that graph is all there is to it: then it can be written anew."""

import inspect
import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..anatomy import fingerprint, preserved
from ..printable import first_line
from .fused import Rewritten

__all__ = ["Shape", "is_plain_container", "own_graph", "shapes_of"]

Shape = tuple[torch.Size, torch.dtype]

_LIBRARIES = (os.path.dirname(torch.__file__), os.path.dirname(__file__), inspect.getfile(preserved))
# torch's decorators enter the context in the name of the function they decorate.
_DECORATORS = (inspect.getfile(torch.utils._contextlib), inspect.getfile(torch.amp.autocast_mode))


class _Faithful(fx.Proxy):
    """A stand-in for a tensor that does not take ``x += y`` for ``x = x + y``: others may hold x."""

    def _in_place(self, function: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)


class _OwnCode(fx.Tracer):
    """Traces one forward; every part is one call, but a plain container, which only passes on."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_plain_container(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Faithful(node, self)


def is_plain_container(module: nn.Module) -> bool:
    """Say whether a module only calls its children one after another, seen by no hook."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    plain = type(module).forward is nn.Sequential.forward and "forward" not in vars(module)
    return plain and not any(hooks)


def own_graph(block: nn.Module) -> fx.Graph | str:
    """Trace a block's own forward in training and in evaluation; return why it cannot be written anew, if so.

    A graph holds no contexts, no writes to attributes and no random numbers of Python's, and knows one way through the
    code. A block in which any of these was seen is left as it is. The block is afterwards as it was.
    """
    reason = _against_signature(block)
    if reason is not None:
        return reason
    graphs = []
    for mode in (True, False):
        traced = _traced(block, training=mode)
        if isinstance(traced, str):
            return traced
        graphs.append(traced)
    first, second = (str(graph.python_code("self").src) for graph in graphs)
    return graphs[0] if first == second else "its forward does one thing in training and another in evaluation"


def _against_signature(block: nn.Module) -> str | None:
    forward = type(block).forward
    if "forward" in vars(block) or hasattr(forward, "__wrapped__"):
        return "its forward is wrapped or was replaced"
    if isinstance(block, Rewritten):
        return "its forward was written anew by an earlier fusion; take that apart first, with to='torch'"
    if isinstance(block, fx.GraphModule) or forward.__module__.startswith("torch."):
        return "its forward is torch's own"
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if (
            parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            or parameter.default is not inspect._empty
        ):
            return f"its forward has the optional argument {parameter.name}, by which it may take another way"
    return None


def _traced(block: nn.Module, *, training: bool) -> fx.Graph | str:
    with preserved(block):
        for module in block.modules():
            module.training = training
        before, known = fingerprint(block), set(vars(block))
        try:
            with _overseen() as seen:
                graph = _OwnCode().trace(block)
        except Exception as error:  # whatever the model's code raises where it is given no tensors
            return f"its forward cannot be traced ({type(error).__name__}: {first_line(error)})"
        if seen:
            return f"its forward enters {seen[0]}, which a graph does not hold"
        if any(name.startswith("_tensor_constant") for name in set(vars(block)) - known):
            # The tracer's, for a tensor that it finds under no name.
            return "its forward uses a tensor that is no parameter, buffer or attribute of a layer; make it a buffer"
        if fingerprint(block) != before:
            return "its forward writes attributes or draws random numbers, which a graph does not hold"
    return graph


@contextmanager
def _overseen() -> Iterator[list[str]]:
    """Note the contexts that code enters meanwhile, and activation checkpointing; those of libraries do not count."""
    seen: list[str] = []
    checkpointing = inspect.getfile(torch.utils.checkpoint)

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name == "__enter__" and frame.f_back is not None:
            if not _is_libraries(frame.f_back.f_code):
                seen.append(f"{type(frame.f_locals.get('self')).__name__}()")
        elif event == "call" and frame.f_code.co_filename == checkpointing:
            seen.append("activation checkpointing")
        elif event == "c_call" and getattr(argument, "__name__", "") == "__enter__" and not _is_libraries(frame.f_code):
            seen.append(f"{type(getattr(argument, '__self__', None)).__name__}()")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(before)


def _is_libraries(code: CodeType) -> bool:
    file = code.co_filename
    standard = file == contextmanager.__code__.co_filename
    return standard or (file.startswith(_LIBRARIES) and file not in _DECORATORS)


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape and type of every tensor in it."""

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        super().__init__(block, graph=graph)
        self.found: dict[fx.Node, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = (value.shape, value.dtype)
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand out lists and dicts that can be written, as the code that was traced does."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(_plainly(value) for value in args), {name: _plainly(value) for name, value in kwargs.items()}


def _plainly(value: Any) -> Any:
    if isinstance(value, list):
        return [_plainly(entry) for entry in value]
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_plainly(entry) for entry in value)
    if isinstance(value, dict):
        return {key: _plainly(entry) for key, entry in value.items()}
    return value


def shapes_of(block: nn.Module, graph: fx.Graph, args: tuple[Any, ...]) -> dict[fx.Node, Shape] | str:
    """Return what every node of a block's graph gives on these arguments, or why it does not run.

    The block is afterwards as it was.
    """
    with preserved(block), torch.no_grad():
        runner = _Shapes(block, graph)
        try:
            runner.run(*args)
        except Exception as error:  # likewise
            return f"its traced graph does not run on what it was given ({type(error).__name__}: {first_line(error)})"
    return runner.found
