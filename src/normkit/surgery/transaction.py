"""All or nothing: on any exception a model is bit for bit what it was."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..anatomy import Snapshot
from ..anatomy.attributes import leaves, plain_attributes
from ..errors import SurgeryError
from ..printable import first_line

__all__ = ["copied", "restored_on_error"]


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model.

    A weight that a hook computes from others before each forward (``torch.nn.utils.weight_norm`` and ``spectral_norm``
    of before the parametrizations) is no leaf, and ``copy.deepcopy`` refuses it: it is copied by its value, which the
    copy's hook computes anew.

    Raises:
        SurgeryError: a layer is lazy (what has no shape cannot be copied), an attribute cannot be copied, or holds a
            function that would go on calling the given model's layers.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise SurgeryError(f"{name} is lazy and cannot be copied; run the model once first")
    held = _held_by_function(model)
    if held is not None:
        raise SurgeryError(
            f"{held} is a function made around the model's own layers; a copy keeps that function and would go on "
            "calling the given model's, and surgery works on a copy; write it as a method of the class"
        )
    computed: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                computed[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, computed)
    except (RuntimeError, TypeError) as error:
        raise SurgeryError(
            f"a {type(model).__name__} cannot be copied (copy.deepcopy: {first_line(error)}), and surgery works on a "
            "copy; take what cannot be copied out first (torch.nn.utils.remove_weight_norm for an old weight norm)"
        ) from error


def _held_by_function(model: nn.Module) -> str | None:
    """Name an attribute with a function that holds modules of the model by itself; ``copy.deepcopy`` copies none."""
    own = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        if "_orig_mod" in module._modules:
            continue  # torch.compile's: its forward is the compiler's, and what it compiled is run as code
        for name, value in plain_attributes(module):
            functions = (entry for entry in leaves(value) if isinstance(entry, FunctionType))
            if any(_holds(function, own, set()) for function in functions):
                return f"{path}.{name}" if path else name
    return None


def _holds(function: FunctionType, own: set[int], seen: set[int]) -> bool:
    """Say whether a function holds one of these modules, a method of one, or another function that does."""
    seen.add(id(function))
    held = [*(function.__defaults__ or ())]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a variable that is not set yet
            held.append(cell.cell_contents)
    return any(
        id(getattr(value, "__self__", value)) in own
        or (isinstance(value, FunctionType) and id(value) not in seen and _holds(value, own, seen))
        for value in held
    )


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
