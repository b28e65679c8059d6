"""A model as a program that runs without its Python code, its state under torch's names."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
        ArgumentError: the example is not one tensor.
        SurgeryError: the model cannot be exported.
    """
    torch.export.save(_exported(model, example), path)


def write_onnx(model: nn.Module, example: Any, path: Path) -> None:
    """Write a model as ONNX, with any number of samples.

    Raises:
        ArgumentError: the example is not one tensor, or onnx and onnxscript are not installed.
        SurgeryError: the model cannot be exported.
    """
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it and says so only in the middle of the work
    except ModuleNotFoundError as error:
        raise ArgumentError("writing .onnx needs onnx and onnxscript: pip install onnx onnxscript") from error
    program = torch.onnx.export(_exported(model, example), dynamo=True, verbose=False)
    assert program is not None
    program.save(path, external_data=False)


def _exported(model: nn.Module, example: Any) -> torch.export.ExportedProgram:
    if not isinstance(example, Tensor):
        raise ArgumentError(f"the example is a {type(example).__name__}; only a model of one tensor becomes a program")
    # An example of one sample would fix the number of samples at one.
    wide = example if len(example) > 1 else torch.cat([example, example])
    shapes = ({0: torch.export.Dim.AUTO},)
    try:
        return torch.export.export(copied(model).eval(), (wide,), dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SurgeryError(f"torch.export cannot take {type(model).__name__}: {reason}") from error
