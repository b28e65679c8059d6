"""What else in a model's code takes the layers that are to become one: methods, and containers that are taken apart."""

import ast
import functools
import inspect
import textwrap
from types import FunctionType

from torch import nn

from .entries import own_functions

__all__ = ["method_that_uses", "takes_apart"]

# Asking about a layer is no use of it.
_QUESTIONS = {"getattr", "hasattr", "isinstance", "setattr"}


def method_that_uses(block: nn.Module, path: str) -> str | None:
    """Return the name of a public method, besides forward, in which a block takes the layer of this path."""
    for name, function in own_functions(block):
        if name[0] != "_" and name != "forward" and any(_leads_to(used, path) for used, _ in _taken(function, path)):
            return name
    return None


def takes_apart(block: nn.Module, path: str) -> str | None:
    """Return the name of a method in which a block does more with the container of this path than to call it."""
    for name, function in own_functions(block):
        if name != "__init__" and any(used == path and not called for used, called in _taken(function, path)):
            return name
    return None


def _leads_to(used: str, path: str) -> bool:
    return used == path or path.startswith(f"{used}.")


def _taken(function: FunctionType, path: str) -> tuple[tuple[str, bool], ...]:
    """Return the uses of a function; code without a text is taken to use this path where it names its beginning."""
    uses = _uses(function)
    if uses is None:
        return ((path, False),) if path.split(".")[0] in function.__code__.co_names else ()
    return uses


@functools.lru_cache(maxsize=1024)
def _uses(function: FunctionType) -> tuple[tuple[str, bool], ...] | None:
    """Return what a function takes of its first argument, as paths, and whether it only calls it; None without text."""
    code = function.__code__
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    first = code.co_varnames[0] if code.co_argcount else ""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    uses = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        above = parents[node]
        names = _chain(node, first)
        if names is None or isinstance(above, ast.Attribute):
            continue
        asked = isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and above.func.id in _QUESTIONS
        if not asked:
            uses.append((".".join(names), isinstance(above, ast.Call) and above.func is node))
    return tuple(uses)


def _chain(node: ast.expr, first: str) -> list[str] | None:
    """Return the names of ``first.a.b``, or None where it begins otherwise."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return names if isinstance(node, ast.Name) and node.id == first else None
