"""What is examined and what cannot be: layers that are not read or not reached, and numbers that are none."""

import math

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, normkit.BatchNorm2d])
def test_statistics_of_a_layer_whose_tracking_was_switched_off_are_examined_as_evaluation_uses_them(cls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), cls(8), nn.ReLU())
    batches = torch.randn(512, 3, 8, 8).split(64)
    normkit.recalibrate(model, batches)
    model[1].track_running_stats = False
    with torch.no_grad():
        model[1].running_mean += 5
    model.eval()
    diagnosis = normkit.diagnose(model, batches)
    assert diagnosis.of("drift", "1")
    assert not any("no running statistics" in finding.summary for finding in diagnosis.findings)
    assert not normkit.diagnose(model, batches).of("ema-window")
    (switched,) = normkit.diagnose(model.train(), batches).of("ema-window")
    assert "track_running_stats" in switched.summary
    assert normkit.fold(model.eval(), batches[0]).into == {"1": "0"}
    assert normkit.convert(model, "group").model[1].num_channels == 8
    exec(switched.remedy, {"model": model, "batches": batches, "normkit": normkit})
    assert normkit.diagnose(model, batches).healthy
    assert normkit.diagnose(model.train(), batches).healthy


class Unreadable(nn.Module):
    """Has the state of a batch norm, and computes something else."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("moving_mean", torch.zeros(channels))
        self.register_buffer("moving_var", torch.ones(channels))

    def forward(self, x):
        return (
            torch.tanh((x - self.moving_mean[:, None, None]) / self.moving_var[:, None, None])
            * self.gamma[:, None, None]
        )


@pytest.mark.parametrize("batches", [None, torch.randn(32, 3, 8, 8)])
def test_a_layer_that_cannot_be_read_is_not_counted_as_examined(batches):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Unreadable(4)).eval()
    diagnosis = normkit.diagnose(model, batches)
    assert not diagnosis.healthy
    assert str(diagnosis).startswith("nothing was examined: 1: Unreadable does not compute batch normalization")
    both = nn.Sequential(model, nn.BatchNorm2d(4))
    normkit.recalibrate(both, torch.randn(512, 3, 8, 8).split(64))
    diagnosis = normkit.diagnose(both.eval())
    assert diagnosis.healthy
    assert "1 normalization layer examined" in repr(diagnosis)
    assert "not examined: 0.1: Unreadable does not" in str(diagnosis)


class PastItsCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm.forward(self.conv(x))


def test_a_layer_used_past_its_call_is_not_said_to_be_measured():
    torch.manual_seed(0)
    model, batches = PastItsCall(), torch.randn(256, 3, 8, 8).split(32)
    diagnosis = normkit.diagnose(model.eval(), batches)
    assert "1 normalization layer examined, none of them measured on 256 samples" in repr(diagnosis)
    assert any("past their call" in note for note in diagnosis.notes)
    (never,) = diagnosis.of("never-updated")
    exec(never.remedy, {"model": model, "batches": batches, "normkit": normkit})
    assert not normkit.diagnose(model).of("never-updated")


class Gain(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.gain


def test_the_cure_of_a_subclass_that_recalibrate_refuses_is_one_that_it_takes():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Conv2d(3, 4, 3), Gain(4)).eval(), torch.randn(256, 3, 8, 8).split(32)
    (never,) = normkit.diagnose(model, batches).of("never-updated")
    exec(never.remedy, {"model": model, "batches": batches, "normkit": normkit})
    assert eval(never.proof, {"model": model, "batches": batches, "normkit": normkit})


def test_lazy_layers_are_not_said_to_be_missing():
    diagnosis = normkit.diagnose(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()))
    assert repr(diagnosis) == (
        "<Diagnosis: nothing was examined: lazy and without channels yet: 1; run the model once first>"
    )


def sound():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    batches = list(torch.randn(256, 3, 8, 8).split(32))
    normkit.recalibrate(model, batches)
    return model.eval(), batches


@pytest.mark.parametrize("place", [0, 3])
def test_a_batch_with_nan_is_told(place):
    model, batches = sound()
    batches[place] = batches[place].clone()
    batches[place][1, 0, 2, 2] = math.nan
    (finding,) = normkit.diagnose(model, batches).findings[:1]
    assert (finding.check, finding.severity) == ("nonfinite", "warning")
    assert finding.summary.startswith("1 of 8 batches hold NaN or infinities, which reach 2 of the layers")
    space = {"model": model, "batches": batches, "normkit": normkit, "torch": torch}
    exec(finding.remedy, space)
    assert eval(finding.proof, space)


def test_a_layer_that_is_given_infinities_by_a_finite_batch_is_told():
    model, batches = sound()
    batches[3] = batches[3].sign() * 3e38
    (finding,) = normkit.diagnose(model, batches).of("nonfinite")
    assert "a finite batch gives 1 an input that is not finite" in finding.summary


def test_the_parameter_with_nan_is_named():
    model, batches = sound()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = math.nan
    (finding,) = normkit.diagnose(model, batches).of("nonfinite")
    assert "3.weight holds NaN" in finding.summary
    assert finding.remedy == "model.load_state_dict(last_good_state)"


@pytest.mark.parametrize("eps", [math.nan, math.inf])
def test_an_eps_that_is_no_number_is_an_error_and_no_other_finding(eps):
    model, batches = sound()
    model[1].eps = eps
    (finding,) = [f for f in normkit.diagnose(model, batches).findings if f.severity == "error"][:1]
    assert (finding.check, finding.layer) == ("nonfinite", "1")
    assert "divided by 0" not in finding.summary
    assert not normkit.diagnose(model, batches).of("precision")


def test_a_negative_counter_ends_no_examination():
    model, batches = sound()
    model[1].num_batches_tracked.fill_(-3)
    assert normkit.diagnose(model, batches).healthy


class Tutorials(nn.Module):
    """Keeps its statistics in plain attributes, as a well-known course writes it."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(1, channels)), nn.Parameter(torch.zeros(1, channels))
        self.moving_mean, self.moving_var = torch.zeros(1, channels), torch.ones(1, channels)

    def forward(self, x):
        return self.gamma * (x - self.moving_mean) / (self.moving_var + 1e-5).sqrt() + self.beta


class Listed(nn.Module):
    def __init__(self, norms=None):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 4, 3), norms or [nn.BatchNorm2d(4)]

    def forward(self, x):
        return self.norms[0](self.conv(x))


def test_what_torch_does_not_see_is_told_of_and_not_said_to_be_missing():
    said = str(normkit.diagnose(nn.Sequential(nn.Linear(3, 4), Tutorials(4))))
    assert said.startswith("nothing was examined: 1 (Tutorials) keeps moving_mean and moving_var as plain tensors")
    assert "self.register_buffer('moving_mean', ...)" in said
    said = str(normkit.diagnose(Listed()))
    assert said.startswith("nothing was examined: the model (Listed) holds normalization layers in a plain list, norms")
    assert "nn.ModuleList" in said
    pairs = [("first", nn.BatchNorm2d(4))]
    assert "holds normalization layers in a plain list, norms" in str(normkit.diagnose(Listed(pairs)))
    assert "plain" not in str(normkit.diagnose(sound()[0]))


def test_a_layer_whose_weights_are_all_zero_is_worth_knowing_of_in_evaluation():
    model, _ = sound()
    nn.init.zeros_(model[1].weight)
    (told,) = [f for f in normkit.diagnose(model).findings if f.check == "dead-channel"]
    assert (told.layer, told.severity) == ("1", "info")
    assert told.summary == "4 of 4 channels have a weight of 0: the layer gives its bias whatever comes in"
    assert not [f for f in normkit.diagnose(model.train()).findings if f.check == "dead-channel"]


def test_labels_that_are_no_classes_are_left_out_and_all_of_them_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x = torch.randn(512, 5)
    normkit.recalibrate(model, x)
    classes = model.eval()(x).argmax(1)
    classes[:256] = 255
    batches = list(zip(x.split(64), classes.split(64), strict=True))
    gap = normkit.diagnose(model, batches, labels=lambda batch: batch[1]).gap
    assert (gap.evaluation, gap.samples) == (1.0, 256)
    with pytest.raises(ArgumentError, match="no class that the model has a score for: it has 3"):
        normkit.diagnose(model, batches, labels=lambda batch: batch[1] * 0 + 7)


def test_a_checkpoint_that_holds_a_state_is_told_where_it_is():
    state = sound()[0].state_dict()
    assert "its entry 'state_dict' holds some" in repr(normkit.diagnose({"epoch": 3, "state_dict": state}))


class OfItsOwn(Exception):
    pass


class Complains(nn.Module):
    """Checks its input with an exception of its own, which a tracer's stand-in sets off."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise OfItsOwn("no tensor")
        return torch.relu(self.norm(self.conv(x)))


def test_exceptions_of_ones_own_end_no_trace():
    model, batches = Complains(), torch.randn(256, 3, 8, 8).split(32)
    normkit.recalibrate(model, batches)
    assert normkit.diagnose(model.eval(), batches).healthy
    assert normkit.fold(model, batches[0]).into == {"norm": "conv"}
    assert normkit.convert(model, "normkit", batches[0]).touched == ("norm",)
