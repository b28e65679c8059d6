"""Batch normalization whose statistics are those of all ranks of a process group."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..axes import batch_axes, values_per_channel
from ..errors import ArgumentError, ShapeError, StatisticsError
from ..kernels.dispatch import Activation
from ..kernels.plain import channels as plain
from ..kernels.repeated import in_backward, is_repeated, may_be_repeated
from ..kernels.saved import restore
from . import batch_steps, checks
from .agreement import BACKWARD, DTYPES, FORWARD, SECOND, SyncCall, bring, check_heads
from .batch import batch_norm, check_arguments, check_fusion, update_statistics
from .exchange import add_up, enter, exchange_of, fingerprint, merge_moments
from .first_runs import find_first_run, keep_first_run
from .inplace import is_recorded
from .transforms import is_forward_mode, must_be_followed

# torch calls these methods by name and documents them: forward, backward.

__all__ = ["sync_batch_norm"]


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    unbiased: bool = True,
    num_batches_tracked: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    process_group: Any = None,
    timeout: float | None = None,
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize each channel over the batches of all ranks together, as if they were one batch.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, then ``activation(y + residual)`` where they are given

    mean and var are those of all values of the channel on all ranks. x and y are ``(N, C, *)``, N and the positions of
    each rank its own, N of 0 included; mean, var, weight and bias are ``(C,)``.

    Conventions:
        As for :func:`normkit.functional.batch_norm`, m the values per channel of all ranks. Without a process group, or
        with one rank, it is that function; in evaluation too, where nothing is exchanged.
        Exchange: one ``all_gather`` of ``2 * C + 9`` float64 in the forward (count, mean, sum of squares) and one in
        the backward (the two sums), merged neighbours first, in rank order: the same bits on every rank. Before a
        layer's first call one more, of 512 bytes, in which the ranks see that they mean the same layer; with
        ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` before every call.
        Gradients of weight and bias are those of this rank's samples, which data parallelism adds up; dx is that of the
        sum of all ranks' losses.
        A forward that a backward runs again (activation checkpointing) exchanges nothing: the first run's statistics
        are kept for it.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64.
        running_mean: ``(C,)``, updated in training, used otherwise; None for neither.
        running_var: ``(C,)``, likewise.
        weight: ``(C,)`` or None for 1.
        bias: ``(C,)`` or None for 0.
        training: normalize with the statistics of all ranks and update the running ones; otherwise by the running ones.
        momentum: the weight of the new batch, from 0 to 1; None for the plain average of all batches.
        eps: positive in training, not negative otherwise.
        unbiased: store the unbiased variance.
        num_batches_tracked: an int64 counter, advanced by one with each update.
        activation: "relu", "relu6", "leaky_relu" (slope 0.01) or "silu", applied last.
        residual: of the shape and type of the input, added before the activation.
        process_group: of ``torch.distributed``; None for all processes.
        timeout: seconds to wait for the other ranks in one call; None for the group's own.
        caller: the layer that errors should name, and by which the ranks know which layer is called.

    Returns:
        y, in the type and memory format of the input.

    Raises:
        SyncError: the ranks called other layers, in other settings, types or modes, or one failed, or did not come.
        ShapeError: as for ``batch_norm``; one value per channel on all ranks together.
        DtypeError: as for ``batch_norm``.
        StatisticsError: as for ``batch_norm``.
        ArgumentError: as for ``batch_norm``; a process group without this rank; a transform of ``torch.func``, a
            derivative in forward mode, or ``torch.jit.trace``.

    Whenever it raises, on every rank that raises the running statistics are as they were.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> sync_batch_norm(x, None, None, training=True, eps=1e-12)
        tensor([[-1., -1.],
                [ 1.,  1.]])

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1 and section 3, over all ranks.
        Peng et al., MegDet, 2018, arXiv:1711.07240, section 3.2, for the exchange between devices.
    """
    if training and torch.compiler.is_compiling():
        # What the disabled function computes is run as it stands; the graph ends before it.
        given = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        y: Tensor = _outside_graph(
            *given,
            unbiased=unbiased,
            num_batches_tracked=num_batches_tracked,
            activation=activation,
            residual=residual,
            process_group=process_group,
            timeout=timeout,
            caller=caller,
        )
        return y
    exchange = exchange_of(process_group, timeout) if training else None
    if exchange is None:
        return batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            unbiased=unbiased,
            num_batches_tracked=num_batches_tracked,
            activation=activation,
            residual=residual,
            caller=caller,
        )

    channels = _channels(input, running_mean, weight, bias, caller)

    def check() -> None:
        _check_followable(caller)
        checks.check_input(input, caller)
        if input.dim() >= 2:
            checks.check_channels(input, channels, caller)
        given = (input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, caller)
        check_arguments(*given, pooled=True)
        check_fusion(input, activation, residual, caller)

    tensors = (input, weight, bias, residual)
    key = caller if caller is not None else running_mean
    if in_backward() and is_repeated():
        check()
        mean, var, count = _local_statistics(input)
        if count and key is None:
            said = "a backward runs this forward again, and a call without a layer or running statistics is not known"
            checks.refuse(StatisticsError, f"{said} again; pass caller=, or leave it out of the checkpoint", caller)
        if count:
            assert key is not None
            mean, var, values = find_first_run(key, mean, var, eps, caller)
            whole = _Whole(mean, var, int(values), True)
        else:
            # What an empty batch is normalized with does not matter.
            whole = _Whole(mean, var, 2, True)
        return _normalize(*tensors, whole, SyncCall(exchange, eps, activation, _words(caller), -1.0))
    settings = (momentum, eps, unbiased, running_mean is None, weight is None, bias is None)
    device = input.device if isinstance(input, Tensor) else torch.device("cpu")
    words = _words(caller)
    number = enter(exchange, caller, words, _settings(caller), device)
    call = SyncCall(exchange, eps, activation, words, float(number))
    refused: Exception | None = None
    header = {"settings": fingerprint(*settings), "recorded": is_recorded(*tensors)}
    local: tuple[Tensor, ...] = (torch.zeros(2 * channels, dtype=torch.float64, device=device),)
    try:
        check()
        mean, var, count = _local_statistics(input)
        local = (mean, var * count)
        wanted = header["recorded"] and input.requires_grad
        header |= {"dtype": DTYPES.index(input.dtype), "count": count, "differentiated": wanted}
    except Exception as error:
        # The others are told, so that none waits.
        refused = error
        header["failed"] = True
    heads, rows = bring(call, FORWARD, header, local)
    if refused is not None:
        raise refused
    check_heads(heads, call)
    counts = heads["count"]
    total = int(sum(counts))
    if total == 1:
        said = "Expected more than 1 value per channel when training, got 1 on all ranks, which has no variance"
        checks.refuse(ShapeError, f"{said}; pass drop_last=True to the training DataLoader", caller)
    if total == 0:
        return plain.activate(plain.pass_empty(input, weight, bias), activation)
    merged, squares = merge_moments(rows.new_tensor(counts), rows[:, :channels], rows[:, channels:])
    whole = _Whole(merged, squares / total, total, any(heads["differentiated"]))
    if key is not None and may_be_repeated():
        keep_first_run(key, mean, var, (whole.mean, whole.var, torch.tensor(total)))
    y = _normalize(*tensors, whole, call)
    if running_mean is not None and running_var is not None:
        stored = whole.var * (total / (total - 1)) if unbiased else whole.var
        update_statistics(running_mean, running_var, num_batches_tracked, whole.mean, stored, momentum)
    return y


# torch.compiler.disable imports dynamo where it stands, this when a graph is compiled.
_outside_graph: Any = _disable_dynamo(sync_batch_norm)


@dataclass(frozen=True, slots=True)
class _Whole:
    """The statistics of all ranks, how many values they are of, and whether any rank's input is differentiated."""

    mean: Tensor
    var: Tensor
    count: int
    differentiated: bool


def _channels(
    x: Tensor, running_mean: Tensor | None, weight: Tensor | None, bias: Tensor | None, caller: nn.Module | None
) -> int:
    """Return the number of channels that all ranks reckon with, whatever this rank's input is."""
    known = [len(value) for value in (running_mean, weight, bias) if value is not None and value.dim() == 1]
    if not known and isinstance(getattr(caller, "num_features", None), int):
        known = [int(caller.num_features)]  # type: ignore[union-attr, arg-type]
    if not known:
        checks.check_input(x, caller)
        known = [x.shape[1] if x.dim() > 1 else 0]
    return known[0]


def _words(caller: nn.Module | None) -> str:
    return "sync_batch_norm" if caller is None else f"{type(caller).__name__}({_settings(caller).partition(',')[0]})"


def _settings(caller: nn.Module | None) -> str:
    return "" if caller is None else caller.extra_repr()


def _check_followable(caller: nn.Module | None) -> None:
    if torch._C._are_functorch_transforms_active() or is_forward_mode():
        said = "statistics over ranks are not computed under torch.func or in forward mode: an exchange has no tangent"
        checks.refuse(ArgumentError, f"{said}; call eval(), or normkit.convert(model, to='batch')", caller)
    if checks.is_tracing():
        said = "torch.jit.trace cannot record an exchange between ranks"
        checks.refuse(ArgumentError, f"{said}; call eval() before, or normkit.convert(model, to='batch')", caller)


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean, biased variance and number of values of this rank's share; zeros where it is empty."""
    count = values_per_channel(tuple(x.shape))
    if count:
        return *batch_steps.statistics(x), count
    zero = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    return zero, zero.clone(), 0


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, whole: _Whole, call: SyncCall
) -> Tensor:
    if not is_recorded(x, weight, bias, residual):
        return _apply(x, weight, bias, residual, whole, call)
    checks.check_saveable(input=x, weight=weight, bias=bias, residual=residual)
    y: Tensor = _Synchronized.apply(x, weight, bias, residual, whole.mean, whole.var, (whole, call))
    return y


def _apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, whole: _Whole, call: SyncCall
) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    return batch_steps.apply(x, whole.mean, (whole.var + call.eps).rsqrt(), weight, bias, call.activation, residual)


class _Synchronized(torch.autograd.Function):
    """The forward with statistics of all ranks, and its backward: one exchange of the two sums."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        job: tuple[_Whole, SyncCall],
    ) -> Tensor:
        whole, call = job
        y = _apply(x, weight, bias, residual, whole, call)
        gated = call.activation in plain.GATED_BY_OUTPUT
        ctx.save_for_backward(x, weight, bias, mean, var, y if gated else residual if call.activation else None)
        ctx.call, ctx.count, ctx.differentiated = call, whole.count, whole.differentiated
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var, other = ctx.saved_tensors
        x = restore("input", x, dy)
        if must_be_followed(dy):
            dx, dweight, dbias, dz = _differentiable_backward(ctx, dy, x, weight, bias, mean, other)
        else:
            dx, dweight, dbias, dz = _backward(ctx, dy, x, weight, bias, mean, var, other)
        needs = ctx.needs_input_grad
        return (
            dx if needs[0] else None,
            dweight.to(weight.dtype) if needs[1] else None,
            dbias.to(bias.dtype) if needs[2] else None,
            dz if needs[3] else None,
            None,
            None,
            None,
        )


def _backward(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    other: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    call: SyncCall = ctx.call
    rstd, dz = (var + call.eps).rsqrt(), dy
    if x.numel() == 0:
        dbias = dweight = torch.zeros_like(mean)
    else:
        if call.activation in plain.GATED_BY_OUTPUT:
            assert other is not None
            dz = plain.gate(dy, other, call.activation)
        elif call.activation is not None:
            dz = plain.gate(dy, batch_steps.apply(x, mean, rstd, weight, bias, None, other), call.activation)
        dbias, dweight = batch_steps.reduce(dz, x, mean, rstd)
    if not ctx.differentiated:
        return None, dweight, dbias, dz
    heads, rows = bring(call, BACKWARD, {"count": ctx.count}, (dbias, dweight))
    check_heads(heads, call)
    if x.numel() == 0:
        return torch.zeros_like(x), dweight, dbias, dz
    sums = add_up(rows)
    total = sums[: len(mean)], sums[len(mean) :]
    return batch_steps.apply_backward(dz, x, mean, rstd, weight, total, ctx.count), dweight, dbias, dz


def _differentiable_backward(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, other: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return the gradients in operations that autograd can follow again, through the exchange too.

    The statistics are computed again, about the mean that is known: ``mean + sum(x - mean) / m``, whose value is the
    mean and whose derivative is that of the mean.
    """
    call: SyncCall = ctx.call
    axes, channels = batch_axes(x.dim()), len(mean)
    distance = x.to(mean.dtype) - mean.reshape(1, -1, *(1 for _ in axes[1:]))
    sums = torch.cat([distance.sum(axes), distance.square().sum(axes)])
    if ctx.differentiated:
        sums = _AddUp.apply(sums, call)
    offset = sums[:channels] / ctx.count
    centre, var = mean + offset, sums[channels:] / ctx.count - offset.square()
    rstd = (var + call.eps).rsqrt()
    dz = plain.gradient_before(dy, x, centre, rstd, weight, bias, call.activation, other)
    dbias, dweight = plain.reduce(dz, x, centre, rstd)
    if not ctx.differentiated:
        return None, dweight, dbias, dz
    total = _AddUp.apply(torch.cat([dbias, dweight]), call)
    both = (total[:channels], total[channels:])
    return plain.apply_backward(dz, x, centre, rstd, weight, both, ctx.count), dweight, dbias, dz


class _AddUp(torch.autograd.Function):
    """The sum of all ranks' rows on every rank. Each row counts in every rank's sum: the backward adds up too."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, call: SyncCall) -> Tensor:
        ctx.call = call
        heads, rows = bring(call, SECOND, {}, (row.contiguous(),))
        check_heads(heads, call)
        return add_up(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AddUp.apply(gradient, ctx.call), None
