"""The layer under examination, one call of it, and the form of what holds of its method.

How it is built and what it is given stand here; what the reference says of the same numbers is in ``judges``, and which
judge goes with which method in ``contracts``.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..reference.arrays import Array
from .reading import form_of, held, tail_of, without_tail

__all__ = ["Case", "Contract", "Judgement", "Subject", "parameter"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Judgement:
    """What the reference computes: the output, and the gradients for a cotangent."""

    output: Array
    dx: Array
    dweight: Array | None = None
    dbias: Array | None = None
    dstyle: Array | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """One call of a layer: the layer, the values it is given, and the cotangent."""

    subject: "Subject"
    module: nn.Module
    x: Array
    dy: Array

    def setting(self, name: str, default: Any) -> Any:
        """Return a setting of the layer, or what holds where it has none of this name."""
        return getattr(self.module, name, default)

    @property
    def affine(self) -> tuple[Array | None, Array | None]:
        """Weight and bias."""
        return parameter(self.module, "weight"), parameter(self.module, "bias")

    @property
    def eps(self) -> float:
        """The layer's eps."""
        return self.subject.eps(self.module)

    @property
    def company(self) -> list[Array]:
        """What the layer is given besides x."""
        return [value.detach().numpy() for value in self.subject.company(torch.from_numpy(self.x))]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What holds of a method's layers.

    Attributes:
        judge: the training forward and backward of the reference.
        per_sample: a sample's output does not depend on its batch mates.
        company: what a layer is called with besides x.
        predict: the output with what is stored.
        stored: the names of the running statistics.
        seen: which values of x the stored statistics are of, where not all.
        variants: what mistakes of this method alone would have given, with words for them.
        skipped: checks that make no sense, with the reason.
    """

    judge: Callable[[Case], Judgement]
    predict: Callable[[Case], Array]
    per_sample: bool
    company: Callable[["Subject", Tensor], tuple[Tensor, ...]] = lambda subject, x: ()
    stored: tuple[str, ...] = ("running_mean", "running_var")
    seen: Callable[[Case], Array] = lambda case: case.x
    variants: Callable[[Case], Iterator[tuple[str, Array]]] = lambda case: iter(())
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A layer that claims to be a normalization.

    Attributes:
        source: a layer, which is copied, or a function of the number of channels that builds one.
        method: the catalog's name of the method.
        contract: what holds of the method.
        channels: C.
        dimensions: how many spatial dimensions the inputs have.
    """

    source: nn.Module | Callable[[int], nn.Module]
    method: str
    contract: Contract
    channels: int
    dimensions: int

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return a fresh layer in training mode whose weight and bias differ between channels."""
        made = without_tail(self._make().to(dtype).train())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in ("weight", "bias"):
                value = held(made, name)
                if value is not None:
                    value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5)
        return made

    def _make(self) -> nn.Module:
        return copy.deepcopy(self.source) if isinstance(self.source, nn.Module) else self.source(self.channels)

    @property
    def tail(self) -> str:
        """Name what the layer calls after it normalized; it is taken off, since the contract is of the rest."""
        return " and ".join(type(module).__name__ for module in tail_of(self._make()))

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
        module = self.build()
        return all(held(module, name) is not None for name in self.contract.stored)

    def eps(self, module: nn.Module) -> float:
        """Return the layer's eps; where it names none, torch's."""
        name = form_of(module).eps
        value = getattr(module, name, None) if isinstance(name, str) else name
        if isinstance(value, int | float):
            return float(value)
        return float(np.finfo(np.float64).eps) if self.method == "rms" else 1e-5

    def company(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what a layer of this method is called with besides x: a style, or a mask."""
        return self.contract.company(self, x)

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        """Call a layer as its method is called."""
        y: Tensor = module(x, *self.company(x))
        return y

    def case(self, module: nn.Module, x: Tensor, dy: Tensor | None = None) -> Case:
        """Return what the reference is to compute."""
        given = x.detach().double().numpy()
        grad = np.zeros_like(given) if dy is None else dy.double().numpy()
        return Case(subject=self, module=module, x=given, dy=grad)

    def judge(self, module: nn.Module, x: Tensor, dy: Tensor | None = None) -> Judgement:
        """Compute the training forward and backward with the reference."""
        return self.contract.judge(self.case(module, x, dy))

    def predict(self, module: nn.Module, x: Tensor) -> Array:
        """Compute with the reference what the layer gives in evaluation, from what it stores."""
        return self.contract.predict(self.case(module, x))

    def stores(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the running statistics of a layer by name."""
        found = {name: held(module, name) for name in self.contract.stored}
        return {name: value for name, value in found.items() if value is not None}


def parameter(module: nn.Module, name: str) -> Array | None:
    """Return a parameter's or buffer's values, or None where the layer has none."""
    value = held(module, name)
    return None if value is None else value.detach().double().numpy()
