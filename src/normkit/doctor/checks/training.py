"""Checks of how the model is trained: what is frozen, and what the optimizer holds."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from ..examination import Check, Examination
from ..findings import Finding, Severity
from ..measurements import Measured
from ..subjects import Subject
from ..thaws import thawed_finding
from ..thresholds import DROPOUT_LOG_RATIO
from .populations import dropout_shift
from .state import freezing, is_never_updated, running_and_true

__all__ = ["TRAINING_CHECKS"]

_GIVEN = ", optimizer=optimizer"  # what a proof says where an optimizer was given


def freeze_leak(examination: Examination) -> Iterator[Finding]:
    """Find layers whose affine part is held still while their statistics move, and frozen ones that were written to."""
    learning = examination.model is not None and any(p.requires_grad for p in examination.model.parameters())
    held = _optimized(examination.optimizer) if examination.optimizer is not None else set()
    for subject in examination.subjects:
        if subject.thawed:
            yield thawed_finding(subject.name, subject.thawed)
        if subject.layer is None or not subject.tracks or not subject.is_batch:
            continue
        if (
            subject.held_still
            and subject.momentum != 0
            and (subject.moves or (learning and _wakes(examination, subject)))
        ):
            yield _leak_finding(subject, "warning" if subject.moves else "info", examination.measured.get(subject.name))
        elif not subject.moves and is_never_updated(subject) and any(id(p) in held for p in subject.affine):
            yield _reverse_finding(subject)


def _wakes(examination: Examination, subject: Subject) -> bool:
    return subject.name in examination.awake


def _leak_finding(subject: Subject, severity: Severity, measured: Measured | None) -> Finding:
    return Finding(
        check="freeze-leak",
        layer=subject.name,
        severity=severity,
        summary="the affine part is frozen, "
        + ("and every forward still moves the statistics" if subject.moves else "and train() will move the statistics"),
        evidence={"training": subject.training, "updates": subject.updates},
        causes=(
            "requires_grad_(False) reaches parameters only; the statistics follow train() and eval()",
            "eval() was called once, and train() of the whole model undid it",
            "a teacher or target network left in training mode",
        ),
        remedy=freezing(subject),
        proof='not normkit.diagnose(model.train()).of("freeze-leak", {layer})',
        channels=running_and_true(subject, measured),
    )


def _reverse_finding(subject: Subject) -> Finding:
    return Finding(
        check="freeze-leak",
        layer=subject.name,
        severity="error",
        summary="the affine part is trained while the statistics stand still at construction",
        evidence={"training": subject.training, "updates": subject.updates},
        causes=("the layer was put in evaluation mode before it had seen data or weights",),
        remedy=subject.recalibration,
        proof='not normkit.diagnose(model, optimizer=optimizer).of("freeze-leak", {layer})',
    )


def optimizer(examination: Examination) -> Iterator[Finding]:
    """Find parameters that the optimizer misses or should not hold, and structure that spoils statistics."""
    if examination.model is None:
        return
    if examination.optimizer is not None:
        yield from _membership(examination.model, examination.optimizer)
        yield from _decay(examination.subjects, examination.optimizer)
    for finding in (*_dropout(examination), *_stuck(examination), *_redundant_bias(examination)):
        # A proof names what was given.
        proof = finding.proof if examination.optimizer is not None else finding.proof.replace(_GIVEN, "")
        yield replace(finding, proof=proof)


def _optimized(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _membership(model: nn.Module, optimizer: Optimizer) -> Iterator[Finding]:
    """A swap of layers leaves the old parameters in the optimizer and the new ones out of it."""
    held = _optimized(optimizer)
    owned = {id(parameter) for parameter in model.parameters()}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    strangers = len(held - owned)
    if not missing and not strangers:
        return
    yield _finding(
        layer=missing[0].rpartition(".")[0] if missing else "",
        severity="error",
        summary=f"{len(missing)} parameters that require a gradient are in no group, and {strangers} of the "
        "optimizer's are not in the model",
        evidence={"missing": missing[:16], "missing_count": len(missing), "strangers": strangers},
        causes=(
            "layers were swapped after the optimizer was made",
            "the optimizer was made for another copy of the model",
            "parameters left out on purpose: call requires_grad_(False) on them",
        ),
        remedy="optimizer = type(optimizer)(model.parameters(), **optimizer.defaults)",
    )


def _decay(subjects: tuple[Subject, ...], optimizer: Optimizer) -> Iterator[Finding]:
    decayed = {
        id(parameter)
        for group in optimizer.param_groups
        if group.get("weight_decay", 0)
        for parameter in group["params"]
    }
    names = [subject.name for subject in subjects if any(id(p) in decayed for p in subject.affine)]
    if names:
        yield _finding(
            layer="",
            severity="info",
            summary=f"weight decay pulls at the affine parts of {len(names)} normalization layers",
            evidence={"layers": names[:16]},
            causes=("model.parameters() was given to the optimizer as one group",),
            remedy="groups = normkit.param_groups(model, optimizer.defaults['weight_decay']); "
            "optimizer = type(optimizer)(groups, **optimizer.defaults)",
        )


def _dropout(examination: Examination) -> Iterator[Finding]:
    """Dropout before a layer is sized by what it does to the variance there, not by its rate."""
    assert examination.model is not None
    if not any(isinstance(module, _DropoutNd) and module.p > 0 for module in examination.model.modules()):
        return
    for subject in examination.subjects:
        measured = examination.measured.get(subject.name)
        shift = dropout_shift(examination, subject) if measured is not None and subject.is_batch else None
        if measured is None or shift is None or shift <= DROPOUT_LOG_RATIO / 5:
            continue
        carried = shift > DROPOUT_LOG_RATIO and _holds_dropout(subject, measured)
        yield _finding(
            layer=subject.name,
            # Statistics measured with dropout off are those that evaluation meets, and then nothing is wrong.
            severity="warning" if carried else "info",
            summary=f"dropout before the layer makes its variance {2**shift:.2g} times as large in training",
            evidence={"log2_ratio": shift},
            causes=("dropout stands before batch normalization: its noise is learnt as variance",),
            remedy=f"{subject.recalibration}  # or move dropout behind the last batch normalization",
        )


def _holds_dropout(subject: Subject, measured: Measured) -> bool:
    """Say whether the running variance is nearer to the one with dropout on than to the one with it off."""
    if subject.running_var is None or measured.with_dropout is None:
        return False
    running, on, off = (
        torch.log2(variance.double().clamp_min(0.0) + subject.eps)
        for variance in (subject.running_var, measured.with_dropout.var, measured.pooled.var)
    )
    return bool((running - on).abs().sum() < (running - off).abs().sum())


def _stuck(examination: Examination) -> Iterator[Finding]:
    for name in sorted(examination.asleep):
        subject = examination.subject(name)
        if subject.tracks and subject.moves and subject.is_batch:
            yield _finding(
                layer=name,
                severity="warning",
                summary="the layer is still training after model.eval()",
                evidence={"training": subject.training},
                causes=("train() or eval() is overridden", "the layer sits in a container that does not pass modes on"),
                remedy=freezing(subject),
            )


def _redundant_bias(examination: Examination) -> Iterator[Finding]:
    """A bias right before batch normalization is subtracted again with the mean."""
    assert examination.model is not None
    names = [
        before
        for container in examination.model.modules()
        if isinstance(container, nn.Sequential)
        for before, after in _neighbours(examination.model, container)
        if any(
            subject.layer is not None and subject.layer.module is after and subject.is_batch
            for subject in examination.subjects
        )
    ]
    if names:
        yield _finding(
            layer="",
            severity="info",
            summary=f"the bias of {len(names)} layer{'s' if len(names) > 1 else ''} is subtracted again by the batch "
            "normalization behind",
            evidence={"layers": names[:16]},
            causes=("bias=True is the default of convolutions and linear layers",),
            remedy="nn.Conv2d(..., bias=False)",
        )


def _neighbours(model: nn.Module, container: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    names = {id(module): name for name, module in model.named_modules()}
    children = list(container)
    for first, second in itertools.pairwise(children):
        if isinstance(first, (_ConvNd, nn.Linear)) and first.bias is not None:
            yield names[id(first)], second


def _finding(
    *, layer: str, severity: Severity, summary: str, evidence: dict[str, object], causes: tuple[str, ...], remedy: str
) -> Finding:
    return Finding(
        check="optimizer",
        layer=layer,
        severity=severity,
        summary=summary,
        evidence=evidence,
        causes=causes,
        remedy=remedy,
        proof=f'not normkit.diagnose(model, batches{_GIVEN}).of("optimizer")',
    )


TRAINING_CHECKS: tuple[Check, ...] = (
    Check(
        name="freeze-leak",
        question="Does what is frozen stand still?",
        needs="model",
        examine=freeze_leak,
        innocent=("a teacher that adapts its statistics on purpose", "adapting statistics alone to a new domain"),
    ),
    Check(
        name="optimizer",
        question="Does the optimizer hold what learns, and does nothing before a layer spoil its statistics?",
        needs="model",
        examine=optimizer,
        innocent=("several optimizers, of which one was given", "dropout kept before a layer on purpose"),
    ),
)
