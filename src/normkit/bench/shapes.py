"""The shapes that are timed, in named sets, and the rows they span."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from ..spelling import alternatives

__all__ = ["CHAINS", "DTYPES", "LAYOUTS", "SETS", "WORKS", "Row", "Shape", "plan"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted")
WORKS = ("eval", "forward", "forward+backward")
CHAINS = ("bn", "bn+relu", "bn+add+relu")

# What is timed where nothing is said: half precision is bfloat16's business on a CPU.
DEFAULT_DTYPES = ("float32", "bfloat16")

# With ``--quick`` half precision is timed on these sets alone, so that it is done in a minute.
QUICK_HALF = frozenset({"resnet50", "tiny"})


@dataclass(frozen=True)
class Shape:
    """A shape ``(N, C, *)`` of a network.

    Attributes:
        sizes: N, C and the positions.
        count: how many layers of the network have it.
        quick: timed with ``--quick`` too.
        works: what is timed on it.
        stored: "sliced" or "permuted" where its memory is to be neither contiguous nor channels-last.
    """

    sizes: tuple[int, ...]
    count: int = 1
    quick: bool = False
    works: tuple[str, ...] = WORKS
    stored: str | None = None

    @property
    def elements(self) -> int:
        """How many values it holds."""
        return math.prod(self.sizes)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts in memory that it can have: channels-last only where that differs from contiguous."""
        if self.stored is not None:
            return (self.stored,)
        has_both = len(self.sizes) >= 4 and math.prod(self.sizes[2:]) > 1 and self.sizes[1] > 1
        return LAYOUTS[:2] if has_both else LAYOUTS[:1]

    def __str__(self) -> str:
        """The sizes as ``32x64x56x56``."""
        return "x".join(map(str, self.sizes))


def _planes(samples: int, size: int, *channels: int, dimensions: int = 2) -> tuple[Shape, ...]:
    return tuple(Shape((samples, count, *(size for _ in range(dimensions)))) for count in channels)


SETS: dict[str, tuple[Shape, ...]] = {
    "resnet50": (
        Shape((32, 64, 112, 112)),
        Shape((32, 64, 56, 56), count=6),
        Shape((32, 256, 56, 56), count=4),
        Shape((32, 128, 56, 56)),
        Shape((32, 128, 28, 28), count=7),
        Shape((32, 512, 28, 28), count=5),
        Shape((32, 256, 28, 28)),
        Shape((32, 256, 14, 14), count=11),
        Shape((32, 1024, 14, 14), count=7),
        Shape((32, 512, 14, 14)),
        Shape((32, 512, 7, 7), count=5, quick=True),
        Shape((32, 2048, 7, 7), count=4),
    ),
    "mobilenetv2": (
        *_planes(32, 112, 32, 16, 96),
        *_planes(32, 56, 96, 24, 144),
        *_planes(32, 28, 144, 32, 192),
        *_planes(32, 14, 192, 64, 384),
        Shape((32, 96, 14, 14), quick=True),
        *_planes(32, 14, 576),
        *_planes(32, 7, 576, 160, 960, 320, 1280),
    ),
    "unet3d": (
        *_planes(2, 128, 32, dimensions=3),
        *_planes(2, 96, 32, dimensions=3),
        *_planes(2, 48, 64, dimensions=3),
        *_planes(2, 24, 128, dimensions=3),
        *_planes(2, 12, 256, dimensions=3),
        Shape((2, 320, 6, 6, 6), quick=True),
        *_planes(1, 96, 32, dimensions=3),
        *_planes(1, 24, 128, dimensions=3),
    ),
    "unet2d": (
        *_planes(4, 256, 64),
        *_planes(4, 128, 128),
        *_planes(4, 64, 256),
        *_planes(4, 32, 512),
        Shape((4, 1024, 16, 16), quick=True),
    ),
    "mlp": (
        Shape((32, 128)),
        Shape((128, 256)),
        Shape((256, 512), quick=True),
        Shape((1024, 1024)),
        Shape((4096, 64)),
        Shape((65536, 128)),
        Shape((32, 8192)),
    ),
    "audio": (
        Shape((16, 64, 16000)),
        Shape((32, 128, 4000)),
        Shape((32, 512, 300)),
        Shape((8, 1, 160000), quick=True),
    ),
    "lenet": (
        Shape((32, 6, 28, 28), quick=True),
        Shape((32, 16, 10, 10)),
        Shape((1, 6, 28, 28)),
        Shape((256, 6, 28, 28)),
        Shape((32, 120)),
        Shape((32, 84)),
    ),
    "edge": (
        Shape((32, 3, 224, 224)),
        Shape((1, 64, 56, 56), works=("eval",)),
        Shape((256, 2048, 1, 1)),
        Shape((32, 65, 17, 19), quick=True),
        Shape((2, 1, 1)),
        Shape((16, 64, 28, 28), stored="sliced"),
        Shape((16, 64, 28, 28), stored="permuted"),
    ),
    # Up to 4,096 values: the cost of a call.
    "tiny": (
        Shape((16, 10)),
        Shape((32, 64), quick=True),
        Shape((64, 64)),
        Shape((4, 8, 64)),
        Shape((2, 3, 2, 2)),
        Shape((4, 8, 4, 4)),
        Shape((8, 8, 8, 8), quick=True),
        Shape((2, 8, 4, 4, 4)),
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: what is computed on what.

    >>> Row("lenet", SETS["lenet"][0], "float32", "contiguous", "forward", "bn+relu").name
    'lenet 32x6x28x28 float32 contiguous forward bn+relu'
    """

    set: str
    shape: Shape
    dtype: str
    layout: str
    work: str
    chain: str

    @property
    def name(self) -> str:
        """The row in words."""
        return f"{self.set} {self.shape} {self.dtype} {self.layout} {self.work} {self.chain}"

    @property
    def activation(self) -> str | None:
        """The activation after the normalization: MobileNetV2's is ReLU6."""
        if self.chain == "bn":
            return None
        return "relu6" if self.set == "mobilenetv2" else "relu"

    @property
    def has_residual(self) -> bool:
        """Whether a second tensor is added before the activation."""
        return "add" in self.chain

    @property
    def tensors_moved(self) -> int:
        """How many tensors of the input's size must at least be read or written.

        A forward reads the input and the residual and writes the output. A backward reads the input and the output's
        gradient and writes the input's gradient; with a residual it writes that one's gradient too.
        """
        forward = 3 if self.has_residual else 2
        backward = 4 if self.has_residual else 3
        return forward + (backward if self.work == "forward+backward" else 0)

    @property
    def bytes_of_tensor(self) -> int:
        """The bytes of the input."""
        return self.shape.elements * DTYPES[self.dtype].itemsize

    def bytes_needed(self, peers: int) -> int:
        """The memory that timing and checking this row takes: inputs, a copy, and what every peer returns."""
        given = 4 if self.has_residual else 3
        returned = 3 if self.work == "forward+backward" else 1
        return self.bytes_of_tensor * (given + returned * peers + 3)


def plan(
    sets: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    layouts: Sequence[str] | None = None,
    works: Sequence[str] | None = None,
    chains: Sequence[str] | None = None,
    *,
    quick: bool = False,
) -> list[Row]:
    """Return the rows that the choices span; None chooses all.

    With ``quick`` they are the quick shapes, and those in half precision fewer unless ``dtypes`` asks for it.

    Raises:
        ArgumentError: an unknown name, or choices that leave no row.

    >>> len(plan(["lenet"], quick=True))
    18
    """
    asked = dtypes is not None
    sets = _chosen("--shapes", sets, tuple(SETS), tuple(SETS))
    dtypes = _chosen("--dtype", dtypes, tuple(DTYPES), DEFAULT_DTYPES)
    layouts = _chosen("--layout", layouts, LAYOUTS, LAYOUTS)
    works = _chosen("--work", works, WORKS, WORKS)
    chains = _chosen("--chain", chains, CHAINS, CHAINS)
    rows = [
        Row(name, shape, dtype, layout, work, chain)
        for name in sets
        for shape in SETS[name]
        if shape.quick or not quick
        for dtype in dtypes
        if asked or not quick or dtype == "float32" or name in QUICK_HALF
        for layout in shape.layouts
        if layout in layouts
        for work in shape.works
        if work in works
        for chain in chains
    ]
    if not rows:
        raise ArgumentError(
            f"--shapes {','.join(sets)} has no shape for --layout {','.join(layouts)} and --work {','.join(works)}"
            f"{' with --quick' if quick else ''}; leave one of them out"
        )
    return rows


def _chosen(
    option: str, names: Sequence[str] | None, known: tuple[str, ...], default: tuple[str, ...]
) -> tuple[str, ...]:
    if names is None:
        return default
    for name in names:
        if name not in known:
            raise ArgumentError(f"{option}: unknown {name!r}; {alternatives(name, known)}")
    return tuple(dict.fromkeys(names))
