"""Batches of any form become calls of the model."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from normkit.anatomy import iterate, run, sample_count
from normkit.errors import ArgumentError

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0])
Pair = namedtuple("Pair", ["image", "label"])


class Single(nn.Module):
    def forward(self, image, scale=None):
        return image if scale is None else image * scale


class Double(nn.Module):
    def forward(self, image, mask):
        return image * mask


class Anything(nn.Module):
    def forward(self, **entries):
        return sorted(entries)


@pytest.mark.parametrize(
    "batch",
    [X, (X,), [X], (X, Y), [X, Y], ((X, Y), Y), [[X], Y], Pair(X, Y), {"image": X, "label": Y}, ({"image": X}, Y)],
)
def test_model_gets_the_input_of_any_form(batch):
    assert run(Single(), batch) is X
    assert sample_count(batch) == 3


def test_model_of_two_inputs_gets_both():
    expected = X * 2
    for batch in [
        (X, torch.tensor(2.0), Y),
        ((X, torch.tensor(2.0)), Y),
        {"mask": torch.tensor(2.0), "image": X, "y": Y},
    ]:
        assert torch.equal(run(Double(), batch), expected)


def test_dict_goes_whole_into_a_forward_of_keywords():
    assert run(Anything(), {"a": X, "b": Y}) == ["a", "b"]


def test_optional_arguments_are_taken_from_a_dict_by_name():
    assert torch.equal(run(Single(), {"image": X, "scale": 3.0}), X * 3)


def test_call_decides_when_given():
    assert run(Single(), {"picture": X}, call=lambda model, batch: model(batch["picture"])) is X


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        ({"picture": X, 3: Y}, "a dict with keys 'picture', 3"),
        ({}, r"\(none\)"),
        ("path.png", "a str"),
        ([], "a list of length 0"),
        (None, "a NoneType"),
        (([None, X], Y), "a NoneType"),
    ],
)
def test_batch_of_an_unknown_form_is_shown_and_call_asked_for(batch, shown):
    with pytest.raises(ArgumentError, match=shown) as caught:
        run(Single(), batch)
    assert "call=" in str(caught.value)
    assert "image" in str(caught.value)


def test_dict_without_a_required_argument_is_refused():
    with pytest.raises(ArgumentError, match=r"Double\.forward"):
        run(Double(), {"image": X})


def test_data_loader_and_generator_yield_their_batches():
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    assert [sample_count(batch) for batch in iterate(loader)] == [2, 1]
    assert [sample_count(batch) for batch in iterate(batch for batch in [X, (X, Y)])] == [3, 3]
    assert len(list(iterate({"image": X}))) == 1


@pytest.mark.parametrize("batches", [3, None, "folder", nn.ReLU()])
def test_what_holds_no_batches_is_refused(batches):
    with pytest.raises(ArgumentError, match="batches is a"):
        iterate(batches)


def test_sample_count_of_what_has_no_tensor_is_zero():
    assert sample_count(["a", "b"]) == 0
    assert sample_count(torch.tensor(3.0)) == 1
