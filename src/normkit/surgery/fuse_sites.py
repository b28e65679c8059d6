"""Where in a graph a batch norm is followed by an activation, or by a sum and an activation, and by nothing else."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from ..anatomy.tails import fused_activation
from .fuse_code import Shape

__all__ = ["Site", "find_site", "fuse_site"]

_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    functional.relu: "relu",
    functional.relu6: "relu6",
    functional.silu: "silu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
_SUMS = (operator.add, operator.iadd, torch.add)
_SUM_METHODS = ("add", "add_")
_WRITING = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


@dataclass(frozen=True)
class Site:
    """A batch norm and what is to become one call with it.

    Attributes:
        norm: the call of the batch norm.
        end: the call of the activation.
        activation: its name.
        sum: the sum between the two, if there is one.
    """

    norm: fx.Node
    end: fx.Node
    activation: str
    sum: fx.Node | None = None


def find_site(norm: fx.Node, modules: Mapping[str, nn.Module], shapes: Mapping[fx.Node, Shape]) -> Site | str:
    """Return what can be fused with a batch norm, or why nothing can."""
    if len(norm.args) != 1 or norm.kwargs or not isinstance(norm.args[0], fx.Node):
        return "it is called with more than its input"
    if len(norm.users) != 1:
        return f"its output goes to {len(norm.users)} places"
    user = next(iter(norm.users))
    activation = _activation(user, modules)
    if activation is not None:
        return Site(norm, user, activation)
    residual = _residual(user, norm)
    if residual is None:
        return "no activation that can be fused comes after it"
    if len(user.users) != 1:
        return f"the sum after it goes to {len(user.users)} places"
    end = next(iter(user.users))
    activation = _activation(end, modules)
    if activation is None:
        return "no activation that can be fused comes after the sum"
    if shapes.get(residual) is None or shapes.get(residual) != shapes.get(norm):
        return "what is added to it has another shape or type"
    if user.target in (operator.iadd, "add_") and user.args[0] is residual:
        return "it is added in place to a tensor that others may read"
    if _writes_between(norm, user, modules):
        return "something is written in place between it and the sum"
    return Site(norm, end, activation, user)


def fuse_site(graph: fx.Graph, site: Site) -> None:
    """Put one call of the fused layer in the place of the site."""
    # Read here and not when the site was found: what is added may be the end of a site that was fused since.
    residual = None if site.sum is None else _residual(site.sum, site.norm)
    kwargs: dict[str, Any] = {} if residual is None else {"residual": residual}
    with graph.inserting_before(site.norm if site.sum is None else site.sum):
        fused = graph.call_module(str(site.norm.target), site.norm.args, kwargs)
    site.end.replace_all_uses_with(fused)
    for node in (site.end, site.sum, site.norm):
        if node is not None:
            graph.erase_node(node)


def _activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    if node.op == "call_module":
        return fused_activation(modules[str(node.target)])
    if len(node.all_input_nodes) != 1 or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def _residual(node: fx.Node, norm: fx.Node) -> fx.Node | None:
    """Return the other summand where a node is the sum of the norm's output and one more tensor."""
    is_sum = (node.op == "call_function" and node.target in _SUMS) or (
        node.op == "call_method" and node.target in _SUM_METHODS
    )
    if not is_sum or node.kwargs or len(node.args) != 2:
        return None
    others = [value for value in node.args if value is not norm]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _writes_between(first: fx.Node, last: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Say whether anything between two nodes writes into a tensor: the norm's input would be read after it."""
    node = first.next
    while node is not last:
        if node.op == "call_module" and getattr(modules[str(node.target)], "inplace", False):
            return True
        named = str(node.target).endswith("_") and not str(node.target).endswith("__")
        if node.op == "call_method" and named:
            return True
        if node.op == "call_function" and (node.target in _WRITING or _is_in_place(node)):
            return True
        node = node.next
    return False


def _is_in_place(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    flagged = bool(node.kwargs.get("inplace")) or any(value is True for value in node.args)
    return flagged or "out" in node.kwargs or (name.endswith("_") and not name.endswith("__"))
