"""Masked layers in the place of batch norms: padding counts nowhere, and the mask reaches every layer."""

import copy

import pytest
import torch
from torch import nn

import normkit
from normkit.anatomy import fingerprint
from normkit.errors import ArgumentError, ShapeError, SurgeryError


def padded(count=64, positions=15):
    generator = torch.Generator().manual_seed(0)
    signals = 2 + torch.randn(count, 5, positions, generator=generator)
    lengths = torch.randint(3, positions + 1, (count,), generator=generator)
    mask = torch.arange(positions) < lengths[:, None]
    return signals * mask[:, None], mask


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(5), nn.Conv1d(5, 7, 3, padding=1), nn.BatchNorm1d(7), nn.ReLU())


def holds_data(signals):
    return (signals != 0).any(1)


def test_statistics_are_those_of_the_data_alone():
    signals, mask = padded()
    model = network()
    normkit.mask_padding(model, holds_data)
    normkit.recalibrate(model, signals.split(16))
    values = signals.double().transpose(1, 2)[mask]
    torch.testing.assert_close(model[0].running_mean.double(), values.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model[0].running_var.double(), values.var(0), rtol=1e-6, atol=1e-6)
    inner, given = copy.deepcopy(model), []
    inner[2].register_forward_pre_hook(lambda module, args: given.append(args))
    inner.eval()(signals)
    assert torch.equal(given[0][1], mask)  # the mask reaches the layer behind the convolution too


def test_output_at_the_data_hangs_on_no_padding_in_training():
    signals, _ = padded()
    model = normkit.mask_padding(nn.Sequential(nn.BatchNorm1d(5)), holds_data).model
    longer = nn.functional.pad(signals, (0, 9))
    plain, more = model(signals), model(longer)[:, :, :15]
    torch.testing.assert_close(plain, more, rtol=1e-5, atol=1e-5)
    counted = nn.BatchNorm1d(5, affine=False)
    assert float((counted(signals) - counted(longer)[:, :, :15]).abs().max()) > 0.1


def test_parameters_buffers_names_and_settings_stay():
    model = nn.Sequential(nn.BatchNorm1d(5, eps=1e-3, momentum=0.2), nn.BatchNorm1d(5, affine=False)).eval()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    normkit.mask_padding(model, holds_data)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert (model[0].eps, model[0].momentum, model[0].training, model[1].weight) == (1e-3, 0.2, False, None)


def test_copies_have_masks_of_their_own_and_a_mask_that_is_given_stands():
    signals, mask = padded()
    model = normkit.mask_padding(nn.Sequential(nn.BatchNorm1d(5)), holds_data).model
    twin = copy.deepcopy(model)
    other = signals.flip(0)
    expected = twin(other)
    model(signals)
    assert torch.equal(twin(other), expected)
    assert torch.equal(twin[0](signals, mask), model(signals))


def test_mask_may_ask_all_that_the_model_is_called_with():
    signals, mask = padded()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, signals, lengths=None):
            return self.norm(signals)

    model = normkit.mask_padding(Two(), lambda signals, lengths: torch.arange(15) < lengths[:, None]).model
    twin = nn.Sequential(normkit.MaskedBatchNorm1d(5))
    torch.testing.assert_close(model(signals, lengths=mask.sum(1)), twin[0](signals, mask))


def test_what_has_no_masked_form_is_refused_with_the_reason_and_nothing_is_changed():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    before = fingerprint(model)
    with pytest.raises(SurgeryError, match="a BatchNorm2d has no masked form"):
        normkit.mask_padding(model, holds_data)
    assert fingerprint(model) == before
    with pytest.raises(ArgumentError, match="give a function"):
        normkit.mask_padding(network(), torch.ones(3, 4))
    hooked = network()
    hooked[0].register_forward_hook(lambda *args: None)
    record = normkit.mask_padding(hooked, holds_data)
    assert record.touched == ("2",)
    assert "hooks" in record.refused["0"]
    frozen = network()
    normkit.recalibrate(frozen, padded()[0])
    normkit.freeze(frozen, where="0")
    assert "frozen" in normkit.mask_padding(frozen, holds_data, where=["0", "2"]).refused["0"]


def test_layer_of_another_length_is_named():
    signals, _ = padded()
    model = nn.Sequential(nn.Conv1d(5, 5, 3, stride=2), nn.BatchNorm1d(5))
    normkit.mask_padding(model, holds_data)
    with pytest.raises(ShapeError, match=r"1 \(MaskedBatchNorm1d\)|1 \(BatchNorm1d\)"):
        model(signals)
