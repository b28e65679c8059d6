"""The native part's caching allocator: tensors that are torch's in every respect, and memory that is kept in bounds."""

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from normkit import native
from normkit.errors import ArgumentError
from normkit.functional import batch_norm
from normkit.kernels import memory
from normkit.kernels.shares import Share
from tolerances import assert_close

from .lent import held_by_two

pytestmark = pytest.mark.skipif(not native.status().loaded, reason=str(native.status()))

X = torch.randn(4, 64, 16, 16)  # 256 KB, a size of its own class
LINE, PAGE = 64, 4096


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path):
    """Keep memory in this process alone, and none of what other tests freed."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    gc.collect()
    memory.release()
    monkeypatch.setattr(memory, "_kept", memory._Kept(Share("kept", [str(tmp_path)])))
    memory._limit.cache_clear()
    yield
    memory._limit.cache_clear()
    memory.release()
    memory._kept._share.leave()


def normalized(x: Tensor = X) -> Tensor:
    y: Tensor = batch_norm(x, None, None, training=True)
    return y


def use(times: int = 8, x: Tensor = X) -> None:
    """Run until what is freed is granted a place."""
    for _ in range(times):
        normalized(x)


SHAPES = {
    "contiguous": X,
    "channels-last": X.contiguous(memory_format=torch.channels_last),
    "channels-last 3d": torch.randn(4, 32, 2, 16, 16).contiguous(memory_format=torch.channels_last_3d),
    "one column": torch.randn(20000, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", SHAPES)
def test_tensor_is_as_torch_s_own(layout, dtype):
    x = SHAPES[layout].to(dtype)
    y, own = memory.empty_like(x), torch.empty_like(x)
    assert (y.shape, y.stride(), y.dtype, y.layout, y.device) == (
        own.shape,
        own.stride(),
        own.dtype,
        own.layout,
        own.device,
    )
    assert (y.requires_grad, y._base, y._version, y.is_leaf) == (False, None, 0, True)
    assert torch._C._dispatch_keys(y) == torch._C._dispatch_keys(own)
    assert y.untyped_storage().nbytes() == y.nbytes
    assert y.data_ptr() % LINE == 0
    assert_close(y.copy_(x), x, dtype=dtype)
    with torch.inference_mode():
        assert memory.empty_like(x).is_inference()


def test_output_is_resized_grown_set_and_given_away_like_any_tensor():
    y = normalized()
    before = y.clone()
    assert y.untyped_storage().resizable()
    y.resize_(2, 64, 16, 16)
    assert torch.equal(y, before[:2])
    y.resize_(64, 64, 16, 16)
    assert torch.equal(y[:2], before[:2])
    y.untyped_storage().resize_(16)
    y.untyped_storage().resize_(0)
    y = normalized()
    row, array = y[1], y.numpy()
    y.set_(torch.zeros(3))
    assert torch.equal(row, before[1])
    del y, row
    gc.collect()
    assert (array == before.numpy()).all()


def test_copies_and_files_of_an_output_are_those_of_any_tensor():
    y = normalized()
    for other in (copy.copy(y), copy.deepcopy(y), pickle.loads(pickle.dumps(y)), y.clone().share_memory_()):
        assert torch.equal(other, y)
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    queue.put(y)
    assert torch.equal(queue.get(), y)


def test_freed_memory_serves_the_next_output_of_its_size_and_one_a_little_smaller():
    use()
    y = normalized()
    place = y.data_ptr() // PAGE
    del y
    assert memory.kept() > 0
    y = normalized()
    assert y.data_ptr() // PAGE in (place - 1, place, place + 1)
    del y
    x = torch.randn(3, 83, 16, 16)  # 255 KB
    assert normalized(x).data_ptr() // PAGE in (place - 1, place, place + 1)


def test_outputs_begin_half_a_page_from_their_input():
    """A load that ends in the same twelve bits as a store shortly before waits for it."""
    storage = torch.empty(X.numel() + PAGE)
    for shift in range(0, PAGE // 4, LINE // 4):
        x = storage[shift : shift + X.numel()].view(X.shape).copy_(X)
        assert (memory.empty_like(x).data_ptr() - x.data_ptr()) % PAGE in range(PAGE // 2 - LINE + 1, PAGE // 2 + 1)


def test_memory_is_not_lent_while_a_view_of_it_lives():
    use()
    y = normalized()
    row, expected = y[1], y[1].clone()
    del y
    others = [normalized(2 * X - 1).fill_(torch.nan) for _ in range(4)]
    assert torch.equal(row, expected)
    del others


def test_small_outputs_and_those_that_torch_fills_are_torch_s_own():
    use()
    before = memory.kept()
    assert memory.KEPT_FROM_NATIVE == 64 << 10
    use(x=torch.randn(4, 63, 16, 4))
    assert memory.kept() == before
    torch.utils.deterministic.fill_uninitialized_memory = True  # the tests run with deterministic algorithms
    assert memory.empty_like(X).isnan().all()


def test_what_is_kept_is_bounded_and_the_longest_free_goes_first(monkeypatch):
    monkeypatch.setenv(memory.VARIABLE, "1")
    for _ in range(4):
        held = [normalized() for _ in range(8)]
        while held:
            del held[0]
    assert (1 << 20) - X.nbytes - 2 * PAGE < memory.kept() <= 1 << 20
    use(4, torch.randn(16, 64, 16, 16))  # a megabyte: larger than what may be kept with its page
    assert memory.kept() <= 1 << 20
    memory.release()
    assert memory.kept() == 0


def test_nothing_is_kept_where_nothing_may_be(monkeypatch):
    monkeypatch.setenv(memory.VARIABLE, "0")
    use()
    assert memory.kept() == 0


@pytest.mark.parametrize("setting", ["", "-1", "much", "1.5"])
def test_wrong_setting_is_refused(monkeypatch, setting):
    monkeypatch.setenv(memory.VARIABLE, setting)
    with pytest.raises(ArgumentError, match="NORMKIT_KEPT_MEGABYTES must be a whole number"):
        normalized()


def test_nothing_is_kept_where_the_machine_has_little_left(monkeypatch, tmp_path):
    use()
    assert memory.kept() > 0
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 1600 kB\nMemFree: 5 kB\nMemAvailable: 99 kB\n")
    use(1025)  # it is asked now and then
    assert memory.kept() == 0
    (tmp_path / "meminfo").write_text("MemTotal: 1600 kB\nMemFree: 5 kB\nMemAvailable: 101 kB\n")
    use(1025)
    use()
    assert memory.kept() > 0


@pytest.mark.parametrize("content", [None, "", "MemTotal: much\n", "MemFree: 5 kB\n"])
def test_a_machine_that_does_not_say_what_it_has_left_has_enough(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "meminfo").write_text(content)
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    assert not memory._is_scarce()


def test_threads_never_get_memory_that_another_holds():
    assert not held_by_two(X)


def test_a_fork_keeps_nothing_of_its_parents_and_its_tensors_live():
    use()
    y, before = normalized(), memory.kept()
    del y
    y, expected = normalized(), normalized().clone()
    child = os.fork()
    if child == 0:
        # No assertion reaches the parent from here but by the exit code; and torch's own threads are not there.
        sound = memory.kept() == 0 and y.numpy().tobytes() == expected.numpy().tobytes()
        use(3)
        del y
        use(3)
        os._exit(0 if sound and memory.kept() > 0 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert memory.kept() >= before
    assert torch.equal(y, expected)


def test_outputs_that_live_to_the_end_of_the_process_end_in_silence():
    program = """
import sys, torch
from normkit.functional import batch_norm
x = torch.randn(64, 64, 32, 32, requires_grad=True)
torch.held = sys.held = y = batch_norm(x, None, None, training=True)
y.sum().backward()
class Cycle: pass
cycle = Cycle(); cycle.own = cycle; cycle.y = batch_norm(x, None, None, training=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


GROWING = """
import random, torch, normkit
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
torch.set_num_threads(1)
layer, sizes = normkit.BatchNorm2d(16), random.Random(0)
for step in range(1200):
    x = torch.randn(sizes.randint(1, 16), 16, sizes.randint(8, 80), sizes.randint(8, 80))
    if step % 2:
        x = x.contiguous(memory_format=torch.channels_last)
    layer(x.requires_grad_()).square().sum().backward()
    if step == 300:
        before = resident()
print(resident() - before)
"""


@pytest.mark.parametrize("megabytes", [0, 8])
def test_sizes_that_change_do_not_make_a_process_grow(megabytes):
    """Plans that stay, between outputs that come and go, once kept the heap from shrinking: 110 MB in this run."""
    ended = subprocess.run(
        [sys.executable, "-c", GROWING], capture_output=True, text=True, timeout=300, check=True,
        env={**os.environ, memory.VARIABLE: str(megabytes)},
    )  # fmt: skip
    assert float(ended.stdout) < 32


WORKER = """
import sys, torch
from normkit import native
from normkit.functional import batch_norm
from normkit.kernels import memory
from normkit.kernels.shares import Share
assert native.status().loaded
memory._kept = memory._Kept(Share("kept", [sys.argv[1]]))
x = torch.randn(4, 64, 16, 16)
for line in sys.stdin:
    for _ in range(1100 if line.startswith("long") else 40):
        held = [batch_norm(x, None, None, training=True) for _ in range(4)]
        del held
    print(memory.kept(), flush=True)
"""


def test_processes_keep_one_share_together(tmp_path):
    """A megabyte for two processes that want it all: never more together, and one that was killed does not count."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, memory.VARIABLE: "1"},
        )
        for _ in range(2)
    ]  # fmt: skip

    def work(process, word):
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    one, two = processes
    try:
        whole, block = 1 << 20, X.nbytes + PAGE
        first = work(one, "begin")
        assert whole - 2 * block < first <= whole
        assert work(two, "begin") + first <= whole
        halves = [work(process, "long") for process in (one, two, one, two)][2:]
        assert all(whole // 2 - 2 * block < half <= whole // 2 for half in halves)
        two.send_signal(signal.SIGKILL)
        two.wait()
        assert whole - 2 * block < work(one, "long") <= whole
    finally:
        for process in processes:
            process.kill()
            process.communicate()
