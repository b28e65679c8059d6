"""The differentiable step that layer, RMS, group and instance normalization share, and what serves it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..axes import group_axes, trailing_axes
from ..errors import BackendError
from ..kernels import dispatch, forms
from ..kernels.layouts import check_allocated
from ..kernels.plain import samples as plain
from ..kernels.plain.channels import activate
from .row_gradients import Call, Kernel, Plain
from .transforms import is_forward_mode

__all__ = [
    "Kept",
    "fits",
    "fits_groups",
    "fits_instances",
    "fits_trailing",
    "is_everyday",
    "normalize",
    "normalize_groups",
    "normalize_trailing",
    "run",
]

Kept = list[tuple[Tensor, Tensor]]

# The types of weight and bias that go with a type of input.
_WITH = {
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: tuple[int, ...], eps: float, *, centre: bool = True
) -> Tensor:
    """Normalize x over the axes, then scale and shift, in plain torch operations.

    Args:
        x: the view in which ``axes`` share statistics.
        weight: broadcasts against x; None for 1.
        bias: broadcasts against x; None for 0.
        axes: the averaged axes.
        eps: added to the variance, or to the mean square.
        centre: whether the mean is removed.

    Returns:
        The normalized view, in the type and memory format of x.
    """
    if x.numel() == 0:
        return plain.pass_empty(x, weight, bias)
    if torch.compiler.is_compiling() or is_forward_mode():
        return plain.forward(x, weight, bias, axes, eps, centre)
    y: Tensor = Plain.apply(x, weight, bias, axes, eps, centre)
    return y


def is_everyday(x: object, eps: object, activation: object) -> bool:
    """Tell quickly whether a call is one that the CPU kernels serve and the checks would pass, as far as this sees.

    False decides nothing. What is left to ask is `fits`, and whether the sizes are those the method wants.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and x.is_cpu
        and x.dtype in _WITH
        and x.layout is torch.strided
        and type(eps) is float
        and 0.0 <= eps < math.inf
        and (activation is None or activation in dispatch.ACTIVATIONS)
        and dispatch.is_undisturbed()
        and (x.dtype is not torch.float16 or dispatch.cannot_compile(x.dtype) is None)
    )


def fits(parameter: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Tell quickly whether a weight or bias is an everyday one, of this shape and for inputs of this type."""
    return parameter is None or (
        (type(parameter) is nn.Parameter or type(parameter) is Tensor)
        and parameter.dtype in _WITH[dtype]
        and parameter.shape == shape
        and parameter.is_cpu
    )


def fits_trailing(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Tell quickly whether x ends in these dimensions and holds values."""
    try:
        return 0 < len(shape) <= x.dim() and x.shape[-len(shape) :] == shape and x.numel() > 0
    except RuntimeError:
        # A nested tensor of strided layout has no shape. To catch this costs nothing, to ask every tensor does.
        return False


def fits_groups(x: Tensor, groups: object) -> bool:
    """Tell quickly whether x is ``(N, C, *)`` with values in every one of these groups."""
    if type(groups) is not int or groups < 1 or x.dim() < 2:
        return False
    try:
        return x.shape[1] % groups == 0 and x.numel() > x.shape[0] * groups
    except RuntimeError:
        return False


def fits_instances(x: Tensor) -> bool:
    """Tell quickly whether x is ``(N, C, *)`` with several positions."""
    try:
        return x.dim() > 2 and x.numel() > x.shape[0] * x.shape[1] > 0
    except RuntimeError:
        return False


@functools.lru_cache(maxsize=1024)
def _call(backend: str, groups: int | None, trailing: int, eps: float, centre: bool, activation: str | None) -> Call:
    # Imported at the first call: Numba and Triton cost more to import than torch's own layers to run.
    kernels: Any
    if backend == "numba":
        from ..kernels.numba.samples import passes as kernels
    else:
        from ..kernels.triton.samples import passes as kernels
    return Call(kernels, groups, trailing, eps, centre, activation)


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int | None,
    trailing: int,
    eps: float,
    centre: bool,
    activation: str | None,
    kept: Kept | None = None,
    backend: str = "numba",
) -> Tensor:
    """Run the kernels, under autograd only where a gradient is recorded: on a small tensor autograd costs the most.

    With ``kept`` mean and variance of every group, in float64, are appended to it.
    """
    call = _call(backend, groups, trailing, eps, centre, activation)
    form = call.form(x)
    if form is None:
        check_allocated(x)
        x = x.contiguous()
        form = call.form(x)
    variance = None
    if kept is not None:
        variance = torch.empty(form.samples * form.groups, dtype=torch.float64, device=x.device)
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = Kernel.apply(x, weight, bias, (call, form, variance, kept))
        return y
    y, saved = call.kernels.forward(x, form, weight, bias, eps, centre, activation, variance)
    if kept is not None and variance is not None:
        kept.append((saved[0], variance))
    return y


def normalize_trailing(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    trailing: int,
    eps: float,
    activation: str | None,
    *,
    centre: bool = True,
) -> Tensor:
    """Normalize the last dimensions of x, whose arguments are checked, by the implementation that serves it."""
    backend = _backend(x, None, trailing)
    if backend is not None:
        return run(x, weight, bias, None, trailing, eps, centre, activation, backend=backend)
    return activate(normalize(x, weight, bias, trailing_axes(x.dim(), trailing), eps, centre=centre), activation)


def normalize_groups(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    kept: Kept | None = None,
) -> Tensor:
    """Normalize groups of channels of ``(N, C, *)``, whose arguments are checked, by the implementation that serves it.

    Where the kernels run, ``kept`` is filled as `run` says; else it is left alone.
    """
    backend = _backend(x, groups, 0)
    if backend is not None:
        return run(x, weight, bias, groups, 0, eps, True, activation, kept, backend)
    if torch.compiler.is_compiling() and x.numel() > 0:
        return activate(plain.forward_groups(x, weight, bias, groups, eps), activation)
    size = x.shape[1] // groups
    broadcast = (1, groups, size, *(1 for _ in range(2, x.dim())))
    gamma, beta = (None if value is None else value.reshape(broadcast) for value in (weight, bias))
    y = normalize(x.unflatten(1, (groups, size)), gamma, beta, group_axes(x.dim()), eps)
    return activate(y.flatten(1, 2), activation)


def _backend(x: Tensor, groups: int | None, trailing: int) -> str | None:
    """Return the kernels that serve x; torch operations serve all else.

    Raises:
        BackendError: what `use_backend` asked for cannot.
    """
    if torch.compiler.is_compiling() or x.numel() == 0:
        return None
    backend = dispatch.choose(x)
    if backend == "plain":
        return None
    if backend == "triton":
        from ..kernels.triton.samples import passes as triton_samples

        reason = triton_samples.unavailable(x, forms.form_of_shape(x.shape, groups, trailing))
        if reason is not None:
            if dispatch.requested() is None:
                return None
            raise BackendError(dispatch.cannot(backend, reason))
    return backend
