"""What torch's derivatives in forward mode ask of a normalization, and what running statistics do under transforms.

torch runs the ``jvp`` of an autograd function with the tangents of every outer level gone: a function is right to
first order and silently wrong beyond. Where forward mode is active the norms are therefore plain torch operations,
which torch differentiates itself, in any order and mix. docs/derivatives.md says what is supported.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

__all__ = ["is_forward_mode", "is_mapped", "is_recorded_as_graph", "must_be_followed", "outside_transforms"]

Arguments = ParamSpec("Arguments")


def is_forward_mode() -> bool:
    """Tell whether a derivative in forward mode is being computed, by ``dual_level`` or by ``torch.func``."""
    level: int = forward_ad._current_level
    return level >= 0


def is_recorded_as_graph() -> bool:
    """Tell whether ``make_fx`` records operations, as ``torch.func.linearize`` does: no value can then be read."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def must_be_followed(gradient: Tensor) -> bool:
    """Tell whether what a backward makes of this gradient is itself differentiated or mapped.

    Then it is computed in plain operations: a kernel would lose the graph, the tangent or the mapped dimension.
    """
    # Under vmap and every other transform a tensor has no memory to hand to a kernel.
    if torch.is_grad_enabled() or not torch._C._has_storage(gradient):
        return True
    return is_forward_mode() and forward_ad.unpack_dual(gradient).tangent is not None


def outside_transforms(update: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Let an update of running statistics run on bare values: they are no part of what is differentiated.

    torch refuses to write to a tensor from outside a transform, and its own batch norm does so all the same. Under
    vmap, where every sample has values of its own, the update runs as it stands.
    """

    @wraps(update)
    def public(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if torch.compiler.is_compiling() or not (is_forward_mode() or torch._C._are_functorch_transforms_active()):
            return update(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if any(isinstance(value, Tensor) and is_mapped(value) for value in given):
            return update(*args, **kwargs)
        bare: Any = update
        with temporarily_clear_interpreter_stack():
            bare(*map(_bare, args), **{name: _bare(value) for name, value in kwargs.items()})

    return public


def is_mapped(x: Tensor) -> bool:
    """Tell whether a tensor stands for many at once under vmap, at whatever depth of transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def _bare(value: Any) -> Any:
    """Return a tensor without wrappers and tangents; what none is and has none is the same object, to be written."""
    if not isinstance(value, Tensor):
        return value
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.detach() if forward_ad.unpack_dual(value).tangent is not None else value
