"""What people have and do beside the plain case: other houses, forgotten modes, dead channels, dependent values."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

import normkit
from normkit.anatomy import fingerprint
from normkit.doctor.demos import network, patterns
from normkit.errors import ArgumentError

from . import networks


class FrozenBatchNorm2d(nn.Module):
    """What detection libraries put into their backbones: four buffers and an affine map."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class NormAct(nn.BatchNorm2d):
    """A batch norm that brings its activation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Functional(nn.Module):
    """Called by its function, where no module tells of it."""

    def __init__(self, residual=False):
        super().__init__()
        self.norm, self.residual = nn.BatchNorm2d(8), residual

    def forward(self, x):
        return functional.relu(self.norm(x) + x if self.residual else self.norm(x))


def data(count=20):
    generator = torch.Generator().manual_seed(5)
    return [1 + 2 * torch.randn(32, 3, 8, 8, generator=generator) for _ in range(count)]


def trained(*layers):
    torch.manual_seed(1)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for batch in [*data(), *data()]:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    for batch in data():
        model(batch)
    return model.eval()


def found(diagnosis, check):
    return {(finding.layer, finding.severity) for finding in diagnosis.findings if finding.check == check}


def cures(finding, model, **known):
    space = {"normkit": normkit, "model": model, "batches": data(), "example": data()[0], **known}
    exec(finding.remedy, space)
    return bool(eval(finding.proof, space))


# modes


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, normkit.BatchNorm2d, NormAct, normkit.BatchRenorm2d])
def test_layer_left_in_training_mode_is_an_error_and_the_call_cures_it(norm):
    model = trained(nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 8, 3), norm(8))
    assert not found(normkit.diagnose(model, data()), "mode")
    model[3].train()
    for batches in (None, data()):
        assert found(normkit.diagnose(model, batches), "mode") == {("3", "error")}
    assert cures(normkit.diagnose(model).of("mode")[0], model)
    assert not model[3].training


def test_part_in_evaluation_with_a_layer_in_training_is_a_warning():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.BatchNorm2d(8))
    model[0].eval()
    model[0][1].train()
    finding = normkit.diagnose(model).of("mode")[0]
    assert (finding.layer, finding.severity, finding.evidence["in_evaluation"]) == ("0.1", "warning", "0")
    assert cures(finding, model)


def test_instance_norm_with_statistics_left_in_training_mode_is_found():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, track_running_stats=True)).eval()
    model[1].train()
    finding = normkit.diagnose(model).of("mode")[0]
    assert "running statistics" in finding.summary


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(2, 8), nn.BatchNorm2d(8, track_running_stats=False), FrozenBatchNorm2d(8), nn.InstanceNorm2d(8)],
    ids=lambda layer: type(layer).__name__,
)
def test_mode_is_silent_where_the_mode_moves_no_statistics(layer):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer).eval()
    model[1].train()
    assert not found(normkit.diagnose(model, data()), "mode")


def test_mode_is_silent_on_a_layer_frozen_with_the_batch_s_statistics():
    model = trained(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    normkit.freeze(model, statistics="batch")
    assert not found(normkit.diagnose(model.eval()), "mode")


# frozen layers


def with_frozen(learning=True):
    """A convolution and a frozen norm with the right statistics, which the convolution does or does not outgrow."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=None)
    for batch in data():
        norm(conv(batch))
    frozen = FrozenBatchNorm2d(8)
    frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"})
    conv.requires_grad_(learning)
    return nn.Sequential(conv, frozen, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


@pytest.mark.parametrize("training", [False, True])
def test_stale_frozen_norm_is_loud_and_recalibrated_by_the_call(training):
    model = with_frozen().train(training)
    assert normkit.diagnose(model, data()).healthy
    model[1].running_mean += 3
    assert found(normkit.diagnose(model, data()), "drift") == {("1", "error")}
    assert cures(normkit.diagnose(model, data()).of("drift", "1")[0], model)
    assert normkit.diagnose(model, data()).healthy


def test_frozen_norm_that_training_has_outgrown_a_little_is_no_alarm():
    model = with_frozen()
    model[1].running_mean += 0.7 * model[1].running_var.sqrt()
    assert found(normkit.diagnose(model, data()), "drift") == {("1", "info")}


def test_frozen_norm_behind_frozen_weights_on_other_data_is_no_alarm():
    other = [3 * batch + 2 for batch in data()]
    assert found(normkit.diagnose(with_frozen(learning=False), other), "drift") == {("1", "info")}


def test_cure_of_a_layer_frozen_by_us_is_not_refused():
    model = trained(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
    normkit.freeze(model, affine=True)
    model[1].running_var *= 100
    finding = normkit.diagnose(model.requires_grad_(False), data()).of("drift", "1")[0]
    assert "include_frozen=True" in finding.remedy
    assert cures(finding, model)


def test_cure_of_a_leak_in_a_new_model_is_not_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
    model[1].requires_grad_(False)
    finding = normkit.diagnose(model, data()).of("freeze-leak")[0]
    assert cures(finding, model)


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(8, affine=True, track_running_stats=True), normkit.BatchRenorm2d(8)]
)
def test_cure_of_statistics_of_a_relative_is_not_refused(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm).eval()
    finding = normkit.diagnose(model, data()).of("never-updated")[0]
    assert cures(finding, model)


# channels dead by their parameters


def dead(model, batches=None):
    return [f for f in normkit.diagnose(model, batches).findings if f.check == "dead-channel"]


@pytest.mark.parametrize("gamma", [0.0, 1e-8, -1e-6])
def test_channel_without_a_weight_is_found_and_woken(gamma):
    model = trained(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    assert not dead(model)
    with torch.no_grad():
        model[1].weight[2] = gamma
    (finding,) = dead(model)
    assert (finding.layer, finding.evidence["channels"]) == ("1", [2])
    assert finding.severity == ("info" if gamma == 0 else "warning")  # zero is what pruning sets
    assert cures(finding, model)
    assert not dead(model)


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), "1"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()), "1"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8)), "1"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), normkit.BatchNormAct2d(8)), "1.norm"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Functional()), "1.norm"),
    ],
    ids=["relu", "silu", "subclass", "fused", "functional"],
)
def test_bias_that_no_value_lifts_above_the_activation_is_found_and_woken(model, layer):
    model = trained(*model())
    assert not dead(model, data())
    with torch.no_grad():
        model.get_submodule(layer).bias[5] = -50.0
    (finding,) = dead(model, data())
    assert (finding.layer, finding.evidence["channels"]) == (layer, [5])
    assert cures(finding, model)
    assert not dead(model, data())


@pytest.mark.parametrize(
    "behind",
    [nn.Identity(), nn.LeakyReLU(), nn.Tanh(), Functional(residual=True)],
    ids=lambda layer: type(layer).__name__,
)
def test_low_bias_is_no_death_where_something_else_is_behind(behind):
    layer = "2.norm" if isinstance(behind, Functional) else "1"
    model = trained(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), behind)
    with torch.no_grad():
        model.get_submodule(layer).bias[5] = -50.0
    assert not dead(model, data())


def test_weights_that_all_begin_at_zero_are_no_dead_channels():
    assert not dead(networks.Residual(), networks.digits()[0][:64])


def test_dead_variance_of_a_layer_without_a_neighbour_is_cured_without_folding():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    batches = [batch * torch.tensor([1e-4, 1, 1]).view(1, 3, 1, 1) for batch in data()]
    for batch in [*batches, *batches, *batches, *batches, *batches]:
        model(batch)
    finding = next(f for f in dead(model.eval()) if f.severity == "warning")
    assert "fold" not in finding.remedy
    assert cures(finding, model)


def test_eps_that_takes_a_part_of_a_layer_between_filters_is_no_alarm():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()).eval()
    with torch.no_grad():
        model[1].running_var.copy_(1e-3 * torch.tensor([0.006, 0.05, 0.1, 0.14, 0.2, 0.5, 1, 5]))
        model[1].running_mean.add_(0.1)  # no longer as built
    (finding,) = dead(model)
    assert finding.severity == "info"
    # sqrt(v / (v + eps)) of the deviation is left; the median of eight is the fourth smallest, at 1 - sqrt(0.2 / 1.2)
    assert "8 of 8 channels have a variance not large beside eps, which takes 59% of their deviation" in finding.summary


@pytest.mark.parametrize(("count", "severity"), [(1, "warning"), (8, "warning")])
def test_variance_that_is_nothing_beside_eps_is_an_alarm(count, severity):
    model = trained(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    with torch.no_grad():
        model[1].running_var[:count] = 1e-9
    (finding,) = dead(model)
    assert (finding.severity, finding.evidence["share"]) == (severity, count / 8)
    assert "nothing beside eps" in finding.summary


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_scale_that_only_makes_up_for_a_small_filter_is_no_alarm(kind):
    torch.manual_seed(0)
    layer = kind(3, 8, bias=False) if kind is nn.Linear else kind(3, 8, 1, bias=False)
    norm = nn.BatchNorm1d(8, eps=1e-12) if kind is nn.Linear else nn.BatchNorm2d(8, eps=1e-12)
    model = nn.Sequential(layer, norm)
    with torch.no_grad():
        weight = layer.weight if kind is not nn.ConvTranspose2d else layer.weight.transpose(0, 1)
        weight[2] *= 1e-3
    batches = [torch.randn(64, 3) if kind is nn.Linear else torch.randn(16, 3, 4, 4) for _ in range(4)]
    normkit.recalibrate(model.eval(), batches)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert scale[2] > 100 * scale.median()
    assert not dead(model, batches)
    with torch.no_grad():
        weight[2] *= 1e3  # now the filter is as large as the others, and its channel would be blown up
    (finding,) = dead(model)
    assert (finding.severity, finding.evidence["channels"]) == ("warning", [2])


class Auxiliary(nn.Module):
    """A branch that prediction never takes; ``read`` takes its statistics past the layer's call."""

    def __init__(self, read):
        super().__init__()
        self.main, self.unused, self.read = nn.BatchNorm1d(3), nn.BatchNorm1d(3), read

    def forward(self, x):
        return self.main(x) + (self.unused.running_mean if self.read else 0)


@pytest.mark.parametrize(("read", "severity"), [(False, "info"), (True, "error")])
def test_layer_that_no_output_depends_on_is_no_alarm(read, severity):
    model, batches = Auxiliary(read), [torch.randn(64, 3) for _ in range(8)]
    model.main.momentum = None
    for batch in batches:
        model(batch)
    with torch.no_grad():
        model.unused.bias.add_(torch.randn(3))
    before = fingerprint(model.eval())
    diagnosis = normkit.diagnose(model, batches)
    (finding,) = (each for each in diagnosis.findings if each.check == "never-updated")
    assert (finding.layer, finding.severity) == ("unused", severity)
    assert fingerprint(model) == before
    # Without batches nobody knows.
    assert normkit.diagnose(model).of("never-updated")[0].severity == "error"


# values that are not independent


def smooth(count=40, samples=2):
    generator = torch.Generator().manual_seed(0)
    return [
        functional.interpolate(torch.randn(samples, 1, 2, 2, generator=generator), scale_factor=32, mode="bilinear")
        for _ in range(count)
    ]


def effective(model, batches):
    (finding,) = (f for f in normkit.diagnose(model, batches).findings if f.check == "effective-n")
    return finding


@pytest.mark.parametrize("count", [40, 16])
def test_spread_of_the_variance_is_that_of_the_batches(count):
    batches = smooth(count)
    finding = effective(nn.Sequential(nn.BatchNorm2d(1)), batches)
    variances = torch.stack([batch.var(correction=0) for batch in batches])
    expected = float(variances.std() / variances.mean())
    assert finding.evidence["spread_of_variance"] == pytest.approx(expected, rel=1e-4)
    assert f"{expected:.0%}" in finding.summary
    assert finding.evidence["effective_values"] == pytest.approx(1 + 2 / expected**2, rel=1e-3)


def test_spread_is_reckoned_from_the_samples_where_batches_are_few():
    batches = [torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    spread = effective(nn.Sequential(nn.BatchNorm1d(3)), batches).evidence["spread_of_variance"]
    assert spread == pytest.approx(math.sqrt(2 / (6 * 5 - 1)), rel=0.35)  # independent normal values


def test_alike_positions_are_found_where_the_samples_are_enough():
    flat = [
        torch.randn(8, 1, 1, 1, generator=torch.Generator().manual_seed(i)).pow(3).expand(8, 1, 9, 9) for i in range(20)
    ]
    finding = effective(nn.Sequential(nn.BatchNorm2d(1)), flat)
    assert finding.severity == "warning"
    assert finding.evidence["effective_values"] < 8
    independent = [torch.randn(8, 1, 9, 9, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    assert not found(normkit.diagnose(nn.Sequential(nn.BatchNorm2d(1)), independent), "effective-n")


# statistics in weight and bias


def absorbed(model):
    for norm in (module for module in model if isinstance(module, nn.BatchNorm2d)):
        with torch.no_grad():
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            norm.bias -= norm.running_mean * scale
            norm.weight.copy_(scale * (1 + norm.eps) ** 0.5)
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
    return model


@pytest.mark.parametrize("channels", [8, 16, 32])
def test_statistics_in_weight_and_bias_are_no_error(channels):
    layers = [nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    model = trained(*layers, nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels))
    before = model(data()[0])
    torch.testing.assert_close(absorbed(model)(data()[0]), before, rtol=1e-4, atol=1e-4)
    diagnosis = normkit.diagnose(model, data())
    assert diagnosis.healthy, str(diagnosis)
    assert found(diagnosis, "never-updated") == {("1", "info"), ("4", "info")}
    # Without data nobody can know, and both are said.
    assert "absorbed" in normkit.diagnose(model).of("never-updated")[0].causes[-1]


@pytest.mark.parametrize("seed", range(4))
def test_statistics_that_were_lost_are_an_error_as_before(seed):
    torch.manual_seed(seed)
    model = trained(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    with torch.no_grad():  # a long training
        model[1].weight.mul_(torch.randn(16).mul(0.5).exp())
        model[1].bias.add_(torch.randn(16))
    model[1].reset_running_stats()
    assert found(normkit.diagnose(model, data()), "never-updated") == {("1", "error")}


@pytest.mark.parametrize("deviation", [0.02, 0.5])
def test_weights_drawn_at_construction_are_not_taken_for_trained(deviation):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.normal_(model[1].weight, 1.0, deviation)  # as generators begin
    assert normkit.diagnose(model, data()).healthy


# nothing to examine, and what cannot be


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d()),
        {"weight": torch.zeros(3)},
    ],
    ids=["linear", "lazy", "state"],
)
def test_nothing_examined_is_not_healthy(model):
    diagnosis = normkit.diagnose(model)
    assert not diagnosis.healthy
    for text in (str(diagnosis), repr(diagnosis), diagnosis._repr_html_(), diagnosis.to_html()):
        assert "nothing was examined" in text.lower()
        assert "healthy: 0" not in text.lower()
        assert "No error and no warning" not in text
    assert diagnosis.notes


def test_lazy_layers_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LazyBatchNorm1d())
    assert any("lazy" in note and "2" in note for note in normkit.diagnose(model).notes)


@pytest.mark.filterwarnings("ignore")  # torch calls its own scripts deprecated
def test_programs_are_refused_in_words():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    for program in (
        torch.jit.script(model),
        torch.jit.trace(model, data()[0]),
        torch.export.export(model, (data()[0],)),
    ):
        with pytest.raises(ArgumentError, match=r"ScriptModule|exported program"):
            normkit.diagnose(program)


def test_eps_of_a_state_is_said_to_be_assumed():
    norm = nn.BatchNorm1d(4)
    norm.running_var[:2] = 1e-5
    (finding,) = normkit.diagnose(norm.state_dict()).of("dead-channel")
    assert "assumed" in finding.summary
    assert finding.evidence["eps_assumed"]
    assert "assumed" not in normkit.diagnose(norm.eval()).of("dead-channel")[0].summary


# momentum


def test_momentum_of_zero_in_training_is_a_warning_and_freezing_cures_it():
    model = trained(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[1].momentum = 0
    assert not found(normkit.diagnose(model), "ema-window")  # it evaluates: the statistics are held, and used
    finding = normkit.diagnose(model.train()).of("ema-window")[0]
    assert (finding.layer, finding.severity) == ("1", "warning")
    assert cures(finding, model)


# the ledger


def test_statistics_measured_anew_are_not_taken_for_extra_forwards():
    model, batches = network(), patterns(256).tensors[0].split(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with normkit.watch(model) as ledger:
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        update_bn(batches, model)
        # Lightning's callback: forwards with gradients, momentum None, no step
        for norm in (model[1], model[4]):
            norm.reset_running_stats()
            norm.momentum = None
        for batch in batches:
            model(batch)
    diagnosis = ledger.diagnosis()
    assert diagnosis.healthy, str(diagnosis)
    assert ledger.layers["1"].writers["renewal"] == 2 * len(batches)
    assert ledger.layers["1"].writers["forward"] == len(batches)
    assert any("measured anew" in finding.summary for finding in diagnosis.findings)


def test_cure_of_accumulation_forgets_as_much_in_k_updates_as_before_in_one():
    model, images = network(), patterns(64).tensors[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with normkit.watch(model) as ledger:
        for _ in range(3):
            optimizer.zero_grad()
            for part in images.chunk(4):
                model(part).square().mean().backward()
            optimizer.step()
    finding = ledger.findings()[0]
    exec(finding.remedy, {"model": model})
    assert (1 - model[1].momentum) ** 4 == pytest.approx(0.9)


# labels


def test_gap_goes_with_the_finding_that_makes_it():
    torch.manual_seed(0)
    model, batches = networks.convolutional(), list(networks.loader(64))
    networks.train(model, batches, 3)
    right = normkit.diagnose(model, batches, labels=lambda batch: batch[1])
    assert right.healthy
    assert right.gap.training == pytest.approx(right.gap.evaluation, abs=0.03)
    model[8].running_mean += 5 * model[8].running_var.sqrt()
    model[1].momentum = 0.9  # a number that harms nothing here
    diagnosis = normkit.diagnose(model, batches, labels=lambda batch: batch[1])
    assert diagnosis.gap.training > diagnosis.gap.evaluation + 0.1
    explained = {(f.check, f.layer): f.explains for f in diagnosis.findings if f.severity != "info"}
    assert explained["drift", "8"] > 0.9
    assert abs(explained["ema-window", "1"]) < 0.1
    assert "of the gap between evaluation and training" in str(diagnosis)


def sly():
    """A classifier by the sum of 64 values, all off by less than drift tells of, and all in one direction."""
    torch.manual_seed(0)
    values = torch.randn(2048, 64)
    model = nn.Sequential(nn.BatchNorm1d(64, momentum=None), nn.Linear(64, 2)).eval()
    nn.init.ones_(model[1].weight).data[0] = -1
    nn.init.zeros_(model[1].bias)
    normkit.recalibrate(model, values.split(64))
    model[0].running_mean += 0.25
    return model, list(zip(values.split(64), (values.sum(1) > 0).long().split(64), strict=True))


def test_a_gap_that_nothing_explains_is_a_finding():
    model, batches = sly()
    assert normkit.diagnose(model, batches).healthy
    space = {"normkit": normkit, "model": model, "batches": batches, "labels": lambda batch: batch[1]}
    diagnosis = normkit.diagnose(model, batches, labels=space["labels"])
    assert diagnosis.gap.training > diagnosis.gap.evaluation + 0.02
    (only,) = diagnosis.of("gap")
    assert not diagnosis.healthy
    assert only.layer == ""
    assert only.explains == pytest.approx(1.0)
    assert only.evidence["unexplained"] == pytest.approx(diagnosis.gap.training - diagnosis.gap.evaluation)
    assert only.severity == ("error" if only.evidence["unexplained"] >= 0.05 else "warning")
    exec(only.remedy, space)
    assert eval(only.proof, space)
    waived = normkit.diagnose(*sly(), labels=space["labels"], waive={"gap:*": "one recording in each batch"})
    assert waived.healthy
    assert [finding.check for finding, _ in waived.waived] == ["gap"]


def test_averaged_weights_with_old_statistics_are_found():
    torch.manual_seed(0)
    model, batches = networks.convolutional(), networks.loader(64)
    networks.train(model, batches, 1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        model.train()
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        averaged.update_parameters(model)
    averaged.eval()
    assert normkit.diagnose(averaged, batches).of("drift")
    normkit.recalibrate(averaged, batches)
    assert not normkit.diagnose(averaged, batches).of("drift")


def test_labels_need_batches_that_can_be_read_again():
    with pytest.raises(ArgumentError, match="can be read once"):
        normkit.diagnose(nn.BatchNorm1d(3), iter([torch.zeros(4, 3)]), labels=lambda batch: batch)
    with pytest.raises(ArgumentError, match="give batches too"):
        normkit.diagnose(nn.BatchNorm1d(3), labels=lambda batch: batch)
    with pytest.raises(ArgumentError, match="class of each sample"):
        normkit.diagnose(nn.BatchNorm1d(3), torch.randn(4, 3), labels=lambda batch: batch)
