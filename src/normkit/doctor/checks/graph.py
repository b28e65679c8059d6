"""Check of the graph: which layers can be folded into their neighbour, and whether a graph was captured in training."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from ..examination import Beside, Check, Examination
from ..findings import Finding
from ..subjects import Subject

__all__ = ["GRAPH_CHECKS", "pair_up"]


def pair_up(model: nn.Module, subjects: Sequence[Subject]) -> dict[str, Beside] | None:
    """Pair every batch normalization with the convolution or linear layer before it.

    Returns:
        By layer what stands beside it; None as a whole where the model cannot be traced.
    """
    by_id = {id(subject.layer.module): subject for subject in subjects if subject.layer is not None}
    tracer = _Tracer(frozenset(by_id))
    try:
        graph = tracer.trace(model)
    except Exception:  # whatever the model's code raises where it is given no tensors
        return None
    modules = dict(model.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(id(modules[str(node.target)]) for node in nodes)
    pairs: dict[str, Beside] = {}
    for node in nodes:
        subject = by_id.get(id(modules[str(node.target)]))
        before = node.args[0] if node.args else None
        if subject is None or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        neighbour = modules[str(before.target)]
        if subject.is_batch and isinstance(neighbour, _ConvNd | nn.Linear):
            reason = _reason_against(subject, neighbour, before, calls)
            behind = _behind(node, modules, calls) if reason is not None and subject.tracks else None
            name = str(before.target)
            pairs[subject.name] = Beside(name, reason, name) if behind is None else Beside(behind, None, name)
    return pairs


class _Tracer(fx.Tracer):
    """Traces through everything but torch's own layers and the normalization layers."""

    def __init__(self, leaves: frozenset[int]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Say whether a module stays one node."""
        return id(m) in self._leaves or super().is_leaf_module(m, module_qualified_name)


def _reason_against(subject: Subject, neighbour: nn.Module, before: fx.Node, calls: Mapping[int, int]) -> str | None:
    assert subject.layer is not None
    layer = subject.layer
    reasons = (
        (not subject.tracks, "the layer has no running statistics"),
        (layer.form is None, layer.unread),
        (layer.hooked or layer.parametrized, "hooks or parametrizations of the layer would be lost"),
        (
            calls[id(neighbour)] > 1,
            f"{before.target} is called {calls[id(neighbour)]} times, with several layers behind it",
        ),
        (calls[id(layer.module)] > 1, "the layer itself is called several times"),
        (len(before.users) > 1, f"the output of {before.target} has another consumer"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _behind(node: fx.Node, modules: Mapping[str, nn.Module], calls: Mapping[int, int]) -> str | None:
    """Name the layer that alone takes the output and can absorb the normalization before it."""
    if len(node.users) != 1 or (user := next(iter(node.users))).op != "call_module":
        return None
    neighbour = modules[str(user.target)]
    unpadded = isinstance(neighbour, nn.Linear) or (isinstance(neighbour, _ConvNd) and not any(neighbour.padding))
    alone = calls[id(neighbour)] == 1 and calls[id(modules[str(node.target)])] == 1
    return str(user.target) if unpadded and alone else None


def fold_ready(examination: Examination) -> Iterator[Finding]:
    """Find graphs captured in training, and pairs that cannot be folded, each with the reason."""
    if isinstance(examination.model, fx.GraphModule):
        yield from _captured_in_training(examination.model)
    for name, (neighbour, reason, _) in (examination.pairs or {}).items():
        if reason is not None:
            yield Finding(
                check="fold-ready",
                layer=name,
                severity="info",
                summary=f"cannot be folded into {neighbour}: {reason}",
                evidence={"neighbour": neighbour},
                causes=(reason,),
                remedy="normkit.fold(model, example)  # folds the others and says the same of this one",
                proof='all(f.check != "fold-ready" for f in normkit.diagnose(model).findings)',
            )


def _captured_in_training(model: fx.GraphModule) -> Iterator[Finding]:
    """A captured graph has its mode baked in: eval() cannot reach it."""
    nodes = [node.name for node in model.graph.nodes if node.op == "call_function" and _normalizes_in_training(node)]
    if nodes:
        yield Finding(
            check="fold-ready",
            layer="",
            severity="error",
            summary=f"the graph was captured in training mode: {len(nodes)} batch normalizations in it take the "
            "statistics of the batch for ever",
            evidence={"nodes": nodes[:16], "count": len(nodes)},
            causes=("the model was exported without eval()", "the exporter was told to keep training mode"),
            remedy="exported = torch.export.export(model.eval(), example)",
            proof='not normkit.diagnose(exported.module()).of("fold-ready")',
        )


def _normalizes_in_training(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return "batch_norm" in name and "no_training" not in name and bool(_argument(node, 5, "training"))


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else False)


GRAPH_CHECKS: tuple[Check, ...] = (
    Check(
        name="fold-ready",
        question="Can every layer be folded, and was no graph captured in training?",
        needs="model",
        examine=fold_ready,
        innocent=("weights shared on purpose between heads", "a graph captured to be trained on"),
    ),
)
