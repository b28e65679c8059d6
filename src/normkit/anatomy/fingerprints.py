"""A readable digest of a model's whole state, to prove that nothing changed."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .places import places_of

__all__ = ["fingerprint", "same_bits"]


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Describe everything that a call could change, by name: comparing two shows what differs.

    Covered are classes, attributes, hooks, the values, identities, types, ``requires_grad`` and gradients of parameters
    and buffers, and the random states. Identities make it comparable within one process only.

    >>> norm = nn.BatchNorm1d(2)
    >>> before = fingerprint(norm)
    >>> _ = norm.eval()
    >>> {name for name, value in fingerprint(norm).items() if value != before[name]}
    {'.training'}
    """
    digest: dict[str, str] = {}
    for path, module in places_of(model):
        digest[f"{path}:class"] = f"{type(module).__qualname__} at {id(module)}"
        for name, value in vars(module).items():
            for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
                inner = f".{key}" if isinstance(value, dict) else ""
                digest[f"{path}.{name}{inner}"] = _digest(entry)
    return digest | _random_digests()


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Compare two tensors bit for bit, NaN included."""
    if first.is_meta or second.is_meta:
        return first.is_meta and second.is_meta
    if first.shape != second.shape or first.dtype != second.dtype or first.layout != second.layout:
        return False
    if first.layout is not torch.strided or first.is_quantized:
        return False
    return torch.equal(_as_bytes(first), _as_bytes(second))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _digest(value: Any) -> str:
    if is_lazy(value):
        return f"uninitialized at {id(value)}"
    if isinstance(value, Tensor):
        grad = value.grad if value.is_leaf else None
        hooks = sorted(value._backward_hooks) if value._backward_hooks else []
        return f"{_tensor_digest(value)} at {id(value)} grad {grad if grad is None else _tensor_digest(grad)} {hooks}"
    if isinstance(value, bool | int | float | str | None | tuple | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, list | set):
        return repr([_digest(entry) for entry in value])
    return f"{type(value).__name__} at {id(value)}"


def _tensor_digest(tensor: Tensor) -> str:
    form = f"{tensor.dtype} {tuple(tensor.shape)} {tuple(tensor.stride())} {tensor.device} {tensor.requires_grad}"
    if tensor.is_meta:
        return form
    return f"{form} {hashlib.sha256(_as_bytes(tensor.cpu()).numpy().tobytes()).hexdigest()[:16]}"


def _random_digests() -> dict[str, str]:
    states: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": repr(random.getstate()).encode(),
        "numpy": repr(np.random.get_state(legacy=False)).encode(),  # noqa: NPY002
    }
    if torch.cuda.is_initialized():
        states["cuda"] = b"".join(state.numpy().tobytes() for state in torch.cuda.get_rng_state_all())
    return {f"random:{name}": hashlib.sha256(state).hexdigest()[:16] for name, state in states.items()}
