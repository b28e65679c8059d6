"""Kernels compiled for other processors than this one: right numbers, or refused in words and served otherwise."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86")

PROGRAM = """
import sys, torch, normkit
from torch.nn import functional as F
from normkit.errors import BackendError
from normkit.functional import batch_norm, batch_steps, group_norm, instance_norm, layer_norm, rms_norm
dtype, served = getattr(torch, sys.argv[1]), sys.argv[2] == "served"
torch.manual_seed(0)
x, residual, dy = (torch.randn(4, 6, 5, 7).to(dtype) for _ in range(3))
judge = lambda t: F.batch_norm(t, None, None, training=True)
norms = {
    "batch": (lambda t: batch_norm(t, None, None, training=True), judge),
    "fused": (lambda t: batch_norm(t, None, None, training=True, residual=residual, activation="relu"),
              lambda t: (judge(t) + residual).relu()),
    "evaluation": (lambda t: batch_norm(t, torch.zeros(6), torch.ones(6)), lambda t: t / (1 + 1e-5) ** 0.5),
    "group": (lambda t: group_norm(t, 2), lambda t: F.group_norm(t, 2)),
    "instance": (instance_norm, F.instance_norm),
    "layer": (lambda t: layer_norm(t, (7,)), lambda t: F.layer_norm(t, (7,))),
    "rms": (lambda t: rms_norm(t, (7,), eps=1e-5), lambda t: F.rms_norm(t, (7,), eps=1e-5)),
}
if served:
    # Which kernel it is does not matter, and each takes seconds to compile.
    norms = {"batch": norms["batch"]}
found = normkit.explain(normkit.BatchNorm2d(6, affine=False), x), normkit.explain(normkit.GroupNorm(2, 6), x)
assert all((one.backend == "numba") == served for one in found), found
assert served or all("cannot convert float16" in one.refused["numba"] for one in found), found
for name, (ours, theirs) in norms.items():
    if not served:
        with normkit.use_backend("numba"):
            try:
                ours(x)
            except BackendError as error:
                assert "F16C" in str(error)
            else:
                raise AssertionError(f"{name} is not refused")
    leaves = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = ours(leaves[0]), theirs(leaves[1])
    gradients = torch.autograd.grad(y, leaves[0], dy)[0], torch.autograd.grad(expected, leaves[1], dy.double())[0]
    for value, of in ((y, expected), gradients):
        allowed = {torch.float32: 2e-6, torch.float16: 2**-10}[dtype] * max(1, of.abs().max().item())
        assert value.dtype is dtype and (value.double() - of).abs().max() <= allowed, name
mean, var = batch_steps.statistics(x)
assert (var - x.double().var((0, 2, 3), unbiased=False)).abs().max() < 1e-6
expected = judge(x.double())
with torch.no_grad():
    y = batch_norm(x, None, None, training=True, inplace=True)
assert y is x and (y.double() - expected).abs().max() < 2e-3
"""


@pytest.mark.parametrize(
    ("processor", "features", "element", "served"),
    [
        ("generic", "", "float16", False),  # neither AVX nor F16C
        ("sandybridge", "", "float16", False),  # AVX, and F16C is younger
        ("haswell", "-f16c", "float16", False),
        ("haswell", "", "float16", True),
        ("generic", "", "float32", True),  # no FMA: a function of the C library stands for it
    ],
)
def test_kernels_of_other_processors_are_right_or_refused(processor, features, element, served, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, element, "served" if served else "refused"],
        env={**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features,
             "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]


BITS = """
import hashlib, sys, torch, normkit
from normkit.kernels.numba import processor
processor.has_avx512 = lambda: sys.argv[1] == "AVX-512"
torch.manual_seed(0)
digest = hashlib.sha256()
for shape in [(4, 64, 9, 9), (3, 100, 7, 7), (2, 257, 20, 20), (5, 48, 14, 14), (2, 3, 5, 3), (4, 5, 1, 31)]:
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype).contiguous(memory_format=layout).requires_grad_()
            with normkit.use_backend("numba"):
                y = normkit.BatchNorm2d(shape[1], affine=False)(x)
            dx, = torch.autograd.grad(y, x, torch.randn(shape).to(dtype))
            for value in (y, dx):
                digest.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
from normkit.kernels.numba.channels import channels_last_backward
print(channels_last_backward.GATHERED, digest.hexdigest())
"""


def test_registers_and_masks_of_a_processor_change_no_bit(tmp_path):
    found = {}
    for instructions in ("AVX2", "AVX-512"):
        ended = subprocess.run(
            [sys.executable, "-c", BITS, instructions],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / instructions), "NORMKIT_NATIVE": "0"},
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        columns, digest = ended.stdout.split()
        found[int(columns)] = digest
    assert set(found) == {32, 64}
    assert found[32] == found[64]
