"""What ranks say of a call before the numbers that they bring, so that those that call otherwise are named."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SyncError
from ..kernels.dispatch import Activation
from .exchange import Exchange

__all__ = ["BACKWARD", "DTYPES", "FORWARD", "SECOND", "SyncCall", "bring", "check_heads"]

# What stands before the numbers of a row: which call it is, and what the ranks must have in common.
_FIELDS = ("way", "call", "layer", "failed", "dtype", "settings", "recorded", "count", "differentiated")
FORWARD, BACKWARD, SECOND = 1.0, 2.0, 3.0
_WAYS = {FORWARD: "forward", BACKWARD: "backward", SECOND: "second derivative"}
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
    """Exchange rows; return the fields of all ranks, and what they brought, ``(R, K)``."""
    assert call.exchange is not None
    book = call.exchange.book
    book.calls += 1
    known = {"way": way, "call": book.calls, "layer": call.number, **header}
    fields = [float(known.get(name, 0.0)) for name in _FIELDS]
    row = torch.cat([torch.tensor(fields, dtype=torch.float64).to(values[0].device), *values])
    rows = call.exchange.gather(row, f"{call.words}, {_WAYS[way]}")
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
            layer = f"layer {number}, {names[number]}" if 0 <= number < len(names) else "no layer"
            return f"{_WAYS.get(heads['way'][rank], 'another call')} of {layer}, call {int(heads['call'][rank])}"

        apart("the ranks are in different calls, a branch was taken or a batch left out on some only", where)
    failed = [str(rank) for rank in ranks if heads["failed"][rank]]
    if failed:
        raise SyncError(f"{call.words}: refused on rank {', '.join(failed)}, whose own message says why")
    if len(set(heads["dtype"])) > 1:
        apart("the ranks have inputs of different types; cast them alike", lambda r: DTYPES[int(heads["dtype"][r])])
    if len(set(heads["settings"])) > 1:
        own = heads["settings"][own_rank]
        apart(
            "the ranks have different settings (momentum, eps, unbiased, average, variance, which tensors there are)",
            lambda rank: "as here" if heads["settings"][rank] == own else "others",
        )
    if len(set(heads["recorded"])) > 1:
        apart(
            "some ranks record a gradient and some do not, whose backward would be missed",
            lambda rank: "recorded" if heads["recorded"][rank] else "not recorded",
        )
