"""Fold batch normalization into the layers beside it, for a model that only predicts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..anatomy import Call, NormLayer, norm_layers, preserved
from ..anatomy.select import Where
from ..errors import SurgeryError
from .fold_arithmetic import Linear, absorb_after, absorb_before, affine_of
from .fold_graph import Pair, find_pairs, trace
from .observe import observe
from .record import Record, refuse_if_nothing_is_left
from .transaction import copied
from .verify import Judge

__all__ = ["Folding", "fold"]

# How far a folded model may be from its original in float64, relative to the largest output. In the narrow types the
# folded weight is rounded once more than the two it replaces.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class Folding(Record):
    """The record of :func:`fold`.

    Attributes:
        into: by the path of each folded norm, the path of the layer that now does its work.
    """

    into: Mapping[str, str] = field(default_factory=dict)


def fold(
    model: nn.Module,
    example: Any,
    *,
    where: Where = None,
    call: Call | None = None,
    tolerance: float | None = None,
) -> Folding:
    """Absorb batch norms into the convolution, transposed convolution or linear layer before or after them.

    With ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``::

        before:  norm(W x + b)  = (scale W) x + (scale b + shift)
        after:   W norm(x) + b  = (W scale) x + (W shift + b)

    The pairs are found on the traced graph, never by the order of the modules. What cannot be folded exactly is left as
    it is, with the reason: a layer called twice or whose output goes elsewhere too, a norm in training mode, a subclass
    with its own forward, hooks, shared or parametrized weights, something between the two, and zero padding after a
    norm whose shift is not zero. The weights are computed in float64 and rounded once. The folded model is compared
    with the given one computed in float64, on the example and on a second size.

    Args:
        model: in evaluation mode; it is not changed.
        example: one batch, of any form.
        where: which norms, as for ``norm_layers``; None takes all.
        call: ``lambda model, batch: ...``, where the example does not simply go into the model.
        tolerance: the largest relative change allowed, unless the model's own rounding is larger; by default 1e-5, and
            2e-3 and 2e-2 in float16 and bfloat16.

    Returns:
        The record. Its ``model`` is a copy of the same class, in which an ``Identity`` stands where a norm was folded.

    Raises:
        ArgumentError: ``where`` takes nothing, or the example has an unknown form.
        SurgeryError: the model cannot be traced, or no norm can be folded; the reasons are in the message.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> record = fold(model, torch.randn(2, 3, 8, 8))
    >>> record.model
    Sequential(
      (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    >>> record.into, record.largest_change <= 1e-5
    ({'1': '0'}, True)
    """
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise SurgeryError(
            "fold: this is a compiled model; give the module inside, model._orig_mod, and compile the result"
        )
    chosen = {layer.path for layer in norm_layers(model, where)}
    allowed = _tolerance(model) if tolerance is None else tolerance
    with preserved(model):
        judge = Judge(model, example, call, tolerance=allowed)
        job = _Job(model, chosen, judge.examples, call, allowed, judge)
        folded, pairs, refused, change = job.fold()
    refuse_if_nothing_is_left("fold", len(pairs), refused)
    return Folding(
        operation="fold",
        model=folded,
        touched=tuple(pair.norm for pair in pairs),
        refused=refused,
        largest_change=change,
        measure="of the output, relative to its largest value, against float64",
        notes=(judge.words,),
        into={pair.norm: pair.neighbour for pair in pairs},
    )


@dataclass
class _Job:
    """One model with what it is folded and judged by."""

    model: nn.Module
    chosen: set[str]
    examples: list[Any]
    call: Call | None
    tolerance: float
    judge: Judge

    def fold(self) -> tuple[nn.Module, list[Pair], dict[str, str], float]:
        """Fold all at once; where that changes too much, one by one, leaving out what does."""
        work = copied(self.model)
        pairs, refused = self._fold_all(work, excluded=set())
        change, wrong = self._judge(work)
        if not wrong:
            return work, pairs, refused, change
        offenders: dict[str, str] = {}
        for pair in pairs:
            single = copied(self.model)
            self._fold_all(single, excluded={other.norm for other in pairs} - {pair.norm})
            change, wrong = self._judge(single)
            if wrong:
                offenders[pair.norm] = f"folding it into {pair.neighbour} changes the output by {change:.3g}"
        work = copied(self.model)
        pairs, refused = self._fold_all(work, excluded=set(offenders))
        change, wrong = self._judge(work)
        if wrong or not offenders:
            raise SurgeryError(f"fold: the folded model differs by {change:.3g}, {self.tolerance:.3g} is allowed")
        return work, pairs, refused | offenders, change

    def _fold_all(self, work: nn.Module, excluded: set[str]) -> tuple[list[Pair], dict[str, str]]:
        """Fold until there is no pair left: a norm after a folded norm has a new neighbour."""
        done: list[Pair] = []
        while True:
            layers = [layer for layer in norm_layers(work) if layer.path in self.chosen - excluded]
            if not layers:
                return done, {}
            observed = observe(work, self.examples[0], self.call)
            graph = trace(work, norm_layers(work), observed.fixed)
            pairs, refused = find_pairs(work, graph, layers, observed)
            if not pairs:
                return done, refused
            for pair in pairs:
                _apply(work, pair, next(layer for layer in layers if layer.path == pair.norm))
            done += pairs

    def _judge(self, work: nn.Module) -> tuple[float, bool]:
        """Return the change, and whether it is too large."""
        verdict = self.judge(work)
        return verdict.change, verdict.wrong is not None


def _apply(work: nn.Module, pair: Pair, layer: NormLayer) -> None:
    """Fold one pair and put an Identity in the place of the norm, under all its names."""
    neighbour = work.get_submodule(pair.neighbour)
    assert isinstance(neighbour, Linear)
    absorb = absorb_after if pair.norm_is_after else absorb_before
    absorb(neighbour, affine_of(layer.module))
    placeholder = nn.Identity().train(layer.module.training)
    for name in layer.names:
        work.set_submodule(name, placeholder)


def _tolerance(model: nn.Module) -> float:
    """Return the tolerance of the narrowest type among the weights."""
    types = {parameter.dtype for parameter in model.parameters()} & _TOLERANCE.keys()
    return max((_TOLERANCE[dtype] for dtype in types), default=1e-5)
