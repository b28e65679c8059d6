"""Parts take turns, each with what torch keeps for a thread as it left it."""

import contextlib
import contextvars
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from normkit.errors import ArgumentError
from normkit.parts.lockstep import Lockstep
from normkit.parts.surroundings import Surroundings
from normkit.parts.turns import in_one_thread, in_threads

WORD = contextvars.ContextVar("word", default="nothing")


class Seen(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def word():
    token = WORD.set("within")
    yield
    WORD.reset(token)


def hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@contextlib.contextmanager
def several():
    with torch.no_grad(), hooks(), torch.autocast("cpu", torch.float16, cache_enabled=False), hooks(), Seen():
        yield


CONTEXTS = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
    "hooks": hooks,
    "no hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    "function mode": Seen,
    "device": lambda: torch.device("meta"),
    "dispatch mode": Dispatched,
    "inference": torch.inference_mode,
    "context variable": word,
    "several": several,
}


def state():
    """Return what a thread has active."""
    graph = torch._C._autograd
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        graph._top_saved_tensors_default_hooks(True),
        graph._saved_tensors_hooks_get_disabled_error_message(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.ones(1).device.type,
        torch._C._dispatch_tls_local_include_set().raw_repr(),
        torch._C._dispatch_tls_local_exclude_set().raw_repr(),
        WORD.get(),
    )


@pytest.fixture(params=["one thread", "threads"])
def turns(request):
    if request.param == "threads":
        return in_threads
    pytest.importorskip("greenlet")
    return in_one_thread


def lockstep(parts, turns, combine=lambda brought: brought):
    return Lockstep(parts, combine, lambda brought: LookupError("one is missing"), turns())


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.no_grad, several], ids=["none", "no_grad", "several"])
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_what_a_part_enters_is_its_own(context, around, turns):
    if around is several and context is CONTEXTS["no hooks"]:
        pytest.skip("torch refuses it where there are hooks")
    callers = []

    def combine(brought):
        callers.append(state())
        return brought

    together = lockstep(3, turns, combine)

    def work(part):
        before = state()
        if part == 1:
            together.meet(None)
            together.meet(None)
            return before, before, state()
        with context() if part == 0 else contextlib.nullcontext():
            inside = state()
            together.meet(None)
            with contextlib.nullcontext() if part == 0 else context():
                within = state()
                together.meet(None)
                assert state() == within
            assert state() == inside
        return before, inside, state()

    # A mode of the caller that reaches into a new thread wears another wrapper: compared is what is seen inside.
    with around():
        outside = state()
        results = together.run(work)
        assert state() == outside
    assert callers == [outside, outside]
    begun = {before for before, _, _ in results}
    assert len(begun) == 1
    assert all(before == after for before, _, after in results)
    if around is contextlib.nullcontext:
        assert begun == {outside}
        assert results[0][1] != outside


def test_a_transform_of_torch_func_cannot_be_put_aside():
    pytest.importorskip("greenlet")
    together = lockstep(2, in_one_thread)
    before = state()
    with pytest.raises(ArgumentError, match=r"a transform of torch\.func"):
        together.run(lambda part: torch.func.vmap(lambda x: (together.meet(None), x)[1])(torch.ones(2)))
    assert state() == before
    callers = Surroundings()
    with torch.no_grad():
        with pytest.raises(OverflowError), callers.again():
            raise OverflowError(torch.is_grad_enabled())
        assert not torch.is_grad_enabled()
    assert state() == before


def test_errors_end_all_parts_and_the_first_is_told(turns):
    ended = []

    def work(part):
        try:
            together.meet(part)
            if part == 1:
                raise OverflowError("in part 1")
            together.meet(part)
        finally:
            ended.append(part)

    together = lockstep(3, turns)
    with pytest.raises(OverflowError, match="in part 1"):
        together.run(work)
    assert sorted(ended) == [0, 1, 2]


def test_a_part_that_goes_on_after_an_error_comes_to_its_end(turns):
    def stubborn(part):
        for _ in range(part):
            with contextlib.suppress(LookupError):
                together.meet(part)

    together = lockstep(3, turns)
    with pytest.raises(LookupError, match="one is missing"):
        together.run(lambda part: (stubborn(part), together.meet(part) if part else None))


def test_an_interrupted_combination_reaches_the_caller(turns):
    def combine(brought):
        raise KeyboardInterrupt

    together = lockstep(2, turns, combine)
    with pytest.raises(KeyboardInterrupt):
        together.run(together.meet)


class Streams:
    """CUDA's current stream, kept for each thread by itself as CUDA does, on a machine without one."""

    def __init__(self, monkeypatch):
        self.own, self.first = threading.local(), "the first stream of device 0"
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current)
        monkeypatch.setattr(torch.cuda, "set_stream", self.set)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", list)

    def current(self):
        return getattr(self.own, "stream", self.first)

    def set(self, stream):
        self.own.stream = stream

    @contextlib.contextmanager
    def within(self, stream):
        before = self.current()
        self.set(stream)
        yield
        self.set(before)


def test_parts_compute_on_the_callers_stream(turns, monkeypatch):
    streams = Streams(monkeypatch)
    seen = []

    def work(part):
        seen.append(streams.current())
        together.meet(part)
        seen.append(streams.current())

    together = lockstep(2, turns)
    streams.set("another stream, of device 1")
    together.run(work)
    assert seen == ["another stream, of device 1"] * 4
    assert streams.current() == "another stream, of device 1"
