"""What ranks say of a call before the numbers that they bring, so that those that call otherwise are named."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SyncError
from ..kernels.dispatch import Activation
from .exchange import Exchange

__all__ = ["BACKWARD", "DTYPES", "FORWARD", "SECOND", "SyncCall", "bring", "check_heads", "enter"]

# Bytes in which a layer describes itself to the others, once.
_WORDS = 512
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
    alike = all(len(set(column)) == 1 for column in rows[:, : len(_ALIKE)].T.tolist())
    if alike and not once and length:
        rows = call.exchange.gather(torch.cat([fields, *values]), words)
    # A first call is none that comes again.
    if alike and way != FIRST:
        book.note(event)
    heads = rows[:, : len(_FIELDS)].T.tolist()
    return dict(zip(_FIELDS, heads, strict=True)), rows[:, len(_FIELDS) :]


def check_heads(heads: dict[str, list[float]], call: SyncCall) -> None:
    """Refuse ranks that differ in what they must have in common; all of them see it alike.

    Raises:
        SyncError: they do, or one failed.
    """
    assert call.exchange is not None
    own_rank, ranks = call.exchange.rank, range(len(heads["way"]))

    def apart(said: str, each: Any) -> None:
        raise SyncError(f"{call.words}: {said}. " + "; ".join(f"rank {rank}: {each(rank)}" for rank in ranks))

    names = call.exchange.book.names
    if any(len(set(heads[field])) > 1 for field in ("way", "call", "layer")):

        def where(rank: int) -> str:
            number = int(heads["layer"][rank])
            layer = f"layer {number}, {names[number]}" if 0 <= number < len(names) else "a new layer"
            return f"{_WAYS.get(heads['way'][rank], 'another call')} of {layer}, call {int(heads['call'][rank])}"

        apart("the ranks are in different calls, a branch was taken or a batch left out on some only", where)
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


def enter(exchange: Exchange, layer: nn.Module | None, words: str, settings: str, device: torch.device) -> int:
    """Return the number of a layer in the group, the same on every rank; before its first call it is agreed on.

    Raises:
        SyncError: the ranks called layers that describe themselves otherwise, or one was called before and one not.
    """
    book = exchange.book
    number = -1 if layer is None else book.numbers.get(layer, -1)
    if number >= 0 and not exchange.careful:
        return number
    said = f"{words}, {settings if number < 0 else f'layer {number}'}"
    if not exchange.careful:
        # The others may be in a call that is no first one, whose row has another length and type.
        knock = SyncCall(exchange, 0.0, None, words, -1.0)
        check_heads(bring(knock, FIRST, {}, (torch.zeros(0, dtype=torch.float64, device=device),))[0], knock)
    row = torch.zeros(_WORDS, dtype=torch.uint8)
    encoded = said.encode()[:_WORDS]
    row[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    rows = exchange.gather(row.to(device), words).cpu()
    heard = [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in rows]
    if len(set(heard)) > 1:
        each = "; ".join(f"rank {rank}: {words}" for rank, words in enumerate(heard))
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
