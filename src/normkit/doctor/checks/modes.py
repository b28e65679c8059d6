"""Check of the modes: does every layer evaluate while its model does?"""

from collections.abc import Iterator

from ...anatomy.frozen import is_frozen
from ..examination import Check, Examination
from ..findings import Finding

__all__ = ["MODE_CHECKS"]


def mode(examination: Examination) -> Iterator[Finding]:
    """Find layers in training mode inside a model, or a part of one, that is in evaluation mode."""
    for subject in examination.subjects:
        holder = examination.resting.get(subject.name)
        if holder is None or subject.layer is None or not subject.tracks or subject.is_fixed:
            continue
        if is_frozen(subject.layer.module):
            continue  # normalizes with the batch because it was told to
        around = "the model" if not holder else f"{holder} around it"
        effect = (
            "predictions hang on the batch that a sample is in, and every forward moves the statistics"
            if subject.is_batch
            else "it does not normalize with its running statistics, and every forward moves them"
        )
        reach = "model" if not holder else f"model.get_submodule({holder!r})"
        yield Finding(
            check="mode",
            layer=subject.name,
            severity="warning" if holder else "error",
            summary=f"the layer is in training mode and {around} in evaluation mode: {effect}",
            evidence={"training": True, "in_evaluation": holder or "the model", "updates": subject.updates},
            causes=(
                "train() was called on a part of the model after eval(), to go on training it",
                "a layer was put in place after eval(): a new module is in training mode",
                "batch statistics are wanted in evaluation, as for adapting to new data",
            ),
            remedy=f"{reach}.eval()",
            proof='not normkit.diagnose(model).of("mode", {layer})',
        )


MODE_CHECKS: tuple[Check, ...] = (
    Check(
        name="mode",
        question="Does every layer evaluate while the model around it does?",
        needs="model",
        examine=mode,
        innocent=("statistics adapted to new data on purpose", "a part that alone is trained on"),
    ),
)
