"""What the zoo tries on one model: surgery and the doctor, beside what torch, timm and ultralytics fuse themselves.

Changes are measured here and not read off the records: on data that no operation was shown, relative to the largest
value of each output.
"""

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from zoo_models import Architecture, batches, build, of_batch, prepare

import normkit
from normkit.anatomy import run
from normkit.errors import NormkitError

__all__ = ["try_all"]

Row = dict[str, Any]
_WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def try_all(architecture: Architecture, *, model: nn.Module | None = None) -> Row:
    """Try everything on one architecture and return what came out."""
    given = prepare(build(architecture), architecture) if model is None else model
    zoo = _Subject(given, architecture)
    row: Row = {"norms": len(of_batch(given)), "adjacent": len(zoo.adjacent), "rounding": zoo.rounding}
    for name, attempt in (
        ("convert", zoo.convert),
        ("fold", zoo.fold),
        ("recalibrate", zoo.recalibrate),
        ("freeze", zoo.freeze),
        ("torch", zoo.torchs),
        ("timm", zoo.timms),
        ("ultralytics", zoo.ultralytics),
    ):
        before = _fingerprint(given)
        began = time.process_time()
        row[name] = _attempted(attempt)
        row[name].setdefault("seconds", round(time.process_time() - began, 2))
        if not _equal(before, _fingerprint(given)):
            row[name]["error"] = "the given model was changed"
    # Last, since it measures the statistics anew.
    row["diagnose"] = _attempted(zoo.diagnose)
    return row


def _attempted(attempt: Callable[[], Row]) -> Row:
    try:
        return attempt()
    except NormkitError as error:
        return {"refused whole": f"{error}"[:300]}
    except Exception as error:  # whatever comes: it is told in the table
        return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}


class _Subject:
    """One model, prepared, with what it gives for data that no operation sees."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        self.example = batches(architecture, 1, 1)[0]
        self.fresh = batches(architecture, 7, 1)[0]
        self.own = self.outputs(model)
        self.exact_model = copy.deepcopy(model).double()
        try:
            self.exact = self.outputs(self.exact_model)
        except Exception:  # a model that does not run in float64 is compared in its own type
            self.exact = None
        self.rounding = None if self.exact is None else _change(self.exact, self.own)
        self.adjacent = _adjacent(model, self.example, architecture)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Run a model on the fresh data, in the type of its parameters."""
        dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
        with torch.no_grad():
            return _tensors(run(model, self.fresh.to(dtype), self.architecture.call))

    def changes(self, own: nn.Module, exact: nn.Module | None) -> Row:
        """Measure how far changed models are: in float64, and in the model's own type from the original in float64."""
        row: Row = {"change": _change(self.exact or self.own, self.outputs(own))}
        if exact is not None and self.exact is not None:
            row["exact"] = _change(self.exact, self.outputs(exact))
        return row

    def convert(self) -> Row:
        """Convert to ours and back to torch's."""
        call = self.architecture.call
        began = time.process_time()
        record = normkit.convert(self.model, "normkit", self.example, call=call)
        seconds = round(time.process_time() - began, 2)
        # Weights are carried over and not computed, so that the converted model is its own form in float64.
        exact = None if self.exact is None else copy.deepcopy(record.model).double()
        row = {"seconds": seconds, "done": len(record.touched), "fused": len(record.fused), **_refusals(record)}
        row |= self.changes(record.model, exact)
        back = normkit.convert(record.model, "torch").model  # compared below, bit for bit
        row["back"] = _change(self.own, self.outputs(back))
        row["names"] = list(back.state_dict()) == list(self.model.state_dict())
        return row

    def fold(self) -> Row:
        """Fold, and export the folded model."""
        call = self.architecture.call
        began = time.process_time()
        record = normkit.fold(self.model, self.example, call=call)
        seconds = round(time.process_time() - began, 2)
        exact = None
        if self.exact is not None:
            exact = normkit.fold(self.exact_model, self.example.double(), call=call).model
        row = {"seconds": seconds, "done": len(record.touched), **_refusals(record)}
        row["adjacent"] = len(self.adjacent & set(record.touched))
        row["apart"] = {path: why for path, why in record.refused.items() if path in self.adjacent}
        row["seen only"] = sum(block is None for block in record.known_from.values())
        row |= self.changes(record.model, exact)
        row["export"] = _attempted(lambda: self._export(record))
        return row

    def _export(self, record: Any) -> Row:
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            written = record.export(Path(folder) / "folded.pt2")
            program = torch.export.load(written).module()
        seconds = round(time.process_time() - began, 2)
        with torch.no_grad():
            found = _tensors(program(self.fresh))
        return {"change": _change(self.outputs(record.model), found), "seconds": seconds}

    def recalibrate(self) -> Row:
        """Measure statistics anew on a copy."""
        work = copy.deepcopy(self.model)
        record = normkit.recalibrate(work, batches(self.architecture, 0), call=self.architecture.call)
        return {"done": len(record.touched), **_refusals(record)}

    def freeze(self) -> Row:
        """Freeze a copy; training mode must leave its outputs and its statistics as they are."""
        work = copy.deepcopy(self.model)
        record = normkit.freeze(work)
        frozen = _change(self.own, self.outputs(work))
        before = [layer.mean.clone() for layer in of_batch(work)]
        # The flags and not train(), whose other effects (a detector's targets) are not of interest here.
        for layer in of_batch(work):
            layer.module.train()
        same = _change(self.own, self.outputs(work))
        moved = any(not torch.equal(mean, layer.mean) for mean, layer in zip(before, of_batch(work), strict=True))
        return {"done": len(record.touched), "change": max(frozen, same), "moved": moved, **_refusals(record)}

    def diagnose(self) -> Row:
        """Examine on data of the same kind as those on which the statistics are then measured."""
        row: Row = {}
        call = self.architecture.call
        normkit.recalibrate(self.model, batches(self.architecture, 0), call=call)
        began = time.process_time()
        diagnosis = normkit.diagnose(self.model, batches(self.architecture, 11), call=call)
        row["seconds"] = round(time.process_time() - began, 2)
        loud = [finding for finding in diagnosis.findings if finding.severity != "info"]
        row["loud"] = [[finding.check, len(finding.layers), finding.summary[:200]] for finding in loud]
        row["infos"] = sorted({finding.check for finding in diagnosis.findings if finding.severity == "info"})
        row["lines"] = len(str(diagnosis).splitlines())
        return row

    def torchs(self) -> Row:
        """Fuse as torch.fx's own optimization does."""
        from torch.fx.experimental.optimization import fuse

        return self._of_others(fuse(copy.deepcopy(self.model)))

    def timms(self) -> Row:
        """Reparameterize as timm does."""
        if self.architecture.library != "timm":
            return {"absent": True}
        from timm.utils.model import reparameterize_model

        return self._of_others(reparameterize_model(copy.deepcopy(self.model)))

    def ultralytics(self) -> Row:
        """Fuse as ultralytics does."""
        if self.architecture.library != "ultralytics":
            return {"absent": True}
        work: Any = copy.deepcopy(self.model)
        return self._of_others(work.fuse(verbose=False))

    def _of_others(self, made: nn.Module) -> Row:
        norms = len(of_batch(self.model))
        return {"done": norms - len(of_batch(made)), **self.changes(made, None)}


def _adjacent(model: nn.Module, example: Tensor, architecture: Architecture) -> set[str]:
    """Name the norms that are given the very output of a layer with a weight, or give it its very input.

    Told by the tensors of one run, apart from how ``fold`` finds its pairs.
    """
    # By the object and its version: what wrote a tensor in place in between stands between the two.
    kept: list[Tensor] = []
    outputs: set[tuple[int, int]] = set()
    inputs: set[tuple[int, int]] = set()
    of_norms: dict[str, list[tuple[tuple[int, int], tuple[int, int]]]] = {}
    hooks = []

    def state(tensor: Tensor) -> tuple[int, int]:
        kept.append(tensor)  # so that no other tensor gets its place meanwhile
        return id(tensor), tensor._version

    def given_to(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            inputs.add(state(args[0]))

    def made_by(module: nn.Module, args: Any, output: Any) -> None:
        outputs.add(state(output))

    norms = {id(layer.module): layer.path for layer in of_batch(model)}
    with_tail = {layer.path for layer in of_batch(model) if layer.tail}  # what they give is not the norm's output
    before: dict[int, tuple[int, int]] = {}

    def given_to_norm(module: nn.Module, args: Any) -> None:
        before[id(module)] = state(args[0])

    def made_by_norm(module: nn.Module, args: Any, output: Any) -> None:
        of_norms.setdefault(norms[id(module)], []).append((before[id(module)], state(output)))

    for module in model.modules():
        if id(module) in norms:
            hooks += [module.register_forward_pre_hook(given_to_norm), module.register_forward_hook(made_by_norm)]
        elif isinstance(module, _WEIGHTED):
            hooks += [module.register_forward_pre_hook(given_to), module.register_forward_hook(made_by)]
    with torch.no_grad():
        run(model, example, architecture.call)
    for hook in hooks:
        hook.remove()
    return {
        path
        for path, calls in of_norms.items()
        if all(given in outputs for given, _ in calls)
        or (path not in with_tail and all(made in inputs for _, made in calls))
    }


def _refusals(record: Any) -> Row:
    """Count the reasons of a record: what names layers and numbers is left out."""
    return {"refused": dict(Counter(str(reason) for reason in record.refused.values()))}


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output, however it is packed."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _change(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest difference relative to the largest value of its output; infinite where the forms differ."""
    if [value.shape for value in first] != [value.shape for value in second]:
        return float("inf")
    largest = 0.0
    for one, other in zip(first, second, strict=True):
        if one.numel() and (one.is_floating_point() or one.is_complex()):
            wide, changed = one.double(), other.double()
            scale = float(wide.abs().max())
            largest = max(largest, float((wide - changed).abs().max()) / (scale or 1.0))
    return largest


def _fingerprint(model: nn.Module) -> Any:
    state = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, dict(model.state_dict()))
    return state, [module.training for module in model.modules()], [type(module) for module in model.modules()]


def _equal(first: Any, second: Any) -> bool:
    same = first[0].keys() == second[0].keys() and first[1:] == second[1:]
    return same and all(torch.equal(value, second[0][name]) for name, value in first[0].items())
