"""Parameter groups for an optimizer: what is decayed, and what is not."""

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..anatomy import norm_layers
from ..errors import ArgumentError, SurgeryError

__all__ = ["param_groups"]


def param_groups(model: nn.Module, weight_decay: float, *, norm_weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Split a model's learning parameters for an optimizer, so that weight decay leaves norms and biases alone.

    Decay pulls a norm's weight and every bias towards zero, where they carry no capacity that a penalty should bound.
    Without decay go the parameters of every normalization layer, every bias, and whatever else has at most one
    dimension (scales and offsets of layers that are not known here).

    Args:
        model: any module.
        weight_decay: for all other parameters.
        norm_weight_decay: for norms and biases.

    Returns:
        One or two groups, each with ``params``, ``weight_decay`` and ``name``. Every parameter that learns is in
        one, once, in the order of ``model.parameters()``.

    Raises:
        ArgumentError: a decay is no number, negative or not finite.
        SurgeryError: a lazy parameter has no shape yet, or nothing learns.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> [(group["name"], group["weight_decay"], len(group["params"])) for group in param_groups(model, 0.1)]
    [('weights', 0.1, 1), ('norms and biases', 0.0, 3)]
    """
    for name, value in (("weight_decay", weight_decay), ("norm_weight_decay", norm_weight_decay)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf"):
            raise ArgumentError(f"{name}={value!r}; a number is needed that is finite and not negative, such as 0.01")
    # A ScriptModule shows no layers, and its parameters all the same: norms are known there by their one dimension.
    layers = [] if isinstance(model, torch.jit.ScriptModule) else norm_layers(model)
    of_norms = {id(parameter) for layer in layers for parameter in layer.module.parameters()}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise SurgeryError(f"param_groups: {name} is lazy and has no shape yet; run the model once first")
        if not parameter.requires_grad:
            continue
        apart = id(parameter) in of_norms or parameter.ndim <= 1 or name.rpartition(".")[2] == "bias"
        (kept if apart else decayed).append(parameter)
    groups = [
        {"name": "weights", "params": decayed, "weight_decay": weight_decay},
        {"name": "norms and biases", "params": kept, "weight_decay": norm_weight_decay},
    ]
    filled = [group for group in groups if group["params"]]
    if not filled:
        raise SurgeryError("param_groups: no parameter of the model requires a gradient")
    return filled
