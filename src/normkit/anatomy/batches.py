"""Batches of any form, and the call of the model that each of them means."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import ArgumentError

__all__ = ["Call", "arguments", "is_finite", "iterate", "left_out", "run", "sample_count", "tensors"]

Call = Callable[[nn.Module, Any], Any]


def iterate(batches: Any) -> Iterator[Any]:
    """Yield the batches: a tensor or a dict is one batch, anything else that can be iterated holds batches.

    Raises:
        ArgumentError: what came cannot be iterated.

    >>> [tuple(batch.shape) for batch in iterate(torch.zeros(8, 3))]
    [(8, 3)]
    >>> len(list(iterate([torch.zeros(8, 3), torch.zeros(2, 3)])))
    2
    """
    if isinstance(batches, Tensor | Mapping):
        return iter([batches])
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise ArgumentError(
            f"batches is {_describe(batches)}, a data set, which yields single samples; give "
            "DataLoader(dataset, batch_size=32), or with batch_size=None where its items are batches"
        )
    if isinstance(batches, str | bytes) or (not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__")):
        raise ArgumentError(
            f"batches is {_describe(batches)}; give a tensor, a dict, a DataLoader, or anything that yields batches"
        )
    return iter(batches)


def run(model: nn.Module, batch: Any, call: Call | None = None) -> Any:
    """Call the model on one batch and return what it returns.

    Without ``call`` the model gets what its forward has room for: a tensor goes in as it is; of a tuple or list the
    first element (the first k, where forward requires k arguments), looked into again where it is nested; of a dict
    the entries that forward has names for. Tensors are moved to the device of the model's first parameter.

    Args:
        model: the module.
        batch: one batch, of any form.
        call: ``lambda model, batch: ...``, where the default does not fit.

    Raises:
        ArgumentError: the batch has a form that the default cannot turn into a call; the message shows the form.

    >>> run(nn.ReLU(), (torch.tensor([-1.0, 2.0]), torch.tensor([0, 1])))
    tensor([0., 2.])
    >>> run(nn.ReLU(), {"input": torch.tensor([-3.0]), "target": torch.tensor([1])})
    tensor([0.])
    """
    if call is not None:
        return call(model, batch)
    args, kwargs = arguments(model, batch)
    return model(*args, **kwargs)


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what :func:`run` calls the model with, by position and by name, on the device of the model.

    Raises:
        ArgumentError: the batch has a form that cannot be turned into a call.

    >>> arguments(nn.ReLU(), {"input": torch.zeros(1), "target": 3})
    ((), {'input': tensor([0.])})
    """
    args, kwargs = _arguments(model, batch)
    device = _device(model)
    return tuple(_moved(value, device) for value in args), {key: _moved(kwargs[key], device) for key in kwargs}


def left_out(model: nn.Module, batch: Any, call: Any) -> tuple[str, ...]:
    """Say that entries of a batch did not go into the model where its forward has places for them, or say nothing.

    >>> class Masked(nn.Module):
    ...     def forward(self, x, mask=None): ...
    >>> left_out(Masked(), (torch.zeros(1), torch.zeros(1)), None)[0][:57]
    "1 of the example's 2 entries went into the model, as of a"
    >>> left_out(nn.ReLU(), (torch.zeros(1), torch.zeros(1)), None)
    ()
    """
    if call is not None or isinstance(batch, Tensor | Mapping | str) or not isinstance(batch, Sequence):
        return ()
    taken = len(_arguments(model, batch)[0])
    if taken >= min(len(_positional(model)), len(batch)):
        return ()
    return (
        f"{taken} of the example's {len(batch)} entries went into the model, as of a batch with labels behind; where "
        "more belong to its arguments pass call=lambda model, batch: model(*batch)",
    )


def sample_count(batch: Any) -> int:
    """Return how many samples a batch holds: the length of the first tensor found in it, 0 where there is none.

    >>> sample_count({"image": torch.zeros(8, 3), "name": ["a"] * 8})
    8
    """
    first = next(tensors(batch), None)
    return 0 if first is None else first.shape[0] if first.ndim else 1


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn one batch into the arguments of a call."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), _named(model, batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and len(batch):
        if all(isinstance(entry, int) for entry in batch):
            sizes = ", ".join(map(str, batch[:6]))
            raise ArgumentError(f"a batch is ({sizes}), numbers as of a shape; pass a tensor: torch.randn({sizes})")
        required = _required(model)
        if len(required) > 1 and len(batch) >= len(required) and isinstance(batch[0], Tensor):
            return tuple(batch[: len(required)]), {}
        return _arguments(model, batch[0])
    raise ArgumentError(_unfit(model, batch))


def _named(model: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Any]:
    """Take the entries of a dict that forward has names for."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    by_name = {
        key for key, value in parameters.items() if value.kind in (value.POSITIONAL_OR_KEYWORD, value.KEYWORD_ONLY)
    }
    named = {key: value for key, value in batch.items() if isinstance(key, str) and (takes_all or key in by_name)}
    if not named or not set(_required(model)) <= named.keys():
        raise ArgumentError(_unfit(model, batch))
    return named


def _required(model: nn.Module) -> list[str]:
    """Name the arguments that forward cannot do without."""
    return [item.name for item in _positional(model) if item.default is item.empty]


def _positional(model: nn.Module) -> list[inspect.Parameter]:
    """Return the arguments that forward takes by their place."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [item for item in inspect.signature(model.forward).parameters.values() if item.kind in kinds]


def _unfit(model: nn.Module, batch: Any) -> str:
    if isinstance(batch, DataLoader | Dataset):
        return f"{_describe(batch)} holds batches or samples, and one batch is needed; {_one_batch(batch)}"
    signature = inspect.signature(model.forward)
    return (
        f"a batch is {_describe(batch)}, and {type(model).__name__}.forward takes {signature}; "
        "say how to call the model, for example call=lambda model, batch: model(batch['image'])"
    )


def _one_batch(source: Any) -> str:
    if isinstance(source, DataLoader):
        return "pass next(iter(loader))"
    return "pass next(iter(DataLoader(dataset, batch_size=32)))"


def _describe(value: Any) -> str:
    """Show the form of a batch: types, keys and shapes, never the data."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(repr(key) for key in list(value)[:10]) or '(none)'}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        inside = ", ".join(type(entry).__name__ for entry in list(value)[:5])
        return f"a {type(value).__name__} of length {len(value)}" + (f" ({inside})" if inside else "")
    return f"a {type(value).__name__}"


def _device(model: nn.Module) -> torch.device | None:
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def _moved(value: Any, device: torch.device | None) -> Any:
    """Move a tensor, and the tensors one container down, to a device."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(_moved(entry, device) for entry in value)
    if type(value) is dict:
        return {key: _moved(entry, device) for key, entry in value.items()}
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, in order, however deep they lie."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors(entry)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for entry in value:
            yield from tensors(entry)


def is_finite(value: Any) -> bool:
    """Say whether no tensor of a batch, however deep it lies, holds NaN or an infinity."""
    numbers = (tensor for tensor in tensors(value) if tensor.is_floating_point() or tensor.is_complex())
    return all(bool(torch.isfinite(tensor).all()) for tensor in numbers)
