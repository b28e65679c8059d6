"""Make the folded copy, in float64 and in the model's own type, and find the pairs that make it wrong."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import NormLayer, norm_layers
from ..anatomy.places import places_of
from ..errors import SurgeryError
from .fold_arithmetic import absorb_after, absorb_before
from .fold_branches import Merge, merge_branches
from .fold_graph import Finder
from .fold_own import plain_convolution
from .fold_pairs import Pair
from .transaction import copied
from .verify import Judge, Verdict

__all__ = ["Folded", "Folder"]

# So many wrong pairs are looked for one by one; a model with more of them is not understood.
_MOST_WRONG = 8


@dataclass
class Folded:
    """A folded copy.

    Attributes:
        model: in the given model's own type.
        exact: the same in float64, not rounded; None where the model does not run in it.
        pairs: what was folded.
        refused: why the other norms were not.
        merges: sums of branches that became one convolution.
    """

    model: nn.Module
    exact: nn.Module | None
    pairs: list[Pair]
    refused: dict[str, str] = field(default_factory=dict)
    merges: list[Merge] = field(default_factory=list)


class Folder:
    """Folds one model as far as the judge allows."""

    def __init__(
        self, model: nn.Module, layers: list[NormLayer], finder: Finder, judge: Judge, begun: "Folded | None" = None
    ) -> None:
        self.model, self.finder, self.judge, self.begun = model, finder, judge, begun
        self.layers = {layer.path: layer for layer in layers}
        self.excluded: dict[tuple[str, str], str] = {}

    def fold(self) -> tuple[Folded, Verdict | None]:
        """Fold all at once; where that is wrong, find the wrong pairs by halving, and leave them out.

        Raises:
            SurgeryError: the model differs from itself, or no set of pairs was found right.
        """
        everything = list(self.layers)
        folded = self.build(set(everything))
        if not folded.pairs:
            return folded, None
        verdict = self._judged(folded)
        if verdict.wrong is None:
            return folded, verdict
        self._check_itself()
        wrong: dict[str, str] = {}
        names = [pair.norm for pair in folded.pairs]
        kept = self._right_among([], names, verdict, wrong)
        folded = self.build(set(kept))
        folded.refused |= {name: reason for name, reason in wrong.items() if name not in kept}
        if not folded.pairs:
            return folded, None
        verdict = self._judged(folded)
        if verdict.wrong is not None:
            raise SurgeryError(f"fold: the folded model is not right: {verdict.wrong}")
        return folded, verdict

    def _judged(self, folded: Folded) -> Verdict:
        """Judge a folded copy by its output, and by what each pair gives at its own place."""
        # Of several norms in one layer, the last one behind it has the place where all of them are done.
        sites = {pair.neighbour: pair.neighbour for pair in folded.pairs if not pair.norm_is_after}
        sites |= {part.neighbour: part.norm for pair in folded.pairs if pair.norm_is_after for part in pair.parts}
        for merge in () if self.begun is None else self.begun.merges:
            if sites.get(merge.into) == merge.into:
                del sites[merge.into]  # it gives the sum, and gave one branch
        return self.judge(folded.model, folded.exact, list(dict.fromkeys(sites.values())))

    def merge(self, folded: Folded, verdict: Verdict) -> tuple[Folded, Verdict]:
        """Merge summed branches in a folded copy where float64 proves it; else return what came."""
        if folded.exact is None:
            return folded, verdict
        given = {layer.path: layer for layer in self.finder.layers if layer.path in self.layers}
        work, exact = copied(folded.model), copied(folded.exact)
        layers = {
            layer.path: layer
            for layer in norm_layers(work)
            if layer.path in given and self.finder.against_norm(given[layer.path]) is None
        }
        merges = merge_branches(work, exact, layers, self.judge.examples[0], self.judge.call)
        if not merges:
            return folded, verdict
        merged = self.judge(work, exact)
        if merged.wrong is not None:
            return folded, verdict
        taken = {norm for merge in merges for norm in merge.norms}
        left = {path: reason for path, reason in folded.refused.items() if path not in taken}
        return Folded(work, exact, folded.pairs, left, merges), merged

    def behind(self, folded: Folded, verdict: Verdict) -> tuple[Folded, Verdict]:
        """Fold norms beside sums that became one convolution, of which nothing could be said before."""
        left = [layer for layer in norm_layers(folded.model) if layer.path in folded.refused]
        if not folded.merges or not left:
            return folded, verdict
        finder = Finder(folded.model, norm_layers(folded.model), self.judge.examples[0], self.judge.call)
        finder.see(self.judge.examples[1:])
        try:
            more, found = Folder(folded.model, left, finder, self.judge, begun=folded).fold()
        except SurgeryError:
            return folded, verdict
        if found is None:
            return folded, verdict
        done = {pair.norm for pair in more.pairs}
        refused = {path: reason for path, reason in folded.refused.items() if path not in done}
        return Folded(more.model, more.exact, [*folded.pairs, *more.pairs], refused, folded.merges), found

    def build(self, wanted: set[str]) -> Folded:
        """Fold these norms in a copy. A pair whose result does not fit is excluded, and all is begun anew."""
        while True:
            pairs, refused = self.finder.find(wanted, self.excluded)
            work = copied(self.model)
            exact = self._exactly()
            try:
                for pair in pairs:
                    self._apply(work, exact, pair)
            except _Misfit as misfit:
                self.excluded[misfit.pair.norm, misfit.pair.neighbour] = str(misfit)
                continue
            return Folded(work, exact, pairs, refused)

    def _exactly(self) -> nn.Module | None:
        """Return a copy in float64; of a model that was folded before the one that was not rounded."""
        if self.begun is not None and self.begun.exact is not None:
            return copied(self.begun.exact)
        return copied(self.model).double() if self.judge.runs_in_float64 else None

    def _apply(self, work: nn.Module, exact: nn.Module | None, pair: Pair) -> None:
        """Fold one pair, and put what the norm has behind it, or an Identity, in its place under all its names."""
        layer = self.layers[pair.norm]
        absorb = absorb_after if pair.norm_is_after else absorb_before
        for copy in (exact, work):
            if copy is None:
                continue
            for part in pair.parts:
                neighbour = copy.get_submodule(part.neighbour)
                if part.way.plain:
                    neighbour = self._plain(part, neighbour)
                    _put(copy, self._names(part.neighbour), neighbour)
                try:
                    absorb(neighbour, part.affine, part.way.axis)
                except SurgeryError as error:
                    raise _Misfit(part, str(error)) from error
            norm = copy.get_submodule(pair.norm)
            _put(copy, layer.names, _rest(layer, norm, copy))
        if exact is None:
            return
        for part in pair.parts:
            _round(exact.get_submodule(part.neighbour), work.get_submodule(part.neighbour), part)

    def _plain(self, pair: Pair, neighbour: nn.Module) -> nn.Module:
        given = self.finder.runs[0].given[id(self.model.get_submodule(pair.neighbour))]
        made = plain_convolution(copied(neighbour).double(), given.double())
        weight = neighbour.weight
        assert isinstance(weight, Tensor)
        return made.to(weight.dtype)

    def _names(self, path: str) -> list[str]:
        module = self.model.get_submodule(path)
        return [name for name, other in places_of(self.model) if other is module]

    def _right_among(self, known: list[str], names: list[str], verdict: Verdict, wrong: dict[str, str]) -> list[str]:
        """Return which of these norms can be folded besides the known ones, given that all of them cannot."""
        if len(names) == 1:
            wrong[names[0]] = f"with it folded, {verdict.wrong}"
            return []
        kept: list[str] = []
        half = len(names) // 2
        for part in (names[:half], names[half:]):
            if len(wrong) >= _MOST_WRONG:
                reason = f"not tried: {_MOST_WRONG} other pairs were found wrong, so that the model is not understood"
                wrong.update(dict.fromkeys(part, reason))
                continue
            folded = self.build({*known, *kept, *part})
            found = self._judged(folded)
            kept += part if found.wrong is None else self._right_among([*known, *kept], part, found, wrong)
        return kept

    def _check_itself(self) -> None:
        """Refuse a model that differs from its own copy: nothing can be told of a changed one.

        Raises:
            SurgeryError: it does.
        """
        verdict = self.judge(copied(self.model))
        if verdict.is_rounding:
            raise SurgeryError(
                f"fold: of an unchanged copy could be said too that {verdict.wrong}: that is the model's own rounding. "
                "Give a larger tolerance=, or fold model.double()"
            )
        if verdict.wrong is not None:
            raise SurgeryError(
                f"fold: an unchanged copy of the model differs from it: {verdict.wrong}. Something in it is random or "
                "counts its calls; give tolerance= or compare="
            )


class _Misfit(Exception):
    """What a pair gives does not fit."""

    def __init__(self, pair: Pair, reason: str) -> None:
        super().__init__(f"{pair.neighbour}: {reason}")
        self.pair = pair


def _rest(layer: NormLayer, norm: nn.Module, model: nn.Module) -> nn.Module:
    """Return what stays in the place of a norm: its tail, or an Identity."""
    tail = () if layer.form is None else layer.form.tail_of(norm)
    if not tail:
        return nn.Identity().train(norm.training)
    places = sum(module is tail[0] for _, module in places_of(model))
    # An activation that several norms share stays one, and each place is one by itself.
    return tail[0] if len(tail) == 1 and places <= len(layer.names) else nn.Sequential(*tail)


def _put(model: nn.Module, names: Any, module: nn.Module) -> None:
    for name in names:
        model.set_submodule(name, module)


def _round(exact: nn.Module, own: nn.Module, pair: Pair) -> None:
    """Give a layer the float64 values, rounded once.

    Raises:
        _Misfit: they do not fit into the layer's type.
    """
    with torch.no_grad():
        for name, parameter in own._parameters.items():
            value = exact._parameters[name]
            if parameter is None or value is None:
                continue
            rounded = value.to(parameter.dtype)
            if not torch.isfinite(rounded).all():
                raise _Misfit(pair, f"the folded {name} does not fit into {parameter.dtype}")
            parameter.copy_(rounded)
