"""What every test stands on: fixed seeds, and fresh memory full of NaN so that nothing unwritten passes as a result."""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator

# Read as torch is loaded, here and in the processes of tests: a thread that waits sleeps. By default it turns round and
# round, and where as many processes run tests as there are cores, each turns on another's core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from kernel_contract import assert_contract
from quick import parted

# What is read by type checkers, and what an installed package is asked: neither is for pytest.
collect_ignore = ["package_smoke.py", "user_types"]

# The same examples every run, and no time limit: a busy machine fails no property.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("normkit", unhurried, derandomize=True)
# What `make fuzz` runs: other examples each time, and many.
settings.register_profile("fuzz", unhurried, max_examples=2000, print_blob=True)
settings.load_profile("normkit")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make test` ask for the quick part."""
    parser.addoption("--quick", action="store_true", help="leave out what tests/quick.py says")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out of a quick run what is slow, and most of many cases."""
    if config.getoption("--quick"):
        items[:], left = parted(items)
        config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True, scope="session")
def interrupts_are_heard() -> Iterator[None]:
    """Hear Ctrl-C, here and in the processes of tests: a shell's background jobs are started deaf to it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


@pytest.fixture(autouse=True, scope="session")
def kernel_contract() -> Iterator[None]:
    """Assert of every launch of a CPU kernel what docs/kernels.md says that it may assume."""
    with pytest.MonkeyPatch.context() as patches:
        assert_contract(patches)
        yield


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget what ``torch.compile`` compiled: it keeps at most eight versions of one function, over all tests."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class KernelCalls(list[tuple[str, torch.dtype, str | None, bool]]):
    """The CPU kernels that calls have asked for: name, element type, activation, residual."""

    def names(self) -> set[str]:
        """Their names: layout, a point, and what they do."""
        return {name for name, *_ in self}

    def served(self, dtype: torch.dtype, *, backward: bool = False) -> bool:
        """Tell whether kernels of this type have run a forward, or a backward, since the list was last cleared."""
        steps = ("backward", "backward_partial") if backward else ("forward", "partial", "stored")
        return any(of is dtype and name.rpartition(".")[2] in steps for name, of, *_ in self)

    def dtypes(self) -> set[torch.dtype]:
        """Their element types."""
        return {dtype for _, dtype, *_ in self}


@pytest.fixture
def kernels_ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelCalls]:
    """Note every CPU kernel per channel that runs, by either path, so that a test can say what it has compared."""
    from normkit.kernels.native import calls as native
    from normkit.kernels.numba.channels import launch as channel_launch

    calls, kernel = KernelCalls(), channel_launch.kernel

    def note(name: str, dtype: torch.dtype, activation: str | None, residual: bool) -> None:
        if not name.startswith("samples."):
            calls.append((name, dtype, activation, residual))

    def noted(name: str, dtype: torch.dtype, activation: str | None, residual: bool) -> int:
        calls.append((name, dtype, activation, residual))
        return kernel(name, dtype, activation, residual)

    monkeypatch.setattr(channel_launch, "kernel", noted)
    native.watch(note)
    yield calls
    native.watch(None)


@pytest.fixture
def python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every call to the CPU kernels go through Python, as where the native part is not built."""
    from normkit.kernels import memory
    from normkit.kernels.native import calls as native

    native.unavailable()  # loads it, which must not happen later
    monkeypatch.setattr(memory, "_native", None)
    for name in ("batch_norm", "trailing_norm", "group_norm"):
        monkeypatch.setattr(native, name, None)


@pytest.fixture
def normkit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; return its exit code and what it wrote."""
    from normkit.cli import main

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["normkit", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        written = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, written.out, written.err

    return call


@pytest.fixture
def one_process():
    """Let torch.distributed run, with this process alone."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()
