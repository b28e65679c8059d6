"""What TensorBoard reads back is what the rows hold; without it the message says what to install."""

import sys

import pytest

from normkit.errors import ArgumentError
from normkit.lab.tensorboard import check_tensorboard, write_cell

ROWS = [
    {
        "cell": "convergence/digits/none/seed=1", "row": epoch, "rows": 2, "epoch": epoch, "seed": 1, "norm": "none",
        "train_loss": 0.5 / epoch, "broken": None, "step_losses": [epoch + 0.25, epoch + 0.5], "names": ["a"],
    }
    for epoch in (1, 2)
]  # fmt: skip


def read(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rows_become_curves_once(tmp_path):
    write_cell(tmp_path, ROWS)
    write_cell(tmp_path, ROWS)
    (place,) = {path.parent for path in tmp_path.rglob("events.*")}
    assert place == tmp_path / "convergence" / "digits" / "none" / "seed=1"
    assert read(place) == {
        "train_loss": [(1, 0.5), (2, 0.25)],
        "step_losses/step": [(1, 1.25), (2, 1.5), (3, 2.25), (4, 2.5)],
    }


def test_without_tensorboard_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ArgumentError, match=r'pip install "normkit\[tensorboard\]"'):
        check_tensorboard()
