"""Batch normalization as operators of torch.library, so that torch.compile sees one call of the fast kernel.

``batch_norm_forward``, ``batch_norm_inference`` and ``batch_norm_backward`` are functional: autograd formulas are for
operators that write nothing, so the forward returns the moved running statistics and the compiled function copies them
back. Which implementation runs is decided at run time, and `use_backend` holds there too.

Eager calls take the same kernels on a shorter way, past the dispatcher: functional/batch_gradients.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from ..axes import values_per_channel
from ..errors import BackendError, StatisticsError
from . import dispatch
from .layouts import contiguous_layout, lay_out
from .plain import channels as plain
from .repeated import is_repeated
from .saved import check_device, restore, restore_statistics, restore_values

__all__ = ["batch_norm_backward", "batch_norm_forward", "batch_norm_inference", "repeated"]


# torch keeps compiled graphs on the disk and finds them by the operators' names alone, so that a graph of an older
# normkit would be run with what these return now. Whoever changes what one takes, returns or means counts on.
FORM = 2


def _served_by_numba(x: Tensor) -> bool:
    """Tell whether the fast kernels run this call, or plain operations.

    Raises:
        BackendError: `use_backend` asks for what cannot serve it.
    """
    chosen = dispatch.choose(x)
    if chosen == "triton":
        raise BackendError("a graph compiled for a CPU runs the numba kernels, not triton's; leave use_backend")
    return chosen == "numba"


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Refuse a derivative that torch would drop without a word: it runs an operator on the values alone.

    Raises:
        BackendError: a derivative in forward mode passes through this call.
    """
    if forward_ad._current_level < 0:
        return
    given = [tensor for tensor in tensors if tensor is not None]
    if eager_transforms.JVP_NESTING or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        raise BackendError(
            "batch norm in a graph that was compiled or exported has no derivative in forward mode; call the layer "
            "itself, or compile the function that takes the derivative"
        )


def _layout(x: Tensor) -> str:
    """The layout that the kernels read x in, which is also that of the output."""
    if x.is_contiguous():
        return contiguous_layout(x)
    return "channels_last" if x.movedim(1, -1).is_contiguous() else contiguous_layout(x)


def _computed(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _copied(running: Tensor | None, x: Tensor) -> Tensor | None:
    """A copy of a running statistic for the kernel to write, in the type computed in."""
    if running is None:
        return None
    return running.to(_computed(x), copy=True, memory_format=torch.contiguous_format)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty((0,), dtype=_computed(x))


def _empty_counter(x: Tensor) -> Tensor:
    return x.new_empty((0,), dtype=torch.int64)


@torch.library.custom_op(f"normkit::repeated_{FORM}", mutates_args=())
def repeated(x: Tensor, refusal: str) -> Tensor:
    """Return whether a backward runs this again, which a graph learns at run time only; x is any tensor of the call.

    Raises:
        StatisticsError: it does, and there is a refusal to say.
    """
    still = is_repeated()
    if still and refusal:
        raise StatisticsError(refusal)
    return torch.tensor(still, device=x.device)


@repeated.register_fake
def _(x: Tensor, refusal: str) -> Tensor:
    return x.new_empty((), dtype=torch.bool)


@torch.library.custom_op(f"normkit::batch_norm_forward_{FORM}", mutates_args=())
def batch_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    unbiased: bool,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, (2, C) float64 with mean and rstd, and the moved running statistics and counter, empty
    where there are none.

    Where a backward runs the graph again (see `repeated`) they are returned as they were.
    """
    _refuse_forward_mode(x, weight, bias, residual)
    layout, rate = _layout(x), momentum or 0.0
    if momentum is None and num_batches_tracked is not None:
        rate = 1.0 / (int(num_batches_tracked) + 1)
    x = lay_out(x, layout)
    residual = None if residual is None else lay_out(residual, layout)
    still = is_repeated()
    mean, var = (None, None) if still else (_copied(running_mean, x), _copied(running_var, x))
    if _served_by_numba(x):
        from .numba.channels import passes as channel_passes

        settings = (rate, eps, unbiased, activation, residual)
        y, saved = channel_passes.forward(x, layout, weight, bias, mean, var, *settings)
        saved = saved.view(2, -1)
    else:
        y, saved, mean, var = _plain_forward(x, weight, bias, residual, mean, var, rate, eps, unbiased, activation)
        y = lay_out(y, layout)
    if running_mean is None or running_var is None:
        return y, saved, _empty(x), _empty(x), _empty_counter(x)
    count = _empty_counter(x) if num_batches_tracked is None else num_batches_tracked + (0 if still else 1)
    if mean is None or var is None:
        mean, var = running_mean.clone(), running_var.clone()
    return y, saved, mean.to(running_mean.dtype), var.to(running_var.dtype), count


@batch_norm_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    unbiased: bool,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, saved = _fake(x)
    if running_mean is None or running_var is None:
        return y, saved, _empty(x), _empty(x), _empty_counter(x)
    count = _empty_counter(x) if num_batches_tracked is None else torch.empty_like(num_batches_tracked)
    return y, saved, running_mean.new_empty(running_mean.shape), running_var.new_empty(running_var.shape), count


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lay_out(x, _layout(x))), x.new_empty((2, x.shape[1]), dtype=torch.float64)


def _plain_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    unbiased: bool,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    y, mean, var = plain.forward(x, weight, bias, eps)
    saved = torch.stack([mean.double(), (var + eps).rsqrt().double()])
    if running_mean is not None and running_var is not None:
        count = values_per_channel(tuple(x.shape))
        stored = var * (count / (count - 1)) if unbiased else var
        running_mean = plain.moved(running_mean, mean, momentum).to(running_mean.dtype)
        running_var = plain.moved(running_var, stored, momentum).to(running_var.dtype)
    return plain.activate(y if residual is None else y + residual, activation), saved, running_mean, running_var


@torch.library.custom_op(f"normkit::batch_norm_inference_{FORM}", mutates_args=())
def batch_norm_inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Return y with stored statistics, and (2, C) float64 with mean and rstd."""
    _refuse_forward_mode(x, weight, bias, residual)
    layout = _layout(x)
    x = lay_out(x, layout)
    residual = None if residual is None else lay_out(residual, layout)
    if _served_by_numba(x):
        from .numba.channels import passes as channel_passes

        settings = (eps, activation, residual)
        y, saved = channel_passes.inference(x, layout, weight, bias, running_mean, running_var, *settings)
        return y, saved.view(2, -1)
    rstd = (running_var.double() + eps).rsqrt()
    y = plain.apply(x, running_mean, rstd, weight, bias)
    y = plain.activate(y if residual is None else y + residual, activation)
    return lay_out(y, layout), torch.stack([running_mean.double(), rstd])


@batch_norm_inference.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    return _fake(x)


@torch.library.custom_op(f"normkit::batch_norm_backward_{FORM}", mutates_args=())
def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    other: Tensor | None,
    activation: str | None,
    residual: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, (2, C) with dweight and dbias, and the residual's gradient where it is not dy itself, else empty."""
    _refuse_forward_mode(dy, x, weight)
    layout, channels = _layout(x), dy.shape[1]
    dy, x = lay_out(dy, layout), restore("input", x, dy, layout)
    saved = restore_statistics(saved, 2 * channels, dy)
    weight, bias = (restore_values("parameter", value, channels, dy) for value in (weight, bias))
    other = None if other is None else restore("residual or output", other, dy, layout)
    if _served_by_numba(x):
        from .numba.channels import passes as channel_passes

        gradients = channel_passes.backward(dy, x, layout, weight, bias, saved, activation, other, residual, frozen)
    else:
        gradients = _plain_backward(dy, x, weight, bias, saved, other, activation, frozen)
    dx, dweight, dbias, dresidual = gradients
    sums = torch.stack([dweight, dbias]).to(_computed(x))
    if not residual or activation is None or dresidual is None:
        return lay_out(dx, layout), sums, _empty(x)
    return lay_out(dx, layout), sums, lay_out(dresidual, layout)


@batch_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    other: Tensor | None,
    activation: str | None,
    residual: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _ = _fake(x)
    sums = x.new_empty((2, x.shape[1]), dtype=_computed(x))
    return dx, sums, torch.empty_like(dx) if residual and activation is not None else _empty(x)


def _plain_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    other: Tensor | None,
    activation: str | None,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = saved
    dz = plain.gradient_before(dy, x, mean, rstd, weight, bias, activation, other)
    if frozen:
        return *plain.inference_backward(dz, x, mean, rstd, weight), dz
    dbias, dweight = sums = plain.reduce(dz, x, mean, rstd)
    dx = plain.apply_backward(dz, x, mean, rstd, weight, sums, values_per_channel(tuple(x.shape)))
    return dx, dweight, dbias, dz


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], frozen: bool, activation: str | None) -> None:
    x, weight, bias, residual = inputs[:4]
    y, saved = output[:2]
    other = None
    if residual is not None and activation is not None:
        other = y if activation in plain.GATED_BY_OUTPUT else residual
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, saved, other)
    ctx.activation, ctx.has_residual, ctx.frozen, ctx.arguments = activation, residual is not None, frozen, len(inputs)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output, frozen=False, activation=inputs[10])


def _save_inference(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output, frozen=True, activation=inputs[7])


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    count: int = ctx.arguments
    if dy is None:
        return (None,) * count
    x, weight, bias, saved, other = ctx.saved_tensors
    # By the devices torch chooses what runs the operator, which looks at the rest.
    names = ("input", "parameter", "parameter", "statistics", "residual or output")
    for name, came in zip(names, (x, weight, bias, saved, other), strict=True):
        check_device(name, came, dy)
    found: tuple[Tensor, Tensor, Tensor] = batch_norm_backward(
        dy, x, weight, bias, saved, other, ctx.activation, ctx.has_residual, ctx.frozen
    )
    dx, sums, dresidual = found
    dweight = None if weight is None else sums[0].to(weight.dtype)
    dbias = None if bias is None else sums[1].to(bias.dtype)
    if ctx.has_residual and ctx.activation is None:
        dresidual = dy
    return dx, dweight, dbias, dresidual if ctx.has_residual else None, *(None,) * (count - 4)


batch_norm_forward.register_autograd(_backward, setup_context=_save_forward)
batch_norm_inference.register_autograd(_backward, setup_context=_save_inference)
