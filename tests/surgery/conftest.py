"""Tiny networks: a second thread costs more than it brings, and compiling kernels for them costs minutes."""

from collections.abc import Iterator

import pytest
import torch

import normkit


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    """Let our layers run in plain torch operations: what is judged here is the surgery, in layers of any kernel."""
    with normkit.use_backend("plain"):
        yield
