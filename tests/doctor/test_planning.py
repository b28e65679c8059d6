"""What is reckoned before a training, held against what a training shows."""

import copy
import json

import pytest
import torch
from torch import nn

import normkit
from normkit.anatomy import fingerprint
from normkit.errors import ArgumentError, ShapeError
from normkit.lab.data import load
from normkit.lab.networks import LeNet5
from normkit.lab.small_network import SmallResidual


def digits():
    """Images and labels in a random order: as they are kept, batches have all digits alike."""
    data, order = load("digits"), torch.randperm(1280, generator=torch.Generator().manual_seed(5))
    return data.train_images[order], data.train_labels[order]


def measured_gap(model, layer, x, size):
    """Distance of training from evaluation at one layer for the same input, root mean square, middle channel."""
    given = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: given.append(args[0].double()))
    model.train()
    with torch.no_grad():
        for batch in x.split(size):
            if len(batch) == size:
                model(batch)
    handle.remove()
    values = torch.stack(given).transpose(1, 2).flatten(3) if given[0].dim() > 2 else torch.stack(given).transpose(1, 2)
    values = values.flatten(2)  # (batches, C, values)
    rows = values.transpose(0, 1).flatten(1)
    population = (values - rows.mean(1)[:, None]) / rows.std(1)[:, None]
    own = (values - values.mean(2, keepdim=True)) / values.std(2, correction=0, keepdim=True)
    return (own - population).square().mean((0, 2)).sqrt().median().item()


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("build", [lambda: LeNet5("batch"), lambda: SmallResidual("batch")], ids=["lenet", "residual"])
def test_the_predicted_gap_is_the_measured_one_on_the_laboratorys_nets(build, size):
    torch.manual_seed(3)
    model, (x, labels) = build(), digits()
    # Weights that have learnt something.
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for batch, wished in zip(x.split(64), labels.split(64), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), wished).backward()
        optimizer.step()
    found = normkit.plan(model, x, size)
    for layer in found.layers:
        measured = measured_gap(copy.deepcopy(model), layer.name, x, size)
        assert 1 / 1.3 < layer.gap / measured < 1.3, (layer, measured)


def test_independent_values_have_the_errors_of_the_textbook():
    x = torch.randn(4096, 3, dtype=torch.float64)
    (layer,) = normkit.plan(nn.Sequential(nn.BatchNorm1d(3).double()), x, 32, samples=32 * 9 + 2).layers
    assert (layer.samples, layer.values, layer.last_values) == (32, 32, 2)
    assert layer.effective == pytest.approx(32, rel=0.1)
    assert layer.mean_error == pytest.approx(32**-0.5, rel=0.05)
    assert layer.var_error == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    assert layer.gap == pytest.approx((1.5 / 32) ** 0.5, rel=0.1)
    assert layer.samples_needed == pytest.approx(150, rel=0.1)


def test_values_of_one_sample_that_go_together_count_as_one():
    x = torch.randn(512, 3, 1, 1).expand(512, 3, 5, 5) + 0.01 * torch.randn(512, 3, 5, 5)
    (layer,) = normkit.plan(nn.Sequential(nn.BatchNorm2d(3)), x, 16).layers
    assert layer.values == 400
    assert layer.effective == pytest.approx(16, rel=0.2)


def test_the_remainder_that_would_raise_is_found_before_it_does():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    x = torch.randn(65, 4)
    found = normkit.plan(model, x, 16, samples=65)
    assert "leaves 1 value per channel at 1: training raises an error; drop_last=True" in found.advice[0]
    with pytest.raises((ShapeError, ValueError)):
        [model(batch) for batch in x.split(16)]
    assert "leaves 2 values" in normkit.plan(model, x, 16, samples=66).advice[0]
    assert not any("leaves" in line for line in normkit.plan(model, x, 16, samples=64).advice)


def test_advice_is_the_most_faithful_that_reaches_the_gap():
    x, torch_model = torch.randn(2048, 4), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def advice(batch, gap=0.25, model=torch_model, **shares):
        return normkit.plan(model, x, batch, gap=gap, **shares)

    found = advice(64, ranks=8)
    assert found.layers[0].samples == 8
    assert found.group == 4
    assert 'to="sync") over groups of 4 ranks' in found.advice[0]
    assert 'kind="exact") over the 8 micro-batches' in advice(64, micro_batches=8).advice[0]
    both = advice(64, ranks=4, micro_batches=4).advice[0]
    assert 'to="sync" and kind="exact" together' in both
    assert "convert(model, to=\"group\", where=['1'])" in advice(4).advice[0]
    large = advice(512)
    assert "every layer has data enough" in large.advice or "momentum" in large.advice[0]
    synced = advice(64, ranks=8, model=normkit.convert(copy.deepcopy(torch_model), to="sync").model)
    assert synced.layers[0].samples == 64
    ghost = nn.Sequential(nn.Linear(4, 3), normkit.GhostBatchNorm1d(3, ghost_size=10))
    assert advice(64, model=ghost).layers[0].samples == 9


def test_the_model_is_bit_for_bit_as_before_and_bad_input_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    x = torch.randn(64, 4)
    before = fingerprint(model)
    found = normkit.plan(model, x, 8)
    assert fingerprint(model) == before
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["name"] == "1"
    assert "effective" in str(found)
    for given, match in (
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"batch_size": None}, "batch_size must be an integer of at least 1, got None"),
        ({"batch_size": 8, "ranks": None}, "ranks must be an integer of at least 1, got None"),
        ({"batch_size": 8, "ranks": 3}, "not shared evenly by 3 ranks with 1 micro-batches each; 6 is"),
        ({"batch_size": 8, "gap": 0}, "gap must be above 0"),
        ({"batch_size": 8, "samples": 2.5}, "samples must be an integer"),
    ):
        with pytest.raises(ArgumentError, match=match):
            normkit.plan(model, torch.randn(64, 4), **given)
    with pytest.raises(ArgumentError, match="no layer that normalizes with the batch"):
        normkit.plan(nn.Linear(4, 3), torch.randn(64, 4), 8)


def test_values_that_are_not_finite_are_named():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(64, 4)
    with pytest.raises(ArgumentError, match="1 is given NaN or infinite values in every batch of the example"):
        normkit.plan(model, x * torch.nan, 8)
    x[3] = torch.inf
    found = normkit.plan(model, x, 8)
    assert found.advice[-1] == "1 were given NaN or infinite values, in batches that are left out here, 1 of them at 1"
    assert 0 < found.layers[0].gap < 1


def test_an_example_that_is_too_small_is_told_and_its_values_count_as_independent():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    for count, word in ((1, "1 sample,"), (8, "8 samples,")):
        found = normkit.plan(model, torch.randn(count, 4), 64)
        assert found.layers[0].gap == pytest.approx((1 / 64 + 2 / 63 / 4) ** 0.5)
        assert found.layers[0].effective is None
        assert f"the example holds {word} too few to tell how far values go together" in found.advice[-1]
        assert "give 32 or more" in found.advice[-1]
    assert "too few to tell" not in normkit.plan(model, torch.randn(64, 4), 32).advice[-1]
    for empty in (torch.randn(0, 4), [], torch.tensor(1.0)):
        with pytest.raises(ArgumentError, match="plan: the example holds no samples"):
            normkit.plan(model, empty, 64)
    for wrong in ("0.1", None, True):
        with pytest.raises(ArgumentError, match=f"gap must be a number of deviations, got {type(wrong).__name__}"):
            normkit.plan(model, torch.randn(64, 4), 8, gap=wrong)


def test_the_doctor_and_the_plan_reckon_alike_and_neither_counts_more_than_there_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(160, 3, 8, 8)
    found = normkit.plan(model, x, 4, gap=0.2)
    findings = normkit.diagnose(model.train(), list(x.split(4))).of("effective-n")
    assert [layer.name for layer in found.layers] == [finding.layer for finding in findings] == ["1", "4"]
    for layer, finding in zip(found.layers, findings, strict=True):
        assert layer.effective == pytest.approx(finding.evidence["effective_values"])
        assert layer.effective <= layer.values
    uniform = torch.rand(4096, 3).round()  # of which the variance hardly varies
    assert normkit.plan(nn.BatchNorm1d(3), uniform, 32).layers[0].effective == 32
    # The doctor warns below 8 samples whatever the gap is, and so the plan says it too.
    said = next(line for line in found.advice if "Wu and He 2018" in line)
    assert said.startswith("1, 4: 4 samples share a statistic; the gap keeps to 0.2")
    assert "a batch of 8 or more; or normkit.convert(model, to=\"group\", where=['1', '4'])" in said
    assert not any("Wu and He" in line for line in normkit.plan(model, x, 8).advice)


def test_many_layers_are_a_line_for_each_cause():
    blocks = [part for _ in range(9) for part in (nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.Softplus())]
    single = [nn.AdaptiveAvgPool1d(1), nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)]
    found = normkit.plan(nn.Sequential(*blocks, *single), torch.randn(64, 3, 4), 2, gap=0.01)
    lines = [line for line in found.advice if "a batch of" in line]
    assert lines[0].startswith("1, 4, 7, 10 and 5 more: too few independent values; a batch of ")
    assert "where=[layer.name for layer in found.layers if layer.samples_needed > 2]" in lines[0]
    assert lines[1].startswith("29: two values have outputs of +1 and -1 alone; a batch of ")
    assert max(map(len, found.advice)) < 300


def test_a_larger_batch_is_one_of_all_ranks_and_micro_batches():
    model, x = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(512, 3)
    alone = normkit.plan(model, x, 8).layers[0].samples_needed
    shared = normkit.plan(model, x, 32, ranks=2, micro_batches=2)
    assert shared.layers[0].samples == 8
    assert f"a batch of {4 * shared.layers[0].samples_needed} or more" in shared.advice[0]
    assert alone == shared.layers[0].samples_needed


def test_one_value_has_no_variance_and_the_plan_says_so():
    x = torch.randn(256, 3)
    found = normkit.plan(nn.BatchNorm1d(3), x, 1)
    assert found.layers[0].var_error is None
    assert str(found).splitlines()[2].split("100%")[1].split("1.00")[0].strip() == "no variance"
    # As many as by independent values: 1 / n + 1 / 2n is to be 0.01.
    assert found.layers[0].samples_needed == pytest.approx(150, rel=0.15)
    assert "one value has no variance, and training raises an error; a batch of" in found.advice[0]
    assert not any("momentum" in line for line in found.advice)


def test_a_ghost_layer_is_told_its_ghost_size_and_its_parts_are_then_large_enough():
    def reckoned(size, batch, **shares):
        return normkit.plan(
            normkit.GhostBatchNorm1d(3, ghost_size=size), torch.randn(2048, 3), batch, gap=0.2, **shares
        )

    told = reckoned(4, 256, ranks=2).advice[0]
    assert "its ghost_size=4 sets the limit, and not the batch: ghost_size=" in told
    size = int(told.split("ghost_size=")[2].split()[0])
    assert reckoned(size, 256, ranks=2).layers[0].advice == ""
    told = reckoned(4, 16).advice[0]
    size, batch = int(told.split("ghost_size=")[2].split()[0]), int(told.split("a batch of ")[1])
    assert reckoned(size, batch).layers[0].samples == size
