"""The layers beside batch normalization: accuracy, what they refuse, and that a refusal changes nothing."""

import numpy as np
import pytest
import torch
from torch import nn

import normkit
from normkit import reference
from normkit.errors import ArgumentError, DtypeError, ShapeError
from normkit.layers.catalog import METHODS, create
from tolerances import FORWARD_ULP, assert_close


def ulps(y: torch.Tensor, expected: np.ndarray) -> float:
    """The largest error of a float32 result, in units in the last place of max(1, |y|)."""
    unit = np.spacing(np.maximum(1, np.abs(expected)).astype(np.float32)).astype(np.float64)
    return float((np.abs(y.detach().double().numpy() - expected) / unit).max())


BY_REFERENCE = {
    "layer": lambda x: reference.layer_norm(x, x.shape[1:]).output,
    "group": lambda x: reference.group_norm(x, 3).output,
    "instance": lambda x: reference.instance_norm(x).output,
}
LAYERS = {
    "layer": lambda: normkit.LayerNorm((6, 5, 7)),
    "group": lambda: normkit.GroupNorm(3, 6),
    "instance": lambda: normkit.InstanceNorm2d(6),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("name", LAYERS)
def test_output_is_within_four_ulp_of_the_reference_at_a_large_mean(name, mean, memory_format):
    x = (torch.randn(4, 6, 5, 7) + mean).to(memory_format=memory_format)
    assert ulps(LAYERS[name]()(x), BY_REFERENCE[name](x)) <= FORWARD_ULP


@pytest.mark.parametrize("value", [7.0, 0.1, 1e10, -1e30])
@pytest.mark.parametrize("name", LAYERS)
def test_constant_input_gives_the_bias_exactly(name, value):
    assert not LAYERS[name]()(torch.full((4, 6, 5, 7), value)).any()


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e-20, 1e-38])
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_extreme_values_stay_finite(name, scale):
    layer = normkit.LayerNorm(7, eps=0.0) if name == "layer" else normkit.RMSNorm(7, eps=0.0)
    x = torch.randn(3, 7) * scale
    x64 = x.double().numpy()
    expected = (
        reference.layer_norm(x64, 7, eps=0.0) if name == "layer" else reference.rms_norm(x64, 7, eps=0.0)
    ).output
    assert ulps(layer(x), expected) <= FORWARD_ULP


def test_half_precision_subnormals_normalize_to_one():
    x = torch.tensor([[[6e-8, -6e-8]]], dtype=torch.float16)
    assert normkit.InstanceNorm1d(1, eps=0.0)(x).flatten().tolist() == [1.0, -1.0]


def test_one_nan_stays_in_its_own_statistics():
    x = torch.randn(2, 4, 3)
    x[0, 0, 0] = float("nan")
    assert normkit.GroupNorm(2, 4)(x).isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[0, 0], [0, 1]]
    assert normkit.InstanceNorm1d(4)(x).isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[0, 0]]


AT_CONSTRUCTION = [
    (lambda: normkit.GroupNorm(4, 6), "6 channels go into 1, 2, 3, 6 groups"),
    (lambda: normkit.GroupNorm(0, 6), "num_groups must be an integer of at least 1, got 0"),
    (lambda: normkit.GroupNorm(2.0, 6), "num_groups must be an integer"),
    (lambda: normkit.GroupNorm(1, 0), "num_channels must be an integer of at least 1"),
    (lambda: normkit.GroupNorm(2, 6, eps=-1.0), "eps must be finite and non-negative, got -1.0"),
    (lambda: normkit.LayerNorm(5, eps=float("nan")), "eps must be finite"),
    (lambda: normkit.LayerNorm(0), "sizes of at least 1, got 0"),
    (lambda: normkit.LayerNorm(()), "sizes of at least 1"),
    (lambda: normkit.LayerNorm((3, 2.5)), "must hold integers"),
    (lambda: normkit.LayerNorm("5"), "must hold integers"),
    (lambda: normkit.RMSNorm(5, eps=-1e-5), "eps must be finite"),
    (lambda: normkit.RMSNorm(-5), "sizes of at least 1"),
    (lambda: normkit.InstanceNorm1d(0), "num_features must be at least 1"),
    (lambda: normkit.InstanceNorm2d(3, momentum=1.5), "momentum must be from 0 to 1"),
    (lambda: normkit.InstanceNorm3d(3, eps="a"), "eps must be a number"),
    (lambda: normkit.LocalResponseNorm(0), "size must be at least 1"),
    (lambda: normkit.LocalResponseNorm(2.5), "size must be an integer"),
    (lambda: normkit.LocalResponseNorm(5, alpha=-1.0), "alpha must be at least 0"),
    (lambda: normkit.LocalResponseNorm(5, k=0.0), "k must be positive"),
]


@pytest.mark.parametrize(("build", "words"), AT_CONSTRUCTION)
def test_bad_setting_is_refused_at_construction(build, words):
    with pytest.raises(ArgumentError, match=words):
        build()


IN_FORWARD = [
    (lambda: normkit.GroupNorm(3, 6), torch.zeros(4, 5, 2), ShapeError, r"expected 6 channels in dimension 1, got 5"),
    (lambda: normkit.GroupNorm(3, 6), torch.zeros(6), ShapeError, "at least 2 dimensions"),
    (lambda: normkit.GroupNorm(3, 3), torch.zeros(4, 3), ShapeError, "every group is one value"),
    (lambda: normkit.GroupNorm(3, 6), torch.zeros(4, 6, dtype=torch.int32), DtypeError, "floating point"),
    (lambda: normkit.GroupNorm(3, 6), None, DtypeError, "must be a tensor, got NoneType"),
    (lambda: normkit.GroupNorm(3, 6), torch.zeros(4, 6).double(), DtypeError, "mixed dtype"),
    (lambda: normkit.LayerNorm(6), torch.zeros(4, 5), ShapeError, r"pass normalized_shape=\[5\]"),
    (lambda: normkit.LayerNorm((2, 6)), torch.zeros(6), ShapeError, "expected input with shape"),
    (lambda: normkit.LayerNorm(6), np.zeros((4, 6)), DtypeError, "got ndarray"),
    (lambda: normkit.RMSNorm(6), torch.zeros(4, 5), ShapeError, r"pass normalized_shape=\[5\]"),
    (lambda: normkit.RMSNorm(6), torch.zeros(4, 6, dtype=torch.complex64), DtypeError, "complex"),
    (lambda: normkit.InstanceNorm1d(3), torch.zeros(4, 5, 7), ShapeError, "expected 3 channels"),
    (lambda: normkit.InstanceNorm1d(3), torch.zeros(4, 3, 1), ShapeError, "more than 1 spatial element"),
    (lambda: normkit.InstanceNorm2d(3), torch.zeros(4, 3), ShapeError, "expected 3D or 4D input"),
    (lambda: normkit.InstanceNorm2d(3), torch.zeros(4, 3, 2, 2, 2), ShapeError, "expected 3D or 4D input"),
    (lambda: normkit.LocalResponseNorm(3), torch.zeros(4, 3), ShapeError, "3D or higher"),
]


@pytest.mark.parametrize(("build", "x", "error", "words"), IN_FORWARD)
def test_bad_forward_is_refused_and_names_the_layer(build, x, error, words):
    layer = build()
    with pytest.raises(error, match=words) as caught:
        layer(x)
    assert str(caught.value).startswith(f"{type(layer).__name__}(")


@pytest.mark.parametrize(
    "x", [torch.zeros(4, 5, 7), torch.zeros(4, 3, 1), torch.zeros(4, 3, 7).double(), torch.zeros(4, 3, 7).int()]
)
def test_failed_forward_leaves_running_statistics_alone(x):
    layer = normkit.InstanceNorm1d(3, track_running_stats=True, affine=True)
    layer(torch.randn(4, 3, 7))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises((ShapeError, DtypeError)):
        layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_every_row_of_the_catalog_runs_on_its_samples(row):
    for shape in row.samples:
        if len(shape) - 2 not in row.layers:
            continue
        layer = create(row.name, shape[1], len(shape) - 2)
        assert type(layer) is row.layers[len(shape) - 2]
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == x.shape
        assert y.isfinite().all()
        (dx,) = torch.autograd.grad(y, x, torch.randn(shape))
        assert dx.isfinite().all()


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_every_row_of_the_catalog_has_a_function_and_a_reference(row):
    assert callable(getattr(normkit.functional, row.stem))
    assert callable(getattr(reference, row.stem))


def test_unknown_dimensions_are_refused():
    with pytest.raises(ArgumentError, match="no layer for 2 spatial dimensions; allowed are 0"):
        create("rms", 6, 2)
    assert isinstance(create("layer", 6, 2), nn.GroupNorm)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrized(layer: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())


def with_an_attribute(layer: nn.Module) -> None:
    weight = 2 * layer.weight.detach()
    del layer.weight
    layer.weight = weight


def with_a_property(layer: nn.Module) -> None:
    layer.__class__ = type("Doubled", (type(layer),), {"weight": property(lambda self: self._parameters["weight"] * 2)})


@pytest.mark.parametrize("change", [parametrized, with_an_attribute, with_a_property])
@pytest.mark.parametrize(
    "build", [lambda: normkit.LayerNorm(6), lambda: normkit.GroupNorm(2, 6)], ids=["layer", "group"]
)
def test_a_weight_that_is_no_plain_parameter_is_the_one_that_counts(build, change):
    x, layer = torch.randn(4, 6), build()
    expected = 2 * layer(x)
    change(layer)
    assert_close(layer(x), expected, dtype=torch.float32)


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_refuses_another_number_of_channels_with_a_weight_and_without(affine):
    layer = normkit.GroupNorm(2, 6, affine=affine)
    with pytest.raises(ShapeError, match="expected 6 channels in dimension 1, got 4"):
        layer(torch.randn(3, 4))


class Seen(torch.overrides.TorchFunctionMode):
    """Notes every function that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[object] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("build", "function"),
    [(lambda: normkit.LayerNorm(6), "layer_norm"), (lambda: normkit.GroupNorm(2, 6), "group_norm")],
    ids=["layer", "group"],
)
def test_a_mode_of_torchs_functions_sees_the_call(build, function):
    layer, x = build(), torch.randn(4, 6)
    layer(x)
    with Seen() as seen:
        layer(x)
    assert getattr(normkit.functional, function) in seen.functions
