"""Find which norm can be absorbed by which neighbour, and why the others cannot."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..anatomy import Affine, Call, NormLayer, affine_in_evaluation
from ..anatomy.places import places_of
from ..layers import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .fold_arithmetic import FOLDABLE, spread_after, spread_before
from .fold_channels import channels_through, passes
from .fold_own import Way, is_torchs, may_absorb, way_into
from .fold_pairs import Pair, Place, are_as
from .fold_run import Recording, record_run
from .fold_trace import Traces, traced

__all__ = ["Finder"]

# They hold a batch norm and add a residual and an activation: the call that counts is theirs.
_HOLDERS = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)

# Layers whose code is known not to branch on values.
_KNOWN = ("torch.nn.", "normkit.")


class Finder:
    """Asks the recorded runs and the traces of a model about its norms; the model stays as it is."""

    def __init__(self, model: nn.Module, layers: list[NormLayer], example: Any, call: Call | None) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.modules = {id(module): module for module in model.modules()}
        self._places: dict[int, list[str]] = {}
        for path, module in places_of(model):
            self._places.setdefault(id(module), []).append(path)
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

    @property
    def may_branch(self) -> bool:
        """Whether code that no trace shows, of the model or of a layer of one's own, may branch on what it is given."""
        layers = (module for module in self.modules.values() if may_absorb(module) or id(module) in self._norms)
        return not self.is_traced or any(not type(module).__module__.startswith(_KNOWN) for module in layers)

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
        elsewhere = self._stands_elsewhere(module)
        if elsewhere is not None:
            return elsewhere
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
        found: list[list[Place]] = []
        for run in self.runs:
            met = self._met(run, layer, after=after)
            if isinstance(met, str):
                return met if run is self.runs[0] else f"on another size, {met}"
            if met is not None:
                found.append(met)
        if any(not are_as(found[0], other) for other in found[1:]):
            names = " and ".join(self.paths[id(place.layer)] for place in found[0])
            return f"on another size it is not {names}, or not with the same channels"
        pairs: list[Pair] = []
        for place in found[0]:
            pair = self._paired(layer, affine, place, excluded, after=after)
            if isinstance(pair, str):
                return pair
            pairs.append(pair)
        return replace(pairs[0], others=tuple(pairs[1:]))

    def _paired(
        self, layer: NormLayer, affine: Affine, place: Place, excluded: dict[tuple[str, str], str], *, after: bool
    ) -> Pair | str:
        """Return the pair of a norm and one layer beside it."""
        module = place.layer
        path = self.paths[id(module)]
        if (layer.path, path) in excluded:
            return excluded[layer.path, path]
        holder = self._holders.get(id(layer.module), layer.module)
        trace, against = self.traces.witness(*((module, holder) if after else (holder, module)))
        if against is not None:
            return against
        share = place.share_of(affine)
        spread = share if isinstance(share, str) else (spread_after if after else spread_before)(share, place.channels)
        if isinstance(spread, str):
            return f"{path}: {spread}"
        if len(spread.scale) != place.size:
            return f"it takes {len(spread.scale)} of the {place.size} channels of {path}"
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

    def _met(self, run: Recording, layer: NormLayer, *, after: bool) -> list[Place] | str | None:
        """Return the layer that every call of a norm stands beside, or the layers concatenated before it."""
        nodes = self._nodes(run, layer.module)
        if not nodes:
            return None
        found: list[list[Place]] = []
        for node in nodes:
            met = self._before(node, node) if after else self._behind(node)
            if isinstance(met, str):
                return met
            found.append(met)
        for place in found[0]:
            path, calls = self.paths[id(place.layer)], run.calls[id(place.layer)]
            if any(all(other.layer is not place.layer for other in met) for met in found[1:]):
                return f"it is called {len(nodes)} times, beside different layers"
            if calls != len(nodes):
                said = f"{path} is called {calls} times"
                return said + ("" if len(nodes) == 1 else f", and the norm {len(nodes)} times")
        if any(not are_as(found[0], met) for met in found[1:]):
            return f"it is called {len(nodes)} times, on channels in different places"
        against = (self._against_layer(place.layer, self.paths[id(place.layer)]) for place in found[0])
        return next(filter(None, against), found[0])

    def _behind(self, norm: fx.Node) -> list[Place] | str:
        """Go from a norm's call to the layer after it."""
        user = _only_user(norm)
        walked = user if isinstance(user, str) else self._walk(norm, user, after=False)
        if isinstance(walked, str):
            return walked
        end, between = walked
        placed = self._placed(norm, end, between, end.meta["module"], after=False)
        return placed if isinstance(placed, str) else [placed]

    def _before(self, norm: fx.Node, node: fx.Node) -> list[Place] | str:
        """Go from a norm's call back to the layer before it, or to the layers whose outputs are concatenated.

        Args:
            norm: the call.
            node: where to begin: the call, or what is a part of a concatenation before it.
        """
        source = self._source(norm, node) if node is norm else node
        walked = source if isinstance(source, str) else self._walk(norm, source, after=True)
        if isinstance(walked, str):
            return walked
        start, between = walked
        between.reverse()
        if "joined" in start.meta:
            return self._joined(norm, start, between)
        placed = self._placed(start, norm, between, start.meta["module"], after=True)
        return placed if isinstance(placed, str) else [placed]

    def _walk(self, norm: fx.Node, node: fx.Node, *, after: bool) -> tuple[fx.Node, list[fx.Node]] | str:
        """Go from beside a norm's call to a layer or a concatenation, through what passes channels on.

        Returns:
            Where it ends, and what between moves channels; or why it ends elsewhere.
        """
        between: list[fx.Node] = []
        while True:
            module = self._module(node)
            if after and len(node.users) != 1:
                if node.op == "placeholder":
                    return self._in_words(node, "its input comes from")
                return f"the output of {self._name(node)} has {len(node.users)} consumers"
            if module is not None and may_absorb(module) and id(module) not in self._norms:
                break
            if after and "joined" in node.meta and len(node.args) > 1:
                break
            if not self._passes(node, module):
                return self._in_words(node, "its input comes from" if after else "its output goes to")
            between.append(node)
            following = self._source(norm, node) if after else _only_user(node)
            if isinstance(following, str):
                return following
            node = following
        return node, [step for step in between if self._moves(step)]

    def _joined(self, norm: fx.Node, node: fx.Node, between: list[fx.Node]) -> list[Place] | str:
        """Go from a concatenation back to the layers whose outputs it puts side by side."""
        name, shape = self._name(node), node.meta["shape"]
        if node.meta["joined"] != 1:
            return (
                f"its input comes from {name}, which joins along dimension {node.meta['joined']} and not the channels"
            )
        if between and channels_through(between, shape, 1, 1) is not None:
            return f"between it and {name} the channels do not stay together"
        if len(set(node.args)) != len(node.args):
            return f"its input comes from {name}, which is given one tensor twice"
        places: list[Place] = []
        begin = 0
        for part in node.args:
            assert isinstance(part, fx.Node)
            met = self._before(norm, part)
            if isinstance(met, str):
                return f"its input comes from {name}, and of a part of that: {met}"
            width = part.meta["shape"][1]
            for place in met:
                inside = torch.arange(width) if place.taken is None else place.taken
                places.append(replace(place, taken=inside + begin))
            begin += width
        return places

    def _placed(
        self, start: fx.Node, end: fx.Node, between: list[fx.Node], layer: nn.Module, *, after: bool
    ) -> Place | str:
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
        size = shape[axis] if after else reached[axis_after]
        if not between and axis == axis_after:
            return Place(layer, size, None)
        channels = channels_through(between, shape, axis, axis_after)
        if isinstance(channels, str):
            names = ", ".join(self._name(step) for step in between)
            if not between:
                return f"{path} works on {len(shape)} dimensions, so that its channels are not dimension 1"
            return f"between it and {path} the channels do not stay together ({names})"
        return Place(layer, size, channels)

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
        elsewhere = self._stands_elsewhere(module)
        return None if elsewhere is None else f"{path}: {elsewhere}"

    def _stands_elsewhere(self, module: nn.Module) -> str | None:
        """Say which container, that the example does not reach, holds a layer that stands in several places."""
        places = self._places[id(module)]
        for path in places if len(places) > 1 else []:
            home = path.rpartition(".")[0]
            parent = self.model.get_submodule(home)
            if isinstance(parent, nn.Sequential) and not self.runs[0].calls[id(parent)]:
                return f"it stands in {home} ({type(parent).__name__}) too, which the example does not reach"
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
