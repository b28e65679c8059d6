"""The form of a claim, and how a request becomes a plan of cells.

A claim is one file under ``claims/`` that defines ``CLAIM``. It holds words (what is claimed, by whom, the prediction,
the rule, what each verdict means), settings, and four functions: which cells to run, what to measure in one, how to
judge the rows, and what to show.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import ArgumentError
from ..spelling import alternatives
from .charts import Chart, Table
from .data import DATASETS, Dataset
from .networks import known_norms
from .own import is_own
from .training import TrainingSettings
from .verdicts import Outcome, Rule, Verdict

__all__ = ["Cell", "Claim", "Plan", "Request", "Row", "Value", "concerning", "plan"]

# What is the same for every claim that says nothing of its own.
MEANING: Mapping[Outcome, str] = {
    "no difference worth having": "The whole interval lies inside the band that was set beforehand: whatever the "
    "difference is, it is too small to choose by.",
    "inconclusive": "The interval holds the rule's line, or too few seeds were run. More seeds make it narrower; the "
    "rule stays.",
    "not testable here": "What the claim takes for granted is not shown on these data with these settings, so that its "
    "question has no answer here.",
}

# One line of results.jsonl.
Row = Mapping[str, Any]
Value = str | int | float


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line; ``None`` leaves the choice to the claim."""

    data: str | None = None
    data_dir: Path | None = None
    norms: tuple[str, ...] | None = None
    seeds: int | None = None
    epochs: int | None = None
    device: str = "cpu"
    processes: int = 1
    network: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The smallest piece of work that is run, kept and resumed: one network, one seed.

    Attributes:
        claim: the claim's id.
        data: the data set's name.
        norm: ``"none"`` or a name of the catalog.
        seed: of the initial weights and of the order of the images.
        device: ``"cpu"`` or ``"cuda"``.
        settings: how the network is trained.
        variant: whatever else the claim varies, by name: a rate, a batch size, a position.
        network: the function that builds the network, as ``"package.module:name"``; ``None`` for the claim's own.
    """

    claim: str
    data: str
    norm: str
    seed: int
    device: str
    settings: TrainingSettings
    variant: tuple[tuple[str, Value], ...] = ()
    network: str | None = None

    @property
    def key(self) -> str:
        """The cell's name in results, logs and messages."""
        variant = "".join(f"/{name}={value}" for name, value in self.variant)
        return f"{self.claim}/{self.data}/{self.norm}{variant}/seed={self.seed}"

    @property
    def steps(self) -> int:
        """How many measurements the cell reports as progress."""
        return self.settings.epochs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A claim's run with every choice made.

    Attributes:
        claim: the claim's id.
        data: the data set's name.
        norms: the norms that take part.
        seeds: 0, 1, and so on.
        device: ``"cpu"`` or ``"cuda"``.
        settings: how the networks are trained.
        variants: what else the claim varies.
        network: the function that builds the network, as ``"package.module:name"``; ``None`` for the claim's own.
        design: the number of the claim's design.
    """

    claim: str
    data: str
    norms: tuple[str, ...]
    seeds: tuple[int, ...]
    device: str
    settings: TrainingSettings
    variants: tuple[tuple[tuple[str, Value], ...], ...] = ((),)
    network: str | None = None
    design: int = 1

    def cells(self) -> tuple[Cell, ...]:
        """Return all cells in the order in which results are kept: by variant, norm, seed."""
        return tuple(
            Cell(
                claim=self.claim, data=self.data, norm=norm, seed=seed, device=self.device,
                settings=self.settings, variant=variant, network=self.network,
            )
            for variant in self.variants
            for norm in self.norms
            for seed in self.seeds
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Return the plan as JSON holds it."""
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return record

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change when any choice does."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim made for batch normalization, and how it is put to the test.

    Attributes:
        id: the word that the command line takes.
        number: its number in the list of claims, such as ``"E1"``.
        title: the claim in a few words.
        statement: the claim in a sentence.
        source: who makes it, and where.
        prediction: what the claim predicts, with a number.
        question: the one rule that decides, which the title asks; fixed before the data.
        premises: what must be shown before the question means anything.
        details: rules for what else is measured; they never change the verdict.
        kind: ``"formula"`` for a check of algebra or of this library, which is not counted among the empirical claims.
        design: its number goes up when what is measured changes; rows of another design are not judged.
        settings_rule: by which rule the settings were chosen.
        meaning: what each verdict means, in two sentences.
        data: the data sets it can run on, the default first.
        norms: the norms compared by default.
        seeds: how many by default.
        settings: how the networks are trained by default, by data set.
        variants: what else is varied.
        sets: the settings of training that a variant sets itself under another name than theirs.
        rates: the grid from which each side's learning rate is chosen; empty where nothing is searched.
        keeps_last: whether each cell's last measurement alone is kept: for nets that are trained for many epochs, of
            which verdict and figures read the last.
        any_norm: whether other norms can be put in the place of these.
        own_network: whether a reader's network and data can be put in the place of the claim's.
        measure: runs one cell and yields its rows' measurements.
        judge: applies the rule, written in the claim's file, to the rows.
        show: describes figures and tables.
    """

    id: str
    number: str
    title: str
    statement: str
    source: str
    prediction: str
    question: Rule
    settings_rule: str
    meaning: Mapping[Outcome, str]
    data: tuple[str, ...]
    norms: tuple[str, ...]
    seeds: int
    settings: Mapping[str, TrainingSettings]
    measure: Callable[[Cell, Dataset], Iterator[dict[str, Any]]]
    judge: Callable[[Sequence[Row]], Verdict]
    show: Callable[[Sequence[Row]], tuple[Chart | Table, ...]]
    premises: tuple[Rule, ...] = ()
    details: tuple[Rule, ...] = ()
    kind: Literal["empirical", "formula"] = "empirical"
    design: int = 1
    variants: tuple[tuple[tuple[str, Value], ...], ...] = ((),)
    sets: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    keeps_last: bool = False
    any_norm: bool = True
    own_network: bool = False

    @property
    def trains(self) -> bool:
        """Whether networks are trained, so that a number of epochs means something."""
        return all(settings.optimizer != "none" for settings in self.settings.values())

    def means(self, outcome: Outcome) -> str:
        """Return what this outcome means for the claim, or what it always means where the claim adds nothing."""
        return self.meaning.get(outcome, MEANING.get(outcome, ""))


def concerning(claim: Claim, request: Request) -> Request:
    """Return the part of a request for many claims that concerns this one."""
    return replace(
        request,
        norms=request.norms if claim.any_norm else None,
        epochs=request.epochs if claim.trains else None,
    )


def plan(claim: Claim, request: Request) -> Plan:
    """Fill a request with the claim's own choices.

    Raises:
        ArgumentError: an unknown data set or norm, a data set the claim does not run on, a number below 1, or norms or
            epochs for a claim in which they are fixed.
    """
    data = request.data or claim.data[0]
    _check_data(claim, data, request.network)
    norms = claim.norms if request.norms is None else request.norms
    _check_norms(norms)
    seeds = claim.seeds if request.seeds is None else request.seeds
    settings = replace(claim.settings[claim.data[0] if is_own(data) else data], **request.training)
    epochs = settings.epochs if request.epochs is None else request.epochs
    for option, number in (("seeds", seeds), ("epochs", epochs)):
        if number < 1:
            raise ArgumentError(f"--{option} {number}: expected 1 or more")
    _check_fixed(claim, norms, epochs)
    if settings.batch_size % request.processes:
        raise ArgumentError(
            f"{request.processes} processes cannot share batches of {settings.batch_size} evenly; start as many as "
            "divide it"
        )
    return Plan(
        claim=claim.id,
        data=data,
        norms=norms,
        seeds=tuple(range(seeds)),
        device=request.device,
        settings=replace(settings, epochs=epochs, processes=request.processes),
        variants=claim.variants,
        network=request.network,
        design=claim.design,
    )


def _check_data(claim: Claim, data: str, network: str | None) -> None:
    if not is_own(data) and data not in DATASETS:
        raise ArgumentError(f"unknown data set {data!r}; {alternatives(data, DATASETS)}")
    if not is_own(data) and data not in claim.data:
        yours = "; and on your own data, with --settings" if claim.own_network else ""
        raise ArgumentError(f"claim {claim.id} does not run on {data}; it runs on: {', '.join(claim.data)}{yours}")
    if (is_own(data) or network is not None) and not claim.own_network:
        raise ArgumentError(
            f"claim {claim.id} is about its own network and data sets; `normkit lab list` marks the claims that take "
            "yours"
        )


def _check_norms(norms: tuple[str, ...]) -> None:
    for norm in norms:
        if norm not in known_norms():
            raise ArgumentError(f"unknown normalization {norm!r}; {alternatives(norm, known_norms())}")
    if not norms or len(set(norms)) < len(norms):
        raise ArgumentError(f"--norms {','.join(norms)}: expected at least one name, and each only once")


def _check_fixed(claim: Claim, norms: tuple[str, ...], epochs: int) -> None:
    """Refuse what would change a comparison that has no such choice."""
    if not claim.any_norm and norms != claim.norms:
        raise ArgumentError(
            f"--norms {','.join(norms)}: claim {claim.id} is about {','.join(claim.norms)} alone; leave --norms out"
        )
    if not claim.trains and epochs != 1:
        raise ArgumentError(f"--epochs {epochs}: claim {claim.id} trains nothing; leave --epochs out")
