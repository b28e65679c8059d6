"""What is special to single layers of the family: weights, schedules, styles, masks, and settings that are refused."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import normkit
from normkit import functional, reference
from normkit.errors import ArgumentError, DtypeError, ShapeError
from normkit.layers.catalog import METHODS, METHODS_OF_WEIGHTS
from tolerances import assert_close


@pytest.mark.parametrize("row", METHODS_OF_WEIGHTS, ids=lambda row: row.name)
def test_every_row_of_weights_has_function_reference_and_parametrization(row):
    assert callable(getattr(functional, row.stem))
    assert callable(getattr(reference, f"{row.stem}_backward"))
    assert row.parametrization.__name__ in normkit.__all__
    for shape in row.samples:
        layer = nn.Linear(1, 1).double()
        layer.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        row.parametrization.register(layer)
        twin = copy.deepcopy(layer)
        twin.load_state_dict(layer.state_dict())
        assert layer.weight.shape == shape
        assert torch.equal(twin.weight, layer.weight)
        (gradient,) = torch.autograd.grad((layer.weight * torch.randn(shape)).sum(), list(layer.parameters())[-1:])
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_exchanges_its_state_with_torch(dim):
    ours, theirs = (nn.Conv1d(3, 4, 5) for _ in range(2))
    before = ours.weight.detach().clone()
    normkit.WeightNorm.register(ours, dim=dim)
    assert_close(ours.weight.detach(), before, dtype=torch.float32)
    parametrizations.weight_norm(theirs, dim=dim)
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(2, 3, 9)
    assert_close(ours(x).detach(), theirs(x).detach(), dtype=torch.float32)
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    parametrize.remove_parametrizations(ours, "weight")
    assert_close(ours.weight.detach(), before, dtype=torch.float32)


def test_weights_that_cannot_be_normalized_are_refused():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0] = 0
    with pytest.raises(ArgumentError, match="is zero and has no direction"):
        normkit.WeightNorm.register(layer)
    with pytest.raises(ArgumentError, match="Linear has no tensor 'kernel'; its parameters are: weight, bias"):
        normkit.WeightStandardization.register(layer, "kernel")
    with pytest.raises(ShapeError, match="one value per output"):
        functional.weight_standardization(torch.ones(3, 1))
    with pytest.raises(ShapeError, match=r"pass \(3, 1\)"):
        functional.weight_norm(torch.ones(3, 2), torch.ones(3))


def test_renorm_follows_its_schedule_and_starts_as_batch_norm():
    layer = normkit.BatchRenorm1d(2, schedule=lambda step: (1.0, 0.0) if step < 2 else (3.0, 5.0))
    plain = normkit.BatchNorm1d(2)
    for step in range(3):
        x = torch.randn(8, 2) * 4 + 3
        found, expected = layer(x), plain(x)
        assert torch.allclose(found, expected, atol=1e-5) == (step < 2)
    assert_close(layer.running_var, plain.running_var, dtype=torch.float32)
    assert str(plain.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_style_is_kept_and_saved():
    layer, content, style = normkit.AdaptiveInstanceNorm(3), torch.randn(2, 3, 8, 8), torch.randn(1, 3, 5, 5) * 3 + 2
    layer.set_style(style)
    assert_close(layer(content), layer(content, style.expand(2, 3, 5, 5)), dtype=torch.float32)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = normkit.AdaptiveInstanceNorm(3)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(content), layer(content))
    with pytest.raises(ShapeError, match="one style is kept, got 2"):
        layer.set_style(style.expand(2, 3, 5, 5))
    with pytest.raises(ShapeError, match="must agree in samples and channels"):
        layer(content, style)


@pytest.mark.parametrize("samples", [1, 4, 7, 9])
def test_ghost_norm_takes_any_batch(samples):
    layer = normkit.GhostBatchNorm2d(3, ghost_size=4)
    layer(torch.randn(samples, 3, 5, 5))
    assert layer.num_batches_tracked == 1


def test_ghost_norm_refuses_parts_of_one_value_with_nothing_changed():
    layer = normkit.GhostBatchNorm1d(3, ghost_size=1)
    with pytest.raises(ShapeError, match="a part has one value per channel"):
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()


BAD_MASKS = [
    (torch.ones(4, 5), DtypeError, r"pass mask\.bool\(\)"),
    (torch.ones(4, 3, 5).bool(), ShapeError, r"pass \(4, 5\)"),
    (torch.arange(20).reshape(4, 5) == 7, ShapeError, "1 valid position"),
]


@pytest.mark.parametrize(("mask", "error", "words"), BAD_MASKS)
def test_bad_mask_is_refused_with_nothing_changed(mask, error, words):
    layer = normkit.MaskedBatchNorm1d(3)
    with pytest.raises(error, match=words):
        layer(torch.randn(4, 3, 5), mask)
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()


def test_masked_norm_without_a_mask_is_batch_norm():
    x, ours, plain = torch.randn(4, 3, 5), normkit.MaskedBatchNorm1d(3), normkit.BatchNorm1d(3)
    assert_close(ours(x).detach(), plain(x).detach(), dtype=torch.float32)
    assert_close(ours.running_var, plain.running_var, dtype=torch.float32)


def test_whitening_of_single_channels_is_batch_norm():
    x = torch.randn(9, 4, 5)
    ours, plain = normkit.WhiteningBatchNorm1d(4, num_groups=4), normkit.BatchNorm1d(4)
    assert_close(ours(x).detach(), plain(x).detach(), dtype=torch.float32)
    assert_close(ours.running_covariance.flatten(), plain.running_var, dtype=torch.float32)


# torch's compiler makes an instance of the matrix root's autograd function, and warns of what it does.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
@pytest.mark.parametrize("training", [True, False])
def test_every_layer_compiles_into_one_graph(row, training):
    dimensions = min(max(row.layers), 2)
    layer = row.build(4, dimensions).train(training)
    twin, x = copy.deepcopy(layer), torch.randn(8, 4, *(5,) * dimensions)
    extra = {"adaptive": (x * 2,), "masked": (torch.arange(5) < torch.arange(1, 9)[:, None],)}.get(row.name, ())
    found = torch.compile(layer, backend="eager", fullgraph=True)(x, *extra)
    assert_close(found.detach(), twin(x, *extra).detach(), dtype=torch.float32)
    for name, value in twin.state_dict().items():
        assert_close(layer.state_dict()[name], value, dtype=torch.float32, what=name)


def test_a_schedule_is_followed_by_a_compiled_layer():
    layer = normkit.BatchRenorm1d(2, schedule=lambda step: (1.0, 0.0) if step < 2 else (3.0, 5.0))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager")
    for _ in range(4):
        x = torch.randn(8, 2) * 4 + 3
        assert_close(compiled(x).detach(), twin(x).detach(), dtype=torch.float32)


def test_relatives_are_left_alone_by_torchs_conversion():
    for layer in (normkit.GhostBatchNorm2d(3), normkit.BatchRenorm2d(3), normkit.WhiteningBatchNorm2d(3)):
        assert nn.SyncBatchNorm.convert_sync_batchnorm(layer) is layer


AT_CONSTRUCTION = [
    (lambda: normkit.GhostBatchNorm1d(3, ghost_size=0), "ghost_size must be an integer of at least 1"),
    (lambda: normkit.BatchRenorm1d(3, r_max=0.5), "r_max must be at least 1"),
    (lambda: normkit.BatchRenorm1d(3, d_max=-1.0), "d_max must be at least 0"),
    (lambda: normkit.BatchRenorm1d(3, schedule=3), "schedule must be a function"),
    (lambda: normkit.BatchRenorm1d(3, momentum=0.1, decay=0.9), "both given"),
    (lambda: normkit.MaskedBatchNorm1d(0), "num_features must be at least 1"),
    (lambda: normkit.WhiteningBatchNorm2d(6, num_groups=4), "6 channels go into 1, 2, 3, 6 groups"),
    (lambda: normkit.WhiteningBatchNorm2d(6, shrinkage=1.5), "shrinkage must be from 0 to 1"),
    (lambda: normkit.WhiteningBatchNorm2d(6, iterations=0), "iterations must be an integer of at least 1"),
    (lambda: normkit.WhiteningBatchNorm2d(6, eps=0.0), "eps must be positive"),
    (lambda: normkit.AdaptiveInstanceNorm(3, eps=-1.0), "eps must be finite"),
    (lambda: normkit.WeightStandardization(eps=-1.0), "eps must be finite"),
]


@pytest.mark.parametrize(("build", "words"), AT_CONSTRUCTION)
def test_bad_setting_is_refused_at_construction(build, words):
    with pytest.raises(ArgumentError, match=words):
        build()
