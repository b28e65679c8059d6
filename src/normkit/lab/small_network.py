"""A small network for claims that need many runs."""

from torch import Tensor, nn
from torch.nn import functional

from ..layers import LocalResponseNorm
from .networks import norm_layer

__all__ = ["SmallLeNet", "SmallResidual"]


class SmallLeNet(nn.Module):
    """LeNet-5 made small, for claims that need many runs: strides in the place of pooling, one hidden dense layer.

    ``conv(1,8,3,stride 2,pad 1) norm ReLU  conv(8,16,3,stride 2,pad 1) norm ReLU  flatten  fc(784,32) norm ReLU
    fc(32,10)``

    Args:
        norm: ``"none"`` or a name of the catalog.
        norm_after_activation: puts each norm behind its ReLU instead of before it.
        response: puts a local response norm behind the ReLU of each convolution, with AlexNet's constants (n = 5,
            k = 2, alpha = 1e-4, beta = 0.75; torch divides alpha by n, AlexNet does not).

    Shape:
        Input ``(N, 1, 28, 28)``, output ``(N, 10)``.

    >>> import torch
    >>> SmallLeNet("batch")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, norm: str = "none", *, norm_after_activation: bool = False, response: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, stride=2, padding=1)
        self.norm1 = norm_layer(norm, 8, dimensions=2)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1)
        self.norm2 = norm_layer(norm, 16, dimensions=2)
        self.fc1 = nn.Linear(16 * 7 * 7, 32)
        self.norm3 = norm_layer(norm, 32, dimensions=0)
        self.fc2 = nn.Linear(32, 10)
        self.norm_after_activation = norm_after_activation
        self.response = LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0) if response else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        x = self.response(self._activate(self.conv1(images), self.norm1))  # (N, 8, 14, 14)
        x = self.response(self._activate(self.conv2(x), self.norm2))  # (N, 16, 7, 7)
        x = self._activate(self.fc1(x.flatten(1)), self.norm3)
        logits: Tensor = self.fc2(x)
        return logits

    def _activate(self, x: Tensor, norm: nn.Module) -> Tensor:
        activated: Tensor = norm(functional.relu(x)) if self.norm_after_activation else functional.relu(norm(x))
        return activated


class SmallResidual(nn.Module):
    """A residual net made small, with norms on convolutions alone: the smallest map still gives 16 values per channel.

    ``conv(1,16,3,stride 2) norm ReLU  block(16)  block(16 to 32, stride 2)  block(32, stride 2)  mean over space
    fc(32,10)``, a block being ``conv norm ReLU conv norm``, added to its input and followed by ReLU.

    Args:
        norm: ``"none"`` or a name of the catalog.

    Shape:
        Input ``(N, 1, 28, 28)``, output ``(N, 10)``.

    >>> import torch
    >>> SmallResidual("batch")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, norm: str = "none") -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1), norm_layer(norm, 16, dimensions=2), nn.ReLU()
        )
        self.blocks = nn.Sequential(_Block(norm, 16, 16, 1), _Block(norm, 16, 32, 2), _Block(norm, 32, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Two convolutions with norms, added to what comes in; a convolution of size 1 where the shapes differ."""

    def __init__(self, norm: str, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(ins, outs, kernel_size=3, stride=stride, padding=1),
            norm_layer(norm, outs, dimensions=2),
            nn.ReLU(),
            nn.Conv2d(outs, outs, kernel_size=3, padding=1),
            norm_layer(norm, outs, dimensions=2),
        )
        same = ins == outs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(ins, outs, kernel_size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return functional.relu(self.body(x) + self.shortcut(x))
