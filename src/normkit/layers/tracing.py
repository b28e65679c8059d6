"""How layers of ours appear to TorchScript and torch.fx: as torch's own do."""

from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..functional import checks

__all__ = ["TracedAsTorch", "Unscriptable", "torch_forward"]


def torch_forward(layer: type[nn.Module]) -> Callable[..., Tensor]:
    """Return the forward of torch's layer as ``_torch_forward``, for TorchScript, which cannot read our functions.

    A layer's ``forward`` calls it where ``torch.jit.is_scripting()``. Another way is ``__prepare_scriptable__``, which
    may give TorchScript a twin of the layer; but torch then puts the twin into the model that it was given.
    """
    forward = layer.forward
    assert isinstance(forward, FunctionType)
    # TorchScript compiles a method by the name of its function.
    named = FunctionType(
        forward.__code__, forward.__globals__, "_torch_forward", forward.__defaults__, forward.__closure__
    )
    named.__annotations__ = forward.__annotations__
    return named


class Unscriptable(nn.Module):
    """A layer of which torch has none."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse TorchScript, before anything of the model has changed."""
        raise ArgumentError(
            f"TorchScript cannot read {type(self).__name__}, and torch has no such layer that could take its place; "
            "use torch.export or torch.jit.trace"
        )


class TracedAsTorch(nn.Module):
    """A layer of ours that tools which read code take for torch's."""

    _torch_forward: ClassVar[Callable[..., Tensor]]

    def _check_input(self, input: Tensor) -> None:
        """Refuse a bad input; under torch.jit.trace the sizes that were seen become constants, without a warning."""
        if checks.is_tracing():
            with checks.constant_while_tracing():
                return self._check_shape(input)
        return self._check_shape(input)

    def _check_shape(self, input: Tensor) -> None:
        """Refuse an input whose shape does not fit the layer's settings; by default the function below does."""

    def _as_node(self, input: Any) -> Tensor | None:
        """Return a node that is this layer where torch.fx traces a model around it, so that train() still counts."""
        if isinstance(input, torch.fx.Proxy) and isinstance(input.tracer, torch.fx.Tracer):
            tracer = input.tracer
            if tracer.root is not self:
                return cast(Tensor, tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {}))
        return None

    def _caller(self, input: Any) -> nn.Module | None:
        """Return the layer that errors should name; a stand-in of torch.fx takes no layer along."""
        return None if isinstance(input, torch.fx.Proxy) else self
