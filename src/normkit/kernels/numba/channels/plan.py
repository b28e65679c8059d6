"""How the work on one shape is cut for the CPU kernels with statistics per channel.

The cut depends on the shape, the memory layout and the element size alone, never on the number of threads: results are
the same in every bit for any of them.
"""

import contextlib
import ctypes
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from .. import slots
from ..arguments import GROUP
from ..moments import CHUNK
from .columns import TILE

__all__ = ["GRAIN", "LINE", "Plan", "is_streamed", "layout_of", "plan", "plan_stored"]

GRAIN = 32768  # elements that are worth a thread
_L2 = 1 << 19  # bytes of one task's tensors that should stay in the cache nearest the core
_STREAMED = 1 << 24  # the most bytes of output that are written through the caches
LINE = 64  # bytes of a line of the cache
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # where Linux names them
_FEW_CHANNELS = 16
_FEW_ROWS = 512
_LONG = 128  # elements of a run, of which less than a quarter stand in the lines at its ends
# A vector of half precision is half a line: where a run ends, one half of a line goes through the caches and one past
# them. On an Intel Xeon with 260 MB of last cache that took 140 ns for each run.
_LONG_OF_HALVES = 2048
_WIDE = 320  # columns of a folded row that are merged into few channels in no time


@dataclass(frozen=True)
class Plan:
    """How the work on one shape is cut. It depends on the shape and type alone."""

    layout: str
    fused: bool
    outer: int
    channels: int
    inner: int
    group: int
    blocks: int
    fold: int
    width: int
    tasks: int
    grain: int
    partials: int  # float64 numbers of working memory
    stream: bool

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The slots from OUTER to COUNT."""
        shape = (self.outer, self.channels, self.inner)
        cut = (self.group, self.blocks, self.fold, self.width, 1, self.stream)
        return (*shape, *cut, self.outer * self.inner)

    @functools.cached_property
    def context(self) -> type[ctypes.Array[ctypes.c_int64]]:
        """The slots of a call, and behind them the coefficients where there is no other working memory.

        On a small tensor a tensor for them would cost more than they do.
        """
        return ctypes.c_int64 * (slots.SIZE + (0 if self.partials else 5 * self.width))

    def sizes_at(self, address: int) -> tuple[int, ...]:
        """Return the same slots for outputs that begin at these addresses or-ed: a line of the cache is not cut."""
        if address % LINE and self.stream:
            return tuple(False if slot == slots.STREAM else size for slot, size in enumerate(self.sizes, slots.OUTER))
        return self.sizes


def layout_of(x: Tensor) -> str | None:
    """Return "contiguous" for contiguous (N, C, *), "channels_last" for channels-last, None for what is neither."""
    if x.dim() == 2:
        return "channels_last" if x.is_contiguous() else None
    if x.is_contiguous():
        return "contiguous"
    if x.movedim(1, -1).is_contiguous():
        return "channels_last"
    return None


@functools.lru_cache(maxsize=4096)
def plan(shape: tuple[int, ...], layout: str, itemsize: int, stepwise: bool = False) -> Plan:
    """Cut the work on a tensor of this shape, layout and element size, for one fused kernel where that is quicker.

    With ``stepwise`` it is never fused: the steps run apart, and something may come between them.
    """
    samples, channels = shape[:2]
    positions = math.prod(shape[2:])
    if layout == "contiguous" and positions == 1:
        layout = "channels_last"
    cut = _plan_contiguous if layout == "contiguous" else _plan_channels_last
    return cut(samples, channels, positions, itemsize, stepwise)


@functools.lru_cache(maxsize=4096)
def plan_stored(shape: tuple[int, ...], layout: str, itemsize: int) -> Plan:
    """As `plan`, for one pass with stored statistics.

    The input is read once, so that a last cache holds input and output until they are half as large as it.
    """
    cut = plan(shape, layout, itemsize)
    large = math.prod(shape) * itemsize >= min(_STREAMED, 2 * streamed_from())
    return cut if large else replace(cut, stream=False)


def _plan_contiguous(samples: int, channels: int, positions: int, itemsize: int, stepwise: bool) -> Plan:
    values = samples * positions
    stream = is_streamed(values * channels, positions, itemsize)
    chunks = -(-samples // max(1, CHUNK // positions)) if positions <= CHUNK else samples * -(-positions // CHUNK)
    fused = not stepwise and (channels >= _FEW_CHANNELS or values * channels < 4 * GRAIN)
    group = 1
    if fused and positions < 1024:
        # Side by side in memory up to a page, as long as the tasks stay enough and fit the cache.
        fitting = max(1, _L2 // (2 * values * itemsize))
        group = max(1, min(GROUP, -(-1024 // positions), fitting, channels // 8))
    blocks = 1 if fused else min(chunks, 32)
    return Plan(
        layout="contiguous",
        fused=fused,
        outer=samples,
        channels=channels,
        inner=positions,
        group=group,
        blocks=blocks,
        fold=1,
        width=channels,
        tasks=-(-channels // group) if fused else channels * blocks,
        grain=max(1, GRAIN // (values * group if fused else max(1, values // blocks))),
        partials=0 if fused else 3 * channels * blocks,
        stream=stream,
    )


def _plan_channels_last(samples: int, channels: int, positions: int, itemsize: int, stepwise: bool) -> Plan:
    rows = samples * positions
    fused = not stepwise and rows <= _FEW_ROWS and channels >= 64
    fold = 1 if fused else _fold(rows, channels)
    width = -(-channels * fold // 16) * 16
    group = TILE * max(1, min(4, width // 1024)) if fused else 1
    folded = rows // fold
    # Blocks of a few hundred rows: merging one costs about as much as reading four rows.
    blocks = 1 if fused else max(1, min(64, rows * channels // GRAIN, folded // 128))
    return Plan(
        layout="channels_last",
        fused=fused,
        outer=rows,
        channels=channels,
        inner=1,
        group=group,
        blocks=blocks,
        fold=fold,
        width=width,
        tasks=-(-width // group) if fused else blocks,
        grain=max(1, GRAIN // (rows * group)) if fused else 1,
        partials=5 * width * blocks,
        stream=is_streamed(rows * channels, channels * fold, itemsize, by_columns=True),
    )


def _fold(rows: int, channels: int) -> int:
    """Return how many rows of few channels are read as one: whole tiles where they are not wide, else whole vectors."""
    if channels >= 128:
        return 1
    tiles, vectors = TILE // math.gcd(channels, TILE), 16 // math.gcd(channels, 16)
    if channels * tiles <= _WIDE and rows >= 64 * tiles:
        return tiles
    return vectors if rows >= 8 * vectors else 1


def is_streamed(elements: int, run: int, itemsize: int, *, by_columns: bool = False) -> bool:
    """Say whether an output passes the caches by, written in runs of ``run`` elements, or by columns of such rows."""
    # Sixteen columns of half precision are half a line of the cache: streamed, it would be waited for twice.
    if by_columns and 16 * itemsize < LINE and run % TILE:
        return False
    # A streaming store needs its address aligned to a whole vector: `Plan.sizes_at` looks where the output begins. A
    # long run may begin and end inside a line, which costs more than it saves while a cache could hold the tensor.
    least = streamed_from()
    if run % (LINE // itemsize):
        least = _STREAMED
        if by_columns or run < (_LONG if 16 * itemsize >= LINE else _LONG_OF_HALVES):
            return False
    return elements * itemsize >= least and itemsize <= 4


@functools.cache
def streamed_from() -> int:
    """Return from how many bytes of output the caches are passed by: a quarter of the last one, 16 MB at most.

    What is written through them pushes the input out, and whatever else is used. Every bit is the same either way.
    """
    cache = last_cache()
    return _STREAMED if cache is None else max(_STREAMED // 4, min(_STREAMED, cache // 4))


def last_cache() -> int | None:
    """Return the bytes of the largest cache, or None where the system does not say."""
    units, found = {"K": 1 << 10, "M": 1 << 20}, []
    with contextlib.suppress(OSError):
        for path in _CACHES.glob("index*/size"):
            size = path.read_text().strip()
            if size[-1:] in units and size[:-1].isdecimal():
                found.append(int(size[:-1]) * units[size[-1]])
    return max(found, default=None)
