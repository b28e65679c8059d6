"""Hold any normalization layer, ours or not, to the catalog's contract."""

from collections.abc import Callable, Iterator
from typing import Literal

from torch import nn

from ..anatomy.programs import refuse_lazy
from ..errors import ArgumentError
from ..spelling import alternatives
from . import forward, learning, state
from .contracts import CONTRACTS
from .report import Finding, Report
from .subject import Subject

__all__ = ["check_norm_layer"]

Check = Callable[[Subject], Iterator[Finding]]
Method = Literal[
    "batch", "layer", "rms", "group", "instance", "response", "adaptive", "renorm", "ghost", "masked", "whitening"
]

_ALWAYS: dict[str, Check] = {
    "shape and type": forward.check_shape_and_type,
    "training output": forward.check_training_output,
    "evaluation": forward.check_evaluation,
    "gradients": learning.check_gradients,
    "double gradients": learning.check_double_gradients,
    "half precision": forward.check_half_precision,
    "huge mean": forward.check_huge_mean,
    "constant channel": forward.check_constant_channel,
    "memory layout": forward.check_memory_layout,
    "input kept": forward.check_input_kept,
    "saving": state.check_saving,
    "copies": state.check_copies,
    "meta": state.check_meta,
    "bad input": state.check_bad_input,
    "empty batch": state.check_empty_batch,
}
_STORED: dict[str, Check] = {
    "running update": learning.check_running_update,
    "counter": learning.check_counter,
}


def check_norm_layer(
    layer_or_factory: nn.Module | Callable[[int], nn.Module],
    method: Method = "batch",
    *,
    channels: int = 6,
    dimensions: int | None = None,
) -> Report:
    """Run a layer through the contract of its method, and say what deviates and which convention it seems to follow.

    Args:
        layer_or_factory: a layer of ``channels`` channels, which is copied and left alone; or a function of the number
            of channels that builds one, for instance the class.
        method: a row of the catalog. Settings are read from the layer by torch's names or ours: ``num_groups``,
            ``normalized_shape`` (by default all of a sample), ``size``, ``alpha``, ``beta`` and ``k``, ``ghost_size``,
            ``r_max`` and ``d_max``, ``shrinkage`` and ``iterations``. An adaptive layer is called with a style, a
            masked one with a mask, as second argument.
        channels: C of the inputs.
        dimensions: how many spatial dimensions the inputs have; instance, adaptive and local response normalization
            need one. Left out, it is what the layer's ``normalized_shape`` says, where it has one, and otherwise 2.

    Returns:
        The findings, the checks that passed, and those that do not apply.

    Raises:
        ArgumentError: the method has no contract here, or the layer is lazy and has not seen a batch.

    Example:
        >>> from normkit import BatchNorm2d
        >>> report = check_norm_layer(BatchNorm2d)
        >>> report.conforms, len(report.passed_checks)
        (True, 18)
    """
    if method not in CONTRACTS:
        raise ArgumentError(
            f"there is no contract for the method {method!r}; {alternatives(method, sorted(CONTRACTS))}. Weights have "
            "none: they are no layer"
        )
    subject = Subject(
        source=layer_or_factory,
        method=method,
        contract=CONTRACTS[method],
        channels=channels,
        dimensions=_dimensions(layer_or_factory, channels) if dimensions is None else dimensions,
    )
    made = layer_or_factory if isinstance(layer_or_factory, nn.Module) else layer_or_factory(channels)
    refuse_lazy(made, "check_norm_layer", f"layer(torch.randn{subject.shape()})")
    checks, skipped = _choose(subject)
    findings: list[Finding] = []
    for name, check in checks.items():
        findings += _run(name, check, subject)
    failed = {finding.check for finding in findings}
    return Report(
        layer=repr(subject.build()).partition("\n")[0],
        method=method,
        findings=tuple(findings),
        passed_checks=tuple(name for name in checks if name not in failed),
        skipped=skipped,
    )


def _dimensions(source: nn.Module | Callable[[int], nn.Module], channels: int) -> int:
    """Return how many dimensions follow the channels in the inputs that a layer is made for."""
    layer = source if isinstance(source, nn.Module) else source(channels)
    shape = getattr(layer, "normalized_shape", None)
    sizes = shape if isinstance(shape, tuple | list) else (shape,)
    return 2 if shape is None else len(sizes) - 1


def _choose(subject: Subject) -> tuple[dict[str, Check], dict[str, str]]:
    """Return the checks that apply to a layer of this method, and why the others do not."""
    checks, contract = dict(_ALWAYS), subject.contract
    skipped: dict[str, str] = {}
    if subject.keeps_statistics:
        checks |= _STORED
    else:
        skipped = dict.fromkeys(_STORED, "the layer stores no statistics")
    if contract.per_sample:
        checks["sample independence"] = forward.check_sample_independence
    else:
        checks["single value"] = state.check_single_value
    if subject.method == "masked":
        checks["padding"] = forward.check_padding
    if subject.tail:
        skipped["what comes after"] = f"the {subject.tail} of the layer was taken off: the contract is of the rest"
    skipped |= {name: reason for name, reason in contract.skipped.items() if name in checks}
    return {name: check for name, check in checks.items() if name not in skipped}, skipped


def _run(name: str, check: Check, subject: Subject) -> list[Finding]:
    """Run one check; a layer that fails on what it should take is a finding too."""
    try:
        return list(check(subject))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError, KeyError) as error:
        return [Finding(check=name, problem=f"it raised {type(error).__name__}: {error}")]
