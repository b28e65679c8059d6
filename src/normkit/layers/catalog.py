"""One row per method. Contract tests, the command line, the lab, documentation and benchmarks read it.

Adding a method means a reference, a function, a layer and a row here; a test fails where a row is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import ArgumentError
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["METHODS", "Method", "create", "method"]


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
    known = ", ".join(row.name for row in METHODS)
    raise ArgumentError(f"unknown normalization {name!r}; known are: {known}")


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
