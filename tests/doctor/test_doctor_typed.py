"""What a finding tells to type is typed as it stands, and does what it says for every layer, type and setting."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    batches = list(torch.randn(512, 3, 10, 10).split(64))
    normkit.recalibrate(model, batches)
    return model.eval(), batches


def typed(finding, model, batches):
    """Type cure and proof; return the model and what the proof says."""
    space = {"normkit": normkit, "model": model, "batches": batches, "example": batches[0]}
    exec(finding.remedy, space)
    return space["model"], eval(finding.proof, space)


# statistics of zeros, eps of zero, outputs that are not finite


@pytest.mark.parametrize("with_batches", [True, False])
def test_variances_that_are_all_zero_are_lost_statistics(with_batches):
    model, batches = convolutional()
    model[1].running_var.zero_()
    diagnosis = normkit.diagnose(model, batches if with_batches else None)
    assert not diagnosis.of("dead-channel")
    assert not diagnosis.of("drift", "1")
    (only,) = diagnosis.of("never-updated")
    assert (only.layer, only.severity) == ("1", "error")
    cured, proof = typed(only, model, batches)
    assert proof is True
    assert bool(torch.isfinite(cured(batches[0])).all())
    assert normkit.diagnose(cured, batches).healthy


def test_variances_of_zero_that_the_data_have_are_no_lost_statistics():
    model, batches = convolutional()
    nn.init.zeros_(model[0].weight)
    normkit.recalibrate(model, batches, layerwise=True)
    diagnosis = normkit.diagnose(model, batches)
    assert not diagnosis.of("never-updated")
    (only,) = diagnosis.of("dead-channel", "1")
    cured, _ = typed(only, model, batches)
    assert bool(torch.isfinite(cured(batches[0])).all())


@pytest.mark.parametrize("variance", [None, 0.0])
def test_eps_of_zero_is_a_finding_and_no_error_of_the_doctor_s(variance):
    model, batches = convolutional()
    model[1].eps = 0.0
    if variance is not None:
        model[1].running_var[3] = variance
    for given in (batches, None):
        diagnosis = normkit.diagnose(model, given, labels=None)
        (only,) = diagnosis.of("nonfinite")
        assert (only.layer, only.severity) == ("1", "warning" if variance is None else "error")
        assert "eps is 0" in only.summary
    cured, proof = typed(only, model, batches)
    assert proof is True
    assert cured[1].eps == 1e-5


def test_an_output_that_is_not_finite_is_never_healthy():
    class Root(nn.Module):
        def forward(self, values):
            return values.sqrt()

    model, batches = convolutional()
    model.append(Root())
    assert [finding.layer for finding in normkit.diagnose(model, batches).of("nonfinite")] == [""]
    model, batches = convolutional()
    model[1].weight.data[2] = 1e38
    (only,) = normkit.diagnose(model, batches).of("nonfinite")
    assert only.layer == "1"
    assert "not finite" in only.summary
    spoilt = [torch.full_like(batches[0], float("nan"))]
    (only,) = normkit.diagnose(convolutional()[0], spoilt).of("nonfinite")
    assert (only.layer, only.severity) == ("", "warning")
    assert "1 of 1 batches hold NaN" in only.summary


@pytest.mark.parametrize("unit", [3e-3, 1e-12])
def test_eps_for_raw_data_in_small_units_is_above_zero_and_finite(unit):
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), list((unit * torch.randn(512, 4)).split(64))
    normkit.recalibrate(model, batches)
    model.eval()
    (only,) = normkit.diagnose(model, batches).of("dead-channel")
    cured, proof = typed(only, model, batches)
    assert proof is True
    assert bool(torch.isfinite(cured(batches[0])).all())
    assert 0 < cured[0].eps < unit**2


# layers without statistics of their own


def stateless(dtype=torch.float32, affine=True):
    torch.manual_seed(0)
    parts = [
        [
            nn.Conv2d(3, 3, 3, padding=1),
            nn.BatchNorm2d(3, momentum=0.01, track_running_stats=False, affine=affine),
            nn.ReLU(),
        ]
        for _ in range(5)
    ]
    return nn.Sequential(*(layer for part in parts for layer in part)).to(dtype).eval()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_layers_that_take_the_batch_s_statistics_are_one_finding_and_one_cure(dtype, affine):
    model, batches = stateless(dtype, affine), list(torch.randn(256, 3, 8, 8, dtype=dtype).split(32))
    if affine:
        model[1].weight.requires_grad_(False)
    norms = [module for module in model if isinstance(module, nn.BatchNorm2d)]
    parameters = dict(model.named_parameters())
    (only,) = normkit.diagnose(model, batches).of("batch-dependence")
    assert only.layers == ("1", "4", "7", "10", "13")
    cured, proof = typed(only, model, batches)
    assert proof is True
    assert [cured.get_submodule(name) for name in only.layers] == norms
    assert {id(p) for p in cured.parameters()} == {id(p) for p in parameters.values()}
    assert [norm.momentum for norm in norms] == [0.01] * 5
    assert {buffer.dtype for norm in norms for buffer in (norm.running_mean, norm.running_var)} == {dtype}
    if affine:
        assert not norms[0].weight.requires_grad
        assert norms[1].weight.requires_grad
    assert normkit.diagnose(cured, batches).healthy


# one cause in many layers


def test_dead_channels_of_many_layers_are_one_finding():
    torch.manual_seed(0)

    class Alone(nn.Module):
        """A norm that is given one tiny channel, and stands behind nothing that it could be folded into."""

        def __init__(self, tiny):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.register_buffer("scale", torch.ones(6).index_fill(0, torch.tensor(tiny), 1e-5))

        def forward(self, values):
            return functional.relu(self.norm(values * self.scale))

    parts = [[Alone(tiny), nn.Linear(6, 6)] for tiny in range(5)]
    model, batches = nn.Sequential(*(layer for part in parts for layer in part)), list(torch.randn(512, 6).split(64))
    normkit.recalibrate(model, batches)
    model.eval()
    (only,) = normkit.diagnose(model, batches).of("dead-channel")
    assert only.layers == ("0.norm", "2.norm", "4.norm", "6.norm", "8.norm")
    cured, proof = typed(only, model, batches)
    assert proof is True
    assert [part.norm.weight.eq(0).nonzero().reshape(-1).tolist() for part in cured[::2]] == [[0], [1], [2], [3], [4]]


# the momentum of Keras


def test_the_cure_of_a_foreign_momentum_measures_the_statistics_again():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.BatchNorm1d(4, momentum=0.99)), list(torch.randn(512, 4).split(8))
    model(batches[0])
    model.eval()
    (only,) = normkit.diagnose(model, batches).of("ema-window")
    cured, proof = typed(only, model, batches)
    assert proof is True
    assert cured[0].momentum == pytest.approx(0.01)
    torch.testing.assert_close(cured[0].running_mean, torch.cat(batches).mean(0))
