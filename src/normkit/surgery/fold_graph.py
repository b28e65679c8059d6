"""Find which norm can be absorbed by which neighbour, and why the others cannot."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..anatomy import Affine, Call, NormLayer, affine_in_evaluation
from ..layers import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .fold_arithmetic import FOLDABLE, spread_after, spread_before
from .fold_channels import channels_through, passes
from .fold_own import Way, is_torchs, may_absorb, way_into
from .fold_run import Recording, record_run
from .fold_trace import Traces, traced

__all__ = ["Finder", "Pair"]

# They hold a batch norm and add a residual and an activation: the call that counts is theirs.
_HOLDERS = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)


@dataclass(frozen=True)
class Pair:
    """A norm and the layer that absorbs it.

    Attributes:
        norm: the path of the norm.
        neighbour: the path of the layer.
        norm_is_after: the norm stands after the layer, else before it.
        affine: what the layer absorbs, over its own channels.
        way: how, where the layer's class is not torch's.
        known_from: the block whose traced code shows the pair, ``""`` for the whole model; None where only runs do.
    """

    norm: str
    neighbour: str
    norm_is_after: bool
    affine: Affine
    way: Way
    known_from: str | None


class Finder:
    """Asks the recorded runs and the traces of a model about its norms; the model stays as it is."""

    def __init__(self, model: nn.Module, layers: list[NormLayer], example: Any, call: Call | None) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.modules = {id(module): module for module in model.modules()}
        self.layers = layers
        self._norms = {id(layer.module) for layer in layers}
        self._holders = {id(module.norm): module for module in self.modules.values() if isinstance(module, _HOLDERS)}
        self.model, self.call = model, call
        self.runs = [record_run(model, example, call, self.is_layer)]
        self.traces: Traces = traced(model, self.runs[0], self._norms, self.is_layer)
        self.parameters = Counter(
            id(value) for module in self.modules.values() for value in module.parameters(recurse=False)
        )
        for read in (self.runs[0].read, *(trace.read for trace in self.traces.found)):
            self.parameters.update(read)
        self._folded: set[int] = set()

    @property
    def is_traced(self) -> bool:
        """Whether the whole model's code could be traced."""
        return any(trace.path == "" for trace in self.traces.found)

    def see(self, examples: list[Any]) -> None:
        """Record the model on more examples: a pair must stand together in all of them."""
        for example in examples:
            self.runs.append(record_run(self.model, example, self.call, self.is_layer))
            self.parameters.update(self.runs[-1].read)

    def is_layer(self, module: nn.Module) -> bool:
        """Say whether a module is one call in a graph: a norm, what may absorb one, or a plain part of torch's."""
        if id(module) in self._norms or isinstance(module, _HOLDERS) or may_absorb(module):
            return True
        return type(module).__module__.startswith("torch.nn.") and not list(module.children())

    def find(self, wanted: set[str], excluded: dict[tuple[str, str], str]) -> tuple[list[Pair], dict[str, str]]:
        """Return the pairs for these norms, in the order of folding, and the reasons for those that have none.

        A norm behind a folded norm has the neighbour that the folded one had.
        """
        pairs: list[Pair] = []
        self._folded = set()
        waiting = [layer for layer in self.layers if layer.path in wanted]
        while True:
            found = {layer.path: self._pair(layer, excluded) for layer in waiting}
            new = [pair for pair in found.values() if isinstance(pair, Pair)]
            refused = {path: reason for path, reason in found.items() if isinstance(reason, str)}
            if not new:
                return pairs, refused
            pairs += new
            done = {pair.norm for pair in new}
            self._folded |= {id(layer.module) for layer in waiting if layer.path in done and not layer.tail}
            waiting = [layer for layer in waiting if layer.path not in done]

    def _pair(self, layer: NormLayer, excluded: dict[tuple[str, str], str]) -> Pair | str:
        reason = self.against_norm(layer)
        if reason is not None:
            return reason
        affine = affine_in_evaluation(layer)
        if isinstance(affine, str):
            return affine
        before = self._beside(layer, affine, excluded, after=True)
        if isinstance(before, Pair):
            return before
        if layer.tail or id(layer.module) in self._holders:
            return f"not into what stands before it: {before}; after it comes its own activation"
        after = self._beside(layer, affine, excluded, after=False)
        if isinstance(after, Pair):
            return after
        return f"not into what stands before it: {before}; not into what stands after it: {after}"

    def against_norm(self, layer: NormLayer) -> str | None:
        """Say what in a norm itself stands against folding it."""
        module = layer.module
        if layer.lazy:
            return "it is lazy and has no channels yet"
        if layer.form is not None and module.training and not layer.form.frozen:
            return "it is in training mode, where it is no fixed function; call model.eval() first"
        if layer.parametrized:
            return "its parameters are computed by a parametrization"
        if layer.hooked:
            return "it has hooks, which would be lost"
        if any(
            self.parameters[id(value)] > self._owners(module)
            for value in module._parameters.values()
            if value is not None
        ):
            return "its parameters are used elsewhere too"
        called, seen = self.runs[0].calls[id(module)], len(self._nodes(self.runs[0], module))
        if not called:
            return "the example does not reach it, or its forward is called past its __call__"
        return None if seen else "it is called inside of another layer"

    def _owners(self, module: nn.Module) -> int:
        """Return how many modules may own a norm's parameters: a fused layer has its part's under its own names."""
        holder = self._holders.get(id(module))
        shared = holder is not None and any(value is not None for value in holder._parameters.values())
        return 2 if shared else 1

    def _nodes(self, run: Recording, module: nn.Module) -> list[fx.Node]:
        return run.nodes.get(id(self._holders.get(id(module), module)), [])

    def _beside(
        self, layer: NormLayer, affine: Affine, excluded: dict[tuple[str, str], str], *, after: bool
    ) -> Pair | str:
        """Return the pair of a norm with the layer before it (``after``: the norm stands after) or after it."""
        found: list[tuple[nn.Module, Tensor | None]] = []
        for run in self.runs:
            met = self._met(run, layer, after=after)
            if isinstance(met, str):
                return met if run is self.runs[0] else f"on another size, {met}"
            if met is not None:
                found.append(met)
        module, channels = found[0]
        path = self.paths[id(module)]
        if any(other is not module or not _equal(channels, moved) for other, moved in found[1:]):
            return f"on another size it is not {path}, or not with the same channels"
        if (layer.path, path) in excluded:
            return excluded[layer.path, path]
        holder = self._holders.get(id(layer.module), layer.module)
        trace, against = self.traces.witness(*((module, holder) if after else (holder, module)))
        if against is not None:
            return against
        spread = (spread_after if after else spread_before)(affine, channels)
        if isinstance(spread, str):
            return f"{path}: {spread}"
        way = Way()
        if not is_torchs(module):
            found_way = way_into(module, spread, self.runs[0].given.get(id(module)), after=after)
            if isinstance(found_way, str):
                return f"{path} ({type(module).__name__}) has a forward of its own: {found_way}"
            way = found_way
        elif not after and spread.shift.any() and not _is_one_bias(module, spread.shift):
            return (
                f"{path} pads with zeros, which the norm's shift does not reach, "
                "so that border and interior would need different biases"
            )
        return Pair(layer.path, path, after, spread, way, None if trace is None else trace.path)

    def _met(self, run: Recording, layer: NormLayer, *, after: bool) -> tuple[nn.Module, Tensor | None] | str | None:
        """Return the layer that every call of a norm stands beside, and which of its channels are which."""
        nodes = self._nodes(run, layer.module)
        if not nodes:
            return None
        found: list[tuple[nn.Module, Tensor | None]] = []
        for node in nodes:
            met = self._walk(run, node, after=after)
            if isinstance(met, str):
                return met
            found.append(met)
        module, channels = found[0]
        path = self.paths[id(module)]
        calls = run.calls[id(module)]
        if any(other is not module for other, _ in found[1:]):
            return f"it is called {len(nodes)} times, beside different layers"
        if calls != len(nodes):
            return f"{path} is called {calls} times" + ("" if len(nodes) == 1 else f", and the norm {len(nodes)} times")
        if any(not _equal(channels, moved) for _, moved in found[1:]):
            return f"it is called {len(nodes)} times, on channels in different places"
        return self._against_layer(module, path) or (module, channels)

    def _walk(self, run: Recording, norm: fx.Node, *, after: bool) -> tuple[nn.Module, Tensor | None] | str:
        """Go from a norm's call to the layer before or after it, through what passes channels on."""
        between: list[fx.Node] = []
        node = norm
        while True:
            node_or_reason = self._source(norm, node) if after else _only_user(node)
            if isinstance(node_or_reason, str):
                return node_or_reason
            node = node_or_reason
            module = self._module(node)
            if after and len(node.users) != 1:
                if node.op == "placeholder":
                    return self._in_words(node, "its input comes from")
                return f"the output of {self._name(node)} has {len(node.users)} consumers"
            if module is not None and may_absorb(module) and id(module) not in self._norms:
                break
            if not self._passes(node, module):
                return self._in_words(node, "its input comes from" if after else "its output goes to")
            between.append(node)
        between = [step for step in between if self._moves(step)]
        start, end = (node, norm) if after else (norm, node)
        if after:
            between.reverse()
        return self._placed(start, end, between, module, after=after)

    def _placed(
        self, start: fx.Node, end: fx.Node, between: list[fx.Node], layer: nn.Module, *, after: bool
    ) -> tuple[nn.Module, Tensor | None] | str:
        """Find out which channels of the layer are which of the norm's."""
        shape = start.meta.get("shape")
        if shape is None:
            return f"the output of {self._name(start)} is not one tensor"
        path = self._name(start if after else end)
        reached = between[-1].meta.get("shape") if between else shape
        if reached is None:
            return "what stands between gives more than one tensor"
        axis, axis_after = 1, 1
        if after:
            axis = self._axis(layer, shape)
        else:
            axis_after = self._axis(layer, reached)
        if axis >= len(shape) or axis_after >= len(reached):
            return f"{path} works on {len(shape)} dimensions, so that its channels are not dimension 1"
        if not between and axis == axis_after:
            return layer, None
        channels = channels_through(between, shape, axis, axis_after)
        if isinstance(channels, str):
            names = ", ".join(self._name(step) for step in between)
            if not between:
                return f"{path} works on {len(shape)} dimensions, so that its channels are not dimension 1"
            return f"between it and {path} the channels do not stay together ({names})"
        return layer, channels

    def _axis(self, layer: nn.Module, shape: tuple[int, ...]) -> int:
        """Return where a layer has its channels in a tensor of this shape."""
        if isinstance(layer, nn.Linear) or not isinstance(layer, FOLDABLE):
            own = 1 if not isinstance(layer, nn.Linear) and len(shape) > 3 else len(shape) - 1
            return max(own, 0)
        assert isinstance(layer.kernel_size, tuple)
        return len(shape) - len(layer.kernel_size) - 1

    def _against_layer(self, module: nn.Module, path: str) -> str | None:
        """Say what in a layer itself stands against changing its weights."""
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            return f"{path} is lazy and has no weight yet"
        if any(type(hook).__module__.startswith("torch.nn.utils.") for hook in module._forward_pre_hooks.values()):
            return (
                f"the weight of {path} is computed by a hook (torch.nn.utils.weight_norm or spectral_norm); "
                "torch.nn.utils.remove_weight_norm or remove_spectral_norm makes it a weight again"
            )
        if is_parametrized(module):
            return (
                f"the weight of {path} is computed by a parametrization; "
                "torch.nn.utils.parametrize.remove_parametrizations makes it a weight again"
            )
        if module._forward_pre_hooks or module._forward_hooks or module._backward_hooks:
            return f"{path} has hooks"
        if any(self.parameters[id(value)] > 1 for value in module._parameters.values() if value is not None):
            return f"the parameters of {path} are used elsewhere too"
        return None

    def _source(self, norm: fx.Node, node: fx.Node) -> fx.Node | str:
        """Return the only node that a node reads; a residual does not count, it is added after the norm."""
        sources = list(node.args)
        if node is norm and isinstance(self._module(node), _HOLDERS):
            sources = sources[:1]
        if node is norm and len(sources) > 1:
            return "it is called with more than its input"
        unique = list(dict.fromkeys(sources))
        return (
            unique[0] if len(unique) == 1 and isinstance(unique[0], fx.Node) else "its input comes from several places"
        )

    def _passes(self, node: fx.Node, module: nn.Module | None) -> bool:
        if len(node.args) != 1:
            return False
        return self._is_gone(module) or passes(node, module)

    def _is_gone(self, module: nn.Module | None) -> bool:
        """Say whether a module is a norm that is folded, so that nothing is left in its place."""
        return module is not None and id(module) in self._folded

    def _moves(self, node: fx.Node) -> bool:
        module = self._module(node)
        return not (self._is_gone(module) or type(module) is nn.Identity)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return node.meta.get("module") if node.op == "call_module" else None

    def _name(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else getattr(node.target, "__name__", str(node.target))

    def _in_words(self, node: fx.Node, how: str) -> str:
        module = self._module(node)
        if module is not None:
            return f"{how} {node.target} ({type(module).__name__})"
        names = {"input": "the model's input", "unseen": "code that no trace sees", "output": "the model's output"}
        return f"{how} {names.get(str(node.target), self._name(node))}"


def _only_user(node: fx.Node) -> fx.Node | str:
    users = list(node.users)
    if len(users) != 1:
        return f"its output goes to {len(users)} places"
    return users[0]


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _is_one_bias(module: nn.Module, shift: Tensor) -> bool:
    """Say whether a shift of a layer's inputs adds the same to its output at every position.

    Padding by reflection, replication or wrapping repeats data, which the norm has shifted. Zeros are not shifted: what
    the taps that can lie on them make of the shift has to be nothing.
    """
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    if module.padding_mode != "zeros" or module.padding == "valid":
        return True
    weight = module.weight.detach().double()
    shifts = shift.to(weight).view(module.groups, 1, -1).expand(-1, len(weight) // module.groups, -1)
    taps = (weight.flatten(2) * shifts.reshape(*weight.shape[:2], 1)).sum(1)  # (C_out, taps)
    always = torch.ones(weight.shape[2:], dtype=torch.bool, device=weight.device)
    for axis, (size, step) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        reach = step * (size - 1)
        if isinstance(module.padding, str):
            left, right = reach // 2, reach - reach // 2
        else:
            left = right = module.padding[axis]
        places = torch.arange(size, device=weight.device) * step
        on_data = (places >= left) & (places <= reach - right)
        always &= on_data.view(-1, *(1 for _ in range(always.ndim - axis - 1)))
    return not bool(taps[:, ~always.flatten()].any())
