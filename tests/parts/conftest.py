"""How micro-batches take turns: in one thread, and in a thread each."""

import pytest

from normkit.parts.turns import in_threads


@pytest.fixture(params=["one thread", "threads"])
def turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the parts of an exact accumulation take turns both ways, and say which it is."""
    if request.param == "threads":
        monkeypatch.setattr("normkit.parts.exact.in_one_thread", in_threads)
    else:
        pytest.importorskip("greenlet")
    way: str = request.param
    return way
