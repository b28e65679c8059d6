"""One autograd node that normalizes several inputs with the statistics of all of them together, over ranks too.

What shares statistics may lie in one tensor, in several of one process (micro-batches that advance together), on
several ranks, or in several on each of several ranks. The arithmetic is the four steps of `batch_steps` with one sum
between them: over the parts here, and over the ranks by the exchange.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..axes import batch_axes, values_per_channel
from ..errors import ShapeError
from ..kernels.plain import channels as plain
from ..kernels.saved import restore
from . import batch_steps, checks
from .agreement import BACKWARD, SECOND, SyncCall, bring, check_heads, seal
from .exchange import add_up, merge_moments
from .inplace import is_recorded
from .transforms import must_be_followed

# torch calls these methods by name and documents them: forward, backward.

__all__ = ["Pool", "apply_pooled", "check_total", "local_statistics", "merge_parts", "normalize_pooled"]


@dataclass(frozen=True, slots=True)
class Pool:
    """What all that is normalized together has in common.

    Attributes:
        mean: of all values, ``(C,)`` float64.
        var: their biased variance, likewise.
        count: how many they are per channel.
        differentiated: whether a gradient of any input is asked for, on any rank.
        call: with which ranks and how; its exchange is None for this process alone.
        check_backward: called before a backward is computed, which it may refuse.
    """

    mean: Tensor
    var: Tensor
    count: int
    differentiated: bool
    call: SyncCall
    check_backward: Callable[[], None] | None = None

    def stored(self, unbiased: bool) -> Tensor:
        """Return the variance to be stored, divided by m - 1 or by m."""
        return self.var * (self.count / (self.count - 1)) if unbiased else self.var


def local_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean, biased variance and number of values per channel; zeros where there are none."""
    count = values_per_channel(tuple(x.shape))
    if count:
        return *batch_steps.statistics(x), count
    zero = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    return zero, zero.clone(), 0


def merge_parts(parts: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, int]:
    """Return mean, biased variance and number of values of all parts together.

    >>> one, two = torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0]])
    >>> mean, var, count = merge_parts([local_statistics(one), local_statistics(two)])
    >>> mean.item(), round(var.item(), 4), count
    (4.0, 8.6667, 3)
    """
    if len(parts) == 1:
        return parts[0]
    total = sum(count for _, _, count in parts)
    counts = parts[0][0].new_tensor([count for _, _, count in parts])
    means = torch.stack([mean for mean, _, _ in parts])
    mean, squares = merge_moments(counts, means, torch.stack([var * count for _, var, count in parts]))
    return mean, squares / max(total, 1), total


def check_total(total: int, where: str, caller: nn.Module | None) -> None:
    """Refuse a single value per channel, which has no variance.

    Raises:
        ShapeError: ``total`` is 1.
    """
    if total == 1:
        said = f"Expected more than 1 value per channel when training, got 1 on all {where}, which has no variance"
        checks.refuse(ShapeError, f"{said}; pass drop_last=True to the training DataLoader", caller)


def normalize_pooled(
    inputs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    residuals: Sequence[Tensor | None],
    pool: Pool,
) -> tuple[Tensor, ...]:
    """Normalize each input, ``activation((x - mean) * rstd * weight + bias + residual)``, in one node of autograd.

    Args:
        inputs: ``(N, C, *)`` each, of one type; sizes may differ, and be 0.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        residuals: one for each input, or None.
        pool: the statistics and what else they share.
    """
    if not is_recorded(*inputs, weight, bias, *residuals):
        return tuple(apply_pooled(x, weight, bias, z, pool) for x, z in zip(inputs, residuals, strict=True))
    for x, z in zip(inputs, residuals, strict=True):
        checks.check_saveable(input=x, weight=weight, bias=bias, residual=z)
    given = (weight, bias, pool.mean, pool.var, *inputs, *residuals)
    outputs: tuple[Tensor, ...] = _Pooled.apply(pool, len(inputs), *given)
    return outputs


def apply_pooled(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, pool: Pool) -> Tensor:
    """Normalize one input, outside autograd."""
    if x.numel() == 0:
        return x.clone()
    rstd = (pool.var + pool.call.eps).rsqrt()
    return batch_steps.apply(x, pool.mean, rstd, weight, bias, pool.call.activation, residual)


class _Pooled(torch.autograd.Function):
    """The forward with statistics of all parts and ranks, and its backward: one sum over both."""

    @staticmethod
    def forward(
        ctx: Any,
        pool: Pool,
        parts: int,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        *large: Tensor | None,
    ) -> tuple[Tensor, ...]:
        inputs, residuals = large[:parts], large[parts:]
        # A part's output is kept where its sign gives the slope of the activation, else the residual that it hangs on.
        call, kept, outputs = pool.call, [], []
        gated = call.activation in plain.GATED_BY_OUTPUT
        for x, residual in zip(inputs, residuals, strict=True):
            assert x is not None
            y = apply_pooled(x, weight, bias, residual, pool)
            outputs.append(y)
            kept.append(y if gated else residual if call.activation else None)
        ctx.save_for_backward(weight, bias, mean, var, *inputs, *kept)
        # Without its statistics, which are kept where autograd and its hooks see them.
        ctx.parts, ctx.call, ctx.count = parts, call, pool.count
        ctx.differentiated, ctx.check_backward = pool.differentiated, pool.check_backward
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.check_backward is not None:
            ctx.check_backward()
        weight, bias, mean, var, *large = ctx.saved_tensors
        parts: int = ctx.parts
        inputs = [restore("input", x, dy) for x, dy in zip(large[:parts], gradients, strict=True)]
        saved = _Saved(inputs, large[parts:], weight, bias, mean, var)
        if any(must_be_followed(dy) for dy in gradients):
            dx, dweight, dbias, dz = _differentiable_backward(ctx, gradients, saved)
        else:
            dx, dweight, dbias, dz = _backward(ctx, gradients, saved)
        needs = ctx.needs_input_grad
        return (
            None,
            None,
            dweight.to(weight.dtype) if needs[2] else None,
            dbias.to(bias.dtype) if needs[3] else None,
            None,
            None,
            *(value if wanted else None for value, wanted in zip((*dx, *dz), needs[6:], strict=True)),
        )


@dataclass(frozen=True, slots=True)
class _Saved:
    """What the backward finds again."""

    inputs: list[Tensor]
    others: list[Tensor | None]
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor


_Gradients = tuple[Sequence[Tensor | None], Tensor, Tensor, Sequence[Tensor]]


def _backward(ctx: Any, gradients: Sequence[Tensor], saved: _Saved) -> _Gradients:
    call: SyncCall = ctx.call
    weight, bias, mean = saved.weight, saved.bias, saved.mean
    rstd, before, sums = (saved.var + call.eps).rsqrt(), [], []
    for dy, x, other in zip(gradients, saved.inputs, saved.others, strict=True):
        dz = dy
        if x.numel() == 0:
            sums.append(torch.zeros(2 * len(mean), dtype=mean.dtype, device=mean.device))
        else:
            if call.activation in plain.GATED_BY_OUTPUT:
                assert other is not None
                dz = plain.gate(dy, other, call.activation)
            elif call.activation is not None:
                dz = plain.gate(dy, batch_steps.apply(x, mean, rstd, weight, bias, None, other), call.activation)
            sums.append(torch.cat(batch_steps.reduce(dz, x, mean, rstd)))
        before.append(dz)
    own = add_up(torch.stack(sums))
    dbias, dweight = own[: len(mean)], own[len(mean) :]
    if not ctx.differentiated:
        return [None] * len(before), dweight, dbias, before
    whole = own
    if call.exchange is not None:
        heads, rows = bring(call, BACKWARD, {"count": ctx.count, **seal(mean, saved.var)}, (own,))
        check_heads(heads, call)
        whole = add_up(rows)
    total = whole[: len(mean)], whole[len(mean) :]
    dx = [
        batch_steps.apply_backward(dz, x, mean, rstd, weight, total, ctx.count) if x.numel() else torch.zeros_like(x)
        for dz, x in zip(before, saved.inputs, strict=True)
    ]
    return dx, dweight, dbias, before


def _differentiable_backward(ctx: Any, gradients: Sequence[Tensor], saved: _Saved) -> _Gradients:
    """Return the gradients in operations that autograd can follow again, through the exchange too.

    The statistics are computed again, about the mean that is known: ``mean + sum(x - mean) / m``, whose value is the
    mean and whose derivative is that of the mean.
    """
    call: SyncCall = ctx.call
    mean, channels = saved.mean, len(saved.mean)
    moments = []
    for x in saved.inputs:
        axes = batch_axes(x.dim())
        distance = x.to(mean.dtype) - mean.reshape(1, -1, *(1 for _ in axes[1:]))
        moments.append(torch.cat([distance.sum(axes), distance.square().sum(axes)]))
    sums = add_up(torch.stack(moments))
    if ctx.differentiated:
        sums = _over_ranks(sums, saved, call)
    offset = sums[:channels] / ctx.count
    centre, var = mean + offset, sums[channels:] / ctx.count - offset.square()
    rstd = (var + call.eps).rsqrt()
    before = [
        plain.gradient_before(dy, x, centre, rstd, saved.weight, saved.bias, call.activation, other)
        for dy, x, other in zip(gradients, saved.inputs, saved.others, strict=True)
    ]
    reduced = [torch.cat(plain.reduce(dz, x, centre, rstd)) for dz, x in zip(before, saved.inputs, strict=True)]
    own = add_up(torch.stack(reduced))
    dbias, dweight = own[:channels], own[channels:]
    if not ctx.differentiated:
        return [None] * len(before), dweight, dbias, before
    total = _over_ranks(own, saved, call)
    both = (total[:channels], total[channels:])
    dx = [
        plain.apply_backward(dz, x, centre, rstd, saved.weight, both, ctx.count)
        for dz, x in zip(before, saved.inputs, strict=True)
    ]
    return dx, dweight, dbias, before


def _over_ranks(row: Tensor, saved: _Saved, call: SyncCall) -> Tensor:
    if call.exchange is None:
        return row
    total: Tensor = _AddUp.apply(row, call, seal(saved.mean, saved.var))
    return total


class _AddUp(torch.autograd.Function):
    """The sum of all ranks' rows on every rank. Each row counts in every rank's sum: the backward adds up too."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, call: SyncCall, sealed: dict[str, float]) -> Tensor:
        ctx.call, ctx.sealed = call, sealed
        heads, rows = bring(call, SECOND, sealed, (row.contiguous(),))
        check_heads(heads, call)
        return add_up(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _AddUp.apply(gradient, ctx.call, ctx.sealed), None, None
