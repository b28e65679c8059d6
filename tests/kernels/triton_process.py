"""What the tests of the Triton kernels share: their workers run in processes of their own, interpreted or compiled."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

__all__ = ["CONSTANT", "HUGE", "INSTALLED", "NAN", "NORMAL", "needs_triton", "run_worker"]

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed; there are packages for Linux alone")
NORMAL, CONSTANT, NAN, HUGE = range(4)  # what is troubled of a case: a channel, or a sample


def run_worker(worker: str, file: Path, *task: str, interpreted: bool) -> object:
    """Run a worker of this folder and return what it saved."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(file.parent / "cache")
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(Path(__file__).with_name(worker)), task[0], str(file), *task[1:]]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return torch.load(file, weights_only=True)
