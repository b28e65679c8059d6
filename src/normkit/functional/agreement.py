"""What ranks say of a call before the numbers that they bring, so that those that call otherwise are named."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..errors import SyncError
from ..kernels.dispatch import Activation
from .exchange import Exchange
from .paths import asleep_beside, may_be_one, path_of

__all__ = ["BACKWARD", "DTYPES", "FORWARD", "SECOND", "SyncCall", "bring", "check_heads", "enter", "seal"]

# Bytes in which a layer describes itself to the others, once: what they compare, its name, and what else is said of it.
_SAID, _PATH, _NOTE = 288, 112, 112
# What stands before the numbers of a row: which call it is, and what the ranks must have in common.
_FIELDS = ("way", "call", "layer", "length", "failed", "dtype", "settings", "recorded", "count", "differentiated")
FIRST, FORWARD, BACKWARD, SECOND = 0.0, 1.0, 2.0, 3.0
_WAYS = {FIRST: "first call", FORWARD: "forward", BACKWARD: "backward", SECOND: "second derivative"}
# The first of them: which call it is, and how many numbers it brings.
_ALIKE = ("way", "call", "layer", "length")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class SyncCall:
    """One call of one layer: with whom (None for this process alone), how, and what it is called to the others."""

    exchange: Exchange | None
    eps: float
    activation: Activation | None
    words: str
    number: float


def bring(
    call: SyncCall, way: float, header: dict[str, Any], values: Sequence[Tensor]
) -> tuple[dict[str, list[float]], Tensor]:
    """Exchange rows; return the fields of all ranks, and what they brought, ``(R, K)``.

    A transport does not survive rows of different lengths. So every rank sends one of the length that follows from what
    all of them exchanged before, whatever it has to bring: where that was what it would have been the last time, once
    is enough. Else the fields say so, and where all ranks say the same they exchange again.
    """
    assert call.exchange is not None
    book = call.exchange.book
    book.calls += 1
    length = sum(len(value) for value in values)
    event, expected = (way, call.number, length), book.expected()
    known = {"way": way, "call": book.calls, "layer": call.number, "length": length, **header}
    fields = torch.tensor([float(known.get(name, 0.0)) for name in _FIELDS], dtype=torch.float64).to(values[0].device)
    words = f"{call.words}, {_WAYS[way]}"
    # A simulated transport, and torch's own checks in detailed debugging, tell rows of different lengths.
    once = call.exchange.careful or event == expected
    brought = values if once else [fields.new_zeros(0 if expected is None else expected[2])]
    rows = call.exchange.gather(torch.cat([fields, *brought]), words)
    same = [len(set(column)) == 1 for column in rows[:, : len(_ALIKE)].T.tolist()]
    alike = all(same)
    if not all(same[:-1]):
        # All ranks see this, and all of them say where they are.
        told = _hear(call, *_whereabouts(call, way), fields.device)
        book.told = [first + rest for first, _, rest in _with_modes(told)]
    if alike and not once and length:
        rows = call.exchange.gather(torch.cat([fields, *values]), words)
    # A first call is none that comes again.
    if alike and way != FIRST:
        book.note(event)
    heads = rows[:, : len(_FIELDS)].T.tolist()
    return dict(zip(_FIELDS, heads, strict=True)), rows[:, len(_FIELDS) :]


def seal(mean: Tensor, var: Tensor) -> dict[str, float]:
    """Return a field that says which forward a backward belongs to: the statistics of all ranks in it, to the bit.

    Of two forwards of one layer neither its number nor the length of its rows tells them apart, and a forward that
    activation checkpointing runs again has no number of its own.
    """
    bits = torch.nan_to_num(torch.cat([mean, var])).view(torch.int64)
    places = torch.arange(1, 2 * len(bits) + 1, 2, dtype=torch.int64, device=bits.device)
    # Whole numbers, whose sum hangs on no order; so many bits as a float64 holds.
    return {"settings": float((bits * places).sum().item() % (1 << 52))}


def check_heads(heads: dict[str, list[float]], call: SyncCall) -> None:
    """Refuse ranks that differ in what they must have in common; all of them see it alike.

    Raises:
        SyncError: they do, or one failed.
    """
    assert call.exchange is not None
    own_rank, ranks = call.exchange.rank, range(len(heads["way"]))

    def apart(said: str, each: Any) -> None:
        raise SyncError(f"{call.words}: {said}. " + "; ".join(f"rank {rank}: {each(rank)}" for rank in ranks))

    if any(len(set(heads[field])) > 1 for field in ("way", "call", "layer")):
        told = call.exchange.book.told
        apart("the ranks are in different calls, a branch was taken or a batch left out on some only", told.__getitem__)
    if len(set(heads["length"])) > 1:
        said = "the ranks bring different numbers, as of layers with other channels"
        apart(said, lambda rank: f"{int(heads['length'][rank])} numbers")
    failed = [str(rank) for rank in ranks if heads["failed"][rank]]
    if failed:
        raise SyncError(f"{call.words}: refused on rank {', '.join(failed)}, whose own message says why")
    if len(set(heads["dtype"])) > 1:
        apart("the ranks have inputs of different types; cast them alike", lambda r: DTYPES[int(heads["dtype"][r])])
    if len(set(heads["settings"])) > 1:
        own = heads["settings"][own_rank]
        if heads["way"][own_rank] in (BACKWARD, SECOND):
            said = "the ranks are in the backward of different forwards of this layer, or ran them in another order"
            apart(said, lambda rank: "as here" if heads["settings"][rank] == own else "another forward")
        apart(
            "the ranks have different settings (momentum, eps, unbiased, average, variance, ghost_size, which tensors "
            'there are; under accumulate its kind, and with "statistics" how many micro-batches)',
            lambda rank: "as here" if heads["settings"][rank] == own else "others",
        )
    if len(set(heads["recorded"])) > 1:
        apart(
            "some ranks record a gradient and some do not, whose backward would be missed",
            lambda rank: "recorded" if heads["recorded"][rank] else "not recorded",
        )


def _whereabouts(call: SyncCall, way: float) -> tuple[str, str, str]:
    """Return what a rank says of itself where the ranks are in different calls."""
    assert call.exchange is not None
    book, number = call.exchange.book, int(call.number)
    named = f"layer {number}, {book.names[number]}" if 0 <= number < len(book.names) else f"a new layer, {call.words}"
    latest = None if book.layer is None else book.layer()
    path, note = _place(latest if number < 0 else next((o for o, n in book.numbers.items() if n == number), latest))
    return f"{_WAYS[way]} of {named}{path and f' at {path!r}'}, call {book.calls}", path, note


def _place(layer: nn.Module | None) -> tuple[str, str]:
    """Return the name of a layer, and which of those beside it are in evaluation and so exchange nothing."""
    if layer is None:
        return "", ""
    names = asleep_beside(layer)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return path_of(layer), f", with {', '.join(map(repr, names[:2]))}{more} in evaluation" if names else ""


def _with_modes(heard: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Say of every rank in which mode its layers are, where on one of them some are in evaluation."""
    if not any(note for _, _, note in heard):
        return heard
    return [(said, path, note or ", with all in training") for said, path, note in heard]


def _hear(call: SyncCall, said: str, path: str, note: str, device: torch.device) -> list[tuple[str, str, str]]:
    """Exchange words; return those of all ranks."""
    assert call.exchange is not None
    row = bytearray(_SAID + _PATH + _NOTE)
    # Of a name the end tells most; a part of which the beginning is cut off is none.
    full = path.encode()
    end = path if len(full) <= _PATH else full[-_PATH:].decode(errors="ignore").partition(".")[2]
    for first, room, words in ((0, _SAID, said), (_SAID, _PATH, end), (_SAID + _PATH, _NOTE, note)):
        encoded = words.encode()[:room]
        row[first : first + len(encoded)] = encoded
    rows = call.exchange.gather(torch.frombuffer(row, dtype=torch.uint8).clone().to(device), call.words).cpu()

    def heard(low: int, high: int) -> list[str]:
        return [bytes(each[low:high].tolist()).rstrip(b"\0").decode(errors="replace") for each in rows]

    ends = (0, _SAID, _SAID + _PATH, len(row))
    return list(zip(*(heard(low, high) for low, high in itertools.pairwise(ends)), strict=True))


def enter(exchange: Exchange, layer: nn.Module | None, words: str, settings: str, device: torch.device) -> int:
    """Return the number of a layer in the group, the same on every rank; before its first call it is agreed on.

    Layers describe themselves, and say their names in the model: of two layers of equal settings those tell that they
    are two, where both have one.

    Raises:
        SyncError: the ranks called layers that describe themselves otherwise or have other names, or one was called
            before and one not.
    """
    book = exchange.book
    number = -1 if layer is None else book.numbers.get(layer, -1)
    book.layer = None if layer is None else ref(layer)
    if number >= 0 and not exchange.careful:
        return number
    said = f"{words}, {settings if number < 0 else f'layer {number}'}"
    knock = SyncCall(exchange, 0.0, None, words, -1.0)
    if not exchange.careful:
        # The others may be in a call that is no first one, whose row has another length and type.
        check_heads(bring(knock, FIRST, {}, (torch.zeros(0, dtype=torch.float64, device=device),))[0], knock)
    path, note = _place(layer)
    heard = _hear(knock, said, path, note, device)
    if len({said for said, _, _ in heard}) > 1 or not may_be_one([path for _, path, _ in heard]):
        apart = len({said for said, _, _ in heard}) > 1
        named = [
            f"{said if apart else words}{path and f' at {path!r}'}{rest}" for said, path, rest in _with_modes(heard)
        ]
        each = "; ".join(f"rank {rank}: {description}" for rank, description in enumerate(named))
        raise SyncError(f"the ranks called different layers, or one in different settings. {each}")
    if number >= 0:
        return number
    if layer is None and words in book.names:
        return book.names.index(words)
    number = len(book.names)
    book.names.append(words)
    if layer is not None:
        book.numbers[layer] = number
    return number
