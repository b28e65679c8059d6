"""``normkit bench``: how fast and how exact, beside torch."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ArgumentError
from ..files import check_place
from ..spelling import alternatives
from .terminal import TOLD_INTERRUPT, echo

if TYPE_CHECKING:
    from ..bench.shapes import Row
    from .bench_display import BenchProgress

__all__ = ["bench"]

# Seconds for the timing of one row, and the fewest samples of each peer.
_FULL, _QUICK = (1.0, 5), (0.05, 3)
# A training step is a hundred layers' work.
_STEP = 20
# Seconds after which what was measured so far is written again.
_WRITE = 60

SECTIONS = ("rows", "training", "imports")


def bench(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE...]", help="With --summary: what to read.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One or two small shapes of each set and the training steps: a minute or so."),
    ] = False,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="SET,SET",
            help="Of resnet50, mobilenetv2, unet3d, unet2d, mlp, audio, lenet, edge, tiny; all if left out.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, comma-separated; the first two if left out.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="contiguous, channels_last, sliced, permuted; all if left out.")
    ] = None,
    work: Annotated[str | None, typer.Option(help="eval, forward, forward+backward; all if left out.")] = None,
    chain: Annotated[str | None, typer.Option(help="bn, bn+relu, bn+add+relu; all if left out.")] = None,
    threads: Annotated[int | None, typer.Option(help="torch's threads; as many as torch takes if left out.")] = None,
    seconds: Annotated[float | None, typer.Option(help="For timing one row, all peers together.")] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Time torch.compile too. Left out: where a C++ compiler is found, but not with --quick.",
        ),
    ] = None,
    reuse_memory: Annotated[
        bool, typer.Option("--reuse-memory", help="Keep freed memory in the process, for every peer alike.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PART,PART",
            help="Of rows, training, imports. Left out: all; the first two with --quick; rows if rows are chosen.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print the Markdown summary of files that --json wrote.")
    ] = False,
) -> None:
    """Time batch normalization beside torch's, each kernel checked first. Exit code 1: wrong kernel."""
    if summary:
        _summarize(files or [])
        return
    if files:
        raise ArgumentError(f"{files[0]}: files are read with --summary; to write one, pass --json {files[0]}")
    _check(threads, seconds, json_file)
    chosen = [None if text is None else text.split(",") for text in (shapes, dtype, layout, work, chain)]
    sections = _sections(only, quick, any(names is not None for names in chosen))
    limit, least = _QUICK if quick else _FULL
    settings = {
        "quick": quick, "only": sections, "shapes": shapes, "dtype": dtype, "layout": layout, "work": work,
        "chain": chain, "seconds": limit if seconds is None else seconds, "least_samples": least,
        "compile": _compile(compiled, quick), "reuse_memory": reuse_memory,
    }  # fmt: skip
    rows = _rows(chosen, quick) if "rows" in sections else []
    raise typer.Exit(_run(rows, settings, threads, json_file))


def _check(threads: int | None, seconds: float | None, json_file: Path | None) -> None:
    """Refuse now what would fail after the measuring."""
    if threads is not None and threads < 1:
        raise ArgumentError(f"--threads {threads}: expected 1 or more")
    if seconds is not None and not 0 < seconds < 3600:
        raise ArgumentError(f"--seconds {seconds}: expected more than 0 and less than 3600")
    if json_file is not None:
        check_place(json_file, force=True, said="--json")


def _sections(only: str | None, quick: bool, rows_chosen: bool) -> list[str]:
    """Return which parts to measure."""
    if only is None:
        return list(SECTIONS[:1] if rows_chosen else SECTIONS[:2] if quick else SECTIONS)
    names = only.split(",")
    for name in names:
        if name not in SECTIONS:
            raise ArgumentError(f"--only: unknown {name!r}; {alternatives(name, SECTIONS)}")
    if rows_chosen and "rows" not in names:
        raise ArgumentError(
            f"--shapes, --dtype, --layout, --work and --chain choose rows, and --only {only} leaves the rows out"
        )
    return [name for name in SECTIONS if name in names]


def _compile(asked: bool | None, quick: bool) -> bool:
    """Tell whether to time torch.compile, which needs a C++ compiler."""
    if asked is False or (asked is None and quick):
        return False
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    found = any(map(shutil.which, compilers))
    if asked and not found:
        raise ArgumentError(f"--compile needs a C++ compiler, and none is found ({', '.join(compilers)}); leave it out")
    return found


def _rows(chosen: list[list[str] | None], quick: bool) -> "list[Row]":
    from ..bench.shapes import plan

    return plan(*chosen, quick=quick)


def _run(rows: "list[Row]", settings: dict[str, Any], threads: int | None, json_file: Path | None) -> int:
    """Measure, and print and write what was measured, also where it was broken off."""
    from ..bench.document import new_document, reuse_memory, write_document
    from ..bench.measure import limit_threads
    from .bench_display import print_document

    if settings["reuse_memory"] and not reuse_memory():
        raise ArgumentError("--reuse-memory sets glibc's allocator, and this process has another; leave it out")

    def keep() -> None:
        if json_file is not None:
            write_document(json_file, document)

    with limit_threads(threads) as count, _interrupted_by_termination():
        document = new_document(settings, count)
        try:
            _fill(document, rows, keep)
        except KeyboardInterrupt:
            echo("Interrupted; what was measured is kept.", err=True)
            return TOLD_INTERRUPT
        finally:
            keep()
            print_document(document)
    return 0 if document["complete"] and not document["wrong"] else 1


@contextmanager
def _interrupted_by_termination() -> Iterator[None]:
    """Inside, treat a request to end, such as `timeout` sends, as Ctrl-C: what was measured is kept."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fill(document: dict[str, Any], rows: "list[Row]", keep: Callable[[], None]) -> None:
    """Measure part by part into the document, and keep it now and then."""
    from ..bench.imports import measure_imports
    from ..bench.training import CASES, measure_training
    from .bench_display import BenchProgress

    settings = document["settings"]
    with BenchProgress() as progress:
        if rows:
            progress.begin("rows", len(rows))
            _fill_rows(document, rows, progress, keep)
        if "training" in settings["only"]:
            progress.begin("networks", len(CASES))
            for step in measure_training(seconds=settings["seconds"] * _STEP):
                document["training"].append(step)
                progress.advance()
        if "imports" in settings["only"]:
            progress.begin("imports", 1)
            document["imports"].append(measure_imports(3 if settings["quick"] else 11))
            progress.advance()
    document["complete"] = True


def _fill_rows(
    document: dict[str, Any], rows: "Sequence[Row]", progress: "BenchProgress", keep: Callable[[], None]
) -> None:
    from ..bench.measure import NotTimed, measure

    settings = document["settings"]
    written = time.monotonic()
    found: Iterator[dict[str, Any] | NotTimed] = measure(
        rows, seconds=settings["seconds"], least=settings["least_samples"], compiled=settings["compile"]
    )
    for row in found:
        if isinstance(row, NotTimed):
            document["wrong" if row.wrong else "skipped"].append({"row": row.row, "reason": row.reason})
        else:
            document["rows"].append(row)
        progress.advance()
        if time.monotonic() - written > _WRITE:
            keep()
            written = time.monotonic()


def _summarize(files: list[Path]) -> None:
    from ..bench.document import read_document
    from ..bench.markdown import markdown

    if not files:
        raise ArgumentError("--summary needs files: normkit bench --summary FILE...")
    echo(markdown([read_document(path) for path in files]))
