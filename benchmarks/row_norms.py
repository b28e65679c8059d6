"""Layer, RMS, group and instance norm beside torch eager: forward, and forward with backward, interleaved.

Run ``python benchmarks/row_norms.py``; ``--sets layer rms group group-last`` chooses what, ``--json FILE`` keeps the
rows. Each round calls torch and ours one after the other; a row is the median of the rounds,
and its ratio is torch's time over ours. ``--seconds`` is how long each of a row's four calls is measured.

On a machine that others use too, ``--threads 1 --clock processor`` counts the time of the processor and not that of the
wall: what others do then costs caches, and no turns.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import normkit
from normkit import functional as ours_functional

ROWS, WIDTHS = (32, 256, 2048, 8192), (128, 512, 768, 1024, 2048, 4096, 8192)
LANGUAGE = [(rows, width) for width in WIDTHS for rows in ROWS]
# ResNet-50 and MobileNetV2 at 32 samples, U-Nets at few: the vision shapes that 32 groups divide.
VISION = [
    *((32, channels, 56, 56) for channels in (64, 128, 256)),
    *((32, channels, 28, 28) for channels in (128, 192, 256, 512)),
    *((32, channels, 14, 14) for channels in (64, 256, 512, 576, 1024)),
    *((32, channels, 7, 7) for channels in (160, 320, 512, 1280, 2048)),
    (32, 64, 112, 112),
    (4, 64, 256, 256),
    (4, 256, 64, 64),
    (4, 1024, 16, 16),
    (2, 64, 48, 48, 48),
    (2, 256, 12, 12, 12),
]
SETS = ("layer", "rms", "group", "group-last", "group1", "group1-last", "instance", "instance-last")


def calls(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], ...]]:
    """Return for forward and for forward with backward the call of torch and ours."""
    method, _, memory = kind.partition("-")
    x = torch.randn(shape).to(dtype)
    if memory:
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    x.requires_grad_()
    channels = shape[-1] if method in ("layer", "rms") else shape[1]
    weight, bias = (torch.randn(channels).to(dtype).requires_grad_() for _ in range(2))
    groups = 1 if method == "group1" else 32
    dy, leaves = torch.randn_like(x), [x, weight] if method == "rms" else [x, weight, bias]

    def call(functions: Any) -> Tensor:
        if method == "layer":
            return functions.layer_norm(x, (channels,), weight, bias)
        if method == "rms":
            return functions.rms_norm(x, (channels,), weight, 1e-6)
        if method == "instance":
            return functions.instance_norm(x, weight=weight, bias=bias)
        return functions.group_norm(x, groups, weight, bias)

    def forward(functions: Any) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                call(functions)

        return run

    both = (torch_functional, ours_functional)
    return {
        "forward": tuple(map(forward, both)),
        "forward+backward": tuple((lambda f=f: torch.autograd.grad(call(f), leaves, dy)) for f in both),
    }


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def measure(functions: tuple[Callable[[], Any], ...], seconds: float, now: Callable[[], float]) -> list[float]:
    """Return the median seconds of each, called in turns."""
    repeats = []
    for function in functions:
        function()
        start = now()
        function()
        # A turn of a few milliseconds, so that the clock and the change of turns do not count.
        repeats.append(max(1, min(500, int(3e-3 / max(now() - start, 1e-6)))))
    found: list[list[float]] = [[] for _ in functions]
    end = now() + seconds * len(functions)
    while len(found[0]) < 5 or now() < end:
        for times, function, count in zip(found, functions, repeats, strict=True):
            start = now()
            for _ in range(count):
                function()
            times.append((now() - start) / count)
    return [statistics.median(times) for times in found]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--largest", type=int, default=1 << 26, help="elements; larger shapes are left out")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if options.clock == "processor" and options.threads != 1:
        parser.error("--clock processor adds up the time of all threads; pass --threads 1")
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for kind in options.sets:
        for shape in LANGUAGE if kind in ("layer", "rms") else VISION:
            if math.prod(shape) > options.largest:
                continue
            for what, functions in calls(kind, shape, getattr(torch, options.dtype)).items():
                theirs, ours = measure(functions, options.seconds, CLOCKS[options.clock])
                rows.append({"set": kind, "shape": shape, "what": what, "torch": theirs, "ours": ours})
                print(
                    f"{kind:14} {shape!s:20} {what:17} {theirs * 1e6:10.1f} {ours * 1e6:10.1f} us {theirs / ours:6.2f}"
                )
        for what in ("forward", "forward+backward"):
            ratios = [row["torch"] / row["ours"] for row in rows if row["set"] == kind and row["what"] == what]
            mean = statistics.geometric_mean(ratios)
            print(
                f"== {kind} {what}: geometric mean {mean:.2f}, least {min(ratios):.2f}, {len(ratios)} shapes",
                flush=True,
            )
    if options.json:
        about = {"normkit": normkit.__version__, "torch": torch.__version__, "machine": platform.machine()}
        settings = {
            "threads": options.threads,
            "clock": options.clock,
            "dtype": options.dtype,
            "seconds": options.seconds,
        }
        options.json.write_text(json.dumps({**about, **settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
