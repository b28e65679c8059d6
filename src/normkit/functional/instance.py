"""Instance normalization as a function."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..axes import position_axes
from ..errors import ArgumentError, ShapeError
from ..kernels.dispatch import Activation
from ..kernels.plain import samples as plain_samples
from ..kernels.plain.channels import activate
from . import checks, ordinary, shapes
from .averages import Average, check_law, update_statistics
from .batch import batch_norm
from .overrides import is_exporting, overridable
from .rows import Kept, fits, fits_instances, is_everyday, normalize_groups, run

__all__ = ["instance_norm"]


@overridable
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    num_batches_tracked: Tensor | None = None,
    average: Average = "moving",
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize every channel of every sample over its positions.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, then ``activation(y)`` where it is given

    x and y are ``(N, C, *)``; mean and var are ``(N, C)``, or the running ones, ``(C,)``; weight and bias are ``(C,)``.

    Conventions:
        Axes averaged: positions only.
        eps is added to the variance; its unit is that of the input squared.
        Variance: divided by m to normalize, by m - 1 to be stored, m positions.
        Momentum: ``running = (1 - momentum) * running + momentum * mean over samples``.
        Accumulation: float32 lanes over at most 2048 values about one near their mean, merged in float64 in an order
            that shape and memory format decide; float64 throughout for float64 input.

    Args:
        input: ``(N, C, *)`` with a spatial dimension, float16, bfloat16, float32 or float64. An empty batch passes.
        running_mean: ``(C,)``, updated with ``use_input_stats``, used without; None for neither.
        running_var: ``(C,)``, likewise.
        weight: ``(C,)`` or None for 1. Of the type of the input, or float32 with half precision input.
        bias: ``(C,)`` or None for 0, likewise.
        use_input_stats: normalize by the sample's own statistics; False takes the running ones.
        momentum: the weight of the new batch, from 0 to 1.
        eps: not negative.
        activation: "relu", "relu6", "leaky_relu" (slope 0.01) or "silu", applied last in the same pass over memory.
        num_batches_tracked: an int64 counter, advanced by one with each update where ``average`` asks for it; torch's
            own layer never moves it.
        average: ``"moving"``, or ``"debiased"`` as for :func:`batch_norm`.
        caller: the layer that errors should name.

    Returns:
        y, in the type and memory format of the input.

    Raises:
        ShapeError: fewer than three dimensions, one position, or a parameter of another size.
        DtypeError: integers, complex numbers, a sparse tensor, or a mix of types.
        ArgumentError: eps or momentum out of range, running statistics missing, or an unknown activation.
        BackendError: inside `normkit.use_backend`, where the named implementation cannot serve this call.

    Whenever it raises, running_mean and running_var are as they were.

    Example:
        >>> import torch
        >>> instance_norm(torch.tensor([[[1.0, 3.0]], [[10.0, 30.0]]]), eps=1e-12)
        tensor([[[-1.,  1.]],
        <BLANKLINE>
                [[-1.,  1.]]])

    References:
        Ulyanov, Vedaldi and Lempitsky, Instance Normalization, 2016, arXiv:1607.08022, equation (2).
    """
    unstored = use_input_stats and running_mean is None and running_var is None
    if unstored and (served := ordinary.group_norm(input, None, weight, bias, eps, activation)) is not None:
        return served
    if unstored and is_everyday(input, eps, activation) and fits_instances(input):
        channels = input.shape[1]
        if fits(weight, (channels,), input.dtype) and fits(bias, (channels,), input.dtype):
            return run(input, weight, bias, channels, 0, eps, True, activation)
    _check(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, caller)
    checks.check_activation(activation, caller)
    moves = use_input_stats and running_mean is not None
    check_law(average, "batch", momentum, moves, num_batches_tracked, caller)
    counter = num_batches_tracked if average == "debiased" else None
    checks.check_statistics("num_batches_tracked", counter, write=moves, caller=caller)
    if not use_input_stats:
        stored = (running_mean, running_var, weight, bias, False, 0.0, eps)
        return batch_norm(input, *stored, activation=activation, caller=caller)
    if is_exporting():
        if moves and counter is not None:
            said = "a graph for other programs holds torch's instance norm, which cannot store average='debiased'"
            checks.refuse(ArgumentError, f"{said}; export after eval()", caller)
        return activate(
            F.instance_norm(input, running_mean, running_var, weight, bias, True, momentum, eps), activation
        )
    kept: Kept = []
    y = normalize_groups(input, weight, bias, input.shape[1], eps, activation, kept)
    if running_mean is not None and running_var is not None and input.numel() > 0:
        mean, var = kept[0] if kept else plain_samples.statistics(input, position_axes(input.dim()))
        mean, var = (each.detach().reshape(input.shape[:2]).mean(0) for each in (mean, var))
        count = input.numel() // (input.shape[0] * input.shape[1])
        update_statistics(running_mean, running_var, counter, mean, var * (count / (count - 1)), momentum, average)
    return y


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    caller: nn.Module | None,
) -> None:
    checks.check_input(x, caller)
    if x.dim() < 3:
        checks.refuse(
            ShapeError,
            f"expected at least 3D input (got {x.dim()}D input), shape {tuple(x.shape)}: instance normalization "
            "averages positions; pass (N, C, L), or use layer_norm for (N, C)",
            caller,
        )
    checks.check_channels(x, x.shape[1], caller)
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, value in named.items():
        checks.check_parameter(name, value, x, caller)
    checks.check_eps(eps, caller=caller)
    checks.check_momentum(momentum, caller)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        checks.refuse(ArgumentError, f"{missing} is None and the other is not; pass both or neither", caller)
    checks.check_statistics("running_mean", running_mean, write=use_input_stats, caller=caller)
    checks.check_statistics("running_var", running_var, write=use_input_stats, caller=caller)
    if use_input_stats:
        written = {"running_mean": running_mean, "running_var": running_var}
        checks.check_apart(written, {"input": x, "weight": weight, "bias": bias}, caller)
        shapes.check_positions(x, caller)
        checks.check_not_shared(running_mean, x, caller)
    elif running_mean is None:
        checks.refuse(ArgumentError, "use_input_stats=False needs running_mean and running_var, got None", caller)
