"""What a layer holds besides a norm's state is tried too: a gain that still is 1 makes no difference, and is one."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import foreign_layers as foreign
import normkit
from normkit.anatomy import norm_layers
from normkit.errors import ArgumentError, NormkitError


class Gate(nn.BatchNorm2d):
    """A gain that learns, and starts at 1."""

    def __init__(self, channels):
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.alpha


class Buffered(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("gain", torch.ones(channels, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.gain


class Number(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.gain = 1.0

    def forward(self, x):
        return super().forward(x) * self.gain


class Loose(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.gain = torch.ones(())

    def forward(self, x):
        return super().forward(x) * self.gain


class Nested(nn.BatchNorm2d):
    """A gain that a child holds, unless a switch is set."""

    def __init__(self, channels):
        super().__init__(channels)
        self.child, self.on = nn.LayerNorm(channels, elementwise_affine=True), True

    def forward(self, x):
        y = super().forward(x)
        return y * self.child.weight.view(-1, 1, 1) if self.on else y


class InTraining(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.noise = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return super().forward(x) + (self.noise * x if self.training else 0.0)


class KerasGate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.alpha = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_buffer("moving_mean", torch.zeros(channels))
        self.register_buffer("moving_var", torch.ones(channels))

    def forward(self, x):
        stored = (self.moving_mean, self.moving_var, self.gamma, self.beta)
        return functional.batch_norm(x, *stored, self.training, 0.1, 1e-5) * self.alpha


class Dual(nn.BatchNorm2d):
    """Two sets of statistics, one for each domain."""

    def __init__(self, channels):
        super().__init__(channels)
        self.domain, self.other = 0, nn.BatchNorm2d(channels)

    def forward(self, x):
        return super().forward(x) if self.domain == 0 else self.other(x)


class GateOfLayers(nn.LayerNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.alpha


MORE = [
    (Gate, "depends on alpha too"),
    (Buffered, "depends on gain too"),
    (Number, "depends on gain too"),
    (Loose, "depends on gain too"),
    (Nested, "depends on child.weight too"),
    (InTraining, "depends on noise too"),
    (KerasGate, "depends on alpha too"),
    (Dual, "holds other.weight, other.bias, other.running_mean, other.running_var besides"),
    (GateOfLayers, "depends on alpha too"),
]


@pytest.mark.parametrize(("cls", "words"), MORE, ids=[row[0].__name__ for row in MORE])
def test_what_makes_no_difference_yet_is_found(cls, words):
    layer = norm_layers(nn.Sequential(nn.ReLU(), cls(4)))[0]
    assert layer.form is None
    assert words in layer.unread


@pytest.mark.parametrize("cls", [Gate, Buffered, Number, KerasGate], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("to", ["normkit", "torch", "sync", "batch", "ghost", "renorm", "group", "frozen"])
def test_no_conversion_drops_it(cls, to):
    x, model = torch.randn(8, 3, 9, 9), nn.Sequential(nn.Conv2d(3, 4, 3), cls(4), nn.ReLU())
    model(x)
    for example in (None, x):
        with pytest.raises(NormkitError, match=r"depends on \w+ too"):
            normkit.convert(model, to, example)


def test_a_second_set_of_statistics_is_not_dropped():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Dual(4), nn.ReLU())
    record = normkit.convert(model, "sync")
    assert record.touched == ("1.other",)
    assert "besides the state of batch normalization" in record.refused["1"]
    assert type(record.model[1]) is Dual


@pytest.mark.parametrize("cls", [Gate, KerasGate, Dual], ids=lambda cls: cls.__name__)
def test_porting_drops_no_name_of_a_state(cls):
    with pytest.raises(ArgumentError, match=r"alpha|other\.weight"):
        normkit.port_state(cls(4), target="keras")


def test_a_verdict_is_of_the_layer_and_not_of_its_class():
    nested = Nested(4)
    assert "depends on" in norm_layers(nested)[0].unread
    nested.child, nested.on = None, False
    assert norm_layers(nested)[0].unread == ""


def test_what_the_tail_holds_is_the_tails():
    norm = foreign.BatchNormAct2d(4)
    norm.act = nn.PReLU(4)
    (layer,) = norm_layers(norm)
    assert [type(step) for step in layer.tail] == [nn.PReLU]


@pytest.mark.parametrize("cls", [foreign.GroupNormAct, foreign.LayerNorm2d, foreign.GemmaRMSNorm])
def test_weights_of_norms_of_samples_are_varied_too(cls):
    assert norm_layers(cls(6))[0].form is not None


class InSingle(nn.BatchNorm2d):
    """Computes in float32, as norms under mixed precision do."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


def test_a_layer_that_computes_in_float32_is_tried_in_it():
    x, model = torch.randn(8, 3, 12, 12), nn.Sequential(nn.Conv2d(3, 4, 3), InSingle(4), nn.ReLU())
    for _ in range(20):
        model(x)
    model.eval()
    (layer,) = norm_layers(model)
    assert (layer.kind, layer.unread, layer.momentum) == ("batch", "", 0.1)
    folded = normkit.fold(model, x)
    assert folded.into == {"1": "0"}
    for given in (folded, normkit.convert(model, "sync", x), normkit.convert(model, "normkit", x)):
        torch.testing.assert_close(given.model(x), model(x), rtol=0, atol=2e-5)
    normkit.recalibrate(model, [x])
    normkit.freeze(model)
    kept = model[1].running_mean.clone()
    model.train()(x)
    assert torch.equal(model[1].running_mean, kept)


class Stuck(foreign.KerasNorm):
    """Names a momentum that its code does not read."""

    def forward(self, x):
        said, self.momentum = self.momentum, 0.99
        try:
            return super().forward(x)
        finally:
            self.momentum = said


def test_a_momentum_that_the_code_does_not_read_is_none():
    (layer,) = norm_layers(Stuck(4, momentum=0.99))
    assert layer.form is None
    assert "neither its momentum nor the rest to 1" in layer.unread


class SquaredNorm(foreign.ChannelsFirstLayerNorm):
    """Multiplies twice, which at a weight of 1 is once."""

    def forward(self, x):
        return super().forward(x) * self.weight[:, None, None]


def test_a_weight_of_one_says_nothing():
    assert norm_layers(foreign.ChannelsFirstLayerNorm(4))[0].form is not None
    assert norm_layers(SquaredNorm(4)) == []


class Absolute(nn.BatchNorm2d):
    def forward(self, x):
        state = (self.running_mean, self.running_var, self.weight.abs(), self.bias)
        return functional.batch_norm(x, *state, self.training, self.momentum, self.eps)


@pytest.mark.parametrize("channels", range(1, 9))
def test_negative_weights_are_tried_however_few_channels_there_are(channels):
    (layer,) = norm_layers(Absolute(channels))
    assert layer.form is None
    (plain,) = norm_layers(nn.BatchNorm2d(channels))
    assert plain.form is not None
