"""The slots of kernels with statistics per sample: those of `slots`, with these meanings, and a few more.

``OUTER`` is N, ``CHANNELS`` is C, ``INNER`` the positions of a channel; ``MEAN`` and ``RSTD`` hold N * GROUPS numbers.
``DWEIGHT`` and ``DBIAS`` are tables of the type computed in, one row of C for every chunk of samples; `total` adds
them up.
"""

from .. import slots

GROUPS = slots.SIZE
STEP = slots.SIZE + 1  # what a launch does: one of the steps below
PARTS = slots.SIZE + 2  # tasks that share a group, or a sample, in this launch
PIECES = slots.SIZE + 3  # pieces that a plane is cut into
ITEMSIZE = slots.SIZE + 4  # bytes of an element
CENTRED = slots.SIZE + 5  # whether the mean is removed
WANTED = slots.SIZE + 6  # whether dweight and dbias are
VARIANCE = slots.SIZE + 7  # address of N * GROUPS float64 numbers, or null
SIZE = slots.SIZE + 8

WHOLE, PREPARE, GATHER, FINISH, APPLY = range(5)
