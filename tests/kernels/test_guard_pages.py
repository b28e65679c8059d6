"""No kernel reads or writes past what it was handed, or reads what was freed: told by the processor, not by numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("guard_pages_worker.py")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect as Linux has it")


def run(element: str, side: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, WORKER, element, side],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def free() -> str:
    """The digest of every result in malloc's memory, every byte of which is filled as it is lent and freed."""
    ended = run("float32", "free", MALLOC_PERTURB_="129")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# Half precision reads and writes vectors half as long, float64 twice; the sources are the same.
@pytest.mark.parametrize(
    ("element", "side"), [("float32", "after"), ("float32", "before"), ("float64", "after"), ("bfloat16", "after")]
)
def test_kernels_touch_nothing_before_or_after_what_they_are_handed(element, side, free):
    ended = run(element, side)
    assert ended.returncode == 0, f"the process ended with {ended.returncode}: {ended.stderr[-2000:]}"
    if element == "float32":
        assert ended.stdout == free, "the results are others than in ordinary memory"


@pytest.mark.parametrize("side", ["overrun", "overwrite"])
def test_one_that_goes_too_far_would_be_told(side):
    assert run("float32", side).returncode < 0


def test_results_hold_nothing_of_what_malloc_left(free):
    assert run("float32", "free", MALLOC_PERTURB_="6").stdout == free
