"""The call that a finding names cures it: typed as it stands, it leaves a model about which the doctor is silent."""

import pytest
import torch
from torch import nn

import normkit

from . import networks

# A checkpointed model is cured in training (the test of the watch), a mixed one by another call (below).
CURED_AT_ONCE = (
    "stale", "forgotten", "poisoned", "frozen-leak", "small-batch", "never-evaluates", "short-window",
    "keras-momentum", "tiny-units", "low-precision", "padded", "swapped",
)  # fmt: skip

# These give the model new parameters: what was trained is to be trained again, with an optimizer of its own.
RETRAINED = {"small-batch"}


@pytest.mark.parametrize("name", CURED_AT_ONCE)
def test_calls_that_are_named_cure_the_model(name):
    patient = networks.patient(name)
    space = {
        "normkit": normkit, "torch": torch, "model": patient.model, "batches": patient.batches,
        "loader": patient.batches, "optimizer": patient.optimizer,
    }  # fmt: skip
    before = normkit.diagnose(patient.model, patient.batches, optimizer=patient.optimizer)
    severe = [finding for finding in before.findings if finding.severity != "info"]
    assert severe
    for remedy in dict.fromkeys(finding.remedy for finding in severe):
        exec(remedy, space)
    if name in RETRAINED:
        space["optimizer"] = torch.optim.SGD(space["model"].parameters(), lr=0.01)

    after = normkit.diagnose(space["model"], patient.batches, optimizer=space["optimizer"])
    assert after.healthy, str(after)
    assert [finding.proof for finding in severe if not eval(finding.proof, space)] == []


def test_populations_that_go_through_together_are_one():
    patient = networks.patient("mixed")
    assert normkit.diagnose(patient.model, patient.batches, call=patient.call).of("mixed-populations")

    def together(model, batch):
        return model(torch.cat([batch[0], 0.3 * batch[0].flip(2) - 3.0])).chunk(2)

    normkit.recalibrate(patient.model, patient.batches, call=together)
    diagnosis = normkit.diagnose(patient.model, patient.batches, call=together)
    assert diagnosis.healthy, str(diagnosis)


def test_layer_without_statistics_is_cured_by_the_call_that_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)).eval()
    batches = torch.randn(1200, 8).split(32)
    finding = normkit.diagnose(model, batches).of("batch-dependence")[0]
    space = {"normkit": normkit, "model": model, "batches": batches}
    exec(finding.remedy, space)
    assert eval(finding.proof, space)


def test_graph_captured_in_training_is_found_and_cured_by_the_call_that_is_named():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    example = (torch.randn(8, 1, 8, 8),)
    exported = torch.export.export(model, example)  # without eval()
    finding = normkit.diagnose(exported.module()).of("fold-ready")[0]
    assert finding.severity == "error"
    space = {"normkit": normkit, "torch": torch, "model": model, "example": example}
    exec(finding.remedy, space)
    assert eval(finding.proof, space)


@pytest.mark.parametrize("layer", [normkit.GhostBatchNorm1d, normkit.BatchRenorm1d])
def test_relative_with_foreign_statistics_is_cured_by_the_call_that_is_named(layer):
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(8, 4), layer(4), nn.Linear(4, 2)), torch.randn(1200, 8).split(32)
    with normkit.use_backend("plain"):  # nothing to compile
        for batch in batches:
            model(3 * batch + 2)  # a warm-up on other data
        finding = normkit.diagnose(model.eval(), batches).of("drift")[0]
        space = {"normkit": normkit, "model": model, "batches": batches}
        exec(finding.remedy, space)
        assert eval(finding.proof, space)


class Twice(nn.Module):
    """One convolution before two batch normalizations: folding it into either spoils the other."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.first, self.second, self.alone = nn.BatchNorm2d(1), nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1)
        self.last = nn.BatchNorm2d(2)

    def forward(self, images):
        return self.last(self.alone(self.second(self.conv(self.first(self.conv(images))))))


def test_pairs_that_cannot_be_folded_are_named_with_the_reason():
    diagnosis = normkit.diagnose(Twice())
    found = {finding.layer: finding.causes[0] for finding in diagnosis.findings if finding.check == "fold-ready"}
    assert found.keys() == {"first"}
    assert "conv is called 2 times" in found["first"]
    folds = {row.name: row.numbers.get("folds") for row in diagnosis.layers}
    assert folds == {"first": "no", "second": "into alone", "last": "into alone"}


def test_fold_agrees_with_what_the_doctor_says_can_be_folded():
    model, example = Twice().eval(), torch.randn(4, 1, 8, 8)
    normkit.recalibrate(model, example)
    record = normkit.fold(model, example)
    assert set(record.touched) == {"second", "last"}
