"""One sample alone and among others, in evaluation mode: does its output hang on the company it keeps?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, run, sample_count
from ..anatomy.batches import is_finite, tensors
from .measurements import Company
from .probes import hooked_input, set_mode
from .subjects import Subject

__all__ = ["keep_company", "overflowing"]

_INPUT_AGREES = 1e-3  # beside an output that differs by far more


def keep_company(model: nn.Module, subjects: Sequence[Subject], batch: Any, call: Call | None) -> Company | str:
    """Run the first sample with copies of itself, of the first half and of the second half of a batch.

    Returns:
        The largest difference of its outputs, or why there is none to tell.
    """
    count = sample_count(batch)
    if count < 3:
        return f"batch-dependence: a batch of at least 3 samples is needed, the first one has {count}"
    set_mode(model, training=False)
    # All of the batch's own size: an exported graph takes no other, and kernels differ with it in the last bits.
    half = (count + 1) // 2
    first, second = cycle(range(1, half)), cycle(range(half, count))
    companies = [[0] * count, [0, *islice(first, count - 1)], [0, *islice(second, count - 1)]]
    results = [_observe(model, subjects, _take(batch, rows, count), call, len(rows)) for rows in companies]
    again = _observe(model, subjects, _take(batch, companies[1], count), call, len(companies[1]))
    if not results[0].outputs:
        return "batch-dependence: the outputs hold no tensor with one row per sample"
    if not all(output.isfinite().all() for output in results[1].outputs):
        return "batch-dependence: the outputs are not finite, so the company cannot be judged"
    if not _all_equal(again.outputs, results[1].outputs):
        return "batch-dependence: the same batch gives another output each time, so the company cannot be judged"
    difference = max(_difference(results[0].outputs, other.outputs) for other in results[1:])
    layers: dict[str, float] = {}
    culprit: str | None = None
    for name, (given, made) in results[0].layers.items():
        others = [other.layers[name] for other in results[1:] if name in other.layers]
        inward = max((_relative(given, other[0]) for other in others), default=0.0)
        layers[name] = max((_relative(made, other[1]) for other in others), default=0.0)
        if culprit is None and inward < _INPUT_AGREES and layers[name] > max(_INPUT_AGREES, 10 * inward):
            culprit = name
    output = results[0].outputs[0]
    low = output.device.type != "cpu" or output.dtype in (torch.float16, torch.bfloat16)
    return Company(difference=difference, layer=culprit, layer_differences=layers, low_precision=low)


def overflowing(model: nn.Module, subjects: Sequence[Subject], batch: Any, call: Call | None) -> str | None:
    """Say whether a finite batch has an output that is not, in evaluation mode. The caller keeps the model.

    Returns:
        The first layer that is given finite numbers and gives others, ``""`` where that is none of them, and None where
        the output is finite.
    """
    if not is_finite(batch):
        return None
    culprits: list[str] = []

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if is_finite((args, kwargs)) and not is_finite(output):
            culprits.append(name)

    set_mode(model, training=False)
    with torch.no_grad(), _listening(subjects, note):
        output = run(model, batch, call)
    return None if is_finite(output) else next(iter(culprits), "")


class _Observed:
    """The first row of every output, and of every layer's input and output in its first call."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.layers: dict[str, tuple[Tensor, Tensor]] = {}


def _observe(model: nn.Module, subjects: Sequence[Subject], batch: Any, call: Call | None, rows: int) -> _Observed:
    seen = _Observed()

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = hooked_input(args, kwargs)
        if name not in seen.layers and given is not None and isinstance(output, Tensor):
            # Clones, because an activation that works in place comes next.
            seen.layers[name] = (given[0].double().clone(), output[0].double().clone())

    with torch.no_grad(), _listening(subjects, note):
        output = run(model, batch, call)
    seen.outputs = [value[0].double() for value in tensors(output) if value.dim() and value.shape[0] == rows]
    return seen


@contextmanager
def _listening(subjects: Sequence[Subject], note: Callable[..., None]) -> Iterator[None]:
    """Call ``note(name, args, kwargs, output)`` at every forward of a layer, inside."""
    with ExitStack() as hooks:
        for subject in subjects:
            assert subject.layer is not None

            def listen(module: nn.Module, *heard: Any, name: str = subject.name) -> None:
                note(name, *heard)

            hooks.callback(subject.layer.module.register_forward_hook(listen, with_kwargs=True).remove)
        yield


def _take(value: Any, rows: list[int], count: int) -> Any:
    """Pick samples out of a batch of any form; what has no row per sample stays."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {key: _take(entry, rows, count) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        parts = [_take(entry, rows, count) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _relative(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return 0.0
    scale = float(first.norm())
    gap = float((first - second).norm())
    return gap / scale if scale > 0 else gap


def _difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max((_relative(a, b) for a, b in zip(first, second, strict=False)), default=0.0)


def _all_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    # Threads may add up in another order, so equal means equal up to rounding.
    return _difference(first, second) < 1e-6
