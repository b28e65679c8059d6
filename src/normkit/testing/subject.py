"""The layer under examination: how it is built, what it is given, and what the reference says of the same numbers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .. import reference
from ..reference.arrays import Array

__all__ = ["Judgement", "Subject"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Judgement:
    """What the reference computes: the output, and the gradients for a cotangent."""

    output: Array
    dx: Array
    dweight: Array
    dbias: Array | None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A layer that claims to be a normalization.

    Attributes:
        source: a layer, which is copied, or a function of the number of channels that builds one.
        method: the catalog's name of the method.
        channels: C.
        dimensions: how many spatial dimensions the inputs have.
    """

    source: nn.Module | Callable[[int], nn.Module]
    method: str
    channels: int
    dimensions: int

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return a fresh layer in training mode whose weight and bias differ between channels."""
        made = copy.deepcopy(self.source) if isinstance(self.source, nn.Module) else self.source(self.channels)
        made = made.to(dtype).train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in ("weight", "bias"):
                value = getattr(made, name, None)
                if isinstance(value, Tensor):
                    value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5)
        return made

    def shape(self, samples: int = 5) -> tuple[int, ...]:
        """Return the shape of an input: few samples, odd numbers of positions."""
        return (samples, self.channels, *(7, 3, 5)[: self.dimensions])

    def input(self, samples: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return an input whose channels differ in mean and scale, some of them so small that eps is seen."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape(samples), generator=generator, dtype=torch.float64)
        broadcast = (1, -1, *(1 for _ in range(self.dimensions)))
        scale = 10.0 ** -(torch.arange(self.channels, dtype=torch.float64) % 3)
        drift = torch.linspace(0.5, 1.5, samples, dtype=torch.float64).reshape(-1, *(1 for _ in range(x.dim() - 1)))
        centre = torch.arange(self.channels, dtype=torch.float64) / 4
        return ((x * drift + centre.reshape(broadcast)) * scale.reshape(broadcast)).to(dtype)

    def cotangent(self, x: Tensor) -> Tensor:
        """Return a random gradient for the output."""
        generator = torch.Generator().manual_seed(2)
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    @property
    def keeps_statistics(self) -> bool:
        """Tell whether the layer has running statistics to examine."""
        return isinstance(getattr(self.build(), "running_mean", None), Tensor)

    def eps(self, module: nn.Module) -> float:
        """Return the layer's eps; where it names none, torch's."""
        value = getattr(module, "eps", None)
        if isinstance(value, int | float):
            return float(value)
        return float(np.finfo(np.float64).eps) if self.method == "rms" else 1e-5

    def judge(self, module: nn.Module, x: Tensor, dy: Tensor | None = None) -> Judgement:
        """Compute the training forward and backward with the reference."""
        given = x.detach().double().numpy()
        weight, bias = parameter(module, "weight"), parameter(module, "bias")
        eps = self.eps(module)
        grad = np.zeros_like(given) if dy is None else dy.double().numpy()
        if self.method == "rms":
            normalized = tuple(getattr(module, "normalized_shape", given.shape[1:]))
            step = reference.rms_norm(given, normalized, weight, eps=eps)
            back = reference.rms_norm_backward(grad, step)
            return Judgement(output=step.output, dx=back.dx, dweight=back.dweight, dbias=None)
        if self.method == "batch":
            batch = reference.batch_norm(given, weight, bias, eps=eps)
            found = reference.batch_norm_backward(grad, batch)
            return Judgement(output=batch.output, dx=found.dx, dweight=found.dweight, dbias=found.dbias)
        per_channel = weight is not None and weight.shape == (self.channels,)
        if self.method == "layer" and per_channel and not hasattr(module, "normalized_shape"):
            sample = reference.group_norm(given, 1, weight, bias, eps=eps)
        elif self.method == "layer":
            wanted = tuple(getattr(module, "normalized_shape", given.shape[1:]))
            sample = reference.layer_norm(given, wanted, weight, bias, eps=eps)
        elif self.method == "group":
            sample = reference.group_norm(given, int(getattr(module, "num_groups", 1)), weight, bias, eps=eps)
        else:
            sample = reference.instance_norm(given, weight, bias, eps=eps)
        each = reference.layer_norm_backward(grad, sample)
        return Judgement(output=sample.output, dx=each.dx, dweight=each.dweight, dbias=each.dbias)


def parameter(module: nn.Module, name: str) -> Array | None:
    """Return a parameter's values, or None where the layer has none."""
    value = getattr(module, name, None)
    return value.detach().double().numpy() if isinstance(value, Tensor) else None
