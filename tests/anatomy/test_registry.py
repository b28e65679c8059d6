"""Layers of other libraries and of one's own: recognised by what they compute, and by nothing less."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import foreign_layers as foreign
import normkit
from normkit.anatomy import NormForm, affine_in_evaluation, fingerprint, norm_layers
from normkit.anatomy.evidence import examined
from normkit.errors import ArgumentError
from normkit.layers.catalog import METHODS
from tolerances import assert_close


def only(module):
    (layer,) = norm_layers(nn.Sequential(nn.ReLU(), module))
    return layer


KINDS = [
    # class, kind, what differs from torch's form, names of the tail's classes
    (foreign.FrozenBatchNorm2d, "frozen", {"frozen": True}, []),
    (foreign.BatchNormAct2d, "batch", {"tail": ("drop", "act")}, ["ReLU"]),
    (foreign.SyncBatchNormAct, "sync", {"method": "sync", "tail": ("drop", "act")}, ["ReLU"]),
    (foreign.FrozenBatchNormAct2d, "frozen", {"frozen": True, "tail": ("drop", "act")}, ["ReLU"]),
    (foreign.GroupNormAct, "group", {"method": "group", "tail": ("drop", "act")}, ["ReLU"]),
    (foreign.LayerNorm2d, "layer", {"method": "layer", "over": "channels"}, []),
    (foreign.ABN, "batch", {"tail": ("activation",)}, ["LeakyReLU"]),
    (foreign.InPlaceABN, "batch", {"tail": ("activation",), "weight_is": "|weight| + eps"}, ["LeakyReLU"]),
    (foreign.MmcvSyncBatchNorm, "sync", {"method": "sync"}, []),
    (
        foreign.KerasNorm,
        "batch",
        {"weight": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance", "eps": "epsilon"}
        | {"weighs_new": False, "unbiased": False},
        [],
    ),
    (
        foreign.ArticleNorm,
        "batch",
        {"weight": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_var", "eps": 1e-5}
        | {"momentum": 0.1, "unbiased": False},
        [],
    ),
    (foreign.ChannelsFirstLayerNorm, "layer", {"method": "layer", "over": "channels"}, []),
    (foreign.LlamaRMSNorm, "rms", {"method": "rms", "eps": "variance_epsilon"}, []),
    (foreign.GemmaRMSNorm, "rms", {"method": "rms", "weight_is": "1 + weight"}, []),
]


@pytest.mark.parametrize(("cls", "kind", "differs", "tail"), KINDS, ids=[row[0].__name__ for row in KINDS])
def test_layers_of_other_libraries_are_read_by_what_they_compute(cls, kind, differs, tail):
    layer = only(cls(6))
    assert (layer.kind, layer.form) == (kind, NormForm(**differs)), layer.unread
    assert [type(step).__name__ for step in layer.tail] == tail
    assert layer.unread == ""


IMPOSTORS = [
    # class, kind, words of the reason
    (foreign.Deviation, "unknown", "does not compute batch normalization"),
    (foreign.OutsideTheRoot, "unknown", "does not compute batch normalization"),
    (foreign.Clipped, "batch", "does not compute batch normalization"),
    (foreign.Scaled, "batch", "does not normalize with the batch's mean and biased variance in training"),
    (foreign.StoresTheDeviation, "unknown", "other than an average of the batches' variances"),
    (foreign.StoresSomethingBeside, "unknown", "other than an average of the batches' means"),
    (foreign.Codebook, "unknown", "does not compute batch normalization"),
]


@pytest.mark.parametrize(("cls", "kind", "words"), IMPOSTORS, ids=[row[0].__name__ for row in IMPOSTORS])
def test_a_layer_that_computes_something_else_is_not_claimed(cls, kind, words):
    layer = only(cls(6))
    assert (layer.kind, layer.form) == (kind, None)
    assert words in layer.unread
    assert layer.mean is layer.weight is layer.momentum is None
    assert layer.tail == ()
    assert affine_in_evaluation(layer) == layer.unread


def test_a_name_is_no_normalization():
    assert norm_layers(nn.Sequential(foreign.GlobalResponseNorm(6), nn.Linear(3, 4))) == []


@pytest.mark.parametrize("cls", [row[0] for row in (*KINDS, *IMPOSTORS)], ids=lambda cls: cls.__name__)
def test_looking_changes_nothing_and_calls_no_hook(cls):
    layer, called = cls(6), []
    layer.said = "a setting that no layer had before, so that nothing is known of this one yet"
    for module in layer.modules():
        module.register_forward_hook(lambda *_: called.append(1))
    before = fingerprint(layer)
    norm_layers(nn.Sequential(layer))
    assert fingerprint(layer) == before
    assert called == []


def test_momentum_is_the_weight_of_the_new_batch_whichever_way_the_layer_has_it():
    assert only(foreign.KerasNorm(3, momentum=0.97)).momentum == 0.03
    assert only(foreign.ArticleNorm(3)).momentum == 0.1
    assert only(foreign.BatchNormAct2d(3, momentum=0.3)).momentum == 0.3
    assert only(foreign.BatchNormAct2d(3, momentum=None)).momentum is None
    assert only(foreign.KerasNorm(3)).eps == 1e-3


def test_what_a_layer_stores_is_what_it_holds_now():
    norm = foreign.ArticleNorm(3)
    layer = only(norm)
    before = layer.mean
    norm(torch.randn(4, 3, 5, 5))
    assert layer.mean is norm.moving_mean
    assert layer.mean is not before


def test_a_layer_of_a_tutorial_is_held():
    norm, x = foreign.ArticleNorm(3), torch.randn(4, 3, 5, 5)
    mean, var = norm.moving_mean, norm.moving_var
    with normkit.hold_statistics(norm):
        norm(x)
    assert norm.moving_mean is mean
    assert norm.moving_var is var


def test_without_statistics_a_layer_is_known_by_its_training():
    layer = only(foreign.BatchNormAct2d(3, track_running_stats=False))
    assert (layer.kind, layer.form, layer.tracks) == ("batch", NormForm(tail=("drop", "act")), False)


def test_a_forward_that_was_replaced_on_the_object_is_not_claimed():
    norm = foreign.FrozenBatchNorm2d(3)
    assert only(norm).kind == "frozen"
    norm.forward = lambda x: x
    assert only(norm).kind == "unknown"
    assert "replaced on the object" in only(norm).unread


def test_a_parametrized_layer_is_not_claimed():
    norm = foreign.KerasNorm(3)
    torch.nn.utils.parametrize.register_parametrization(norm, "gamma", nn.Softplus())
    assert only(norm).form is None
    assert "parametrization" in only(norm).unread
    scaled = parametrizations.weight_norm(nn.LayerNorm((3, 4)))
    assert only(scaled).parametrized


def test_a_frozen_layer_keeps_its_form():
    model = nn.Sequential(foreign.BatchNormAct2d(3))
    model(torch.randn(4, 3, 5, 5))
    normkit.freeze(model)
    (layer,) = norm_layers(model)
    assert (layer.kind, layer.form) == ("frozen", NormForm(tail=("drop", "act")))


def test_settings_of_a_layer_are_looked_at_again():
    norm = foreign.ABN(3)
    assert [type(step) for step in only(norm).tail] == [nn.LeakyReLU]
    norm.activation = "something"
    assert only(norm).tail == ()
    assert examined(norm).form is not None


class Odd(nn.Module):
    """Names that nobody guesses."""

    def __init__(self, channels, rate=0.2):
        super().__init__()
        self.g, self.b, self.rate = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), rate
        self.register_buffer("mu", torch.zeros(channels))
        self.register_buffer("sigma2", torch.ones(channels))

    def forward(self, x):
        return functional.batch_norm(x, self.mu, self.sigma2, self.g, self.b, self.training, self.rate, 1e-4)


ODD = {"weight": "g", "bias": "b", "mean": "mu", "var": "sigma2", "eps": 1e-4, "momentum": "rate"}


@pytest.fixture
def fresh():
    """Give a class that no test has registered."""
    return type("Fresh", (Odd,), {})


def test_a_registered_layer_is_seen_everywhere(fresh):
    assert norm_layers(fresh(3)) == []
    assert normkit.register_norm(fresh, **ODD) is fresh
    layer = only(fresh(3))
    assert (layer.kind, layer.momentum, layer.eps, layer.channels, layer.tracks) == ("batch", 0.2, 1e-4, 3, True)
    subclass = type("Sub", (fresh,), {})
    assert only(subclass(3)).kind == "batch"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mean": "sigma2", "var": "mu"}, "does not compute"),
        ({"weight": "b", "bias": "g"}, "does not compute"),
        ({"eps": 1e-5}, "does not compute"),
        ({"unbiased": False}, "registered otherwise than a training step shows: weighs_new=True, unbiased=True"),
        ({"weighs_new": False}, "registered otherwise"),
        ({"frozen": True}, "is said to be frozen"),
        ({"weight_is": "1 + weight"}, "does not compute"),
        (
            {"tail": ("act",)},
            "registered with tail[0]='act', and Fresh has no act; known are: g, b, mu",
        ),
        ({"weight": "gg"}, "registered with weight='gg', and Fresh has no gg; known are: g, b"),
        ({"bias": "bias"}, "registered with bias='bias', and Fresh has no bias"),
        ({"momentum": "ratee"}, "has no ratee; did you mean 'rate'?"),
        ({"momentum": 0.1}, "weighs a new batch by 0.2, which is neither its momentum"),
    ],
)
def test_a_registration_that_is_untrue_is_told(fresh, wrong, words):
    normkit.register_norm(fresh, **(ODD | wrong))
    found = examined(fresh(3))
    assert found.form is None
    assert words in found.reason
    assert (only(fresh(3)).kind, only(fresh(3)).unread) == ("unknown", found.reason)


@pytest.mark.parametrize(
    ("cls", "said", "words"),
    [
        (3, {}, "is none"),
        (torch.relu, {}, "is none"),
        (Odd, {"method": "masked"}, "known are: batch, sync"),
        (Odd, {"gamma": "g"}, "has no gamma; known are: bias"),
        (Odd, {"weight": 3}, "name of an attribute"),
        (Odd, {"eps": ()}, "name of an attribute or a number"),
        (Odd, {"unbiased": "no"}, "True or False"),
        (Odd, {"tail": "act"}, "names of attributes"),
        (Odd, {"weight_is": "2 * weight"}, "Known are: weight"),
        (Odd, {"over": "space"}, "known are: last"),
    ],
)
def test_a_registration_that_cannot_be_read_is_refused(cls, said, words):
    with pytest.raises(ArgumentError, match=words):
        normkit.register_norm(cls, **said)
    assert Odd not in [found for found in [cls] if norm_layers(nn.Sequential(Odd(3)))]


def test_registering_serves_as_a_decorator():
    @functools.partial(normkit.register_norm, **ODD)
    class Decorated(Odd):
        pass

    assert only(Decorated(2)).kind == "batch"


AFFINE = [
    *(functools.partial(row.build, 4, 2) for row in METHODS if row.name in ("batch", "renorm", "ghost", "whitening")),
    functools.partial(normkit.MaskedBatchNorm1d, 4),
    functools.partial(nn.SyncBatchNorm, 4),
    functools.partial(nn.InstanceNorm2d, 4, affine=True, track_running_stats=True),
    functools.partial(normkit.WhiteningBatchNorm1d, 4, num_groups=2, iterations=5),
    *(functools.partial(cls, 4) for cls in (foreign.FrozenBatchNormAct2d, foreign.BatchNormAct2d, foreign.InPlaceABN)),
    *(functools.partial(cls, 4) for cls in (foreign.KerasNorm, foreign.ArticleNorm)),
]


@pytest.mark.parametrize("build", AFFINE, ids=lambda build: type(build()).__name__)
def test_every_norm_that_is_affine_in_evaluation_says_its_map(build):
    norm = build().double()
    flat = "1d" in type(norm).__name__
    x = torch.randn(16, 4, 7, dtype=torch.float64) if flat else torch.randn(16, 4, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(-1.5, 1.5)
        for name in ("weight", "bias"):
            if name in norm._buffers:
                norm.get_buffer(name).uniform_(-1.5, 1.5)
        for _ in range(3):
            norm(3 * x + 1)
        (layer,) = norm_layers(norm)
        affine = affine_in_evaluation(layer)
        wide = (1, -1, *(1 for _ in x.shape[2:]))
        mixed = x if affine.mixing is None else torch.einsum("dc,nc...->nd...", affine.mixing, x)
        expected = affine.scale.view(wide) * mixed + affine.shift.view(wide)
        for step in layer.tail:
            expected = step(expected)
        given = norm.eval()(x)
    assert_close(given, expected, dtype=torch.float64)


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (nn.GroupNorm(2, 4), "computes its statistics from the input"),
        (nn.InstanceNorm2d(4), "computes its statistics from the input"),
        (nn.BatchNorm2d(4, track_running_stats=False), "has no running statistics"),
        (normkit.WhiteningBatchNorm2d(4, track_running_stats=False), "has no running statistics"),
        (nn.LazyBatchNorm2d(), "lazy"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_norm_that_is_not_affine_says_why(norm, words):
    (layer,) = norm_layers(norm)
    assert words in affine_in_evaluation(layer)


def test_a_map_that_is_not_finite_is_refused():
    norm = nn.BatchNorm2d(4)
    norm.running_var[1] = -1.0
    assert "not finite" in affine_in_evaluation(norm_layers(norm)[0])


def test_a_copy_of_a_layer_is_read_like_it():
    norm = foreign.BatchNormAct2d(5)
    assert only(copy.deepcopy(norm)).form == only(norm).form


def test_a_layer_that_warns_or_draws_random_numbers_is_tried_quietly():
    class Warns(foreign.KerasNorm):
        def forward(self, x):
            warnings.warn("old", DeprecationWarning, stacklevel=2)
            torch.rand(3)
            return super().forward(x)

    state = torch.get_rng_state()
    assert only(Warns(3)).kind == "batch"
    assert torch.equal(torch.get_rng_state(), state)
