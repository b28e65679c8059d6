"""What a layer holds besides what its form names: parameters, buffers and numbers that may change what it computes."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .forms import NormForm

__all__ = ["rest_of", "varied"]

Name = tuple[str, str]  # the path of the module inside the layer, "" for the layer itself, and the attribute


def rest_of(module: nn.Module, form: NormForm) -> tuple[list[Name], list[Name]]:
    """Return all floating point values that a form does not name, and those of them that are parameters or buffers.

    What the tail holds is not among them: it is called as it is.

    >>> norm = nn.BatchNorm2d(3)
    >>> norm.gain, norm.scale = 1.0, nn.Parameter(torch.ones(3))
    >>> rest_of(norm, NormForm())
    ([('', 'scale'), ('', 'gain')], [('', 'scale')])
    """
    of_tail = {id(part) for name in form.tail for part in _modules(getattr(module, name, None))}
    named = {id(form.tensor(module, what)) for what in ("weight", "bias", "mean", "var", "counter")}
    settings = {form.eps, form.momentum, "activation_param"}
    rest: list[Name] = []
    held: list[Name] = []
    for path, inner in module.named_modules():
        if id(inner) in of_tail:
            continue
        for name, tensor in (*inner._parameters.items(), *inner._buffers.items()):
            if tensor is not None and tensor.is_floating_point() and id(tensor) not in named:
                held.append((path, name))
                rest.append((path, name))
        for name, value in vars(inner).items():
            is_number = type(value) is float and not name.startswith("_") and (path or name not in settings)
            if is_number or (isinstance(value, Tensor) and value.is_floating_point() and id(value) not in named):
                rest.append((path, name))
    return rest, held


def varied(work: nn.Module, names: list[Name]) -> None:
    """Give values of a copy others, which no usual value is; what is positive stays so, and a probability one."""
    generator = torch.Generator(device="cpu").manual_seed(2)
    for path, name in names:
        inner = work.get_submodule(path)
        value = getattr(inner, name)
        if isinstance(value, float):
            other = 0.75 * value + 0.11
            setattr(inner, name, other if abs(other - value) > 0.05 else 0.5 * value + 0.03)
            continue
        random = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value)
        with torch.no_grad():
            value.copy_(value + 0.3 + 0.5 * random)


def _modules(value: object) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield from value.modules()
