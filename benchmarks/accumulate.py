"""How long one step takes and how much memory: accumulated exactly, accumulated plainly, and as one large batch.

    python benchmarks/accumulate.py                       # time, for 2, 4 and 8 micro-batches
    python benchmarks/accumulate.py --memory              # peak resident memory, each way in a process of its own

The net is a small ResNet on images (17 batch norms), the batch 64 images of 32 by 32 for time and larger for memory.
Rounds of all ways in turn; the least of each. Memory is counted above what the process has before its first step.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit

Norm = Callable[[int], nn.Module]
Batch = tuple[Tensor, Tensor]
MEASURED = ("large batch", "plain accumulation", "exact", "exact, disk", "micro-batch alone", "one norm's inputs")


class Block(nn.Module):
    """Two convolutions with a norm each, and the shortcut."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.inner, self.outer = norm(channels), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add what two convolutions make of x."""
        return F.relu(x + self.outer(self.second(F.relu(self.inner(self.first(x))))))


def network(channels: int, norm: Norm) -> nn.Module:
    """Build the net."""
    blocks = [Block(channels, norm) for _ in range(8)]
    enter, head = nn.Conv2d(3, channels, 3, padding=1), nn.Linear(channels, 10)
    return nn.Sequential(enter, norm(channels), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def plainly(model: nn.Module, parts: list[Batch]) -> None:
    """Accumulate as everybody does."""
    for part in parts:
        (loss(model, part) / len(parts)).backward()


def ways(model: nn.Module, x: Tensor, y: Tensor, micro: int) -> dict[str, Callable[[], object]]:
    """Return the ways to take a step."""
    size = len(x) // micro
    parts = list(zip(x.split(size), y.split(size), strict=True))
    return {
        "large batch": lambda: loss(model, (x, y)).backward(),
        "plain accumulation": lambda: plainly(model, parts),
        "statistics": lambda: normkit.accumulate(model, parts, loss),
        "exact": lambda: normkit.accumulate(model, parts, loss, kind="exact"),
        "exact, disk": lambda: normkit.accumulate(model, parts, loss, kind="exact", offload="disk"),
        "micro-batch alone": lambda: loss(model, parts[0]).backward(),
    }


def timed(arguments: argparse.Namespace) -> None:
    """Print the least time of each way."""
    torch.manual_seed(0)
    x, y = torch.randn(arguments.batch, 3, arguments.size, arguments.size), torch.randint(10, (arguments.batch,))
    print(f"{torch.get_num_threads()} threads, batch {arguments.batch}, torch {torch.__version__}")
    print("| norms | micro-batches | large batch | plain | statistics | exact | exact, disk | exact / plain |")
    print("|---|---|---|---|---|---|---|---|")
    for name, norm in (("torch", nn.BatchNorm2d), ("normkit", normkit.BatchNorm2d)):
        model = network(arguments.channels, norm)
        for micro in (2, 4, 8):
            steps, least = ways(model, x, y, micro), {}
            for turn in range(arguments.rounds + 1):
                for way, step in steps.items():
                    start = time.perf_counter()
                    step()
                    if turn:
                        least[way] = min(least.get(way, 1e9), time.perf_counter() - start)
            shown = " | ".join(f"{least[way] * 1e3:.0f} ms" for way in list(steps)[:5])
            print(f"| {name} | {micro} | {shown} | {least['exact'] / least['plain accumulation']:.2f} |", flush=True)


def resident() -> int:
    """Return the bytes that this process has in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(step: Callable[[], object]) -> int:
    """Return the most resident memory during a step, above that before it."""
    before, highest, over = resident(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            highest[0] = max(highest[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    over.set()
    watcher.join()
    return highest[0] - before


def measured(arguments: argparse.Namespace) -> None:
    """Print the peak of one way; the inputs of all norms are counted by hooks, to compare with."""
    torch.manual_seed(0)
    x, y = torch.randn(arguments.batch, 3, arguments.size, arguments.size), torch.randint(10, (arguments.batch,))
    model = network(arguments.channels, nn.BatchNorm2d)
    tiny = (x[:2, :, :8, :8], y[:2])
    loss(model, tiny).backward()
    normkit.accumulate(model, [tiny, tiny], loss, kind="exact", offload="disk")
    inputs = []
    if arguments.way == "one norm's inputs":
        model[1].register_forward_hook(lambda module, given, y: inputs.append(given[0].nbytes))
        loss(model, (x, y))
        print(sum(inputs))
        return
    print(peak(ways(model, x, y, arguments.micro)[arguments.way]))


def memory(arguments: argparse.Namespace) -> None:
    """Print the peak of every way."""
    settings = ["--batch", str(arguments.batch), "--size", str(arguments.size), "--channels", str(arguments.channels)]
    print("| micro-batches | way | peak above the model, MB |")
    print("|---|---|---|")
    for micro in (4, 8):
        for way in MEASURED:
            command = [sys.executable, __file__, "--way", way, "--micro", str(micro), *settings]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"| {micro} | {way} | {int(done.stdout) / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--way")
    given = parser.parse_args()
    (measured if given.way else memory if given.memory else timed)(given)
