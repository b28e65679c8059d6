"""Nested tensors: what torch's layer takes ours takes, and the rest of the catalog refuses in words."""

import pytest
import torch
from torch import nn

import normkit
from normkit import functional
from normkit.errors import DtypeError, ShapeError
from normkit.layers.catalog import METHODS
from tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")

LAYOUTS = [torch.jagged, torch.strided]
LAYERS = {
    "layer": lambda library: library.LayerNorm(6),
    "layer, two dimensions": lambda library: library.LayerNorm((6, 4)),
    "layer without bias": lambda library: library.LayerNorm(6, bias=False),
    "layer without parameters": lambda library: library.LayerNorm(6, elementwise_affine=False),
    "rms": lambda library: library.RMSNorm(6),
    "rms, two dimensions": lambda library: library.RMSNorm((6, 4), eps=1e-3),
}
SHAPES = {"layer, two dimensions": (6, 4), "rms, two dimensions": (6, 4)}


def nested(parts, layout):
    return torch.nested.as_nested_tensor(parts, layout=layout)


def sample(*sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(size, requires_grad=True) for size in sizes]


def with_parameters(make):
    layer = make(normkit)
    for value in layer.parameters():
        nn.init.normal_(value)
    return layer


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_different_numbers_are_normalized_as_each_part_is(name, layout):
    layer, tail = with_parameters(LAYERS[name]), SHAPES.get(name, (6,))
    parts = sample((2, *tail), (5, *tail), (1, *tail))
    y = layer(nested(parts, layout))
    assert y.is_nested
    assert y.layout is layout
    dy = [torch.randn_like(part) for part in parts]
    leaves = [*parts, *layer.parameters()]
    found = torch.autograd.grad(list(y.unbind()), leaves, dy)
    expected_y = [layer(part) for part in parts]
    expected = torch.autograd.grad(expected_y, leaves, dy)
    for one, other in zip([*y.unbind(), *found], [*expected_y, *expected], strict=True):
        assert_close(one.detach(), other.detach(), dtype=torch.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_jagged_agrees_with_torch_and_can_be_added_to_its_input(name):
    ours, theirs = with_parameters(LAYERS[name]), LAYERS[name](nn)
    theirs.load_state_dict(ours.state_dict())
    tail = SHAPES.get(name, (6,))
    x = nested(sample((2, *tail), (5, *tail), (0, *tail)), torch.jagged)
    y = ours(x)
    assert_close(y.values().detach(), theirs(x).values().detach(), dtype=torch.float32)
    assert_close((x + y).values().detach(), (x.values() + y.values()).detach(), dtype=torch.float32)
    assert y.shape == x.shape


def test_jagged_dimension_behind_another_and_views_with_gaps():
    layer = normkit.LayerNorm(4)
    x = nested(sample((3, 2, 4), (3, 5, 4)), torch.jagged)
    other = torch.nested.nested_tensor_from_jagged(torch.randn(3, 7, 4), torch.tensor([0, 2, 7]), jagged_dim=2)
    gaps = torch.nested.nested_tensor_from_jagged(torch.randn(9, 4), torch.tensor([0, 4, 9]), torch.tensor([2, 5]))
    for given in (other, gaps):
        y = layer(given)
        for found, part in zip(y.unbind(), given.unbind(), strict=True):
            assert_close(found.detach(), layer(part).detach(), dtype=torch.float32)
    assert layer(x.transpose(1, 2).contiguous() if x._ragged_idx == 2 else x).is_nested


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_dimension_of_different_sizes_is_not_normalized_over(kind, layout):
    layer = {"layer": normkit.LayerNorm, "rms": normkit.RMSNorm}[kind]((6, 4))
    with pytest.raises(ShapeError, match="another size in every sample"):
        layer(nested(sample((6, 2), (6, 4)), layout))
    with pytest.raises(ShapeError, match=r"expected input with shape"):
        layer(nested(sample((2, 6, 5), (3, 6, 5)), layout))
    with pytest.raises(DtypeError, match="floating point"):
        layer(nested([torch.ones(n, 6, 4, dtype=torch.int64) for n in (1, 2)], layout))


def test_jagged_compiles():
    layer = normkit.RMSNorm(6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for sizes in (((2, 6), (5, 6)), ((1, 6), (4, 6), (3, 6))):
        x = nested([part.detach() for part in sample(*sizes)], torch.jagged)
        assert_close(compiled(x).values().detach(), layer(x).values().detach(), dtype=torch.float32)


CALLS = {
    "batch_norm": lambda x: functional.batch_norm(x, None, None, training=True),
    "residual": lambda x: functional.batch_norm(torch.randn(2, 3, 4), None, None, training=True, residual=x),
    "ghost_batch_norm": lambda x: functional.ghost_batch_norm(x, None, None, training=True, ghost_size=2),
    "batch_renorm": lambda x: functional.batch_renorm(x, torch.zeros(3), torch.ones(3), training=True),
    "masked_batch_norm": lambda x: functional.masked_batch_norm(x, torch.ones(2, 4) > 0, None, None, training=True),
    "whitening_batch_norm": lambda x: functional.whitening_batch_norm(x, None, None, training=True),
    "group_norm": lambda x: functional.group_norm(x, 3),
    "instance_norm": lambda x: functional.instance_norm(x),
    "adaptive_instance_norm": lambda x: functional.adaptive_instance_norm(x, torch.randn(2, 3, 4)),
    "style": lambda x: functional.adaptive_instance_norm(torch.randn(2, 3, 4), x),
    "local_response_norm": lambda x: functional.local_response_norm(x, 3),
    "weight_norm": lambda x: functional.weight_norm(x, torch.ones(2, 1, 1)),
    "weight_standardization": lambda x: functional.weight_standardization(x),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_functions_refuse_in_words(call, layout):
    for sizes in (((3, 4), (3, 2)), ((4, 3), (2, 3)), ((3, 4), (3, 4))):
        with pytest.raises(DtypeError, match=r"nested.*input\.unbind\(\)"):
            CALLS[call](nested(sample(*sizes), layout))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_layers_of_the_catalog_refuse_in_words_with_nothing_changed(row, layout, training):
    for dimensions in row.layers:
        if row.name in ("layer", "rms") and dimensions == 0:
            continue  # they take it: above
        layer = row.build(3, dimensions).train(training)
        kept = {name: value.clone() for name, value in layer.state_dict().items()}
        for tail in ((4,), (4, 5)):
            with pytest.raises(DtypeError, match="nested"):
                layer(nested(sample((3, 2, *tail[1:]), (3, *tail)), layout))
        assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())
