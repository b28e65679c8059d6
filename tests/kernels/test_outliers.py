"""One value far from all others: where it stands must not matter, and the promise of the table holds."""

import numpy as np
import pytest
import torch

import normkit
from normkit.functional import batch_norm, group_norm, instance_norm, layer_norm, masked_batch_norm
from tolerances import FORWARD_ULP, FORWARD_ULP_FLOAT64

EPS = 1e-5


def masked(x: torch.Tensor) -> torch.Tensor:
    """Normalized among padding that is larger than everything, which takes no part."""
    padded = torch.full((x.shape[0] + 2, x.shape[1], x.shape[2] + 3), 1e30, dtype=x.dtype)
    mask = torch.zeros(len(padded), padded.shape[2], dtype=torch.bool)
    padded[1:-1, :, 1:-2], mask[1:-1, 1:-2] = x, True
    return masked_batch_norm(padded, mask, None, None, training=True, eps=EPS)[1:-1, :, 1:-2]


NORMS = {
    "batch, folded planes": ((64, 3, 5, 7), lambda x: batch_norm(x, None, None, training=True, eps=EPS)),
    "batch, large planes": ((3, 2, 47, 53), lambda x: batch_norm(x, None, None, training=True, eps=EPS)),
    "batch, many channels": ((64, 33, 5, 3), lambda x: batch_norm(x, None, None, training=True, eps=EPS)),
    "batch, features": ((2048, 3), lambda x: batch_norm(x, None, None, training=True, eps=EPS)),
    "masked": ((8, 5, 41), lambda x: masked(x)),
    "batch, few values": ((11, 5), lambda x: batch_norm(x, None, None, training=True, eps=EPS)),
    "layer": ((5, 4099), lambda x: layer_norm(x, (4099,), eps=EPS)),
    "group": ((2, 6, 31, 29), lambda x: group_norm(x, 2, eps=EPS)),
    "instance": ((2, 3, 31, 29), lambda x: instance_norm(x, eps=EPS)),
}


def grouped(name: str, x: torch.Tensor) -> torch.Tensor:
    """The same values, a row for each set that is averaged."""
    if name.startswith(("batch", "masked")):
        return x.movedim(1, 0).flatten(1)
    return (
        x.flatten(1)
        if name == "layer"
        else x.reshape(2, 2, -1).flatten(0, 1)
        if name == "group"
        else x.flatten(2).flatten(0, 1)
    )


@pytest.mark.parametrize("backend", ["numba", "plain"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_one_value_far_out_costs_no_digits_wherever_it_stands(name, dtype, memory_format, backend):
    shape, norm = NORMS[name]
    if memory_format is torch.channels_last and len(shape) != 4:
        pytest.skip("has no such layout")
    count = grouped(name, torch.zeros(shape)).shape[1]
    for place in (0, 1, count // 2, count - 1):
        for size in (30.0, 1e3, -3e5, 1e7):
            x = torch.randn(shape, dtype=dtype)
            rows = grouped(name, x)
            rows[:, place] = size  # a view of x, or what x is made from again
            if rows.data_ptr() != x.data_ptr():
                x = rows.unflatten(1, (shape[0], *shape[2:])).movedim(0, 1).contiguous()
            exact = grouped(name, x).numpy().astype(np.longdouble)
            distance = exact - exact.mean(1, keepdims=True)
            wanted = distance / np.sqrt((distance**2).mean(1, keepdims=True) + np.longdouble(EPS))
            with normkit.use_backend(backend):
                found = grouped(name, norm(x.contiguous(memory_format=memory_format))).numpy()
            ulps = np.abs(found - wanted) / np.maximum(1, np.abs(wanted)) / torch.finfo(dtype).eps
            allowed = FORWARD_ULP if dtype is torch.float32 else FORWARD_ULP_FLOAT64
            assert ulps.max() <= allowed, f"{size:g} at {place}: {ulps.max():.1f} ulp"
