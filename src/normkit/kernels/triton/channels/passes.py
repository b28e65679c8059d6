"""Normalization per channel on a GPU: Triton kernels for both memory layouts, called as the CPU's `passes`.

A channel that fits one tile is read once, by one program. A larger one is cut into shares, a number that depends on the
shape alone: one launch gathers (count, mean, m2) of every share, a second merges them in float64 in a fixed order, and
a third writes the output and visits the tiles in reverse, so that the cache serves what was read last.

Statistics gather in float32, tile by tile, in two passes about a value of the tile.

Triton is imported at the first call. Without a GPU its interpreter runs the kernels, slowly, where
``TRITON_INTERPRET=1`` was set before Triton was imported: this is how they are tested on a CPU.
"""

import functools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..launch import EXACT, computed, piece, power, unavailable

__all__ = ["backward", "forward", "inference", "plan", "unavailable"]

_TILE = 4096  # values that a program of many tiles holds at a time
_WHOLE = 16384  # values that a program of one tile holds
_PROGRAMS = 2048  # enough to keep every GPU busy
_SPLITS = 256  # at most; one program merges those of a channel


@dataclass(frozen=True, slots=True)
class Plan:
    """How the work on one shape is cut. It depends on the shape alone.

    A planes tensor has ``outer`` samples of ``channels`` planes of ``inner`` values, a channels-last one ``outer``
    rows. ``run`` and ``depth`` are the sides of a tile; see `tiles`.
    """

    rows: bool
    outer: int
    channels: int
    inner: int
    chunks: int
    depth: int
    run: int
    tiles: int
    splits: int
    programs: int
    warps: int

    @property
    def count(self) -> float:
        """Values per channel."""
        return float(self.outer * self.inner)

    @property
    def whole(self) -> bool:
        """Whether a channel is one tile."""
        return self.tiles == 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The first sizes that every kernel over elements takes."""
        return self.outer, self.channels, self.inner, self.chunks

    @property
    def settings(self) -> dict[str, Any]:
        """The settings under which those kernels are compiled."""
        steps = (math.gcd(self.inner, 16), math.gcd(self.channels, 16))
        return {
            "ROWS": self.rows,
            "DEPTH": self.depth,
            "RUN": self.run,
            "INNER_STEP": steps[0],
            "CHANNEL_STEP": steps[1],
            "num_warps": self.warps,
            **EXACT,
        }


@functools.lru_cache(maxsize=4096)
def plan(shape: tuple[int, ...], layout: str) -> Plan:
    """Cut the work on a tensor of this shape and layout."""
    samples, channels = shape[:2]
    positions = math.prod(shape[2:])
    rows = layout == "channels_last" or positions == 1
    outer, inner = (samples * positions, 1) if rows else (samples, positions)
    chunks = 1
    if rows:
        pieces, run = outer, min(power(channels), 16)
        if power(pieces) * run > _WHOLE or pieces > 1024:
            run = min(power(channels), 64)
        programs = -(-channels // run)
    else:
        run = piece(inner)
        chunks = -(-inner // run)
        pieces, programs = outer * chunks, channels
    depth = power(pieces)
    # Planes of odd length are read one value at a time, and each needs registers for an address of its own.
    whole = _WHOLE if rows or inner % 4 == 0 else _WHOLE // 2
    if depth * run > whole or (rows and depth > 1024):
        depth = max(1, _TILE // run)
    tiles = -(-pieces // depth)
    splits = max(1, min(_SPLITS, tiles, -(-_PROGRAMS // programs)))
    warps = max(1, min(16, depth * run // 512))
    return Plan(rows, outer, channels, inner, chunks, depth, run, tiles, splits, programs, warps)


def _steps() -> ModuleType:
    from . import steps as channel_steps

    return channel_steps


def _forward() -> ModuleType:
    from . import forward as channel_forward

    return channel_forward


def _backward() -> ModuleType:
    from . import backward as channel_backward

    return channel_backward


def _merging(cut: Plan) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and settings of the kernels that merge shares."""
    width = min(power(cut.channels), 8)
    return (-(-cut.channels // width),), {"SPLITS": power(cut.splits), "WIDTH": width, **EXACT}


def forward(
    x: Tensor,
    layout: str,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    unbiased: bool,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize with the batch's statistics and move the running ones.

    Args:
        x: dense, laid out as ``layout`` says.
        layout: "contiguous" for contiguous (N, C, *), "channels_last" for channels-last.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        running_mean: (C,), float32 and contiguous, or None.
        running_var: likewise.
        momentum: the weight of the new batch.
        eps: added to the variance.
        unbiased: store the variance with divisor m - 1.
        activation: relu, relu6, leaky_relu, silu or None, applied last.
        residual: laid out as x, added before the activation.
        out: where to write y, laid out as x; x itself for in place, None for fresh memory.

    Returns:
        y, and (2, C) float64 with mean and rstd.
    """
    cut = plan(tuple(x.shape), layout)
    y = torch.empty_like(x) if out is None else out
    saved = torch.empty((2, cut.channels), dtype=torch.float64, device=x.device)
    weight, bias = computed(weight), computed(bias)
    stored = (running_mean, running_var)
    with torch.cuda.device_of(x):
        if cut.whole:
            _forward().forward[(cut.programs,)](
                x, y, residual, weight, bias, *stored, saved, *cut.sizes, cut.count, float(momentum), float(eps),
                UNBIASED=unbiased, ACTIVATION=activation, **cut.settings,
            )  # fmt: skip
            return y, saved
        partials = torch.empty((3, cut.splits, cut.channels), dtype=torch.float64, device=x.device)
        grid = (cut.programs, cut.splits)
        _forward().partial[grid](x, partials, *cut.sizes, cut.tiles, cut.splits, **cut.settings)
        merging, settings = _merging(cut)
        _steps().finish[merging](
            partials, saved, *stored, cut.channels, cut.splits, cut.count, float(momentum), float(eps),
            UNBIASED=unbiased, **settings,
        )  # fmt: skip
        _forward().apply[grid](
            x, y, residual, weight, bias, *stored, saved, *cut.sizes, cut.tiles, cut.splits, float(eps),
            STORED=False, ACTIVATION=activation, **cut.settings,
        )  # fmt: skip
    return y, saved


def inference(
    x: Tensor,
    layout: str,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize with stored statistics. Arguments and result as `forward`."""
    cut = plan(tuple(x.shape), layout)
    y = torch.empty_like(x) if out is None else out
    saved = torch.empty((2, cut.channels), dtype=torch.float64, device=x.device)
    weight, bias, mean, var = map(computed, (weight, bias, running_mean, running_var))
    with torch.cuda.device_of(x):
        _forward().apply[(cut.programs, cut.splits)](
            x, y, residual, weight, bias, mean, var, saved, *cut.sizes, cut.tiles, cut.splits, float(eps),
            STORED=True, ACTIVATION=activation, **cut.settings,
        )  # fmt: skip
    return y, saved


def backward(
    dy: Tensor,
    x: Tensor,
    layout: str,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    activation: str | None = None,
    other: Tensor | None = None,
    residual: bool = False,
    frozen: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dx, dweight, dbias and the gradient of the residual.

    Args:
        dy: laid out as x.
        x: what the forward was given, as layout, weight, bias and activation.
        layout: as above.
        weight: as above.
        bias: as above.
        saved: what the forward returned.
        activation: as above.
        other: with residual and activation, what decides the slope: the output for a relu, relu6 or leaky_relu, the
            residual for the others.
        residual: a residual was added.
        frozen: the statistics were constants.
    """
    cut = plan(tuple(x.shape), layout)
    dx = torch.empty_like(x)
    written = torch.empty_like(x) if residual and activation is not None else None
    sums = torch.empty((2, cut.channels), dtype=torch.float32, device=x.device)
    weight, bias = computed(weight), computed(bias)
    tensors = (dy, x, other if residual else None, dx, written, weight, bias, saved)
    with torch.cuda.device_of(x):
        if cut.whole:
            _backward().backward[(cut.programs,)](
                *tensors, sums, *cut.sizes, cut.count, FROZEN=frozen, ACTIVATION=activation, **cut.settings
            )
        else:
            _backward_in_shares(cut, tensors, sums, activation, frozen)
    return dx, sums[0], sums[1], dy if residual and activation is None else written


def _backward_in_shares(
    cut: Plan, tensors: tuple[Tensor | None, ...], sums: Tensor, activation: str | None, frozen: bool
) -> None:
    """Gather the sums of every share, add them, and write the gradients."""
    saved, grid, sizes = tensors[-1], (cut.programs, cut.splits), (*cut.sizes, cut.tiles, cut.splits)
    partials = torch.empty((2, cut.splits, cut.channels), dtype=torch.float64, device=sums.device)
    exact = torch.empty((2, cut.channels), dtype=torch.float64, device=sums.device)
    _backward().backward_partial[grid](*tensors, partials, *sizes, FROZEN=frozen, ACTIVATION=activation, **cut.settings)
    merging, settings = _merging(cut)
    _steps().finish_sums[merging](partials, saved, exact, sums, cut.channels, cut.splits, **settings)
    if not frozen:
        _backward().apply_backward[grid](*tensors, exact, *sizes, cut.count, ACTIVATION=activation, **cut.settings)
