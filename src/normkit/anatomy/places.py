"""Every place of a model's modules, also those that torch is not shown."""

from collections.abc import Iterator

from torch import nn

__all__ = ["places_of"]


def places_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of every place, in the order of ``named_modules(remove_duplicate=False)``.

    The part of a fused layer is among them, which that leaves out: its tensors are the layer's.

    >>> shared = nn.ReLU()
    >>> [path for path, _ in places_of(nn.Sequential(shared, nn.Sequential(shared)))]
    ['', '0', '1', '1.0']
    """
    yield prefix, model
    for name, module in model._modules.items():
        if module is not None:
            yield from places_of(module, f"{prefix}.{name}" if prefix else name)
