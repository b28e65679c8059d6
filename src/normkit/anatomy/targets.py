"""TARGET of the command line: a model built by a function, or a state file."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError
from .states import SUFFIXES, load_weights, read_state

__all__ = ["Target", "load_object", "load_target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a TARGET names.

    Attributes:
        name: the word as it was typed.
        model: the model, or None where TARGET is a state file.
        state: the names and tensors: the file's, or the model's own.
    """

    name: str
    model: nn.Module | None
    state: dict[str, Tensor]


def load_target(name: str, weights: str | Path | None = None) -> Target:
    """Load what TARGET names.

    Args:
        name: ``package.module:factory``, where factory is a function without arguments that returns a model, a class
            of one, or a model; or a state file (``.safetensors``, or ``.pt`` and the like by ``weights_only``).
        weights: a state file to load into the model.

    Raises:
        ArgumentError: the module, the name in it, or what it returns is not as above.
        DataError: a file is missing or damaged, or does not fit the model.

    >>> load_target("torch.nn:Identity").model
    Identity()
    """
    if Path(name).suffix in SUFFIXES:
        if weights is not None:
            raise ArgumentError(f"--weights goes with a model as package.module:factory; {name} is a state file itself")
        return Target(name=name, model=None, state=read_state(name))
    made = load_object(name)
    if callable(made) and not isinstance(made, nn.Module):
        _check_arguments(name, made)
    model = made if isinstance(made, nn.Module) else made() if callable(made) else made
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"{name} gives a {type(model).__name__}; a function that returns a torch.nn.Module is needed"
        )
    if weights is not None:
        load_weights(model, read_state(weights))
    return Target(name=name, model=model, state=dict(model.state_dict()))


def _check_arguments(name: str, factory: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called without arguments.

    Raises:
        ArgumentError: it needs some; the message names them.
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # of builtins nobody knows
        return
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in variadic]
    if needed:
        raise ArgumentError(
            f"{name} needs {', '.join(needed)}; TARGET is a function without arguments that returns a model: write one "
            f"that calls it, or make its arguments optional"
        )


def load_object(name: str) -> Any:
    """Import ``package.module:name``, with the current folder among the places looked in.

    Raises:
        ArgumentError: the form is another, the module cannot be found, or has no such name.

    >>> load_object("math:pi")
    3.141592653589793
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ArgumentError(
            f"{name!r} is neither package.module:factory nor a state file ({', '.join(SUFFIXES)}); "
            "for example app.models:build"
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ArgumentError(
            f"no module named {error.name!r}; it is looked for in {Path.cwd()} and on PYTHONPATH"
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ArgumentError(f"{module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    return found
