"""``normkit doctor``: what is wrong with a model's normalization layers."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from torch import nn

from ..errors import ArgumentError, DataError

if TYPE_CHECKING:
    from ..doctor import Diagnosis
    from ..doctor.demos import Patient

__all__ = ["doctor"]

_BATCH_SIZE = 64
_COLOURS = {"error": typer.colors.RED, "warning": typer.colors.YELLOW}

# What models raise on data that they were not made for.
_UNFIT = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)


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
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures.")] = None,
) -> None:
    """Examine a model's normalization layers. Exit code 0: healthy; 1: an error was found; 2: misuse."""
    if batches is not None and batches < 1:
        raise ArgumentError(f"--batches {batches}: expected 1 or more")
    try:
        diagnosis = _diagnose(target, weights, data, batches)
    except DataError as error:  # exit code 1 says that the model is sick, not that a file is
        raise ArgumentError(str(error)) from error
    if html is not None:
        from ..anatomy.states import write_atomically

        page = diagnosis.to_html(f"Diagnosis of {target}").encode()
        write_atomically(html, lambda path: path.write_bytes(page), force=True)
    if as_json:
        typer.echo(json.dumps(diagnosis.to_dict(), indent=2, allow_nan=False))
    else:
        _print(diagnosis, html)
    raise typer.Exit(1 if diagnosis.count("error") else 0)


def _diagnose(target: str, weights: Path | None, data: str | None, count: int | None) -> "Diagnosis":
    from ..doctor import diagnose

    patient = _patient(target, weights)
    given = patient.batches if data is None else _batches(data)
    if not isinstance(patient.model, nn.Module) and data is not None:
        raise ArgumentError(
            f"{target} is a state file alone, which cannot run on data: name the model with --weights {target}"
        )
    if given is not None and count is not None:
        given = list(islice(given, count))
    try:
        return diagnose(
            patient.model,
            given,
            optimizer=patient.optimizer,
            call=patient.call,
            samples=2048 if count is None else None,
        )
    except ArgumentError:
        raise
    except _UNFIT as error:
        if given is None:
            raise
        raise ArgumentError(f"the model fails on the data: {type(error).__name__}: {error}") from error


def _patient(target: str, weights: Path | None) -> "Patient":
    """Load what TARGET names."""
    from ..anatomy.targets import load_target
    from ..doctor.demos import Patient, build

    if target.startswith("demo:"):
        if weights is not None:
            raise ArgumentError(f"{target} is made with its weights; leave --weights out")
        return build(target.removeprefix("demo:"))
    loaded = load_target(target, weights)
    return Patient(model=loaded.state if loaded.model is None else loaded.model, batches=None)


def _batches(name: str) -> Iterable[Any]:
    """Return the batches of a data set of the lab, or of a function of one's own."""
    if ":" in name:
        from ..anatomy.targets import load_object

        made = load_object(name)
        made = made() if callable(made) else made
        if not isinstance(made, Iterable):
            raise ArgumentError(
                f"--data {name} gives a {type(made).__name__}; batches must be something to iterate over"
            )
        return made
    from ..lab.data import load

    images = load(name).train_images
    return [images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE)]


def _print(diagnosis: "Diagnosis", html: Path | None) -> None:
    for line in str(diagnosis).splitlines():
        typer.secho(line, fg=_COLOURS.get(line.partition(" ")[0]))
    if html is not None:
        typer.echo(f"\npage: {html}")
