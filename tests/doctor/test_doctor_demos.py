"""Each sick model is made by the mistake itself; the doctor names the layer, the cause and the cure."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import normkit
from normkit.doctor import Diagnosis
from normkit.doctor.demos import DEMOS, build
from normkit.errors import ArgumentError

from . import networks

# demo: the layers named, the worst severity, a word of the likeliest cause, a word of the cure
EXPECTED = {
    "stale": (["1", "4"], "error", "the weights changed after the statistics", "normkit.recalibrate"),
    "forgotten": (["1", "4"], "error", "without the buffers", "normkit.recalibrate"),
    "poisoned": (["1"], "error", "overflow", "normkit.repair"),
    "frozen-leak": (["1", "4"], "warning", "requires_grad_(False) reaches parameters only", "normkit.freeze"),
    "small-batch": (["1", "4"], "warning", "small batch", 'to="group"'),
    "never-evaluates": (["1"], "error", "model.eval() does not reach the layer", "normkit.freeze"),
    "short-window": (["4"], "error", "too few training steps", "normkit.recalibrate"),
    "keras-momentum": (["1", "4"], "warning", "Keras", "momentum = 0.01"),
    "checkpointed": (["first.1"], "warning", "checkpointing", "normkit.hold_statistics"),
    "tiny-units": (["0"], "warning", "tiny", ".eps = "),
    "low-precision": (["1", "4"], "error", "bfloat16", "normkit.repair"),
    "padded": (["0"], "error", "different lengths", "normkit.mask_padding"),
    "mixed": (["1"], "warning", "real and generated", "torch.cat"),
    "swapped": (["4"], "error", "swapped after the optimizer", "model.parameters()"),
}


def examine(name: str) -> Diagnosis:
    patient = networks.patient(name)
    return normkit.diagnose(patient.model, patient.batches, optimizer=patient.optimizer, call=patient.call)


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.name)
def test_diagnose_names_layer_cause_and_cure_of_a_sick_model(demo):
    layers, severity, cause, cure = EXPECTED[demo.name]
    findings = examine(demo.name).of(demo.check)

    assert [finding.layer for finding in findings] == layers
    assert findings[0].severity == severity
    assert cause in findings[0].causes[0]
    assert cure in findings[0].remedy
    assert findings[0].proof
    assert findings[0].evidence


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.name)
def test_cure_and_proof_of_a_demo_are_code_that_does_what_it_says(demo):
    patient = networks.patient(demo.name)
    given = {"optimizer": patient.optimizer, "call": patient.call}
    given = {name: value for name, value in given.items() if value is not None}
    diagnosis = normkit.diagnose(patient.model, patient.batches, **given)
    severe = [finding for finding in diagnosis.findings if finding.severity != "info"]
    assert severe
    space = {"normkit": normkit, "torch": torch, "nn": nn, "DataLoader": DataLoader, **given}
    space |= {"model": patient.model, "batches": patient.batches, "loader": patient.batches}
    space["example"] = next(iter(patient.batches))
    for finding in severe:
        exec(finding.remedy, space)
    for finding in severe:
        assert eval(finding.proof, space) is True, f"{finding.remedy}\n{finding.proof}"


def test_every_demo_is_expected():
    assert {demo.name for demo in DEMOS} == set(EXPECTED)


def test_build_refuses_an_unknown_demo():
    with pytest.raises(ArgumentError, match=r"unknown demo 'stail'; did you mean 'stale'. Known are: stale, forgotten"):
        build("stail")


def test_build_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    build("forgotten")
    assert torch.equal(torch.get_rng_state(), before)


def test_stale_statistics_cost_accuracy_that_batch_statistics_show():
    patient = networks.patient("stale")
    images, labels = patient.batches.dataset.tensors

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(images).argmax(1) == labels).double().mean())

    stored = accuracy(patient.model)
    own = accuracy(patient.model.train())
    assert own > stored + 0.05, f"batch statistics {own}, stored statistics {stored}"
