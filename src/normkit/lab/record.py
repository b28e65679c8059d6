"""``run.json``: what a folder of results was made with, and the refusal to mix it with anything else."""

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch

from ..errors import ResultsError
from .claim import Plan
from .data import Dataset
from .own import source_digest
from .results import atomic_write

__all__ = [
    "check_record",
    "check_versions",
    "commit",
    "differing",
    "elsewhere",
    "machine",
    "read_record",
    "versions",
    "write_record",
]


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of ``run.json`` by claim; an empty mapping where there is none.

    Raises:
        ResultsError: the file is damaged.
    """
    path = folder / "run.json"
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ResultsError(f"{path}: damaged ({error}); choose another --out or remove the folder") from error
    if not isinstance(record, dict) or not all(isinstance(entry, dict) for entry in record.values()):
        raise ResultsError(f"{path}: expected an object of claims; choose another --out or remove the folder")
    return record


def check_record(folder: Path, plan: Plan, dataset: Dataset) -> None:
    """Refuse to go on with a folder that was made with other settings or other data.

    Raises:
        ResultsError: the message names what differs.
    """
    known = read_record(folder).get(plan.claim)
    if known is None:
        return
    asked = {"plan": plan.record(), "data_digest": dataset.digest, "network_digest": source_digest(plan.network)}
    found = differing({name: known.get(name) for name in asked}, asked)
    # Seeds may be added: every one is an experiment of its own.
    found.pop("seeds", None)
    if found:
        listed = "; ".join(f"{name} {there} there, {now} now" for name, (there, now) in found.items())
        raise ResultsError(
            f"{folder} holds {plan.claim} with other settings ({listed}); run with those, or choose another --out"
        )


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what two records of a claim's run differ in, by name: plan, data, versions, commit and machine."""
    flat = []
    for record in (first, second):
        named = {"data files (SHA-256)": record.get("data_digest")}
        named["network's file (SHA-256)"] = record.get("network_digest")
        named |= {name: record.get(name) for name in ("commit", "machine")}
        # Runs from before designs had a number are of the first.
        flat.append({**named, "design": 1, **_flat(record.get("plan") or {}), **_flat(record.get("versions") or {})})
    names = list(dict.fromkeys([*flat[0], *flat[1]]))
    return {name: (flat[0].get(name), flat[1].get(name)) for name in names if flat[0].get(name) != flat[1].get(name)}


def check_versions(folder: Path, plan: Plan) -> None:
    """Refuse to add cells to ones that other versions computed: their numbers may differ.

    Raises:
        ResultsError: the message names the versions.
    """
    known = read_record(folder).get(plan.claim)
    if known is not None and known.get("versions") != versions():
        raise ResultsError(
            f"{folder} is unfinished and was begun with {_spoken(known.get('versions', {}))}; these are "
            f"{_spoken(versions())}. Go on with the old versions, or choose another --out"
        )


def elsewhere(folder: Path, plan: Plan) -> str:
    """Return in words what a folder was begun with that is another one now, and may change a number; else nothing."""
    known = read_record(folder).get(plan.claim)
    if known is None:
        return ""
    now = {"machine": machine(plan.device), "commit": commit()}
    found = [f"{name} {known.get(name)} there, {value} now" for name, value in now.items() if known.get(name) != value]
    return f"{folder} goes on with another {'; '.join(found)}; every row says which it is of" if found else ""


def write_record(folder: Path, plan: Plan, dataset: Dataset) -> None:
    """Add the plan to ``run.json``, before its first row is written, or the seeds that are new to it."""
    record = read_record(folder)
    if plan.claim in record:
        known = record[plan.claim]
        seeds = sorted({*known["plan"]["seeds"], *plan.seeds})
        if seeds == known["plan"]["seeds"]:
            return
        known["plan"]["seeds"] = seeds
        known["fingerprint"] = replace(plan, seeds=tuple(seeds)).fingerprint
        atomic_write(folder / "run.json", json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")
        return
    record[plan.claim] = {
        "plan": plan.record(),
        "fingerprint": plan.fingerprint,
        "data": dataset.description,
        "data_digest": dataset.digest,
        "network_digest": source_digest(plan.network),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(plan.device),
    }
    atomic_write(folder / "run.json", json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n")


def versions() -> dict[str, str]:
    """Return the versions that the numbers hang on."""
    return {
        "normkit": version("normkit"),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "numba": version("numba"),
        "python": platform.python_version(),
    }


def device_name(device: str) -> str:
    """Return the device's name: a GPU by its model."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def machine(device: str) -> str:
    """Return the machine in words: system, processor with the vectors torch uses, and GPU where one computes."""
    parts = [f"{platform.system()} {platform.machine()}"]
    parts += [f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"]
    return ", ".join(parts if device == "cpu" else [*parts, device_name(device)])


def _processor() -> str:
    """Return the processor's name as Linux knows it, or as the platform does."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or "unknown processor")


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Return the commit this code is of, with ``-dirty`` where it was changed; ``None`` outside a repository."""
    here = Path(__file__).resolve()
    described = _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    # An installed package may lie inside somebody else's repository, which does not track this file.
    return described if described and _git(here.parent, "ls-files", "--error-unmatch", here.name) else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603  a fixed command, no shell
            ["git", *arguments],  # noqa: S607  whichever git the user has
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings under their own names."""
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat.update(_flat(inner) if isinstance(inner, Mapping) else {name: inner})
    return flat


def _spoken(known: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in known.items()) or "unknown versions"
