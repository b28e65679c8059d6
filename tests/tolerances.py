"""The one table of tolerances. They follow from the type's rounding, and are never widened to make a test pass."""

import torch

# Units in the last place of max(1, |y|): what one result may lose. Promised for mean/std up to 1e4.
FORWARD_ULP = 4
# Of float64 itself, against exact numbers: sums, root and products each round, and no wider type takes them.
FORWARD_ULP_FLOAT64 = 8

# Relative to the largest magnitude of the compared tensor. Gradients sum over a channel, and the sums of a random
# cotangent cancel, so they get a few more roundings than the forward.
RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}

# Of a derivative in float64, by its order. Each order divides by the deviation once more, and the sums of a third
# derivative cancel: a digit for every order. A term that is lost, or wrong by a hundredth, is 10^7 times as much.
DERIVATIVE = {1: 1e-11, 2: 1e-10, 3: 1e-9}

# A central difference in float64 with step 1e-5 loses 1e-16 / 1e-5 of the loss to rounding and 1e-10 to truncation.
FINITE_DIFFERENCE = 1e-8


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, dtype: torch.dtype, what: str = "result") -> None:
    """Compare with the table's tolerance for this type; the expected tensor may be of a wider type.

    A NaN on either side fails: where one is expected, the test says so itself.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = max(1.0, expected.double().abs().max().item())
    allowed = RELATIVE[dtype] * scale
    assert difference <= allowed, f"{what}: off by {difference:.3g}, allowed {allowed:.3g}"
