"""What few samples leave to chance raises no alarm, however many channels and layers are looked at."""

import pytest
import torch
from scipy import stats
from torch import nn

import normkit
from normkit.doctor.sampling import errors_wanted


class Beside(nn.Module):
    """Many layers side by side, each with channels of its own."""

    def __init__(self, layers, channels):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(layers))

    def forward(self, x):
        return torch.cat([norm(part) for norm, part in zip(self.norms, x.chunk(len(self.norms), 1), strict=True)], 1)


def measured(layers, channels, samples, scale=1.0):
    """Layers whose statistics are those of so many samples, measured as ``recalibrate`` does."""
    model = Beside(layers, channels).eval()
    normkit.recalibrate(model, (scale * torch.randn(samples, layers * channels)).split(8))
    return model


@pytest.mark.parametrize("samples", [24, 40])
def test_statistics_of_few_samples_are_not_called_off(samples):
    torch.manual_seed(samples)
    for _ in range(6):
        model = measured(80, 16, samples)
        others = torch.randn(samples, 80 * 16).split(8)
        found = [finding for finding in normkit.diagnose(model, others).findings if finding.severity != "info"]
        assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("fault", ["mean", "variance"])
def test_a_layer_that_is_off_is_found_among_many_with_few_samples(fault):
    torch.manual_seed(0)
    model = measured(80, 16, 40)
    if fault == "mean":
        model.norms[37].running_mean.add_(2.0)
    else:
        model.norms[37].running_var.div_(16)
    found = normkit.diagnose(model, torch.randn(40, 80 * 16).split(8)).of("drift")
    assert [finding.layer for finding in found] == ["norms.37"]


def test_one_channel_that_is_off_is_found_with_enough_samples():
    torch.manual_seed(0)
    model = measured(20, 16, 400)
    model.norms[3].running_var[5] *= 2.5
    found = normkit.diagnose(model, torch.randn(400, 20 * 16).split(8)).of("drift")
    assert [(finding.layer, finding.evidence["channels_beyond"]) for finding in found] == [("norms.3", 1)]


@pytest.mark.parametrize("samples", [20, 40, 1000])
@pytest.mark.parametrize("channels", [1, 30, 64, 384])
def test_the_standard_errors_wanted_are_student_s_quantile_for_the_whole_model(samples, channels):
    level = 0.01 / (2 * 50 * channels)
    assert errors_wanted(samples, channels, 50) == pytest.approx(stats.t.isf(level / 2, samples - 1), rel=0.01)


@pytest.mark.parametrize("samples", [2, 3, 5, 10])
def test_with_very_few_samples_the_quantile_is_too_large_and_never_too_small(samples):
    assert errors_wanted(samples, 1, 1) >= stats.t.isf(0.01 / 4, samples - 1)


# What is done to one channel's mean, in deviations, and to its variance; and the verdict, where widths agree on it.
ONE_CHANNEL = {
    "mean 2 deviations off": (2.0, 1.0, None),
    "mean 1,000 deviations off": (-1000.0, 1.0, "error"),
    "variance 8 times too large": (0.0, 8.0, None),
    "variance 8 times too small": (0.0, 1 / 8, None),
    "variance 10,000 times too small": (0.0, 1e-4, "error"),
}


@pytest.mark.parametrize("fault", ONE_CHANNEL)
@pytest.mark.parametrize("channels", [64, 99, 100, 101, 512, 2048])
def test_one_channel_far_off_is_found_in_a_layer_of_any_width(channels, fault):
    torch.manual_seed(0)
    shift, factor, severity = ONE_CHANNEL[fault]
    model, others = measured(2, channels, 1024), torch.randn(1024, 2 * channels).split(64)
    assert normkit.diagnose(model, others).healthy
    norm = model.norms[1]
    norm.running_mean[1] += shift * norm.running_var[1].sqrt()
    norm.running_var[1] *= factor
    (found,) = normkit.diagnose(model, others).of("drift")
    assert (found.layer, found.evidence["channels_beyond"]) == ("norms.1", 1)
    assert severity in (None, found.severity)
    assert found.evidence["worst_channel"] == 1


def test_a_channel_without_weight_may_hold_any_statistics():
    torch.manual_seed(0)
    model, others = measured(2, 512, 1024), torch.randn(1024, 1024).split(64)
    model.norms[1].weight.data[1] = 0
    model.norms[1].running_mean[1] += 5
    assert not normkit.diagnose(model, others).of("drift")


def test_sampling_alone_raises_no_alarm_in_sixty_models_with_wide_layers():
    torch.manual_seed(0)
    alarms = 0
    for trial in range(60):
        samples = (24, 64, 256)[trial % 3]
        model = measured(3, 300, samples)
        alarms += not normkit.diagnose(model, torch.randn(samples, 900).split(8)).healthy
    assert alarms <= 2  # one in a hundred models; three or more of sixty are less likely than 1 in 40


@pytest.mark.parametrize(
    ("layers", "off", "found"), [(6, 0.1, False), (6, 0.25, True), (2, 0.25, True), (1, 0.25, False), (1, 0.4, False)]
)
def test_layers_that_are_moderately_off_are_found_where_they_are_too_far_together(layers, off, found):
    torch.manual_seed(0)
    model, others = measured(8, 32, 2048), torch.randn(2048, 8 * 32).split(64)
    for norm in list(model.norms)[:layers]:
        norm.running_mean += off * (torch.randint(2, (32,)) * 2 - 1)
    drifts = normkit.diagnose(model, others).of("drift")
    names = [name for finding in drifts for name in finding.layers]
    assert names == ([f"norms.{place}" for place in range(layers)] if found else [])
    for finding in drifts:
        assert finding.severity == "warning"
        assert finding.evidence["error"] == pytest.approx(off, rel=0.1)
        assert finding.evidence["error_together"] == pytest.approx(off * layers**0.5, rel=0.1)


def test_many_layers_moderately_off_are_an_error_where_nothing_of_the_output_is_left():
    torch.manual_seed(0)
    model, others = measured(30, 32, 2048), torch.randn(2048, 30 * 32).split(64)
    for norm in model.norms:
        norm.running_mean += 0.25 * (torch.randint(2, (32,)) * 2 - 1)
    (only,) = normkit.diagnose(model, others).of("drift")
    assert (only.severity, len(only.layers)) == ("error", 30)


@pytest.mark.parametrize("wild", [16, 4])
def test_a_rare_event_that_did_not_come_is_no_drift(wild):
    generator = torch.Generator().manual_seed(0)

    def values(samples, events):
        drawn = torch.randn(samples, 128, generator=generator)
        drawn[:, :wild] *= 0.3
        for channel in range(wild):  # a few samples have nearly all of the variance of these channels
            drawn[channel : channel + events, channel] = 3.0
        return list(drawn.split(8))

    model = Beside(1, 128).eval()
    normkit.recalibrate(model, values(1024, 48))
    few = values(64, 3)
    for batch in few:
        batch[:, 0] = batch[:, 0].clamp_max(0.9)  # of one channel none of them came
    assert not normkit.diagnose(model, few).of("drift")
