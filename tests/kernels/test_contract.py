"""The contract of docs/kernels.md is asserted of every launch in every test: here it is broken, and must be told."""

import pytest
import torch
from torch import Tensor

from kernel_contract import assert_readable
from normkit.functional import batch_norm, layer_norm
from normkit.kernels.numba.channels import passes as channel_passes
from normkit.kernels.numba.channels import plan
from normkit.kernels.numba.samples import passes as sample_passes


def freed() -> Tensor:
    x = torch.randn(3, 4)
    x.untyped_storage().resize_(0)
    return x


def sparse_strides() -> Tensor:
    return torch.randn(3, 8)[:, ::2]


ODD = {
    "negative view": lambda: torch._neg_view(torch.randn(3, 4)),
    "conjugate view": lambda: torch.randn(3, 4, dtype=torch.complex64).conj(),
    "ZeroTensor": lambda: torch._efficientzerotensor((3, 4)),
    "storage was freed": freed,
    "memory of meta": lambda: torch.randn(3, 4, device="meta"),
    "a FakeParameter": lambda: torch.randn(3, 4).as_subclass(type("FakeParameter", (Tensor,), {})),
    "handed strides": sparse_strides,
    "layout": lambda: torch.randn(3, 4).to_sparse(),
}


@pytest.mark.parametrize("said", ODD)
def test_tensor_that_a_kernel_cannot_read_is_told(said):
    x = ODD[said]()
    with pytest.raises(AssertionError, match=said):
        assert_readable(x, 0 if x.layout is not torch.strided or x._is_zerotensor() else x.data_ptr())


def test_strided_weight_is_told(monkeypatch):
    monkeypatch.setattr(channel_passes, "computed", lambda parameter, _: parameter)
    monkeypatch.setattr(sample_passes, "_parameter", lambda parameter, *_: parameter)
    weight = torch.randn(6, 2)[:, 0]
    with pytest.raises(AssertionError, match="handed strides"):
        batch_norm(torch.randn(4, 6), None, None, weight, None, True)
    with pytest.raises(AssertionError, match="handed strides"):
        layer_norm(torch.randn(4, 6), (6,), weight)


def test_statistics_that_lie_in_what_is_read_are_told(monkeypatch):
    monkeypatch.setattr(channel_passes, "check_apart", lambda *_: None)
    x, running = torch.randn(4, 6), torch.ones(12)
    for mean, var in ((x[0], running[:6]), (running[:6], x[0]), (running[:6], running[5:11])):
        with pytest.raises(AssertionError, match="share memory"):
            channel_passes.forward(x, "channels_last", None, None, mean, var, 0.1, 1e-5, True)


def test_output_that_lies_askew_over_the_input_is_told():
    room = torch.randn(25)
    x, out = room[:24].view(4, 6), room[1:].view(4, 6)
    with pytest.raises(AssertionError, match="share memory"):
        channel_passes.forward(x, "channels_last", None, None, None, None, 0.1, 1e-5, True, out=out)


def test_streamed_output_across_lines_of_the_cache_is_told(monkeypatch):
    monkeypatch.setattr(plan.Plan, "sizes_at", lambda self, _: self.sizes)
    room = torch.zeros((1 << 22) + 1)
    x = room[1:].view(16, 16, 128, 128)
    with torch.no_grad(), pytest.raises(AssertionError, match="streamed"):
        batch_norm(x, None, None, training=True, inplace=True)
