"""Calls on ordinary tensors that the native part answers at once, before anything else is asked of them.

None where it hands a call back: it is not built, or something about the call is not ordinary. Layers ask here first,
because the checks of a function and of a layer cost as much as a small tensor's arithmetic.
"""

from collections.abc import Sequence

from torch import Tensor

from ..kernels.dispatch import Activation, may_be_native
from ..kernels.native import calls as native

__all__ = ["group_norm", "trailing_norm"]


def trailing_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    activation: Activation | None = None,
) -> Tensor | None:
    """Return layer norm, or RMS norm where it is not centred, of the last dimensions."""
    if may_be_native() and (serve := native.trailing_norm) is not None:
        return serve(input, normalized_shape, weight, bias, eps, centred, activation)
    return None


def group_norm(
    input: Tensor,
    num_groups: int | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None = None,
) -> Tensor | None:
    """Return group norm, or instance norm where ``num_groups`` is None."""
    if may_be_native() and (serve := native.group_norm) is not None:
        return serve(input, num_groups, weight, bias, eps, activation)
    return None
