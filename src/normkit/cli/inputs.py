"""What the commands of the doctor and of surgery are given: models and batches by name."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, SurgeryError
from ..spelling import nearest

if TYPE_CHECKING:
    from ..doctor.demos import Patient

__all__ = ["UNFIT", "as_typed", "named_batches", "patient"]

_BATCH_SIZE = 64
# What models raise on data that they were not made for.
UNFIT = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)


@contextmanager
def as_typed() -> Iterator[None]:
    """Let advice that is Python's be what can be typed in a shell, inside.

    Raises:
        ArgumentError, SurgeryError: the same, in those words.
    """
    try:
        yield
    except ArgumentError as error:
        said, advice, _ = str(error).partition("; say how to call the model")
        once, again, _ = str(error).partition("labels= runs over the batches several times")
        if advice:
            raise ArgumentError(
                f"{said}; let the function of --data yield what forward takes: a tensor, a tuple that begins with it, "
                "or a dict with its names"
            ) from error
        if again and not once:
            raise ArgumentError(
                "--labels runs over the batches several times, and the function of --data gives what can be read once: "
                "let it return a list or a DataLoader"
            ) from error
        raise
    except SurgeryError as error:
        if "give example=" not in str(error):
            raise
        raise SurgeryError(str(error).replace("give example=", "give --shape or --data")) from error


def patient(target: str, weights: Path | None) -> "Patient":
    """Load what TARGET names: ``package.module:factory``, a state file, or ``demo:NAME``; a demo brings its batches.

    Raises:
        ArgumentError: there is no such target.
        DataError: a file is missing or damaged, or does not fit the model.
    """
    from torch import nn

    from ..anatomy.states import load_weights, read_state
    from ..anatomy.targets import load_target
    from ..doctor.demos import DEMOS, Patient, build

    if target.startswith("demo:"):
        made = build(target.removeprefix("demo:"))
        if weights is not None and isinstance(made.model, nn.Module):
            load_weights(made.model, read_state(weights))
        return made
    demo = nearest(target, [demo.name for demo in DEMOS])
    if demo and not Path(target).suffix and ":" not in target:
        raise ArgumentError(f"{target!r} is no package.module:factory and no state file; did you mean demo:{demo}?")
    loaded = load_target(target, weights)
    return Patient(model=loaded.state if loaded.model is None else loaded.model, batches=None)


def named_batches(name: str) -> Iterable[Any]:
    """Return the batches of a data set of the lab, or of a function of one's own.

    Raises:
        ArgumentError: there is no such data set or function, or it gives nothing to iterate over.
    """
    if ":" not in name:
        from ..lab.data import load

        images = load(name).train_images
        return [images[start : start + _BATCH_SIZE] for start in range(0, len(images), _BATCH_SIZE)]
    from ..anatomy.targets import load_object

    made = load_object(name)
    made = made() if callable(made) else made
    if not isinstance(made, Iterable):
        raise ArgumentError(f"--data {name} gives a {type(made).__name__}; batches must be something to iterate over")
    return made
