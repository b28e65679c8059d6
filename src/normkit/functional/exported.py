"""What an exported graph may hold of a training: what other programs know as a batch norm, and nothing else."""

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from . import checks
from .overrides import is_exporting

__all__ = ["check_exportable", "check_not_exported", "is_exportable"]


def is_exportable(stored: bool, momentum: float | None, unbiased: bool) -> bool:
    """Tell whether torch's own operator stores what is to be stored, in a graph for other programs."""
    return is_exporting() and (not stored or (momentum is not None and unbiased))


def check_exportable(stored: bool, momentum: float | None, unbiased: bool, caller: nn.Module | None) -> None:
    """Refuse to export what torch's operator, by which tools know a batch norm in a graph, cannot store."""
    if not stored or not torch.compiler.is_exporting() or (momentum is not None and unbiased):
        return
    missing = "the biased variance of unbiased=False" if not unbiased else "the plain average of momentum=None"
    checks.refuse(
        ArgumentError,
        f"an exported training graph holds torch's batch norm, by which move_exported_model_to_eval knows it, and that "
        f"cannot store {missing}; export after eval(), or train with unbiased=True and a momentum such as 0.1",
        caller,
    )


def check_not_exported(running_mean: Tensor | None, caller: nn.Module | None) -> None:
    """Refuse to export a training graph that would move running statistics in operations that no tool knows.

    Raises:
        ArgumentError: it is torch.export that records this.
    """
    if running_mean is not None and torch.compiler.is_exporting():
        checks.refuse(
            ArgumentError,
            "an exported training graph would hold this norm in plain operations: move_exported_model_to_eval does not "
            "find them, and it would go on training in prediction; export after eval()",
            caller,
        )
