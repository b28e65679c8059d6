"""Does more padding change what stands at the positions before it? Then padding counts as data."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, run
from ..anatomy.batches import tensors
from .measurements import Lengthened
from .probes import hooked_input, set_mode, trailing_runs, wake
from .subjects import Subject

__all__ = ["lengthen"]

# What a layer raises on a length that it was not made for.
_UNFIT = (RuntimeError, ValueError, TypeError, IndexError)


def lengthen(
    model: nn.Module, subjects: Sequence[Subject], batch: Any, call: Call | None, live: frozenset[str]
) -> dict[str, Lengthened]:
    """Give every layer its own input as it is, and with half as much padding again.

    Each layer is tried by itself on what the model gave it, so that one that lets padding in spoils no judgement of
    those behind it, and a model that takes one length only is judged too. A mask that the layer is given is lengthened
    with it. A layer that is made for one length is given other padding in place of more.

    Args:
        model: is changed; the caller puts it back.
        subjects: the layers.
        batch: one batch.
        call: how the model is called on it.
        live: the layers that normalize with the batch's statistics in training, and are tried so.

    Returns:
        By layer that was given padded sequences, how far its output moves where there are data.
    """
    set_mode(model, training=False)
    given: dict[str, _Given] = {}
    with torch.no_grad(), _listening(subjects, given, live):
        run(model, batch, call)
    found = {}
    runs = next(filter(None, map(_padding_of, tensors(batch))), None)
    with torch.no_grad():
        for subject in subjects:
            if subject.name in given:
                moved = _try(subject, given[subject.name], runs, is_live=subject.name in live)
                if moved is not None:
                    found[subject.name] = moved
    return found


class _Given:
    """What one layer was called with first."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = _copied(args), _copied(kwargs)
        value = hooked_input(self.args, self.kwargs)
        assert value is not None
        self.input: Tensor = value


# Positions of a batch of sequences, and how many at the end of each sample are padding.
_Runs = tuple[int, Tensor]


def _padding_of(tensor: Tensor) -> _Runs | None:
    """Return the runs of equal positions at the end of a batch of sequences, where they differ in length."""
    if tensor.dim() == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        views = [tensor[:, None]]  # numbers of words
    elif tensor.dim() == 3 and tensor.is_floating_point():
        views = [tensor, tensor.transpose(1, 2)]
    else:
        return None
    for view in views:
        runs = trailing_runs(view)
        if bool((runs != runs[0]).any()):
            return view.shape[2], runs
    return None


def _try(subject: Subject, given: _Given, runs: _Runs | None, *, is_live: bool) -> Lengthened | None:
    """Call one layer on what it was given and on that with more padding."""
    assert subject.layer is not None
    dimension, lengths = _positions(given.input, runs)
    if lengths is None:
        return None
    module, positions = subject.layer.module, given.input.shape[dimension]
    row, extra = int(lengths.argmax()), max(int(lengths.max()) // 2, 1)
    wake(module, subject, given.input, is_live=is_live)
    try:
        plain = module(*_copied(given.args), **_copied(given.kwargs))
        longer = _extended((given.args, given.kwargs), positions, row, extra)
        try:
            changed = module(*longer[0], **longer[1])
        except _UNFIT:
            # Made for one length: other padding instead of more.
            other = given.input.movedim(dimension, 2).clone()
            other[_is_padding(lengths, positions)[:, None].expand_as(other)] += 1.0 + float(other.abs().max())
            changed = module(other.movedim(2, dimension), *given.args[1:], **given.kwargs)
    except _UNFIT:
        return None
    if not isinstance(plain, Tensor) or not isinstance(changed, Tensor) or plain.dim() != 3:
        return None
    plain, changed = plain.movedim(dimension, 2).double(), changed.movedim(dimension, 2).double()
    if plain.shape[2] != positions:
        return None
    holds_data = ~_is_padding(lengths.clamp_min(1), positions)  # a run of one cannot be told from data
    gap = (plain - changed[:, :, :positions]).abs() * holds_data[:, None]
    share = float(lengths.double().mean()) / positions
    return Lengthened(moved=float(gap.max() / plain.std().clamp_min(1e-12)), share=share)


def _positions(given: Tensor, runs: _Runs | None) -> tuple[int, Tensor | None]:
    """Return the dimension of positions and the padded ones at the end of each sample; none where there are none."""
    for dimension in (2, 1):
        if runs is not None and given.shape[dimension] == runs[0] and len(given) == len(runs[1]):
            return dimension, runs[1]
    own = _padding_of(given)
    if own is None:
        return 2, None
    return (2 if own[0] == given.shape[2] else 1), own[1]


def _is_padding(lengths: Tensor, positions: int) -> Tensor:
    """Return ``(N, L)``, True where a position belongs to the run at the end."""
    return torch.arange(positions, device=lengths.device) >= (positions - lengths)[:, None]


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


def _copied(value: Any) -> Any:
    """Copy tensors, because what comes next may work in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return tuple(_copied(entry) for entry in value) if type(value) is tuple else value


@contextmanager
def _listening(subjects: Sequence[Subject], seen: dict[str, _Given], live: frozenset[str]) -> Iterator[None]:
    """Keep what each layer is called with first, where it is a batch of sequences."""
    handles = []
    for subject in subjects:
        assert subject.layer is not None

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any], subject: Subject = subject) -> None:
            given = hooked_input(args, kwargs)
            if given is None or given.dim() < 2 or not given.is_floating_point():
                return
            wake(module, subject, given, is_live=subject.name in live)
            if given.dim() == 3 and subject.name not in seen:
                seen[subject.name] = _Given(args, kwargs)

        handles.append(subject.layer.module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
