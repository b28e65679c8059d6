"""The layer under examination: how it is built, what it is given, and what the reference says of the same numbers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..reference.arrays import Array
from .contracts import CONTRACTS, Contract
from .judges import Case, Judgement
from .reading import form_of, held, tail_of, without_tail

__all__ = ["Subject"]


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

    @property
    def contract(self) -> Contract:
        """Return what holds of the method."""
        return CONTRACTS[self.method]

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
