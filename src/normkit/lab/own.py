"""A reader's own data and network, named as ``"package.module:function"``."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DataError
from ..spelling import nearest
from .dataset import Dataset

__all__ = ["build_network", "function_of", "is_own", "own_dataset", "searched", "source_digest"]

PARTS = ("train_images", "train_labels", "test_images", "test_labels")


def is_own(name: str) -> bool:
    """Tell whether a name is that of a function, not of a data set of the laboratory."""
    return ":" in name


def searched(folder: str | None) -> None:
    """Let Python find modules in this folder too."""
    if folder is not None and folder not in sys.path:
        sys.path.insert(0, folder)


def function_of(name: str) -> Callable[..., Any]:
    """Import the function of this name.

    Raises:
        ArgumentError: the name has another form, the module cannot be imported, or it holds no such function.

    >>> function_of("math:sqrt")(4.0)
    2.0
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ArgumentError(f'module = "{name}": expected "package.module:function"')
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ArgumentError(
            f'module = "{name}": {module_name} cannot be imported ({error}); it is looked for beside the settings '
            "file and where Python looks"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        near = nearest(attribute, [word for word in vars(module) if not word.startswith("_")])
        hint = f"; did you mean {near}?" if near else ""
        raise ArgumentError(f'module = "{name}": {module_name} has no function {attribute}{hint}')
    function: Callable[..., Any] = found
    return function


def source_digest(name: str | None) -> str | None:
    """Return the SHA-256 of the file that a function stands in; ``None`` where there is none."""
    source = None if name is None else inspect.getsourcefile(inspect.unwrap(function_of(name)))
    return None if source is None else hashlib.sha256(Path(source).read_bytes()).hexdigest()


def own_dataset(name: str) -> Dataset:
    """Call a reader's function for its data: a `Dataset`, or images and labels to train on and to test on.

    Raises:
        ArgumentError: there is no such function.
        DataError: what it returned is no data set.
    """
    returned = function_of(name)()
    if isinstance(returned, Dataset):
        return returned
    if not isinstance(returned, tuple | list) or len(returned) != len(PARTS):
        raise DataError(f"{name} returned {type(returned).__name__}; expected a Dataset or ({', '.join(PARTS)})")
    parts = dict(zip(PARTS, (torch.as_tensor(part) for part in returned), strict=True))
    for kind in ("train", "test"):
        _check(name, kind, parts[f"{kind}_images"], parts[f"{kind}_labels"])
    digest = hashlib.sha256()
    for part in parts.values():
        digest.update(part.contiguous().numpy().tobytes())
    classes = int(max(parts["train_labels"].max(), parts["test_labels"].max())) + 1
    counts = f"{len(parts['train_labels'])} training and {len(parts['test_labels'])} test samples"
    return Dataset(
        name=name,
        train_images=parts["train_images"],
        train_labels=parts["train_labels"],
        test_images=parts["test_images"],
        test_labels=parts["test_labels"],
        classes=tuple(map(str, range(classes))),
        description=f"the reader's own data, {name}: {counts}.",
        digest=digest.hexdigest(),
    )


def build_network(name: str | None, norm: str, usual: Callable[[str], nn.Module]) -> nn.Module:
    """Build the reader's network with this norm, or the claim's usual one where there is none.

    Raises:
        ArgumentError: there is no such function, or it returned no module.
    """
    if name is None:
        return usual(norm)
    network = function_of(name)(norm)
    if not isinstance(network, nn.Module):
        raise ArgumentError(f'{name}("{norm}") returned {type(network).__name__}; expected a torch.nn.Module')
    return network


def _check(name: str, kind: str, images: Tensor, labels: Tensor) -> None:
    if images.dtype != torch.float32:
        raise DataError(f"{name}: {kind}_images are {images.dtype}; expected torch.float32")
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise DataError(f"{name}: {kind}_labels are {labels.dtype} {tuple(labels.shape)}; expected torch.int64 (N,)")
    if len(images) != len(labels) or len(labels) == 0:
        raise DataError(
            f"{name}: {len(images)} {kind}_images and {len(labels)} {kind}_labels; expected as many of each"
        )
