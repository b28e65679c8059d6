"""Memory of large outputs: lent again when an output is freed, never while one lives, and given back."""

import copy
import gc
import io
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from normkit.errors import ArgumentError
from normkit.functional import batch_norm, layer_norm
from normkit.kernels import memory
from normkit.kernels.numba import slots
from normkit.kernels.numba.channels import plan as channel_plan
from normkit.kernels.numba.samples import passes as sample_passes
from normkit.kernels.shares import Share
from tolerances import assert_close

from .lent import held_by_two

# What Python keeps where there is no native part, in these tests from one byte on.
pytestmark = pytest.mark.usefixtures("python_path")


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path):
    """Keep memory of any size, as users have it, in this process alone: torch does not fill what is uninitialized."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    monkeypatch.setattr(memory, "KEPT_FROM", 1)
    monkeypatch.setattr(memory, "_kept", memory._Kept(Share("kept", [str(tmp_path)])))
    memory._limit.cache_clear()
    yield memory._kept
    memory._limit.cache_clear()
    memory._kept._share.leave()


SHAPES = {
    "contiguous": (torch.randn(3, 5, 7), (35, 7, 1)),
    "channels-last": (torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), (60, 1, 15, 3)),
    "channels-last 3d": (
        torch.randn(2, 3, 2, 2, 5).contiguous(memory_format=torch.channels_last_3d),
        (60, 1, 30, 15, 3),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", SHAPES)
def test_tensor_has_the_shape_type_and_layout_of_what_it_is_like(layout, dtype):
    x, strides = SHAPES[layout]
    y = memory.empty_like(x.to(dtype))
    assert (y.shape, y.stride(), y.dtype, y.requires_grad) == (x.shape, strides, dtype, False)
    assert y.untyped_storage().nbytes() == y.nbytes
    assert y._base is None
    assert_close(y.copy_(x), x.to(dtype), dtype=dtype)


def test_freed_memory_serves_the_next_output_of_its_size():
    x = torch.randn(64, 64)
    y = memory.empty_like(x)
    place = y.data_ptr()
    del y
    assert memory.kept() == memory._LARGE_PAGE
    assert memory.empty_like(x).data_ptr() == place
    assert memory.empty_like(torch.randn(1024, 1024)).data_ptr() != place


def test_memory_is_not_lent_while_a_view_of_it_lives():
    x = torch.randn(64, 64)
    y = memory.empty_like(x).copy_(x)
    row, place = y[3], y.data_ptr()
    del y
    other = memory.empty_like(x).fill_(torch.nan)
    assert other.data_ptr() != place
    assert torch.equal(row, x[3])


def test_training_steps_get_the_gradients_that_they_get_in_fresh_memory(monkeypatch):
    def steps():
        torch.manual_seed(1)
        weight = torch.rand(12, requires_grad=True)
        seen = []
        for _ in range(4):
            x, dy = torch.randn(6, 12, 5, 5, requires_grad=True), torch.randn(6, 12, 5, 5)
            y = batch_norm(x, None, None, weight, training=True)
            z = layer_norm(batch_norm(y, None, None, weight, training=True, activation="relu"), (5, 5))
            z.backward(dy)
            seen += [z.detach().clone(), x.grad.clone(), weight.grad.clone()]
        return seen

    lent = steps()
    assert memory.kept() > 0
    for name in ("channels", "samples"):
        monkeypatch.setattr(f"normkit.kernels.numba.{name}.passes.empty_like", torch.empty_like)
    for ours, fresh in zip(lent, steps(), strict=True):
        assert torch.equal(ours, fresh)


def test_output_may_be_changed_in_place_under_autograd():
    x, dy = torch.randn(6, 12, 5, requires_grad=True), torch.randn(6, 12, 5)
    y = batch_norm(x, None, None, training=True)
    F.relu(y, inplace=True).backward(dy)
    ours, x.grad = x.grad, None
    F.relu(F.batch_norm(x, None, None, training=True)).backward(dy)
    assert_close(ours, x.grad, dtype=torch.float32)


def test_copies_and_files_of_an_output_are_those_of_any_tensor():
    x = torch.randn(8, 4, 3)
    y, file = batch_norm(x, None, None, training=True), io.BytesIO()
    assert torch.equal(copy.deepcopy(y), y)
    torch.save(y, file)
    assert len(file.getvalue()) < 4096
    file.seek(0)
    assert torch.equal(torch.load(file), y)
    assert torch.equal(y.clone().share_memory_(), y)


def test_longest_free_goes_first_where_more_is_kept_than_allowed(monkeypatch, kept):
    monkeypatch.setenv(memory.VARIABLE, "4")
    x = torch.randn(64, 64)
    held = [memory.empty_like(x) for _ in range(4)]
    places = [y.data_ptr() for y in held]
    while held:
        del held[0]
    assert memory.kept() == 4 << 20
    assert [block.data_ptr() for block in kept._blocks] == places[2:]
    memory.release()
    assert memory.kept() == 0


def test_nothing_is_kept_where_nothing_may_be(monkeypatch):
    monkeypatch.setenv(memory.VARIABLE, "0")
    memory.empty_like(torch.randn(64, 64))
    assert memory.kept() == 0


def test_container_limits_what_is_kept(monkeypatch, tmp_path):
    machine = memory._limit()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "limit").write_text(f"{machine}\n")
    monkeypatch.setattr(memory, "_CONTAINER", (tmp_path / "memory.max", tmp_path / "none"))
    memory._limit.cache_clear()
    assert memory._limit() >= machine
    monkeypatch.setattr(memory, "_CONTAINER", (tmp_path / "memory.max", tmp_path / "limit"))
    memory._limit.cache_clear()
    assert memory._limit() == machine // 16


def test_outputs_that_live_to_the_end_of_the_process_end_in_silence():
    program = """
import sys, torch
from normkit.functional import batch_norm
x = torch.randn(64, 64, 32, 32, requires_grad=True)
held = y = batch_norm(x, None, None, training=True)
sys.held = [y]
torch.held = y
y.sum().backward()
class Cycle: pass
cycle = Cycle(); cycle.own = cycle; cycle.y = batch_norm(x, None, None, training=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("setting", ["", "-1", "much", "1.5"])
def test_wrong_setting_is_refused(monkeypatch, setting):
    monkeypatch.setenv(memory.VARIABLE, setting)
    with pytest.raises(ArgumentError, match="NORMKIT_KEPT_MEGABYTES must be a whole number"):
        batch_norm(torch.randn(4, 3), None, None, training=True)


def test_memory_freed_in_the_middle_of_a_call_is_kept_and_nothing_waits_for_ever(kept):
    x = torch.randn(64, 64)
    y = memory.empty_like(x)
    place = y.data_ptr()
    with kept._lock:  # as a garbage collection inside of take would find it
        del y
        assert memory.empty_like(x).data_ptr() != place
    assert memory.kept() > 0
    assert place in {memory.empty_like(x).data_ptr(), *(block.data_ptr() for block in kept._blocks)}


def test_threads_never_get_memory_that_another_holds():
    wrong = held_by_two(torch.randn(64, 64))
    gc.collect()
    assert not wrong
    assert memory.kept() <= 24 * memory._LARGE_PAGE


def test_small_and_strided_tensors_get_torch_s_own_memory(monkeypatch):
    strided = torch.randn(8, 6, 4)[:, ::2]
    assert memory.empty_like(strided).stride() == torch.empty_like(strided).stride()
    monkeypatch.setattr(memory, "KEPT_FROM", 1 << 20)
    memory.empty_like(torch.randn(64, 64))
    assert memory.kept() == 0


def test_unwritten_memory_is_filled_where_torch_is_asked_to():
    x = torch.randn(64, 64)
    memory.empty_like(x).fill_(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert memory.empty_like(x).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [256, 272])
def test_columns_are_streamed_in_whole_lines_of_the_cache_only(dtype, channels):
    """In half precision only tiles of 64 columns are whole lines, and what is left of 272 channels is none."""
    x = torch.empty(64, channels, 64, 64, dtype=dtype, device="meta")
    itemsize, columns = x.element_size(), x.contiguous(memory_format=torch.channels_last)
    streamed = itemsize == 4 or (itemsize == 2 and channels == 256)
    assert channel_plan.plan(tuple(x.shape), "channels_last", itemsize).stream is streamed
    assert channel_plan.plan(tuple(x.shape), "contiguous", itemsize).stream is (itemsize <= 4)
    stream = slots.STREAM - slots.OUTER
    assert sample_passes.plan(sample_passes.form_of(columns, 16), itemsize).sizes[stream] is streamed
    assert sample_passes.plan(sample_passes.form_of(x, 16), itemsize).sizes[stream] is (itemsize <= 4)


@pytest.mark.parametrize(
    ("cache", "megabytes"), [(None, 16), (1 << 20, 4), (32 << 20, 8), (64 << 20, 16), (512 << 20, 16)]
)
def test_the_last_cache_decides_which_outputs_pass_it_by(monkeypatch, cache, megabytes):
    monkeypatch.setattr(channel_plan, "last_cache", lambda: cache)
    channel_plan.streamed_from.cache_clear()
    values = megabytes << 18
    assert channel_plan.is_streamed(values, 64, 4)
    assert not channel_plan.is_streamed(values - 64, 64, 4)
    # With stored statistics the input is read once, and both stay in the cache until they are twice as large.
    later = min(2 * megabytes, 16)
    for layout in ("contiguous", "channels_last"):
        for size, streamed in ((later, True), (later - 1, False)):
            channel_plan.plan.cache_clear()
            channel_plan.plan_stored.cache_clear()
            assert channel_plan.plan_stored((size, 64, 64, 64), layout, 4).stream is streamed
    for cleared in (channel_plan.streamed_from, channel_plan.plan, channel_plan.plan_stored):
        cleared.cache_clear()


def test_long_runs_between_vectors_are_streamed_where_no_cache_holds_them():
    values = 1 << 22
    for run, large, small in ((196, True, False), (49, False, False), (192, True, True)):
        assert channel_plan.is_streamed(values, run, 4) is large
        assert channel_plan.is_streamed(values - 1, run, 4) is (small and channel_plan.streamed_from() < 1 << 24)
    assert not channel_plan.is_streamed(values, 196, 4, by_columns=True)


@pytest.mark.parametrize(("run", "streamed"), [(196, False), (784, False), (2047, False), (2049, True), (896, True)])
def test_runs_of_half_precision_that_share_a_line_are_streamed_only_where_they_are_long(run, streamed):
    assert channel_plan.is_streamed(1 << 23, run, 2) is streamed
    assert not channel_plan.is_streamed((1 << 23) - 1, run, 2) or run == 896


def test_a_machine_that_names_no_cache_is_not_guessed_at(tmp_path, monkeypatch):
    monkeypatch.setattr(channel_plan, "_CACHES", tmp_path)
    assert channel_plan.last_cache() is None
    for name, size in (("index0", "48K"), ("index3", "32M"), ("index4", "odd")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(size)
    assert channel_plan.last_cache() == 32 << 20
