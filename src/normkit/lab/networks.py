"""The networks of the sources. The norm is passed in by its name in the catalog, so that any can take BN's place."""

from torch import Tensor, nn
from torch.nn import functional

from ..errors import ArgumentError
from ..layers.catalog import METHODS, create

__all__ = ["LeNet5", "known_norms", "norm_layer"]


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
        raise ArgumentError(f"unknown normalization {norm!r}; known are: {', '.join(known_norms())}")
    return create(norm, num_features, dimensions)


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
