"""Judge a changed copy of a model: in float64 on both sides, and in the model's own type by the model's own rounding.

Whether an operation is right is a question of algebra, which float64 answers: both models run in it, and right ones
agree to 1e-9. What a float32 copy loses besides is rounding, and how much of that is fair only the model can say: a
deep network multiplies the last bit of its weights by thousands. So it is measured on the given model, never assumed.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Call, preserved
from ..anatomy.batches import tensors
from ..errors import ArgumentError, SurgeryError
from ..printable import first_line
from .entries import Entries, Entry, own_copy
from .left_behind import LeftBehind
from .other_values import OtherValues
from .outputs import (
    Taps,
    apart,
    as_double,
    difference,
    has_numbers,
    jittered,
    largest_difference,
    measured,
    outputs_of,
    plain,
)
from .sizes import other_sizes
from .transaction import copied

__all__ = [
    "Compare",
    "Judge",
    "Verdict",
    "change_between",
    "check_judgement",
    "entered",
]

Compare = Callable[[Any, Any], float]

# Two float64 computations of one function differ by the order of their additions, 1e-16 each.
_EXACT = 1e-9
# How far a changed model may be from the original in float64, relative to the largest output, if the original's own
# rounding is not larger still. In the narrow types a folded weight is rounded once more than the two it replaces.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# A model that makes more of a move of its weights by 1e-13 is not computed by float64 either.
_MOST_NOISE = 1e-6
# How many times the original's own rounding a changed model may be off: both are maxima of a few random numbers.
ROUNDINGS = 10


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How far a changed model is from the original; all numbers are relative to the largest output.

    Attributes:
        exact: with both computed in float64; None where the original does not run in it.
        own: the changed model in its own type, from the original in float64; None where its outputs cannot be compared
            (a detector finds other boxes once the last bit differs).
        rounding: the original in its own type, from itself in float64.
        wrong: what is wrong, in words; None where nothing is.
        is_rounding: float64 found nothing wrong; in the model's own type too much is lost.
        fails: what the changed model's code raised; None where it ran.
    """

    exact: float | None
    own: float | None
    rounding: float
    wrong: str | None = None
    is_rounding: bool = False
    fails: str | None = None

    @property
    def change(self) -> float:
        """The change of the model that is handed out."""
        return self.own if self.own is not None else self.exact if self.exact is not None else float("inf")

    def __str__(self) -> str:
        """Say how it was judged."""
        exact = "it does not run in float64" if self.exact is None else f"{self.exact:.2g} in float64"
        if self.exact is not None and self.exact > _EXACT:
            exact += " (as much as its own computation is worth there, or as tolerance= allows)"
        own = "not comparable in its own type" if self.own is None else f"{self.own:.2g} in its own type"
        return f"largest change: {exact}, {own}, where the given model's own rounding is {self.rounding:.2g}"


class Judge:
    """Compares changed copies of one model with it, on an example and on other sizes of it.

    Args:
        model: what is right; it is not changed.
        example: one batch, of any form.
        call: ``lambda model, batch: ...``, where the example does not simply go into the model.
        tolerance: the largest relative change allowed in float64 and in the model's own type, whichever way it was
            come by; without it 1e-9, and 1e-5, 2e-3 and 2e-2 in float32, float16 and bfloat16 or, where that is more,
            ten times the model's own rounding.
        compare: ``lambda first, second: ...``, which returns how far two outputs of the model are from each other, for
            outputs that are sorted, nested or of varying number.
        sizes: how many other sizes are tried.
        entries: other ways into the model's code, which are to give the same too; those that it does not take are left.
        values: whether it is compared on other values and on long samples too, where its code may branch.
        is_block: modules on which forward is to leave the same tensors too; None looks at none.

    Raises:
        ArgumentError: the tolerance is no number, negative or not finite, or the example holds no sample.
        SurgeryError: the output holds no tensor, or no finite number, so that nothing can be compared.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        call: Call | None = None,
        *,
        tolerance: float | None = None,
        compare: Compare | None = None,
        sizes: int = 1,
        entries: Entries | None = None,
        values: bool = False,
        is_block: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        check_judgement(example, tolerance)
        self.model, self.call, self._compare = model, call, compare
        self._own = [outputs_of(model, example, call)]
        others = other_sizes(model, example, call, most=sizes)
        self.examples = [example, *(other for other, _, _ in others)]
        self.sizes = tuple(words for _, words, _ in others)
        self._own += [output for _, _, output in others]
        self._exact_model = copied(model).double()
        self._exact = self._in_float64()
        self._seen: dict[str, list[tuple[Tensor, float]]] = {}
        self._is_something()
        self._tolerance = tolerance
        self._rounding = [
            measured(self._change, first, second) for first, second in zip(self.reference, self._own, strict=True)
        ]
        self._entered: list[_Entered] = []
        self.entries = self._enter(entries or Entries())
        named = ("the example", *(f"the example in {words}" for words in self.sizes))
        varied = list(zip(self.examples, named, strict=True)) if values else []
        judged = self.model if self._exact is None else self._exact_model
        floor, exactly = self._allowed() if self._exact is None else max(_EXACT, tolerance or 0.0), self.runs_in_float64
        self.values = OtherValues(judged, varied, call, self._change, floor, exactly=exactly)
        blocks = is_block or (lambda module: False)
        self._left = LeftBehind(judged, example, call, floor, exactly=exactly, is_block=blocks)

    @property
    def runs_in_float64(self) -> bool:
        """Whether the model runs in float64."""
        return self._exact is not None

    @property
    def reference(self) -> list[Any]:
        """The outputs that everything is compared with."""
        return self._own if self._exact is None else self._exact

    @property
    def words(self) -> str:
        """Say on what is judged."""
        if not self.sizes:
            return "verified on the size of the example alone: the model takes no other size of it"
        return f"verified on the example and on {_listed(self.sizes)}"

    def __call__(self, changed: nn.Module, exactly: nn.Module | None = None, sites: Sequence[str] = ()) -> Verdict:
        """Judge a changed copy; one whose code fails, since it asks a layer for what it had, is wrong.

        Args:
            changed: the copy, in the model's own type.
            exactly: the same in float64, where that is more than ``changed.double()``: what was folded in float64 has
                not been rounded.
            sites: layers whose outputs are to be the same too, in float64: the model's own output may be zero, or
                saturated, whatever they give.
        """
        try:
            return self._judged(changed, exactly, sites)
        except SurgeryError:
            raise
        except Exception as error:  # whatever the model's code raises where a layer is another
            fails = f"{type(error).__name__}: {first_line(error)[:200]}"
            return Verdict(exact=None, own=None, rounding=0.0, wrong=f"it fails: {fails}", fails=fails)

    def _judged(self, changed: nn.Module, exactly: nn.Module | None, sites: Sequence[str]) -> Verdict:
        exact, in64 = None, changed
        if self._exact is not None:
            in64 = copied(changed).double() if exactly is None else exactly
            with Taps(in64, sites) as taps:
                exact = self._largest(self._exact, self._outputs64(in64))
            exact = max(exact, self._change_at(taps))
            if not self._is_exact(exact):
                wrong = f"it changes the output by {exact:.3g} where both are computed in float64"
                return Verdict(exact=exact, own=None, rounding=self._largest_rounding(), wrong=wrong)
        otherwise = self._against_entries(changed, exactly) or self._left.against(in64) or self.values.against(in64)
        if otherwise is not None:
            return Verdict(exact=exact, own=None, rounding=self._largest_rounding(), wrong=otherwise)
        own = self._own_change(changed)
        allowed = self._allowed()
        times = ROUNDINGS if self._tolerance is None else 0
        if own is not None and not own <= max(allowed, times * self._largest_rounding()):
            rounding = max(self._largest_rounding(), self._weights_rounding() if times else 0.0)
            if not own <= max(allowed, times * rounding):
                said = f"{allowed:.3g} or {ROUNDINGS} times the model's own rounding, {rounding:.3g},"
                if not times:
                    said = f"tolerance={allowed:.3g}"
                wrong = f"it changes the output by {own:.3g} in the model's own type; {said} is allowed"
                return Verdict(exact=exact, own=own, rounding=rounding, wrong=wrong, is_rounding=exact is not None)
        if own is None and exact is None:
            raise SurgeryError("the outputs differ in number or shape, so that nothing can be compared; give compare=")
        return Verdict(exact=exact, own=own, rounding=self._largest_rounding())

    def _is_exact(self, change: float) -> bool:
        """Say whether a change in float64 is none: within the tolerance, or what the model is worth there."""
        if self._tolerance is not None:
            return change <= self._tolerance
        return change <= _EXACT or change <= self._noise()

    def _in_float64(self) -> list[Any] | None:
        """Return the outputs in float64, or None where the model does not run in it."""
        try:
            return self._outputs64(self._exact_model)
        except Exception:  # whatever the model's code raises in a type that it was not written for
            return None

    def _outputs64(self, model: nn.Module) -> list[Any]:
        return [outputs_of(model, as_double(example), self.call) for example in self.examples]

    def _enter(self, entries: Entries) -> Entries:
        """Take the other ways into the model, twice: what fails, or differs from itself, is no judge."""
        failed = []
        for entry in entries.found:
            for exactly in (True, False)[0 if self._exact is not None else 1 :]:
                model = self._exact_model if exactly else self.model
                found, again = (entered(model, entry, exactly) for _ in range(2))
                if found is not None and again is not None and measured(difference, found, again) == 0:
                    self._entered.append(_Entered(entry, exactly, found))
                    break
            else:
                failed.append(entry)
        return entries.without(failed)

    def _against_entries(self, changed: nn.Module, exactly: nn.Module | None) -> str | None:
        """Say which of the other ways into the model gives something else in a changed copy, or return None."""
        in64 = exactly
        for known in self._entered:
            if known.exactly and in64 is None:
                in64 = copied(changed).double()
            now = entered(in64 if known.exactly and in64 is not None else changed, known.entry, known.exactly)
            change = None if now is None else measured(difference, known.output, now)
            right = change is not None and (self._is_exact(change) if known.exactly else change <= self._allowed())
            if not right:
                by = "" if change is None else f" by {change:.3g}"
                return f"it changes what {known.entry.words} gives{by}, for the same input"
        return None

    def _is_something(self) -> None:
        if self._compare is None and not any(has_numbers(output) for output in self.reference):
            raise SurgeryError(
                f"the output of {type(self.model).__name__} holds no finite number on the example, so that nothing "
                "can be compared; give an example on which the model works"
            )

    def _change(self, first: Any, second: Any) -> float:
        if self._compare is not None:
            return _number(self._compare(first, second))
        return difference(first, second)

    def _largest(self, first: list[Any], second: list[Any]) -> float:
        return max(self._change(one, other) for one, other in zip(first, second, strict=True))

    def _change_at(self, taps: "Taps") -> float:
        """Return the largest change of what the tapped layers give."""
        missing = [path for path in taps.seen if path not in self._seen]
        if missing:
            with Taps(self._exact_model, missing) as own:
                self._outputs64(self._exact_model)
            self._seen |= own.seen
        return max((apart(self._seen[path], given) for path, given in taps.seen.items()), default=0.0)

    def _own_change(self, changed: nn.Module) -> float | None:
        """Return the change in the model's own type; None where rounding alone decides the form of the outputs."""
        outputs = [outputs_of(changed, example, self.call) for example in self.examples]
        found = [measured(self._change, one, other) for one, other in zip(self.reference, outputs, strict=True)]
        known = [change for change in found if change is not None]
        return max(known) if len(known) == len(found) or (known and self._exact is not None) else None

    def _largest_rounding(self) -> float:
        return max((rounding for rounding in self._rounding if rounding is not None), default=0.0)

    def _allowed(self) -> float:
        """Return the tolerance of the narrowest type among the weights."""
        if self._tolerance is not None:
            return self._tolerance
        types = {parameter.dtype for parameter in self.model.parameters()} & _TOLERANCE.keys()
        return max((_TOLERANCE[dtype] for dtype in types), default=1e-5)

    def _noise(self) -> float:
        """Return what a float64 computation of this model is worth: its change where weights move by 1e-13."""
        assert self._exact is not None
        changes = measured(self._largest, self._exact, self._outputs64(jittered(copied(self._exact_model), 1e-13)))
        return _MOST_NOISE if changes is None else min(changes, _MOST_NOISE)

    def _weights_rounding(self) -> float:
        """Return what rounding each weight once more does to the output: what a folded model cannot do without."""
        largest = 0.0
        for _ in range(3):
            work = jittered(copied(self.model), None)
            outputs = [outputs_of(work, example, self.call) for example in self.examples]
            found = measured(self._largest, self.reference, outputs)
            largest = max(largest, found if found is not None and found == found else 0.0)
        return largest


def _number(given: Any) -> float:
    """Return what ``compare=`` gave as a number.

    Raises:
        ArgumentError: it is none.
    """
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"compare= gave a {type(given).__name__}, {str(given)[:40]!r}; needed is one number, how far the two "
            "outputs are from each other: compare=lambda first, second: float((first - second).abs().max())"
        ) from error


@dataclass(frozen=True)
class _Entered:
    """What another way into the model gave, in float64 or in the model's own type."""

    entry: Entry
    exactly: bool
    output: Any


def entered(model: nn.Module, entry: Entry, exactly: bool) -> Any | None:
    """Take another way into a model; return what holds tensors of what it gives, or None where it fails."""
    try:
        with preserved(model), torch.no_grad():
            output = entry(model, (lambda value: own_copy(as_double(value))) if exactly else own_copy)
            return None if next(tensors(plain(output)), None) is None else copy.deepcopy(output)
    except Exception:  # whatever the model's code raises at an argument that its example does not give
        return None


def check_judgement(example: Any, tolerance: float | None) -> None:
    """Refuse what nothing can be judged by.

    Raises:
        ArgumentError: the tolerance is no number, negative or not finite, or the example holds no sample.
    """
    if tolerance is not None:
        is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
        if not is_number or not 0 <= tolerance < float("inf"):
            raise ArgumentError(
                f"tolerance={tolerance!r}: a number is needed that is finite and not negative, such as 1e-5; without "
                "it the model's own rounding decides"
            )
    first = next(tensors(example), None)
    if first is not None and not first.numel():
        raise ArgumentError(
            f"the example holds no sample, but a tensor of shape {tuple(first.shape)}; nothing can be seen or compared "
            "on it: give one batch, of two samples or more"
        )


def change_between(
    before: nn.Module, after: nn.Module, example: Any, call: Call | None, compare: Compare | None = None
) -> float:
    """Return how far two models are from each other on an example, in float64 where both run in it.

    Raises:
        SurgeryError: the outputs hold no tensors, or differ in number or shape.
    """
    measure = compare or (lambda one, other: largest_difference(list(tensors(plain(one))), list(tensors(plain(other)))))
    try:
        first, second = (outputs_of(copied(model).double(), as_double(example), call) for model in (before, after))
    except (RuntimeError, TypeError, ValueError):
        first, second = (outputs_of(model, example, call) for model in (before, after))
    return _number(measure(first, second))


def _listed(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
