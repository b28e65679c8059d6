"""How many samples each micro-batch holds, and what its mean counts for in the mean of all."""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..anatomy import iterate
from ..errors import ArgumentError

__all__ = ["micro_batches", "shares"]

Samples = Callable[[Any], int]


def micro_batches(batches: Any) -> list[Any]:
    """Return all micro-batches of a step.

    Raises:
        ArgumentError: there is none, or what came is one batch.
    """
    found = list(iterate(batches))
    if not found:
        raise ArgumentError("accumulate: there are no micro-batches. An iterator that was read once is empty")
    if len(found) > 1 and all(isinstance(part, Tensor) for part in found):
        kinds = {(part.dtype, part.dim()) for part in found}
        if len(kinds) > 1:
            shown = "; ".join(f"{tuple(part.shape)} of {part.dtype}" for part in found[:4])
            raise ArgumentError(
                f"accumulate: batches holds tensors of different kinds ({shown}), which are one batch and not several; "
                "give a list of micro-batches, as list(zip(x.split(32), y.split(32)))"
            )
    return found


def shares(parts: Sequence[Any], samples: Samples | None) -> list[float]:
    """Return what each micro-batch's mean counts for in the mean of all.

    Raises:
        ArgumentError: one holds no samples, or how many cannot be told.
    """
    if samples is not None and not callable(samples):
        raise ArgumentError(f"accumulate: samples={samples!r}; give a function, samples=lambda batch: len(batch[0])")
    if samples is None:
        _check_lists(parts)
    counts = [_count(batch, samples, place) for place, batch in enumerate(parts)]
    return [count / sum(counts) for count in counts]


def _check_lists(parts: Sequence[Any]) -> None:
    """Refuse lists of tensors that are longer in one micro-batch than in another: they hold one sample an entry.

    Such a sample's first dimension is no number of samples. Where all lists are of one length, so are the shares.

    Raises:
        ArgumentError: there is one.
    """
    before: dict[str, tuple[int, int]] = {}
    for place, batch in enumerate(parts):
        for path, length in _lists(batch, "batch"):
            first, known = before.setdefault(path, (place, length))
            if length != known:
                raise ArgumentError(
                    f"accumulate: {path} holds {known} in micro-batch {first} and {length} in micro-batch {place}, as "
                    "lists with an entry for each sample do, and the number of samples, over which loss takes its "
                    "mean, cannot be told; say it: samples=lambda batch: ..."
                )


def _lists(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """Yield where the sequences of a batch lie that hold tensors, and how long they are."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _lists(entry, f"{path}[{key!r}]")
    elif (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and any(True for entry in value for _ in _tensors(entry, "", objects=False))
    ):
        yield path, len(value)
        for place, entry in enumerate(value):
            yield from _lists(entry, f"{path}[{place}]")


def _count(batch: Any, samples: Samples | None, place: int) -> int:
    if samples is None:
        count = _length(batch, place)
    else:
        given = samples(batch)
        try:
            count = operator.index(given)
        except TypeError:
            raise ArgumentError(
                f"accumulate: samples gave {given!r} for micro-batch {place}; it must give a whole number"
            ) from None
        if count < 0:
            raise ArgumentError(f"accumulate: samples gave {count} for micro-batch {place}; it must not be negative")
    if count == 0:
        raise ArgumentError(f"accumulate: micro-batch {place} holds no samples; leave it out")
    return count


def _length(batch: Any, place: int) -> int:
    """Return the length that all tensors of a batch have in common; numbers, of no dimension, have none."""
    lengths: dict[int, str] = {}
    for path, tensor in _tensors(batch, "batch", objects=True):
        if tensor.dim():
            lengths.setdefault(tensor.shape[0], path)
    if not lengths:
        raise ArgumentError(
            f"accumulate: micro-batch {place} is a {type(batch).__name__}, in which no tensor was found to count "
            "samples by. Looked into are dicts, lists, tuples, dataclasses and other objects; for others, say how many "
            "samples it holds: samples=lambda batch: ..."
        )
    if len(lengths) > 1:
        shown = ", ".join(f"{path} has {length}" for length, path in list(lengths.items())[:4])
        raise ArgumentError(
            f"accumulate: the tensors of micro-batch {place} have different lengths ({shown}), and which of them is "
            "the number of samples, over which loss takes its mean, cannot be told; say it: samples=lambda batch: ..."
        )
    return next(iter(lengths))


def _tensors(value: Any, path: str, *, objects: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch and where they lie: in containers and dataclasses, and in one object around them."""
    inside: Iterator[tuple[str, Any]] = iter(())
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        inside = ((f"{path}[{key!r}]", entry) for key, entry in value.items())
    elif isinstance(value, Sequence):
        if not isinstance(value, str | bytes):
            inside = ((f"{path}[{place}]", entry) for place, entry in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        inside = ((f"{path}.{name}", getattr(value, name, None)) for name in names)
    elif objects and hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        inside = ((f"{path}.{name}", entry) for name, entry in vars(value).items())
        objects = False
    for where, entry in inside:
        yield from _tensors(entry, where, objects=objects)
