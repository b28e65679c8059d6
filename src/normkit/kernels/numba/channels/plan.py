"""How the work on one shape is cut for the CPU kernels with statistics per channel.

The cut depends on the shape, the memory layout and the element size alone, never on the number of threads: results are
the same in every bit for any of them.
"""

import functools
import math
from dataclasses import dataclass

from torch import Tensor

from ..arguments import GROUP
from ..moments import CHUNK

__all__ = ["GRAIN", "Plan", "is_streamed", "layout_of", "plan"]

GRAIN = 32768  # elements that are worth a thread
_L2 = 1 << 19  # bytes of one task's tensors that should stay in the cache nearest the core
_STREAMED = 1 << 24  # bytes of output from which the caches are passed by
_LINE = 64  # bytes of a line of the cache
_FEW_CHANNELS = 16
_FEW_ROWS = 512


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
    strip: int
    stream: bool

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The slots from OUTER to COUNT."""
        shape = (self.outer, self.channels, self.inner)
        cut = (self.group, self.blocks, self.fold, self.width, self.strip, self.stream)
        return (*shape, *cut, self.outer * self.inner)


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
        strip=1,
        stream=stream,
    )


def _plan_channels_last(samples: int, channels: int, positions: int, itemsize: int, stepwise: bool) -> Plan:
    rows = samples * positions
    fused = not stepwise and rows <= _FEW_ROWS and channels >= 64
    fold = 1
    if not fused and channels % 16 and channels < 128:
        period = 16 // math.gcd(channels, 16)
        fold = period if rows >= 8 * period else 1
    width = -(-channels * fold // 16) * 16
    group = 16 * max(1, min(16, width // 256)) if fused else 1
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
        strip=16 if width <= 256 else 8,
        stream=is_streamed(rows * channels, channels * fold, itemsize, by_columns=True),
    )


def is_streamed(elements: int, run: int, itemsize: int, *, by_columns: bool = False) -> bool:
    """Say whether an output passes the caches by, written in runs of ``run`` elements or by columns, 16 at a time."""
    # Sixteen columns of half precision are half a line of the cache: streamed, it would be waited for twice.
    if by_columns and 16 * itemsize < _LINE:
        return False
    # A streaming store needs its address aligned to a whole vector, and torch aligns memory to 64 bytes.
    return elements * itemsize >= _STREAMED and itemsize <= 4 and run % 16 == 0
