"""What traced code knows beyond one run: that a norm and its neighbour stand together whatever the data are.

A model is traced as a whole where that works, else block by block. Where neither works, there is the recorded run.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from ..anatomy import preserved
from ..anatomy.places import places_of
from ..printable import first_line
from .fold_run import Recording

__all__ = ["Trace", "Traces", "traced"]

_FORM = {"size", "dim", "ndimension", "numel", "stride", "is_contiguous"}
_FORM_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout"}


@dataclass(frozen=True)
class Trace:
    """The code of one block as a graph.

    Attributes:
        path: the block; ``""`` is the whole model.
        nodes: the calls of each layer, by ``id``.
        read: the ids of the parameters that the code reads past their layer.
    """

    path: str
    nodes: dict[int, list[fx.Node]]
    read: set[int]


@dataclass
class Traces:
    """The traces of a model, and why there is none of some blocks."""

    found: list[Trace] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def witness(self, first: nn.Module, second: nn.Module) -> tuple[Trace | None, str | None]:
        """Return the trace in which the output of ``first`` goes to ``second`` alone, or what speaks against it.

        Neither is given where no trace holds both layers.
        """
        for trace in self.found:
            starts, ends = trace.nodes.get(id(first), []), trace.nodes.get(id(second), [])
            if not starts or not ends:
                continue
            if len(starts) != len(ends):
                return None, f"its code calls the one {len(starts)} times and the other {len(ends)} times"
            for start in starts:
                against = _against(start, ends)
                if against is not None:
                    return None, against
            return trace, None
        return None, None


def traced(model: nn.Module, recording: Recording, wanted: set[int], is_layer: Callable[[nn.Module], bool]) -> Traces:
    """Trace a model, or those of its blocks that can be traced and hold wanted layers; it is afterwards as it was."""
    traces = Traces()
    _visit("", model, model, recording, wanted, is_layer, traces)
    return traces


def _visit(
    path: str,
    block: nn.Module,
    model: nn.Module,
    recording: Recording,
    wanted: set[int],
    is_layer: Callable[[nn.Module], bool],
    traces: Traces,
) -> None:
    if is_layer(block) or not any(id(part) in wanted for part in block.modules()):
        return
    fixed = recording.fixed.get(id(block))
    if recording.calls[id(block)] and fixed is not None:
        try:
            with preserved(block):
                graph = _Tracer(is_layer).trace(block, concrete_args=fixed)
        except Exception as error:
            traces.failed[path] = f"{type(error).__name__}: {first_line(error)[:200]}"
        else:
            traces.found.append(_trace(path, block, graph))
            return
    elif recording.calls[id(block)]:
        traces.failed[path] = "its calls differ in the arguments that are no tensors"
    for name, child in block.named_children():
        _visit(f"{path}.{name}" if path else name, child, model, recording, wanted, is_layer, traces)


class _Tracer(fx.Tracer):
    """Traces down to the layers that matter here, so that control flow in anything else does no harm."""

    def __init__(self, is_layer: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_layer = is_layer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._is_layer(m) or super().is_leaf_module(m, module_qualified_name):
            return True
        return not any(self._is_layer(part) and next(part.parameters(), None) is not None for part in m.modules())


def _trace(path: str, block: nn.Module, graph: fx.Graph) -> Trace:
    modules = dict(places_of(block))
    nodes: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            nodes.setdefault(id(modules[str(node.target)]), []).append(node)
    return Trace(path, nodes, set(_read_directly(block, graph)))


def _read_directly(block: nn.Module, graph: fx.Graph) -> Iterator[int]:
    for node in graph.nodes:
        if node.op == "get_attr":
            value: object = block
            for name in str(node.target).split("."):
                value = getattr(value, name, None)  # what the tracer itself put there is gone again
            if value is not None:
                yield id(value)


def _against(start: fx.Node, ends: list[fx.Node]) -> str | None:
    """Follow a layer's output to the other layer; return what else takes it on the way."""
    node, passed = start, Counter[fx.Node]()
    while node not in ends:
        users = [user for user in node.users if not _asks_for_form(user, node)]
        passed[node] += 1
        if len(users) != 1 or passed[node] > 1:
            names = ", ".join(str(user.target) for user in users[:3])
            return f"its code gives the output of {start.target} to {len(users)} places ({names})"
        node = users[0]
    return None


def _asks_for_form(user: fx.Node, node: fx.Node) -> bool:
    """Say whether a node only takes the shape or the type of another."""
    if user.op == "call_method":
        lends = str(user.target).endswith("_as") and user.args[0] is not node
        return lends or user.target in _FORM
    name = getattr(user.target, "__name__", "")
    return user.op == "call_function" and name == "getattr" and user.args[1] in _FORM_ATTRIBUTES
