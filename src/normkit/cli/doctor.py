"""``normkit doctor``: what is wrong with a model's normalization layers."""

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import nn

from ..anatomy.states import SUFFIXES
from ..errors import ArgumentError, DataError
from ..files import write_atomically
from ..printable import printable
from .inputs import UNFIT, as_typed, named_batches, patient
from .places import check_page
from .terminal import echo

if TYPE_CHECKING:
    from ..doctor import Diagnosis

__all__ = ["doctor"]

_COLOURS = {"error": typer.colors.RED, "warning": typer.colors.YELLOW}


def doctor(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="package.module:factory, a state file, or demo:NAME.")
    ],
    weights: Annotated[Path | None, typer.Option(help="A state file to load into the model.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|module:function", help="A data set of the lab, or what yields batches.")
    ] = None,
    batches: Annotated[
        int | None, typer.Option(help="Measure on so many batches; about 2,000 samples if left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    labels: Annotated[
        bool, typer.Option("--labels", help="The second part of a batch is the class of each sample: explain the gap.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures.")] = None,
) -> None:
    """Examine a model's normalization layers.

    Exit code 0: no error was found, though warnings may have been (--json says whether the model is healthy); 1: an
    error was found, or there was nothing to examine; 2: misuse.
    """
    if html is not None:
        check_page(html)
    if batches is not None and batches < 1:
        raise ArgumentError(f"--batches {batches}: expected 1 or more")
    try:
        # The same numbers every time: of a model that is built anew, and of data that are shuffled.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            diagnosis = _diagnose(target, weights, data, batches, labels)
    except DataError as error:  # exit code 1 says that the model is sick, not that a file is
        raise ArgumentError(str(error)) from error
    if html is not None:
        page = printable(diagnosis.to_html(f"Diagnosis of {target}")).encode()
        write_atomically(html, lambda path: path.write_bytes(page), force=True)
    if as_json:
        echo(json.dumps(diagnosis.to_dict(), indent=2, allow_nan=False))
    else:
        _print(diagnosis)
        for line in [*_cures(diagnosis, target, weights, data), *(["", f"page: {html}"] if html is not None else [])]:
            echo(line)
    examined = any(row.examined for row in diagnosis.layers)
    raise typer.Exit(1 if diagnosis.count("error") or not examined else 0)


def _diagnose(target: str, weights: Path | None, data: str | None, count: int | None, labels: bool) -> "Diagnosis":
    from ..doctor import diagnose

    sick = patient(target, weights)
    given = sick.batches if data is None else named_batches(data)
    if not isinstance(sick.model, nn.Module) and data is not None:
        raise ArgumentError(
            f"{target} is a state file alone, which cannot run on data: name the model with --weights {target}"
        )
    if given is not None and count is not None:
        given = list(islice(given, count))
    try:
        with as_typed():
            return diagnose(
                sick.model,
                given,
                optimizer=sick.optimizer if weights is None else None,
                call=sick.call,
                samples=2048 if count is None else None,
                labels=_second_part if labels else None,
            )
    except ArgumentError:
        raise
    except UNFIT as error:
        if given is None:
            raise
        raise ArgumentError(f"the model fails on the data: {type(error).__name__}: {error}") from error


def _second_part(batch: Any) -> Any:
    """Return the labels of a batch."""
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[1]
    raise ArgumentError(f"--labels: a batch is a {type(batch).__name__}; needed is one of (inputs, classes)")


def _print(diagnosis: "Diagnosis") -> None:
    for line in str(diagnosis).split("\n"):
        echo(line, colour=_COLOURS.get(line.partition(" ")[0]))


def _cures(diagnosis: "Diagnosis", target: str, weights: Path | None, data: str | None) -> list[str]:
    """Return the commands that do what the calls named by the findings do, where there are such commands."""
    if Path(target).suffix in SUFFIXES:
        return []
    remedies = [finding.remedy for finding in diagnosis.findings if finding.severity != "info"]
    names = [name for name in ("repair", "recalibrate") if any(r.startswith(f"normkit.{name}(") for r in remedies)]
    if not names:
        return []
    given = f" --weights {weights}" if weights is not None else ""
    batches = f" --data {data}" if data is not None else "" if target.startswith("demo:") else " --data DATA"
    cure = f"  normkit {names[0]} {target}{given}{batches} --out cured.safetensors"
    return ["", "on the command line:", cure, f"  normkit doctor {target} --weights cured.safetensors{batches}"]
