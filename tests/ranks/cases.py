"""What is computed on several ranks: one table, run by processes, by the simulator and by one process alone."""

import itertools
from dataclasses import dataclass

import torch
from torch import nn

import normkit

# Shares of the samples of a batch, by the number of ranks.
SPLITS = {
    1: {"all": (7,)},
    2: {"even": (4, 4), "uneven": (6, 1), "empty": (0, 5)},
    3: {"even": (3, 3, 3), "uneven": (1, 7, 2), "empty": (4, 0, 3)},
    4: {"even": (2, 2, 2, 2), "uneven": (5, 1, 2, 3), "empty": (3, 2, 0, 4)},
}
# Positions, type, channels-last, activation, residual, affine, bias, momentum, unbiased.
FORMS = {
    "vectors": ((), torch.float32, False, None, False, True, True, 0.1, True),
    "images": ((5, 3), torch.float32, False, "relu", False, True, True, 0.1, True),
    "channels-last": ((4, 7), torch.float32, True, "relu", True, True, True, None, True),
    "float64": ((6,), torch.float64, False, None, False, True, True, 0.3, False),
    "silu": ((3, 2, 2), torch.float64, False, "silu", True, True, True, 0.1, True),
    "bfloat16": ((5, 5), torch.bfloat16, True, "leaky_relu", False, True, False, 0.1, True),
    "float16": ((9,), torch.float16, False, None, True, True, True, 0.1, True),
    "bare": ((3, 3), torch.float32, False, None, False, False, True, 0.1, True),
}
CHANNELS = 5


@dataclass(frozen=True)
class Case:
    """One batch, cut into the shares of the ranks."""

    ranks: int
    split: str
    form: str

    @property
    def name(self) -> str:
        return f"{self.ranks}-{self.split}-{self.form}"

    @property
    def shares(self) -> tuple[int, ...]:
        return SPLITS[self.ranks][self.split]

    @property
    def dtype(self) -> torch.dtype:
        return FORMS[self.form][1]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """X, the residual, and two random cotangents, of the whole batch."""
        positions, dtype, last, *_ = FORMS[self.form]
        generator = torch.Generator().manual_seed(len(self.form) + 10 * self.ranks)
        shape = (sum(self.shares), CHANNELS, *positions)
        made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
        made[0] = made[0] * 2 + 3
        if last:
            made = [value.movedim(1, -1).contiguous().movedim(-1, 1) for value in made]
        return tuple(value.to(dtype) for value in made)

    def layer(self, *, sync: bool, **given) -> nn.Module:
        """Build the layer, with parameters that are not 1 and 0."""
        positions, dtype, _, activation, residual, affine, bias, momentum, unbiased = FORMS[self.form]
        wide = dtype if dtype is torch.float64 else torch.float32
        settings = {"affine": affine, "bias": bias, "momentum": momentum, "unbiased": unbiased, "dtype": wide}
        if sync:
            norm = normkit.SyncBatchNorm(CHANNELS, **settings, **given)
        else:
            norm = getattr(normkit, f"BatchNorm{max(len(positions), 1)}d")(CHANNELS, **settings)
        generator = torch.Generator().manual_seed(3)
        for parameter in norm.parameters():
            parameter.data.copy_(torch.randn(CHANNELS, generator=generator))
        if activation is None and not residual:
            return norm
        layer = getattr(normkit, f"BatchNormAct{max(len(positions), 1)}d")(CHANNELS, activation=activation, dtype=wide)
        layer.norm = norm
        return layer


CASES = [
    Case(ranks, split, form) for ranks, splits in SPLITS.items() for split, form in itertools.product(splits, FORMS)
]


def names(case: Case) -> str:
    return case.name


def step(case: Case, layer: nn.Module, low: int, high: int) -> dict[str, torch.Tensor]:
    """Run two steps on samples low to high; return all that came out, of float64 the second derivative too."""
    x, residual, dy, v = (value[low:high] for value in case.tensors())
    takes = isinstance(layer, (normkit.BatchNormAct1d, normkit.BatchNormAct2d, normkit.BatchNormAct3d))
    out: dict[str, torch.Tensor] = {}
    has_residual = FORMS[case.form][4]
    for turn in range(2):
        # Dense strides of its own: what an empty slice has is nobody's layout.
        x = (x + turn).detach().clone().requires_grad_()
        shortcut = residual.detach().clone().requires_grad_()
        dy = dy.detach().clone().requires_grad_()
        y = layer(x, shortcut) if takes and has_residual else layer(x)
        out[f"y{turn}"] = y.detach().clone()
        wanted = {"dx": x, **dict(layer.named_parameters())}
        if takes and has_residual:
            wanted["dresidual"] = shortcut
        twice = case.dtype is torch.float64 and turn == 1
        gradients = torch.autograd.grad(y, list(wanted.values()), dy, create_graph=twice)
        out |= {f"{name}{turn}": value.detach() for name, value in zip(wanted, gradients, strict=True)}
        if twice:
            loss = (gradients[0] * v).sum()
            for value in gradients[1:]:
                weighed = v if value.shape == v.shape else torch.arange(1.0, CHANNELS + 1)
                loss = loss + (value * weighed).sum()
            second = {**wanted, "dy": dy}
            found = torch.autograd.grad(loss, list(second.values()), allow_unused=True)
            out |= {
                f"second {name}": torch.zeros_like(second[name]) if value is None else value
                for name, value in zip(second, found, strict=True)
            }
    out |= {name: value.clone() for name, value in layer.named_buffers()}
    return out


def of_rank(case: Case, layer: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    low = sum(case.shares[:rank])
    return step(case, layer, low, low + case.shares[rank])
