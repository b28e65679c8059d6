"""The networks whose training step is timed, with the normalization and what follows it built by the caller."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from .. import layers

__all__ = ["BUILDERS", "MLP", "Encoder", "LeNet", "NormAct", "ResNet"]

# Builds a normalization with the activation after it from channels, activation and spatial dimensions: a batch norm, 0
# for vectors, or where the dimensions are None a layer norm over the last axis, which has no activation.
NormAct = Callable[[int, str | None, int | None], nn.Module]

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


def _builder(layer_norm: type[nn.LayerNorm], batch_norm: Callable[[int, str | None, int], nn.Module]) -> NormAct:
    def build(channels: int, activation: str | None, dimensions: int | None) -> nn.Module:
        return layer_norm(channels) if dimensions is None else batch_norm(channels, activation, dimensions)

    return build


# The peers of a training step. Dropped in: normkit's norms where torch's stood, nothing else changed.
BUILDERS: dict[str, NormAct] = {
    "torch": _builder(nn.LayerNorm, _torch),
    "torch in place": _builder(nn.LayerNorm, _torch_in_place),
    "normkit": _builder(layers.LayerNorm, _fused),
    "normkit dropped in": _builder(layers.LayerNorm, _dropped_in),
}


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


class MLP(nn.Module):
    """A perceptron with two hidden layers of 512 and 256, each normalized over the batch, before ReLU.

    Args:
        norm_act: builds a normalization with what follows it.

    Shape:
        Input ``(N, 784)``, output ``(N, 10)``.

    >>> import torch
    >>> MLP(BUILDERS["normkit"])(torch.zeros(2, 784)).shape
    torch.Size([2, 10])

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, section 4.1.
    """

    def __init__(self, norm_act: NormAct) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(784, 512, bias=False), norm_act(512, "relu", 0)
        self.fc2, self.norm2 = nn.Linear(512, 256, bias=False), norm_act(256, "relu", 0)
        self.fc3 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the ten logits of each vector."""
        logits: Tensor = self.fc3(self.norm2(self.fc2(self.norm1(self.fc1(x)))))
        return logits


class Encoder(nn.Module):
    """One encoder block of a transformer, layer norm before attention and before the perceptron, and a head.

    Args:
        norm_act: builds a normalization with what follows it.
        width: features of each position.
        heads: of the attention; they divide the width.

    Shape:
        Input ``(N, positions, width)``, output ``(N, 10)``.

    >>> import torch
    >>> Encoder(BUILDERS["normkit"], width=8, heads=2)(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 10])

    References:
        Vaswani and others, Attention Is All You Need, 2017, arXiv:1706.03762, section 3.1; the norm's place is that of
        Xiong and others, On Layer Normalization in the Transformer Architecture, 2020, arXiv:2002.04745, figure 1b.
    """

    def __init__(self, norm_act: NormAct, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.projections = norm_act(width, None, None), nn.Linear(width, 3 * width)
        self.attention = nn.Linear(width, width)
        self.norm2 = norm_act(width, None, None)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm3, self.head = norm_act(width, None, None), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the ten logits of each sequence."""
        shape = (*x.shape[:2], self.heads, -1)
        queries, keys, values = (
            part.view(shape).transpose(1, 2) for part in self.projections(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = functional.scaled_dot_product_attention(queries, keys, values)
        x = x + self.attention(attended.transpose(1, 2).flatten(2))
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        logits: Tensor = self.head(self.norm3(x).mean(1))
        return logits
