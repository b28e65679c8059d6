"""Checks of what one layer serves: does one set of running statistics stand for several populations?"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from ..examination import Check, Examination
from ..findings import Finding
from ..measurements import PooledMoments
from ..subjects import Subject
from ..thresholds import DRIFT_SHARE
from .populations import Drift, compare, percentile

__all__ = ["MIXTURE_CHECKS"]


def mixed_populations(examination: Examination) -> Iterator[Finding]:
    """Find layers that serve inputs of different moments: call by call, or by the labels that the user gave."""
    for subject in examination.subjects:
        measured = examination.measured.get(subject.name)
        if measured is None or not subject.is_batch or not subject.tracks:
            continue
        calls = {str(index + 1): call for index, call in enumerate(measured.calls) if call}
        apart = _furthest_apart(calls, subject.eps, examination.layers_judged)
        if apart is not None:
            yield _mixed_finding(
                subject,
                apart,
                f"called {len(calls)} times in a forward with inputs that differ in {apart[2].share:.0%} of the "
                "channels: one set of running statistics stands for several populations",
                {"calls": len(calls)},
                'model = normkit.convert(model, to="group", where={layer}).model  # then train again; or '
                "call the model once on both: model(torch.cat([first, second])).chunk(2)",
                "",
            )
        apart = _furthest_apart(measured.domains, subject.eps, examination.layers_judged)
        if apart is not None:
            yield _mixed_finding(
                subject,
                apart,
                f"the domains {apart[0]} and {apart[1]} differ in {apart[2].share:.0%} of the channels: one set of "
                "running statistics stands for both, and is right for neither",
                {"domains": sorted(measured.domains), "apart": [apart[0], apart[1]]},
                'model = normkit.convert(model, to="group", where={layer}).model  # then train again; or '
                "keep a model for each domain and recalibrate it there",
                ", domains=domains",
            )


def _furthest_apart(parts: Mapping[str, PooledMoments], eps: float, layers: int) -> tuple[str, str, Drift] | None:
    """Return the two populations that differ in the largest share of channels, if that is past the limit."""
    full = {name: moments for name, moments in parts.items() if moments}
    pairs = [
        (other, name, _between(full[name], full[other], eps, layers)) for other, name in itertools.combinations(full, 2)
    ]
    worst = max(pairs, key=lambda pair: pair[2].share, default=None)
    return None if worst is None or worst[2].share < DRIFT_SHARE else worst


def _between(first: PooledMoments, second: PooledMoments, eps: float, layers: int) -> Drift:
    own = 1.0 / max(first.effective_samples - 1.0, 1e-9)
    return compare(first.mean, first.var, second, eps, layers=layers, own=own)


def _mixed_finding(
    subject: Subject, apart: tuple[str, str, Drift], summary: str, evidence: dict[str, Any], remedy: str, argument: str
) -> Finding:
    drift = apart[2]
    return Finding(
        check="mixed-populations",
        layer=subject.name,
        severity="warning",
        summary=summary,
        evidence=evidence
        | {
            "share": drift.share,
            "z_99th_percentile": percentile(drift.certain_z),
            "log2_ratio_99th_percentile": percentile(drift.certain_log_ratio.abs()),
        },
        causes=(
            "real and generated, source and target, or clean and perturbed batches go through one by one",
            "one head serves several levels of a pyramid",
        ),
        remedy=remedy,
        proof=f'not normkit.diagnose(model, batches{argument}).of("mixed-populations", {{layer}})',
        channels={"z": tuple(drift.z.tolist()), "log2_ratio": tuple(drift.log_ratio.tolist())},
    )


MIXTURE_CHECKS: tuple[Check, ...] = (
    Check(
        name="mixed-populations",
        question="Does one layer serve several populations?",
        needs="batches",
        examine=mixed_populations,
        innocent=("adversarial training that mixes on purpose", "few-shot learning with shared statistics"),
    ),
)
