"""What the stored statistics cost, and which finding costs it: accuracy with some layers on the batch's statistics."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, preserved, run, sample_count
from ..anatomy.batches import tensors
from ..errors import ArgumentError
from .examination import Examination
from .findings import Finding, Gap
from .probes import full_batches, hooked_input, set_mode, wake
from .subjects import Subject
from .thresholds import FALSE_ALARMS

__all__ = ["Labels", "attribute", "check_labels"]

# Of one batch: the class of each sample.
Labels = Callable[[Any], Any]

_MOST = 12  # findings that are judged, two passes over the data each


def check_labels(labels: Labels | None, batches: Any) -> None:
    """Refuse labels without batches that can be run over several times.

    Raises:
        ArgumentError: there are none, or they can be read only once.
    """
    if labels is None:
        return
    if batches is None:
        raise ArgumentError("labels= is asked with each batch: give batches too")
    if isinstance(batches, Iterator):
        raise ArgumentError("labels= runs over the batches several times, and these can be read once: give a list")


def attribute(
    examination: Examination,
    findings: Sequence[Finding],
    batches: Any,
    call: Call | None,
    samples: int | None,
    labels: Labels,
) -> tuple[list[Finding], Gap, float]:
    """Measure the gap between evaluation and training, and how much of it each finding explains.

    Faults in a row cover or double each other, so that what one costs hangs on the others. A finding explains the mean
    of two gains: of letting its layers normalize with the batch's statistics first, all else as it is, and of letting
    them do so last, when those of all other findings do already. Of two findings this is their Shapley value, and the
    shares add up. Of a layer left in training mode it is what evaluation gains when that layer evaluates.

    Returns:
        The findings with their shares, the gap, and what of it is beyond chance and goes with none of them, else 0.
    """
    model = examination.model
    assert model is not None
    able = {s.name: s for s in examination.subjects if s.is_batch and s.eps > 0 and s.name in examination.awake}
    known: dict[tuple[frozenset[str], bool], float] = {}
    judged = 0

    def accuracy(live: frozenset[str], *, as_it_is: bool) -> float:
        nonlocal judged
        if (live, as_it_is) not in known:
            chosen = [able[name] for name in live]
            known[live, as_it_is], judged = _accuracy(model, chosen, batches, call, samples, labels, as_it_is)
        return known[live, as_it_is]

    evaluation = accuracy(frozenset(), as_it_is=not model.training)
    training = accuracy(frozenset(able), as_it_is=False)
    gap = Gap(evaluation=evaluation, training=training, samples=judged)
    # The same samples are judged twice, so that this error is too large if anything.
    error = (training * (1 - training) / max(judged, 1) + evaluation * (1 - evaluation) / max(judged, 1)) ** 0.5
    chance = max(NormalDist().inv_cdf(1 - FALSE_ALARMS) * error, 1e-12)
    if training - evaluation <= chance:
        return list(findings), gap, 0.0
    severe = [f for f in findings if f.severity != "info" and not frozenset(able).isdisjoint(f.layers)][:_MOST]
    layers = {id(f): frozenset(able).intersection(f.layers) for f in severe if f.check != "mode"}
    everyone = frozenset().union(*layers.values())
    attributed = []
    for finding in findings:
        gain = None
        if id(finding) in layers:
            others = frozenset().union(*(part for key, part in layers.items() if key != id(finding)))
            first = accuracy(layers[id(finding)], as_it_is=False) - accuracy(frozenset(), as_it_is=False)
            last = accuracy(everyone, as_it_is=False) - accuracy(others, as_it_is=False)
            gain = (first + last) / 2
        elif any(finding is other for other in severe):
            gain = accuracy(frozenset(), as_it_is=False) - evaluation
        attributed.append(finding if gain is None else replace(finding, explains=gain / (training - evaluation)))
    explained = sum(finding.explains or 0.0 for finding in attributed) * (training - evaluation)
    rest = training - evaluation - explained
    return attributed, gap, rest if rest > chance else 0.0


def _accuracy(
    model: nn.Module,
    live: Sequence[Subject],
    batches: Any,
    call: Call | None,
    samples: int | None,
    labels: Labels,
    as_it_is: bool,
) -> tuple[float, int]:
    """Return the share of samples that are classified rightly, and how many were judged."""
    right = judged = seen = 0
    with preserved(model), torch.no_grad(), _awake(live):
        if not as_it_is:
            set_mode(model, training=False)
        for batch in full_batches(batches):
            if samples is not None and seen >= samples:
                break
            wanted = _classes(labels(batch))
            scores = _scores(run(model, batch, call), wanted)
            # What is to be ignored is marked by a number that is no class, -100 or 255.
            meant = ((wanted >= 0) & (wanted < scores.shape[1])).cpu()
            right += int((scores.argmax(1).cpu() == wanted.cpu())[meant].sum())
            judged += int(meant.sum())
            seen += sample_count(batch) or len(wanted)
    if seen and not judged:
        raise ArgumentError(
            f"labels= gave no class that the model has a score for: it has {scores.shape[1]}, so that classes are 0 to "
            f"{scores.shape[1] - 1}, and the last batch has {int(wanted.min())} to {int(wanted.max())}"
        )
    return right / max(judged, 1), judged


def _classes(given: Any) -> Tensor:
    """Return the labels of a batch as a tensor.

    Raises:
        ArgumentError: they are no numbers.
    """
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        first = next(iter(given), None) if isinstance(given, Iterable) else given
        raise ArgumentError(
            f"labels= gave a {type(given).__name__}"
            + (f" of {type(first).__name__}" if first is not given else "")
            + f", such as {first!r}; needed is the class of each sample as a whole number: number the classes, in the "
            "order of the model's scores"
        ) from None


def _scores(output: Any, wanted: Tensor) -> Tensor:
    """Find the tensor of scores in what a model returns.

    Raises:
        ArgumentError: none has a score for each class of each sample.
    """
    if not wanted.is_floating_point():
        for value in tensors(output):
            if value.dim() == wanted.dim() + 1 and value.shape[:1] + value.shape[2:] == wanted.shape:
                return value
    raise ArgumentError(
        f"labels= gave {tuple(wanted.shape)} of {str(wanted.dtype).removeprefix('torch.')}; needed is the class of "
        "each sample as a whole number, and an output (N, classes, ...) of the model"
    )


@contextmanager
def _awake(live: Sequence[Subject]) -> Iterator[None]:
    """Let layers normalize with the batch's statistics."""
    handles = []
    for subject in live:
        assert subject.layer is not None

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any], subject: Subject = subject) -> None:
            given = hooked_input(args, kwargs)
            if given is not None and given.dim() >= 2:
                wake(module, subject, given, is_live=True)

        handles.append(subject.layer.module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
