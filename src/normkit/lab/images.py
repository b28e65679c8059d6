"""Which test images are classified rightly, kept as bits: two predictions are compared image by image.

Two ways to predict with one net are asked of the same images, and agree on most. The images that only one of them gets
right say which way is ahead, where a difference of accuracies says by how much.
"""

import base64
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .claim import Row

__all__ = ["as_bits", "share_won"]


def as_bits(right: Tensor) -> str:
    """Return one bit per image, the first image's the highest of the first byte, in base64.

    >>> import torch
    >>> as_bits(torch.tensor([True, False, False, False, False, False, False, True, True]))
    'gYA='
    """
    return base64.b64encode(np.packbits(right.numpy()).tobytes()).decode("ascii")


def share_won(candidate: str, baseline: str, rows: Sequence[Row]) -> float:
    """Return the candidate's share of the images that only one of the two gets right, all rows together.

    Where they agree on every image neither is ahead: 0.5.

    Args:
        candidate: the column of its bits.
        baseline: the column of the other's.
        rows: one seed's.

    >>> share_won("ours", "theirs", [{"ours": "gYA=", "theirs": "gAA="}, {"ours": "AAA=", "theirs": "gAA="}])
    0.6666666666666666
    """
    won = lost = 0
    for row in rows:
        ours, theirs = (_bits(row[column]) for column in (candidate, baseline))
        won += (ours & ~theirs).bit_count()
        lost += (theirs & ~ours).bit_count()
    return won / (won + lost) if won + lost else 0.5


def _bits(text: str) -> int:
    return int.from_bytes(base64.b64decode(text), "big")
