"""What the Triton kernels are made of: activations, moments of a tile, coefficients, the merging of partial results.

A tile is one value vector per channel (planes) or rows by channels (channels-last); either way its values lie along
axis 0. Everything per channel is float64 and has the shape of ``c``: a scalar, or a vector of neighbouring channels.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
SLOPE = tl.constexpr(0.01)  # of leaky_relu below zero: torch's default
SHRINK = tl.constexpr(2.0**-80)  # brings any float32 to where its square, summed over a tile, is one too


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Apply the activation. A NaN fails every comparison and stays one."""
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        z = tl.where(z <= 0.0, 0.0, z)
    if ACTIVATION == "relu6":
        z = tl.where(z >= 6.0, 6.0, z)
    if ACTIVATION == "leaky_relu":
        z = tl.where(z < 0.0, z * SLOPE, z)
    if ACTIVATION == "silu":
        z = z * sigmoid(z)
    return z


@triton.jit
def gate(dy, z, ACTIVATION: tl.constexpr):
    """Multiply dy by the derivative of the activation at z; where its sign decides, z may be the output.

    Where z is a NaN as in torch: relu and relu6 let the gradient pass, leaky_relu does not.
    """
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        dy = tl.where(z <= 0.0, 0.0, dy)
    if ACTIVATION == "relu6":
        dy = tl.where(z >= 6.0, 0.0, dy)
    if ACTIVATION == "leaky_relu":
        dy = tl.where(z > 0.0, dy, dy * SLOPE)
    if ACTIVATION == "silu":
        share = sigmoid(z)
        dy = dy * (share * (1.0 + z * (1.0 - share)))
    return dy


@triton.jit
def gradient(dy, other_ptr, at, valid, distance, scale, offset, ACTIVATION: tl.constexpr):
    """Return dz, the gradient before the activation.

    What decides the slope is computed again as the forward did, bit for bit; after a residual it is the sign of the
    output, or the residual itself for a silu.
    """
    if ACTIVATION is None:
        return dy
    elif other_ptr is None:
        return gate(dy, tl.fma(distance, scale, offset), ACTIVATION)
    else:
        other = tl.load(other_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if ACTIVATION == "silu":
            other = tl.fma(distance, scale, offset) + other
        return gate(dy, other, ACTIVATION)


@triton.jit
def is_any(flag, ROWS: tl.constexpr):
    """Tell whether the flag is up for any channel of this program."""
    if ROWS:
        return tl.max(flag.to(tl.int32), 0) > 0
    else:
        return flag


@triton.jit
def tile_moments(values, valid, first, n, FACTOR: tl.constexpr):
    """Mean and sum of squares of n values, in two passes about ``first``, one of them.

    The second pass also adds up what the first mean left over: its rounding is taken back. FACTOR, a power of two,
    keeps huge values from overflowing; squares of small ones then vanish.
    """
    distance = tl.where(valid, values * FACTOR - first * FACTOR, 0.0)
    rough = tl.sum(distance, 0) / n
    rest = tl.where(valid, distance - rough, 0.0)
    left = tl.sum(rest, 0).to(tl.float64) / n
    square = tl.sum(rest * rest, 0).to(tl.float64) - left * left * n
    mean = first.to(tl.float64) + (rough.to(tl.float64) + left) / FACTOR
    return mean, tl.where(square < 0.0, 0.0, square) / FACTOR / FACTOR


@triton.jit
def merge(count, mean, m2, n, other_mean, other_m2):
    """Merge two pairs of mean and sum of squares (Chan, Golub and LeVeque 1983)."""
    delta = other_mean - mean
    share = n / (count + n)
    return mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit
def combine(n, means, m2, valid, base, count):
    """Merge parts that lie along axis 0, all at once: their mean and sum of squares together. ``base`` is near it."""
    mean = base + tl.sum(n * tl.where(valid, means - base, 0.0), 0) / count
    apart = tl.where(valid, means - mean, 0.0)
    return mean, tl.sum(m2, 0) + tl.sum(n * apart * apart, 0)


@triton.jit
def coefficients(c, inside, mean, rstd, weight_ptr, bias_ptr):
    """What turns x into y: ``y = (x - centre) * scale + offset``, float32.

    The mean is rounded to float32, and what that loses goes into the offset: y stays exact where the mean dwarfs the
    deviation, and a constant channel is its bias exactly.
    """
    scale = rstd
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float64)
    centre = mean.to(tl.float32)
    offset = (centre.to(tl.float64) - mean) * scale
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float64) + offset
    return centre, scale.to(tl.float32), offset.to(tl.float32)


@triton.jit
def save(c, inside, channels, mean, rstd, saved_ptr):
    """Keep mean and rstd for the backward."""
    tl.store(saved_ptr + c, mean, mask=inside)
    tl.store(saved_ptr + channels + c, rstd, mask=inside)


@triton.jit
def settle(
    c,
    inside,
    channels,
    mean,
    m2,
    count,
    saved_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum,
    eps,
    UNBIASED: tl.constexpr,
):
    """From a channel's moments: save mean and rstd, move the running statistics, and return rstd."""
    var = m2 / count
    rstd = 1.0 / tl.sqrt(var + eps)
    save(c, inside, channels, mean, rstd, saved_ptr)
    if running_mean_ptr is not None:
        stored = var
        if UNBIASED:
            stored = m2 / (count - 1.0)
        old_mean = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(tl.float64)
        old_var = tl.load(running_var_ptr + c, mask=inside, other=0.0).to(tl.float64)
        tl.store(running_mean_ptr + c, (old_mean * (1.0 - momentum) + mean * momentum).to(tl.float32), mask=inside)
        tl.store(running_var_ptr + c, (old_var * (1.0 - momentum) + stored * momentum).to(tl.float32), mask=inside)
    return rstd


@triton.jit
def true_product(total, along, mean, centre, rstd):
    """The sum of dz * xhat, from the sum taken with a rounded mean and a rounded rstd."""
    lost = mean - centre.to(tl.float64)
    return along * (rstd / rstd.to(tl.float32).to(tl.float64)) - lost * rstd * total


@triton.jit
def backward_coefficients(total, product, count, mean, centre, rstd, weight_ptr, c, inside):
    """Return b and d of ``dx = dz * scale + (x - centre) * rstd * b + d``."""
    scale = rstd
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float64)
    lost = mean - centre.to(tl.float64)
    slope = -scale * product / count
    b = slope * (rstd / rstd.to(tl.float32).to(tl.float64))
    d = -scale * total / count - slope * rstd * lost
    return b.to(tl.float32), d.to(tl.float32)


@triton.jit
def finish(
    partials_ptr,
    saved_ptr,
    running_mean_ptr,
    running_var_ptr,
    channels,
    splits,
    count: tl.float64,
    momentum: tl.float64,
    eps: tl.float64,
    UNBIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Merge the parts' moments of WIDTH channels, all at once and in a fixed order. A part is (count, mean, m2)."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = c < channels
    split = tl.arange(0, SPLITS)
    at = split[:, None] * channels + c[None, :]
    valid = (split < splits)[:, None] & inside[None, :]
    plane = splits * channels
    n = tl.load(partials_ptr + at, mask=valid, other=0.0)
    means = tl.load(partials_ptr + plane + at, mask=valid, other=0.0)
    m2 = tl.load(partials_ptr + 2 * plane + at, mask=valid, other=0.0)
    base = tl.load(partials_ptr + plane + c, mask=inside, other=0.0)
    mean, m2 = combine(n, means, m2, valid, base, count)
    settle(c, inside, channels, mean, m2, count, saved_ptr, running_mean_ptr, running_var_ptr, momentum, eps, UNBIASED)


@triton.jit
def finish_sums(
    partials_ptr, saved_ptr, exact_ptr, sums_ptr, channels, splits, SPLITS: tl.constexpr, WIDTH: tl.constexpr
):
    """Add the parts' sums of WIDTH channels: exact is (total, product) in float64, sums (dweight, dbias)."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = c < channels
    split = tl.arange(0, SPLITS)
    at = split[:, None] * channels + c[None, :]
    valid = (split < splits)[:, None] & inside[None, :]
    total = tl.sum(tl.load(partials_ptr + at, mask=valid, other=0.0), 0)
    along = tl.sum(tl.load(partials_ptr + splits * channels + at, mask=valid, other=0.0), 0)
    mean = tl.load(saved_ptr + c, mask=inside, other=0.0)
    rstd = tl.load(saved_ptr + channels + c, mask=inside, other=1.0)
    product = true_product(total, along, mean, mean.to(tl.float32), rstd)
    tl.store(exact_ptr + c, total, mask=inside)
    tl.store(exact_ptr + channels + c, product, mask=inside)
    tl.store(sums_ptr + c, product.to(tl.float32), mask=inside)
    tl.store(sums_ptr + channels + c, total.to(tl.float32), mask=inside)
