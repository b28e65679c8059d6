"""A folder of results read back: each claim's rows, its verdict, and what to show."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, ResultsError
from .charts import Chart, Table
from .claim import Claim
from .claims import get_claim
from .record import read_record
from .results import atomic_write, read_cells
from .verdicts import Verdict

__all__ = ["Entry", "read_ledger", "write_verdicts"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One claim of a folder.

    Attributes:
        claim: the claim.
        record: what ``run.json`` says of its run.
        verdict: the claim's rules applied to the finished cells.
        shown: figures and tables, none before the first cell is finished.
        finished: cells that are done.
        total: cells that the run has.
        rows: the rows of the finished cells.
    """

    claim: Claim
    record: Mapping[str, Any]
    verdict: Verdict
    shown: tuple[Chart | Table, ...]
    finished: int
    total: int
    rows: Sequence[Mapping[str, Any]]

    @property
    def command(self) -> str:
        """The command that repeats the run."""
        plan = self.record["plan"]
        processes = plan["settings"].get("processes", 1)
        program = "normkit" if processes == 1 else f"torchrun --standalone --nproc-per-node {processes} -m normkit"
        return (
            f"{program} lab run {self.claim.id} --data {plan['data']} --norms {','.join(plan['norms'])} "
            f"--seeds {len(plan['seeds'])}{self._epochs} --device {plan['device']}"
        )

    @property
    def _epochs(self) -> str:
        return f" --epochs {self.record['plan']['settings']['epochs']}" if self.claim.trains else ""


def read_ledger(folder: Path) -> tuple[Entry, ...]:
    """Read a folder's results and judge every claim in it.

    Raises:
        ArgumentError: the folder does not exist or holds no run.
        ResultsError: its files are damaged, or name a claim that this version does not have.
    """
    if not folder.is_dir():
        raise ArgumentError(f"{folder}: no such folder; expected one that `normkit lab run` wrote")
    record = read_record(folder)
    if not record:
        raise ArgumentError(f"{folder}: holds no run.json; expected a folder that `normkit lab run` wrote")
    cells = read_cells(folder / "results.jsonl").cells
    entries = [_entry(folder, name, entry, cells) for name, entry in record.items()]
    return tuple(sorted(entries, key=lambda entry: int(entry.claim.number.removeprefix("E"))))


def write_verdicts(folder: Path, entries: Sequence[Entry]) -> None:
    """Write ``verdicts.json``: each claim's verdict, and what it rests on."""
    verdicts = {entry.claim.id: entry.verdict.record() for entry in entries}
    atomic_write(folder / "verdicts.json", json.dumps(verdicts, indent=2, ensure_ascii=False).encode() + b"\n")


def _entry(folder: Path, name: str, record: Mapping[str, Any], cells: Mapping[str, list[dict[str, Any]]]) -> Entry:
    try:
        claim = get_claim(name)
        plan = record["plan"]
        total = len(plan["norms"]) * len(plan["seeds"]) * len(plan["variants"])
    except (ArgumentError, KeyError, TypeError) as error:
        raise ResultsError(f"{folder / 'run.json'}: cannot be read by this version: {error}") from error
    if plan.get("design", 1) != claim.design:
        raise ResultsError(
            f"{folder} holds {name} by its design number {plan.get('design', 1)}; this version's is {claim.design} and "
            "measures something else, so that these rows cannot be judged; run it into another --out"
        )
    mine = [rows for rows in cells.values() if rows[0]["claim"] == name]
    rows = [row for cell in mine for row in cell]
    shown = claim.show(rows) if rows else ()
    return Entry(
        claim=claim, record=record, verdict=claim.judge(rows), shown=shown, finished=len(mine), total=total, rows=rows
    )
