"""Calls of a model's batch norms, answered for a while by what puts several micro-batches together."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..anatomy import NormLayer, norm_layers
from ..anatomy.hold import update_later
from ..errors import ArgumentError
from ..functional.masked import check_mask, over_valid
from ..kernels.dispatch import Activation
from ..layers import MaskedBatchNorm1d
from ..layers.batch import _BatchNorm

__all__ = ["Answer", "NormCall", "Running", "answered", "pooled_norms"]

_GHOSTS = ("ghost",)
# What these keep is not the mean and variance of a batch, or hangs on what they keep.
_CUT_ELSEWHERE = (
    "normalizes parts of a batch, and the large batch is cut elsewhere than its micro-batches; "
    'kind="statistics" takes it'
)
_REPLACED = "build the model with a batch norm in its place, or put it into eval()"
_OTHERS = {
    "renorm": f"normalizes with what it has stored too, which moves with every micro-batch; {_REPLACED}",
    "whitening": f"normalizes by the covariance of channels together, which is not pooled here; {_REPLACED}",
    "instance": (
        "stores the mean over samples of what it computes for each, which is not pooled here; build it with "
        "track_running_stats=False, or put it into eval()"
    ),
}
_OWN_FORWARD = (
    "is a batch norm with a forward of its own, of which only its author knows what it does with a batch; make it a "
    "module around one (self.norm = nn.BatchNorm1d(...), called in its forward), or put it into eval()"
)


Running = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class NormCall:
    """One call of a batch norm.

    Attributes:
        layer: which.
        path: its name in the model.
        input: what it is to normalize.
        activation: what is applied last, where the layer has it fused in.
        residual: what is added before that.
        ordinary: computes what the layer itself would have.
        weight: the layer's at this moment, which may be another's for the next caller.
        bias: likewise.
        training: likewise.
        running: likewise, the mean, the variance and the counter of batches.
    """

    layer: Any
    path: str
    input: Tensor
    activation: Activation | None
    residual: Tensor | None
    ordinary: Callable[[], Tensor]
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    running: Running

    @property
    def uses_batch(self) -> bool:
        """Whether it normalizes with the statistics of the batch."""
        return self.training or (self.running[0] is None and self.running[1] is None)

    @property
    def tracks(self) -> bool:
        """Whether it moves running statistics."""
        return self.training and bool(self.layer.track_running_stats) and self.running[0] is not None

    def check_dimensions(self) -> None:
        """Refuse an input that the layer does not take."""
        check = getattr(self.layer, "_check_input", None) or self.layer._check_input_dim
        check(self.input)

    def __str__(self) -> str:
        """Name the layer as errors do."""
        return f"{self.path or 'the model itself'} ({type(self.layer).__name__})"


Answer = Callable[[NormCall], Tensor]


def _noted(
    layer: Any,
    path: str,
    input: Tensor,
    activation: Activation | None,
    residual: Tensor | None,
    ordinary: Callable[[], Tensor],
) -> NormCall:
    """Return a call with what the layer holds at this moment."""
    running = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    held = (layer.weight, layer.bias, bool(layer.training), running)
    return NormCall(layer, path, input, activation, residual, ordinary, *held)


def pooled_norms(model: nn.Module, *, exactly: bool) -> list[NormLayer]:
    """Return the batch norms whose statistics micro-batches are to have in common.

    Raises:
        ArgumentError: a layer in training whose statistics hang on the batch in a way that cannot be put together.
    """
    chosen = []
    for layer in norm_layers(model):
        module = layer.module
        if any(hasattr(vars(module).get(name), "answers") for name in ("forward", "normalize")):
            raise ArgumentError(
                "accumulate: accumulate is at work on this model already: loss is to compute a loss, and the gradients "
                "are taken around it"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not layer.overridden:
            if getattr(module, "frozen_statistics", None) == "running":
                ours = isinstance(module, _BatchNorm)
                if getattr(module, "frozen_track", False) and (exactly or not ours):
                    _refuse(
                        layer, "is frozen and goes on tracking; freeze it without track, or normkit.unfreeze(model)"
                    )
                if not ours:
                    continue
            if exactly and getattr(module, "ghost_size", None) is not None and module.training:
                _refuse(layer, _CUT_ELSEWHERE)
            chosen.append(layer)
        elif not module.training or layer.kind == "frozen":
            continue
        elif layer.kind in _GHOSTS:
            if exactly:
                _refuse(layer, _CUT_ELSEWHERE)
            chosen.append(layer)
        elif layer.kind == "masked" and not layer.overridden:
            chosen.append(layer)
        elif layer.kind in _OTHERS and not layer.overridden:
            if layer.tracks or layer.kind != "instance":
                _refuse(layer, _OTHERS[layer.kind])
        elif layer.kind in ("batch", "sync", "masked", "unknown", *_OTHERS):
            _refuse(layer, _OWN_FORWARD)
    return chosen


def _refuse(layer: NormLayer, said: str) -> None:
    raise ArgumentError(f"accumulate: {layer} {said}")


@contextlib.contextmanager
def answered(layers: list[NormLayer], answer: Answer) -> Iterator[None]:
    """Let the calls of these layers be answered, inside, in any thread."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(update_later([layer.module for layer in layers]))
        for layer in layers:
            name, method = _method(layer, answer)
            if "torch._dynamo" in sys.modules:
                # Micro-batches that take turns inside a graph would leave its compiler at work around the others.
                method = _disable_dynamo(method)
            method.answers = True  # type: ignore[attr-defined]
            vars(layer.module)[name] = method
            stack.callback(vars(layer.module).pop, name)
        yield


def _method(layer: NormLayer, answer: Answer) -> tuple[str, Callable[..., Tensor]]:
    """Return the method of a layer by which its calls are answered, and its name: ours can be called fused."""
    module, path = layer.module, layer.path
    if isinstance(module, MaskedBatchNorm1d):

        def masked(input: Tensor, mask: Tensor | None = None) -> Tensor:
            if mask is not None:
                check_mask(mask, input, module)
                return over_valid(input, mask, None, lambda rows, _: masked(rows))
            return answer(_noted(module, path, input, None, None, lambda: type(module).forward(module, input)))

        return "forward", masked
    if not isinstance(module, _BatchNorm):

        def forward(input: Tensor) -> Tensor:
            return answer(_noted(module, path, input, None, None, lambda: type(module).forward(module, input)))

        return "forward", forward

    def normalize(
        input: Tensor,
        activation: Activation | None = None,
        residual: Tensor | None = None,
        inplace: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        if mask is not None:
            # The valid positions are a batch of their own, of as many samples.
            check_mask(mask, input, module)
            return over_valid(input, mask, residual, lambda rows, beside: normalize(rows, activation, beside))

        def ordinary() -> Tensor:
            return type(module).normalize(module, input, activation, residual, inplace)

        return answer(_noted(module, path, input, activation, residual, ordinary))

    return "normalize", normalize
