"""Whole training steps: a kernel that wins alone can lose beside torch's own."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import layers
from ..errors import RunError
from ..lab.networks import LeNet5
from .cases import OURS, TORCH
from .timing import interleave

__all__ = ["CASES", "ResNet", "TorchNormAct2d", "TrainingCase", "measure_training"]

# Two right steps differ by rounding, which the network's depth multiplies.
_LOSS_TOLERANCE = 1e-3

NormAct = Callable[[int, str | None], nn.Module]


class TorchNormAct2d(nn.Module):
    """torch's batch norm, then the addition and the ReLU as operations of their own."""

    def __init__(self, channels: int, activation: str | None) -> None:
        super().__init__()
        self.norm, self.activation = nn.BatchNorm2d(channels), activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return ``activation(norm(x) + residual)``."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y + residual
        return y if self.activation is None else functional.relu(y)


def normkit_norm_act(channels: int, activation: str | None) -> nn.Module:
    """Return the same in one layer of normkit."""
    return layers.BatchNormAct2d(channels, activation=activation)


class Block(nn.Module):
    """Two convolutions, each normalized; the shortcut is added before the second ReLU."""

    def __init__(self, channels: int, width: int, stride: int, norm_act: NormAct) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm_act(width, "relu")
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm_act(width, "relu")
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride=stride, bias=False), norm_act(width, None)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x))), self.shortcut(x))
        return y


class ResNet(nn.Module):
    """A residual network for small images: three stages of two blocks, 15 normalizations.

    Args:
        norm_act: builds a normalization with what follows it from a number of channels and an activation.
        width: channels of the first stage; each later stage has twice as many on a quarter of the positions.
        blocks: blocks of each stage.

    Shape:
        Input ``(N, 3, H, W)``, output ``(N, 10)``.

    >>> ResNet(normkit_norm_act, width=4)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])

    References:
        He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, 2015, arXiv:1512.03385, section 4.2.
    """

    def __init__(self, norm_act: NormAct, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = norm_act(width, "relu")
        stages, channels = [], width
        for stage in range(3):
            for block in range(blocks):
                stages.append(Block(channels, width << stage, 2 if stage and not block else 1, norm_act))
                channels = width << stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        features: Tensor = self.stages(self.norm(self.conv(images)))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


def _torch_lenet() -> nn.Module:
    """LeNet-5 with torch's batch norms where normkit's stood."""
    model = LeNet5("batch")
    for name, child in list(model.named_children()):
        if isinstance(child, layers.BatchNorm2d):
            setattr(model, name, nn.BatchNorm2d(child.num_features))
        elif isinstance(child, layers.BatchNorm1d):
            setattr(model, name, nn.BatchNorm1d(child.num_features))
    return model


@dataclass(frozen=True)
class TrainingCase:
    """A network to train, as normkit and as torch build it, and the batch it is trained on."""

    network: str
    ours: Callable[[], nn.Module]
    torch: Callable[[], nn.Module]
    batch: tuple[int, ...]
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.network}, batch {'x'.join(map(str, self.batch))}, {self.layout}"


def _resnet(layout: str) -> TrainingCase:
    return TrainingCase(
        "small ResNet", lambda: ResNet(normkit_norm_act), lambda: ResNet(TorchNormAct2d), (32, 3, 32, 32), layout
    )


CASES = (
    TrainingCase("LeNet-5", lambda: LeNet5("batch"), _torch_lenet, (32, 1, 28, 28)),
    TrainingCase("LeNet-5", lambda: LeNet5("batch"), _torch_lenet, (256, 1, 28, 28)),
    _resnet("contiguous"),
    _resnet("channels_last"),
)


def measure_training(cases: tuple[TrainingCase, ...] = CASES, *, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the time of a training step with normkit's layers and with torch's.

    Both networks start from the same weights, and a first step must give them the same loss.

    Raises:
        RunError: the losses differ; nothing of this case is timed.
    """
    for case in cases:
        steps = _steps(case)
        ours, theirs = [(steps[OURS]().item(), steps[TORCH]().item()) for _ in range(2)][-1]
        if not abs(ours - theirs) <= _LOSS_TOLERANCE * max(1.0, abs(theirs)):
            raise RunError(
                f"{case.name}: after one step the loss is {ours:.6g} with normkit and {theirs:.6g} with torch; "
                "nothing was timed"
            )
        timings = interleave(steps, seconds=seconds)
        yield {
            "network": case.network,
            "batch": list(case.batch),
            "layout": case.layout,
            "loss_difference": abs(ours - theirs),
            "ratio": timings[TORCH].median / timings[OURS].median,
            "peers": {name: asdict(timing) for name, timing in timings.items()},
        }


def _steps(case: TrainingCase) -> dict[str, Callable[[], Tensor]]:
    """Return one training step per peer, of networks with the same weights on the same batch."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        theirs = case.torch()
        images, labels = torch.randn(case.batch), torch.randint(0, 10, case.batch[:1])
        ours = case.ours()
    if case.layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
        for parameter in (*ours.parameters(), *theirs.parameters()):
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    # The fused layer names its state as a bare batch norm, torch's as a part; the order is the same.
    state = dict(zip(ours.state_dict(), (value.clone() for value in theirs.state_dict().values()), strict=True))
    ours.load_state_dict(state)
    return {TORCH: _step(theirs, images, labels), OURS: _step(ours, images, labels)}


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    # A small rate, so that hundreds of steps on one batch do not end in numbers too small to be normal ones.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
