"""Batch normalization as a function: check the arguments, call the kernel, update the running statistics."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..axes import values_per_channel
from ..errors import ArgumentError, BackendError, NormkitError, ShapeError
from ..kernels import dispatch
from ..kernels.dispatch import Activation
from ..kernels.native import calls as native
from ..kernels.plain import channels as plain
from ..kernels.repeated import in_backward, is_repeated
from . import checks
from .averages import Average, Variance, check_average, check_law, update_statistics
from .batch_compiled import run_compiled
from .batch_gradients import Call, Inference, Training, run_kernel
from .exported import check_exportable, is_exportable
from .inplace import check_inplace, check_overwritten, is_recorded
from .nested import is_nested
from .overrides import is_exporting
from .transforms import is_forward_mode

__all__ = ["batch_norm", "check_arguments", "update_statistics"]


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
    activation: Activation | None = None,
    residual: Tensor | None = None,
    inplace: bool = False,
    average: Average = "moving",
    variance: Variance = "batch",
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize each channel over the batch and all positions.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, then ``activation(y + residual)`` where they are given

    mean and var are those of the batch in training and the stored ones otherwise. x and y are ``(N, C, *)``; mean, var,
    weight and bias are ``(C,)``.

    Conventions:
        Axes averaged: all but dimension 1.
        eps is added to the variance; its unit is that of the input squared.
        Variance: divided by m to normalize, by m - 1 to be stored (by m with ``unbiased=False``), m values per channel.
        Momentum: ``running = (1 - momentum) * running + momentum * batch``, in float64 and rounded once. As in torch a
            running statistic that is not finite stays so, at momentum 1 too.
        A forward that a backward runs again (activation checkpointing) moves nothing; see `first_forward`.
        Accumulation: float32 lanes over at most 2048 values about one of them, merged in float64 in an order that the
            shape alone decides; float64 throughout for float64 input.

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
        activation: "relu", "relu6", "leaky_relu" (slope 0.01) or "silu", applied last in the same pass over memory.
        residual: of the shape and type of the input, added before the activation in the same pass.
        inplace: write y over the input. Where a gradient is recorded, y is all that is kept for the backward, which
            saves the memory of one tensor: the activation must then be None or "leaky_relu", without a residual, and
            every weight far enough from zero, ``|bias| <= 1024 * |weight|``; there is no second derivative.
        average: "moving", or "debiased": batch t, from 1, weighs ``momentum / (1 - (1 - momentum)^t)``, so that nothing
            is left of what was stored before the first. Needs ``num_batches_tracked``.
        variance: "batch" stores the average of the batches' variances; "total" adds the variance of the batch means
            under the same weights, ``V <- (1 - w) * (V + w * d^2) + w * var``, d the distance of the new mean from the
            stored one and var with divisor m: of independent values that is the population's, but for the share
            ``sum of the squared weights / m``. Needs average="debiased" or momentum=None.
        caller: the layer that errors should name.

    Returns:
        y, in the type and memory format of the input. So a transposed ``(N, L, C)``, as of ``x.transpose(1, 2)``, stays
        transposed, where torch gives contiguous memory: behind it ``reshape`` serves, and ``view`` may not.

    Raises:
        ShapeError: fewer than two dimensions, no channels, a parameter of another size, or one value per channel in
            training.
        StatisticsError: running statistics that cannot be written, require a gradient, or are shared under vmap.
        DtypeError: integers, complex numbers, a sparse tensor, or a mix of types.
        ArgumentError: eps or momentum out of range, stored statistics missing, an unknown activation, or inplace where
            a gradient is recorded and could not be computed from y.
        BackendError: inside `normkit.use_backend`, where the named implementation cannot serve this call.

    Whenever it raises, running_mean, running_var and num_batches_tracked are as they were.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> batch_norm(x, None, None, training=True, eps=1e-12)
        tensor([[-1., -1.],
                [ 1.,  1.]])

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1; section 3.1 for the stored
        statistics. The paper stores the plain average of m / (m - 1) * var over many batches: ``momentum=None``.
        Rota Bulo, Porzi and Kontschieder, In-Place Activated BatchNorm, 2018, arXiv:1712.02616, for ``inplace``.
    """
    if has_torch_function_unary(input) and not is_nested(input):
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
            activation=activation,
            residual=residual,
            inplace=inplace,
            average=average,
            variance=variance,
            caller=caller,
        )
        return output
    if average != "moving" or variance != "batch":
        law = (momentum, average, variance)
        if training and running_mean is not None:
            rest = (eps, unbiased, activation, residual, inplace)
            return _follow(law, input, (running_mean, running_var, num_batches_tracked), weight, bias, rest, caller)
        check_average(average, variance, momentum, caller)
    if not inplace and dispatch.may_be_native() and (serve := native.batch_norm) is not None:
        settings = (training, momentum, eps, unbiased, num_batches_tracked, activation, residual)
        served = serve(input, running_mean, running_var, weight, bias, *settings)
        if served is not None:
            return served
    running = (running_mean, running_var, num_batches_tracked)
    unusual = residual is not None or inplace or (activation is not None and activation not in dispatch.ACTIVATIONS)
    everyday = (input, (weight, bias), (running_mean, running_var), num_batches_tracked, training, momentum, eps)
    if not unusual and checks.is_ordinary(*everyday) and dispatch.is_undisturbed():
        call = _call("numba", training, momentum or 0.0, eps, unbiased, activation, False)
        try:
            return _run_kernel(call, input, weight, bias, None, *running)
        except NormkitError as error:
            refused = error  # said again below, with the name of the layer
    else:
        refused = None
    given = (input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, caller)
    if checks.is_tracing():
        with checks.constant_while_tracing():
            check_arguments(*given)
            empty = bool(input.numel() == 0)
    else:
        check_arguments(*given)
        empty = bool(input.numel() == 0)
    if refused is not None:
        checks.refuse(type(refused), str(refused), caller)
    recorded_inplace = inplace and is_recorded(input, weight, bias, residual)
    checks.check_fusion(input, activation, residual, caller)
    if recorded_inplace:
        check_inplace(input, weight, bias, residual, activation, caller)
    if training and residual is not None:
        checks.check_apart(_named(*running), {"residual": residual}, caller)
    if inplace:
        others = {"weight": weight, "bias": bias, "residual": residual, **_named(*running)}
        check_overwritten(input, others, caller)
    if empty:
        return _finish(plain.pass_empty(input, weight, bias), activation, residual)
    if is_exporting():
        check_exportable(training and running_mean is not None, momentum, unbiased, caller)
    if is_exportable(training and running_mean is not None, momentum, unbiased):
        # An exported graph holds torch's own operator, so that every runtime and every tool can read it.
        if num_batches_tracked is not None and training:
            num_batches_tracked.add_(1)
        # The operator itself: torch's function around it checks the sizes once more, and warns of that in a trace.
        cudnn, rate = torch.backends.cudnn.enabled, momentum or 0.0
        y = torch.batch_norm(input, weight, bias, running_mean, running_var, training, rate, eps, cudnn)
        return _finish(y, activation, residual)
    if not torch.compiler.is_compiling():
        backend = dispatch.choose(input)
        if backend == "numba" or (backend != "plain" and not recorded_inplace):
            rate = _rate(momentum, num_batches_tracked)
            call = _call(backend, training, rate, eps, unbiased, activation, inplace)
            try:
                return _run_kernel(call, input, weight, bias, residual, *running)
            except NormkitError as error:
                refused = error
            checks.refuse(type(refused), str(refused), caller)
    elif dispatch.is_served_compiled(input):
        # The graph's backward reads the input, so that a copy of it is what stands in the graph.
        x = input.clone() if recorded_inplace else input
        y = run_compiled(x, weight, bias, residual, training, momentum, eps, unbiased, activation, *running)
        return input.copy_(y) if inplace else y
    if recorded_inplace:
        reason = "inplace=True where a gradient is recorded runs on the numba kernels alone"
        checks.refuse(BackendError, f"{reason}; see normkit.explain(layer, input), or leave inplace out", caller)
    y = _run_plain(input, weight, bias, training, momentum, eps, unbiased, *running)
    y = _finish(y, activation, residual)
    return input.copy_(y) if inplace else y


def _follow(
    law: tuple[float | None, Average, Variance],
    x: Tensor,
    running: tuple[Tensor, Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    settings: tuple[float, bool, Activation | None, Tensor | None, bool],
    caller: nn.Module | None,
) -> Tensor:
    """Normalize with running statistics that follow another law than the kernels': they give the batch's alone."""
    (momentum, average, variance), (mean, var, counter) = law, running
    eps, unbiased, activation, residual, inplace = settings
    check_average(average, variance, momentum, caller)
    check_arguments(x, mean, var, weight, bias, True, momentum, eps, counter, caller)
    assert var is not None
    check_law(average, variance, momentum, True, counter, caller)
    if is_exporting():
        said = f"a graph for other programs holds torch's batch norm, which cannot store average={average!r}"
        checks.refuse(ArgumentError, f"{said}, variance={variance!r}; export after eval()", caller)
    fresh_mean, fresh_var = torch.zeros_like(mean), torch.zeros_like(var)
    y = batch_norm(
        x,
        fresh_mean,
        fresh_var,
        weight,
        bias,
        True,
        1.0,
        eps,
        # The spread of the means holds what a divisor of m leaves out.
        unbiased=unbiased and variance == "batch",
        activation=activation,
        residual=residual,
        inplace=inplace,
        caller=caller,
    )
    if x.numel():
        update_statistics(mean, var, counter, fresh_mean, fresh_var, momentum, average, variance)
    return y


@functools.lru_cache(maxsize=1024)
def _call(
    backend: str, training: bool, momentum: float, eps: float, unbiased: bool, activation: str | None, inplace: bool
) -> Call:
    # Imported at the first call: Numba and Triton cost more to import than torch's own layers to run.
    kernels: Any
    if backend == "numba":
        from ..kernels.numba.channels import passes as kernels
    else:
        from ..kernels.triton.channels import passes as kernels
    return Call(kernels, training, momentum, eps, unbiased, activation, inplace)


def _rate(momentum: float | None, num_batches_tracked: Tensor | None) -> float:
    if momentum is not None:
        return momentum
    return 1.0 / (int(num_batches_tracked.item()) + 1) if num_batches_tracked is not None else 0.0


def _finish(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    return plain.activate(y if residual is None else y + residual, activation)


def _run_kernel(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    computed = torch.float64 if x.dtype is torch.float64 else torch.float32
    moved = call.training and running_mean is not None and running_var is not None
    if not moved:
        y: Tensor = run_kernel(x, weight, bias, residual, running_mean, running_var, call)
        return y
    if in_backward() and is_repeated():
        y = run_kernel(x, weight, bias, residual, None, None, call)
        return y
    assert running_mean is not None
    assert running_var is not None
    if (
        running_mean.dtype is computed
        and running_var.dtype is computed
        and running_mean.is_contiguous()
        and running_var.is_contiguous()
        and not running_mean.is_neg()
        and not running_var.is_neg()
    ):
        y = run_kernel(x, weight, bias, residual, running_mean, running_var, call)
        # The kernel wrote through the address: what autograd keeps of these buffers must still be noticed as stale.
        increment_version((running_mean, running_var))
    else:
        # The kernel sees copies, and cannot tell what these share.
        checks.check_statistics("running_mean", running_mean, write=True, caller=None)
        checks.check_statistics("running_var", running_var, write=True, caller=None)
        read = {"input": x, "weight": weight, "bias": bias}
        checks.check_apart(_named(running_mean, running_var, num_batches_tracked), read, None)
        wide_mean, wide_var = running_mean.to(computed, copy=True), running_var.to(computed, copy=True)
        wide_mean, wide_var = wide_mean.contiguous(), wide_var.contiguous()
        y = run_kernel(x, weight, bias, residual, wide_mean, wide_var, call)
        running_mean.copy_(wide_mean)
        running_var.copy_(wide_var)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return y


def _run_plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    unbiased: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    if not training:
        assert running_mean is not None
        assert running_var is not None
        if torch.compiler.is_compiling() or is_forward_mode():
            return plain.apply(x, running_mean, (running_var.double() + eps).rsqrt(), weight, bias)
        normalized: Tensor = Inference.apply(x, weight, bias, running_mean, running_var, eps)
        return normalized
    if torch.compiler.is_compiling() or checks.is_tracing() or is_forward_mode():
        y, mean, var = plain.forward(x, weight, bias, eps)
    else:
        y, mean, var = Training.apply(x, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        count = values_per_channel(tuple(x.shape))
        var = var * (count / (count - 1)) if unbiased else var
        update_statistics(running_mean, running_var, num_batches_tracked, mean, var, momentum)
    return y


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
    *,
    pooled: bool = False,
) -> None:
    """Refuse what ``batch_norm`` says it refuses; ``pooled`` statistics are those of more values than x holds."""
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
        read = {"input": x, "weight": weight, "bias": bias}
        checks.check_apart(_named(running_mean, running_var, num_batches_tracked), read, caller)
        if not pooled:
            checks.check_values_per_channel(x, caller)
        if running_mean is not None and momentum is None and num_batches_tracked is None:
            checks.refuse(
                ArgumentError,
                "momentum=None averages all batches and needs their number; pass num_batches_tracked, an int64 tensor",
                caller,
            )
        checks.check_not_shared(running_mean, x, caller)
    elif running_mean is None:
        checks.refuse(
            ArgumentError,
            "training=False needs running_mean and running_var, got None; pass training=True for the batch's own",
            caller,
        )


def _named(mean: Tensor | None, var: Tensor | None, counter: Tensor | None) -> dict[str, Tensor | None]:
    return {"running_mean": mean, "running_var": var, "num_batches_tracked": counter}
