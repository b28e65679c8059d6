"""What one row computes: its tensors, and the peers that compute it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import layers
from ..axes import batch_axes, channel_shape, values_per_channel
from .shapes import DTYPES, Row

__all__ = ["EPS", "MOMENTUM", "OURS", "TORCH", "Case", "Peer", "make_case", "make_peers"]

OURS, TORCH = "normkit", "torch"
EPS, MOMENTUM = 1e-5, 0.1

# How far the input of an activation must be from its kinks for a gradient to pass. Within it, rounding alone decides
# the slope, so that two right answers differ by a whole gradient.
_KINK = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}

# Values at a time where a tensor is gone through in parts.
_VALUES = 1 << 20

_TORCH_LAYERS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
}  # fmt: skip
_LAYERS: dict[int, type[nn.Module]] = {
    2: layers.BatchNorm1d, 3: layers.BatchNorm1d, 4: layers.BatchNorm2d, 5: layers.BatchNorm3d,
}  # fmt: skip
_FUSED_LAYERS: dict[int, type[nn.Module]] = {
    2: layers.BatchNormAct1d, 3: layers.BatchNormAct1d, 4: layers.BatchNormAct2d, 5: layers.BatchNormAct3d,
}  # fmt: skip

Forward = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """The tensors of one row. ``residual`` and ``dy`` are None where the row has none."""

    row: Row
    x: Tensor
    residual: Tensor | None
    dy: Tensor | None
    state: dict[str, Tensor]


class Peer:
    """One way to compute a row, with a layer of its own.

    Attributes:
        layer: holds weight, bias and running statistics.
    """

    def __init__(self, case: Case, layer: nn.Module, forward: Forward) -> None:
        self.case, self.layer, self.forward = case, layer, forward
        layer.load_state_dict(case.state)
        layer.train(case.row.work != "eval")
        self.inputs = [case.x, *layer.parameters()]
        if case.residual is not None:
            self.inputs.append(case.residual)

    def run(self) -> tuple[Tensor, ...]:
        """Compute once: the output and, with a backward, the gradients of the inputs."""
        case = self.case
        if case.row.work == "eval":
            with torch.no_grad():
                return (self.forward(case.x, case.residual),)
        y = self.forward(case.x, case.residual)
        return (y,) if case.dy is None else (y, *torch.autograd.grad(y, self.inputs, case.dy))

    def results(self) -> dict[str, Tensor]:
        """Compute once, and return everything by its name; in training the running statistics are among it."""
        found = dict(zip(("output", "dx", "dweight", "dbias", "dresidual"), self.run(), strict=False))
        if self.layer.training:
            state = self.layer.state_dict()
            found |= {name: state[name].clone() for name in ("running_mean", "running_var")}
        return {name: value.detach() for name, value in found.items()}


def make_case(row: Row, seed: int = 0) -> Case:
    """Draw the tensors of a row."""
    generator = torch.Generator().manual_seed(seed)
    training = row.work != "eval"
    channels = row.shape.sizes[1]
    # The parameters stay in float32 with half precision inputs, as under autocast.
    state = {
        "weight": torch.rand(channels, generator=generator) + 0.5,
        "bias": torch.randn(channels, generator=generator),
        "running_mean": torch.zeros(channels) if training else torch.randn(channels, generator=generator),
        "running_var": torch.ones(channels) if training else torch.rand(channels, generator=generator) + 0.5,
        "num_batches_tracked": torch.tensor(0),
    }
    x = _draw(row, generator, 1.5, 0.5).requires_grad_(training)
    residual = _draw(row, generator).requires_grad_(training) if row.has_residual else None
    case = Case(row, x, residual, None, state)
    if row.work != "forward+backward":
        return case
    return Case(row, x, residual, _cotangent(case, generator), state)


def _draw(row: Row, generator: torch.Generator, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Draw normal numbers, laid out in memory as the row says."""
    drawn = torch.randn(row.shape.sizes, generator=generator).mul_(scale).add_(shift).to(DTYPES[row.dtype])
    if row.layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return drawn.contiguous(memory_format=formats[drawn.dim()])
    if row.layout == "sliced":
        # The first half of another tensor's channels: samples do not lie next to each other.
        return torch.cat([drawn, drawn], 1)[:, : drawn.shape[1]]
    if row.layout == "permuted":
        return drawn.transpose(1, 2).contiguous().transpose(1, 2)
    return drawn


def _cotangent(case: Case, generator: torch.Generator) -> Tensor:
    """Draw a gradient of the output that is zero next to the activation's kinks."""
    row, x, state = case.row, case.x.detach(), case.state
    dy = _draw(row, generator)
    if row.activation is None:
        return dy
    # Some samples at a time, so that the largest shapes do not need three tensors more.
    step = max(1, _VALUES // (x.numel() // len(x)))
    mean, var = _statistics(x, step)
    shape = channel_shape(x.dim(), x.shape[1])
    scale = (state["weight"] / (var + EPS).sqrt()).float().view(shape)
    kinks = (0.0, 6.0) if row.activation == "relu6" else (0.0,)
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        z = (x[part].float() - mean.float().view(shape)) * scale + state["bias"].view(shape)
        if case.residual is not None:
            z += case.residual[part].detach()
        for kink in kinks:
            dy[part].masked_fill_((z - kink).abs() < _KINK[x.dtype], 0)
    return dy


def _statistics(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance per channel in float64: torch's own operations, since the kernels are on trial."""
    axes, count = batch_axes(x.dim()), values_per_channel(tuple(x.shape))
    shape = channel_shape(x.dim(), x.shape[1])
    mean = torch.stack([part.sum(axes, dtype=torch.float64) for part in x.split(step)]).sum(0) / count
    squares = [(part.double() - mean.view(shape)).square_().sum(axes) for part in x.split(step)]
    return mean, torch.stack(squares).sum(0) / count


def make_peers(case: Case, *, compiled: bool = False) -> dict[str, Peer]:
    """Return the peers by name: normkit's layer, and torch's with what follows it as operations of their own.

    ``torch in place`` writes the sum and the activation over the normalization's output, as torchvision's ResNet does.
    ``torch.compile`` is what it makes of ``torch``.
    """
    peers = {TORCH: _torch(case), OURS: _ours(case)}
    if case.row.activation is not None:
        peers["torch in place"] = _torch(case, inplace=True)
    if compiled:
        # One row's guards must not count against the next one's limit of recompilations.
        torch.compiler.reset()
        peers["torch.compile"] = _torch(case, compiled=True)
    return peers


def _ours(case: Case) -> Peer:
    row, rank = case.row, case.x.dim()
    channels = case.x.shape[1]
    if row.activation is None:
        plain = _LAYERS[rank](channels, eps=EPS, momentum=MOMENTUM)
        return Peer(case, plain, lambda x, _: plain(x))
    fused = _FUSED_LAYERS[rank](channels, eps=EPS, momentum=MOMENTUM, activation=row.activation)
    return Peer(case, fused, lambda x, residual: fused(x) if residual is None else fused(x, residual))


def _torch(case: Case, *, inplace: bool = False, compiled: bool = False) -> Peer:
    layer = _TORCH_LAYERS[case.x.dim()](case.x.shape[1], eps=EPS, momentum=MOMENTUM)
    activations = {None: lambda y, inplace: y, "relu": functional.relu, "relu6": functional.relu6}
    activate: Callable[..., Tensor] = activations[case.row.activation]

    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = layer(x)
        if residual is not None:
            y = y.add_(residual) if inplace else y + residual
        return activate(y, inplace=inplace)

    return Peer(case, layer, torch.compile(forward, dynamic=False) if compiled else forward)
