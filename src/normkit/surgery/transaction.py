"""All or nothing: on any exception a model is bit for bit what it was."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..anatomy import Snapshot
from ..errors import SurgeryError

__all__ = ["copied", "restored_on_error"]


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model.

    A weight that a hook computes from others before each forward (``torch.nn.utils.weight_norm`` and ``spectral_norm``
    of before the parametrizations) is no leaf, and ``copy.deepcopy`` refuses it: it is copied by its value, which the
    copy's hook computes anew.

    Raises:
        SurgeryError: a layer is lazy (what has no shape cannot be copied), or an attribute cannot be copied.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise SurgeryError(f"{name} is lazy and cannot be copied; run the model once first")
    computed: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                computed[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, computed)
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SurgeryError(
            f"a {type(model).__name__} cannot be copied (copy.deepcopy: {reason}), and surgery works on a copy; take "
            "what cannot be copied out first (torch.nn.utils.remove_weight_norm for an old weight norm)"
        ) from error


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put the model's whole state back if the block does not come to its end, whatever ends it.

    >>> norm = nn.BatchNorm1d(2)
    >>> try:
    ...     with restored_on_error(norm):
    ...         _ = norm.running_mean.fill_(3.0)
    ...         raise KeyboardInterrupt
    ... except KeyboardInterrupt:
    ...     print(norm.running_mean)
    tensor([0., 0.])
    """
    state = Snapshot(model)
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished:
            state.restore()
