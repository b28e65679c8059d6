"""Add seeds to a folder, look after look, until every claim is decided or the time is used up."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .claim import Plan
from .claims import get_claim
from .results import read_cells
from .sequential import next_look

__all__ = ["run_until_decided"]

# Runs these plans, dispatching no cell after the deadline (of `time.monotonic`).
Run = Callable[[Sequence[Plan], float], None]


def run_until_decided(plans: Sequence[Plan], folder: Path, run: Run, *, minutes: float | None = None) -> None:
    """Run plans to their next look, judge, and go on with those that are open.

    A claim is done with when a look decides it, when a premise is shown to fail, or after the last look. What is in the
    folder already counts, so that the same command goes on after a kill or with another budget.

    Args:
        plans: one per claim; their seeds are chosen here.
        folder: where results are kept.
        run: runs plans and leaves the folder's results complete.
        minutes: no cell is begun after so many; ``None`` for no end but the last look.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    # The first round checks every plan against the folder, also those that are decided.
    rounds = [_to_next_look(plan, folder) or _as_it_is(plan, folder) for plan in plans]
    while rounds:
        run(rounds, deadline)
        if time.monotonic() >= deadline:
            return
        rounds = [more for plan in plans if (more := _to_next_look(plan, folder)) is not None]


def _to_next_look(plan: Plan, folder: Path) -> Plan | None:
    """Return the plan with the seeds of its next look; ``None`` where there is nothing to gain from one."""
    verdict = get_claim(plan.claim).judge(_rows(plan, folder))
    look = None if verdict.final else next_look(verdict.looks[-1].seeds if verdict.looks else 0)
    return None if look is None else replace(plan, seeds=tuple(range(look)))


def _as_it_is(plan: Plan, folder: Path) -> Plan:
    """Return the plan with the seeds that the folder holds of it."""
    return replace(plan, seeds=tuple(sorted({row["seed"] for row in _rows(plan, folder)})))


def _rows(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Return the claim's rows of finished cells."""
    return [row for row in read_cells(folder / "results.jsonl").rows if row["claim"] == plan.claim]
