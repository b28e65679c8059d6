"""Networks that the tests of surgery operate on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Small(nn.Module):
    """Three batch norms, a dropout and a group norm; the first batch norm is fed by data of any mean."""

    def __init__(self, channels: int = 5) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(channels, 7, 3)
        self.group = nn.GroupNorm(1, 7)
        self.fc = nn.Linear(7, 4)
        self.bn2 = nn.BatchNorm1d(4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.drop(torch.relu(self.bn1(self.conv1(self.bn0(image)))))
        return self.bn2(self.fc(self.group(self.conv2(features)).mean((2, 3))))


def randomize(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and an affine that are not those of a fresh layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                module.num_batches_tracked.fill_(100)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2.0)
                if module.bias is not None:
                    nn.init.normal_(module.bias)
    return model


class Failure(Exception):
    """What the fault injection raises."""


@contextmanager
def failing(module: nn.Module) -> Iterator[None]:
    """Let every call of one layer raise."""

    def fail(*_: object) -> None:
        raise Failure

    handle = module.register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def leaves(model: nn.Module) -> list[str]:
    """Name the layers that hold no other."""
    return [path for path, module in model.named_modules() if not list(module.children())]
