"""What else in a model's code takes the layers that are to become one: methods, and containers that are taken apart."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["method_that_uses", "takes_apart"]

# Asking about a layer is no use of it.
_QUESTIONS = {"getattr", "hasattr", "isinstance", "setattr"}


def method_that_uses(block: nn.Module, path: str) -> str | None:
    """Return the name of a public method, besides forward, in which a block takes the layer of this path."""
    for name, function in _methods(block):
        if name[0] != "_" and name != "forward" and any(_leads_to(used, path) for used, _ in _uses(function, path)):
            return name
    return None


def takes_apart(block: nn.Module, path: str) -> str | None:
    """Return the name of a method in which a block does more with the container of this path than to call it."""
    for name, function in _methods(block):
        if name != "__init__" and any(used == path and not called for used, called in _uses(function, path)):
            return name
    return None


def _methods(block: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    for cls in type(block).__mro__:
        if cls is nn.Module or cls.__module__.startswith("torch.nn."):
            return
        yield from ((name, function) for name, function in vars(cls).items() if inspect.isfunction(function))


def _leads_to(used: str, path: str) -> bool:
    return used == path or path.startswith(f"{used}.")


def _uses(function: Callable[..., Any], path: str) -> Iterator[tuple[str, bool]]:
    """Yield what a function takes of its first argument, as a path, and whether it only calls it."""
    code = function.__code__
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        # Code without a text is taken to use what it names.
        if path.split(".")[0] in code.co_names:
            yield path, False
        return
    first = code.co_varnames[0] if code.co_argcount else ""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        above = parents[node]
        names = _chain(node, first)
        if names is None or isinstance(above, ast.Attribute):
            continue
        asked = isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and above.func.id in _QUESTIONS
        if not asked:
            yield ".".join(names), isinstance(above, ast.Call) and above.func is node


def _chain(node: ast.expr, first: str) -> list[str] | None:
    """Return the names of ``first.a.b``, or None where it begins otherwise."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return names if isinstance(node, ast.Name) and node.id == first else None
