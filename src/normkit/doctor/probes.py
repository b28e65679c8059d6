"""One pass over the batches that measures what every layer is given. The caller keeps the model's state."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from ..anatomy import Call, iterate, run, sample_count, without_exchange
from ..anatomy.batches import is_finite, tensors
from ..errors import ArgumentError
from .measurements import BatchPlan, Measured, Padding, PooledMoments
from .subjects import Subject

__all__ = [
    "Domains",
    "Pass",
    "full_batches",
    "hooked_input",
    "measure",
    "set_mode",
    "trailing_runs",
    "unheard",
    "wake",
]

# Of one batch: a label for each sample, or one for all.
Domains = Callable[[Any], Any]


class Pass:
    """What one pass over the batches saw.

    Attributes:
        measured: by layer.
        samples: how many samples were run.
        example: the first batch, or None.
        plan: how many samples the batches hold, None without batches.
        empty: how many batches held no sample and were left out.
        spoiled: how many hold NaN or an infinity.
        batches: how many were run.
    """

    def __init__(self) -> None:
        self.measured: dict[str, Measured] = {}
        self.samples = 0
        self.example: Any = None
        self.plan: BatchPlan | None = None
        self.empty = self.spoiled = self.batches = 0


def measure(
    model: nn.Module,
    subjects: Sequence[Subject],
    batches: Any,
    call: Call | None,
    samples: int | None,
    live: frozenset[str],
    domains: Domains | None = None,
) -> Pass:
    """Run the model on the batches and pool the moments of every layer's input.

    Everything is in evaluation mode but the ``live`` layers: those normalize with the statistics of each batch, as
    they do in training, so that a layer with bad statistics does not spoil what the ones behind it are judged by.

    Args:
        model: its modes are changed; the caller puts them back.
        subjects: the layers to listen to.
        batches: as :func:`normkit.anatomy.iterate` takes them.
        call: how to call the model on a batch.
        samples: stop after so many; None runs all.
        live: names of the layers that normalize with batch statistics in training.
        domains: says from which population the samples of a batch are.
    """
    seen = Pass()
    dropouts = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.p > 0]
    sizes: list[int] = []
    exhausted = True
    set_mode(model, training=False)
    with torch.no_grad(), without_exchange(model):
        for batch in iterate(batches):
            if samples is not None and seen.samples >= samples:
                exhausted = False
                break
            if _is_empty(batch):
                seen.empty += 1
                continue
            seen.example = batch if seen.example is None else seen.example
            seen.batches += 1
            seen.spoiled += not is_finite(batch)
            count = sample_count(batch)
            labels = None if domains is None else _labels(domains(batch), count)
            with _listening(model, subjects, live, seen.measured, count, dropout=False, labels=labels):
                run(model, batch, call)
            if dropouts:
                with _listening(model, subjects, live, seen.measured, count, dropout=True), _in_training(dropouts):
                    run(model, batch, call)
            sizes.append(count or _first_size(seen.measured))
            seen.samples += sizes[-1]
    if not sizes:
        raise ArgumentError(
            "batches yielded nothing: give at least one batch, or leave batches away"
            if not seen.empty
            else f"none of the {seen.empty} batches holds a sample: give at least one that does, or leave batches away"
        )
    seen.plan = _plan(batches, sizes, exhausted)
    return seen


def full_batches(batches: Any) -> Iterator[Any]:
    """Yield the batches that hold a sample."""
    return (batch for batch in iterate(batches) if not _is_empty(batch))


def _is_empty(batch: Any) -> bool:
    """Say whether the first tensor of a batch has no rows; a batch without tensors may hold anything."""
    first = next(tensors(batch), None)
    return first is not None and first.dim() > 0 and first.shape[0] == 0


def unheard(
    model: nn.Module, subjects: Sequence[Subject], reached: Mapping[str, Measured], batch: Any, call: Call | None
) -> frozenset[str]:
    """Name the layers that no batch reached and on whose statistics nothing depends; the caller keeps the model.

    A layer may be read past its call. So the statistics of all that were not reached are made NaN, and what then still
    gives the same outputs does not use them.
    """
    missed = [
        subject for subject in subjects if subject.name not in reached and subject.layer is not None and subject.tracks
    ]
    if not missed:
        return frozenset()
    set_mode(model, training=False)
    with torch.no_grad():
        before = [tensor.clone() for tensor in tensors(run(model, batch, call))]
        for subject in missed:
            assert subject.layer is not None
            assert subject.layer.mean is not None
            subject.layer.mean.fill_(math.nan)
        after = list(tensors(run(model, batch, call)))
    same = bool(before) and all(torch.equal(first, second) for first, second in zip(before, after, strict=False))
    return frozenset(subject.name for subject in missed) if same and len(before) == len(after) else frozenset()


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Call the model's own ``train`` or ``eval``; an exported graph has its mode baked in and refuses both."""
    try:
        if training:
            model.train()
        else:
            model.eval()
    except NotImplementedError:
        return


def _first_size(measured: Mapping[str, Measured]) -> int:
    """Return the samples that the first layer got last, for batches of a form that tells nothing."""
    return next((entry.sizes[-1][0] for entry in measured.values() if entry.sizes), 0)


def hooked_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that a layer was called with."""
    values = (*args, *kwargs.values())
    return next((value for value in values if isinstance(value, Tensor)), None)


@contextmanager
def _listening(
    model: nn.Module,
    subjects: Sequence[Subject],
    live: frozenset[str],
    measured: dict[str, Measured],
    count: int,
    *,
    dropout: bool,
    labels: list[str] | None = None,
) -> Iterator[None]:
    """Hook every layer for one forward."""
    counts: dict[str, int] = {}
    handles = []
    for subject in subjects:
        assert subject.layer is not None
        module = subject.layer.module

        def listen(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], subject: Subject = subject
        ) -> None:
            given = hooked_input(args, kwargs)
            if given is None or given.dim() < 2:
                return
            wake(module, subject, given, is_live=subject.name in live)
            index = counts[subject.name] = counts.get(subject.name, -1) + 1
            entry = measured.setdefault(subject.name, Measured())
            if dropout:
                entry.with_dropout = PooledMoments() if entry.with_dropout is None else entry.with_dropout
                entry.with_dropout.add(_by_sample(_without_padding(subject, given, args, kwargs), count))
            else:
                masked = _without_padding(subject, given, args, kwargs)
                _record(entry, subject, given, masked, index, count)
                _record_domains(entry, subject, given, labels)

        handles.append(module.register_forward_pre_hook(listen, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def wake(module: nn.Module, subject: Subject, given: Tensor, *, is_live: bool) -> None:
    """Let a live layer normalize with the batch's statistics, where the batch has any, and keep its own unwritten."""
    if not is_live:
        return
    values = given.numel() // max(given.shape[1], 1)
    if values < 2:  # torch refuses; the check of the effective batch size speaks of it
        module.training = False
        return
    module.training = True
    if subject.kind in {"batch", "sync"} and not (subject.layer and subject.layer.overridden):
        vars(module)["track_running_stats"] = False


def _without_padding(subject: Subject, given: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a masked layer takes as data, ``(M, C)``; of any other layer its input."""
    mask = args[1] if args[1:] else kwargs.get("mask")
    return given.movedim(1, -1)[mask] if subject.kind in {"masked", "sync"} and isinstance(mask, Tensor) else given


def _by_sample(data: Tensor, count: int) -> Tensor:
    """Put the rows that one sample became, its patches or frames, back together: they are alike."""
    rows = len(data)
    if not count or rows == count or rows % count:
        return data
    together: Tensor = data.unflatten(0, (count, -1)).movedim(1, -1).flatten(2)
    return together


def _record(entry: Measured, subject: Subject, given: Tensor, data: Tensor, index: int, count: int) -> None:
    values = given.numel() // max(given.shape[1], 1)
    entry.sizes.append((len(_by_sample(given, count)), values))
    entry.dtypes.add(given.dtype)
    if not subject.is_batch or not given.is_floating_point():
        return
    while len(entry.calls) <= index:
        entry.calls.append(PooledMoments(entry.calls[0] if entry.calls else None))
    entry.calls[index].add(_by_sample(data, count))
    if given.dim() == 3 and data is given:
        _record_padding(entry, given)


def _labels(given: Any, count: int) -> list[str]:
    """Return a label for each sample of a batch.

    Raises:
        ArgumentError: the number of labels is neither 1 nor that of the samples.
    """
    values = given.tolist() if isinstance(given, Tensor) else given
    labels = [str(value) for value in values] if isinstance(values, list | tuple) else [str(values)] * count
    if len(labels) != count:
        raise ArgumentError(
            f"domains gave {len(labels)} labels for a batch of {count} samples; give one for each, or one for all"
        )
    return labels


def _record_domains(entry: Measured, subject: Subject, given: Tensor, labels: list[str] | None) -> None:
    if labels is None or not subject.is_batch or len(labels) != len(given) or not given.is_floating_point():
        return
    first = next(iter(entry.domains.values()), None)
    for label in dict.fromkeys(labels):
        rows = torch.tensor([other == label for other in labels], device=given.device)
        entry.domains.setdefault(label, PooledMoments(first)).add(given[rows])
        first = first or entry.domains[label]


def _record_padding(entry: Measured, given: Tensor) -> None:
    entry.padding = Padding() if entry.padding is None else entry.padding
    lengths = trailing_runs(given)  # (N,)
    positions = given.shape[2]
    entry.padding.shares.append(float(lengths.double().mean()) / positions)
    entry.padding.ragged |= bool((lengths != lengths[0]).any())
    for sample, length in zip(given, lengths.tolist(), strict=True):
        if positions - length > 0:
            entry.padding.valid.add(sample[None, :, : positions - length])


def trailing_runs(given: Tensor) -> Tensor:
    """Return per sample how many positions at the end repeat the last vector; a run of one is none."""
    same = (given == given[:, :, -1:]).all(1).flip(1)  # (N, L), from the end
    lengths = same.long().cumprod(1).sum(1)
    return torch.where(lengths > 1, lengths, torch.zeros_like(lengths))


@contextmanager
def _in_training(modules: Sequence[nn.Module]) -> Iterator[None]:
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def _plan(batches: Any, sizes: Sequence[int], exhausted: bool) -> BatchPlan | None:
    """Say how many samples a regular and the last batch hold."""
    if not sizes:
        return None
    regular, last = max(sizes), sizes[-1] if exhausted else max(sizes)
    shuffles = isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler)
    if isinstance(batches, DataLoader) and batches.batch_size and not isinstance(batches.dataset, IterableDataset):
        remainder = len(batches.sampler) % batches.batch_size  # type: ignore[arg-type]  # a sampler of a sized dataset
        last = remainder if remainder and not batches.drop_last else batches.batch_size
    return BatchPlan(regular=regular, last=last, for_training=shuffles)
