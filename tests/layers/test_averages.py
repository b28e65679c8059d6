"""Running statistics that follow another law than torch's, held against closed forms and the reference."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit
from normkit.errors import ArgumentError, StatisticsError
from normkit.functional.averages import momentum_of_half_life, settled
from normkit.reference import Running, batch_statistics, debiased_update, population_statistics
from tolerances import RELATIVE, assert_close

LAWS = {
    "debiased": {"average": "debiased"},
    "debiased total": {"average": "debiased", "variance": "total"},
    "plain total": {"momentum": None, "variance": "total"},
}
SHAPES = {"vectors": (7, 3), "images": (5, 3, 4, 3), "channels last": (2, 3, 5, 5)}


def batches(shape, dtype, count=6):
    generator = torch.Generator().manual_seed(4)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 40 + 2 * place for place in range(count)]
    if shape[0] == 2:
        made = [value.contiguous(memory_format=torch.channels_last) for value in made]
    return [value.to(dtype) for value in made]


def layer_for(shape, **settings):
    return (normkit.BatchNorm1d if len(shape) == 2 else normkit.BatchNorm2d)(3, **settings)


def by_hand(data, momentum, law):
    """The law's definition: normalized weights of the batches, all at once, in float64."""
    parts = [batch_statistics(value.double().numpy()) for value in data]
    steps = len(parts)
    weights = np.array([1.0 if momentum is None else (1 - momentum) ** (steps - 1 - place) for place in range(steps)])
    weights = weights / weights.sum()
    mean = sum(weight * part.mean for weight, part in zip(weights, parts, strict=True))
    if law.get("variance") != "total":
        return mean, sum(weight * part.unbiased_var for weight, part in zip(weights, parts, strict=True))
    within = sum(weight * part.var for weight, part in zip(weights, parts, strict=True))
    return mean, within + sum(weight * (part.mean - mean) ** 2 for weight, part in zip(weights, parts, strict=True))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_average_is_the_weighted_one_of_its_definition(law, dtype, shape):
    layer, data = layer_for(shape, **law), batches(shape, dtype)
    layer = layer.double() if dtype is torch.float64 else layer
    layer.running_mean.fill_(-1e3)  # what was there before the first batch leaves no trace
    layer.running_var.fill_(1e6)
    plain = copy.deepcopy(layer)
    plain.average, plain.variance = "moving", "batch"
    for value in data:
        assert torch.equal(layer(value), plain(value)), "the law changes what is stored, not what is computed"
    mean, var = by_hand(data, layer.momentum, law)
    kept = torch.float64 if dtype is torch.float64 else torch.float32
    assert_close(layer.running_mean, torch.from_numpy(mean), dtype=kept)
    # Each update rounds in the buffer's type.
    assert np.abs(layer.running_var.double().numpy() / var - 1).max() < 10 * RELATIVE[kept]
    assert layer.num_batches_tracked == len(data)


@pytest.mark.parametrize("total", [False, True])
def test_the_reference_and_the_layer_agree_step_by_step(total):
    law = {"average": "debiased", "variance": "total" if total else "batch"}
    layer = normkit.BatchNorm1d(3, decay=0.8, unbiased=False, **law).double()
    running = Running(mean=np.zeros(3), var=np.ones(3))
    for step, value in enumerate(batches((4, 3), torch.float64), 1):
        layer(value)
        found = batch_statistics(value.numpy())
        running = debiased_update(running, found, step=step, decay=0.8, total=total, unbiased=False)
        assert_close(layer.running_mean, torch.from_numpy(running.mean), dtype=torch.float64)
        assert_close(layer.running_var, torch.from_numpy(running.var), dtype=torch.float64)


def test_total_variance_with_equal_weights_is_the_populations():
    data = batches((9, 3), torch.float64)
    layer = normkit.BatchNorm1d(3, momentum=None, variance="total").double()
    for value in data:
        layer(value)
    expected = population_statistics([value.numpy() for value in data])
    assert_close(layer.running_var, torch.from_numpy(expected.var), dtype=torch.float64)


def test_total_variance_estimates_the_populations_where_batches_are_small():
    """Of independent values: sigma^2 (1 - sum of squared weights / m), where the batches' own is right by m - 1."""
    momentum, m, runs = 0.2, 3, 4000
    total = normkit.BatchNorm1d(runs, momentum=momentum, affine=False, average="debiased", variance="total").double()
    generator = torch.Generator().manual_seed(0)
    steps = 40
    for _ in range(steps):
        total(torch.randn(m, runs, generator=generator, dtype=torch.float64))
    weights = momentum * (1 - momentum) ** np.arange(steps)
    squared = ((weights / weights.sum()) ** 2).sum()
    found, error = total.running_var.mean().item(), total.running_var.std().item() / math.sqrt(runs)
    assert abs(found - (1 - squared / m)) < 4 * error


def test_half_life_is_said_in_batches_and_beside_nothing_else():
    layer = normkit.BatchNorm2d(3, half_life=4)
    assert (1 - layer.momentum) ** 4 == pytest.approx(0.5, rel=1e-14)
    for other in ({"momentum": 0.2}, {"decay": 0.9}, {"momentum": None}):
        with pytest.raises(ArgumentError, match="which say the same: pass one"):
            normkit.BatchNorm2d(3, half_life=4, **other)
    for wrong in (0, -1, math.inf, math.nan, "4", True):
        with pytest.raises(ArgumentError, match="half_life"):
            normkit.BatchNorm2d(3, half_life=wrong)
    lazy = normkit.LazyBatchNorm2d(half_life=1, average="debiased", variance="total")
    lazy(torch.randn(2, 3, 4, 4))
    assert (lazy.momentum, lazy.average, lazy.variance) == (0.5, "debiased", "total")
    assert normkit.SyncBatchNorm(3, half_life=1).momentum == 0.5


def test_laws_that_contradict_themselves_are_refused_and_change_nothing():
    for settings, match in (
        ({"average": "adam"}, "average is 'adam'; known are: moving, debiased"),
        ({"variance": "all"}, "variance is 'all'; known are: batch, total"),
        ({"average": "debiased", "momentum": None}, "has no start to remove"),
        ({"variance": "total"}, "counts its start of 0; pass average='debiased'"),
    ):
        for make in (normkit.BatchNorm2d, normkit.SyncBatchNorm):
            with pytest.raises(ArgumentError, match=match):
                make(3, **settings)
    layer = normkit.BatchNorm1d(3)
    layer.variance = "total"  # said later, and judged at the call
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ArgumentError, match="counts its start of 0"):
        layer(torch.randn(4, 3))
    layer.average = "debiased"
    layer.running_mean.requires_grad_()
    with pytest.raises(StatisticsError, match="requires a gradient"):
        layer(torch.randn(4, 3))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.running_mean.requires_grad_(False)
    layer.num_batches_tracked = None
    with pytest.raises(ArgumentError, match="need the number of batches"):
        layer(torch.randn(4, 3))


def test_state_goes_both_ways_and_training_goes_on():
    data = batches((8, 3), torch.float32, 12)
    law = {"average": "debiased", "variance": "total"}
    whole = normkit.BatchNorm1d(3, **law)
    for value in data:
        whole(value)
    first = normkit.BatchNorm1d(3, **law)
    for value in data[:5]:
        first(value)
    plain = nn.BatchNorm1d(3)
    plain.load_state_dict(first.state_dict())
    assert_close(plain.eval()(data[0]), copy.deepcopy(first).eval()(data[0]), dtype=torch.float32)
    again = normkit.BatchNorm1d(3, **law)
    again.load_state_dict(plain.state_dict())
    for value in data[5:]:
        again(value)
    assert torch.equal(again.running_var, whole.running_var)
    assert repr(again).endswith("average='debiased', variance='total')")


def test_a_repeated_forward_moves_nothing_and_momentum_0_holds():
    layer = normkit.BatchNormAct2d(3, activation="silu", average="debiased", variance="total")
    conv = nn.Conv2d(3, 3, 1)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    checkpoint(lambda x: conv(layer(x)), x, use_reentrant=False).pow(2).mean().backward()
    assert layer.num_batches_tracked == 1
    held = layer.norm.running_mean.clone()
    layer.norm.momentum = 0.0
    layer(x.detach() + 9)
    assert torch.equal(layer.norm.running_mean, held)


def test_compiled_it_stores_the_same():
    layer = normkit.BatchNorm2d(3, average="debiased", variance="total")
    other, data = copy.deepcopy(layer), batches((5, 3, 4, 3), torch.float32, 3)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for value in data:
        assert_close(compiled(value), layer(value), dtype=torch.float32)
    for (name, value), expected in zip(other.named_buffers(), layer.buffers(), strict=True):
        assert_close(value, expected, dtype=torch.float32, what=name)


def test_programs_that_hold_torchs_norm_refuse_to_train_with_another_law():
    layer = normkit.BatchNorm2d(3, average="debiased")
    with pytest.raises(ArgumentError, match="cannot store average='debiased'"):
        torch.export.export(layer, (torch.randn(2, 3, 4, 4),))
    with pytest.raises(ArgumentError, match="cannot store average='debiased'"):
        layer.__prepare_scriptable__()
    torch.export.export(layer.eval(), (torch.randn(2, 3, 4, 4),))


def test_convert_carries_the_law_or_refuses_what_cannot_keep_it():
    model = nn.Sequential(normkit.BatchNorm2d(3, average="debiased", variance="total"))
    there = normkit.convert(copy.deepcopy(model), to="sync").model[0]
    assert (type(there), there.average, there.variance) == (normkit.SyncBatchNorm, "debiased", "total")
    back = normkit.convert(nn.Sequential(there), to="batch").model[0]
    assert (type(back), back.average, back.variance) == (normkit.BatchNorm2d, "debiased", "total")
    with pytest.raises(normkit.errors.SurgeryError, match="follow average='debiased', variance='total', which torch's"):
        normkit.convert(model, to="torch")


def test_the_doctor_knows_that_nothing_is_left_of_the_start():
    def findings(**law):
        model = nn.Sequential(normkit.BatchNorm1d(3, momentum=0.01, **law))
        data = batches((32, 3), torch.float32, 8)
        for value in data:
            model(value)
        return normkit.diagnose(model.eval(), data).of("ema-window")

    assert findings()
    assert not findings(average="debiased")


@pytest.mark.parametrize("make", [normkit.BatchNorm1d, normkit.SyncBatchNorm, normkit.BatchNormAct1d])
def test_port_state_says_what_the_state_does_not(make):
    layer = make(3, average="debiased")
    ported = normkit.port_state(getattr(layer, "norm", layer), target="keras")
    assert any("average='debiased'" in change and "as they are" in change for change in ported.changes)


def test_accumulated_and_synchronized_steps_follow_the_law():
    law = {"average": "debiased", "variance": "total"}
    data = batches((12, 3), torch.float64, 3)
    large = normkit.BatchNorm1d(3, **law).double()
    made = {
        "exact": normkit.BatchNorm1d(3, **law).double(),
        "statistics": normkit.BatchNorm1d(3, **law).double(),
        "sync": normkit.SyncBatchNorm(3, **law).double(),
    }
    simulation = normkit.simulate(made["sync"], ranks=2)
    for value in data:
        large(value)
        for kind in ("exact", "statistics"):
            normkit.accumulate(made[kind], list(value.split([5, 7])), lambda m, x: m(x).pow(3).mean(), kind=kind)
        simulation.run(lambda model, x: model(x), list(value.split([3, 9])))
    made["sync"] = simulation.models[1]
    for kind, layer in made.items():
        for (name, value), expected in zip(layer.named_buffers(), large.buffers(), strict=True):
            assert_close(value, expected, dtype=torch.float64, what=f"{kind}: {name}")


# What each relative keeps beside batch normalization's mean and variance, and what its law is refused for.
RELATIVES = {
    "ghost": (lambda **law: normkit.GhostBatchNorm1d(3, ghost_size=3, **law), "running_var"),
    "renorm": (lambda **law: normkit.BatchRenorm1d(3, **law), "running_var"),
    "masked": (lambda **law: normkit.MaskedBatchNorm1d(3, **law), "running_var"),
    "whitening": (lambda **law: normkit.WhiteningBatchNorm1d(3, **law), "running_covariance"),
    "act": (lambda **law: normkit.BatchNormAct1d(3, **law), "running_var"),
}


def diagonal(layer, name):
    value = getattr(getattr(layer, "norm", layer), name)
    return value.diagonal(dim1=-2, dim2=-1).flatten() if value.dim() == 3 else value


@pytest.mark.parametrize("relative", RELATIVES)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_relatives_keep_the_average_of_the_same_definition(relative, law):
    make, name = RELATIVES[relative]
    layer, data = make(**law).double(), batches((7, 3), torch.float64)
    layer.running_mean.fill_(-1e3)
    for value in data:
        layer(value, torch.ones(7, dtype=torch.bool)) if relative == "masked" else layer(value)
    mean, var = by_hand(data, layer.norm.momentum if relative == "act" else layer.momentum, law)
    assert_close(layer.running_mean, torch.from_numpy(mean), dtype=torch.float64)
    assert_close(diagonal(layer, name), torch.from_numpy(var), dtype=torch.float64)
    assert layer.num_batches_tracked == len(data)
    said = repr(getattr(layer, "norm", layer))
    assert all(f"{word}={value!r}" in said for word, value in law.items())
    counted = copy.deepcopy(getattr(layer, "norm", layer))
    counted.num_batches_tracked = None
    before = {key: value.clone() for key, value in counted.state_dict().items()}
    with pytest.raises((ArgumentError, StatisticsError), match=r"number of batches|needs num_batches_tracked|their nu"):
        counted(data[0], torch.ones(7, dtype=torch.bool)) if relative == "masked" else counted(data[0])
    assert all(torch.equal(value, before[key]) for key, value in counted.state_dict().items())


def test_the_total_covariance_is_the_populations():
    data = batches((9, 3), torch.float64)
    layer = normkit.WhiteningBatchNorm1d(3, momentum=None, variance="total").double()
    for value in data:
        layer(value)
    assert_close(layer.running_covariance[0], torch.cov(torch.cat(data).T, correction=0), dtype=torch.float64)


@pytest.mark.parametrize("relative", RELATIVES)
def test_relatives_refuse_a_law_that_contradicts_itself_and_take_a_half_life(relative):
    make, _ = RELATIVES[relative]
    layer = make(half_life=1)
    assert getattr(layer, "norm", layer).momentum == 0.5
    for settings, match in (
        ({"average": "adam"}, "average is 'adam'; known are: moving, debiased"),
        ({"average": "debiased", "momentum": None}, "has no start to remove"),
        ({"variance": "total"}, "counts its start of 0; pass average='debiased'"),
        ({"half_life": 3, "momentum": 0.2}, "which say the same: pass one"),
    ):
        with pytest.raises(ArgumentError, match=match):
            make(**settings)


def test_an_instance_norm_debiases_what_it_stores_and_refuses_a_total_variance():
    data = batches((5, 3, 4, 3), torch.float64)
    layer = normkit.InstanceNorm2d(3, track_running_stats=True, half_life=4, average="debiased").double()
    plain = normkit.InstanceNorm2d(3, track_running_stats=True).double()
    layer.running_mean.fill_(-1e3)
    for value in data:
        assert torch.equal(layer(value), plain(value))
    weights = [(1 - layer.momentum) ** (len(data) - 1 - place) for place in range(len(data))]
    mean, var = (
        sum(weight * found for weight, found in zip(weights, each, strict=True)) / sum(weights)
        for each in ([x.mean((2, 3)).mean(0) for x in data], [x.var((2, 3)).mean(0) for x in data])
    )
    assert_close(layer.running_mean, mean, dtype=torch.float64)
    assert_close(layer.running_var, var, dtype=torch.float64)
    assert (layer.num_batches_tracked, plain.num_batches_tracked) == (len(data), 0)
    torchs = nn.InstanceNorm2d(3, track_running_stats=True).double()
    torchs.load_state_dict(layer.state_dict())
    assert_close(torchs.eval()(data[0]), layer.eval()(data[0]), dtype=torch.float64)
    assert repr(layer).endswith("average='debiased')")
    layer.train()
    with pytest.raises(ArgumentError, match="the spread of their means, which it takes out, is no part of that"):
        normkit.InstanceNorm2d(3, track_running_stats=True, variance="total")
    with pytest.raises(ArgumentError, match="cannot store average='debiased'"):
        layer.__prepare_scriptable__()
    with pytest.raises(ArgumentError, match="cannot store average='debiased'"):
        torch.export.export(layer, (data[0],))
    layer.num_batches_tracked = None
    with pytest.raises(ArgumentError, match="need the number of batches"):
        layer(data[0])


@pytest.mark.parametrize("relative", ["ghost", "masked", "renorm"])
def test_tools_read_the_law_of_a_relative(relative):
    make, _ = RELATIVES[relative]

    def findings(**law):
        model = nn.Sequential(make(momentum=0.01, **law))
        for value in batches((32, 3), torch.float32, 8):
            model(value)
        return normkit.diagnose(model.eval(), batches((32, 3), torch.float32, 8)).of("ema-window")

    assert findings()
    assert not findings(average="debiased")
    data = batches((8, 3), torch.float64)
    model = nn.Sequential(make(average="debiased", variance="total").double())
    model(data[0])
    normkit.recalibrate(model, data, layerwise=relative == "renorm")
    expected = population_statistics([value.numpy() for value in data])
    assert_close(model[0].running_mean, torch.from_numpy(expected.mean), dtype=torch.float64)
    expected_var = torch.from_numpy(expected.var)
    assert_close(model[0].running_var, expected_var, dtype=torch.float64)
    assert model[0].num_batches_tracked == settled(0.1, "debiased")
    plain = nn.BatchNorm1d(3).double()
    plain.load_state_dict(model[0].state_dict())
    assert_close(plain.eval()(data[0]), copy.deepcopy(model).eval()(data[0]), dtype=torch.float64)
    made = make(average="debiased", variance="total")
    made.load_state_dict(plain.state_dict())
    assert made.num_batches_tracked == settled(0.1, "debiased")
    if relative != "masked":
        law = {"average": "debiased", "variance": "total"}
        kept = normkit.convert(nn.Sequential(normkit.BatchNorm1d(3, **law)), to=relative).model[0]
        assert (kept.average, kept.variance) == ("debiased", "total")


@pytest.mark.parametrize("make", [normkit.BatchNorm1d, normkit.GhostBatchNorm1d, normkit.SyncBatchNorm])
def test_a_population_that_was_measured_is_not_thrown_away_by_the_next_batch(make):
    momentum = momentum_of_half_life(100)
    for state in ("recalibrated", "of old torch"):
        layer = make(2, half_life=100, average="debiased", variance="total").double()
        data = torch.randn(1000, 2, dtype=torch.float64)
        if state == "recalibrated":
            normkit.recalibrate(layer, [data])
            assert_close(layer.running_var, data.var(0, correction=0), dtype=torch.float64)
        else:
            plain = nn.BatchNorm1d(2, momentum=1.0).double()
            plain(data)
            old = {name: value for name, value in plain.state_dict().items() if name != "num_batches_tracked"}
            layer.load_state_dict(old)
        before = layer.running_mean.clone()
        batch = torch.randn(4, 2, dtype=torch.float64) + 5
        layer(batch)
        weight = ((layer.running_mean - before) / (batch.mean(0) - before)).tolist()
        assert weight == pytest.approx([momentum] * 2, rel=2e-3)


def test_what_counts_as_settled():
    assert settled(0.5, "debiased") == 10
    assert [settled(*law) for law in ((0.1, "moving"), (None, "moving"), (1.0, "debiased"), (0.0, "debiased"))] == [
        0
    ] * 4
    # Statistics that are the start are none, and a counter that was given stays.
    layer = normkit.BatchNorm1d(2, average="debiased")
    layer.load_state_dict({name: value for name, value in layer.state_dict().items() if "num" not in name})
    assert layer.num_batches_tracked == 0
    other = normkit.BatchNorm1d(2, average="debiased")
    other(torch.randn(5, 2))
    layer.load_state_dict(other.state_dict())
    assert layer.num_batches_tracked == 1
    moving = normkit.BatchNorm1d(2)
    moving.load_state_dict({name: value for name, value in other.state_dict().items() if "num" not in name})
    assert moving.num_batches_tracked == 0
