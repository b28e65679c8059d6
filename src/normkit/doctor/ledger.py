"""The buffer ledger: who wrote which statistics, in which step, from how many values, and what that means."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .findings import Diagnosis, Finding, LayerRow, Severity, sort_findings, worst
from .join import join_findings
from .thaws import thawed_finding
from .waivers import Waiver, set_aside

__all__ = ["KEPT_WRITES", "LayerLedger", "Ledger", "Write", "Writer"]

Writer = Literal["forward", "recompute", "probe", "renewal", "outside"]

KEPT_WRITES = 10_000  # single writes that are kept; counts are kept of all
_CHECKS = ("nonfinite", "freeze-leak", "update-count", "rank-agreement")


class Write(NamedTuple):
    """One change of a layer's running statistics.

    Attributes:
        step: the optimizer step under way, from 1.
        layer: the layer's path.
        writer: a ``"forward"``, the ``"recompute"`` of checkpointing, a ``"probe"`` (a training forward without
            gradients), a ``"renewal"`` (a forward while momentum is None in a layer that began with one: statistics
            are measured anew, as SWA and ``update_bn`` do), or ``"outside"`` any forward (loading, averaging,
            broadcasting).
        place: the line of the program that called the model.
        samples: of the batch; 0 where unknown.
        values: per channel; 0 where unknown.
    """

    step: int
    layer: str
    writer: Writer
    place: str
    samples: int
    values: int


@dataclass
class LayerLedger:
    """What happened to one layer.

    Attributes:
        held_still: no part of its affine learns.
        channels: the number of channels.
        kind: the layer's kind.
        layer_class: its class.
        writers: how often each kind of writer wrote.
        per_step: how many steps had so many writes by forwards.
        this_step: writes by forwards in the step under way.
        places: the lines that wrote, by writer.
        nonfinite_step: the first step after which its statistics were not finite.
        thawed: what :func:`normkit.freeze` holds still and something has written to all the same.
        fewest_values: the smallest number of values per channel that was written from.
    """

    held_still: bool
    channels: int | None
    kind: str
    layer_class: str = ""
    writers: Counter[Writer] = field(default_factory=Counter)
    per_step: Counter[int] = field(default_factory=Counter)
    this_step: int = 0
    places: dict[Writer, Counter[str]] = field(default_factory=dict)
    nonfinite_step: int | None = None
    thawed: tuple[str, ...] = ()
    fewest_values: int | None = None


class Ledger:
    """What :func:`normkit.watch` wrote down.

    Attributes:
        writes: the last writes, one by one.
        layers: the sums by layer.
        steps: optimizer steps that were taken.
        skipped: steps whose gradients were dropped, as a gradient scaler does after an overflow.
        backwards: backward passes.
        across_ranks: what was found where processes were compared.
    """

    def __init__(self, layers: Mapping[str, LayerLedger], waivers: list[Waiver]) -> None:
        self.layers = dict(layers)
        self.writes: deque[Write] = deque(maxlen=KEPT_WRITES)
        self.steps = 0
        self.skipped = 0
        self.backwards = 0
        self.across_ranks: tuple[Finding, ...] = ()
        self._waivers = waivers

    def record(self, write: Write) -> None:
        """Write one change down."""
        _, name, writer, place, _, values = write
        layer = self.layers[name]
        self.writes.append(write)
        layer.writers[writer] += 1
        places = layer.places.get(writer)
        if places is None:
            places = layer.places[writer] = Counter()
        places[place] += 1
        if writer == "forward":
            layer.this_step += 1
        if values and (layer.fewest_values is None or values < layer.fewest_values):
            layer.fewest_values = values

    def close_step(self) -> None:
        """Count the writes of the step that ends here."""
        self.steps += 1
        for layer in self.layers.values():
            layer.per_step[layer.this_step] += 1
            layer.this_step = 0

    def findings(self) -> tuple[Finding, ...]:
        """Return what is wrong, worst first; waived findings are left out."""
        return self.diagnosis().findings

    def diagnosis(self) -> Diagnosis:
        """Return findings and a table of the layers, in the form of :func:`normkit.diagnose`."""
        found = [finding for name, layer in self.layers.items() for finding in self._layer_findings(name, layer)]
        kept, waived = set_aside([*found, *self._step_findings(), *self.across_ranks], self._waivers)
        classes = {name: layer.layer_class for name, layer in self.layers.items()}
        return Diagnosis(
            findings=sort_findings(join_findings(kept, list(self.layers), classes), _CHECKS),
            layers=tuple(self._row(name, layer, kept) for name, layer in self.layers.items()),
            waived=waived,
            notes=() if self.steps else ("no optimizer step was seen: give watch the model that the optimizer trains",),
        )

    def __str__(self) -> str:
        """Return the diagnosis as text."""
        return str(self.diagnosis())

    def _layer_findings(self, name: str, layer: LayerLedger) -> Iterator[Finding]:
        if layer.nonfinite_step is not None:
            yield _nonfinite(name, layer)
        if layer.thawed:
            yield thawed_finding(name, layer.thawed)
        if layer.held_still and layer.writers["forward"] + layer.writers["recompute"] > 0:
            yield _leak(name, layer, self.steps)
        if layer.writers["recompute"]:
            yield _recompute(name, layer, self.steps)
        if layer.writers["probe"]:
            yield _probe(name, layer)
        elif self.steps:
            yield from self._repeated(name, layer)
        if layer.writers["renewal"]:
            yield _renewal(name, layer)
        if layer.writers["outside"]:
            yield _outside(name, layer)

    def _repeated(self, name: str, layer: LayerLedger) -> Iterator[Finding]:
        """Tell accumulation (every layer k times, k backwards) from a layer that alone is called again."""
        busy = Counter({count: steps for count, steps in layer.per_step.items() if count})
        if not busy or (usual := busy.most_common(1)[0][0]) == max(busy) == 1:
            return
        others = {max(other.per_step, default=0) for other in self.layers.values() if other.writers["forward"]}
        accumulated = len(others) == 1 and self.backwards >= usual * self.steps and usual > 1
        severity: Severity = "info" if accumulated else "warning"
        extra = sum(steps for count, steps in busy.items() if count > usual)
        yield _count_finding(
            name,
            layer,
            severity,
            f"updated {usual} times per step" + (f", more often in {extra} of {self.steps} steps" if extra else ""),
            {"per_step": {str(count): steps for count, steps in sorted(busy.items())}, "backwards": self.backwards},
            ("gradient accumulation: every micro-batch moves the statistics",)
            if accumulated
            else (
                "extra forwards in training mode: a summary, a search for a rate, a second view",
                "the module is called several times in a forward, or sees several populations in turn",
                "a step was skipped and its batch counted all the same",
            ),
            remedy=_ACCUMULATED.replace("K", str(usual)) if accumulated else _HELD,
        )

    def _step_findings(self) -> Iterator[Finding]:
        if self.skipped:
            yield Finding(
                check="update-count",
                layer="",
                severity="info",
                summary=f"{self.skipped} steps were skipped while {self.steps} were taken; the statistics took "
                "their batches all the same",
                evidence={"skipped": self.skipped, "steps": self.steps},
                causes=("a gradient scaler found an overflow and dropped the step",),
                remedy="normkit.recalibrate(model, batches)  # if statistics suffered",
                proof='not normkit.diagnose(model, batches).of("drift")',
            )

    def _row(self, name: str, layer: LayerLedger, findings: list[Finding]) -> LayerRow:
        numbers: dict[str, Any] = {
            writer: layer.writers[writer] for writer in ("forward", "recompute", "probe", "renewal", "outside")
        }
        return LayerRow(
            name=name,
            kind=layer.kind,
            channels=layer.channels,
            layer_class=layer.layer_class,
            numbers=numbers | {"steps": self.steps, "fewest_values": layer.fewest_values},
            worst=worst(finding for finding in findings if finding.layer == name),
        )


_HELD = "with normkit.hold_statistics(model): ...  # around every forward that is not a training step"
# K updates by this momentum forget as much as one by the old.
_ACCUMULATED = (
    "for name in {layers}: layer = model.get_submodule(name); layer.momentum = 1 - (1 - layer.momentum) ** (1 / K)"
)


def _count_finding(
    name: str,
    layer: LayerLedger,
    severity: Severity,
    summary: str,
    evidence: dict[str, Any],
    causes: tuple[str, ...],
    remedy: str = _HELD,
) -> Finding:
    places = {writer: places.most_common(2) for writer, places in layer.places.items()}
    lines = [f"{writer} from {place}" for writer, common in places.items() for place, _ in common]
    return Finding(
        check="update-count",
        layer=name,
        severity=severity,
        summary=summary,
        evidence=evidence | {"writers": lines},
        causes=causes,
        remedy=remedy,
        proof="with normkit.watch(model) as ledger: ...  # a few steps; then: ledger.diagnosis().healthy",
    )


def _recompute(name: str, layer: LayerLedger, steps: int) -> Finding:
    return _count_finding(
        name,
        layer,
        "warning",
        "the recomputation of activation checkpointing moved the statistics a second time in every step",
        {"forward": layer.writers["forward"], "recompute": layer.writers["recompute"], "steps": steps},
        ("checkpoint() runs the forward again in the backward, in training mode",),
        "checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), normkit.hold_statistics(block)))",
    )


def _probe(name: str, layer: LayerLedger) -> Finding:
    place = layer.places["probe"].most_common(1)[0][0]
    return _count_finding(
        name,
        layer,
        "warning",
        f"{layer.writers['probe']} forwards without gradients moved the statistics, called from {place}",
        {"probes": layer.writers["probe"], "forward": layer.writers["forward"]},
        (
            "torch.no_grad() stops gradients, not statistics: a summary, a validation or a teacher in training mode",
            "statistics adapted on purpose, as test-time adaptation does",
        ),
        "with normkit.hold_statistics(model): ...  # or model.eval() before it",
    )


def _outside(name: str, layer: LayerLedger) -> Finding:
    return _count_finding(
        name,
        layer,
        "info",
        f"the statistics were written {layer.writers['outside']} times outside any forward",
        {"outside": layer.writers["outside"]},
        ("a state was loaded", "weights were averaged", "DistributedDataParallel broadcast the buffers of rank 0"),
    )


def _renewal(name: str, layer: LayerLedger) -> Finding:
    return _count_finding(
        name,
        layer,
        "info",
        f"the statistics were measured anew by {layer.writers['renewal']} forwards with momentum None",
        {"renewal": layer.writers["renewal"]},
        ("weights were averaged, and update_bn or a callback of SWA gives them statistics of their own",),
        "normkit.recalibrate(model, batches)  # does the same exactly, from any batches",
    )


def _leak(name: str, layer: LayerLedger, steps: int) -> Finding:
    moved = layer.writers["forward"] + layer.writers["recompute"]
    return Finding(
        check="freeze-leak",
        layer=name,
        severity="error",
        summary=f"the affine part is frozen, and the statistics moved {moved} times in {steps} steps",
        evidence={"writes": moved, "steps": steps, "writers": list(layer.places.get("forward", {}))[:4]},
        causes=(
            "requires_grad_(False) reaches parameters only; the statistics follow train() and eval()",
            "eval() was called once, and train() of the whole model undid it",
        ),
        remedy="normkit.freeze(model, where={layer})",
        proof="with normkit.watch(model) as ledger: ...  # a few steps; then: ledger.diagnosis().healthy",
    )


def _nonfinite(name: str, layer: LayerLedger) -> Finding:
    return Finding(
        check="nonfinite",
        layer=name,
        severity="error",
        summary=f"the statistics stopped being finite in step {layer.nonfinite_step}",
        evidence={"step": layer.nonfinite_step, "writers": list(layer.places.get("forward", {}))[:4]},
        causes=("that step's batch held NaN or overflowed", "a batch of one value per channel"),
        remedy="normkit.repair(model, batches=batches)",
        proof='not normkit.diagnose(model).of("nonfinite", {layer})',
    )
