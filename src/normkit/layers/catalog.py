"""One row per method. Contract tests, the command line, the lab, documentation and benchmarks read it.

Adding a method means a reference, a function, a layer and a row here; a test fails where a row is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ArgumentError
from ..spelling import alternatives
from .adaptive import AdaptiveInstanceNorm
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from .group import GroupNorm
from .instance import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .layer import LayerNorm, SampleLayerNorm
from .masked import MaskedBatchNorm1d
from .renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .response import LocalResponseNorm
from .rms import RMSNorm
from .weight import WeightNorm, WeightStandardization
from .whitening import WhiteningBatchNorm1d, WhiteningBatchNorm2d, WhiteningBatchNorm3d

__all__ = ["METHODS", "METHODS_OF_WEIGHTS", "Method", "WeightMethod", "create", "default_groups", "method"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the project knows of one normalization method.

    Attributes:
        name: the word that the command line and ``create`` take.
        title: the method's name in prose.
        paper: authors, title, year and arXiv number.
        shared: which elements share statistics, in words.
        stem: the name of the function in ``normkit.functional`` and in ``normkit.reference``.
        layers: the layer classes by number of spatial dimensions; 0 stands for ``(N, C)``.
        build: makes the layer for a number of channels and of spatial dimensions.
        samples: shapes of inputs that every contract test runs.
    """

    name: str
    title: str
    paper: str
    shared: str
    stem: str
    layers: Mapping[int, type[nn.Module]]
    build: Callable[[int, int], nn.Module]
    samples: tuple[tuple[int, ...], ...]


_BATCH_LAYERS: Mapping[int, type[nn.Module]] = {0: BatchNorm1d, 1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}

_GHOST_LAYERS: Mapping[int, type[nn.Module]] = {
    0: GhostBatchNorm1d,
    1: GhostBatchNorm1d,
    2: GhostBatchNorm2d,
    3: GhostBatchNorm3d,
}
_RENORM_LAYERS: Mapping[int, type[nn.Module]] = {0: BatchRenorm1d, 1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d}
_WHITENING_LAYERS: Mapping[int, type[nn.Module]] = {
    0: WhiteningBatchNorm1d,
    1: WhiteningBatchNorm1d,
    2: WhiteningBatchNorm2d,
    3: WhiteningBatchNorm3d,
}
_INSTANCE_LAYERS: Mapping[int, type[nn.Module]] = {1: InstanceNorm1d, 2: InstanceNorm2d, 3: InstanceNorm3d}


def default_groups(channels: int, dimensions: int) -> int:
    """Return the most groups, 32 at most, that leave two channels in each, or eight where there are no positions.

    >>> default_groups(64, 2), default_groups(6, 2), default_groups(7, 2), default_groups(120, 0)
    (32, 3, 1, 15)
    """
    smallest = 8 if dimensions == 0 else 2
    fitting = (size for size in range(min(32, channels // smallest), 0, -1) if channels % size == 0)
    return next(fitting, 1)


def _adaptive_norm(channels: int, dimensions: int) -> nn.Module:
    """Return a layer that holds a style, for it refuses to run without one."""
    layer = AdaptiveInstanceNorm(channels)
    layer.set_style(torch.tensor([1.0, 3.0]).expand(1, channels, 2))
    return layer


def _whitening_norm(channels: int, dimensions: int) -> nn.Module:
    # Groups of 16 at most: the covariance of a group should not outgrow the batch that it is estimated from.
    groups = next(groups for groups in range(-(-channels // 16), channels + 1) if channels % groups == 0)
    return _WHITENING_LAYERS[dimensions](channels, num_groups=groups)


METHODS: tuple[Method, ...] = (
    Method(
        name="batch",
        title="Batch normalization",
        paper="Ioffe and Szegedy, Batch Normalization: Accelerating Deep Network Training by Reducing Internal "
        "Covariate Shift, 2015, arXiv:1502.03167",
        shared="all samples and positions of one channel",
        stem="batch_norm",
        layers=_BATCH_LAYERS,
        build=lambda channels, dimensions: _BATCH_LAYERS[dimensions](channels),
        samples=((8, 5), (7, 3, 11), (4, 6, 5, 3), (2, 3, 4, 3, 5), (1, 3, 2, 1), (5, 1, 1, 7)),
    ),
    Method(
        name="layer",
        title="Layer normalization",
        paper="Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450",
        shared="all features of one sample; of an image all channels and positions",
        stem="layer_norm",
        layers={0: LayerNorm, 1: SampleLayerNorm, 2: SampleLayerNorm, 3: SampleLayerNorm},
        build=lambda channels, dimensions: LayerNorm(channels) if dimensions == 0 else SampleLayerNorm(channels),
        samples=((8, 5), (7, 3, 11), (4, 6, 5, 3), (2, 3, 4, 3, 5), (1, 3, 2, 1), (5, 1, 1, 7)),
    ),
    Method(
        name="rms",
        title="Root mean square normalization",
        paper="Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467",
        shared="all features of one sample",
        stem="rms_norm",
        layers={0: RMSNorm},
        build=lambda channels, dimensions: RMSNorm(channels),
        samples=((8, 5), (1, 7), (3, 1)),
    ),
    Method(
        name="group",
        title="Group normalization",
        paper="Wu and He, Group Normalization, 2018, arXiv:1803.08494",
        shared="a group of channels and all positions of one sample",
        stem="group_norm",
        layers={0: GroupNorm, 1: GroupNorm, 2: GroupNorm, 3: GroupNorm},
        build=lambda channels, dimensions: GroupNorm(default_groups(channels, dimensions), channels),
        samples=((8, 16), (7, 3, 11), (4, 6, 5, 3), (2, 4, 4, 3, 5), (1, 3, 2, 1), (5, 1, 1, 7)),
    ),
    Method(
        name="instance",
        title="Instance normalization",
        paper="Ulyanov, Vedaldi and Lempitsky, Instance Normalization: The Missing Ingredient for Fast Stylization, "
        "2016, arXiv:1607.08022",
        shared="all positions of one channel of one sample",
        stem="instance_norm",
        layers=_INSTANCE_LAYERS,
        build=lambda channels, dimensions: _INSTANCE_LAYERS[dimensions](channels, affine=True),
        samples=((7, 3, 11), (4, 6, 5, 3), (2, 3, 4, 3, 5), (1, 3, 2, 1), (5, 1, 1, 7)),
    ),
    Method(
        name="response",
        title="Local response normalization",
        paper="Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep Convolutional Neural Networks, 2012",
        shared="neighbouring channels at one position",
        stem="local_response_norm",
        layers={1: LocalResponseNorm, 2: LocalResponseNorm, 3: LocalResponseNorm},
        build=lambda channels, dimensions: LocalResponseNorm(5),
        samples=((7, 3, 11), (4, 6, 5, 3), (2, 3, 4, 3, 5), (1, 3, 2, 1), (5, 1, 1, 7)),
    ),
    Method(
        name="adaptive",
        title="Adaptive instance normalization",
        paper="Huang and Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, 2017, "
        "arXiv:1703.06868",
        shared="all positions of one channel of one sample, of the content and of the style",
        stem="adaptive_instance_norm",
        layers={1: AdaptiveInstanceNorm, 2: AdaptiveInstanceNorm, 3: AdaptiveInstanceNorm},
        build=_adaptive_norm,
        samples=((7, 3, 11), (4, 6, 5, 3), (2, 3, 4, 3, 5), (1, 3, 2, 1), (5, 1, 1, 7)),
    ),
    Method(
        name="renorm",
        title="Batch renormalization",
        paper="Ioffe, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models, 2017, "
        "arXiv:1702.03275",
        shared="all samples and positions of one channel, corrected by the running statistics",
        stem="batch_renorm",
        layers=_RENORM_LAYERS,
        build=lambda channels, dimensions: _RENORM_LAYERS[dimensions](channels),
        samples=((8, 5), (7, 3, 11), (4, 6, 5, 3), (2, 3, 4, 3, 5), (1, 3, 2, 1), (5, 1, 1, 7)),
    ),
    Method(
        name="ghost",
        title="Ghost batch normalization",
        paper="Hoffer, Hubara and Soudry, Train longer, generalize better: closing the generalization gap in large "
        "batch training of neural networks, 2017, arXiv:1705.08741",
        shared="all positions of one channel in a part of the batch",
        stem="ghost_batch_norm",
        layers=_GHOST_LAYERS,
        build=lambda channels, dimensions: _GHOST_LAYERS[dimensions](channels, ghost_size=16),
        samples=((8, 5), (7, 3, 11), (4, 6, 5, 3), (2, 3, 4, 3, 5), (1, 3, 2, 1), (5, 1, 1, 7)),
    ),
    Method(
        name="masked",
        title="Masked batch normalization",
        paper="Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, restricted to the valid positions",
        shared="all valid positions of one channel",
        stem="masked_batch_norm",
        layers={0: MaskedBatchNorm1d, 1: MaskedBatchNorm1d},
        build=lambda channels, dimensions: MaskedBatchNorm1d(channels),
        samples=((8, 5), (7, 3, 11), (5, 1, 3)),
    ),
    Method(
        name="whitening",
        title="Whitening batch normalization",
        paper="Huang, Yang, Lang and Deng, Decorrelated Batch Normalization, 2018, arXiv:1804.08450",
        shared="all samples and positions of a group of channels, whose covariance is removed too",
        stem="whitening_batch_norm",
        layers=_WHITENING_LAYERS,
        build=_whitening_norm,
        samples=((32, 5), (7, 3, 11), (4, 6, 5, 3), (2, 3, 4, 3, 5), (5, 1, 1, 7)),
    ),
)


@dataclass(frozen=True, kw_only=True)
class WeightMethod:
    """What the project knows of a method that normalizes weights instead of activations.

    Attributes:
        name: the word for it.
        title: the method's name in prose.
        paper: authors, title, year and arXiv number.
        shared: which elements share statistics, in words.
        stem: the name of the function in ``normkit.functional`` and in ``normkit.reference``.
        parametrization: the module that is registered on another layer's weight.
        samples: shapes of weights that every contract test runs.
    """

    name: str
    title: str
    paper: str
    shared: str
    stem: str
    parametrization: type[nn.Module]
    samples: tuple[tuple[int, ...], ...]


METHODS_OF_WEIGHTS: tuple[WeightMethod, ...] = (
    WeightMethod(
        name="weight",
        title="Weight normalization",
        paper="Salimans and Kingma, Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep "
        "Neural Networks, 2016, arXiv:1602.07868",
        shared="all weights of one output",
        stem="weight_norm",
        parametrization=WeightNorm,
        samples=((3, 5), (4, 3, 3, 3), (2, 7, 5), (1, 2)),
    ),
    WeightMethod(
        name="standardization",
        title="Weight standardization",
        paper="Qiao, Wang, Liu, Shen and Yuille, Micro-Batch Training with Batch-Channel Normalization and Weight "
        "Standardization, 2019, arXiv:1903.10520",
        shared="all weights of one output",
        stem="weight_standardization",
        parametrization=WeightStandardization,
        samples=((3, 5), (4, 3, 3, 3), (2, 7, 5), (1, 2)),
    ),
)


def method(name: str) -> Method:
    """Return the catalog's row of this name.

    Raises:
        ArgumentError: the name is not in the catalog; the message lists the known ones.

    >>> method("batch").title
    'Batch normalization'
    """
    for row in METHODS:
        if row.name == name:
            return row
    raise ArgumentError(f"unknown normalization {name!r}; {alternatives(name, [row.name for row in METHODS])}")


def create(name: str, num_features: int, dimensions: int = 2) -> nn.Module:
    """Build the layer of a method by name.

    Args:
        name: a name of the catalog.
        num_features: C of an input ``(N, C, *)``.
        dimensions: the number of spatial dimensions, 0 for ``(N, C)``.

    Raises:
        ArgumentError: the name is unknown, or the method has no layer for this many dimensions.

    >>> create("batch", 6)
    BatchNorm2d(6, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    row = method(name)
    if dimensions not in row.layers:
        allowed = ", ".join(str(key) for key in sorted(row.layers))
        raise ArgumentError(f"{row.title} has no layer for {dimensions} spatial dimensions; allowed are {allowed}")
    return row.build(num_features, dimensions)
