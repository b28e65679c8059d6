"""The 64-bit slots through which Python hands a kernel its work: addresses, sizes and settings, by name.

Shapes: a tensor is (N, C, S) in the contiguous layout and (R, C) in the channels-last one, where R = N * S rows.
"""

# Tensors of the element type.
X, Y, RESIDUAL, DY, DX, DRESIDUAL = range(6)
# One number per channel, of the type computed in; null where absent.
WEIGHT, BIAS, RUNNING_MEAN, RUNNING_VAR, DWEIGHT, DBIAS = range(6, 12)
# One float64 per channel.
MEAN, RSTD = 12, 13
# Working memory: float64 partial results of every block, and coefficients per channel of the type computed in.
PARTIALS, COEFFICIENTS = 14, 15
# Sizes. A contiguous tensor has OUTER samples of CHANNELS planes of INNER values; a channels-last one OUTER rows.
OUTER, CHANNELS, INNER = 16, 17, 18
# How the work is cut. It depends on the shape alone, never on the number of threads.
# FOLD rows of few channels are read as one row of FOLD * C columns, WIDTH is that rounded up to whole vectors.
GROUP, BLOCKS, FOLD, WIDTH = 19, 20, 21, 22
# A strip is how many samples elementwise kernels take at a time; COUNT is how many values a channel has.
STRIP, STREAM, COUNT = 23, 24, 25
# Settings, EPS and MOMENTUM as the bits of a float64.
EPS, MOMENTUM, UNBIASED, FROZEN = 26, 27, 28, 29
# INVERTED: the backward finds the output where the input was, and gets the normalized input back from it.
INVERTED = 30
# What a single step hands out or takes, float64 per channel: the variance, or the two sums of the backward; else null.
WIDE = 31
SIZE = 32
