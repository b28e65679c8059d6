"""Layers of other houses as neighbours: what absorbing a norm does to them is tried in float64, never judged by name.

A convolution that pads as TensorFlow does is linear in its weight and bias like any other and keeps its forward. One
that standardizes its weight before use is not: what it convolves with is written down, and it becomes torch's own.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..anatomy import Affine, preserved
from ..errors import SurgeryError
from ..printable import first_line
from .fold_arithmetic import FOLDABLE, absorb_after, absorb_before
from .transaction import copied

__all__ = ["Way", "is_torchs", "may_absorb", "plain_convolution", "way_into"]

_CONVOLUTIONS: dict[int, type[Any]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_CLOSE = 1e-9


@dataclass(frozen=True)
class Way:
    """How a layer of another house absorbs a norm.

    Attributes:
        axis: the axis of its weight that counts the channels; None as in torch's layers.
        plain: it is replaced by torch's own convolution with the weight that it computes.
    """

    axis: int | None = None
    plain: bool = False


def is_torchs(layer: nn.Module) -> bool:
    """Say whether a layer computes what torch's classes do."""
    return type(layer).forward in {cls.forward for cls in FOLDABLE} and "forward" not in vars(layer)


def may_absorb(module: nn.Module) -> bool:
    """Say whether a module has the look of a layer that is linear in a weight: one call, whatever happens inside.

    >>> may_absorb(nn.Conv2d(3, 4, 3)), may_absorb(nn.PReLU()), may_absorb(nn.Embedding(3, 4))
    (True, False, False)
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.Bilinear | torch.jit.ScriptModule):
        return False
    inside = [child for name, child in module.named_children() if name != "parametrizations"]
    if any(next(chain(child.parameters(), child.buffers()), None) is not None for child in inside):
        return False
    if isinstance(module, FOLDABLE):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim >= 2 and weight.is_floating_point()


def way_into(layer: nn.Module, affine: Affine, given: Tensor | None, *, after: bool) -> Way | str:
    """Return how a layer absorbs a map, proven in float64 on the input of the run and on random ones; or why it cannot.

    Args:
        layer: of any class; not changed.
        affine: over its outputs where the norm stands after it, over its inputs where before.
        given: its input in the run.
        after: the norm stands after the layer.
    """
    if given is None or not given.is_floating_point():
        return "nothing is known of its input"
    reasons = []
    for way in _ways(layer, affine, after=after):
        try:
            change = _change(layer, affine, way, given, after=after)
        except (SurgeryError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
            reasons.append(f"it fails where that is tried: {first_line(error)[:120]}")
            continue
        if change <= _CLOSE:
            return way
        reasons.append(f"its output would change by {change:.2g} in float64")
    return reasons[0]


def _ways(layer: nn.Module, affine: Affine, *, after: bool) -> list[Way]:
    ways = [Way()]
    weight = layer._parameters.get("weight")
    if not isinstance(layer, FOLDABLE) and weight is not None:
        ways = [Way(axis) for axis, size in enumerate(weight.shape) if size == len(affine.scale)]
    return [*ways, Way(plain=True)] if after else ways


def _change(layer: nn.Module, affine: Affine, way: Way, given: Tensor, *, after: bool) -> float:
    """Return the largest relative change over the run's input and random ones of its shape."""
    exact = copied(layer).double()
    # Large ones too: what limits or bends its values does it where these are far from zero.
    inputs = [given.double(), -3 * given.double(), 1e6 * given.double()]
    inputs.append(torch.randn(given.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    inputs = [value.to(given.device) for value in inputs]
    work = plain_convolution(exact, inputs[0]) if way.plain else copied(exact)
    (absorb_after if after else absorb_before)(work, affine, way.axis)
    largest = 0.0
    with preserved(exact), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for value in inputs:
            expected = _mapped(affine, exact(value.clone())) if after else exact(_mapped(affine, value))
            difference = (work(value.clone()) - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
            largest = max(largest, float(difference) if difference == difference else float("inf"))
    return largest


def _mapped(affine: Affine, value: Tensor) -> Tensor:
    """Apply a map to dimension 1, or to the last where that is the one of its size."""
    count = len(affine.scale)
    axis = 1 if value.ndim > 1 and value.shape[1] == count else value.ndim - 1
    moved = value.movedim(axis, -1)
    if affine.mixing is not None:
        moved = moved @ affine.mixing.T
    return (moved * affine.scale + affine.shift).movedim(-1, axis)


def plain_convolution(layer: nn.Module, given: Tensor) -> nn.Module:
    """Return torch's convolution that computes what a convolution of another house does in evaluation.

    Raises:
        SurgeryError: it does other than one convolution of its input.
    """
    with preserved(layer), torch.no_grad(), _Convolutions(given) as seen:
        output = layer(given)
    if len(seen.found) != 1 or output is not seen.last:
        raise SurgeryError("it is not one convolution of its input")
    _, weight, bias, stride, padding, dilation, transposed, _, groups = seen.found[0]
    cls = _CONVOLUTIONS.get(given.ndim)
    if transposed or cls is None:
        raise SurgeryError("it is not one convolution of its input")
    made: nn.Module = cls(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    own = layer._parameters.get("weight")
    with torch.no_grad():
        made.get_parameter("weight").copy_(weight)
        if bias is not None:
            made.get_parameter("bias").copy_(bias)
    return made.requires_grad_(own is not None and own.requires_grad).train(layer.training)


class _Convolutions(TorchDispatchMode):
    """Notes the convolutions of one tensor."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given, self.last = given, None
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            if args[0] is not self.given:
                raise SurgeryError("it convolves something other than its input")
            self.found.append(args)
            self.last = output
        return output
