"""Under which names the layer under examination keeps what the contract speaks of."""

from torch import Tensor, nn

from ..anatomy import NormForm, norm_layers
from ..anatomy.forms import candidates

__all__ = ["form_of", "held", "tail_of", "without_tail"]

_WORDS = {
    "weight": "weight",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
    "num_batches_tracked": "counter",
}


def form_of(module: nn.Module) -> NormForm:
    """Return how a layer is read: as the data confirm it, else by the names of its state, else by torch's names.

    What is examined may be wrong in any way: the names alone are enough to say how.
    """
    found = next((layer.form for layer in norm_layers(module) if layer.path == ""), None)
    return found or next(candidates(module), None) or NormForm()


def held(module: nn.Module, name: str) -> Tensor | None:
    """Return a layer's tensor by torch's name for it, one value for each channel flattened; None where it has none.

    >>> import torch
    >>> layer = nn.Module()
    >>> layer.register_buffer("moving_mean", torch.zeros(1, 3, 1, 1))
    >>> layer.register_buffer("moving_var", torch.ones(1, 3, 1, 1))
    >>> held(layer, "running_var")
    tensor([1., 1., 1.])
    """
    if name in _WORDS:
        name = getattr(form_of(module), _WORDS[name])
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return None
    return value.flatten() if value.ndim > 1 and value.numel() == max(value.shape) else value


def without_tail(module: nn.Module) -> nn.Module:
    """Take off a layer what it calls after it normalized, where the data confirm that: the contract is of the rest."""
    for name in form_of(module).tail if tail_of(module) else ():
        value = getattr(module, name, None)
        setattr(module, name, "identity" if isinstance(value, str) else nn.Identity())
    return module


def tail_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return what a layer calls after it normalized, where the data confirm that."""
    return next((layer.tail for layer in norm_layers(module) if layer.path == ""), ())
