"""Fold batch normalization into the layers beside it, for a model that only predicts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from ..anatomy import Call, eagerly, norm_layers, preserved, refuse_meta, refuse_programs, unwrapped
from ..anatomy.batches import left_out
from ..anatomy.select import Where
from .entries import Entries, entries_of
from .fold_build import Folded, Folder
from .fold_graph import Finder
from .fold_pairs import Pair
from .record import Model, Record, refuse_if_nothing_is_left
from .transaction import copied
from .verify import Compare, Judge, Verdict, check_judgement

__all__ = ["Folding", "fold"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Folding(Record[Model]):
    """The record of :func:`fold`.

    Attributes:
        into: by the path of each folded norm, the path of the layer that now does its work.
        known_from: by the path of each folded norm, the block whose traced code shows that the two stand together, for
            the arguments that hold no tensor as the example has them: ``""`` is the whole model, None says that only
            the recorded runs show it. ``notes`` names the other ways that were tried.
        concatenated: by the path of each folded norm behind a concatenation, the paths of all layers that do its work,
            each for its own channels; ``into`` names the first.
        merged: by the path of a convolution the paths of the branches whose work it does besides.
        verdict: how far the folded model is from the given one, in float64 and in its own type.
    """

    into: Mapping[str, str] = field(default_factory=dict)
    known_from: Mapping[str, str | None] = field(default_factory=dict)
    concatenated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    verdict: Verdict | None = None


def fold(
    model: Model,
    example: Any,
    *,
    where: Where = None,
    call: Call | None = None,
    tolerance: float | None = None,
    compare: Compare | None = None,
) -> Folding[Model]:
    """Absorb batch norms into the convolution, transposed convolution or linear layer before or after them.

    With ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``::

        before:  norm(W x + b)  = (scale W) x + (scale b + shift)
        after:   W norm(x) + b  = (W scale) x + (W shift + b)

    Every layer that is affine in evaluation is taken, of any house (:func:`normkit.register_norm`): frozen ones, ours
    that renormalize, mask or whiten, and those that bring an activation, which stays in the norm's place. Layers of
    other houses absorb it too where float64 shows that they can.

    The pairs are found on recorded runs of the model, never by the order of the modules, and are held against its
    traced code: of the whole where that can be traced, else block by block. A norm reaches its neighbour through
    dropout in evaluation, flattening, average pooling, resizing and permuting; one behind a concatenation of channels
    is folded into every layer before that, each for its own channels. What cannot be folded exactly is left as
    it is, with the reason: a layer whose output goes elsewhere too or that is called elsewhere, a norm in training
    mode, hooks, shared or computed weights, something else between the two, and zero padding after a norm of whose
    shift the taps at the border would make something.

    Then branches that read one input and are summed, as RepVGG's and MobileOne's, become one convolution: convolutions
    whose kernels lie on each other, and norms or nothing at all beside them. The block that sums them gets a forward
    written anew. A norm beside such a sum is then folded into that convolution.

    The weights are computed in float64 and rounded once. The folded model is compared with the given one on the example
    and on other sizes: in float64 on both sides, where the two must agree to 1e-9, and in the model's own type, where
    it may be off by ten times the given model's own rounding. So are other ways into the code: forward with the other
    value of each argument that is True or False, and the public methods that the code calls, each with what it was
    given; but for those of blocks inside of the model that only the block itself calls, as steps. Code that may branch
    on what it is given, since no trace shows it, is compared in float64 on other values and on long samples too, where
    the model takes them. Tensors that forward leaves in attributes of blocks are compared like outputs. A pair that one
    of these shows apart is not folded. Of other arguments, and of attributes that are True or False, the value of the
    example alone is verified, and of methods that nothing calls nothing is; ``notes`` says which were.

    Args:
        model: in evaluation mode; it is not changed.
        example: one batch, of any form.
        where: which norms, as for ``norm_layers``; None takes all.
        call: ``lambda model, batch: ...``, where the example does not simply go into the model.
        tolerance: the largest relative change allowed, in float64 and in the model's own type; without it 1e-9 in
            float64, and in the model's own type 1e-5, 2e-3 and 2e-2 for float32, float16 and bfloat16, or ten times the
            model's own rounding where that is larger.
        compare: ``lambda first, second: ...``, which returns how far two outputs of the model are from each other,
            where they are sorted, nested or of varying number, as a detector's.

    Returns:
        The record. Its ``model`` is a copy of the same class (of a wrapped model the one inside), in which an
        ``Identity`` stands where a norm was folded.

    Raises:
        ArgumentError: ``where`` takes nothing, the example has an unknown form or no sample, ``tolerance`` is no number
            or negative, or the model is a program and no module.
        SurgeryError: no norm can be folded; the reasons are in the message.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> record = fold(model, torch.randn(2, 3, 8, 8))
    >>> record.model
    Sequential(
      (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    >>> record.into, record.largest_change <= 1e-5
    ({'1': '0'}, True)
    """
    refuse_programs(model)
    check_judgement(example, tolerance)
    inside, wrapping = unwrapped(model)
    chosen = norm_layers(inside, where)
    refuse_meta(inside)
    copied(inside)  # what cannot be copied is refused before anything is run
    with preserved(inside), eagerly(inside):
        finder = Finder(inside, norm_layers(inside), example, call)
        # What no trace of the whole vouches for is looked at, and verified, on one size more.
        sizes = 1 if finder.is_traced else 2
        entries = entries_of(inside, example, call, {id(layer.module) for layer in chosen})
        judge = Judge(
            inside,
            example,
            call,
            tolerance=tolerance,
            compare=compare,
            sizes=sizes,
            entries=entries,
            values=finder.may_branch,
            is_block=lambda module: not finder.is_layer(module),
        )
        finder.see(judge.examples[1:])
        folder = Folder(inside, chosen, finder, judge)
        folded, verdict = folder.fold()
        refuse_if_nothing_is_left("fold", len(folded.pairs), folded.refused, inside, where)
        assert verdict is not None
        folded, verdict = folder.behind(*folder.merge(folded, verdict))
    into = {pair.norm: pair.neighbour for pair in folded.pairs}
    known_from = {pair.norm: _witness(pair) for pair in folded.pairs}
    for merge in folded.merges:
        known_from |= dict.fromkeys(merge.norms, merge.block)
        moved = dict.fromkeys(merge.branches, merge.into)
        # A branch may be a block with the convolution inside.
        into = {norm: _moved(place, moved, merge.into) for norm, place in into.items()} | dict.fromkeys(
            merge.norms, merge.into
        )
    return Folding(
        operation="fold",
        model=cast(Model, folded.model),
        touched=tuple(into),
        refused=folded.refused,
        largest_change=verdict.change,
        measure="of the output, relative to its largest value, against float64",
        notes=(
            judge.words,
            *_ways(judge.entries),
            *((judge.values.note,) if finder.may_branch else ()),
            str(verdict),
            *_notes(folded, finder),
            *((wrapping,) if wrapping else ()),
            *left_out(inside, example, call),
        ),
        example=example,
        called=call is not None,
        into=into,
        known_from=known_from,
        concatenated={pair.norm: tuple(part.neighbour for part in pair.parts) for pair in folded.pairs if pair.others},
        merged={merge.into: merge.branches for merge in folded.merges},
        verdict=verdict,
    )


def _witness(pair: Pair) -> str | None:
    """Return the block whose code shows a norm beside all layers that do its work, where there is one."""
    blocks = [part.known_from for part in pair.parts]
    return None if None in blocks else blocks[0]


def _moved(place: str, moved: Mapping[str, str], into: str) -> str:
    """Return where a layer's work is done now: in the convolution that took the branch that it is or stands in."""
    for branch in (*moved, into):
        if place == branch or place.startswith(f"{branch}."):
            return into
    return place


def _ways(entries: Entries) -> tuple[str, ...]:
    """Say which ways through the code were looked at besides that of the example, and which argument was not varied."""
    said = []
    if entries.found:
        calls = [entry.words for entry in entries.found]
        said.append(f"verified also by what these give: {_few(calls)}")
    if entries.alone:
        said.append(f"other values may take other ways, and were not tried: {_few(entries.alone)}")
    if entries.steps:
        said.append(f"steps inside of blocks, which may give other values now: {_few(entries.steps)}")
    return tuple(said)


def _few(words: list[str]) -> str:
    return ", ".join(words[:5]) + (f" and {len(words) - 5} more" if len(words) > 5 else "")


def _notes(folded: Folded, finder: Finder) -> tuple[str, ...]:
    """Say what the numbers of a record do not: how the pairs were found, and what that leaves open."""
    pairs = folded.pairs
    blocks = [pair for pair in pairs if _witness(pair)]
    runs = [pair for pair in pairs if _witness(pair) is None]
    notes = []
    if blocks:
        notes.append(f"{len(blocks)} of {len(pairs)} pairs stand in blocks that were traced one by one")
    if runs:
        why = next(iter(finder.traces.failed.values()), "they stand in different blocks")
        named = ", ".join(pair.norm for pair in runs[:3]) + (", ..." if len(runs) > 3 else "")
        notes.append(
            f"{len(runs)} of {len(pairs)} pairs were seen in {len(finder.runs)} recorded runs alone ({named}): code "
            f"that cannot be traced ({why}) may have ways that these examples do not take"
        )
    if folded.merges:
        branches = sum(len(merge.branches) + 1 for merge in folded.merges)
        notes.append(f"{branches} branches that were summed became {len(folded.merges)} convolutions")
    return tuple(notes)
