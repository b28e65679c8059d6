"""``watch``: hooks that keep the buffer ledger while a model trains."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from ..anatomy.forms import NormForm
from ..anatomy.frozen import moved
from ..anatomy.hold import is_held, listening
from ..anatomy.programs import refuse_lazy, unwrapped
from .checks import CHECK_NAMES
from .checks.ranks import rank_agreement
from .examination import Examination
from .ledger import LayerLedger, Ledger, Write, Writer
from .probes import hooked_input
from .ranks import check_group, gather_ranks
from .subjects import Subject, subjects_of_model
from .waivers import parse_waivers

__all__ = ["watch"]

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


@contextmanager
def watch(model: nn.Module, *, waive: Mapping[str, str] | None = None, group: Any = None) -> Iterator[Ledger]:
    """Keep a ledger of who writes the running statistics while a model trains.

    A step ends when an optimizer that holds parameters of the model has taken it. The ledger finds extra forwards,
    layers that recomputation updates twice, frozen layers that move, steps that a scaler skipped, statistics that stop
    being finite. Nothing is changed, and nothing is read back from an accelerator but one flag per step.

    Args:
        model: the model that trains, or its wrapper.
        waive: findings that are known and meant, ``{"check:layer pattern": "the reason"}``.
        group: a process group of ``torch.distributed``, whose processes compare their statistics and how often they
            called each layer when the block ends; then every one must come to its end.

    Yields:
        The ledger; ask it for ``diagnosis()`` at any time, also after the block.

    Raises:
        ArgumentError: a waiver names no check or no reason, ``group`` came without a process group, or a lazy layer has
            not seen a batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch(model) as ledger:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 2)).square().mean().backward()
        ...         optimizer.step()
        >>> ledger.steps, ledger.layers["1"].writers["forward"], ledger.diagnosis().healthy
        (3, 3, True)
        >>> ledger.writes[0].values
        8
    """
    waivers = parse_waivers(waive, CHECK_NAMES)
    check_group(group)
    model, _ = unwrapped(model)
    refuse_lazy(model, "watch")
    kept = [s for s in subjects_of_model(model) if s.running_mean is not None and not s.is_fixed]
    watcher = _Watcher(model, kept, waivers)
    try:
        with listening(watcher.hear):
            yield watcher.ledger
    finally:
        watcher.close()
    if group is not None:
        watcher.compare(group)


class _Watcher:
    """The hooks of one ``watch`` and what they remember between calls."""

    def __init__(self, model: nn.Module, subjects: list[Subject], waivers: list[Any]) -> None:
        self.ledger = Ledger({s.name: _entry(s) for s in subjects}, waivers)
        self._model = model
        self._modules = {s.name: s.layer.module for s in subjects if s.layer is not None}
        self._forms = {s.name: s.names for s in subjects}
        self._seen = {name: _stamp(module._buffers, self._forms[name]) for name, module in self._modules.items()}
        self._watched = [(name, module, module._buffers) for name, module in self._modules.items()]
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._owns: dict[int, bool] = {}
        self._place: str | None = None
        self._places: dict[tuple[CodeType, int], str] = {}
        self._pending: list[tuple[int, Tensor]] = []
        self._checked_ids: list[int] = []
        self._checked: list[tuple[torch.dtype, list[Tensor]]] = []
        self._backward_since_step = False
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._witness = learning[-1] if learning else None
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
            register_optimizer_step_post_hook(self._stepped),
        ]
        if self._witness is not None:
            self._handles.append(self._witness.register_post_accumulate_grad_hook(self._backward))
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))

    def close(self) -> None:
        """Take all hooks away and read what is left to read."""
        for handle in self._handles:
            handle.remove()
        for name, module in self._modules.items():
            self._notice_outside(name, module)
        self._check_finite()
        self._read_flags()

    def hear(self, module: nn.Module, values: int) -> None:
        """Note an update that was made once for several forwards, by who took them together."""
        for name, own in self._modules.items():
            if own is module:
                self._seen[name] = _stamp(module._buffers, self._forms[name])
                self.ledger.record(Write(self.ledger.steps + 1, name, "forward", self._caller(), 0, values))

    def compare(self, group: Any) -> None:
        """Compare what the processes hold now, and keep what is found in the ledger."""
        subjects = tuple(subject for subject in subjects_of_model(self._model) if subject.name in self._modules)
        calls = {name: entry.writers["forward"] for name, entry in self.ledger.layers.items()}
        ranks = gather_ranks(subjects, None, calls, group)
        self.ledger.across_ranks = tuple(rank_agreement(Examination(subjects=subjects, model=self._model, ranks=ranks)))

    def _hook(self, name: str) -> Callable[..., None]:
        """Return the hook of one layer. It runs in every forward, so it does as little as it can."""
        seen, buffers, ledger, form = self._seen, self._modules[name]._buffers, self.ledger, self._forms[name]
        in_backward, learning = torch._C._current_graph_task_id, torch.is_grad_enabled
        decays = getattr(self._modules[name], "momentum", None) is not None

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            stamp = _stamp(buffers, form)
            if (stamp == seen[name] and (stamp[3] >= 0 or not _writes(module))) or is_held(module):
                return
            seen[name] = stamp
            given = args[0] if args else hooked_input(args, kwargs)
            samples = values = 0
            if isinstance(given, Tensor):
                shape = given.shape
                samples, values = shape[0], given.numel() // (shape[1] or 1)
            # A forward inside a backward is what torch's checkpoint asks for.
            writer: Writer = "recompute" if in_backward() != -1 else "forward" if learning() else "probe"
            if decays and getattr(module, "momentum", None) is None:
                writer = "renewal"
            ledger.record(Write(ledger.steps + 1, name, writer, self._place or self._caller(), samples, values))

        return after

    def _notice_outside(self, name: str, module: nn.Module) -> None:
        stamp = _stamp(module._buffers, self._forms[name])
        self.ledger.layers[name].thawed = moved(module)
        if stamp != self._seen[name]:
            self._seen[name] = stamp
            place = self._place or self._caller()
            self.ledger.record(Write(self.ledger.steps + 1, name, "outside", place, 0, 0))

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._place = self._caller()
        seen = self._seen
        for name, layer, buffers in self._watched:
            if _stamp(buffers, self._forms[name]) != seen[name] and not is_held(layer):
                self._notice_outside(name, layer)
        # Gradients came and are gone, and no step was taken: a scaler dropped it.
        if self._backward_since_step and self._witness is not None and self._witness.grad is None:
            self.ledger.skipped += 1
            self._backward_since_step = False
            for entry in self.ledger.layers.values():
                entry.this_step = 0

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._place = None

    def _backward(self, parameter: Tensor) -> None:
        self.ledger.backwards += 1
        self._backward_since_step = True

    def _stepped(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        key = id(optimizer)
        if key not in self._owns:
            held = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
            self._owns[key] = any(parameter in self._parameters for parameter in held)
        if not self._owns[key]:
            return
        self._backward_since_step = False
        self.ledger.close_step()
        self._read_flags()
        self._check_finite()

    def _check_finite(self) -> None:
        """Ask whether all statistics are finite; the answer is read a step later, when an accelerator has it.

        One sum over all of them answers it, for a fraction of what asking each value costs: it is finite unless one of
        them is not, or all together overflow, and then the layers are asked one by one.
        """
        tensors = [
            tensor
            for name, _, buffers in self._watched
            for tensor in (buffers.get(self._forms[name].mean), buffers.get(self._forms[name].var))
            if tensor is not None
        ]
        if [id(tensor) for tensor in tensors] != self._checked_ids:
            self._checked_ids, self._checked = [id(tensor) for tensor in tensors], _by_kind(tensors)
        with torch.no_grad():
            for wide, same in self._checked:
                self._pending.append((self.ledger.steps, torch.cat(same).sum(dtype=wide)))

    def _read_flags(self) -> None:
        bad_steps = [step for step, total in self._pending if not math.isfinite(total.item())]
        self._pending.clear()
        if not bad_steps:
            return
        for name, module in self._modules.items():
            form = self._forms[name]
            entry, values = self.ledger.layers[name], (form.tensor(module, "mean"), form.tensor(module, "var"))
            if entry.nonfinite_step is None and not all(
                bool(value.isfinite().all()) for value in values if isinstance(value, Tensor)
            ):
                entry.nonfinite_step = bad_steps[0]

    def _caller(self) -> str:
        """Name the line of the user's program that is running."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            frame = frame.f_back
        key = (frame.f_code, frame.f_lineno)
        if key not in self._places:
            self._places[key] = f"{Path(key[0].co_filename).name}:{key[1]} in {key[0].co_name}"
        return self._places[key]


def _entry(subject: Subject) -> LayerLedger:
    channels = None if subject.running_mean is None else subject.running_mean.numel()
    name = "" if subject.layer is None else type(subject.layer.module).__name__
    return LayerLedger(held_still=subject.held_still, channels=channels, kind=subject.kind, layer_class=name)


def _by_kind(tensors: list[Tensor]) -> list[tuple[torch.dtype, list[Tensor]]]:
    """Part tensors by device and type, each part with the type to add it up in."""
    parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        parts.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    wide = (torch.float32, torch.float64)
    return [(dtype if dtype in wide else torch.float32, same) for (_, dtype), same in parts.items()]


def _writes(module: nn.Module) -> bool:
    """Say whether a layer without a counter has just written: torch's kernels leave no trace then."""
    return module.training and bool(getattr(module, "track_running_stats", True))


def _stamp(buffers: Mapping[str, Tensor | None], form: NormForm) -> tuple[int, int, int, int]:
    """Identify the contents of the statistics by torch's count of writes into a tensor; -1 where there is none.

    The counter is asked too, because torch's own kernels write into the statistics without being counted.
    """
    mean, count = buffers.get(form.mean), buffers.get(form.counter)
    return (id(mean), -1 if mean is None else mean._version, id(count), -1 if count is None else count._version)
