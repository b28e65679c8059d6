"""Find, on the traced graph, which batch norm can be absorbed by which neighbour, and why the others cannot."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..anatomy import NormLayer
from ..errors import SurgeryError
from ..layers import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .fold_arithmetic import FOLDABLE, Affine, Linear, affine_of, channels_in, channels_out
from .observe import Observed

__all__ = ["Pair", "find_pairs", "trace"]

# What torch.fx was seen to raise on code that cannot be traced.
_UNTRACEABLE = (
    fx.proxy.TraceError,
    TypeError,
    RuntimeError,
    ValueError,
    AttributeError,
    LookupError,
    NotImplementedError,
    AssertionError,
)


# They hold a batch norm and add a residual and an activation: the call that counts is theirs.
_HOLDERS = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)


@dataclass(frozen=True)
class Pair:
    """A batch norm and the layer that absorbs it.

    Attributes:
        norm: the path of the batch norm.
        neighbour: the path of the layer.
        norm_is_after: the norm stands after the layer, else before it.
    """

    norm: str
    neighbour: str
    norm_is_after: bool


class _Tracer(fx.Tracer):
    """Traces down to the layers that matter here, so that control flow in anything else does no harm."""

    def __init__(self, norms: set[int]) -> None:
        super().__init__()
        self._norms = norms

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = id(m) in self._norms or isinstance(m, (Linear, *_HOLDERS))
        if known or super().is_leaf_module(m, module_qualified_name):
            return True
        return not any(id(part) in self._norms or isinstance(part, FOLDABLE) for part in m.modules())


def trace(model: nn.Module, layers: list[NormLayer], fixed: dict[str, Any]) -> fx.Graph:
    """Trace a model, with the arguments that are no tensors fixed at their values.

    Raises:
        SurgeryError: its code depends on data or cannot be traced for another reason.
    """
    try:
        return _Tracer({id(layer.module) for layer in layers}).trace(model, concrete_args=fixed)
    except _UNTRACEABLE as error:
        reason = str(error).strip().split("\n")[0]
        raise SurgeryError(
            f"fold: the graph of {type(model).__name__} cannot be traced ({type(error).__name__}: {reason}), so that "
            "nothing is known of what stands beside a norm; fold the parts of the model one by one"
        ) from error


class _Finder:
    """The questions asked about one graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph, observed: Observed) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.observed = observed
        self.calls = Counter(id(self.modules[node.target]) for node in graph.nodes if node.op == "call_module")
        self.nodes = {id(self.modules[node.target]): node for node in graph.nodes if node.op == "call_module"}
        owners = {id(module): module for module in self.modules.values()}.values()
        for holder in owners:
            if isinstance(holder, _HOLDERS) and id(holder) in self.nodes:
                self.nodes[id(holder.norm)] = self.nodes[id(holder)]
                self.calls[id(holder.norm)] = self.calls[id(holder)]
        self.parameters = Counter(id(value) for owner in owners for value in owner._parameters.values())
        self.parameters.update(_read_directly(model, graph))

    def pair(self, layer: NormLayer) -> Pair | str:
        """Return the pair of a norm, or the reason why there is none."""
        reason = self._against_norm(layer)
        if reason is not None:
            return reason
        node, affine = self.nodes[id(layer.module)], affine_of(layer.module)
        before = self._before(node)
        reason_before = self._against_before(before, layer)
        if reason_before is None:
            assert before is not None
            return Pair(layer.path, str(before.target), norm_is_after=True)
        if isinstance(self.modules[str(node.target)], _HOLDERS):
            return f"not into what stands before it: {reason_before}; after it comes its own activation"
        after = self._after(node)
        reason_after = self._against_after(after, layer, affine)
        if reason_after is None:
            assert after is not None
            return Pair(layer.path, str(after.target), norm_is_after=False)
        return f"not into what stands before it: {reason_before}; not into what stands after it: {reason_after}"

    def _against_norm(self, layer: NormLayer) -> str | None:
        module = layer.module
        if not isinstance(module, _BatchNorm):
            return f"a {type(module).__name__} computes its statistics from the input, in evaluation too"
        if layer.lazy:
            return "it is lazy and has no channels yet"
        if layer.overridden:
            return f"{type(module).__name__} has a forward of its own"
        if module.training:
            return "it is in training mode, where it is no fixed function; call model.eval() first"
        if module.running_mean is None:
            return "it has no running statistics"
        if layer.hooked:
            return "it has hooks, which would be lost"
        if layer.parametrized:
            return "its parameters are computed by a parametrization"
        if any(self.parameters[id(value)] > 1 for value in module._parameters.values() if value is not None):
            return "its parameters are used elsewhere too"
        called, seen = self.calls[id(module)], self.observed.calls[id(module)]
        if called != 1 or seen != 1:
            return f"it is called {seen} times" if seen != 1 else f"the graph calls it {called} times"
        return None

    def _against_before(self, node: fx.Node | None, layer: NormLayer) -> str | None:
        """Say why the layer before cannot take the norm, or return None."""
        if node is None:
            return self._neighbour_in_words(self._input(self.nodes[id(layer.module)]), "its input comes from")
        module = self.modules[str(node.target)]
        reason = self._against_layer(module, str(node.target))
        if reason is not None:
            return reason
        assert isinstance(module, Linear)
        if channels_out(module) != layer.channels:
            return f"{node.target} gives {channels_out(module)} channels, the norm has {layer.channels}"
        return self._against_layout(module, str(node.target), self.observed.outputs.get(id(module)))

    def _against_after(self, node: fx.Node | None, layer: NormLayer, affine: Affine) -> str | None:
        """Say why the layer after cannot take the norm, or return None."""
        if node is None:
            users = list(self.nodes[id(layer.module)].users)
            if len(users) != 1:
                return f"its output goes to {len(users)} places"
            return self._neighbour_in_words(users[0], "its output goes to")
        module = self.modules[str(node.target)]
        reason = self._against_layer(module, str(node.target))
        if reason is not None:
            return reason
        assert isinstance(module, Linear)
        if channels_in(module) != layer.channels:
            return f"{node.target} takes {channels_in(module)} channels, the norm has {layer.channels}"
        if affine.shift.any() and not _sees_all_taps(module):
            return (
                f"{node.target} pads with zeros, which the norm's shift does not reach, "
                "so that border and interior would need different biases"
            )
        return self._against_layout(module, str(node.target), self.observed.inputs.get(id(module)))

    def _against_layer(self, module: nn.Module, path: str) -> str | None:
        """Say what in a layer itself stands against changing its weights."""
        if type(module).forward not in {cls.forward for cls in FOLDABLE} or "forward" in vars(module):
            return f"{path} ({type(module).__name__}) has a forward of its own"
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            return f"{path} is lazy and has no weight yet"
        if self.calls[id(module)] != 1 or self.observed.calls[id(module)] != 1:
            times = max(self.calls[id(module)], self.observed.calls[id(module)])
            return f"{path} is called {times} times"
        if is_parametrized(module) or module._forward_pre_hooks or module._forward_hooks or module._backward_hooks:
            return f"{path} has hooks or a parametrization"
        if any(self.parameters[id(value)] > 1 for value in module._parameters.values() if value is not None):
            return f"the parameters of {path} are used elsewhere too"
        return None

    def _against_layout(self, module: nn.Module, path: str, shape: tuple[int, ...] | None) -> str | None:
        """Make sure that the layer's channels lie where a norm has them, in dimension 1."""
        wanted = 2 if isinstance(module, nn.Linear) else int(type(module).__name__[-2]) + 2
        if shape is None or len(shape) == wanted:
            return None
        return f"{path} works on {len(shape)} dimensions, so that its channels are not dimension 1"

    def _before(self, node: fx.Node) -> fx.Node | None:
        """Return the layer whose output is the norm's input and nothing else's."""
        source = self._input(node)
        while source is not None and len(source.users) == 1 and self._is_transparent(source):
            source = self._input(source)
        if source is None or len(source.users) != 1 or not self._is_foldable(source):
            return None
        return source

    def _after(self, node: fx.Node) -> fx.Node | None:
        """Return the only layer to which the norm's output goes."""
        while len(node.users) == 1:
            node = next(iter(node.users))
            if self._is_foldable(node):
                return node
            if not self._is_transparent(node):
                return None
        return None

    def _input(self, node: fx.Node) -> fx.Node | None:
        """Return the only node that a node reads; a residual does not count, it is added after the norm."""
        sources = node.all_input_nodes
        if node.op == "call_module" and isinstance(self.modules[str(node.target)], _HOLDERS):
            sources = [source for source in (*node.args[:1], node.kwargs.get("input")) if isinstance(source, fx.Node)]
        return sources[0] if len(sources) == 1 else None

    def _is_foldable(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], FOLDABLE)

    def _is_transparent(self, node: fx.Node) -> bool:
        """Say whether a node passes its input on as it is."""
        if node.op != "call_module":
            return False
        module = self.modules[str(node.target)]
        bare = not (module._forward_hooks or module._forward_pre_hooks)
        return bare and (type(module) is nn.Identity or (isinstance(module, _DropoutNd) and not module.training))

    def _neighbour_in_words(self, node: fx.Node | None, how: str) -> str:
        if node is None:
            return f"{how} more than one place"
        if self._is_foldable(node):
            return f"the output of {node.target} has {len(node.users)} consumers"
        if node.op == "call_module":
            return f"{how} {node.target} ({type(self.modules[str(node.target)]).__name__})"
        names = {"placeholder": "the model's input", "output": "the model's output"}
        return f"{how} {names.get(node.op, getattr(node.target, '__name__', str(node.target)))}"


def find_pairs(
    model: nn.Module, graph: fx.Graph, layers: list[NormLayer], observed: Observed
) -> tuple[list[Pair], dict[str, str]]:
    """Return the pairs that can be folded, and the reasons for the other layers.

    A layer takes part in one pair at most: what is folded has other weights, and the next question is a new one.
    """
    finder, pairs, refused, taken = _Finder(model, graph, observed), [], {}, set()
    for layer in layers:
        try:
            found = finder.pair(layer)
        except SurgeryError as error:
            found = str(error)
        if isinstance(found, str):
            refused[layer.path] = found
        elif found.neighbour not in taken:
            taken.add(found.neighbour)
            pairs.append(found)
    return pairs, refused


def _sees_all_taps(module: nn.Module) -> bool:
    """Say whether every output position sees data under every tap of the kernel.

    Padding by reflection, replication or wrapping repeats data, which the norm has shifted.
    """
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    if module.padding_mode != "zeros" or module.padding == "valid":
        return True
    if isinstance(module.padding, str):
        return all(size == 1 for size in module.kernel_size)
    return not any(module.padding)


def _read_directly(model: nn.Module, graph: fx.Graph) -> Iterator[int]:
    """Yield the parameters that the model's own code reads, past the layer they belong to."""
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        value: Any = model
        for name in str(node.target).split("."):
            value = getattr(value, name)
        yield id(value)
