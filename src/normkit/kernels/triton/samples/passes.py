"""Normalization per sample on a GPU: Triton kernels for layer, RMS, group and instance normalization, in both layouts.

A tensor is seen as a `Form` says: N samples of C channels in G groups, S positions; every group of every sample, a row,
has statistics of its own. Layer and RMS normalization are this with one group, C elements and no positions.

In contiguous memory a row is one run, a line. A program takes lines that fit a tile whole and reads x once. All else is
cut into columns, one channel of one sample each: one launch gathers (count, mean, m2) of every share of every column, a
second merges the columns of a row in float64 in a fixed order, and a third writes the output and visits the tiles in
reverse, so that the cache serves what was read last. The backward of lines with a weight for every element adds the
weights' gradients up on its way; the others take the columns.

How the work is cut depends on the form alone, and nothing is added atomically: results are the same in every run. The
kernels have been interpreted and compiled, and not yet run on a GPU. Triton is imported at the first call.
"""

import functools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...forms import Form, form_of, form_of_rows
from .. import launch as triton_launch
from ..launch import EXACT, computed, piece, power

__all__ = ["backward", "form_of", "form_of_rows", "forward", "plan", "unavailable"]

_TILE = 4096  # values that a program of many tiles holds at a time
_WHOLE = 16384  # values of the longest line that a program takes whole
_PROGRAMS = 2048  # enough to keep every GPU busy
_SHARES = 512  # programs of a backward that each keep a table of dweight and dbias
_SPLITS = 256  # at most; one program merges those of a row
_CHUNK = 1024  # parts that it merges at a time


@dataclass(frozen=True, slots=True)
class Plan:
    """How the work on a form is cut. It depends on the form alone.

    ``depth`` and ``run`` are the sides of a tile: samples and values of lines, or positions and columns; see
    `steps`. ``whole`` tells whether the forward takes lines, ``line_depth`` and ``line_run`` how.
    """

    form: Form
    whole: bool
    line_depth: int
    line_run: int
    depth: int
    run: int
    tiles: int
    splits: int

    @property
    def size(self) -> int:
        """Channels of a group."""
        return self.form.channels // self.form.groups

    @property
    def width(self) -> int:
        """Values that share statistics."""
        return self.size * self.form.positions

    @property
    def rows(self) -> int:
        """Groups of all samples."""
        return self.form.samples * self.form.groups

    @property
    def columns(self) -> int:
        """Channels of all samples."""
        return self.form.samples * self.form.channels

    @property
    def line_tiles(self) -> int:
        """Tiles of one group's lines."""
        return -(-self.form.samples // self.line_depth)

    @property
    def grid(self) -> tuple[int, int]:
        """The programs that share the columns."""
        return -(-self.columns // self.run), self.splits

    @property
    def merging(self) -> dict[str, Any]:
        """The settings of kernels that merge the columns of a row."""
        return {"CHUNK": min(_CHUNK, power(self.splits * self.size)), **EXACT}

    def line_grid(self, programs: int) -> tuple[int, int]:
        """About so many programs, that share the lines."""
        return self.form.groups, max(1, min(self.line_tiles, programs // self.form.groups))

    @property
    def line_settings(self) -> dict[str, Any]:
        """The settings under which kernels over lines are compiled."""
        warps = max(1, min(16, self.line_depth * self.line_run // 512))
        step = math.gcd(self.width, 16)
        return {"DEPTH": self.line_depth, "RUN": self.line_run, "WIDTH_STEP": step, "num_warps": warps, **EXACT}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings under which kernels over columns are compiled."""
        return {
            "LAST": self.form.layout == "channels_last",
            "DEPTH": self.depth,
            "RUN": self.run,
            "INNER_STEP": math.gcd(self.form.positions, 16),
            "CHANNEL_STEP": math.gcd(self.form.channels, 16),
            "num_warps": max(1, min(16, self.depth * self.run // 512)),
            **EXACT,
        }


@functools.lru_cache(maxsize=4096)
def plan(form: Form) -> Plan:
    """Cut the work on a form."""
    columns, positions = form.samples * form.channels, form.positions
    width = form.channels // form.groups * positions
    line_run = power(width)
    # Few lines to a tile where there are few in all, so that every part of the GPU has some.
    crowd = power(-(-form.samples * form.groups // _PROGRAMS))
    line_depth = max(1, min(_TILE // line_run, power(form.samples), crowd))
    if form.layout == "channels_last":
        run = min(power(form.channels), 64)
        depth = min(power(positions), max(1, _TILE // run))
    else:
        depth = min(piece(positions), _TILE)
        run = max(1, min(_TILE // depth, power(columns)))
    tiles = -(-positions // depth)
    splits = max(1, min(_SPLITS, tiles, -(-_PROGRAMS // -(-columns // run))))
    whole = form.layout != "channels_last" and width <= _WHOLE
    return Plan(form, whole, line_depth, line_run, depth, run, tiles, splits)


def unavailable(x: Tensor, form: Form) -> str | None:
    """Say why Triton cannot serve this tensor, or None where it can."""
    width = form.channels // form.groups
    if form.layout == "elementwise" and width > _WHOLE:
        return f"Triton kernels take rows of at most {_WHOLE} elements that have a weight each, got {width}"
    return triton_launch.unavailable(x)


def _steps() -> ModuleType:
    from . import steps as sample_steps

    return sample_steps


def _forward() -> ModuleType:
    from . import forward as sample_forward

    return sample_forward


def _backward() -> ModuleType:
    from . import backward as sample_backward

    return sample_backward


def forward(
    x: Tensor,
    form: Form,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool = True,
    activation: str | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize every group, scale, shift, apply the activation.

    Args:
        x: dense, as ``form`` says.
        form: what `form_of` or `form_of_rows` make of x.
        weight: C values, or None for 1.
        bias: C values, or None for 0.
        eps: added to the variance, or to the mean square.
        centred: whether the mean is removed; False is RMS normalization.
        activation: relu, relu6, leaky_relu, silu or None, applied last.
        variance: N * G float64 numbers where the groups' variances are to be written, or None.

    Returns:
        y, laid out as x, and (2, N * G) float64 with mean, or 0 without centring, and rstd.
    """
    cut = plan(form)
    y = torch.empty_like(x)
    saved = torch.empty((2, cut.rows), dtype=torch.float64, device=x.device)
    weight, bias = computed(weight), computed(bias)
    with torch.cuda.device_of(x):
        if cut.whole:
            grid = cut.line_grid(_PROGRAMS)
            _forward().forward_lines[grid](
                x, y, weight, bias, saved, variance, form.samples, form.groups, cut.width, form.positions,
                cut.line_tiles, grid[1], float(eps), CENTRE=centred, ACTIVATION=activation, **cut.line_settings,
            )  # fmt: skip
            return y, saved
        partials = torch.empty((3, cut.splits, cut.columns), dtype=torch.float64, device=x.device)
        sizes, shares = (cut.columns, form.channels), (form.positions, cut.tiles, cut.splits)
        _forward().partial_columns[cut.grid](x, partials, *sizes, *shares, **cut.settings)
        _steps().finish_rows[(cut.rows,)](
            partials, saved, cut.rows, cut.columns, cut.size, cut.splits, float(cut.width), float(eps), variance,
            CENTRE=centred, **cut.merging,
        )  # fmt: skip
        _forward().apply_columns[cut.grid](
            x, y, weight, bias, saved, *sizes, cut.size, *shares, ACTIVATION=activation, **cut.settings
        )
    return y, saved


def backward(
    dy: Tensor,
    x: Tensor,
    form: Form,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    centred: bool = True,
    activation: str | None = None,
    wanted: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dx and, where wanted, dweight and dbias, C float32 numbers each.

    Args:
        dy: laid out as x.
        x: what the forward was given, as form, weight, bias, centred and activation.
        form: as above.
        weight: as above.
        bias: as above.
        saved: what the forward returned.
        centred: as above. Without it, the form has no positions.
        activation: as above.
        wanted: whether dweight and dbias are.
    """
    assert centred or form.positions == 1, "a root mean square is of rows without positions"
    cut, dx = plan(form), torch.empty_like(x)
    tensors = (dy, x, dx, computed(weight), computed(bias), saved)
    with torch.cuda.device_of(x):
        if form.positions == 1:
            partials = _backward_of_lines(cut, tensors, centred, activation, wanted)
        else:
            partials = _backward_of_columns(cut, tensors, activation)
        if partials is None or not wanted:
            return dx, None, None
        sums = torch.empty((2, form.channels), dtype=torch.float32, device=x.device)
        parts, run = partials.shape[1] // form.channels, min(power(form.channels), 64)
        _steps().add_parts[(-(-form.channels // run),)](
            partials, sums, form.channels, parts, DEPTH=min(64, power(parts)), WIDTH=run, **EXACT
        )
    return dx, sums[0], sums[1]


def _backward_of_lines(
    cut: Plan, tensors: tuple[Tensor | None, ...], centred: bool, activation: str | None, wanted: bool
) -> Tensor | None:
    """Write dx, and return the shares' sums by channel, (2, parts * C) float64."""
    grid, form = cut.line_grid(_SHARES), cut.form
    partials = _room(tensors, grid[1] * form.channels) if wanted else None
    _backward().backward_lines[grid](
        *tensors, partials, form.samples, form.groups, cut.width, cut.line_tiles, grid[1],
        CENTRE=centred, ACTIVATION=activation, **cut.line_settings,
    )  # fmt: skip
    return partials


def _backward_of_columns(cut: Plan, tensors: tuple[Tensor | None, ...], activation: str | None) -> Tensor:
    """Write dx, and return the columns' sums, (2, parts * C) float64."""
    dy, x, _, weight, bias, saved = tensors
    form, partials, exact = cut.form, _room(tensors, cut.splits * cut.columns), _room(tensors, cut.rows)
    sizes = (cut.columns, form.channels, cut.size, form.positions, cut.tiles, cut.splits)
    _backward().backward_partial_columns[cut.grid](
        dy, x, weight, bias, saved, partials, *sizes, ACTIVATION=activation, **cut.settings
    )
    _steps().finish_row_sums[(cut.rows,)](
        partials, exact, weight, cut.rows, cut.columns, form.channels, cut.size, cut.splits, **cut.merging
    )
    _backward().apply_backward_columns[cut.grid](
        *tensors, exact, *sizes, float(cut.width), ACTIVATION=activation, **cut.settings
    )
    return partials


def _room(tensors: tuple[Tensor | None, ...], size: int) -> Tensor:
    """Two rows of float64 numbers, where x is."""
    x = tensors[1]
    assert x is not None
    return torch.empty((2, size), dtype=torch.float64, device=x.device)
