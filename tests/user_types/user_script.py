"""What somebody who uses normkit writes, for the type checkers: it is read by mypy and pyright and never run.

Every comment that ignores an error is a test as well: both checkers complain of one that hides nothing.
"""

from typing import Any, assert_type

import torch
from torch import Tensor, nn

import normkit
from normkit.testing import check_norm_layer


class Net(nn.Module):
    """A network of the user's, with an attribute that only this class has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), normkit.BatchNormAct2d(8, activation="relu"))
        self.classes = 10

    def forward(self, input: Tensor) -> Tensor:
        """Call the stem."""
        output: Tensor = self.stem(input)
        return output


model, example = Net(), torch.randn(2, 3, 8, 8)

# The class of a model is kept.
folded = normkit.fold(model.eval(), example)
assert_type(folded.model, Net)
assert_type(folded.model.classes, int)
assert_type(normkit.convert(model, "torch").model, Net)
assert_type(normkit.recalibrate(model, [example]).model, Net)
assert_type(normkit.freeze(model).model, Net)
assert_type(normkit.unfreeze(model).model, Net)
record: normkit.surgery.Record[Net] = folded
repaired: normkit.surgery.Record[Any] = normkit.repair(model)

# Rooms are there without an import of their own.
diagnosis: normkit.doctor.Diagnosis = normkit.diagnose(model, [example])
assert_type(diagnosis.healthy, bool)
normkit.reference.batch_norm([[1.0], [3.0]])
laboratory = normkit.lab
report = check_norm_layer(normkit.LayerNorm, "layer")
assert_type(report.conforms, bool)
ported = normkit.port_state(nn.BatchNorm2d(3), target="keras")

with normkit.use_backend("plain"):
    model(example)


@normkit.use_backend("numba")
def predict(input: Tensor) -> Tensor:
    """Keep the signature of what is decorated."""
    output: Tensor = model(input)
    return output


assert_type(predict(example), Tensor)

# A misspelt word is an error before anything runs.
normkit.convert(model, "gruop")  # type: ignore[arg-type]
normkit.use_backend("cuda")  # type: ignore[arg-type]
normkit.BatchNormAct2d(8, activation="rleu")  # type: ignore[arg-type]
normkit.functional.layer_norm(example, (8,), activation="rleu")  # type: ignore[arg-type]
normkit.port_state(nn.BatchNorm2d(3), target="kreas")  # type: ignore[arg-type]
normkit.freeze(model, statistics="runing")  # type: ignore[arg-type]
normkit.diagnose(model, waive=["drift"])  # type: ignore[arg-type]
check_norm_layer(normkit.BatchNorm2d, "bach")  # type: ignore[arg-type]
