"""One cause in many layers is one finding: its layers listed, the worst one's numbers, one cure for all."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from .findings import Finding
from .thresholds import MANY_LAYERS

__all__ = ["join_findings"]

# What a check writes in a remedy and a proof where the layer's name belongs.
_PLACE = "{layer}"
_ACCESS = f"model.get_submodule({_PLACE})"
# What it writes where a loop over the layers belongs.
_PLACES = "{layers}"
# Calls that run the model, up to where it goes on with other arguments.
_CALLS = re.compile(r"\(model(?:\.eval\(\))?, (?:batches=batches|batches|loader)\b")


def join_findings(
    found: Iterable[Finding], names: Sequence[str], classes: Mapping[str, str] | None = None, arguments: str = ""
) -> list[Finding]:
    """Put findings of one cause together where they are many, and write the layers' names into remedies and proofs.

    Findings have one cause where they agree in check, severity, causes, remedy and proof. Up to three layers stay
    apart: their numbers are worth comparing.

    Args:
        found: findings of one layer each.
        names: all layers that were examined, in the model's order.
        classes: the layers' classes.
        arguments: what every call with batches needs beside them, such as ``", call=call"``.
    """
    place = {name: index for index, name in enumerate(names)}
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in found:
        classed = replace(finding, layer_class=(classes or {}).get(finding.layer, finding.layer_class))
        key: tuple[object, ...] = (finding.check, finding.severity, finding.causes, finding.remedy, finding.proof)
        if _ACCESS in finding.remedy and not finding.remedy.startswith(_ACCESS):
            key = (*key, finding.layer)  # several statements about one layer make no loop
        groups.setdefault(key, []).append(classed)
    joined = []
    for group in groups.values():
        parts = [_joined(group, names, place)] if len(group) >= MANY_LAYERS else group
        joined += [_filled(part, names, arguments) for part in parts]
    return joined


def _joined(group: Sequence[Finding], names: Sequence[str], place: Mapping[str, int]) -> Finding:
    """Return one finding for all; the numbers are the worst layer's."""
    worst = max(group, key=lambda finding: finding.extent)
    layers = tuple(sorted((finding.layer for finding in group), key=lambda name: place.get(name, len(place))))
    alike = len({finding.summary for finding in group}) == 1
    where = f"in {len(layers)} of {len(names)} layers"
    said = worst.summary if alike else f"{worst.layer} is the worst: {worst.summary}"
    return replace(worst, summary=f"{where}{':' if alike else ';'} {said}", layers=layers)


def _filled(finding: Finding, names: Sequence[str], arguments: str) -> Finding:
    """Write the layers into the calls."""
    remedy, proof = finding.remedy, finding.proof
    if len(finding.layers) > 1:
        proof = proof.replace(f", {_PLACE}", "" if set(finding.layers) == set(names) else f", {list(finding.layers)!r}")
        if remedy.startswith(_ACCESS):
            # One line of code for one layer becomes a loop; what follows the semicolon is done once.
            first, semicolon, rest = remedy.partition("; ")
            first = first.replace(_ACCESS, "model.get_submodule(name)")
            remedy = f"for name in {list(finding.layers)!r}: {first}" + (f"\n{rest}" if semicolon else "")
    named = _pattern(finding.layers, names)

    def fill(text: str) -> str:
        text = text.replace(_PLACES, repr(list(finding.layers))).replace(_PLACE, named)
        return _CALLS.sub(lambda found: found[0] + arguments, text)

    return replace(finding, remedy=fill(remedy), proof=fill(proof))


def _pattern(layers: Sequence[str], names: Sequence[str]) -> str:
    """Write the layers as ``where=`` takes them: a name, a container that holds all of them and no others, a list."""
    if len(layers) == 1:
        return repr(layers[0])
    if set(layers) == set(names):
        return repr("*")
    columns = zip(*(name.split(".")[:-1] for name in layers), strict=False)
    below = ".".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    if below and {name for name in names if name.startswith(f"{below}.")} == set(layers):
        return repr(below)
    return repr(list(layers))
