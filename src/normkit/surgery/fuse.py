"""Let batch norms of ours compute the activation, and the sum with a shortcut, that come after them."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, NormLayer, norm_layers, preserved, run
from ..anatomy.batches import tensors
from ..anatomy.frozen import is_frozen
from ..anatomy.places import places_of
from ..anatomy.tails import fused_activation
from .convert_classes import OURS
from .entries import entries_of, own_copy
from .fuse_code import is_plain_container, own_graph, shapes_of
from .fuse_sites import Site, find_site, fuse_site
from .fuse_uses import method_that_uses, takes_apart
from .fused import Absorbed, Program, hold, is_ours, rewrite, unfuse
from .observe import Observed, observe
from .outputs import difference, measured
from .training_step import training_change
from .transaction import copied
from .verify import change_between, entered

__all__ = ["Fusions", "fuse"]

_TOLERANCE = 1e-5


@dataclass
class Fusions:
    """What was fused and what was not, by the norm's path.

    Attributes:
        fused: what the layer computes now besides, such as ``"relu"`` or ``"residual and relu"``.
        left: why nothing was fused with it.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def fuse(model: nn.Module, work: nn.Module, layers: list[NormLayer], examples: list[Any], call: Call | None) -> Fusions:
    """Fuse what can be in a copy of a model, and compare the two in evaluation and in a training step.

    A norm and the activation after it become one layer where nobody else sees what is between them: inside a
    container, or in a block whose own code was traced and is written anew. Where the comparison fails, all is undone.

    Args:
        model: what to compare with; not changed.
        work: its copy, with layers of ours in it; changed.
        layers: the norms of the copy that may be fused.
        examples: batches of several sizes; the model is trained on the first.
        call: how they go into the model.
    """
    job = _Job(work, {id(layer.module): layer for layer in layers}, examples[0], call)
    job.fuse_in_containers()
    job.fuse_in_blocks()
    for layer in job.candidates.values():
        if layer.path not in job.done.fused:
            job.done.left.setdefault(layer.path, "no activation that can be fused comes after it")
    if not job.done.fused:
        return job.done
    change = _change(model, work, examples, call)
    reason = None if change <= _TOLERANCE else f"the fused model was measured to differ by {change:.3g}"
    reason = reason or _changed_elsewhere(model, work, examples[0], call)
    if reason is not None:
        unfuse(work, set(job.candidates))
        return Fusions(left=job.done.left | dict.fromkeys(job.done.fused, reason))
    return job.done


def _change(model: nn.Module, work: nn.Module, examples: list[Any], call: Call | None) -> float:
    """Return the larger of the changes in evaluation and in training; infinite where the copy does not run."""
    before, after = copied(model).eval(), copied(work).eval()
    try:
        changes = [change_between(before, after, example, call) for example in examples]
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return float("inf")
    return max(*changes, training_change(model, work, examples[0], call))


def _changed_elsewhere(model: nn.Module, work: nn.Module, example: Any, call: Call | None) -> str | None:
    """Say which other way into the model, a switch of forward or a method, gives something else in the copy."""
    entries = entries_of(model, example, call, {id(layer.module) for layer in norm_layers(model)})
    before, after = (copied(net).eval() for net in (model, work))
    for entry in entries.found:
        expected = entered(before, entry, exactly=False)
        if expected is None:
            continue
        found = entered(after, entry, exactly=False)
        if found is None:
            return f"with it fused, {entry.words} fails"
        change = measured(difference, expected, found)
        if change is None or not change <= _TOLERANCE:
            return f"with it fused, what {entry.words} gives is another"
    return None


class _Job:
    """One model and the norms that may be fused in it."""

    def __init__(self, work: nn.Module, layers: dict[int, NormLayer], example: Any, call: Call | None) -> None:
        self.work = work
        self.done = Fusions()
        self.names = Counter(id(module) for _, module in places_of(work))
        self.observed, self.given = _observe(work, example, call)
        self.candidates: dict[int, NormLayer] = {}
        for key, layer in layers.items():
            reason = self._against(layer)
            if reason is None:
                self.candidates[key] = layer
            else:
                self.done.left[layer.path] = reason

    def fuse_in_containers(self) -> None:
        """Fuse a norm with the activation module that follows it in a container."""
        for path, container in [(path, part) for path, part in self.work.named_modules() if is_plain_container(part)]:
            children = list(container._modules.items())
            for (name, norm), (next_name, module) in itertools.pairwise(children):
                if norm is None or module is None or id(norm) not in self.candidates:
                    continue
                activation = fused_activation(module)
                calls = {self.observed.calls[id(part)] for part in (container, norm, module)}
                if activation is None or len(calls) != 1 or calls == {0} or self.names[id(module)] != 1:
                    continue
                apart = self._taken_apart(path)
                if apart is not None:
                    self.done.left[self.candidates[id(norm)].path] = apart
                    continue
                self._note(norm, activation)
                container._modules[name] = hold(norm, _dimensions(norm), activation)
                container._modules[next_name] = Absorbed(module)

    def _taken_apart(self, path: str) -> str | None:
        """Say which code does more with a container than to call it, and so may take other parts of it together."""
        names = path.split(".")
        for depth in range(len(names) if path else 0):
            owner, inside = ".".join(names[:depth]), ".".join(names[depth:])
            block = self.work.get_submodule(owner)
            method = None if is_plain_container(block) else takes_apart(block, inside)
            if method is not None:
                name = f"{owner}.{method}" if owner else method
                return f"{name} takes {path} apart, by parts of which the fused layer may be one"
        return None

    def fuse_in_blocks(self) -> None:
        """Fuse what stands in the code of a block, and write the code anew."""
        for path, block in list(self.work.named_modules()):
            if is_plain_container(block) or is_ours(block):
                continue
            if not any(id(norm) in self.candidates for norm in _parts(block)):
                continue
            reason = self._fuse_in_block(block)
            for norm in _parts(block):
                if id(norm) in self.candidates and reason is not None:
                    name = path or "the model itself"
                    self.done.left.setdefault(self.candidates[id(norm)].path, f"{name}: {reason}")

    def _fuse_in_block(self, block: nn.Module) -> str | None:
        args = self.given.get(id(block))
        if args is None:
            return "it was not called, or not with tensors alone"
        graph = own_graph(block)
        if isinstance(graph, str):
            return graph
        modules = dict(places_of(block))
        shapes = shapes_of(block, graph, args)
        if isinstance(shapes, str):
            return shapes
        calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
        sites: list[Site] = []
        for node in [node for node in graph.nodes if node.op == "call_module"]:
            norm = modules[str(node.target)]
            if id(norm) not in self.candidates:
                continue
            if calls[id(norm)] != 1 or self.observed.calls[id(norm)] != self.observed.calls[id(block)]:
                self.done.left[self.candidates[id(norm)].path] = "it is called several times"
                continue
            method = method_that_uses(block, str(node.target))
            site = find_site(node, modules, shapes) if method is None else f"the method {method} takes it too"
            if isinstance(site, str):
                self.done.left[self.candidates[id(norm)].path] = site
            elif site.sum is None or all(site.sum is not other.sum for other in sites):
                sites.append(site)
            else:
                self.done.left[self.candidates[id(norm)].path] = "the other summand is fused already"
        self._write(block, graph, sites, modules)
        return None

    def _write(self, block: nn.Module, graph: Any, sites: list[Site], modules: dict[str, nn.Module]) -> None:
        """Put the fused layers into a block and give it the code that calls them."""
        for site in sites:
            norm = modules[str(site.norm.target)]
            self._note(norm, site.activation if site.sum is None else f"residual and {site.activation}")
            fuse_site(graph, site)
            block.set_submodule(str(site.norm.target), hold(norm, _dimensions(norm), site.activation))
        if sites:
            code = graph.python_code("self")
            rewrite(block, Program.of(code.src, code.globals))

    def _note(self, norm: nn.Module, words: str) -> None:
        path = self.candidates[id(norm)].path
        self.done.fused[path] = words
        self.done.left.pop(path, None)

    def _against(self, layer: NormLayer) -> str | None:
        """Say what in the norm itself stands against fusing it."""
        if is_frozen(layer.module):
            return "it is frozen; normkit.unfreeze it first"
        if type(layer.module) not in OURS.values():
            return "it is no batch norm of ours"
        if layer.hooked:
            return "it has hooks, which see its output"
        if layer.aliases:
            return "it stands in several places"
        if layer.path == "":
            return "it is the model itself"
        return None


def _parts(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the norms that the block's own code calls: its children, and those inside its plain containers."""
    for child in block.children():
        if is_plain_container(child):
            yield from _parts(child)
        elif not is_ours(child):
            yield child


def _dimensions(norm: nn.Module) -> int:
    return next(dimensions for dimensions, cls in OURS.items() if type(norm) is cls)


def _observe(model: nn.Module, example: Any, call: Call | None) -> tuple[Observed, dict[int, tuple[Tensor, ...]]]:
    """Run the model once; return what was seen, and the arguments of each module that was given tensors alone."""
    given: dict[int, tuple[Tensor, ...]] = {}
    spoiled: set[int] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs or not all(isinstance(value, Tensor) for value in args):
            spoiled.add(id(module))
        given.setdefault(id(module), tuple(value.clone() for value in tensors(args)))

    with preserved(model), torch.no_grad(), ExitStack() as hooks:
        for module in model.modules():
            if not is_plain_container(module) and list(module.children()):
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        run(model, own_copy(example), call)
    return observe(model, example, call), {key: value for key, value in given.items() if key not in spoiled}
