"""Checkpoints after each epoch of a long training, so that a cell that was broken off goes on inside.

A claim measures after each epoch, and may carry what it measured from one epoch to the next. So a cell goes on by
being played back: its trainings yield the epochs that were kept, with the network and torch's random numbers as they
were after each, and train from there. What the claim measures on the way comes out as before, byte for byte.

A training has a folder with one file per epoch and one of the optimiser's state after the last, as safetensors, each
written whole or not at all.
"""

import contextvars
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .files import atomic_write

__all__ = ["Checkpoints", "begin", "keeping"]

# An epoch shorter than this, in seconds, is sooner run again than kept.
SHORTEST_EPOCH = 3.0


@dataclass(kw_only=True)
class _Cell:
    """The cell that is run: where its checkpoints lie, what they hang on, how many trainings it has begun."""

    folder: Path
    identity: str
    trainings: int = 0


_CELL: contextvars.ContextVar[_Cell | None] = contextvars.ContextVar("normkit_lab_cell", default=None)


@contextmanager
def keeping(folder: Path | None, identity: str) -> Iterator[None]:
    """Let the trainings inside keep their epochs.

    Args:
        folder: the cell's own folder; ``None`` keeps nothing.
        identity: whatever else the numbers hang on, such as versions; epochs kept under another are not used.
    """
    token = _CELL.set(None if folder is None else _Cell(folder=folder, identity=identity))
    try:
        yield
    finally:
        _CELL.reset(token)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The kept epochs of one training.

    Attributes:
        folder: where they lie; ``None`` keeps nothing.
        identity: what the training hangs on.
        model: the network that is trained.
        optimizer: its optimiser.
        shuffling: what draws the order of the images.
    """

    folder: Path | None
    identity: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    shuffling: torch.Generator

    def played_back(self) -> Iterator[dict[str, Any]]:
        """Put the network into its state after each kept epoch, yield what that epoch measured, and stand ready.

        A damaged or missing file, or one of another training, means that nothing was kept.
        """
        last = self._last()
        for number in range(1, last + 1):
            read = self._read(f"epoch-{number}")
            assert read is not None, "looked at by _last"
            tensors, about = read
            if number == last:
                self._restore_optimizer()
            self._restore(tensors, about["numbers"])
            yield about["measured"]

    def keep(self, number: int, measured: Mapping[str, Any], seconds: float) -> None:
        """Keep the state after an epoch that took so many seconds, if that is worth it.

        Raises:
            OSError: the disk is full or may not be written; what was kept before stands.
        """
        if self.folder is None or (seconds < SHORTEST_EPOCH and not self._path("optimizer").exists()):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"measured": dict(measured), "numbers": _numbers(self.model)}
        # The optimiser last: its file names the epoch that can be gone on from.
        self._write(f"epoch-{number}", self._tensors(), about)
        self._write("optimizer", _flat(self.optimizer), {"epoch": number})

    def _last(self) -> int:
        """Return the number of the epoch that can be gone on from, 0 for none."""
        read = self._read("optimizer")
        last = int(read[1]["epoch"]) if read else 0
        return last if all(self._read(f"epoch-{number}") for number in range(1, last + 1)) else 0

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _write(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        separate = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
        metadata = {"identity": self.identity, "about": json.dumps(about)}
        atomic_write(self._path(name), save(separate, metadata))

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.folder is None or not self._path(name).exists():
            return None
        try:
            with safe_open(self._path(name), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
        except SafetensorError:
            return None
        return (tensors, json.loads(metadata["about"])) if metadata.get("identity") == self.identity else None

    def _tensors(self) -> dict[str, Tensor]:
        """Return everything that the epochs to come hang on, but the optimiser."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"random.{name}": generator.get_state() for name, generator in self._generators().items()}
        return tensors | {f"cuda.{place}": state for place, state in enumerate(_cuda_states(self.model))}

    def _restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self.model.load_state_dict(_named(tensors, "model."))
        # As the epoch left it: its last act is to look at the test data.
        self.model.eval()
        for name, generator in self._generators().items():
            generator.set_state(tensors[f"random.{name}"])
        cuda = _named(tensors, "cuda.")
        if cuda:
            torch.cuda.set_rng_state_all([cuda[str(place)] for place in range(len(cuda))])
        modules = dict(self.model.named_modules())
        for name, values in numbers.items():
            modules[name].__dict__.update(values)

    def _restore_optimizer(self) -> None:
        read = self._read("optimizer")
        assert read is not None, "looked at by _last"
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in read[0].items():
            place, _, key = name.partition(".")
            state.setdefault(int(place), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _generators(self) -> dict[str, torch.Generator]:
        """Return torch's random numbers, the shuffling's, and those that modules of the network hold."""
        found = {"torch": torch.default_generator, "shuffling": self.shuffling}
        for name, module in self.model.named_modules():
            for attribute, value in vars(module).items():
                if isinstance(value, torch.Generator):
                    found[f"model.{name}.{attribute}"] = value
        return found


def begin(
    model: nn.Module, optimizer: torch.optim.Optimizer, shuffling: torch.Generator, hangs_on: object
) -> Checkpoints:
    """Return the checkpoints of a training that begins, in the cell that is run.

    A network with hooks is not kept: what a hook gathers cannot be played back.

    Args:
        model: the network.
        optimizer: its optimiser.
        shuffling: what draws the order of the images.
        hangs_on: settings, seed and data; their words are what counts.
    """
    cell = _CELL.get()
    folder, identity = None, ""
    if cell is not None and not any(_has_hooks(module) for module in model.modules()):
        folder = cell.folder / f"training-{cell.trainings}"
        cell.trainings += 1
        shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
        words = f"{cell.identity}|{hangs_on}|{type(model).__name__}|{shapes}"
        identity = hashlib.sha256(words.encode()).hexdigest()
    return Checkpoints(folder=folder, identity=identity, model=model, optimizer=optimizer, shuffling=shuffling)


def _numbers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the plain numbers that modules hold as attributes: a counter, say."""
    return {
        name: {attribute: value for attribute, value in vars(module).items() if type(value) in (int, float, bool)}
        for name, module in model.named_modules()
    }


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{place}.{key}": value
        for place, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _cuda_states(model: nn.Module) -> list[Tensor]:
    on_cuda = any(parameter.is_cuda for parameter in model.parameters())
    return torch.cuda.get_rng_state_all() if on_cuda else []


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
