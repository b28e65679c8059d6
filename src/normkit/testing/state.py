"""Checks of what surrounds the arithmetic: saving, copying, meta tensors, bad input, empty and tiny batches."""

import copy
import io
import pickle
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .report import Finding
from .subject import Subject

__all__ = ["check_bad_input", "check_copies", "check_empty_batch", "check_meta", "check_saving", "check_single_value"]

# What refuses an input: our own exceptions and torch's.
_REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, AttributeError)


def _fingerprint(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _changed(module: nn.Module, kept: dict[str, Tensor]) -> list[str]:
    now = module.state_dict()
    return [name for name, value in kept.items() if not torch.equal(now[name], value)]


def check_saving(subject: Subject) -> Iterator[Finding]:
    """A state dict carries all that evaluation needs."""
    module, x = subject.build(), subject.input()
    subject.call(module, x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = subject.build()
    twin.load_state_dict(torch.load(file, weights_only=True))
    if not torch.equal(subject.call(twin.eval(), x), subject.call(module.eval(), x)):
        words = "keeps statistics outside its state dict"
        yield Finding(check="saving", problem="a loaded copy predicts otherwise.", convention=words)


def check_copies(subject: Subject) -> Iterator[Finding]:
    """Copies and pickles compute the same bits."""
    x = subject.input()
    for name, duplicate in (("deepcopy", copy.deepcopy), ("pickle", lambda layer: pickle.loads(pickle.dumps(layer)))):  # noqa: S301
        module = subject.build()
        subject.call(module, x)
        try:
            twin = duplicate(module)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            yield Finding(check="copies", problem=f"{name} fails: {error}.")
            continue
        if not torch.equal(subject.call(twin.eval(), x), subject.call(module.eval(), x)):
            yield Finding(check="copies", problem=f"a {name} predicts otherwise.")


def check_meta(subject: Subject) -> Iterator[Finding]:
    """On the meta device the output has the right shape."""
    x = subject.input().to("meta")
    try:
        y = subject.call(subject.build().to("meta"), x)
    except _REFUSALS as error:
        yield Finding(check="meta", problem=f"meta tensors are refused: {error}")
        return
    if not y.is_meta or y.shape != x.shape:
        yield Finding(check="meta", problem=f"the output is {tuple(y.shape)} on {y.device}.")


def check_bad_input(subject: Subject) -> Iterator[Finding]:
    """Bad input is refused, and nothing has changed then."""
    shape, extra = subject.shape(), subject.company(subject.input())
    bad = {
        "integers": torch.ones(shape, dtype=torch.int64),
        "a number": torch.tensor(1.0, dtype=torch.float64),
    }
    if subject.method != "response":
        # That one has nothing per channel, and takes any number of them.
        bad["a wrong number of channels"] = torch.ones(shape[0], 1, *shape[2:], dtype=torch.float64)
    for name, value in bad.items():
        module = subject.build()
        kept = _fingerprint(module)
        try:
            module(value, *extra)
        except _REFUSALS:
            changed = _changed(module, kept)
            if changed:
                words = "changes its state in a forward that fails"
                problem = f"{name} is refused after {', '.join(changed)} changed."
                yield Finding(check="bad input", problem=problem, convention=words)
        else:
            yield Finding(check="bad input", problem=f"{name} passes.", convention=f"accepts {name}")


def check_single_value(subject: Subject) -> Iterator[Finding]:
    """One value has no variance: training refuses it, and nothing has changed then."""
    module = subject.build()
    kept = _fingerprint(module)
    x = torch.ones(1, subject.channels, *(1 for _ in range(subject.dimensions)), dtype=torch.float64)
    try:
        subject.call(module, x)
    except _REFUSALS:
        changed = _changed(module, kept)
        if changed:
            words = "changes its state in a forward that fails"
            yield Finding(
                check="single value", problem=f"refused after {', '.join(changed)} changed.", convention=words
            )
    else:
        bad = [name for name, value in module.state_dict().items() if not torch.isfinite(value).all()]
        stored = f", and stores {', '.join(bad)} that is not finite" if bad else ""
        words = "accepts one value per channel in training"
        yield Finding(check="single value", problem=f"one value per channel passes{stored}.", convention=words)


def check_empty_batch(subject: Subject) -> Iterator[Finding]:
    """A batch without samples passes, or is refused; either way nothing changes."""
    module = subject.build()
    kept = _fingerprint(module)
    try:
        y = subject.call(module, torch.ones(0, *subject.shape()[1:], dtype=torch.float64))
    except _REFUSALS:
        y = None
    changed = _changed(module, kept)
    if changed:
        words = "counts a batch without samples" if changed == ["num_batches_tracked"] else "stores an empty batch"
        yield Finding(check="empty batch", problem=f"{', '.join(changed)} changed.", convention=words)
    if y is not None and y.shape != (0, *subject.shape()[1:]):
        yield Finding(check="empty batch", problem=f"the output has shape {tuple(y.shape)}.")
