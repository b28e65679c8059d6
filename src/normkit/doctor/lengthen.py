"""Does more padding change what stands at the positions before it? Then padding counts as data."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, run
from ..anatomy.batches import tensors
from .probes import hooked_input, set_mode, trailing_runs, wake
from .subjects import Subject

__all__ = ["lengthen"]

# What models raise on a length that they were not made for.
_UNFIT = (RuntimeError, ValueError, TypeError, IndexError)


def lengthen(
    model: nn.Module, subjects: Sequence[Subject], batch: Any, call: Call | None, live: frozenset[str]
) -> dict[str, float] | str:
    """Run a batch as it is and with half as much padding again, as in training.

    Returns:
        By layer, the largest change of its output at positions that hold data, in standard deviations of the output;
        or why nothing is known. The model is changed; the caller puts it back.
    """
    found = _padded_dimension(batch)
    if found is None:
        return "padding: no tensor of the batch ends in padding of different lengths, so that it was not lengthened"
    length, row, extra = found
    set_mode(model, training=False)
    try:
        plain = _observe(model, subjects, batch, call, live)
        longer = _observe(model, subjects, _extended(batch, length, row, extra), call, live)
    except _UNFIT as error:
        reason = str(error).strip().partition("\n")[0]
        return f"padding: the model takes no longer batch, so that the finding is not confirmed by one ({reason[:120]})"
    return {name: _moved(plain[name], longer[name]) for name in plain.keys() & longer.keys()}


def _padded_dimension(batch: Any) -> tuple[int, int, int] | None:
    """Return the length of the sequences, the sample with the longest padding, and half the length of that."""
    for tensor in tensors(batch):
        if tensor.dim() != 3 or not tensor.is_floating_point():
            continue
        for given in (tensor, tensor.transpose(1, 2)):
            runs = trailing_runs(given)
            if bool((runs != runs[0]).any()):
                return given.shape[2], int(runs.argmax()), max(int(runs.max()) // 2, 1)
    return None


def _extended(value: Any, length: int, row: int, extra: int) -> Any:
    """Add to everything that has one entry for each position, masks too, what the padded sample has at its end."""
    if isinstance(value, Tensor):
        for dimension in (value.dim() - 1, 1) if value.dim() in (2, 3) else ():
            if value.shape[dimension] == length:
                last = value[row : row + 1].narrow(dimension, length - 1, 1)
                return torch.cat([value, *[last.expand(len(value), *last.shape[1:])] * extra], dimension)
        return value
    if isinstance(value, Mapping):
        return {key: _extended(entry, length, row, extra) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        parts = [_extended(entry, length, row, extra) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


Seen = dict[str, tuple[Tensor, Tensor]]


def _observe(
    model: nn.Module, subjects: Sequence[Subject], batch: Any, call: Call | None, live: frozenset[str]
) -> Seen:
    seen: Seen = {}
    with torch.no_grad(), _listening(subjects, seen, live):
        run(model, batch, call)
    return seen


@contextmanager
def _listening(subjects: Sequence[Subject], seen: Seen, live: frozenset[str]) -> Iterator[None]:
    """Keep the runs at the end of each live layer's first input, and its output."""
    handles = []
    for subject in (subject for subject in subjects if subject.name in live and subject.layer is not None):
        assert subject.layer is not None

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any], subject: Subject = subject) -> None:
            given = hooked_input(args, kwargs)
            if given is not None and given.dim() == 3:
                wake(module, subject, given, is_live=True)

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, name: str = subject.name) -> None:
            given = hooked_input(args, kwargs)
            if name not in seen and given is not None and given.dim() == 3 and isinstance(output, Tensor):
                seen[name] = (trailing_runs(given), output.double().clone())

        handles.append(subject.layer.module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(subject.layer.module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moved(plain: tuple[Tensor, Tensor], longer: tuple[Tensor, Tensor]) -> float:
    """Return the largest change where a sample holds data, in standard deviations of the output."""
    runs, output = plain
    length = min(output.shape[2], longer[1].shape[2])
    # A run of one cannot be told from data, so the last position never counts.
    valid = torch.arange(length, device=runs.device) < (output.shape[2] - runs.clamp_min(1))[:, None]  # (N, L)
    gap = (output[:, :, :length] - longer[1][:, :, :length]).abs() * valid[:, None]
    return float(gap.max() / output.std().clamp_min(1e-12))
