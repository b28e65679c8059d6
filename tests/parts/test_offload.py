"""What autograd saves comes back from the file as it was: values, type and order in memory."""

import pytest
import torch

from normkit.parts.offload import _File, offloaded

MADE = {
    "contiguous": lambda: torch.randn(7, 31, 13, 11),
    "channels last": lambda: torch.randn(7, 31, 13, 11).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(300, 211).T,
    "a slice": lambda: torch.randn(9, 64, 32, 9)[:, ::2, 3:],
    "expanded": lambda: torch.randn(1, 31, 1).expand(99, 31, 17),
    "bfloat16": lambda: torch.randn(7, 31, 13, 23).bfloat16(),
    "float16": lambda: torch.randn(7, 31, 13, 23).half(),
    "float64": lambda: torch.randn(7, 31, 47, dtype=torch.float64),
    "indices": lambda: torch.randint(2**40, (101, 103)),
    "a mask": lambda: torch.rand(7, 97, 101) < 0.5,
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_tensor_comes_back_as_it_was(make, monkeypatch):
    written = []
    write = _File._write
    monkeypatch.setattr(_File, "_write", lambda self, x: written.append(x.shape) or write(self, x))
    x = make()
    with offloaded("disk", []):
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        packed = [hooks[0](x), hooks[0](x)]
        back = [hooks[1](one) for one in packed]
    assert len(written) == 1, "a tensor that two operations save is written once"
    assert packed[0] is packed[1]
    for value in back:
        assert torch.equal(value, x)
        assert value.dtype is x.dtype
        if x.is_contiguous(memory_format=torch.channels_last) and x.dim() == 4:
            assert value.stride() == x.stride()


def test_a_changed_tensor_is_another_and_small_ones_and_parameters_stay():
    weight, x = torch.nn.Parameter(torch.randn(300, 300)), torch.randn(300, 300)
    with offloaded("disk", [weight]):
        pack, unpack, *_ = torch._C._autograd._top_saved_tensors_default_hooks(True)
        first = pack(x)
        before = x.clone()
        x.add_(1)
        second = pack(x)
        assert torch.equal(unpack(first), before)
        assert torch.equal(unpack(second), x)
        assert pack(weight).data_ptr() == weight.data_ptr()
        assert pack(x[:3]).data_ptr() == x.data_ptr()


def test_freed_memory_is_given_back_as_bytes_are_moved(monkeypatch):
    given_back = []
    monkeypatch.setattr("normkit.parts.offload._malloc_trim", lambda: given_back.append)
    monkeypatch.setattr("normkit.parts.offload._EVERY", 1 << 20)
    x = torch.randn(512, 256)  # half a megabyte
    with offloaded("disk", []):
        pack, unpack, *_ = torch._C._autograd._top_saved_tensors_default_hooks(True)
        packed = [pack(x + place) for place in range(4)]
        assert len(given_back) == 2
        assert torch.equal(unpack(packed[3]), x + 3)
        unpack(packed[0])
    assert len(given_back) == 3
