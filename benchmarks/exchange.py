"""What synchronization costs: one layer's step on 1, 2 and 4 gloo processes, by size.

    python benchmarks/exchange.py

Each process holds its own batch of 32 by C by 14 by 14, on one thread. Printed is the median over rounds of forward and
backward: without an exchange (`BatchNorm2d`), with it (`SyncBatchNorm`), and what torch's layer says.
"""

import datetime
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, nn

import normkit

CHANNELS = (16, 256, 2048)
ROUNDS = 60


def median(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> float:
    """Return the median milliseconds of a forward and backward."""
    taken = []
    for _ in range(ROUNDS):
        distributed.barrier()
        start = time.perf_counter()
        layer(x).backward(dy)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[10:]) * 1e3


def rank(place: int, ranks: int, folder: str) -> None:
    """Measure on one process; the first prints."""
    torch.set_num_threads(1)
    method, timeout = f"file://{folder}/{ranks}", datetime.timedelta(seconds=120)
    distributed.init_process_group("gloo", init_method=method, rank=place, world_size=ranks, timeout=timeout)
    for channels in CHANNELS:
        x, dy = torch.randn(32, channels, 14, 14, requires_grad=True), torch.randn(32, channels, 14, 14)
        alone, together = (median(make(channels), x, dy) for make in (normkit.BatchNorm2d, normkit.SyncBatchNorm))
        try:
            theirs = f"{median(nn.SyncBatchNorm(channels), x, dy):.2f} ms"
        except (RuntimeError, ValueError) as error:
            theirs = str(error).splitlines()[0]
        if place == 0:
            cells = (ranks, channels, f"{alone:.2f} ms", f"{together:.2f} ms", f"{together - alone:.2f} ms", theirs)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    print("| processes | channels | alone | synchronized | more | torch's SyncBatchNorm |\n|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2, 4):
            processes = [context.Process(target=rank, args=(place, ranks, str(Path(folder)))) for place in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
