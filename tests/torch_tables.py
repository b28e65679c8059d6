"""torch's own tables of layers and operators, with normkit's class or function in the place of torch's.

``module_db`` and ``op_db`` come with every torch wheel. They hold constructor arguments, inputs and errors, but no
expected values for batch normalization, so every case is compared with torch.nn in float64 on the same numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.testing._internal import common_modules
from torch.testing._internal.common_methods_invocations import op_db

import normkit

EAGER = {
    normkit.BatchNorm1d: nn.BatchNorm1d,
    normkit.BatchNorm2d: nn.BatchNorm2d,
    normkit.BatchNorm3d: nn.BatchNorm3d,
}
LAZY = {
    normkit.LazyBatchNorm1d: nn.BatchNorm1d,
    normkit.LazyBatchNorm2d: nn.BatchNorm2d,
    normkit.LazyBatchNorm3d: nn.BatchNorm3d,
}
LAYERS = {**EAGER, **LAZY}

# How many rows torch 2.13 has for each layer. A newer torch may add some; none may vanish unseen.
ROWS = {nn.BatchNorm1d: 8, nn.BatchNorm2d: 7, nn.BatchNorm3d: 7}

_INFO = {info.module_cls: info for info in common_modules.module_db if info.module_cls in ROWS}


@dataclass(frozen=True)
class Case:
    """One row of torch's table, to be built as our layer."""

    layer: type[nn.Module]
    twin: type[nn.Module]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    input: Tensor
    training: bool
    name: str

    def build(self) -> nn.Module:
        """Our layer; a lazy one is not told the number of channels."""
        args = self.args if self.layer in EAGER else self.args[1:]
        return self.layer(*args, **self.kwargs).train(self.training)

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Our layer and torch's, in the same random state."""
        theirs = self.twin(*self.args, **self.kwargs).train(self.training)
        scramble(theirs)
        ours = self.build()
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs


def scramble(module: nn.Module) -> None:
    """Give parameters and buffers values that differ from their starting ones, and between channels."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(3)
            else:
                value.copy_(torch.rand_like(value) + 0.5)


def cases(layer: type[nn.Module], dtype: torch.dtype, training: bool, *, requires_grad: bool = False) -> list[Case]:
    """The table's rows for this layer."""
    twin = LAYERS[layer]
    info = _INFO[twin]
    found = []
    for row in info.module_inputs_func(info, "cpu", dtype, requires_grad, training):
        kwargs = {**row.constructor_input.kwargs, "dtype": dtype}
        mode = "train" if training else "eval"
        name = f"{layer.__name__} {row.desc or 'plain'} {mode} {dtype}"
        found.append(Case(layer, twin, row.constructor_input.args, kwargs, row.forward_input.args[0], training, name))
    assert len(found) >= ROWS[twin], f"torch's table lost rows for {twin.__name__}"
    return found


def error_rows(layer: type[nn.Module]) -> list[common_modules.ErrorModuleInput]:
    """The table's rows that must raise, both in training mode."""
    info = _INFO[LAYERS[layer]]
    return list(info.module_error_inputs_func(info, "cpu", torch.float32, False, True))


def operator_samples(dtype: torch.dtype, *, requires_grad: bool = False) -> Iterator[tuple[Tensor, list, dict]]:
    """The table's samples of ``nn.functional.batch_norm``: input, positional and keyword arguments."""
    for info in op_db:
        if info.name == "nn.functional.batch_norm":
            for sample in info.sample_inputs("cpu", dtype, requires_grad=requires_grad):
                yield sample.input, list(sample.args), dict(sample.kwargs)
