"""What synchronization costs: one layer's step on 1, 2 and 4 gloo processes, by size.

    python benchmarks/exchange.py

Each process holds its own batch of 32 by C by 14 by 14, on one thread. Printed are medians over rounds of forward and
backward, the layers in turns: without an exchange (`BatchNorm2d`), with it (`SyncBatchNorm`), the median of what it
takes more in a round, and what torch's layer says. The load of the machine stands above the table.
"""

import datetime
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

import torch
from torch import distributed, nn

import normkit

CHANNELS = (16, 256, 2048)
ROUNDS, FIRST = 60, 10


def seconds(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> float:
    """Return what a forward and backward take, which all processes begin together."""
    distributed.barrier()
    start = time.perf_counter()
    layer(x).backward(dy)
    return time.perf_counter() - start


def measured(channels: int) -> tuple[str, ...]:
    """Return the cells of a row."""
    x, dy = torch.randn(32, channels, 14, 14, requires_grad=True), torch.randn(32, channels, 14, 14)
    layers = {"alone": normkit.BatchNorm2d(channels), "together": normkit.SyncBatchNorm(channels)}
    theirs = nn.SyncBatchNorm(channels)
    try:
        seconds(theirs, x, dy)
        refused, layers["theirs"] = "", theirs
    except (RuntimeError, ValueError) as error:
        refused = str(error).splitlines()[0]
    rounds = [{name: seconds(layer, x, dy) for name, layer in layers.items()} for _ in range(ROUNDS)][FIRST:]
    taken = {name: statistics.median(each[name] for each in rounds) * 1e3 for name in layers}
    more = statistics.median(each["together"] - each["alone"] for each in rounds) * 1e3
    cells = (taken["alone"], taken["together"], more, *([] if refused else [taken["theirs"]]))
    return (*(f"{value:.2f} ms" for value in cells), *([refused] if refused else []))


def rank(place: int, ranks: int, folder: str) -> None:
    """Measure on one process; the first prints."""
    torch.set_num_threads(1)
    method, timeout = f"file://{folder}/{ranks}", datetime.timedelta(seconds=120)
    distributed.init_process_group("gloo", init_method=method, rank=place, world_size=ranks, timeout=timeout)
    for channels in CHANNELS:
        cells = measured(channels)
        if place == 0:
            print(f"| {' | '.join((str(ranks), str(channels), *cells))} |", flush=True)
    # When all have come so far; and not by Python's end, where torch's own threads of a group end a process with
    # SIGABRT now and then.
    store = distributed.distributed_c10d._get_default_store()
    store.set(f"finished {place}", "")
    store.wait([f"finished {other}" for other in range(ranks)])
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{datetime.datetime.now().date()}, torch {torch.__version__}, {os.cpu_count()} cores, load {load}\n")
    print("| processes | channels | alone | synchronized | more | torch's SyncBatchNorm |\n|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2, 4):
            processes = [context.Process(target=rank, args=(place, ranks, folder)) for place in range(ranks)]
            for process in processes:
                process.start()
            ended = [process.join() or process.exitcode for process in processes]
            if any(ended):
                sys.exit(f"the processes ended with {ended}")
