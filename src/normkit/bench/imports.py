"""What ``import normkit`` costs over ``import torch``, each in a fresh interpreter."""

import subprocess
import sys
from dataclasses import asdict
from typing import Any

from ..errors import RunError
from .timing import summarize

__all__ = ["measure_imports"]

_PROGRAM = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
_MODULES = ("torch", "normkit")
_PATIENCE = 120


def measure_imports(rounds: int = 11) -> dict[str, Any]:
    """Import each in turns, in new processes; the first round fills the file cache and is not counted.

    Returns:
        Seconds of both imports, and the share by which normkit's is longer: normkit imports torch too.

    Raises:
        RunError: an import failed.
    """
    seconds: dict[str, list[float]] = {module: [] for module in _MODULES}
    for number in range(rounds + 1):
        for module in _MODULES if number % 2 else reversed(_MODULES):
            taken = _import(module)
            if number:
                seconds[module].append(taken)
    timings = {module: summarize(taken) for module, taken in seconds.items()}
    return {
        "overhead": timings["normkit"].median / timings["torch"].median - 1,
        "modules": {module: asdict(timing) for module, timing in timings.items()},
    }


def _import(module: str) -> float:
    """Return the seconds that one import takes in a new interpreter."""
    done = subprocess.run(  # noqa: S603  our own interpreter and a fixed program
        [sys.executable, "-c", _PROGRAM.format(module)], capture_output=True, text=True, timeout=_PATIENCE, check=False
    )
    if done.returncode:
        raise RunError(f"import {module} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)
