"""Checks of the moving average: how far it looks back, how often it was updated, in what precision it is kept."""

import math
from collections import Counter
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch

from ..examination import Check, Examination
from ..findings import Finding, Severity
from ..measurements import Measured
from ..subjects import Subject
from ..thresholds import (
    CONDITION_LIMIT,
    CONSTANT_LIMIT,
    HALF_LARGEST,
    MOMENTUM_LARGE,
    RESIDUE_ERROR,
    RESIDUE_WARNING,
)
from .populations import compare, drift_of, keeps_its_start, start_left
from .state import is_never_updated

__all__ = ["AVERAGING_CHECKS"]

_LOW = (torch.float16, torch.bfloat16)


def ema_window(examination: Examination) -> Iterator[Finding]:
    """Find a momentum that is no momentum, is of another framework, or has not yet forgotten the initial values."""
    untold = _untold_counters(examination)
    for subject in examination.subjects:
        if not subject.tracks or not subject.is_batch or subject.layer is None:
            continue
        if subject.is_switched_off and subject.training:
            yield _switched_off(subject)
        if subject.momentum is None:
            continue
        momentum = subject.momentum
        if not _is_number(momentum) or not 0 < momentum <= 1:
            yield from _impossible_momentum(subject, momentum)
            continue
        if momentum >= MOMENTUM_LARGE:
            yield _foreign_momentum(subject, float(momentum))
        if (subject.momentum, subject.updates) not in untold:
            yield from _residue(examination, subject, float(momentum), examination.measured.get(subject.name))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _impossible_momentum(subject: Subject, momentum: Any) -> Iterator[Finding]:
    # Momentum 0 is a way to hold statistics still; it is a fault where there is nothing worth holding, and where
    # training normalizes by other numbers than the ones that are held.
    if _is_number(momentum) and momentum == 0 and not is_never_updated(subject):
        if subject.moves:
            yield _held_by_momentum(subject)
        return
    yield _window_finding(
        subject,
        "error",
        f"momentum is {momentum!r}; it must be above 0 and at most 1, or None for the plain average",
        {"momentum": momentum if _is_number(momentum) else repr(momentum)},
        ("a typing error in the settings", "a string from a settings file that nobody converted"),
        f"{_set_momentum(subject, 0.1)}; {subject.recalibration}",
    )


def _held_by_momentum(subject: Subject) -> Finding:
    return _window_finding(
        subject,
        "warning",
        "momentum 0 holds the statistics still, and training normalizes with those of each batch all the same: what is "
        "trained is not what evaluation computes",
        {"momentum": 0, "training": subject.training, "updates": subject.updates},
        (
            "momentum 0 was meant to freeze the layer: it stops the average, not the use of the batch",
            "a schedule of momenta ended at 0",
        ),
        "normkit.freeze(model, where={layer})",
    )


def _switched_off(subject: Subject) -> Finding:
    return _window_finding(
        subject,
        "warning",
        "track_running_stats was switched off on a layer that has statistics: training normalizes with each batch's "
        "and no longer moves them, evaluation uses them all the same",
        {"track_running_stats": False, "training": subject.training, "updates": subject.updates},
        (
            "it was meant to make evaluation use the batch: for that the layer must be built without statistics",
            "it was meant to freeze the layer: it stops the average, not the use of the batch",
        ),
        f"{subject.accessor}.track_running_stats = True; {subject.recalibration}",
    )


def _foreign_momentum(subject: Subject, momentum: float) -> Finding:
    return _window_finding(
        subject,
        "warning",
        f"momentum {momentum:g} weighs the new batch: the statistics remember {1 / momentum:.2g} batches",
        {"momentum": momentum, "batches_remembered": 1 / momentum},
        (
            "the number comes from Keras, Flax or ONNX, whose momentum weighs the old value",
            "chosen so on purpose, to follow fast changes",
        ),
        # The statistics of so few batches are no better for the number that is right.
        f"{_set_momentum(subject, 1 - momentum if momentum < 1 else 0.1)}; {subject.recalibration}",
    )


def _set_momentum(subject: Subject, momentum: float) -> str:
    """Return the line that gives a layer this weight of the new batch, in the layer's own convention."""
    form = subject.names
    name = form.momentum if isinstance(form.momentum, str) else "momentum"
    return f"{subject.accessor}.{name} = {momentum if form.weighs_new else 1 - momentum:.6g}"


def _residue(
    examination: Examination, subject: Subject, momentum: float, measured: Measured | None
) -> Iterator[Finding]:
    """Find the share of the initial values that the average still holds."""
    if subject.updates is None or subject.updates == 0 or subject.running_var is None:
        return
    residue = start_left(subject)
    # A layer that still trains will forget more; it counts once the layer is relied on.
    if residue <= RESIDUE_WARNING or subject.moves or is_never_updated(subject):
        return
    kept = keeps_its_start(examination, subject, measured)
    if kept is False:
        return
    told = f"{residue:.0%} of the statistics is still the initial 0 and 1"
    yield _window_finding(
        subject,
        "info" if kept is None else "error" if residue > RESIDUE_ERROR else "warning",
        f"after {subject.updates} updates {told}"
        + (
            ""
            if kept
            else ", if they are a moving average; measured ones have such a counter too: give batches to tell"
        ),
        {"momentum": momentum, "updates": subject.updates, "residue": residue},
        (
            f"too few training steps for momentum {momentum:g}: 1 % is left after {_updates_needed(momentum)} of them",
            "momentum was lowered to steady the statistics, and the training not lengthened",
        ),
        subject.recalibration,
    )


def _untold_counters(examination: Examination) -> set[tuple[float, int]]:
    """Return momentum and counter of layers whose statistics are right where an average would still show its start.

    Statistics that were measured have a small counter. What is known so of one layer holds for all that were updated
    with it.
    """
    found = set()
    for subject in examination.subjects:
        measured = examination.measured.get(subject.name)
        if not subject.updates or not _is_number(subject.momentum) or subject.running_var is None:
            continue
        residue = start_left(subject)
        if bool((subject.running_var < 0.999 * residue).any()):
            found.add((subject.momentum, subject.updates))  # no average from 1 is so small
        if measured is None or not measured.pooled:
            continue
        actual, pooled = drift_of(examination, subject, measured), measured.pooled
        mean, var = (1 - residue) * pooled.mean, residue + (1 - residue) * pooled.var
        averaged = compare(mean, var, pooled, subject.eps, layers=examination.layers_judged)
        if actual is not None and actual.severity is None and averaged.severity is not None:
            found.add((subject.momentum, subject.updates))
    return found


def _updates_needed(momentum: float) -> int:
    count, residue = 0, 1.0
    while residue > RESIDUE_WARNING:
        residue *= 1 - momentum
        count += 1
    return count


def _window_finding(
    subject: Subject,
    severity: Severity,
    summary: str,
    evidence: dict[str, Any],
    causes: tuple[str, ...],
    remedy: str,
) -> Finding:
    return Finding(
        check="ema-window",
        layer=subject.name,
        severity=severity,
        summary=summary,
        evidence=evidence,
        causes=causes,
        remedy=remedy,
        proof='not normkit.diagnose(model, batches).of("ema-window", {layer})',
    )


def update_count(examination: Examination) -> Iterator[Finding]:
    """Find layers whose counter differs from the others'; the watch counts per step and knows more.

    Only a whole multiple of the usual count is a warning: fine-tuning with frozen parts leaves counters that differ in
    other ways, and nothing is wrong with them.
    """
    counted = [s for s in examination.subjects if s.tracks and s.is_batch and s.updates]
    usual = Counter(subject.updates for subject in counted).most_common(1)
    if not usual or usual[0][1] <= len(counted) / 2:
        return
    mode = usual[0][0]
    assert mode is not None
    for subject in counted:
        assert subject.updates is not None
        if subject.updates == mode:
            continue
        multiple = subject.updates % mode == 0
        yield Finding(
            check="update-count",
            layer=subject.name,
            severity="warning" if multiple else "info",
            summary=f"updated {subject.updates} times, most layers {mode} times"
            + (f": {subject.updates // mode} updates for every one of theirs" if multiple else ""),
            evidence={"updates": subject.updates, "usual": mode, "ratio": subject.updates / mode},
            causes=(
                "activation checkpointing runs the forward again in the backward, and both update the statistics",
                "the module stands in several places of the model, or is called several times in a forward",
                "extra forwards of a part of the model in training mode",
            )
            if multiple
            else ("parts were frozen or added on the way", "a branch that is not taken in every forward"),
            # Measured statistics owe nothing to the number of updates.
            remedy=f"{subject.accessor}.{subject.names.counter}.fill_({mode}); {subject.recalibration}"
            "  # and in training put `with normkit.hold_statistics(model):` around every forward that is not a step",
            proof='not normkit.diagnose(model).of("update-count", {layer})',
        )


def precision(examination: Examination) -> Iterator[Finding]:
    """Find statistics kept in too few bits, and inputs whose mean drowns their variance."""
    for subject in examination.subjects:
        yield from _storage(subject)
        measured = examination.measured.get(subject.name)
        if measured is not None and measured.pooled and subject.is_batch:
            yield from _conditioning(subject, measured)


def _storage(subject: Subject) -> Iterator[Finding]:
    mean, variance = subject.running_mean, subject.running_var
    if mean is None or variance is None or not subject.tracks:
        return
    kept = {str(tensor.dtype).removeprefix("torch.") for tensor in (mean, variance) if tensor.dtype in _LOW}
    largest = float(variance.double().nan_to_num(0.0, posinf=0.0, neginf=0.0).max()) if variance.numel() else 0.0
    half_weights = any(parameter.dtype == torch.float16 for parameter in subject.affine)
    if kept:
        learning = subject.moves
        yield _precision_finding(
            subject,
            "error" if learning else "warning",
            f"the running statistics are kept in {' and '.join(sorted(kept))}"
            + (
                ": an update below half a unit in the last place is lost, so the average stands still"
                if learning
                else ""
            ),
            {"dtype": " and ".join(sorted(kept)), "training": subject.training, "largest_variance": largest},
            ("model.half() or model.bfloat16() casts buffers too", "a file of weights saved from such a model"),
            "normkit.repair(model)",
        )
    elif largest > HALF_LARGEST:
        yield _precision_finding(
            subject,
            "error" if half_weights else "info",
            f"a running variance of {largest:.4g} does not fit into float16, whose largest number is 65504",
            {"largest_variance": largest},
            ("inputs that were never scaled",),
            "normkit.repair(model)  # keep statistics in float32 when casting",
        )


def _conditioning(subject: Subject, measured: Measured) -> Iterator[Finding]:
    mean, variance = measured.pooled.mean.abs(), measured.pooled.var
    constant = variance <= (1e-9 * mean) ** 2
    ratio = torch.where(constant, torch.zeros_like(mean), mean / (variance + subject.eps).sqrt())
    worst, frozen = float(ratio.max()), float(torch.where(constant, mean, torch.zeros_like(mean)).max())
    if not math.isfinite(subject.eps) or (worst <= CONDITION_LIMIT / 3 and frozen <= CONSTANT_LIMIT):
        return
    is_error = worst > CONDITION_LIMIT or frozen > CONSTANT_LIMIT
    yield _precision_finding(
        subject,
        "error" if is_error else "warning",
        f"the mean of an input channel is {worst:.3g} times its standard deviation: a variance computed in one pass "
        f"in float32 is {'all' if is_error else 'partly'} rounding",
        {"mean_over_std": worst, "limit": CONDITION_LIMIT, "largest_constant": frozen},
        ("raw inputs with a large offset: time stamps, coordinates, temperatures in kelvin", "a bias that ran away"),
        "offset = next(iter(batches)).mean(0); batches = [batch - offset for batch in batches]; "
        "normkit.recalibrate(model, batches)  # and the same shift in training",
        channels={"mean_over_std": tuple(ratio.tolist())},
    )


def _precision_finding(
    subject: Subject,
    severity: Severity,
    summary: str,
    evidence: dict[str, Any],
    causes: tuple[str, ...],
    remedy: str,
    channels: dict[str, tuple[float, ...]] | None = None,
) -> Finding:
    return Finding(
        check="precision",
        layer=subject.name,
        severity=severity,
        summary=summary,
        evidence=evidence,
        causes=causes,
        remedy=remedy,
        proof='not normkit.diagnose(model, batches).of("precision", {layer})',
        channels=channels or {},
    )


AVERAGING_CHECKS: tuple[Check, ...] = (
    Check(
        name="ema-window",
        question="Does the moving average remember enough, and has it forgotten where it began?",
        needs="model",
        examine=ema_window,
        innocent=("a large momentum chosen to follow fast changes", "statistics loaded with a counter of their own"),
    ),
    Check(
        name="update-count",
        question="Is every layer updated once per step?",
        needs="state",
        examine=update_count,
        innocent=("gradient accumulation", "a discriminator that sees real and generated batches in turn"),
    ),
    Check(
        name="precision",
        question="Are the statistics kept and computed in enough bits?",
        needs="state",
        examine=precision,
        innocent=("a model cast to half for inference whose statistics fit",),
    ),
)
