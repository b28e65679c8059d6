"""Branches that read one input and are summed, as RepVGG's and MobileOne's: one convolution does the work of them all.

A sum of convolutions of one input is a convolution with the sum of their kernels, the smaller ones in the middle of the
largest; a norm or nothing at all in a branch is a kernel of one tap. The block's code is written anew with one call in
the place of the sum. What this changes is judged with all the rest of a fold, in float64.
"""

import operator
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ..anatomy import Call, NormLayer, affine_in_evaluation, preserved, run
from ..anatomy.places import places_of
from ..errors import SurgeryError
from .entries import own_copy
from .fold_own import plain_convolution
from .fuse_code import is_plain_container, own_graph
from .fused import Program, rewrite
from .transaction import copied

__all__ = ["Merge", "merge_branches"]

_ADDS = (operator.add, operator.iadd, torch.add)
_CLOSE = 1e-9
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Merge:
    """One sum that became one convolution.

    Attributes:
        block: the path of the block whose code was written anew.
        into: the path of the convolution.
        branches: the paths of the others whose work it does.
        norms: the paths of the norms among them.
    """

    block: str
    into: str
    branches: tuple[str, ...]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class _Sum:
    """A sum in a block's graph: its last node, all additions, what is summed, and the input that branches share."""

    root: fx.Node
    inside: list[fx.Node]
    leaves: list[fx.Node]
    input: fx.Node


def merge_branches(
    model: nn.Module, exact: nn.Module, layers: dict[str, NormLayer], example: Any, call: Call | None
) -> list[Merge]:
    """Merge what can be in a folded model and in its form in float64, which are both changed.

    Args:
        model: folded.
        exact: the same in float64, not rounded.
        layers: the norms that may be taken, of ``model``, by their paths.
        example: one batch that the model takes.
        call: how it goes in.
    """
    places = Counter(id(module) for _, module in places_of(model))
    blocks = {path: block for path, block in model.named_modules() if _may_sum(block, places)}
    found = {path: (graph, sums) for path, block in blocks.items() for graph, sums in [_sums(block)] if sums}
    if not found:
        return []
    wanted = [
        _joined(path, str(leaf.target))
        for path, (_, sums) in found.items()
        for each in sums
        for leaf in each.leaves
        if leaf.op == "call_module"
    ]
    shapes, calls = _shapes(model, [*wanted, *found], example, call)
    merges = []
    for path, (graph, sums) in found.items():
        done = []
        for each in sums:
            merge = _merged(model, exact, path, graph, each, layers, shapes, calls)
            if merge is not None:
                done.append(merge)
        if done:
            code = graph.python_code("self")
            for whole in (model, exact):
                rewrite(whole.get_submodule(path), Program.of(code.src, code.globals))
            merges += done
    return merges


def _may_sum(block: nn.Module, places: Counter[int]) -> bool:
    """Say whether a block could be one: it has branches, and stands in one place."""
    if is_plain_container(block) or type(block).__module__.startswith("torch.") or places[id(block)] > 1:
        return False
    return sum(1 for part in block.modules() if isinstance(part, Convolution)) > 0 and len(list(block.children())) > 1


def _sums(block: nn.Module) -> tuple[Any, list[_Sum]]:
    """Return a block's own graph and the sums in it of several branches of one input."""
    graph = own_graph(block)
    if isinstance(graph, str):
        return None, []
    modules = dict(places_of(block))
    taken: set[fx.Node] = set()
    found = []
    for node in reversed(list(graph.nodes)):
        if node in taken or not _is_add(node):
            continue
        inside: list[fx.Node] = []
        leaves: list[fx.Node] = []
        if not _collect(node, node, modules, inside, leaves):
            continue
        taken.update(inside)
        inputs = Counter(leaf.args[0] for leaf in leaves if _is_branch(leaf))
        if not inputs:
            continue
        shared, count = inputs.most_common(1)[0]
        assert isinstance(shared, fx.Node)
        if count + sum(leaf is shared for leaf in leaves) > 1:
            found.append(_Sum(node, inside, leaves, shared))
    return graph, found


def _is_add(node: fx.Node) -> bool:
    plain = node.op == "call_function" and node.target in _ADDS and not node.kwargs and len(node.args) == 2
    return plain or (node.op == "call_method" and node.target in ("add", "add_") and len(node.args) == 2)


def _is_branch(leaf: fx.Node) -> bool:
    alone = len(leaf.users) == 1 and len(leaf.args) == 1 and not leaf.kwargs
    return leaf.op == "call_module" and alone and isinstance(leaf.args[0], fx.Node)


def _collect(
    node: fx.Node, root: fx.Node, modules: dict[str, nn.Module], inside: list[fx.Node], leaves: list[fx.Node]
) -> bool:
    """Gather what a sum adds up; return False where it writes a tensor that others may read."""
    if node is not root and len(node.users) != 1:
        leaves.append(node)
        return True
    if node.op == "call_module" and isinstance(modules[str(node.target)], nn.Identity | _DropoutNd):
        first = node.args[0]
        if isinstance(first, fx.Node) and (_is_add(first) or _is_branch(first)):
            inside.append(node)
            return _collect(first, root, modules, inside, leaves)
    if not _is_add(node):
        leaves.append(node)
        return True
    inside.append(node)
    in_place = node.target in (operator.iadd, "add_")
    for place, value in enumerate(node.args):
        if isinstance(value, int | float) and value == 0:
            continue  # where sums begin
        if not isinstance(value, fx.Node):
            return False
        if in_place and place == 0 and (len(value.users) != 1 or value.op == "placeholder"):
            return False
        if not _collect(value, root, modules, inside, leaves):
            return False
    return True


def _shapes(
    model: nn.Module, paths: list[str], example: Any, call: Call | None
) -> tuple[dict[str, torch.Size], Counter[str]]:
    """Run the model once; return the shapes that some modules are given, and how often each is called."""
    shapes: dict[str, torch.Size] = {}
    calls = Counter[str]()
    with preserved(model), torch.no_grad(), ExitStack() as hooks:
        for path in paths:

            def note(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                calls[path] += 1
                if args and isinstance(args[0], Tensor):
                    shapes[path] = args[0].shape

            hooks.callback(model.get_submodule(path).register_forward_pre_hook(note).remove)
        run(model, own_copy(example), call)
    return shapes, calls


def _merged(
    model: nn.Module,
    exact: nn.Module,
    path: str,
    graph: fx.Graph,
    found: _Sum,
    layers: dict[str, NormLayer],
    shapes: dict[str, torch.Size],
    calls: Counter[str],
) -> Merge | None:
    """Merge one sum and write the graph anew; the models are left alone where nothing can be merged."""
    convolutions: dict[str, tuple[fx.Node, nn.Module]] = {}
    norms: dict[str, tuple[fx.Node, Tensor, Tensor]] = {}
    for leaf in found.leaves:
        if leaf is found.input or not _is_branch(leaf) or leaf.args[0] is not found.input:
            continue
        place = _joined(path, str(leaf.target))
        if calls[place] != calls[path] or place not in shapes or _is_watched(model.get_submodule(place)):
            continue
        norm = layers.get(place)
        if norm is not None and not norm.tail:
            affine = affine_in_evaluation(norm)
            if not isinstance(affine, str) and affine.mixing is None:
                norms[place] = (leaf, affine.scale, affine.shift)
            continue
        convolution = _as_convolution(exact.get_submodule(place), shapes[place])
        if convolution is not None:
            convolutions[place] = (leaf, convolution)
    direct = [leaf for leaf in found.leaves if leaf is found.input]
    kept = _largest_family({place: layer for place, (_, layer) in convolutions.items()})
    if not kept:
        return None
    sizes = {place: convolutions[place][1].get_parameter("weight").shape[2:] for place in kept}
    into = max(kept, key=lambda place: sizes[place].numel())
    kept = [place for place in kept if all(map(operator.le, sizes[place], sizes[into]))]
    made = copied(convolutions[into][1])
    ones = [(scale, shift) for _, scale, shift in norms.values()]
    ones += [(torch.ones_like(scale), torch.zeros_like(scale)) for scale in _ones(made, len(direct))]
    fits = made.get_parameter("weight").shape[0] == made.get_parameter("weight").shape[1] * int(str(made.groups))
    if ones and not (fits and _keeps_places(made)):
        norms, direct, ones = {}, [], []
    if len(kept) + len(ones) < 2:
        return None
    _add_up(made, [convolutions[place][1] for place in kept if place != into], ones)
    if not _is_the_sum(made, [convolutions[place][1] for place in kept], ones, shapes[into]):
        return None
    others = (*(place for place in kept if place != into), *norms)
    for whole in (exact, model):
        old = whole.get_submodule(into)
        dtype = next(value.dtype for value in old.parameters())
        learns = any(value.requires_grad for value in old.parameters())
        whole.set_submodule(into, copied(made).to(dtype).requires_grad_(learns))
        for place in others:
            whole.set_submodule(place, nn.Identity().eval())
    merged = {convolutions[place][0] for place in kept} | {leaf for leaf, _, _ in norms.values()} | set(direct)
    _write(graph, found, str(convolutions[into][0].target), merged)
    return Merge(path, into, others, tuple(norms))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_watched(branch: nn.Module) -> bool:
    """Say whether somebody hooks into a branch, who would see nothing any more."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in branch.modules()
    )


def _as_convolution(branch: nn.Module, shape: torch.Size) -> nn.Module | None:
    """Return the one convolution that a branch is in evaluation, or None."""
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = next(branch.parameters(), None)
    if first is None or branch.training or len(shape) not in (3, 4, 5):
        return None
    try:
        found = plain_convolution(branch, given.to(first.device))
    except (SurgeryError, RuntimeError, TypeError, ValueError):
        return None
    return found if _is_centred(found) else None


def _settings(layer: nn.Module) -> tuple[Any, ...]:
    return layer.stride, layer.groups, layer.padding_mode, layer.get_parameter("weight").shape[:2]


def _is_centred(layer: nn.Module) -> bool:
    """Say whether the middle tap of an odd kernel sees the place of the output, so that kernels lie on each other."""
    assert isinstance(layer, Convolution)
    return all(
        size % 2 == 1 and padding == step * (size // 2)
        for size, padding, step in zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
        if not isinstance(padding, str)
    )


def _keeps_places(layer: nn.Module) -> bool:
    assert isinstance(layer, Convolution)
    return all(step == 1 for step in layer.stride)


def _largest_family(layers: dict[str, nn.Module]) -> list[str]:
    """Return the largest set of convolutions whose kernels can be added."""
    families: dict[Any, list[str]] = {}
    for place, layer in layers.items():
        families.setdefault(_settings(layer), []).append(place)
    best = max(families.values(), key=len, default=[])
    # A kernel of one tap has no dilation.
    steps = {layers[place].dilation for place in best if layers[place].get_parameter("weight")[0, 0].numel() > 1}
    return best if len(steps) < 2 else []


def _ones(made: nn.Module, count: int) -> list[Tensor]:
    return [torch.ones(len(made.get_parameter("weight")), dtype=torch.float64)] * count


def _add_up(made: nn.Module, others: list[nn.Module], ones: list[tuple[Tensor, Tensor]]) -> None:
    """Add kernels and biases to those of the largest convolution, in float64."""
    weight = made.get_parameter("weight").detach().clone()
    bias = None if made.bias is None else made.get_parameter("bias").detach().clone()

    def added(value: Tensor) -> Tensor:
        return value if bias is None else bias + value

    for other in others:
        small = other.get_parameter("weight").detach()
        weight[_middle(weight.shape, small.shape)] += small
        if other.bias is not None:
            bias = added(other.get_parameter("bias").detach())
    middle = _middle(weight.shape, torch.Size([*weight.shape[:2], *(1 for _ in weight.shape[2:])]))
    for scale, shift in ones:
        rows = torch.arange(len(weight), device=weight.device)
        taps = weight[middle].flatten(1)
        taps = taps.clone()
        taps[rows, rows % weight.shape[1]] += scale.to(weight)
        weight[middle] = taps.view(weight[middle].shape)
        bias = added(shift.to(weight))
    with torch.no_grad():
        made.get_parameter("weight").copy_(weight)
        if bias is not None:
            vars(made).pop("bias", None)
            made.bias = nn.Parameter(bias)


def _is_the_sum(
    made: nn.Module, branches: list[nn.Module], ones: list[tuple[Tensor, Tensor]], shape: torch.Size
) -> bool:
    """Compare one convolution with the sum, in float64 on random numbers."""
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        given = given.to(made.get_parameter("weight").device)
        wide = (-1, *(1 for _ in shape[2:]))
        expected = torch.zeros_like(made(given))
        for branch in branches:
            expected += branch(given)
        for scale, shift in ones:
            expected += given * scale.to(given).view(wide) + shift.to(given).view(wide)
        change = (made(given) - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    return bool(change <= _CLOSE)


def _middle(large: torch.Size, small: torch.Size) -> tuple[slice, ...]:
    """Return where a smaller kernel lies in a larger one."""
    spans = []
    for size, own in zip(large[2:], small[2:], strict=True):
        spans.append(slice((size - own) // 2, (size - own) // 2 + own))
    return (slice(None), slice(None), *spans)


def _write(graph: fx.Graph, found: _Sum, into: str, merged: set[fx.Node]) -> None:
    """Put one call, and what is left of the sum, in its place."""
    rest = [leaf for leaf in found.leaves if leaf not in merged]
    with graph.inserting_before(found.root):
        total = graph.call_module(into, (found.input,))
        for leaf in rest:
            total = graph.call_function(operator.add, (total, leaf))
    found.root.replace_all_uses_with(total)
    for node in sorted(found.inside, key=_position(graph).__getitem__, reverse=True):
        graph.erase_node(node)
    for node in merged:
        if node is not found.input:
            graph.erase_node(node)


def _position(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: place for place, node in enumerate(graph.nodes)}
