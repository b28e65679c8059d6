"""Run a model once and note how often each layer is called, on which shapes, and with which arguments."""

import inspect
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, preserved, run, without_exchange
from ..anatomy.batches import tensors
from .entries import own_copy

__all__ = ["Observed", "observe"]


@dataclass
class Observed:
    """What one call of a model showed.

    Attributes:
        calls: how often each module was called, by ``id``.
        inputs: the shape of each module's first input, by ``id``.
        outputs: the shape of each module's output, by ``id``.
        fixed: the arguments of the model's forward that held no tensor, by name.
    """

    calls: Counter[int] = field(default_factory=Counter)
    inputs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)


def observe(model: nn.Module, example: Any, call: Call | None) -> Observed:
    """Call the model on an example and return what was seen; the model is afterwards as it was."""
    observed = Observed()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        observed.calls[id(module)] += 1
        first = next(tensors((args, kwargs)), None)
        if first is not None:
            observed.inputs[id(module)] = tuple(first.shape)
        if isinstance(output, Tensor):
            observed.outputs[id(module)] = tuple(output.shape)
        if module is model:
            observed.fixed = _without_tensors(model, args, kwargs)

    with preserved(model), torch.no_grad(), without_exchange(model), ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        run(model, own_copy(example), call)
    return observed


def _without_tensors(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments, defaults included, that hold no tensor."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    parameters = inspect.signature(model.forward).parameters
    plain = {name for name, item in parameters.items() if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)}
    return {
        name: value for name, value in bound.arguments.items() if name in plain and next(tensors(value), None) is None
    }
