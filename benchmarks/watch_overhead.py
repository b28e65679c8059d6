"""What ``normkit.watch`` costs: training steps with and without it, interleaved, on networks of two sizes.

Run ``python benchmarks/watch_overhead.py``; ``--rounds`` and ``--threads`` change how long and how wide. Each round
times a block of bare steps and a block of watched ones on the same model, in alternating order. What the watch adds to
a step does not hang on the size of the batch, so it is measured where it is large beside the step, on two small
samples, as a difference of lower quartiles; the overhead is that over the step of the real batch. Beside it stand the
quartiles over rounds of the ratio of watched and bare blocks of the real batch: they hold all there is, and on a busy
machine mostly its noise. ``--clock cpu`` counts the time of this process's own processors.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

import normkit


class Block(nn.Module):
    """Two convolutions with batch normalization, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Add what the block computes."""
        return functional.relu(images + self.inner(images))


def residual(width: int, blocks: int) -> nn.Module:
    """A residual network for 32 x 32 images with 2 * blocks + 1 batch normalizations."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        *(Block(width) for _ in range(blocks)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip


def lenet() -> nn.Module:
    """LeNet-5 with a batch normalization after every hidden layer."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.BatchNorm1d(120), nn.ReLU(),
        nn.Linear(120, 84), nn.BatchNorm1d(84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


Shape = tuple[int, ...]

CASES: dict[str, tuple[Callable[[], nn.Module], Shape, Shape]] = {
    "LeNet-5, 4 layers": (lenet, (64, 1, 28, 28), (2, 1, 28, 28)),
    "residual, 19 layers of 32 channels": (lambda: residual(32, 9), (32, 3, 32, 32), (2, 3, 4, 4)),
    "residual, 19 layers of 16 channels": (lambda: residual(16, 9), (32, 3, 16, 16), (2, 3, 4, 4)),
}


Clock = Callable[[], float]


def seconds(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, steps: int, clock: Clock, *, watched: bool
) -> list[float]:
    """Time the training steps of a block, one by one."""
    labels, times = torch.zeros(len(images), dtype=torch.long), []
    with normkit.watch(model) if watched else nullcontext():
        for _ in range(steps):
            start = clock()
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            times.append(clock() - start)
    return times


def rounds(
    model: nn.Module, images: Tensor, count: int, length: int, clock: Clock
) -> tuple[list[float], list[float], list[float]]:
    """Return bare steps, watched steps, and the ratio of watched and bare blocks less one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    seconds(model, optimizer, images, 2, clock, watched=True)
    steps: dict[bool, list[float]] = {False: [], True: []}
    ratios = []
    for number in range(count):
        order = (False, True) if number % 2 == 0 else (True, False)
        block = {watched: seconds(model, optimizer, images, length, clock, watched=watched) for watched in order}
        ratios.append(sum(block[True]) / sum(block[False]) - 1)
        for watched, times in block.items():
            steps[watched] += times
    return steps[False], steps[True], ratios


def lower(times: list[float]) -> float:
    """Return the lower quartile."""
    return statistics.quantiles(times, n=4)[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    for name, (build, shape, small) in CASES.items():
        model = build()
        bare, watched, _ = rounds(model, torch.randn(small), 2 * arguments.rounds, 2 * arguments.steps, clock)
        cost = lower(watched) - lower(bare)
        step, _, ratios = rounds(model, torch.randn(shape), arguments.rounds, arguments.steps, clock)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}, batch {shape}: step {lower(step) * 1e3:.1f} ms, the watch {cost * 1e6:.0f} us, "
            f"overhead {cost / lower(step):+.2%}; blocks {middle:+.2%} ({low:+.2%} to {high:+.2%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
