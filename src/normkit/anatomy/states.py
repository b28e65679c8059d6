"""State files: read without running anything that is in them, and written so that no half file is ever left."""

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DataError
from ..files import write_atomically

__all__ = ["SUFFIXES", "load_weights", "read_state", "unwrapped", "write_state"]

State = dict[str, Tensor]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

# What checkpoints call the state of the model inside them, and what wrappers put before its names.
_INSIDE = ("state_dict", "model_state_dict", "model_state", "model", "net", "module")
_WRAPPERS = ("module.", "_orig_mod.", "model.")

# What torch.load was seen to raise on files that are cut short, empty, or not its own.
_MALFORMED = (
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    AssertionError,
    EOFError,
    OSError,
    MemoryError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def read_state(path: str | Path) -> State:
    """Read the names and tensors of a state file, on the CPU.

    A ``.safetensors`` file is read by safetensors, all else by ``torch.load(weights_only=True)``; a checkpoint that
    keeps the state under ``"state_dict"``, ``"model"`` or the like is looked into.

    Raises:
        DataError: the file is missing, damaged, holds more than plain tensors, or holds no state; in one line.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: a state file ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _state_inside(content, path)


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state into a model; nothing is written unless every name and shape fits.

    A wrapper's prefix (``module.``, ``_orig_mod.``) is taken off where that makes the names fit. A missing
    ``num_batches_tracked`` is harmless and stays as it is; lost running statistics are an error.

    Raises:
        DataError: names are missing or left over, or shapes differ; each is counted and the first are named.
    """
    own = model.state_dict()
    given = unwrapped(dict(state), own.keys())
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    left_over = [name for name in given if name not in own and not name.endswith("num_batches_tracked")]
    reshaped = [name for name in given if name in own and given[name].shape != own[name].shape]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "missing"), (left_over, "not in the model"), (reshaped, "of another shape"))
        if names
    ]
    if problems:
        raise DataError(f"the state does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(own | {name: tensor for name, tensor in given.items() if name in own})


def write_state(path: str | Path, state: Mapping[str, Tensor], *, force: bool = False) -> None:
    """Write a state file: whole, or not at all.

    Args:
        path: ends in ``.safetensors``, or in ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` for ``torch.save``.
        state: names and tensors.
        force: replace a file that is there.

    Raises:
        ArgumentError: the ending is none of these, the file is there and ``force`` is not set, or it is no file.
        OSError: the disk is full or may not be written; what was there stands.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"--out {path}: a state file ends in {', '.join(SUFFIXES)}")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        content = save(plain)  # of a full disk its own writer says something else
        write_atomically(path, lambda target: target.write_bytes(content), force=force)
    else:
        write_atomically(path, lambda target: torch.save(plain, target), force=force)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({_first_line(error)})") from None


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on pickle protocols; the file is read or refused either way
            return torch.load(path, map_location="cpu", weights_only=True)
    except _MALFORMED as error:
        raise DataError(
            f"{path}: not readable as plain weights: {_why(error, path)}; "
            "only what torch.load(weights_only=True) takes is opened"
        ) from None


def _why(error: BaseException, path: Path) -> str:
    """Say what is wrong with a file; torch's own words name a byte, or advise to open it without protection."""
    if path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, pickle.UnpicklingError) and "eights only" in str(error):
        return "it holds pickled objects besides tensors, a whole model perhaps; save model.state_dict() instead"
    return f"it is damaged, or was not written by torch.save ({type(error).__name__})"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:160]


def _state_inside(content: Any, path: Path) -> State:
    """Find the dict of tensors in what a file holds."""
    if isinstance(content, Mapping):
        if content and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
            return dict(content)
        for name in _INSIDE:
            if isinstance(content.get(name), Mapping):
                return _state_inside(content[name], path)
    keys = f" with keys {', '.join(map(repr, list(content)[:5]))}" if isinstance(content, Mapping) else ""
    raise DataError(f"{path}: holds no state of a model, but a {type(content).__name__}{keys}")


def unwrapped(state: State, wanted: Any) -> State:
    """Take off the wrappers' prefixes that stand before every name, as long as the names do not fit."""
    while state and not set(state) & set(wanted):
        prefix = next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
