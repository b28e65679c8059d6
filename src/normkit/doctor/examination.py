"""All that a check may look at."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import nn
from torch.optim import Optimizer

from .findings import Finding, Gap
from .measurements import BatchPlan, Company, Lengthened, Measured
from .ranks import RankState
from .subjects import Subject

__all__ = ["Beside", "Check", "Examination", "Needs"]

Needs = Literal["state", "model", "batches", "ranks", "labels"]


class Beside(NamedTuple):
    """What stands beside a layer.

    Attributes:
        neighbour: the layer that could absorb it.
        reason: what is against that, or None.
        before: the convolution or linear layer that gives it its input.
    """

    neighbour: str
    reason: str | None
    before: str


@dataclass(frozen=True, kw_only=True)
class Examination:
    """One model, or one file of weights, and what was measured of it.

    Attributes:
        subjects: the normalization layers.
        model: the model, or None for a file.
        optimizer: the optimizer that trains it, where it was given.
        measured: moments of the layers' inputs by layer, empty without batches.
        in_use: the same in evaluation, every layer with its own statistics, where ``measured`` shows a difference.
        plan: how many samples the batches hold.
        lengthened: how far more padding of a layer's own input moves its output before it, where there is padding.
        company: outputs of one sample alone and among others, in evaluation mode.
        awake: names of the layers that ``model.train()`` would set to training.
        asleep: names of the layers that ``model.eval()`` leaves in training.
        resting: of layers in training, the outermost container around each that is in evaluation mode.
        rectified: names of the layers whose output goes straight into an activation that is zero below zero.
        learning_before: names of the layers before which parameters learn.
        unheard: names of the layers that no batch reaches and on whose statistics no output depends.
        weighted_before: names of the layers before which there are parameters at all, learning or not.
        pairs: layers with the neighbours that could absorb them; None for a model without a trace.
        ranks: what every process holds, where they were compared.
        gap: accuracy in evaluation and with the batch's statistics, where labels were given.
        overflowed: where the output in evaluation is not finite on a finite batch, the first layer that makes it so,
            or ``""`` where none does; else None.
        spoiled: how many batches hold NaN or an infinity, and of how many.
        unexplained: what of that gap no finding explains and chance does not; 0 where it does.
    """

    subjects: tuple[Subject, ...]
    model: nn.Module | None = None
    optimizer: Optimizer | None = None
    measured: Mapping[str, Measured] = field(default_factory=dict)
    in_use: Mapping[str, Measured] = field(default_factory=dict)
    plan: BatchPlan | None = None
    lengthened: Mapping[str, Lengthened] = field(default_factory=dict)
    company: Company | None = None
    awake: frozenset[str] = frozenset()
    asleep: frozenset[str] = frozenset()
    resting: Mapping[str, str] = field(default_factory=dict)
    rectified: frozenset[str] = frozenset()
    learning_before: frozenset[str] = frozenset()
    unheard: frozenset[str] = frozenset()
    weighted_before: frozenset[str] = frozenset()
    pairs: Mapping[str, Beside] | None = None
    ranks: tuple[RankState, ...] = ()
    gap: Gap | None = None
    unexplained: float = 0.0
    overflowed: str | None = None
    spoiled: tuple[int, int] = (0, 0)

    @property
    def layers_judged(self) -> int:
        """How many layers have statistics of their own and data to compare them with."""
        judged = sum(s.tracks and s.is_batch and s.name in self.measured for s in self.subjects)
        return max(judged, 1)

    def subject(self, name: str) -> Subject:
        """Return the layer of this name."""
        return next(subject for subject in self.subjects if subject.name == name)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One of the questions that the doctor asks.

    Attributes:
        name: the id that findings carry.
        question: what it asks, in one line.
        needs: what it cannot do without.
        examine: yields the findings.
        innocent: cases in which the finding is true and nothing is wrong; ``waive=`` is for these.
    """

    name: str
    question: str
    needs: Needs
    examine: Callable[[Examination], Iterable[Finding]]
    innocent: tuple[str, ...]
