"""The networks of the sources. The norm is passed in by its name in the catalog, so that any can take BN's place."""

from collections.abc import Sequence
from typing import Literal, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from ..errors import ArgumentError
from ..layers.catalog import METHODS, create
from ..spelling import alternatives

__all__ = ["AlexNet", "DenseNetwork", "FourConvolutions", "LeNet5", "he_initialized", "known_norms", "norm_layer"]

Module = TypeVar("Module", bound=nn.Module)

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def known_norms() -> tuple[str, ...]:
    """Return ``"none"`` and every name of the catalog with a layer for dense and for convolutional outputs.

    >>> "batch" in known_norms() and "none" in known_norms()
    True
    """
    return ("none", *(method.name for method in METHODS if {0, 2} <= method.layers.keys()))


def norm_layer(norm: str, num_features: int, dimensions: int) -> nn.Module:
    """Build the norm of this name, or the identity for ``"none"``.

    Raises:
        ArgumentError: the name is neither ``"none"`` nor in the catalog.

    >>> norm_layer("none", 6, dimensions=2)
    Identity()
    """
    if norm == "none":
        return nn.Identity()
    if norm not in known_norms():
        raise ArgumentError(f"unknown normalization {norm!r}; {alternatives(norm, known_norms())}")
    return create(norm, num_features, dimensions)


def he_initialized(model: Module) -> Module:
    """Draw every weight anew with He's variance, 2 over the inputs, which keeps the scale of ReLU layers.

    He et al. 2015, arXiv:1502.01852. Biases start at zero. Returns the model, changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class LeNet5(nn.Module):
    """LeNet-5 as the source builds it: a norm after every convolution and every hidden dense layer, before ReLU.

    ``conv(1,6,5,pad 2) norm ReLU pool2  conv(6,16,5) norm ReLU pool2  flatten
    fc(400,120) norm ReLU  fc(120,84) norm ReLU  fc(84,10)``

    Convolutions and dense layers keep their bias with and without a norm: the two nets differ in the norm alone. The
    pooling takes the maximum, as in the source. A norm draws no random numbers, so two nets of the same seed start
    from the same weights.

    Args:
        norm: ``"none"`` or a name of the catalog.

    Shape:
        Input ``(N, 1, 28, 28)``, output ``(N, 10)``.

    >>> import torch
    >>> LeNet5("batch")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, norm: str = "none") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, kernel_size=5, padding=2)
        self.norm1 = norm_layer(norm, 6, dimensions=2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.norm2 = norm_layer(norm, 16, dimensions=2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.norm3 = norm_layer(norm, 120, dimensions=0)
        self.fc2 = nn.Linear(120, 84)
        self.norm4 = norm_layer(norm, 84, dimensions=0)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        x = functional.max_pool2d(functional.relu(self.norm1(self.conv1(images))), 2)  # (N, 6, 14, 14)
        x = functional.max_pool2d(functional.relu(self.norm2(self.conv2(x))), 2)  # (N, 16, 5, 5)
        x = functional.relu(self.norm3(self.fc1(x.flatten(1))))
        x = functional.relu(self.norm4(self.fc2(x)))
        logits: Tensor = self.fc3(x)
        return logits


class FourConvolutions(nn.Module):
    """LeNet-5 grown to four convolutions, for looking at each one's output (the source prints no sizes).

    ``conv(1,6,5,pad 2) norm ReLU pool2  conv(6,16,5) norm ReLU pool2  conv(16,32,3,pad 1) norm ReLU
    conv(32,32,3,pad 1) norm ReLU  flatten fc(800,10)``

    The first two convolutions are LeNet-5's. ``norms[i]`` puts out what the i-th activation takes in, with and without
    a norm.

    Args:
        norm: ``"none"`` or a name of the catalog.

    Shape:
        Input ``(N, 1, 28, 28)``, output ``(N, 10)``.

    >>> import torch
    >>> FourConvolutions("batch")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, norm: str = "none") -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(1, 6, kernel_size=5, padding=2),
                nn.Conv2d(6, 16, kernel_size=5),
                nn.Conv2d(16, 32, kernel_size=3, padding=1),
                nn.Conv2d(32, 32, kernel_size=3, padding=1),
            ]
        )
        self.norms = nn.ModuleList(norm_layer(norm, channels, dimensions=2) for channels in (6, 16, 32, 32))
        self.head = nn.Linear(32 * 5 * 5, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        x = images
        for place, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = functional.relu(norm(convolution(x)))
            x = functional.max_pool2d(x, 2) if place < 2 else x
        logits: Tensor = self.head(x.flatten(1))
        return logits


class AlexNet(nn.Module):
    """AlexNet for small images: its five convolutions and three dense layers, all kernels 3x3.

    ``conv norm ReLU pool2  conv norm ReLU pool2  [conv norm ReLU] x 3  pool2  flatten
    dropout fc norm ReLU  dropout fc norm ReLU  fc``

    The convolutions' widths stand to each other as the original's 96, 256, 384, 384 and 256, without its two groups.
    Dropout stands where the original has it, in front of the first two dense layers.

    Args:
        norm: ``"none"`` or a name of the catalog.
        dropout: its rate; 0 for none.
        width: channels of the first convolution, a multiple of 3; 96 is the original's.
        in_channels: 1 for grey, 3 for colour.
        size: the images' height and width, at least 8.
        classes: how many logits.

    Shape:
        Input ``(N, in_channels, size, size)``, output ``(N, classes)``.

    >>> import torch
    >>> AlexNet("batch", width=6, in_channels=3, size=32, classes=100)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """

    def __init__(
        self,
        norm: str = "none",
        *,
        dropout: float = 0.0,
        width: int = 96,
        in_channels: int = 1,
        size: int = 28,
        classes: int = 10,
    ) -> None:
        super().__init__()
        widths = [width, 8 * width // 3, 4 * width, 4 * width, 8 * width // 3]
        hidden = 16 * width
        layers: list[nn.Module] = []
        for place, (ins, outs) in enumerate(zip([in_channels, *widths], widths, strict=False)):
            layers += [nn.Conv2d(ins, outs, kernel_size=3, padding=1), norm_layer(norm, outs, dimensions=2), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if place in (0, 1, 4) else []
        layers.append(nn.Flatten())
        for ins in (widths[-1] * (size // 8) ** 2, hidden):
            layers += [nn.Dropout(dropout), nn.Linear(ins, hidden), norm_layer(norm, hidden, dimensions=0), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of each image."""
        logits: Tensor = self.layers(images)
        return logits


class DenseNetwork(nn.Module):
    """Dense layers of any number, each followed by a norm and an activation, and a dense head of ten logits.

    ``norms[i]`` puts out what the i-th activation takes in, with and without a norm.

    Args:
        widths: the hidden layers' widths, from first to last.
        norm: ``"none"`` or a name of the catalog.
        activation: ``"relu"`` or ``"sigmoid"``.
        dropout: rate of the dropout, which follows the activation of a hidden layer.
        dropout_after: the number of that hidden layer, from 0; ``"all"`` for every one; ``None`` for no dropout.
        inputs: numbers per image.

    Shape:
        Input ``(N, ...)`` with ``inputs`` numbers per sample, output ``(N, 10)``.

    >>> import torch
    >>> DenseNetwork([100] * 3, "batch", activation="sigmoid")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        widths: Sequence[int],
        norm: str = "none",
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        dropout_after: int | Literal["all"] | None = None,
        inputs: int = 28 * 28,
    ) -> None:
        super().__init__()
        ins = [inputs, *widths]
        self.linears = nn.ModuleList(nn.Linear(*sizes) for sizes in zip(ins, widths, strict=False))
        self.norms = nn.ModuleList(norm_layer(norm, width, dimensions=0) for width in widths)
        self.head = nn.Linear(ins[-1], 10)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.dropout_after = dropout_after

    def forward(self, images: Tensor) -> Tensor:
        """Return the ten logits of each image."""
        x = images.flatten(1)
        for place, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            x = self.activation(norm(linear(x)))
            x = self.dropout(x) if self.dropout_after in (place, "all") else x
        logits: Tensor = self.head(x)
        return logits
