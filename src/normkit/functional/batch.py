"""Batch normalization as a function: check the arguments, call the kernel, update the running statistics."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..axes import values_per_channel
from ..errors import ArgumentError, ShapeError, StatisticsError
from ..kernels import plain_channels as plain
from . import checks

__all__ = ["batch_norm"]


class _Training(torch.autograd.Function):
    """The training forward and its backward, following SPEC A1 and A3."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return plain.forward(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, eps = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.save_for_forward(x, weight, bias)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        x, weight, bias, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dweight, dbias = plain.backward(dy, x, weight, ctx.eps)
        else:
            rstd = (var + ctx.eps).rsqrt()
            dbias, dweight = sums = plain.reduce(dy, x, mean, rstd)
            dx = plain.apply_backward(dy, x, mean, rstd, weight, sums, values_per_channel(tuple(x.shape)))
        return dx, _as(weight, dweight), _as(bias, dbias), None

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, _: None
    ) -> tuple[Tensor | None, None, None]:
        x, weight, _bias = ctx.saved_tensors
        shape = (1, -1, *(1 for _ in range(2, x.dim())))
        xhat, dxhat = plain.tangent(x, torch.zeros_like(x) if dx is None else dx, ctx.eps)
        dy = dxhat if weight is None else dxhat * weight.reshape(shape)
        if dweight is not None:
            dy = dy + xhat * dweight.reshape(shape)
        if dbias is not None:
            dy = dy + dbias.reshape(shape)
        return dy.to(x.dtype), None, None


class _Inference(torch.autograd.Function):
    """The forward with stored statistics, which are constants to the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        return plain.apply(x, mean, (var.double() + eps).rsqrt(), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, mean, var, eps = inputs
        # The stored statistics are saved as tensors, so that autograd notices a change before the backward.
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.save_for_forward(x, weight, bias, mean, var)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        rstd = (var.detach().double() + ctx.eps).rsqrt()
        dx, dweight, dbias = plain.inference_backward(dy, x, mean.detach(), rstd, weight)
        return dx, _as(weight, dweight), _as(bias, dbias), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: None) -> Tensor:
        x, weight, _bias, mean, var = ctx.saved_tensors
        rstd = (var.double() + ctx.eps).rsqrt()
        zero, one = torch.zeros_like(mean), torch.ones_like(rstd)
        dy = torch.zeros_like(x) if dx is None else plain.apply(dx, zero, rstd, weight, None)
        if dweight is not None:
            dy = dy + plain.apply(x, mean, rstd, dweight, None)
        if dbias is not None:
            dy = dy + plain.apply(torch.zeros_like(x), zero, one, None, dbias)
        return dy


def _as(parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if parameter is None else gradient.to(parameter.dtype)


def batch_norm(
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
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize each channel over the batch and all positions.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``

    mean and var are those of the batch in training and the stored ones otherwise. x and y are ``(N, C, *)``; mean, var,
    weight and bias are ``(C,)``.

    Conventions:
        Axes averaged: all but dimension 1.
        eps is added to the variance; its unit is that of the input squared.
        Variance: divided by m to normalize, by m - 1 to be stored (by m with ``unbiased=False``), m values per channel.
        Momentum: ``running = (1 - momentum) * running + momentum * batch``.
        Accumulation: float64, every channel centred on its first value.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64. An empty batch passes and updates nothing.
        running_mean: ``(C,)``, updated in training, used otherwise; None for neither.
        running_var: ``(C,)``, likewise.
        weight: ``(C,)`` or None for 1. Of the type of the input, or float32 with half precision input.
        bias: ``(C,)`` or None for 0, likewise.
        training: normalize with the batch's statistics and update the running ones.
        momentum: the weight of the new batch, from 0 to 1; None for the plain average of all batches, which needs
            ``num_batches_tracked``.
        eps: positive in training, not negative otherwise.
        unbiased: store the unbiased variance, as torch does; False stores the biased one, as Keras, Flax and ONNX do.
        num_batches_tracked: an int64 counter, advanced by one with each update.
        caller: the layer that errors should name.

    Returns:
        y, in the type and memory format of the input.

    Raises:
        ShapeError: fewer than two dimensions, no channels, a parameter of another size, or one value per channel in
            training.
        StatisticsError: running statistics that cannot be written, require a gradient, or are shared under vmap.
        DtypeError: integers, complex numbers, a sparse tensor, or a mix of types.
        ArgumentError: eps or momentum out of range, or stored statistics missing.

    Whenever it raises, running_mean, running_var and num_batches_tracked are as they were.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> batch_norm(x, None, None, training=True, eps=1e-12)
        tensor([[-1., -1.],
                [ 1.,  1.]])

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1; section 3.1 for the stored
        statistics. The paper stores the plain average of m / (m - 1) * var over many batches: ``momentum=None``.
    """
    if has_torch_function_unary(input):
        output: Tensor = handle_torch_function(
            batch_norm,
            (input,),
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
            caller=caller,
        )
        return output
    given = (input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, caller)
    if checks.is_tracing():
        with checks.constant_while_tracing():
            check_arguments(*given)
            empty = bool(input.numel() == 0)
    else:
        check_arguments(*given)
        empty = bool(input.numel() == 0)
    if empty:
        zero = torch.zeros(input.shape[1], device=input.device)
        return plain.apply(input, zero, zero + 1, weight, bias)
    if _is_exportable(training, momentum, unbiased):
        # An exported graph holds torch's own operator, so that every runtime and every tool can read it.
        if num_batches_tracked is not None and training:
            num_batches_tracked.add_(1)
        # The operator itself: torch's function around it checks the sizes once more, and warns of that in a trace.
        cudnn, rate = torch.backends.cudnn.enabled, momentum or 0.0
        return torch.batch_norm(input, weight, bias, running_mean, running_var, training, rate, eps, cudnn)
    if not training:
        assert running_mean is not None
        assert running_var is not None
        inference = (input, weight, bias, running_mean, running_var, eps)
        if torch.compiler.is_compiling():
            return plain.apply(input, running_mean, (running_var.double() + eps).rsqrt(), weight, bias)
        normalized: Tensor = _Inference.apply(*inference)
        return normalized
    if torch.compiler.is_compiling() or checks.is_tracing():
        y, mean, var = plain.forward(input, weight, bias, eps)
    else:
        y, mean, var = _Training.apply(input, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        count = values_per_channel(tuple(input.shape))
        var = var * (count / (count - 1)) if unbiased else var
        update_statistics(running_mean, running_var, num_batches_tracked, mean, var, momentum)
    return y


@torch.no_grad()
def update_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
) -> None:
    """Move the running statistics towards those of a batch and count it; with momentum None average all batches."""
    factor: Tensor | float
    if momentum is None:
        assert num_batches_tracked is not None
        factor = 1.0 / (num_batches_tracked + 1).to(mean.dtype)
    else:
        factor = momentum
    # In float64 and rounded once, so that a small momentum is not lost to the buffer's rounding twice over.
    running_mean.copy_(running_mean + (mean - running_mean) * factor)
    running_var.copy_(running_var + (var - running_var) * factor)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)


def check_arguments(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    caller: nn.Module | None,
) -> None:
    """Refuse what ``batch_norm`` says it refuses."""
    checks.check_input(x, caller)
    if x.dim() < 2:
        shape = tuple(x.shape)
        advice = "(N, C) or (N, C, *); for a single sample pass input.unsqueeze(0)"
        checks.refuse(ShapeError, f"expected at least 2D input (got {x.dim()}D input), shape {shape}, {advice}", caller)
    checks.check_channels(x, x.shape[1], caller)
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, value in named.items():
        checks.check_parameter(name, value, x, caller)
    checks.check_eps(eps, positive=training, caller=caller)
    checks.check_momentum(momentum, caller)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        checks.refuse(ArgumentError, f"{missing} is None and the other is not; pass both or neither", caller)
    checks.check_statistics("running_mean", running_mean, write=training, caller=caller)
    checks.check_statistics("running_var", running_var, write=training, caller=caller)
    checks.check_statistics("num_batches_tracked", num_batches_tracked, write=training, caller=caller)
    if training:
        checks.check_values_per_channel(x, caller)
        if running_mean is not None and momentum is None and num_batches_tracked is None:
            checks.refuse(
                ArgumentError,
                "momentum=None averages all batches and needs their number; pass num_batches_tracked, an int64 tensor",
                caller,
            )
        if running_mean is not None and _is_batched(x) and not _is_batched(running_mean):
            checks.refuse(
                StatisticsError,
                "under vmap every sample has statistics of its own, and the running ones hold one set; pass "
                "track_running_stats=False, call eval(), or see torch.func.replace_all_batch_norm_modules_",
                caller,
            )
    elif running_mean is None:
        checks.refuse(
            ArgumentError,
            "training=False needs running_mean and running_var, got None; pass training=True for the batch's own",
            caller,
        )


def _is_exportable(training: bool, momentum: float | None, unbiased: bool) -> bool:
    exporting = torch.compiler.is_exporting() or checks.is_tracing()
    return exporting and (not training or (momentum is not None and unbiased))


def _is_batched(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_batchedtensor(x)
