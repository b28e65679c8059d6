"""How layers of ours appear to TorchScript and torch.fx: as torch's own do."""

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..functional import checks

__all__ = [
    "StateInTables",
    "Traced",
    "TracedAsTorch",
    "Unscriptable",
    "check_quantizable",
    "path_in_graph",
    "torch_form",
    "torch_forward",
]


_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


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


def torch_form(layer: Any) -> nn.Module:
    """Return torch's layer with the same parameters, buffers, settings and hooks as a layer that names it."""
    form: nn.Module = layer._torch_layer.__new__(layer._torch_layer)
    # The tables of parameters and buffers are its own, so that what is put into one does not appear in the other.
    form.__dict__.update({name: dict(v) if type(v) is dict else v for name, v in layer.__dict__.items()})
    return form


def check_quantizable(layer: Any, *, learns: bool = False) -> None:
    """Refuse a layer that trains, or ``learns`` later, as torch's form of it cannot.

    Raises:
        ArgumentError: torch's layer would store another variance.
    """
    if (learns or layer.training) and not getattr(layer, "unbiased", True):
        raise ArgumentError(
            "torch.ao trains with torch's own batch norm, which cannot store the biased variance of unbiased=False; "
            "call eval() before for post-training quantization, or set unbiased=True on the layer and train with that"
        )


def path_in_graph(layer: Any, tracer: torch.fx.Tracer) -> str:
    """Return the path of a layer from the traced model, or of its form in torch where torch.ao traces to quantize."""
    path: str = tracer.path_of_module(layer)
    quantizing = sys.modules.get("torch.ao.quantization.fx.tracer")
    if quantizing is None or not isinstance(tracer, quantizing.QuantizationTracer) or layer.torch_form is None:
        return path
    check_quantizable(layer)
    return f"{path}.torch_form"


class StateInTables:
    """Says whether a layer's state may be read out of nn.Module's tables: asked for by name it takes far longer."""

    # Whether no class has a property of its own in the place of a parameter or buffer.
    _in_tables: ClassVar[bool] = True

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls._in_tables = not any(hasattr(cls, name) for name in _STATE)


class Traced(StateInTables, nn.Module):
    """A layer of ours that torch.fx keeps as one node, as it keeps torch's own."""

    _torch_layer: ClassVar[type[nn.Module] | None] = None
    __jit_unused_properties__: ClassVar[list[str]] = ["torch_form"]

    @property
    def torch_form(self) -> nn.Module | None:
        """The form in which torch.ao quantizes this layer, made anew; None where torch has no such layer."""
        return None if self._torch_layer is None else torch_form(self)

    def _check_input(self, input: Tensor) -> None:
        """Refuse a bad input; under torch.jit.trace the sizes that were seen become constants, without a warning."""
        if checks.is_tracing():
            with checks.constant_while_tracing():
                return self._check_shape(input)
        return self._check_shape(input)

    def _check_shape(self, input: Tensor) -> None:
        """Refuse an input whose shape does not fit the layer's settings; by default the function below does."""

    def _weight_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        try:
            # Asked for by name, nn.Module looks through every class before it looks here.
            parameters = self._parameters if self._in_tables else {}
            return parameters["weight"], parameters["bias"]
        except KeyError:
            # Parametrized, pruned, put in as an attribute, or made by a class of the user's.
            return self.weight, self.bias  # type: ignore[return-value]

    def _as_node(self, input: Any, *rest: Any) -> Tensor | None:
        """Return a node that is this layer where torch.fx traces a model around it, so that train() still counts."""
        if isinstance(input, torch.fx.Proxy) and isinstance(input.tracer, torch.fx.Tracer):
            tracer = input.tracer
            if tracer.root is not self:
                path = path_in_graph(self, tracer)
                return cast(Tensor, tracer.create_proxy("call_module", path, (input, *rest), {}))
        return None

    def _caller(self, input: Any) -> nn.Module | None:
        """Return the layer that errors should name; a stand-in of torch.fx takes no layer along."""
        return None if isinstance(input, torch.fx.Proxy) else self


class TracedAsTorch(Traced):
    """A layer of ours that tools which read code take for torch's."""

    _torch_layer: ClassVar[type[nn.Module]]
    _torch_forward: ClassVar[Callable[..., Tensor]]


class Unscriptable(Traced):
    """A layer of which torch has none."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse TorchScript, before anything of the model has changed."""
        raise ArgumentError(
            f"TorchScript cannot read {type(self).__name__}, and torch has no such layer that could take its place; "
            "use torch.export or torch.jit.trace"
        )
