"""How a function of ours answers torch's stand-ins for tensors, its tracers and its exporters."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import checks
from .nested import is_nested

__all__ = ["is_exporting", "overridable"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def overridable(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a first argument with ``__torch_function__`` take the call, as torch's own functions do.

    Under torch.jit.trace the sizes that are checked become constants, without torch's warning of it.
    """

    @wraps(function)
    def public(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        given: Any = args[0] if args else kwargs.get("input")
        # A nested tensor takes calls too, but knows torch's functions only: ours answer it themselves.
        if has_torch_function_unary(given) and not is_nested(given):
            result: Result = handle_torch_function(public, (given,), *args, **kwargs)
            return result
        if checks.is_tracing():
            with checks.constant_while_tracing():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return public


def is_exporting() -> bool:
    """Tell whether a graph is recorded for other programs: it holds torch's own operators, which every one can read."""
    return torch.compiler.is_exporting() or checks.is_tracing()
