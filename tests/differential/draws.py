"""What the differential tests draw: tensors of every type and layout, and values that are hard for a norm."""

from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tolerances import RELATIVE

# A share of what the profile allows: a hundred examples in `make test`, many thousands in `make fuzz`.
bounded = settings(max_examples=max(1, settings.default.max_examples // 4))

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.one_of(
    st.tuples(st.integers(2, 40), st.integers(1, 9)),
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(2, 23)),
    st.tuples(st.integers(1, 5), st.integers(1, 19), st.integers(1, 11), st.integers(2, 11)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(2, 5)),
    # Over the values that one chunk of the sums holds, and over the channels that one task takes.
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(47, 71), st.integers(43, 67)),
    st.tuples(st.integers(2, 9), st.integers(30, 70), st.integers(1, 3), st.integers(1, 3)),
)
LAYOUTS = st.sampled_from(["contiguous", "channels_last", "strided", "unaligned", "reversed"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, otherwise in memory."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "unaligned":
        flat = x.new_full((x.numel() + 1,), torch.nan)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


@dataclass(frozen=True)
class Values:
    """How the values of a tensor ``(N, C, *)`` are made.

    Attributes:
        seed: of the random numbers.
        kind: normal numbers, few levels, one value far out, or a constant in the first channel.
        ratio: of the mean to the standard deviation.
        exponent: the standard deviation is 2 to this.
    """

    seed: int
    kind: str
    ratio: float
    exponent: int

    def within(self, dtype: torch.dtype) -> "Values":
        """The same, as far as float16 reaches: it ends at 65,504 and has few digits below 2**-14."""
        if dtype is not torch.float16:
            return self
        return replace(self, ratio=max(-30.0, min(30.0, self.ratio)), exponent=0)

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """Draw float64 numbers."""
        source = generator(self.seed)
        x = torch.randn(shape, generator=source, dtype=torch.float64)
        if self.kind == "levels":
            x = (2 * x).round()
        elif self.kind == "outlier":
            x.view(-1)[int(torch.randint(x.numel(), (), generator=source))] += 100.0
        elif self.kind == "constant":
            x[:, 0] = x.view(-1)[0]
        return (x + self.ratio) * 2.0**self.exponent


VALUES = st.builds(
    Values,
    seed=SEEDS,
    kind=st.sampled_from(["normal", "normal", "levels", "outlier", "constant"]),
    ratio=st.sampled_from([0.0, 0.0, 1.0, -30.0, 1e3]),
    exponent=st.sampled_from([0, 0, 0, 7, -6]),
)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers that a type of ``dtype`` holds exactly."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def lost_to_the_mean(x: Tensor, rstd: Tensor) -> float:
    """How many times more than usual a result may lose: float64 has no wider type that the mean could be kept in.

    Half a unit in the mean's last place, over the standard deviation, is an error of the normalized values.
    """
    if x.dtype is not torch.float64:
        return 1.0
    unit = torch.finfo(torch.float64).eps * x.abs().max().item() * rstd.max().item()
    return max(1.0, unit / RELATIVE[torch.float64])
