"""The ledger finds what is done to statistics in training, by the scripts that do it."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import normkit
from normkit.anatomy import fingerprint
from normkit.doctor.demos import Checkpointed, loader, network, patterns
from normkit.errors import ArgumentError

from . import networks
from .test_doctor_missed import FrozenBatchNorm2d


def steps(model, batches=None, *, optimizer=None, count=4, before_step=None):
    """Train a few steps; the ledger of it."""
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with normkit.watch(model) as ledger:
        model.train()
        for images, labels in list(batches or loader(patterns(256)))[:count]:
            optimizer.zero_grad()
            if before_step is not None:
                before_step(model, images)
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return ledger


def found(ledger, check):
    return [(finding.layer, finding.severity) for finding in ledger.diagnosis().of(check)]


def test_watch_is_silent_on_plain_training_and_counts_every_write():
    model = network()
    ledger = steps(model)
    assert ledger.diagnosis().findings == ()
    assert ledger.steps == 4
    assert int(model[1].num_batches_tracked) == ledger.layers["1"].writers["forward"] == 4
    first = ledger.writes[0]
    assert (first.step, first.layer, first.samples, first.values) == (1, "1", 32, 32 * 64)
    assert first.place.startswith("test_doctor_watch.py:")
    assert first.place.endswith("in steps")


@pytest.mark.parametrize("layer", [normkit.BatchNorm1d, nn.BatchNorm1d])
def test_watch_sees_the_writes_of_our_layers_as_of_torchs(layer):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), layer(8), nn.Linear(8, 4))
    assert steps(model).layers["2"].writers == {"forward": 4}


class Article(nn.Module):
    """Batch normalization as a tutorial writes it: new tensors in the place of the old, momentum on the old value."""

    def __init__(self, channels):
        super().__init__()
        shape = (1, channels, 1, 1)
        self.gamma, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("moving_mean", torch.zeros(shape))
        self.register_buffer("moving_var", torch.zeros(shape))
        self.momentum, self.eps = 0.9, 1e-5

    def forward(self, x):
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
            self.moving_mean = self.momentum * self.moving_mean + (1 - self.momentum) * mean.detach()
            self.moving_var = self.momentum * self.moving_var + (1 - self.momentum) * var.detach()
        else:
            mean, var = self.moving_mean, self.moving_var
        return self.gamma * (x - mean) / torch.sqrt(var + self.eps) + self.beta


def test_watch_follows_layers_of_other_houses():
    model = network()
    model[1], model[4] = Article(8), FrozenBatchNorm2d(16)
    ledger = steps(model)
    assert ledger.layers.keys() == {"1"}  # what is frozen by its class writes nothing
    assert ledger.layers["1"].writers == {"forward": 4}
    assert ledger.diagnosis().healthy
    batches = list(loader(patterns(256)))
    batches[2][0][3] = math.inf
    assert steps(model, batches).diagnosis().of("nonfinite", "1")


def test_doctor_examines_layers_of_other_houses():
    torch.manual_seed(0)
    model, batches = network(), list(loader(patterns(1024)))
    model[1], model[4] = Article(8), Article(16)
    for images, _ in batches:
        model(images)
    model.eval()
    assert normkit.diagnose(model, batches).healthy
    model[4].moving_mean += 3
    finding = normkit.diagnose(model, batches).of("drift", "4")[0]
    assert finding.layer_class == "Article"
    exec(finding.remedy, {"normkit": normkit, "model": model, "batches": batches})
    assert normkit.diagnose(model, batches).healthy
    model[4].train()
    assert normkit.diagnose(model).of("mode", "4")


def test_watch_changes_nothing_and_leaves_no_hook():
    model = network()
    before = fingerprint(model)
    with normkit.watch(model), pytest.raises(RuntimeError, match="injected"):
        raise RuntimeError("injected")
    assert fingerprint(model) == before


def test_watch_finds_recomputation_and_the_call_cures_it():
    batches = list(loader(patterns(256)))
    torch.manual_seed(0)
    twin = Checkpointed()
    torch.manual_seed(0)
    model = Checkpointed()
    ledger = steps(model)
    assert found(ledger, "update-count") == [("first.1", "warning")]
    assert "checkpoint()" in ledger.findings()[0].causes[0]

    class Cured(Checkpointed):
        def forward(self, images):
            block = self.first
            remedy = finding.remedy.replace("checkpoint(block, x,", "checkpoint(block, images,")
            space = {"checkpoint": checkpoint, "normkit": normkit, "nullcontext": nullcontext, "block": block}
            hidden = eval(remedy, space | {"images": images})
            return self.last(self.third(self.second(hidden)))

    finding = ledger.findings()[0]
    torch.manual_seed(0)
    cured = Cured()
    assert steps(cured, batches).diagnosis().findings == ()
    assert normkit.diagnose(model).of("update-count", "first.1")
    assert not normkit.diagnose(cured).of("update-count")

    twin.forward = lambda images: twin.last(twin.third(twin.second(twin.first(images))))
    steps(twin, batches)
    for name, buffer in twin.named_buffers():
        assert torch.equal(buffer, cured.get_buffer(name)), f"{name} differs from training without checkpointing"


def test_watch_finds_forwards_without_gradients_and_the_call_cures_them():
    def probe(model, images):
        with torch.no_grad():
            model(images[:8])

    ledger = steps(network(), before_step=probe)
    assert found(ledger, "update-count") == [("1", "warning"), ("4", "warning")]
    assert "in probe" in ledger.findings()[0].summary

    def held(model, images):
        with normkit.hold_statistics(model), torch.no_grad():
            model(images[:8])

    assert steps(network(), before_step=held).diagnosis().findings == ()


def test_watch_finds_an_extra_forward_with_gradients():
    ledger = steps(network(), before_step=lambda model, images: model(images))
    assert found(ledger, "update-count") == [("1", "warning"), ("4", "warning")]
    assert ledger.findings()[0].evidence["per_step"] == {"2": 4}


def test_watch_calls_gradient_accumulation_by_its_name():
    model, images = network(), patterns(64).tensors[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with normkit.watch(model) as ledger:
        for _ in range(3):
            optimizer.zero_grad()
            for part in images.chunk(4):
                model(part).square().mean().backward()
            optimizer.step()
    assert ledger.diagnosis().healthy
    assert {finding.severity for finding in ledger.findings()} == {"info"}
    assert "accumulation" in ledger.findings()[0].causes[0]
    assert ledger.findings()[0].evidence["per_step"] == {"4": 3}


def test_watch_finds_frozen_layers_that_move_and_the_call_cures_them():
    model = network()
    for parameter in model[:6].parameters():
        parameter.requires_grad_(False)
    ledger = steps(model)
    assert found(ledger, "freeze-leak") == [("1", "error"), ("4", "error")]
    for finding in ledger.diagnosis().of("freeze-leak"):
        exec(finding.remedy, {"normkit": normkit, "model": model})
    assert steps(model).diagnosis().findings == ()


def test_watch_counts_steps_that_a_scaler_skipped():
    model, (images, labels) = network(), patterns(64).tensors
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=2.0)
    with normkit.watch(model) as ledger:
        for step in range(5):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert (ledger.steps, ledger.skipped) == (4, 1)
    assert ledger.diagnosis().healthy
    assert "1 steps were skipped" in ledger.findings()[0].summary


def test_watch_names_the_step_in_which_statistics_stopped_being_finite():
    data = patterns(256)
    batches = list(loader(data))
    batches[2][0][3] = 1e38
    model = network()
    ledger = steps(model, batches)
    assert found(ledger, "nonfinite")[0] == ("1", "error")
    assert ledger.diagnosis().of("nonfinite", "1")[0].evidence["step"] == 3


def test_watch_notes_writes_from_outside():
    model = network()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ledger = steps(model, before_step=lambda model, images: model.load_state_dict(state))
    assert ledger.layers["1"].writers["outside"] == 4
    assert ledger.diagnosis().healthy


def test_watch_finds_a_layer_that_stands_in_two_places():
    shared = nn.BatchNorm1d(16)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), shared, nn.Linear(16, 16), shared, nn.BatchNorm1d(16))
    assert found(steps(model), "update-count") == [("2", "warning")]


def test_waiver_sets_a_watched_finding_aside():
    model = networks.dense()
    with normkit.watch(model, waive={"update-count": "adapting to the test data"}) as ledger, torch.no_grad():
        model(torch.randn(16, 64))
    assert ledger.diagnosis().healthy
    assert ledger.diagnosis().waived[0][1] == "adapting to the test data"


def test_watch_says_that_a_lazy_layer_must_see_a_batch_first():
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())
    said = r"^watch: 0 is lazy and has not seen a batch; call model\(batch\) once"
    with pytest.raises(ArgumentError, match=said), normkit.watch(model):
        pass
    model(torch.randn(8, 3))
    with normkit.watch(model) as ledger:
        model(torch.randn(8, 3))
    assert ledger.layers["1"].writers["forward"] == 1
