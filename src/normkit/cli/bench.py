"""``normkit bench``: how fast and how exact, beside torch."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ArgumentError

if TYPE_CHECKING:
    from ..bench.shapes import Row

__all__ = ["bench"]

# Seconds for the timing of one row, and the fewest samples of each peer.
_FULL, _QUICK = (1.0, 5), (0.1, 3)


def bench(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE...]", help="With --summary: what to read.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One or two small shapes of each set, in about a minute.")
    ] = False,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="SET,SET",
            help="Of resnet50, mobilenetv2, unet3d, unet2d, mlp, audio, lenet, edge; all if left out.",
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
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile too; needs a C++ compiler.")] = False,
    reuse_memory: Annotated[
        bool, typer.Option("--reuse-memory", help="Keep freed memory in the process, for every peer alike.")
    ] = False,
    training: Annotated[bool, typer.Option("--training", help="Time whole training steps instead.")] = False,
    imports: Annotated[
        bool, typer.Option("--imports", help="Time `import normkit` and `import torch` instead.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print the Markdown summary of files that --json wrote.")
    ] = False,
) -> None:
    """Time batch normalization beside torch's, each kernel checked first. Exit code 1: wrong kernel, or interrupted."""
    if summary:
        _summarize(files or [])
        return
    if files:
        raise ArgumentError(f"{files[0]}: files are read with --summary; to write one, pass --json {files[0]}")
    _check(threads, seconds, json_file, compiled)
    chosen = [None if text is None else text.split(",") for text in (shapes, dtype, layout, work, chain)]
    rows = _rows(chosen, quick) if not (training or imports) else []
    if (training or imports) and any(names is not None for names in chosen):
        raise ArgumentError("--shapes, --dtype, --layout, --work and --chain choose rows; leave them out here")
    time, least = _QUICK if quick else _FULL
    settings = {
        "quick": quick, "shapes": shapes, "dtype": dtype, "layout": layout, "work": work, "chain": chain,
        "seconds": time if seconds is None else seconds, "least_samples": least, "compile": compiled,
        "reuse_memory": reuse_memory,
    }  # fmt: skip
    raise typer.Exit(_run(rows, settings, threads, training=training, imports=imports, json_file=json_file))


def _check(threads: int | None, seconds: float | None, json_file: Path | None, compiled: bool) -> None:
    """Refuse now what would fail after the measuring."""
    if threads is not None and threads < 1:
        raise ArgumentError(f"--threads {threads}: expected 1 or more")
    if seconds is not None and not 0 < seconds < 3600:
        raise ArgumentError(f"--seconds {seconds}: expected more than 0 and less than 3600")
    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise ArgumentError(f"--json {json_file}: expected a file in a folder that exists")
    if compiled:
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
        if not any(map(shutil.which, compilers)):
            raise ArgumentError(
                f"--compile needs a C++ compiler, and none is found ({', '.join(compilers)}); leave it out"
            )


def _rows(chosen: list[list[str] | None], quick: bool) -> "list[Row]":
    from ..bench.shapes import plan

    return plan(*chosen, quick=quick)


def _run(
    rows: "list[Row]",
    settings: dict[str, Any],
    threads: int | None,
    *,
    training: bool,
    imports: bool,
    json_file: Path | None,
) -> int:
    """Measure, and print and write what was measured, also where it was broken off."""
    from ..bench.document import new_document, reuse_memory, write_document
    from ..bench.measure import limit_threads
    from .bench_display import print_document

    if settings["reuse_memory"] and not reuse_memory():
        raise ArgumentError("--reuse-memory sets glibc's allocator, and this process has another; leave it out")
    with limit_threads(threads) as count:
        document = new_document(settings, count)
        try:
            _fill(document, rows, training=training, imports=imports)
        except KeyboardInterrupt:
            typer.echo("Interrupted; what was measured is kept.", err=True)
        finally:
            print_document(document)
            if json_file is not None:
                write_document(json_file, document)
    return 0 if document["complete"] else 1


def _fill(document: dict[str, Any], rows: "list[Row]", *, training: bool, imports: bool) -> None:
    """Measure row by row into the document."""
    from ..bench.imports import measure_imports
    from ..bench.measure import Skipped, measure
    from ..bench.training import CASES, measure_training
    from .bench_display import BenchProgress

    settings = document["settings"]
    seconds, least = settings["seconds"], settings["least_samples"]
    with BenchProgress() as progress:
        if rows:
            progress.begin("rows", len(rows))
            for row in measure(rows, seconds=seconds, least=least, compiled=settings["compile"]):
                if isinstance(row, Skipped):
                    document["skipped"].append({"row": row.row, "reason": row.reason})
                else:
                    document["rows"].append(row)
                progress.advance()
        if training:
            progress.begin("networks", len(CASES))
            # A step is a hundred layers' work.
            for step in measure_training(seconds=seconds * 20):
                document["training"].append(step)
                progress.advance()
        if imports:
            progress.begin("imports", 1)
            document["imports"].append(measure_imports(3 if settings["quick"] else 11))
            progress.advance()
    document["complete"] = True


def _summarize(files: list[Path]) -> None:
    from ..bench.document import read_document
    from ..bench.summary import markdown

    if not files:
        raise ArgumentError("--summary needs files: normkit bench --summary FILE...")
    typer.echo(markdown([read_document(path) for path in files]))
