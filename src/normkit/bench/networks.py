"""The networks whose training step is timed, with the normalization and what follows it built by the caller."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from .. import layers

__all__ = ["BUILDERS", "LeNet", "NormAct", "ResNet"]

# Builds a normalization with the activation after it from channels, activation and spatial dimensions (0 for vectors).
NormAct = Callable[[int, str | None, int], nn.Module]

_TORCH: dict[int, type[nn.Module]] = {0: nn.BatchNorm1d, 2: nn.BatchNorm2d}
_OURS: dict[int, type[nn.Module]] = {0: layers.BatchNorm1d, 2: layers.BatchNorm2d}
_FUSED: dict[int, type[nn.Module]] = {0: layers.BatchNormAct1d, 2: layers.BatchNormAct2d}


class Apart(nn.Module):
    """A batch norm, then the addition and the ReLU as operations of their own.

    Args:
        norm: the batch norm.
        activation: "relu" or None.
        inplace: the sum and the ReLU are written over the normalization's output, as in torchvision's ResNet.
    """

    def __init__(self, norm: nn.Module, activation: str | None, *, inplace: bool = False) -> None:
        super().__init__()
        self.norm, self.activation, self.inplace = norm, activation, inplace

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return ``activation(norm(x) + residual)``."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y.add_(residual) if self.inplace else y + residual
        return y if self.activation is None else functional.relu(y, inplace=self.inplace)


def _torch(channels: int, activation: str | None, dimensions: int) -> nn.Module:
    return Apart(_TORCH[dimensions](channels), activation)


def _torch_in_place(channels: int, activation: str | None, dimensions: int) -> nn.Module:
    return Apart(_TORCH[dimensions](channels), activation, inplace=True)


def _dropped_in(channels: int, activation: str | None, dimensions: int) -> nn.Module:
    return Apart(_OURS[dimensions](channels), activation)


def _fused(channels: int, activation: str | None, dimensions: int) -> nn.Module:
    return _FUSED[dimensions](channels, activation=activation)


# The peers of a training step. Dropped in: normkit's batch norm where torch's stood, nothing else changed.
BUILDERS: dict[str, NormAct] = {
    "torch": _torch, "torch in place": _torch_in_place, "normkit": _fused, "normkit dropped in": _dropped_in,
}  # fmt: skip


class LeNet(nn.Module):
    """LeNet-5 with a norm after every convolution and every hidden dense layer, as in the laboratory, before ReLU.

    Args:
        norm_act: builds a normalization with what follows it.

    Shape:
        Input ``(N, 1, 28, 28)``, output ``(N, 10)``.

    >>> import torch
    >>> LeNet(BUILDERS["normkit"])(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])

    References:
        LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition, 1998, section II.
    """

    def __init__(self, norm_act: NormAct) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 5, padding=2), norm_act(6, "relu", 2)
        self.conv2, self.norm2 = nn.Conv2d(6, 16, 5), norm_act(16, "relu", 2)
        self.fc1, self.norm3 = nn.Linear(400, 120), norm_act(120, "relu", 0)
        self.fc2, self.norm4 = nn.Linear(120, 84), norm_act(84, "relu", 0)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        x = functional.max_pool2d(self.norm1(self.conv1(images)), 2)  # (N, 6, 14, 14)
        x = functional.max_pool2d(self.norm2(self.conv2(x)), 2)  # (N, 16, 5, 5)
        x = self.norm4(self.fc2(self.norm3(self.fc1(x.flatten(1)))))
        logits: Tensor = self.fc3(x)
        return logits


class Block(nn.Module):
    """Two convolutions, each normalized; the shortcut is added before the second ReLU."""

    def __init__(self, channels: int, width: int, stride: int, norm_act: NormAct) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm_act(width, "relu", 2)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm_act(width, "relu", 2)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            convolution = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, norm_act(width, None, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x))), self.shortcut(x))
        return y


class ResNet(nn.Module):
    """A residual network for small images: three stages of two blocks, 15 normalizations.

    Args:
        norm_act: builds a normalization with what follows it.
        width: channels of the first stage; each later stage has twice as many on a quarter of the positions.
        blocks: blocks of each stage.

    Shape:
        Input ``(N, 3, H, W)``, output ``(N, 10)``.

    >>> import torch
    >>> ResNet(BUILDERS["normkit"], width=4)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])

    References:
        He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, 2015, arXiv:1512.03385, section 4.2.
    """

    def __init__(self, norm_act: NormAct, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = norm_act(width, "relu", 2)
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
