"""The plan holds every shape of every set, in every layout that is one, and nothing twice."""

import math
import re

import pytest

from normkit.bench.goals import TINY
from normkit.bench.shapes import CHAINS, SETS, WORKS, Row, Shape, plan
from normkit.errors import ArgumentError


def test_resnet50_has_its_53_layers():
    assert sum(shape.count for shape in SETS["resnet50"]) == 53
    assert sum(shape.count * shape.elements for shape in SETS["resnet50"]) == 355_647_488


def test_a_plane_spans_types_layouts_works_and_chains():
    rows = plan(["unet2d"])
    assert len(rows) == 5 * 2 * 2 * 3 * 3
    assert len({row.name for row in rows}) == len(rows)
    assert {row.work for row in rows} == set(WORKS)
    assert {row.chain for row in rows} == set(CHAINS)


def test_every_set_has_a_quick_row_in_every_kind_of_work():
    quick = plan(quick=True)
    assert {(row.set, row.work, row.chain) for row in quick} == {
        (name, work, chain) for name in SETS for work in WORKS for chain in CHAINS
    }
    assert max(row.shape.elements for row in quick) < 2_000_000
    assert {row.set for row in quick if row.dtype == "bfloat16"} == {"resnet50", "tiny"}
    assert {row.set for row in plan(dtypes=["bfloat16"], quick=True)} == set(SETS)


def test_tiny_shapes_are_tiny():
    assert max(shape.elements for shape in SETS["tiny"]) <= TINY
    assert {len(shape.sizes) for shape in SETS["tiny"]} == {2, 3, 4, 5}


def test_channels_last_is_left_out_where_it_is_contiguous_too():
    for sizes in ((32, 128), (16, 64, 100), (256, 2048, 1, 1), (8, 1, 5, 5)):
        assert Shape(sizes).layouts == ("contiguous",)
    assert Shape((2, 3, 4, 4, 4)).layouts == ("contiguous", "channels_last")
    assert Shape((2, 3, 4, 4), stored="sliced").layouts == ("sliced",)


def test_a_shape_for_evaluation_alone_is_not_trained():
    works = {row.work for row in plan(["edge"]) if row.shape.sizes == (1, 64, 56, 56)}
    assert works == {"eval"}


def test_choices_narrow_the_plan_and_are_taken_once():
    rows = plan(["mlp", "mlp"], ["float16"], ["contiguous"], ["forward"], ["bn", "bn+relu"])
    assert len(rows) == 7 * 2
    assert {(row.dtype, row.layout, row.work) for row in rows} == {("float16", "contiguous", "forward")}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((["resnet51"],), "--shapes: unknown 'resnet51'; did you mean 'resnet50'? Known are: resnet50"),
        ((None, ["int8"]), "--dtype: unknown 'int8'; known are: float32"),
        ((None, None, ["nhwc"]), "--layout: unknown 'nhwc'; known are: contiguous"),
        ((None, None, None, ["train"]), "--work: unknown 'train'; known are: eval"),
        ((None, None, None, None, ["relu"]), r"--chain: unknown 'relu'; did you mean 'bn+relu'? Known are: bn"),
        ((["mlp"], None, ["channels_last"]), "--shapes mlp has no shape for --layout channels_last"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(choices, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        plan(*choices)


@pytest.mark.parametrize(
    ("work", "chain", "moved"),
    [
        ("eval", "bn", 2),
        ("forward", "bn+relu", 2),
        ("forward", "bn+add+relu", 3),
        ("forward+backward", "bn", 5),
        ("forward+backward", "bn+add+relu", 7),
    ],
)
def test_bytes_count_what_must_be_moved(work, chain, moved):
    row = Row("lenet", Shape((2, 3, 5, 7)), "bfloat16", "contiguous", work, chain)
    assert row.tensors_moved == moved
    assert row.bytes_of_tensor == 2 * math.prod((2, 3, 5, 7))


def test_mobilenet_ends_in_relu6():
    assert {row.activation for row in plan(["mobilenetv2"], chains=["bn+relu"])} == {"relu6"}
    assert {row.activation for row in plan(["resnet50"])} == {None, "relu"}
