"""``normkit recalibrate|fold|convert|repair``: change a model or a state file, and write the result."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..errors import ArgumentError
from ..printable import printable
from .examples import explained
from .inputs import UNFIT, as_typed, named_batches, patient
from .terminal import echo

if TYPE_CHECKING:
    from torch import nn

    from ..doctor.demos import Patient
    from ..surgery import Record
    from ..surgery.convert_classes import Kind

__all__ = ["add_commands"]

Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="package.module:factory that builds the model, or demo:NAME.")
]
Weights = Annotated[Path | None, typer.Option(help="State file to load: .safetensors, .pt, .pth, .bin, .ckpt.")]
Out = Annotated[Path, typer.Option(help="File to write; its ending says the form.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")]
Data = Annotated[
    str | None, typer.Option(metavar="NAME|module:function", help="A data set of the lab, or what yields batches.")
]
Where = Annotated[list[str] | None, typer.Option(help="Pattern of layer paths, such as 'backbone.*'; may be repeated.")]
Tolerance = Annotated[
    float | None, typer.Option(min=0.0, help="Largest change allowed, relative to the largest output.")
]
Shape = Annotated[str | None, typer.Option(help="Shape of a random example, such as 1,3,224,224.")]


def add_commands(app: typer.Typer) -> None:
    """Put the commands under ``normkit``."""
    for command in (recalibrate, fold, convert, repair):
        app.command(command.__name__, cls=explained(command.__name__))(command)


def recalibrate(
    target: Target,
    out: Out,
    data: Data = None,
    weights: Weights = None,
    where: Where = None,
    samples: Annotated[int | None, typer.Option(help="Stop after this many.")] = None,
    layerwise: Annotated[bool, typer.Option("--layerwise", help="One layer after another; exact, slower.")] = False,
    force: Force = False,
) -> None:
    """Measure running statistics anew on data, and write the state."""
    from ..surgery import recalibrate as operate

    _check_out(out, force)
    sick = patient(target, weights)
    model = _model(sick, target)
    given = _batches(sick, data)
    if given is None:
        raise ArgumentError("--data is missing; give the name of a data set, or module:function that returns batches")
    with as_typed():
        record = operate(model, given, where=where or None, samples=samples, layerwise=layerwise, call=sick.call)
    _write_state(record, model.state_dict(), out, force)


def fold(
    target: Target,
    out: Out,
    weights: Weights = None,
    shape: Shape = None,
    data: Data = None,
    where: Where = None,
    tolerance: Tolerance = None,
    force: Force = False,
) -> None:
    """Fold batch norms into their neighbours; write a state, or a program as .pt2 or .onnx."""
    from ..surgery import fold as operate

    _check_out(out, force, programs=True)
    sick = patient(target, weights)
    example = _example(sick, shape, data)
    model = _model(sick, target).eval()
    with as_typed():
        record = operate(model, example, where=where or None, call=sick.call, tolerance=tolerance)
    if out.suffix in (".pt2", ".onnx"):
        _write_program(record, example, out, force)
    else:
        _write_state(record, record.model.state_dict(), out, force)


def convert(
    target: Target,
    to: Annotated[
        str, typer.Option(help="normkit, torch, batch, sync, frozen, ghost, renorm, group, layer or instance")
    ],
    out: Out,
    weights: Weights = None,
    shape: Shape = None,
    data: Data = None,
    where: Where = None,
    groups: Annotated[int | None, typer.Option(help="Number of groups, with --to group.")] = None,
    tolerance: Tolerance = None,
    force: Force = False,
) -> None:
    """Give normalization layers another form, and write the state."""
    from ..surgery import convert as operate

    _check_out(out, force)
    sick = patient(target, weights)
    example = None if shape is None and _batches(sick, data) is None else _example(sick, shape, data)
    with as_typed():
        record = operate(
            _model(sick, target),
            cast("Kind", to),
            example,
            where=where or None,
            groups=groups,
            call=sick.call,
            tolerance=tolerance,
        )
    _write_state(record, record.model.state_dict(), out, force)


def repair(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="package.module:factory, a state file, or demo:NAME.")
    ],
    out: Out,
    weights: Weights = None,
    donor: Annotated[Path | None, typer.Option(help="A sound state file of the same architecture.")] = None,
    data: Data = None,
    force: Force = False,
) -> None:
    """Mend statistics that are not finite, negative, in a narrow type or without counter, and write the state."""
    from ..anatomy.states import read_state
    from ..surgery import repair as operate

    _check_out(out, force)
    sick = patient(target, weights)
    given = None if donor is None else read_state(donor)
    with as_typed():
        record = operate(sick.model, _batches(sick, data), given, call=sick.call)
    _write_state(record, record.state, out, force)


def _model(sick: "Patient", target: str) -> "nn.Module":
    from torch import nn

    if not isinstance(sick.model, nn.Module):
        raise ArgumentError(f"{target} is a state file; give package.module:factory with --weights {target}")
    return sick.model


def _batches(sick: "Patient", data: str | None) -> Any:
    """Return the batches that --data names, or those that a demo brings."""
    return sick.batches if data is None else named_batches(data)


def _example(sick: "Patient", shape: str | None, data: str | None) -> Any:
    """Return the first batch of the data, or a random tensor of the shape."""
    import torch

    from ..anatomy import iterate

    if shape is not None and data is not None:
        raise ArgumentError("give either --shape or --data, not both")
    if shape is None:
        given = _batches(sick, data)
        if given is None:
            raise ArgumentError("give --shape, such as 1,3,224,224, or --data with a data set or module:function")
        return next(iterate(given))
    sizes = shape.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ArgumentError(f"--shape {shape}: whole numbers with commas between them, such as 1,3,224,224")
    example = torch.randn([int(size) for size in sizes], generator=torch.Generator().manual_seed(0))
    _check_fit(sick, example, shape)
    return example


def _check_fit(sick: "Patient", example: Any, shape: str) -> None:
    """Run the model once, so that a shape that it does not take is told as such."""
    import torch
    from torch import nn

    from ..anatomy import preserved, run

    if isinstance(sick.model, nn.Module):
        with preserved(sick.model), torch.no_grad():
            sick.model.eval()
            try:
                run(sick.model, example, sick.call)
            except UNFIT as error:
                said = f"--shape {shape}: the model fails on it: {type(error).__name__}: {error}"
                raise ArgumentError(said) from error


def _check_out(out: Path, force: bool, *, programs: bool = False) -> None:
    """Refuse before the work what would be refused after it."""
    from ..anatomy.states import SUFFIXES
    from ..files import check_place

    allowed = (*SUFFIXES, ".pt2", ".onnx") if programs else SUFFIXES
    if out.suffix not in allowed:
        raise ArgumentError(f"--out {out}: the file's ending is one of {', '.join(allowed)}")
    check_place(out, force=force, said="--out")


def _write_state(record: "Record[Any]", state: Any, out: Path, force: bool) -> None:
    from ..anatomy.states import write_state

    write_state(out, state, force=force)
    echo(f"{record}\nwrote {printable(str(out), keep='')}")


def _write_program(record: "Record[Any]", example: Any, out: Path, force: bool) -> None:
    """Write what runs without the model's code: torch.export's form, or ONNX."""
    from ..files import write_atomically
    from ..surgery.program import write_onnx, write_pt2

    write = write_onnx if out.suffix == ".onnx" else write_pt2
    write_atomically(out, lambda path: write(record.model, example, path), force=force)
    echo(f"{record}\nwrote {printable(str(out), keep='')}")
