"""What every test stands on: fixed seeds, and fresh memory full of NaN so that nothing unwritten passes as a result."""

import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

# The same examples every run, and no time limit: a busy machine fails no property.
settings.register_profile("normkit", deadline=None, derandomize=True)
settings.load_profile("normkit")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  hypothesis and scikit-learn read the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN: a kernel that leaves an element unwritten is seen."""
    algorithms, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(algorithms)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget what ``torch.compile`` compiled: it keeps at most eight versions of one function, over all tests."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
