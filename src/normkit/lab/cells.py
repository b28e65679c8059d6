"""Run one cell, in whatever process it was sent to."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from .backends import seen_backends
from .checkpoints import keeping
from .claim import Cell
from .claims import get_claim
from .data import limited, load
from .own import searched
from .record import device_name, machine, versions
from .searches import sharing
from .training import deterministic

__all__ = ["SEARCHES", "SECONDS_BETWEEN_LOOKS", "Surroundings", "forget_checkpoints", "run_cell", "write_log"]

# Often enough for a progress bar, seldom enough to cost nothing.
SECONDS_BETWEEN_LOOKS = 0.2
# The folder, beside the results, of what the searches for rates found.
SEARCHES = "searches"


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a cell needs that is not its own.

    Attributes:
        data_dir: the folder of the data set's files.
        folder: where log and checkpoints are written; ``None`` for a process that does not see it.
        commit: the commit of the code.
        parent: the process to end with; ``None`` for one that ends by itself.
        keeps: whether the epochs of long trainings, and what searches found, are kept.
        modules: a folder in which Python finds a reader's modules too.
    """

    data_dir: Path | None
    folder: Path | None
    commit: str | None
    parent: int | None
    keeps: bool = True
    modules: str | None = None


def run_cell(cell: Cell, surroundings: Surroundings) -> list[dict[str, Any]]:
    """Measure one cell and return its rows, each with everything needed to repeat it."""
    if surroundings.parent is not None:
        _serve(surroundings.parent)
    searched(surroundings.modules)
    dataset = load(cell.data, surroundings.data_dir)
    settings = cell.settings
    if settings.train_images is not None or settings.test_images is not None:
        dataset = limited(dataset, settings.train_images, settings.test_images, cell.seed)
    folder = surroundings.folder
    keeper = folder if surroundings.keeps else None
    identity = f"{versions()}{surroundings.commit}"
    measurements = []
    with (
        deterministic(cell.device),
        seen_backends() as backends,
        keeping(keeper and _checkpoints(keeper, cell.key), identity),
        sharing(keeper and keeper / SEARCHES, identity),
    ):
        begun = time.perf_counter()
        for measurement in get_claim(cell.claim).measure(cell, dataset):
            measurements.append(measurement)
            if folder is not None:
                write_log(folder, cell.key, len(measurements), time.perf_counter() - begun)
    if get_claim(cell.claim).keeps_last:
        measurements = measurements[-1:]
    common = {
        "claim": cell.claim,
        "data": cell.data,
        "norm": cell.norm,
        **dict(cell.variant),
        "seed": cell.seed,
    }
    evidence = {
        "classes": len(dataset.classes),
        "device": device_name(cell.device),
        "machine": machine(cell.device),
        "backend": dict(sorted(backends.items())),
        "settings": asdict(cell.settings),
        "versions": versions(),
        "commit": surroundings.commit,
        "cell": cell.key,
        "rows": len(measurements),
    }
    return [
        {**common, **measurement, **evidence, "row": number} for number, measurement in enumerate(measurements, start=1)
    ]


def forget_checkpoints(folder: Path, cell: str) -> None:
    """Remove what was kept of a cell whose rows are written."""
    shutil.rmtree(_checkpoints(folder, cell), ignore_errors=True)


def write_log(folder: Path, cell: str, step: int, seconds: float) -> None:
    """Append one line to the folder's log in one call, so that lines of several processes do not mix."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cell": cell,
        "step": step,
        "seconds": round(seconds, 3),
        "process": os.getpid(),
    }
    file = os.open(folder / "log.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, json.dumps(line).encode() + b"\n")
    finally:
        os.close(file)


def _checkpoints(folder: Path, cell: str) -> Path:
    """Return the folder of a cell's checkpoints; a key holds characters that file names may not."""
    return folder / "checkpoints" / hashlib.sha256(cell.encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _serve(parent: int) -> None:
    """Make this process a worker of the parent: it leaves Ctrl-C to the parent, and ends when the parent is gone."""
    # Ctrl-C reaches every process of the terminal; the parent ends its workers itself, without their tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    # A parent that is killed cannot end its workers, which would compute on for nobody.
    threading.Thread(target=watch, daemon=True).start()
