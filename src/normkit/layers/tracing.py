"""How layers of ours appear to TorchScript and torch.fx: as torch's own do."""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..functional import checks

__all__ = ["Traced", "TracedAsTorch"]


class Traced(nn.Module):
    """A layer of ours that torch.fx keeps as one node, as it keeps torch's own."""

    def _as_node(self, input: Any, *rest: Any) -> Tensor | None:
        """Return a node that is this layer where torch.fx traces a model around it, so that train() still counts."""
        if isinstance(input, torch.fx.Proxy) and isinstance(input.tracer, torch.fx.Tracer):
            tracer = input.tracer
            if tracer.root is not self:
                path = tracer.path_of_module(self)
                return cast(Tensor, tracer.create_proxy("call_module", path, (input, *rest), {}))
        return None

    def _caller(self, input: Any) -> nn.Module | None:
        """Return the layer that errors should name; a stand-in of torch.fx takes no layer along."""
        return None if isinstance(input, torch.fx.Proxy) else self


class TracedAsTorch(Traced):
    """A layer of ours that tools which read code take for torch's."""

    _torch_layer: ClassVar[type[nn.Module]]

    def __prepare_scriptable__(self) -> nn.Module:
        """Return torch's layer, which shares all state with this one: TorchScript cannot read our functions."""
        twin: nn.Module = self._torch_layer.__new__(self._torch_layer)
        twin.__dict__.update(self.__dict__)
        return twin

    def _check_input(self, input: Tensor) -> None:
        """Refuse a bad input; under torch.jit.trace the sizes that were seen become constants, without a warning."""
        if checks.is_tracing():
            with checks.constant_while_tracing():
                return self._check_shape(input)
        return self._check_shape(input)

    def _check_shape(self, input: Tensor) -> None:
        """Refuse an input whose shape does not fit the layer's settings; by default the function below does."""
