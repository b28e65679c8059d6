"""``diagnose``: measure, ask every check, set waived findings aside. The model is bit for bit as before."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.optim import Optimizer

from ..anatomy import Call, preserved
from ..anatomy.programs import refuse_programs, unwrapped
from ..errors import ArgumentError
from .attribution import Labels, attribute, check_labels
from .checks import CHECK_NAMES, CHECKS
from .checks.graph import pair_up
from .checks.populations import drift_of, judged_drift, off_together, percentile
from .checks.state import is_absorbed
from .company import keep_company, overflowing
from .examination import Check, Examination
from .findings import Diagnosis, Finding, LayerRow, sort_findings, worst
from .join import join_findings
from .lengthen import lengthen
from .measurements import Measured
from .probes import Domains, measure, set_mode, unheard
from .ranks import RankState, gather_ranks
from .rectified import rectified_by_structure, rectified_in_use
from .sampling import check_samples
from .structure import in_order, learning_before, listed, out_of_sight, resting, weighted_before
from .subjects import Subject, lazy_layers, subjects_of_model, subjects_of_state
from .waivers import parse_waivers, set_aside

__all__ = ["diagnose"]

Waivers = Mapping[str, str]


def diagnose(
    model: nn.Module | Mapping[str, Any],
    batches: Any = None,
    *,
    optimizer: Optimizer | None = None,
    call: Call | None = None,
    waive: Waivers | None = None,
    samples: int | None = 2048,
    domains: Domains | None = None,
    group: Any = None,
    labels: Labels | None = None,
) -> Diagnosis:
    """Find what is wrong with the normalization layers of a model.

    With a model alone the checks of its state, modes and structure run; batches add what only data can tell, an
    optimizer what it holds. The model is not changed: buffers, modes, gradients, hooks and random states are bit for
    bit as before, also when an exception is raised on the way.

    Args:
        model: a module, or a ``state_dict``, of which only the state is examined.
        batches: training data in training batches: a tensor, or anything that yields batches.
        optimizer: what trains the model.
        call: ``lambda model, batch: ...``, where the model is not called with the first part of a batch.
        waive: findings that are known and meant, ``{"check:layer pattern": "the reason"}``.
        samples: measure on so many samples; None takes all batches.
        domains: ``lambda batch: ...``, which names the population of each sample of a batch (source and target, clean
            and perturbed, ...), or of all of them: one layer that serves several is then found.
        group: a process group of ``torch.distributed``, to compare its ranks; then every rank must call this.
        labels: ``lambda batch: ...``, which returns the class of each sample, for a model whose output has a score for
            each class: then the accuracy in evaluation and with the batch's statistics is measured, and how much of
            the gap between them goes with each finding.

    Returns:
        The findings, worst first, and a table of the layers.

    Raises:
        ArgumentError: an argument is of no use; whatever the model raises on the batches comes through unchanged.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
        >>> [(finding.check, finding.layer) for finding in diagnose(model).findings]
        [('never-updated', '1'), ('optimizer', '')]
        >>> diagnose(model, waive={"never-updated:*": "not trained yet"}).healthy
        True
    """
    waivers = parse_waivers(waive, CHECK_NAMES)
    _check_model(model)
    check_labels(labels, batches)
    check_samples(samples)
    if optimizer is not None and not isinstance(getattr(optimizer, "param_groups", None), list):
        raise ArgumentError(f"optimizer= is {optimizer!r}; give the torch.optim.Optimizer that trains the model")
    if isinstance(model, nn.Module):
        model, _ = unwrapped(model)
        examination, notes, seen = _examine(model, batches, call, samples, domains)
        examination = replace(examination, optimizer=optimizer, ranks=_ranks(examination, batches, group))
    else:
        if batches is not None or optimizer is not None:
            raise ArgumentError("a state_dict alone cannot be run: give the model where you give batches or optimizer")
        examination, notes, seen = Examination(subjects=subjects_of_state(model)), [], 0
        if not examination.subjects:
            notes.append(_without_statistics(model))
    found = [finding for check in CHECKS if _runs(check, examination) for finding in check.examine(examination)]
    kept, waived = set_aside(found, waivers)
    names = [subject.name for subject in examination.subjects]
    classes = {s.name: type(s.layer.module).__name__ for s in examination.subjects if s.layer is not None}
    arguments = ", call=call" if call is not None else ""
    findings = join_findings(kept, names, classes, arguments)
    gap = None
    if labels is not None and examination.model is not None:
        findings, gap, rest = attribute(examination, findings, batches, call, samples, labels)
        examination = replace(examination, gap=gap, unexplained=rest)
        asked = [check for check in CHECKS if check.needs == "labels"]
        more, aside = set_aside([finding for check in asked for finding in check.examine(examination)], waivers)
        findings, waived = [*findings, *join_findings(more, names, classes, arguments)], waived + aside
    return Diagnosis(
        findings=sort_findings(findings, CHECK_NAMES),
        layers=tuple(_row(subject, examination, kept) for subject in in_order(examination)),
        gap=gap,
        waived=waived,
        notes=tuple(notes),
        samples=seen,
    )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module | Mapping):
        refuse_programs(model)


def _without_statistics(state: Mapping[str, Any]) -> str:
    """Say that a state holds no statistics, and which of its entries does."""
    inside = [name for name, entry in state.items() if isinstance(entry, Mapping) and subjects_of_state(entry)]
    more = f"; its entry {inside[0]!r} holds some: give that" if inside else ""
    return f"the state holds no running statistics{more}"


def _without_layers(model: nn.Module) -> str:
    """Say why no layer was found: there is none, or the model is a program in which layers are operators."""
    try:
        refuse_programs(model)
    except ArgumentError as error:
        return str(error)
    return "the model has no normalization layer"


def _examine(
    model: nn.Module, batches: Any, call: Call | None, samples: int | None, domains: Domains | None
) -> tuple[Examination, list[str], int]:
    """Measure everything that the checks may look at, and put the model back."""
    subjects = subjects_of_model(model)
    with preserved(model):
        awake = _training_after(model, subjects, mode=True)
        asleep = _training_after(model, subjects, mode=False)
        pairs = pair_up(model, subjects)
    examination = Examination(
        subjects=subjects,
        model=model,
        awake=awake,
        asleep=asleep,
        resting=resting(model, subjects),
        learning_before=learning_before(model, subjects),
        weighted_before=weighted_before(model, subjects),
        rectified=rectified_by_structure(model, subjects),
        pairs=pairs,
    )
    lazy = lazy_layers(model)
    hidden = [] if isinstance(model, fx.GraphModule) else out_of_sight(model)
    notes = _unread(subjects) if subjects else [] if lazy or hidden else [_without_layers(model)]
    notes += hidden
    if lazy:
        notes.append(f"lazy and without channels yet: {listed(lazy)}; run the model once first")
    if batches is None:
        return examination, [*notes, "batches were not given: checks of the data did not run"], 0
    live = _live(model, subjects, awake)
    with preserved(model):
        seen = measure(model, subjects, batches, call, samples, live, domains)
    with preserved(model):
        company = keep_company(model, subjects, seen.example, call)
    with preserved(model):
        examination = replace(examination, overflowed=overflowing(model, subjects, seen.example, call))
    with preserved(model):
        watched = rectified_in_use(model, subjects, seen.example, call)
        examination = replace(examination, rectified=examination.rectified | watched)
    with preserved(model):
        silent = unheard(model, subjects, seen.measured, seen.example, call)
        examination = replace(examination, unheard=silent)
    notes += _notes(subjects, seen.measured, silent)
    if seen.empty:
        notes.append(f"{seen.empty} batch{'es' * (seen.empty > 1)} without a sample")
    spoiled = (seen.spoiled, seen.batches)
    examination = replace(examination, measured=seen.measured, plan=seen.plan, spoiled=spoiled)
    drifts = [
        drift_of(examination, subject, seen.measured[subject.name])
        for subject in subjects
        if subject.name in seen.measured
    ]
    alarmed = any(drift is not None and drift.severity is not None for drift in drifts)
    if (alarmed or off_together(examination)[1]) and not isinstance(batches, Iterator):
        with preserved(model):
            in_use = measure(model, subjects, batches, call, samples, frozenset())
        examination = replace(examination, in_use=in_use.measured)
    with preserved(model):
        examination = replace(examination, lengthened=lengthen(model, subjects, seen.example, call, live))
    if isinstance(company, str):
        notes.append(company)
    else:
        examination = replace(examination, company=company)
    return examination, notes, seen.samples


def _unread(subjects: tuple[Subject, ...]) -> list[str]:
    """Say which layers cannot be read, and why: of some nothing was examined, of others the state that torch names."""
    reasons: dict[tuple[str, bool], list[str]] = {}
    for subject in subjects:
        if subject.layer is not None and subject.layer.unread:
            reasons.setdefault((subject.layer.unread, subject.kind == "unknown"), []).append(
                subject.name or "the model"
            )
    return [
        f"{listed(names)}: {reason}" + ("" if nothing else "; its state and its input were examined by themselves")
        for (reason, nothing), names in reasons.items()
    ]


def _ranks(examination: Examination, batches: Any, group: Any) -> tuple[RankState, ...]:
    if group is None:
        return ()
    calls = {name: len(entry.calls) for name, entry in examination.measured.items()}
    return gather_ranks(examination.subjects, batches, calls, group)


def _training_after(model: nn.Module, subjects: tuple[Subject, ...], *, mode: bool) -> frozenset[str]:
    """Name the layers that are told to train after ``model.train(mode)``, the model's own version of it."""
    set_mode(model, training=mode)
    return frozenset(s.name for s in subjects if s.layer is not None and s.layer.module.training and not s.is_fixed)


def _live(model: nn.Module, subjects: tuple[Subject, ...], awake: frozenset[str]) -> frozenset[str]:
    """Name the layers that take batch statistics in training.

    One that evaluates inside a model that trains is held still on purpose. Synchronized layers of several processes
    stay in evaluation, because their forward waits for the other processes.
    """
    return frozenset(
        subject.name
        for subject in subjects
        if subject.name in awake
        and subject.is_batch
        and (subject.training or not model.training)
        and subject.eps > 0  # torch does not train without
        and not (subject.kind == "sync" and _is_distributed())
    )


def _is_distributed() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _notes(subjects: tuple[Subject, ...], measured: Mapping[str, Measured], silent: frozenset[str]) -> list[str]:
    missed = [subject.name for subject in subjects if subject.name not in measured]
    notes = [f"not reached by the batches: {listed(missed)}"] if missed else []
    if any(subject.tracks and subject.name in missed and subject.name not in silent for subject in subjects):
        notes[0] += (
            "; outputs depend on their statistics all the same: they are used past their call (layer.forward, "
            "functional.batch_norm), where their input cannot be measured"
        )
    spoiled = [name for name, entry in measured.items() if any(part.nonfinite_batches for part in entry.calls)]
    return notes + ([f"inputs with NaN or infinities were left out at {listed(spoiled)}"] if spoiled else [])


def _runs(check: Check, examination: Examination) -> bool:
    needs_met = {
        "state": True,
        "model": examination.model is not None,
        "batches": bool(examination.measured) or examination.company is not None,
        "ranks": bool(examination.ranks),
        "labels": False,  # asked last, when it is known what the findings explain
    }
    return needs_met[check.needs]


def _row(subject: Subject, examination: Examination, findings: list[Finding]) -> LayerRow:
    numbers: dict[str, float | int | str | bool | None] = {
        "updates": subject.updates,
        "momentum": subject.momentum if isinstance(subject.momentum, float | int) else None,
        "training": subject.training,
    }
    measured = examination.measured.get(subject.name)
    absorbed = is_absorbed(subject, measured)
    drift = judged_drift(examination, subject) if not absorbed else None
    if measured is not None and measured.sizes:
        numbers["values"] = max(measured.sizes)[1]
    if drift is not None:
        numbers["z"] = percentile(drift.z)
        numbers["log2_ratio"] = percentile(drift.log_ratio.abs())
    if examination.pairs is not None and subject.name in examination.pairs:
        neighbour, reason, _ = examination.pairs[subject.name]
        numbers["folds"] = f"into {neighbour}" if reason is None else "no"
    if absorbed:
        numbers["statistics"] = "in weight and bias"
    severity = worst(finding for finding in findings if finding.layer == subject.name)
    channels = subject.running_mean.numel() if subject.running_mean is not None else None
    if channels is None and subject.layer is not None:
        channels = subject.layer.channels
    return LayerRow(
        name=subject.name,
        kind=subject.kind,
        channels=channels,
        numbers=numbers,
        layer_class="" if subject.layer is None else type(subject.layer.module).__name__,
        worst=severity,
        examined=subject.kind != "unknown" or severity is not None,
        measured=measured is not None,
    )
