"""Networks and data that the doctor's tests train: digits, small nets, a fraction of a second each."""

import copy
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from normkit.doctor.demos import Patient, build


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits, ``(N, 1, 8, 8)`` in 0..1, in a fixed random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(data.images, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16
    return images, torch.as_tensor(data.target)[order]


@cache
def _made(name: str) -> Patient:
    return build(name)


def patient(name: str) -> Patient:
    """A sick model of its own for each test; it is trained once."""
    return copy.deepcopy(_made(name))


def loader(batch_size: int = 64, count: int = 1400, *, shuffle: bool = True, drop_last: bool = True) -> DataLoader:
    images, labels = digits()
    dataset = TensorDataset(images[:count], labels[:count])
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)


def convolutional(width: int = 8) -> nn.Sequential:
    """Conv, batch norm, ReLU three times, then a dense head with batch norm."""
    layers: list[nn.Module] = []
    channels = [1, width, 2 * width, 2 * width]
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    layers[5:6] = [nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*layers, *head, nn.Linear(32, 10))


def dense(width: int = 48) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """A small residual network, the last scale of each block starting at zero as is usual."""

    def __init__(self, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(_block(width) for _ in range(blocks))
        self.head = nn.Linear(16 * width, 10)
        for block in self.blocks:
            nn.init.zeros_(block[-1].weight)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = functional.relu(hidden + block(hidden))
        return self.head(functional.max_pool2d(hidden, 2).flatten(1))


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
    )  # fmt: skip


def train(
    model: nn.Module,
    batches: DataLoader,
    epochs: int = 4,
    rate: float = 0.05,
    parameters: Sequence[Tensor] | None = None,
) -> torch.optim.Optimizer:
    """Train with momentum and a rate that falls to zero, as people do, and leave the model in evaluation mode."""
    optimizer = torch.optim.SGD(list(model.parameters()) if parameters is None else parameters, lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return optimizer


def accuracy(model: nn.Module) -> float:
    """Accuracy on the digits that were not trained on."""
    images, labels = digits()
    with torch.no_grad():
        return float((model(images[1400:]).argmax(1) == labels[1400:]).double().mean())
