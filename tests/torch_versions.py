"""What differs between the versions of torch that the tests are run with."""

import pytest
import torch
from torch.torch_version import TorchVersion

__all__ = [
    "GROUP_NORM_ERRORS",
    "GROUP_NORM_REFERENCES",
    "GROUP_NORM_REFUSES_NO_POSITIONS",
    "GROUP_NORM_SAMPLES",
    "NO_POSITIONS",
    "uses_torchscript",
]

_SINCE_2_14 = TorchVersion(torch.__version__) >= "2.14"

# torch.jit warns of itself, and torch's own gradcheck uses it: since 2.14 with another class of warning.
uses_torchscript = pytest.mark.filterwarnings(
    "ignore:.torch.jit..* is deprecated:DeprecationWarning", "ignore:.torch.jit..* is deprecated:FutureWarning"
)

# How many rows torch's own tables have for group norm; the other operators' have not changed.
GROUP_NORM_SAMPLES = 21 if _SINCE_2_14 else 17
GROUP_NORM_REFERENCES = 33 if _SINCE_2_14 else 29

# The rows of errors, and the words of the one that is torch's alone: since 2.14 it refuses what it took before.
GROUP_NORM_REFUSES_NO_POSITIONS = _SINCE_2_14
GROUP_NORM_ERRORS = 3 if _SINCE_2_14 else 2
NO_POSITIONS = "Expected HxW to be greater than 0"
