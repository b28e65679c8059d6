"""Population statistics: exact, weighted by counts, and all or nothing."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import normkit
from normkit.anatomy import fingerprint
from normkit.anatomy.frozen import frozen_class
from normkit.errors import ArgumentError, SurgeryError
from normkit.reference import averaged_statistics, population_statistics
from normkit.surgery import recalibrate
from normkit.surgery.moments import AveragedMoments, Moments
from tolerances import assert_close

from .networks import Failure, Small, failing, leaves, randomize


def population(values, unbiased=True):
    """The judge: all values at once, NumPy, float64."""
    rows = np.moveaxis(values.double().numpy(), 1, 0).reshape(values.shape[1], -1)
    return torch.from_numpy(rows.mean(1)), torch.from_numpy(rows.var(1, ddof=int(unbiased)))


def images(*sizes, scale=3.0, mean=2.0):
    return [scale * torch.randn(size, 3, 8, 8) + mean for size in sizes]


@pytest.mark.parametrize("sizes", [(4, 7, 1), (12,), (1, 1, 10), (5, 7)])
def test_statistics_are_those_of_all_values_however_they_are_cut(sizes):
    data = torch.cat(images(12)) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    norm = nn.BatchNorm2d(3)
    recalibrate(norm, data.split(sizes))
    mean, variance = population(data)
    assert_close(norm.running_mean, mean, dtype=torch.float32)
    assert torch.allclose(norm.running_var.double(), variance, rtol=1e-7 * 2)


def test_moments_agree_with_the_reference():
    batches = images(4, 7, 1)
    moments, reference = Moments(3), population_statistics([batch.numpy() for batch in batches])
    for batch in batches:
        moments.add(batch)
    assert moments.count == reference.count
    assert_close(moments.mean, torch.from_numpy(reference.mean), dtype=torch.float64)
    assert_close(moments.variance(unbiased=False), torch.from_numpy(reference.var), dtype=torch.float64)
    assert_close(moments.variance(unbiased=True), torch.from_numpy(reference.unbiased_var), dtype=torch.float64)


def test_layer_that_stores_the_biased_variance_gets_it():
    norm, data = normkit.BatchNorm1d(2, unbiased=False), torch.randn(5, 2)
    normkit.recalibrate(norm, data)
    assert_close(norm.running_var, population(data, unbiased=False)[1], dtype=torch.float32)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
def test_moments_hold_where_the_mean_dwarfs_the_deviation(offset):
    data = torch.randn(64, 5, 3, dtype=torch.float64) + offset
    moments = Moments(5)
    for batch in data.split([1, 30, 33]):
        moments.add(batch)
    mean, variance = population(data)
    assert torch.allclose(moments.mean, mean, rtol=1e-14)
    assert torch.allclose(moments.variance(unbiased=True), variance, rtol=1e-7 if offset else 1e-12)


def test_short_last_batch_counts_less_than_for_update_bn():
    data = torch.cat([torch.zeros(96, 1), 10 * torch.ones(4, 1)])
    batches = list(data.split(96))
    torchs, ours = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(batches, torchs)
    recalibrate(ours, batches)
    assert torchs.running_mean.item() == pytest.approx(5.0)  # each batch counts alike
    assert ours.running_mean.item() == pytest.approx(0.4)


def test_two_domains_add_their_distance_to_the_variance():
    batches = [torch.randn(500, 1) - 5, torch.randn(500, 1) + 5]
    torchs, ours = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(batches, torchs)
    recalibrate(ours, batches)
    assert torchs.running_var.item() == pytest.approx(1.0, abs=0.1)  # the variance inside a batch only
    assert ours.running_var.item() == pytest.approx(26.0, abs=0.5)


def test_empty_loader_changes_nothing_where_update_bn_wipes():
    torchs, ours = randomize(nn.BatchNorm1d(3)), randomize(nn.BatchNorm1d(3))
    update_bn([], torchs)
    assert torchs.running_mean.tolist() == [0, 0, 0]
    before = fingerprint(ours)
    with pytest.raises(SurgeryError, match="no batches"):
        recalibrate(ours, [])
    with pytest.raises(SurgeryError, match="no batches"):
        recalibrate(ours, iter([]))
    assert fingerprint(ours) == before


def test_failing_loader_changes_nothing_where_update_bn_leaves_momentum_none():
    def loader():
        yield torch.randn(4, 3)
        raise OSError("disk gone")

    torchs, ours = randomize(nn.BatchNorm1d(3)), randomize(nn.BatchNorm1d(3))
    with pytest.raises(OSError, match="disk gone"):
        update_bn(loader(), torchs)
    assert torchs.momentum is None
    batches = loader()
    before = fingerprint(ours)
    random = torch.get_rng_state()
    with pytest.raises(OSError, match="disk gone"):
        recalibrate(ours, batches)
    assert fingerprint(ours) == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("path", leaves(Small()))
def test_exception_in_any_layer_leaves_the_model_bit_identical(path, layerwise):
    model, batches = randomize(Small()), images(4, 3)
    with failing(model.get_submodule(path)):
        before = fingerprint(model)
        with pytest.raises(Failure):
            recalibrate(model, batches, layerwise=layerwise)
        assert fingerprint(model) == before


def test_exception_between_two_writes_leaves_the_model_bit_identical():
    model = randomize(Small())
    model.fc.weight.data.mul_(1e25)
    batches = images(4, 3)
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match=r"bn2.*float32 cannot hold"):
        recalibrate(model, batches)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "form",
    [
        lambda x: [(x, torch.zeros(len(x)))],
        lambda x: [[x, torch.zeros(len(x))]],
        lambda x: [{"image": x, "label": 1}],
        lambda x: [((x,), 0)],
        lambda x: x,
        lambda x: {"image": x},
        lambda x: DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=5),
        lambda x: (part for part in x.split(4)),
    ],
)
def test_loader_of_any_form(form):
    model = nn.Module()
    model.norm = nn.BatchNorm2d(3)
    model.forward = lambda image: model.norm(image)
    data = torch.cat(images(12))
    recalibrate(model, form(data))
    assert_close(model.norm.running_mean, population(data)[0], dtype=torch.float32)


def test_dict_batches_work_where_update_bn_raises():
    with pytest.raises((TypeError, AttributeError)):
        update_bn([{"input": torch.randn(4, 3)}], nn.BatchNorm1d(3))
    recalibrate(nn.BatchNorm1d(3), [{"input": torch.randn(4, 3)}])


def test_call_takes_what_the_default_does_not_understand():
    norm, data = nn.BatchNorm1d(3), torch.randn(9, 3)
    batches = [{"rows": data, "id": 4}]
    with pytest.raises(ArgumentError, match=r"'rows', 'id'.*call="):
        recalibrate(norm, batches)
    recalibrate(norm, batches, call=lambda model, batch: model(batch["rows"]))
    assert_close(norm.running_mean, population(data)[0], dtype=torch.float32)


def test_only_statistics_of_the_chosen_layers_change():
    model = randomize(Small())
    batches = images(4, 3)
    before = fingerprint(model)
    record = recalibrate(model, batches, where="bn1")
    changed = {name for name, value in fingerprint(model).items() if value != before[name]}
    assert changed == {"bn1._buffers.running_mean", "bn1._buffers.running_var"}
    assert record.touched == ("bn1",)


def test_mode_hooks_and_settings_survive_in_any_mode():
    for training in (True, False):
        model = randomize(Small()).train(training)
        calls = []
        model.bn1.register_forward_hook(lambda module, args, output, calls=calls: calls.append(module.training))
        model.bn0.momentum = None
        batches = images(4, 3)
        before = fingerprint(model)
        recalibrate(model, batches)
        changed = {name for name, value in fingerprint(model).items() if value != before[name]}
        assert {name.rsplit(".", 1)[1] for name in changed} == {"running_mean", "running_var"}
        assert calls == [True, True]


def test_layerwise_gives_each_layer_the_population_it_sees_in_use():
    model, batches = randomize(Small()).double(), [batch.double() for batch in images(6, 5, 2)]
    recalibrate(model, batches, layerwise=True)
    data, seen = torch.cat(batches), {}
    for path in ("bn0", "bn1", "bn2"):
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen.__setitem__(path, args[0].detach())
        )
    model.eval()(data)
    for path, values in seen.items():
        mean, variance = population(values)
        norm = model.get_submodule(path)
        assert_close(norm.running_mean, mean, dtype=torch.float64, what=path)
        assert_close(norm.running_var, variance, dtype=torch.float64, what=path)


def test_one_pass_is_called_approximate_and_layerwise_exact():
    model, batches = Small(), images(4, 3)
    assert recalibrate(model, batches).exactness == "approximate"
    assert recalibrate(model, batches, layerwise=True).exactness == "exact"
    assert recalibrate(model, batches, where="bn0").exactness == "exact"


def test_layerwise_refuses_what_can_be_read_once():
    model = Small()
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match="read only once"):
        recalibrate(model, (batch for batch in []), layerwise=True)
    assert fingerprint(model) == before


def test_dropout_is_off_unless_asked_for():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
    data = torch.ones(1000, 2)
    recalibrate(model, data)
    assert model[1].running_var.tolist() == [0, 0]
    recalibrate(model, data, dropout=True)
    assert model[1].running_var.min() > 0.8


def test_shared_layer_pools_all_its_calls():
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm, nn.Linear(2, 2), norm).double()
    data = torch.randn(50, 2).double()
    record = recalibrate(model, data, layerwise=False)
    assert record.touched == ("0",)
    hidden = model[1]((data - data.mean(0)) / (data.var(0, correction=0) + norm.eps).sqrt())
    assert_close(norm.running_mean, population(torch.cat([data, hidden.detach()]))[0], dtype=torch.float64)


def test_samples_stop_the_reading_and_too_few_are_refused():
    read = []

    def loader():
        for batch in images(4, 4, 4, 4):
            read.append(batch)
            yield batch

    norm = nn.BatchNorm2d(3)
    record = recalibrate(norm, loader(), samples=7)
    assert (record.batches, record.samples, len(read)) == (2, 8, 2)
    before = fingerprint(norm)
    with pytest.raises(SurgeryError, match="17 samples were asked for and the batches hold 8"):
        recalibrate(norm, read[:2], samples=17)
    assert fingerprint(norm) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_moments_that_are_not_finite_name_batch_and_layer(bad):
    model, batches = randomize(Small()), images(4, 3)
    batches[1][2, 1, 0, 0] = bad
    if bad == 1e38:
        model.bn0 = nn.Identity()
        model.conv1.weight.data.mul_(1e30)
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match=r"batch [01] gives bn[01] \(BatchNorm2d\) values that are not finite"):
        recalibrate(model, batches)
    assert fingerprint(model) == before


def test_batch_of_one_value_names_batch_and_layer():
    model, batches = randomize(Small()), images(4, 1)
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match=r"batch 1 gives bn2 \(BatchNorm1d\) one value.*drop_last"):
        recalibrate(model, batches)
    assert fingerprint(model) == before
    recalibrate(model, batches, layerwise=True)
    with pytest.raises(SurgeryError, match="given 1 values"):
        recalibrate(model, images(1), layerwise=True)


def test_empty_batch_adds_nothing():
    norm, data = nn.BatchNorm2d(3), torch.cat(images(6))
    recalibrate(norm, [data[:0], data])
    assert_close(norm.running_mean, population(data)[0], dtype=torch.float32)


def test_layers_without_statistics_are_left_with_a_reason():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    record = recalibrate(model, torch.cat(images(6)))
    assert record.touched == ("1",)
    assert record.refused == {"0": "it keeps no running statistics (track_running_stats is off)"}
    with pytest.raises(SurgeryError, match="GroupNorm keeps no statistics"):
        recalibrate(model, torch.cat(images(6)), where="2")
    with pytest.raises(SurgeryError, match="is lazy"):
        recalibrate(nn.LazyBatchNorm2d(), torch.cat(images(6)))


def test_layer_that_no_batch_reaches_is_left_with_a_reason():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.unused = nn.BatchNorm2d(3)
    model.forward = lambda image: model[0](image)
    record = recalibrate(model, torch.cat(images(6)))
    assert record.refused == {"unused": "no batch reached it"}
    assert model.unused.running_var.tolist() == [1, 1, 1]


def test_frozen_layer_is_left_where_update_bn_overwrites_it():
    data = torch.randn(64, 3) + 4
    torchs = nn.Sequential(nn.BatchNorm1d(3))
    torchs[0].eval()
    update_bn([data], torchs)
    assert torchs[0].running_mean.mean() > 3
    ours = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    ours[0].__class__ = frozen_class(nn.BatchNorm1d)
    ours[0].frozen_statistics, ours[0].frozen_track, ours[0].frozen_parameters = "running", False, ()
    record = recalibrate(ours, data)
    assert "frozen" in record.refused["0"]
    assert ours[0].running_mean.tolist() == [0, 0, 0]
    assert ours[1].running_mean.mean() > 3
    recalibrate(ours, data, include_frozen=True)
    assert ours[0].running_mean.mean() > 3
    assert type(ours[0]).__name__ == "FrozenBatchNorm1d"


def test_counter_rises_to_the_batches_and_never_falls():
    norm = nn.BatchNorm2d(3)
    recalibrate(norm, images(4, 4, 4))
    assert norm.num_batches_tracked.item() == 3
    recalibrate(norm, images(4))
    assert norm.num_batches_tracked.item() == 3


def test_intervals_cover_the_truth_as_often_as_they_say():
    channels, samples = 2000, 400
    norm = nn.BatchNorm2d(channels)
    level = 2 * torch.randn(samples, channels, 1, 1)  # values of one image go together
    record = recalibrate(norm, (1 + level + torch.randn(samples, channels, 2, 2)).split([1, 199, 200]))
    intervals = record.intervals[""]
    mean_covered = ((intervals.mean_low <= 1) & (intervals.mean_high >= 1)).double().mean().item()
    variance_covered = ((intervals.variance_low <= 5) & (intervals.variance_high >= 5)).double().mean().item()
    assert 0.93 <= mean_covered <= 0.97
    assert 0.93 <= variance_covered <= 0.97


def test_poisoned_statistics_are_cured():
    norm = nn.BatchNorm1d(2)
    norm.running_var.fill_(float("nan"))
    norm.running_mean.fill_(float("inf"))
    record = recalibrate(norm, torch.randn(32, 2))
    assert record.largest_change == float("inf")
    assert torch.isfinite(norm.eval()(torch.randn(4, 2))).all()


def test_aggregate_average_is_the_papers_plain_average_of_batches():
    generator = torch.Generator().manual_seed(6)
    batches = [
        torch.randn(size, 3, generator=generator, dtype=torch.float64) + 5 * place
        for place, size in enumerate((4, 9, 2))
    ]
    expected = averaged_statistics([batch.numpy() for batch in batches])
    for unbiased in (True, False):
        norm = normkit.BatchNorm1d(3, unbiased=unbiased).double()
        record = normkit.recalibrate(norm, batches, aggregate="average")
        assert record.batches == 3
        assert_close(norm.running_mean, torch.from_numpy(expected.mean), dtype=torch.float64)
        wanted = averaged_statistics([batch.numpy() for batch in batches], unbiased=unbiased)
        assert_close(norm.running_var, torch.from_numpy(wanted.var), dtype=torch.float64)
    pooled = normkit.BatchNorm1d(3).double()
    normkit.recalibrate(pooled, batches)
    assert bool((pooled.running_var > 2 * norm.running_var).all()), "the spread between batches is what it leaves out"
    with pytest.raises(ArgumentError, match="aggregate is 'mean'"):
        normkit.recalibrate(pooled, batches, aggregate="mean")
    with pytest.raises(SurgeryError, match=r'one value in a channel.*aggregate="pooled"'):
        normkit.recalibrate(pooled, [*batches, torch.ones(1, 3).double()], aggregate="average", layerwise=True)


def test_averages_of_several_processes_are_those_of_all_batches():
    batches = [torch.randn(size, 2) + size for size in (3, 8, 5, 4)]
    whole, first, second = AveragedMoments(2), AveragedMoments(2), AveragedMoments(2)
    for place, batch in enumerate(batches):
        whole.add(batch)
        (first if place == 0 else second).add(batch)
    first.pool(second)
    assert first.count == whole.count
    assert_close(first.mean, whole.mean, dtype=torch.float64)
    for unbiased in (True, False):
        assert_close(first.variance(unbiased=unbiased), whole.variance(unbiased=unbiased), dtype=torch.float64)
    assert_close(first.intervals().variance_low, whole.intervals().variance_low, dtype=torch.float64)


@pytest.mark.parametrize("samples", [-1, 0, "a", 2.5, True])
def test_a_number_of_samples_that_is_none_is_refused(samples):
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    before = fingerprint(norm)
    with pytest.raises(ArgumentError, match=r"samples=.*; a number of samples of at least 1, or None for all"):
        recalibrate(norm, [x] * 3, samples=samples)
    assert fingerprint(norm) == before
