"""A model as a program that runs without its Python code, its state under torch's names."""

import inspect
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..anatomy.batches import arguments
from ..errors import ArgumentError, SurgeryError
from ..files import write_atomically
from .transaction import copied

__all__ = ["write_onnx", "write_program", "write_pt2"]


def write_program(model: nn.Module, example: Any, path: str | Path, *, force: bool = False) -> Path:
    """Write a model as what its file's ending says, all or nothing.

    Raises:
        ArgumentError: the ending is neither ``.onnx`` nor ``.pt2``, or the file is there already.
        SurgeryError: the model cannot be exported.
    """
    if not isinstance(path, str | Path):
        raise ArgumentError(f"path is {path!r}; give the name of a file that ends in .onnx or .pt2")
    target = Path(path)
    write = {".onnx": write_onnx, ".pt2": write_pt2}.get(target.suffix)
    if write is None:
        raise ArgumentError(f"{target}: a program's file ends in .onnx or .pt2")
    if target.exists() and not force:
        raise ArgumentError(f"{target} is there already; give another name, or force=True to replace it")
    write_atomically(target, lambda place: write(model, example, place), force=force)
    return target


def write_pt2(model: nn.Module, example: Any, path: Path) -> None:
    """Write a model as ``torch.export`` sees it, with any number of samples.

    Raises:
        ArgumentError: the example does not go into the model.
        SurgeryError: the model cannot be exported.
    """
    # Not into the file at once: on a full disk torch's writer ends the process.
    buffer = io.BytesIO()
    torch.export.save(_exported(model, example), buffer)
    path.write_bytes(buffer.getvalue())


def write_onnx(model: nn.Module, example: Any, path: Path) -> None:
    """Write a model as ONNX, with any number of samples.

    Raises:
        ArgumentError: the example does not go into the model, or onnx and onnxscript are not installed.
        SurgeryError: the model cannot be exported.
    """
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it and says so only in the middle of the work
    except ModuleNotFoundError as error:
        raise ArgumentError("writing .onnx needs onnx and onnxscript: pip install onnx onnxscript") from error
    exported = _exported(model, example)
    try:
        program = torch.onnx.export(exported, dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise SurgeryError(f"torch.onnx cannot take {type(model).__name__}: {reason}; write .pt2") from error
    assert program is not None
    program.save(path, external_data=False)


def _exported(model: nn.Module, example: Any) -> torch.export.ExportedProgram:
    try:
        args, kwargs = _wide(*arguments(model, example))
    except ArgumentError as error:
        said = str(error).partition("; say how to call")
        way = "; give example= that goes into forward: a tensor, or a dict with the names of its arguments"
        raise ArgumentError(said[0] + (way if said[1] else "")) from None
    try:
        shapes = _shapes(model, args, kwargs)
        return torch.export.export(copied(model).eval(), args, kwargs, dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SurgeryError(f"torch.export cannot take {type(model).__name__}: {reason}") from error


def _wide(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Double an example of one sample, which would fix the number of samples at one."""
    if _samples((args, kwargs)) != 1:
        return args, kwargs
    wide: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(
        lambda value: torch.cat([value, value]) if _is_of_samples(value, 1) else value, (args, kwargs)
    )
    return wide


def _shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Say by the names of forward's arguments which dimensions count samples, and so may be of any size."""
    count = _samples((args, kwargs))
    named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    free = {0: torch.export.Dim.AUTO}
    shapes: dict[str, Any] = tree_map(lambda value: free if _is_of_samples(value, count) else None, dict(named))
    return shapes


def _samples(values: Any) -> int:
    """Return the number of samples: the length of the first tensor.

    Raises:
        ArgumentError: there is none, or it is empty.
    """
    first = next((value for value in tree_leaves(values) if isinstance(value, Tensor) and value.ndim), None)
    if first is None or not first.numel():
        said = "holds no tensor" if first is None else f"holds no sample, but a tensor of shape {tuple(first.shape)}"
        raise ArgumentError(f"the example {said}; an export runs the model once, on a batch of two samples or more")
    return len(first)


def _is_of_samples(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
