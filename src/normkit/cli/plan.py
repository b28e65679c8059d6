"""``normkit plan``: what a batch size means to a model's normalization layers, before anything is trained."""

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import nn

from ..errors import ArgumentError
from ..files import write_atomically
from ..printable import printable
from .inputs import UNFIT, as_typed, named_batches, patient
from .places import check_page
from .terminal import echo

if TYPE_CHECKING:
    from ..doctor.demos import Patient

__all__ = ["plan"]


def plan(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="package.module:factory that builds the model, or demo:NAME.")
    ],
    batch_size: Annotated[int, typer.Option(help="Samples of a step, over all ranks and micro-batches.")],
    data: Annotated[
        str | None, typer.Option(metavar="NAME|module:function", help="A data set of the lab, or what yields batches.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="A state file to load into the model.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes that share a step.")] = 1,
    micro_batches: Annotated[int, typer.Option(help="Parts into which each process cuts its share.")] = 1,
    samples: Annotated[int | None, typer.Option(help="Samples of an epoch: looks at the last batch too.")] = None,
    gap: Annotated[
        float, typer.Option(help="Distance of training from evaluation that is small, in deviations.")
    ] = 0.1,
    batches: Annotated[int, typer.Option(help="Measure on so many batches of the data.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures.")] = None,
) -> None:
    """Reckon from how much data every batch norm takes its statistics, and what to do where it is too little."""
    from ..doctor import plan as reckon

    if html is not None:
        check_page(html)
    if batches < 1:
        raise ArgumentError(f"--batches {batches}: expected 1 or more")
    # The same numbers every time: of a model that is built anew, and of data that are shuffled.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given, example = _given(target, weights, data, batches)
    settings = {"ranks": ranks, "micro_batches": micro_batches, "samples": samples, "gap": gap, "call": given.call}
    try:
        with as_typed():
            found = reckon(given.model, example, batch_size, **settings)  # type: ignore[arg-type]  # of its own type each
    except ArgumentError:
        raise
    except UNFIT as error:
        raise ArgumentError(f"the model fails on the data: {type(error).__name__}: {error}") from error
    if html is not None:
        page = printable(found.to_html(f"Plan of {target}")).encode()
        write_atomically(html, lambda path: path.write_bytes(page), force=True)
    for line in (json.dumps(found.to_dict(), indent=2) if as_json else str(found)).split("\n"):
        echo(line)
    if html is not None and not as_json:
        echo("")
        echo(f"page: {html}")


def _given(target: str, weights: Path | None, data: str | None, batches: int) -> "tuple[Patient, list[Any]]":
    """Return the model and the first batches of its data."""
    given = patient(target, weights)
    if not isinstance(given.model, nn.Module):
        raise ArgumentError(f"{target} is a state file, which cannot be run: name the model with --weights {target}")
    source = given.batches if data is None else named_batches(data)
    if source is None:
        raise ArgumentError("--data is missing; give the name of a data set, or module:function that returns batches")
    return given, list(islice(source, batches))
