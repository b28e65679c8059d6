"""Networks that the tests of anatomy take apart."""

import pytest
import torch
from torch import nn


class Net(nn.Module):
    """One layer of several kinds, one of them standing in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.bn = nn.BatchNorm2d(5)
        self.group = nn.GroupNorm(5, 5)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 7), nn.BatchNorm1d(7, momentum=None))
        self.again = self.bn

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.again(self.bn(self.conv(image)))
        return self.head(self.group(features).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    return Net()
