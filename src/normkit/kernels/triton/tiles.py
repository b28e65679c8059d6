"""Where the tiles of a tensor lie, in both layouts.

Planes ``(N, C, S)``: a program takes one channel, and a tile is DEPTH pieces of at most RUN neighbouring values of a
plane, as one vector. Channels-last ``(R, C)``: a program takes RUN channels, and a tile is DEPTH rows of them.

Offsets are 64 bits wide.
"""

import triton
import triton.language as tl


@triton.jit
def channel(ROWS: tl.constexpr, RUN: tl.constexpr):
    """The channel of this program, or its channels."""
    c = tl.program_id(0).to(tl.int64)
    if ROWS:
        c = c * RUN + tl.arange(0, RUN)
    return c


@triton.jit
def place(t, c, outer, channels, inner, chunks, ROWS: tl.constexpr, DEPTH: tl.constexpr, RUN: tl.constexpr):
    """Where the elements of tile t lie, and which of them exist."""
    if ROWS:
        row = t * DEPTH + tl.arange(0, DEPTH)
        at = row.to(tl.int64)[:, None] * channels + c[None, :]
        valid = (row < outer)[:, None] & (c < channels)[None, :]
    else:
        i = tl.arange(0, DEPTH * RUN)
        piece = t * DEPTH + i // RUN
        sample = piece // chunks
        position = piece % chunks * RUN + i % RUN
        at = (sample.to(tl.int64) * channels + c) * inner + position
        valid = (sample < outer) & (position < inner)
    return at, valid


@triton.jit
def first_of(t, c, channels, inner, chunks, ROWS: tl.constexpr, DEPTH: tl.constexpr, RUN: tl.constexpr):
    """Where the first element of tile t lies, which always exists."""
    if ROWS:
        return tl.cast(t, tl.int64) * DEPTH * channels + c
    else:
        piece = tl.cast(t, tl.int64) * DEPTH
        return (piece // chunks * channels + c) * inner + piece % chunks * RUN


@triton.jit
def size_of(t, outer, inner, chunks, ROWS: tl.constexpr, DEPTH: tl.constexpr, RUN: tl.constexpr):
    """How many values per channel tile t has."""
    if ROWS:
        return tl.minimum(outer - t * DEPTH, DEPTH)
    else:
        begin = tl.cast(t, tl.int64) * DEPTH
        end = tl.minimum(begin + DEPTH, outer * chunks)
        # A chunk is RUN values, the last one of a plane what is left.
        before = begin // chunks * inner + begin % chunks * RUN
        return (end // chunks * inner + end % chunks * RUN - before).to(tl.int32)


@triton.jit
def share_of(tiles, splits):
    """The tiles of this program: from the first up to the second."""
    split = tl.program_id(1)
    return tiles * split // splits, tiles * (split + 1) // splits
