"""What a normalization refuses, and the words it says. Nothing has changed when one of these raises.

Every message says what was wrong, what came, what is allowed and what to type instead. `caller` is the layer, or None
where the function was called bare; it is described only once something is wrong.
"""

import contextlib
import math
import re
import warnings
from collections.abc import Iterator
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from ..axes import values_per_channel
from ..errors import ArgumentError, DtypeError, NormkitError, ShapeError, StatisticsError
from ..kernels.dispatch import ACTIVATIONS
from ..spelling import alternatives
from .overlaps import overlaps_itself, share_memory
from .transforms import is_mapped

__all__ = [
    "HALF",
    "check_activation",
    "check_apart",
    "check_channels",
    "check_eps",
    "check_fusion",
    "check_input",
    "check_match",
    "check_momentum",
    "check_not_shared",
    "check_number",
    "check_parameter",
    "check_rank",
    "check_saveable",
    "check_statistics",
    "check_values_per_channel",
    "constant_while_tracing",
    "is_ordinary",
    "is_tracing",
    "refuse",
]

HALF = (torch.float16, torch.bfloat16)
_SUPPORTED = (*HALF, torch.float32, torch.float64)


def refuse(error: type[NormkitError], message: str, caller: nn.Module | None) -> NoReturn:
    """Raise the error, naming the layer that was called."""
    # The sizes alone, without the named settings that follow them.
    name = "" if caller is None else f"{type(caller).__name__}({re.split(r', (?=[a-z_]+=)', caller.extra_repr())[0]}): "
    raise error(f"{name}{message}")


def is_tracing() -> bool:
    """Tell whether torch.jit.trace is recording."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


@contextlib.contextmanager
def constant_while_tracing() -> Iterator[None]:
    """Let sizes be read under torch.jit.trace: a trace keeps what the checks saw, which is what they are for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        yield


def is_ordinary(
    x: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor | None, Tensor | None],
    counter: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> bool:
    """Tell quickly whether a call is the everyday one, which every check below would pass; False decides nothing.

    On a small tensor the checks cost as much as the arithmetic. Everyday is: plain float32 or float64 tensors on a
    CPU, all of one type, with both running statistics or none, and settings in range.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    try:
        dtype, shape = x.dtype, x.shape
    except RuntimeError:
        # A nested tensor of strided layout has none. To catch this costs nothing, to ask every tensor does.
        return False
    if not (dtype is torch.float32 or dtype is torch.float64) or not x.is_cpu or x.layout is not torch.strided:
        return False
    if len(shape) < 2 or x.numel() <= shape[1] or type(eps) is not float or not 0.0 < eps < math.inf:
        return False
    channels = shape[1]
    for value in parameters:
        if value is not None and not _is_one_per_channel(value, channels, dtype):
            return False
    if counter is not None and not (
        # Of integers: so it is not one of the statistics in another guise.
        type(counter) is Tensor and counter.dtype is torch.int64 and counter.is_cpu and not counter.is_inference()
    ):
        return False
    mean, var = running
    if mean is None or var is None:
        return training and mean is var
    if type(momentum) is not float or not 0.0 <= momentum <= 1.0:
        return False
    for value in (mean, var):
        if not _is_one_per_channel(value, channels, dtype) or value.requires_grad or value.is_inference():
            return False
    return True


def _is_one_per_channel(value: Tensor, channels: int, dtype: torch.dtype) -> bool:
    return (
        (type(value) is nn.Parameter or type(value) is Tensor)
        and value.dtype is dtype
        and value.shape == (channels,)
        and value.is_cpu
    )


def check_input(x: object, caller: nn.Module | None = None) -> None:
    """Refuse what is not a dense tensor of real floating point numbers.

    Raises:
        DtypeError: x is no tensor, sparse, of integers, or complex.
    """
    if not isinstance(x, Tensor):
        advice = "torch.as_tensor(input)" if x is not None else "the output of the layer before"
        refuse(DtypeError, f"the input must be a tensor, got {type(x).__name__}; pass {advice}", caller)
    if x.is_nested:
        advice = "each of input.unbind(), or for statistics over all samples input.values(); see MaskedBatchNorm1d"
        said = f"the input must be a dense tensor, got a nested one of layout {x.layout}"
        refuse(DtypeError, f"{said}; only layer and RMS normalization take it. Pass {advice}", caller)
    if x.layout is not torch.strided:
        refuse(DtypeError, f"the input must be a dense tensor, got layout {x.layout}; pass input.to_dense()", caller)
    if x.is_complex():
        refuse(
            DtypeError, f"complex numbers are not normalized, got {x.dtype}; pass torch.view_as_real's parts", caller
        )
    if not x.is_floating_point():
        refuse(
            DtypeError,
            f"the input must be floating point, got {x.dtype}; pass input.float(), scaled to the range you train on",
            caller,
        )
    if x.dtype not in _SUPPORTED:
        allowed = "float16, bfloat16, float32 or float64"
        refuse(DtypeError, f"the input is {x.dtype}; allowed are {allowed}. Pass input.float()", caller)


def check_rank(x: Tensor, allowed: tuple[int, ...], layout: str, caller: nn.Module | None = None) -> None:
    """Refuse a tensor whose number of dimensions is not among the allowed.

    Raises:
        ShapeError: the rank is wrong; the message says how to reshape.
    """
    if x.dim() in allowed:
        return
    words = " or ".join(f"{rank}D" for rank in allowed)
    advice = f"; reshape it to {layout}"
    if x.dim() == min(allowed) - 1 and x.dim() > 0:
        advice = "; for a single sample without batch dimension pass input.unsqueeze(0)"
    elif x.dim() > max(allowed):
        advice = f"; to treat the rest as positions pass input.flatten({max(allowed) - 1})"
    shape = tuple(x.shape)
    refuse(ShapeError, f"expected {words} input (got {x.dim()}D input), shape {shape}, not {layout}{advice}", caller)


def check_channels(x: Tensor, channels: int, caller: nn.Module | None = None) -> None:
    """Refuse a tensor without channels, or whose dimension 1 does not hold this many.

    Raises:
        ShapeError: the channel count is wrong; the message names a dimension that would fit.
    """
    if x.shape[1] == channels > 0:
        return
    shape = tuple(x.shape)
    if x.shape[1] == 0:
        said = "Expected number of channels to be greater than 0, got 0"
        refuse(
            ShapeError, f"{said}: the input has no channels in dimension 1 of shape {shape}; pass at least one", caller
        )
    fitting = [axis for axis in range(2, x.dim()) if shape[axis] == channels]
    if fitting:
        advice = f"dimension {fitting[-1]} has {channels}: pass input.movedim({fitting[-1]}, 1)"
    else:
        advice = f"the layer before puts out {shape[1]}: build this one with num_features={shape[1]}"
    refuse(ShapeError, f"expected {channels} channels in dimension 1, got {shape[1]} (shape {shape}); {advice}", caller)


def check_values_per_channel(x: Tensor, caller: nn.Module | None = None) -> None:
    """Refuse a training batch with a single value per channel, which has no variance.

    Raises:
        ShapeError: one value per channel.
    """
    if values_per_channel(tuple(x.shape)) == 1:
        refuse(
            ShapeError,
            f"Expected more than 1 value per channel when training, got input size {list(x.shape)}; one value has no "
            "variance. If this is the last batch, pass drop_last=True to the training DataLoader; to predict, call "
            "model.eval()",
            caller,
        )


def check_parameter(name: str, value: object, x: Tensor, caller: nn.Module | None = None) -> None:
    """Refuse a weight, bias or running statistic that does not match x in size, type or device.

    A parameter has the type of x, or is float32 where x is float16 or bfloat16.

    Raises:
        ShapeError: not one value per channel.
        DtypeError: a mix of types that would lose digits silently, or of devices.
    """
    if value is None:
        return
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        refuse(DtypeError, f"{name} must be a tensor, got {kind}; pass torch.as_tensor({name})", caller)
    if value.dim() != 1 or value.shape[0] != x.shape[1]:
        got = tuple(value.shape)
        refuse(ShapeError, f"{name} must have shape ({x.shape[1]},), one value per channel, got {got}", caller)
    check_match(name, value, x, caller)


def check_match(name: str, value: Tensor, x: Tensor, caller: nn.Module | None = None) -> None:
    """Refuse a weight, bias or running statistic of another type or device than x; its size may be unknown yet.

    Raises:
        DtypeError: as for ``check_parameter``.
    """
    if value.dtype != x.dtype and not (x.dtype in HALF and value.dtype == torch.float32):
        advice = f"input.to({value.dtype})" if value.dtype in _SUPPORTED else f"{name}.to({x.dtype})"
        refuse(
            DtypeError,
            f"mixed dtype: the input is {x.dtype} and {name} is {value.dtype}; allowed are the same type, or float32 "
            f"{name} with float16 or bfloat16 input. Pass {advice}",
            caller,
        )
    if value.device != x.device:
        refuse(
            DtypeError, f"the input is on {x.device} and {name} on {value.device}; move one with .to(device)", caller
        )


def check_statistics(name: str, value: object, *, write: bool, caller: nn.Module | None = None) -> None:
    """Refuse a running statistic or counter that cannot be written, or that asks for a gradient it would not get.

    Raises:
        DtypeError: no tensor.
        StatisticsError: it requires a gradient; or, where it is written, is an inference tensor, overlaps itself or has
            no memory.
    """
    if value is None or torch.compiler.is_compiling():
        return
    if not isinstance(value, Tensor):
        refuse(DtypeError, f"{name} must be a tensor, got {type(value).__name__}; pass torch.as_tensor({name})", caller)
    if value.requires_grad:
        said = f"batch_norm is not differentiable with respect to {name}, which requires a gradient"
        refuse(StatisticsError, f"{said}; pass {name}.detach()", caller)
    if not write:
        return
    if _is_freed(value):
        said = f"the storage of {name} was freed, as between two uses of a sharded tensor"
        refuse(StatisticsError, f"{said}; gather it again before this call", caller)
    if value.is_inference() and not torch.is_inference_mode_enabled():
        said = f"{name} was made under inference_mode and cannot be updated outside it"
        refuse(StatisticsError, f"{said}; pass {name}.clone(), or build the layer outside", caller)
    if overlaps_itself(value):
        said = f"the elements of {name} share memory (it was expanded) and cannot hold one value per channel"
        refuse(StatisticsError, f"{said}; pass {name}.clone()", caller)
    if value._is_zerotensor():
        said = f"{name} is a ZeroTensor, which stands for zeros without memory and cannot be written"
        refuse(StatisticsError, f"{said}; pass {name}.clone()", caller)


def _is_freed(x: Tensor) -> bool:
    plain = (type(x) is Tensor or type(x) is nn.Parameter) and torch._C._has_storage(x) and not x.is_meta
    return plain and x.numel() > 0 and not x._is_zerotensor() and x.data_ptr() == 0


def check_apart(written: dict[str, Tensor | None], read: dict[str, Tensor | None], caller: nn.Module | None) -> None:
    """Refuse running statistics that share memory with each other, or with what is read while they are written.

    Raises:
        StatisticsError: two of them do.
    """
    known = {name: value for name, value in written.items() if value is not None}
    for name, value in list(known.items()):
        del known[name]
        for other, beside in (*known.items(), *read.items()):
            # A graph being compiled, or traced, knows which tensor is which, and no addresses.
            addressed = not torch.compiler.is_compiling() and not is_tracing()
            if beside is value or (addressed and beside is not None and share_memory(value, beside)):
                role = "each is written" if other in known else "one is written while the other is read"
                said = f"{name} and {other} share memory, and {role}"
                refuse(StatisticsError, f"{said}; pass {name}.clone(), or build them apart", caller)


def check_saveable(caller: nn.Module | None = None, **tensors: Tensor | None) -> None:
    """Refuse tensors that autograd would not keep for a backward, which it says only once the forward is done.

    Raises:
        DtypeError: one was made under inference_mode.
    """
    for name, value in tensors.items():
        if value is not None and value.is_inference():
            said = f"{name} was made under inference_mode and cannot be kept for the backward of this call"
            refuse(DtypeError, f"{said}; pass {name}.clone(), or call under torch.no_grad()", caller)


def check_not_shared(running: Tensor | None, x: Tensor, caller: nn.Module | None = None) -> None:
    """Refuse one set of running statistics for the many batches that x stands for under vmap.

    Raises:
        StatisticsError: x is mapped, and the running statistics are not.
    """
    if running is None or torch.compiler.is_compiling() or not is_mapped(x) or is_mapped(running):
        return
    refuse(
        StatisticsError,
        "under vmap every sample has statistics of its own, and the running ones hold one set; pass "
        "track_running_stats=False, call eval(), or see torch.func.replace_all_batch_norm_modules_",
        caller,
    )


def check_eps(eps: object, *, positive: bool = False, caller: nn.Module | None = None) -> None:
    """Refuse an eps that is negative, not finite or no number; with ``positive`` also zero.

    Raises:
        ArgumentError: eps is out of range. The words are torch's.
    """
    if isinstance(eps, bool) or not isinstance(eps, Real):
        refuse(ArgumentError, f"eps must be a number, got {type(eps).__name__} {eps!r}; pass eps=1e-5", caller)
    value = float(eps)
    if positive and not value > 0:
        said = f"batch_norm eps must be positive during training, but got {eps}; pass eps=1e-5"
        refuse(ArgumentError, said, caller)
    if not 0 <= value < math.inf:
        refuse(ArgumentError, f"eps must be finite and non-negative, got {eps}; pass eps=1e-5", caller)


def check_activation(activation: object, caller: nn.Module | None) -> None:
    """Refuse an activation that the kernels do not have.

    Raises:
        ArgumentError: an unknown activation.
    """
    # Asked of text alone: another object may refuse to be hashed.
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return
    advice = f"{alternatives(activation, ACTIVATIONS)}, None"
    if not isinstance(activation, str):
        # "LeakyReLU" of torch.nn and "leaky_relu" of torch.nn.functional are one name without their underscores.
        named = str(getattr(activation, "__name__", type(activation).__name__)).lower().replace("_", "")
        meant = [name for name in ACTIVATIONS if name.replace("_", "") == named]
        advice = f"pass its name, {meant[0]!r}" if meant else f"pass a name; {advice}"
    refuse(ArgumentError, f"unknown activation {activation!r}; {advice}", caller)


def check_fusion(x: Tensor, activation: str | None, residual: Tensor | None, caller: nn.Module | None) -> None:
    """Refuse an unknown activation, and a residual that does not match x."""
    check_activation(activation, caller)
    if residual is not None:
        check_input(residual, caller)
        if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
            got = f"{tuple(residual.shape)} {residual.dtype} on {residual.device}"
            wanted = f"{tuple(x.shape)} {x.dtype} on {x.device}"
            refuse(ShapeError, f"the residual must match the input, {wanted}; got {got}", caller)


def check_number(name: str, value: object, example: float, caller: nn.Module | None = None) -> None:
    """Refuse a setting that is no real number; its range is checked elsewhere.

    Raises:
        ArgumentError: the value is of another type.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        kind = type(value).__name__
        refuse(ArgumentError, f"{name} must be a number, got {kind} {value!r}; pass {name}={example}", caller)


def check_momentum(momentum: object, caller: nn.Module | None = None) -> None:
    """Refuse a momentum outside 0 to 1.

    Raises:
        ArgumentError: momentum is out of range or no number.
    """
    if momentum is None:
        return
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        refuse(
            ArgumentError,
            f"momentum must be a number from 0 to 1 or None, got {type(momentum).__name__} {momentum!r}; "
            "pass momentum=0.1",
            caller,
        )
    if not 0 <= float(momentum) <= 1:
        refuse(
            ArgumentError,
            f"momentum must be from 0 to 1, got {momentum}; it is the weight of the new batch. "
            "To say the weight of the old value pass decay=",
            caller,
        )
