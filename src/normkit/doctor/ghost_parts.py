"""What gives the parts of ghost normalization more samples."""

import math

__all__ = ["larger_parts"]


def larger_parts(ghost_size: int, needed: int, share: int, shares: int) -> str:
    """Return in words what brings so many samples into each part.

    A share is cut into as few parts as ``ghost_size`` allows, as equal as possible.

    Args:
        ghost_size: what the layer has.
        needed: samples of a part.
        share: samples of a micro-batch of one process.
        shares: ranks times micro-batches.

    >>> larger_parts(4, 50, 64, 1)
    'its ghost_size=4 sets the limit, and not the batch: ghost_size=64 or more'
    >>> larger_parts(4, 50, 16, 2)
    'its ghost_size=4 sets the limit: ghost_size=50 and a batch of 100'
    >>> larger_parts(64, 50, 16, 2)
    'a batch of 100'
    """
    if share >= needed:
        enough = math.ceil(share / (share // needed))
        return f"its ghost_size={ghost_size} sets the limit, and not the batch: ghost_size={enough} or more"
    batch = f"a batch of {needed * shares}"
    return (
        batch
        if ghost_size >= needed
        else f"its ghost_size={ghost_size} sets the limit: ghost_size={needed} and {batch}"
    )
