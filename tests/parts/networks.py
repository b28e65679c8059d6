"""Networks whose steps are accumulated, with norms of torch's and of ours."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normkit


def lenet(norm=nn.BatchNorm2d, flat=nn.BatchNorm1d):
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), norm(6), nn.Sigmoid(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), norm(16), nn.Sigmoid(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 20), flat(20), nn.Sigmoid(), nn.Linear(20, 10),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.inner, self.outer = norm(channels), norm(channels)

    def forward(self, x):
        return F.relu(x + self.outer(self.second(F.relu(self.inner(self.first(x))))))


class Fused(nn.Module):
    """The same block with activation and residual in the norm."""

    def __init__(self, channels, norm):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.inner, self.outer = (normkit.BatchNormAct2d(channels, activation=name) for name in ("silu", "relu"))

    def forward(self, x):
        return self.outer(self.second(self.inner(self.first(x))), x)


class Recomputed(nn.Module):
    """A block under activation checkpointing, with dropout in it."""

    def __init__(self, channels, norm, reentrant=False, chance=0.0):
        super().__init__()
        self.block = nn.Sequential(Block(channels, norm), nn.Dropout(chance), Block(channels, norm))
        self.reentrant, self.recompute = reentrant, True

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant) if self.recompute else self.block(x)


def never_recomputed(model):
    """Leave checkpoints out: in them torch's own layers move their statistics twice."""
    for module in model.modules():
        if isinstance(module, Recomputed):
            module.recompute = False
    return model


def resnet(norm=nn.BatchNorm2d, block=Block, **given):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), norm(8), nn.ReLU(), block(8, norm, **given), nn.MaxPool2d(2), block(8, norm, **given),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


class UNet(nn.Module):
    """One step down and up again, with a skip, and one norm that stands in two places."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.enter, self.down, self.up, self.leave = (
            nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 6), (6, 6), (6, 6), (12, 10))
        )
        self.twice, self.deep = norm(6), norm(6)

    def forward(self, x):
        skip = F.relu(self.twice(self.enter(x)))
        deep = F.relu(self.deep(self.down(F.max_pool2d(skip, 2))))
        deep = F.silu(self.twice(self.up(F.interpolate(deep, scale_factor=2))))
        return self.leave(torch.cat([skip, deep], 1)).mean((2, 3))


def sync(channels):
    return normkit.SyncBatchNorm(channels)


def plain_average(channels):
    return nn.BatchNorm2d(channels, momentum=None)


def biased(channels):
    return normkit.BatchNorm2d(channels, unbiased=False)


NETWORKS = {
    "lenet": lenet,
    "lenet of ours": lambda: lenet(normkit.BatchNorm2d, normkit.BatchNorm1d),
    "resnet": resnet,
    "resnet of ours": lambda: resnet(normkit.BatchNorm2d),
    "resnet, fused": lambda: resnet(normkit.BatchNorm2d, Fused),
    "resnet, synchronized": lambda: resnet(sync),
    "resnet, recomputed": lambda: resnet(nn.BatchNorm2d, Recomputed),
    "resnet of ours, recomputed": lambda: resnet(normkit.BatchNorm2d, Recomputed),
    "unet": UNet,
    "unet of ours": lambda: UNet(normkit.BatchNorm2d),
    "unet, plain average": lambda: UNet(plain_average),
    "unet, biased variance": lambda: UNet(biased),
}
