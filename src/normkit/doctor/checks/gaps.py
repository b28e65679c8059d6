"""Check of what evaluation costs: is it as good as training was, and does anything say why not?"""

from collections.abc import Iterator

from ..examination import Check, Examination
from ..findings import Finding
from ..thresholds import GAP_LARGE

__all__ = ["GAP_CHECKS"]


def gap(examination: Examination) -> Iterator[Finding]:
    """Find what of the gap between evaluation and training no other finding explains, beyond what chance allows."""
    seen = examination.gap
    if seen is None or not examination.unexplained:
        return
    whole = seen.training - seen.evaluation
    share = examination.unexplained / whole
    yield Finding(
        check="gap",
        layer="",
        severity="error" if examination.unexplained >= GAP_LARGE else "warning",
        summary=f"{seen.evaluation:.1%} of {seen.samples} samples are right in evaluation, {seen.training:.1%} with "
        f"the statistics of each batch: {share:.0%} of this gap is unexplained, and more than chance",
        evidence={
            "evaluation": seen.evaluation,
            "training": seen.training,
            "unexplained": examination.unexplained,
            "samples": seen.samples,
        },
        causes=(
            "statistics a little off in every layer, as behind averaged weights or at a high learning rate: measure "
            "them again, and ask again",
            "samples of one batch belong together, sorted by class or cut from one recording, and their own "
            "statistics give the answer away: shuffle the batches",
            "the batches given here are not what the model was trained on",
        ),
        remedy="normkit.recalibrate(model, batches)",
        proof='not normkit.diagnose(model, batches, labels=labels).of("gap")',
        explains=share,
    )


GAP_CHECKS: tuple[Check, ...] = (
    Check(
        name="gap",
        question="Is evaluation as good as training, where labels tell?",
        needs="labels",
        examine=gap,
        innocent=("batches that are one class each, or one recording each",),
    ),
)
