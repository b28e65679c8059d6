"""What the commands of the doctor and of surgery are given: models and batches by name."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..spelling import nearest

if TYPE_CHECKING:
    from ..doctor.demos import Patient

__all__ = ["UNFIT", "named_batches", "patient"]

_BATCH_SIZE = 64
# What models raise on data that they were not made for.
UNFIT = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)


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
