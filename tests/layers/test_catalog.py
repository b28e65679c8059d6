"""The contract of every row of the catalog. A new method runs through it without a change here.

Nothing is asked for that a method need not have: layers are built by the row, and may have no parameters, no running
statistics and no channels to be told.
"""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit import functional, reference
from normkit.errors import ArgumentError, NormkitError
from normkit.layers import catalog
from tolerances import assert_close

DOCS = Path(__file__).parents[2] / "docs"

every_row = pytest.mark.parametrize("row", catalog.METHODS, ids=lambda row: row.name)
every_sample = pytest.mark.parametrize(
    ("row", "shape"),
    [(row, shape) for row in catalog.METHODS for shape in row.samples],
    ids=lambda value: value.name if isinstance(value, catalog.Method) else "x".join(map(str, value)),
)


def build(row: catalog.Method, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Module:
    return row.build(shape[1], len(shape) - 2).to(dtype)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_state(module: nn.Module, kept: dict[str, Tensor]) -> None:
    assert list(module.state_dict()) == list(kept)
    for name, value in module.state_dict().items():
        assert torch.equal(value, kept[name]), name


def test_names_differ():
    names = [row.name for row in catalog.METHODS]
    assert len(set(names)) == len(names) >= 1
    assert "batch" in names


@every_row
def test_row_says_what_the_method_is(row):
    assert re.fullmatch(r"[a-z][a-z0-9-]*", row.name), "a name that can be typed"
    assert row.title[0].isupper()
    assert row.shared
    assert re.search(r"\b(19|20)\d\d\b", row.paper), "the paper's year"
    assert row.layers
    assert {len(shape) - 2 for shape in row.samples} == set(row.layers), "a sample for every number of dimensions"


@every_row
def test_row_has_its_function_and_its_reference(row):
    function = getattr(functional, row.stem)
    assert row.stem in functional.__all__
    assert row.stem in reference.__all__
    assert f"{row.stem}_backward" in reference.__all__
    assert function.__doc__
    for judge in (getattr(reference, row.stem), getattr(reference, f"{row.stem}_backward")):
        assert judge.__doc__


@every_row
def test_layers_and_functions_are_twins(row):
    file = getattr(functional, row.stem).__module__.rsplit(".", 1)[-1]
    assert {layer.__module__ for layer in row.layers.values()} == {f"normkit.layers.{file}"}


@every_row
def test_layers_are_public_and_documented(row):
    for layer in row.layers.values():
        assert layer.__name__ in normkit.layers.__all__
        assert getattr(normkit, layer.__name__) is layer
        assert layer.__name__ in normkit.__all__
        assert layer.__doc__


@every_row
def test_docs_tell_of_the_method(row):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md")))
    assert row.stem in pages


@every_sample
def test_create_builds_the_rows_layer(row, shape):
    layer = catalog.create(row.name, shape[1], len(shape) - 2)
    assert type(layer) is row.layers[len(shape) - 2]
    assert repr(layer) == repr(row.build(shape[1], len(shape) - 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_sample
def test_output_has_the_inputs_shape_and_type(row, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    kept = x.clone()
    for training in (True, False):
        y = build(row, shape, dtype).train(training)(x)
        assert y.shape == x.shape
        assert y.dtype is dtype
        assert torch.isfinite(y).all()
    assert torch.equal(x, kept), "the input was written"


@every_sample
def test_gradients_of_a_random_cotangent_are_finite(row, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    layer = build(row, shape)
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every_row
def test_gradients_are_not_zero(row):
    for dimensions in row.layers:
        shape = max(
            (shape for shape in row.samples if len(shape) - 2 == dimensions), key=lambda s: torch.Size(s).numel()
        )
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        layer = build(row, shape)
        y = layer(x)
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
        assert [gradient.abs().max().item() > 1e-3 for gradient in gradients] == [True] * len(gradients)


@every_sample
def test_strides_do_not_matter(row, shape):
    x = torch.randn(shape, dtype=torch.float64)
    layer = build(row, shape)
    expected, kept = copy.deepcopy(layer)(x), None
    for other in (x.transpose(0, -1).contiguous().transpose(0, -1), torch.stack([x, x], -1)[..., 0]):
        assert torch.equal(x, other)
        twin = copy.deepcopy(layer)
        assert_close(twin(other), expected, dtype=torch.float64)
        kept = kept or state(twin)
        for name, value in twin.state_dict().items():
            assert_close(value, kept[name], dtype=torch.float64, what=name)


@every_sample
def test_evaluation_writes_nothing(row, shape):
    layer = build(row, shape)
    layer(torch.randn(shape, dtype=torch.float64))
    layer.eval()
    kept = state(layer)
    layer(torch.randn(shape, dtype=torch.float64))
    assert_same_state(layer, kept)


@every_sample
def test_state_dict_carries_all_that_prediction_needs(row, shape):
    x = torch.randn(shape, dtype=torch.float64)
    layer, twin = build(row, shape), build(row, shape)
    layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin.eval()(x), layer.eval()(x))
    assert_same_state(twin, state(layer))


@every_sample
def test_copy_computes_the_same_bits(row, shape):
    x = torch.randn(shape, dtype=torch.float32)
    layer = build(row, shape, torch.float32)
    twin = copy.deepcopy(layer)
    assert torch.equal(layer(x), twin(x))
    assert_same_state(twin, state(layer))


@every_sample
def test_empty_batch_passes_and_changes_nothing(row, shape):
    layer = build(row, shape)
    kept = state(layer)
    assert layer(torch.ones(0, *shape[1:], dtype=torch.float64)).shape == (0, *shape[1:])
    assert_same_state(layer, kept)


@pytest.mark.parametrize("bad", ["a number", "integers", "no tensor"])
@every_sample
def test_bad_input_is_refused_with_nothing_changed(row, shape, bad):
    layer = build(row, shape)
    kept = state(layer)
    value = {"a number": torch.tensor(1.0).double(), "integers": torch.ones(shape).long(), "no tensor": None}[bad]
    with pytest.raises(NormkitError):
        layer(value)
    assert_same_state(layer, kept)


def test_unknown_name_lists_the_known():
    with pytest.raises(ArgumentError, match="unknown normalization 'bach'") as caught:
        catalog.create("bach", 3)
    for row in catalog.METHODS:
        assert row.name in str(caught.value)


@every_row
def test_dimensions_without_a_layer_list_the_allowed(row):
    with pytest.raises(ArgumentError, match=row.title) as caught:
        catalog.create(row.name, 3, 9)
    assert ", ".join(map(str, sorted(row.layers))) in str(caught.value)
