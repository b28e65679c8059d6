"""Check of a distributed training: do all processes hold the same statistics, and take the same steps?"""

from collections.abc import Iterator

import torch

from ..examination import Check, Examination
from ..findings import Finding, Severity
from ..ranks import RankState
from ..subjects import Subject
from ..thresholds import RANK_ERROR, RANK_WARNING

__all__ = ["RANK_CHECKS", "rank_agreement"]

_REMEDY = "for buffer in model.buffers(): torch.distributed.broadcast(buffer, src=0)"


def rank_agreement(examination: Examination) -> Iterator[Finding]:
    """Compare statistics, counters, numbers of batches and of calls over all processes."""
    ranks = examination.ranks
    synchronized = any(subject.kind == "sync" for subject in examination.subjects)
    lengths = [state.batches for state in ranks]
    if len(set(lengths)) > 1:
        yield _plan_finding(
            "error" if synchronized else "warning", "the ranks have different numbers of batches", lengths
        )
    calls = [dict(state.calls) for state in ranks]
    if any(other != calls[0] for other in calls[1:]):
        yield _plan_finding(
            "error" if synchronized else "warning", "the ranks call the layers differently often", calls
        )
    for subject in examination.subjects:
        if subject.tracks and all(subject.name in state.statistics for state in ranks):
            yield from _compare(subject, ranks)


def _compare(subject: Subject, ranks: tuple[RankState, ...]) -> Iterator[Finding]:
    means = torch.stack([state.statistics[subject.name][0] for state in ranks])  # (R, C)
    deviations = (torch.stack([state.statistics[subject.name][1] for state in ranks]) + subject.eps).sqrt()
    scale = deviations.mean(0)
    gaps = torch.maximum(_spread(means) / scale, _spread(deviations) / scale)
    worst, updates = float(gaps.max()), [state.updates[subject.name] for state in ranks]
    severity: Severity | None = None
    if worst > RANK_ERROR or len(set(updates)) > 1:
        severity = "error"
    elif worst > RANK_WARNING:
        severity = "warning"
    if severity is not None:
        yield Finding(
            check="rank-agreement",
            layer=subject.name,
            severity=severity,
            summary=f"the ranks' statistics differ by up to {worst:.2g} standard deviations: a checkpoint holds those "
            "of one rank, evaluation on several uses others",
            evidence={"largest_difference": worst, "updates": updates, "ranks": len(ranks)},
            causes=(
                "every rank averages its own shard; DistributedDataParallel copies rank 0's buffers before a forward, "
                "never after the last one, and not at all with broadcast_buffers=False",
                "the shards come from different distributions",
            ),
            remedy=_REMEDY,
            proof='not normkit.diagnose(model, group=torch.distributed.group.WORLD).of("rank-agreement")',
            channels={"difference": tuple(gaps.tolist())},
        )


def _spread(values: torch.Tensor) -> torch.Tensor:
    return values.amax(0) - values.amin(0)


def _plan_finding(
    severity: Severity, summary: str, evidence: list[object] | list[int | None] | list[dict[str, int]]
) -> Finding:
    return Finding(
        check="rank-agreement",
        layer="",
        severity=severity,
        summary=summary + ": with synchronized statistics the others wait for ever",
        evidence={"by_rank": [str(entry) for entry in evidence]},
        causes=("a sampler that does not even out the shards", "a branch that only some ranks take"),
        remedy="loader = DataLoader(dataset, sampler=DistributedSampler(dataset, drop_last=True), drop_last=True)",
        proof='not normkit.diagnose(model, loader, group=torch.distributed.group.WORLD).of("rank-agreement")',
    )


RANK_CHECKS: tuple[Check, ...] = (
    Check(
        name="rank-agreement",
        question="Do all processes hold the same statistics?",
        needs="ranks",
        examine=rank_agreement,
        innocent=("statistics kept per rank on purpose, one domain on each",),
    ),
)
