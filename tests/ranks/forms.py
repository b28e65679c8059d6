"""Masked and ghost batches on several ranks: one table, run by processes, by the simulator and by one process alone."""

import itertools
from dataclasses import dataclass

import torch
from torch import nn

import normkit
from normkit.functional import ghost_batch_norm, masked_batch_norm

from .cases import CHANNELS

# Samples of each rank, by the number of ranks.
SHARES = {
    1: {"all": (6,)},
    2: {"even": (4, 4), "uneven": (6, 2), "empty": (0, 6)},
    3: {"even": (2, 2, 2), "uneven": (1, 5, 2), "empty": (4, 0, 3)},
    4: {"even": (2, 2, 2, 2), "uneven": (5, 2, 2, 3)},
}
# Positions, type, channels-last.
KINDS = {
    "masked": ((7,), torch.float32, False),
    "masked-images": ((3, 5), torch.float32, True),
    "masked-float64": ((5,), torch.float64, False),
    "masked-bfloat16": ((9,), torch.bfloat16, False),
    "masked-void": ((5,), torch.float64, False),
    "ghost": ((3, 5), torch.float32, True),
    "ghost-float64": ((4,), torch.float64, False),
    "ghost-float16": ((6,), torch.float16, False),
    "ghost-total": ((3,), torch.float64, False),
}
GHOST_SIZE = 2


@dataclass(frozen=True)
class Form:
    """One batch with its mask, cut into the shares of the ranks."""

    ranks: int
    split: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.ranks}-{self.split}-{self.kind}"

    @property
    def shares(self) -> tuple[int, ...]:
        return SHARES[self.ranks][self.split]

    @property
    def dtype(self) -> torch.dtype:
        return KINDS[self.kind][1]

    @property
    def masked(self) -> bool:
        return self.kind.startswith("masked")

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """X, two random cotangents and the mask, of the whole batch; what stands at invalid positions is no number."""
        positions, dtype, last = KINDS[self.kind]
        generator = torch.Generator().manual_seed(len(self.kind) + 10 * self.ranks)
        shape = (sum(self.shares), CHANNELS, *positions)
        made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
        made[0] = made[0] * 2 + 3
        mask = torch.rand((shape[0], *positions), generator=generator) < 0.6
        if self.kind == "masked-void":
            # A rank with samples and without a valid position.
            mask[: max(self.shares[0], 1)] = False
        if self.masked:
            made[0] = made[0].masked_fill(~mask.unsqueeze(1), torch.nan)
        if last:
            made = [value.contiguous(memory_format=torch.channels_last) for value in made]
        return *(value.to(dtype) for value in made), mask

    def layer(self, **given) -> nn.Module:
        """Build the synchronized layer, with parameters that are not 1 and 0."""
        settings = {} if self.masked else {"ghost_size": GHOST_SIZE}
        if self.kind == "ghost-total":
            settings |= {"average": "debiased", "variance": "total"}
        wide = self.dtype if self.dtype is torch.float64 else torch.float32
        layer = normkit.SyncBatchNorm(CHANNELS, dtype=wide, **settings, **given)
        generator = torch.Generator().manual_seed(3)
        for parameter in layer.parameters():
            parameter.data.copy_(torch.randn(CHANNELS, generator=generator))
        return layer

    def alone(self, low: int, high: int) -> dict[str, torch.Tensor]:
        """Compute the same in one process, from samples low to high, by the function for one."""
        layer = self.layer()

        def call(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            running = (layer.running_mean, layer.running_var, layer.weight, layer.bias, True, 0.1, 1e-5)
            law = {"average": layer.average, "variance": layer.variance}
            law["num_batches_tracked"] = layer.num_batches_tracked
            if self.masked:
                return masked_batch_norm(x, mask, *running, **law)
            return ghost_batch_norm(x, *running, ghost_size=GHOST_SIZE, **law)

        return _steps(self, layer, call, low, high)


FORMS = [
    Form(ranks, split, kind) for ranks, splits in SHARES.items() for split, kind in itertools.product(splits, KINDS)
]


def names(form: Form) -> str:
    return form.name


def _steps(form: Form, layer: nn.Module, call, low: int, high: int) -> dict[str, torch.Tensor]:
    x, dy, v, mask = (value[low:high] for value in form.tensors())
    out: dict[str, torch.Tensor] = {}
    for turn in range(2):
        x = (x + turn).detach().clone().requires_grad_()
        y = call(x, mask)
        out[f"y{turn}"] = y.detach().clone()
        wanted = {"dx": x, **dict(layer.named_parameters())}
        twice = form.dtype is torch.float64 and turn == 1
        gradients = torch.autograd.grad(y, list(wanted.values()), dy, create_graph=twice)
        out |= {f"{name}{turn}": value.detach() for name, value in zip(wanted, gradients, strict=True)}
        if twice:
            # Linear in the gradients, so that those of all ranks add up.
            weights = torch.arange(1.0, CHANNELS + 1)
            loss = (gradients[0] * v).sum() + sum((value * weights).sum() for value in gradients[1:])
            second = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            out |= {
                f"second {name}": torch.zeros_like(tensor) if value is None else value
                for (name, tensor), value in zip(wanted.items(), second, strict=True)
            }
    out |= {name: value.clone() for name, value in layer.named_buffers()}
    return out


def of_rank(form: Form, layer: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    low = sum(form.shares[:rank])
    high = low + form.shares[rank]
    call = (lambda x, mask: layer(x, mask)) if form.masked else (lambda x, mask: layer(x))
    return _steps(form, layer, call, low, high)
