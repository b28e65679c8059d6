"""Computations that advance together: one computes at a time, until it waits for all others."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from .turns import Turns, in_threads

__all__ = ["Lockstep"]

# Of the processor, and of every GPU.
_RandomState = tuple[torch.Tensor, list[torch.Tensor]]


class Kept(Protocol):
    """What each part has for itself beside what torch keeps for a thread."""

    def take_off(self, part: int) -> None:
        """Called in a part that is about to wait, or has come to its end."""

    def put_on(self, part: int) -> None:
        """Called in a part that begins or goes on; and when all have ended without an error, for the last part."""


class Lockstep:
    """Run one piece of work several times side by side, as parts that now and then meet each other.

    The turn goes from part to part in their order, and then to who called `run`, where is made of what all brought what
    each gets. Every part has a random state of its own, which it finds as it left it. Grad mode, autocast, hooks on
    saved tensors and context variables are those of the caller.

    Args:
        parts: how many.
        combine: called as the caller when all have met: takes what each brought, and returns what each gets.
        missed: makes the error of those that wait, from what they brought, when others have come to their end: by part,
            None for those.
        turns: how the parts take turns; in a thread each where nothing is said.
        kept: what each part has for itself.

    >>> def add(part):
    ...     return together.meet(part) + together.meet(10 * part)
    >>> together = Lockstep(3, lambda brought: [sum(brought)] * 3, lambda brought: RuntimeError("one is missing"))
    >>> together.run(add)
    [33, 33, 33]
    """

    def __init__(
        self,
        parts: int,
        combine: Callable[[list[Any]], list[Any]],
        missed: Callable[[list[Any]], Exception],
        turns: Turns | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.parts, self._combine, self._missed = parts, combine, missed
        self._turns = in_threads() if turns is None else turns
        self._kept = kept
        self._living: list[int] = []
        self._brought: list[Any] = [None] * parts
        self._made: list[Any] = [None] * parts
        self._random: list[_RandomState] = []
        self._stopped: BaseException | None = None

    def run(self, work: Callable[[int], Any], *, apart: bool = False) -> list[Any]:
        """Call ``work`` with each part's number; return what each returned.

        Args:
            work: what each part does; it may call `meet`.
            apart: let each part but the first draw random numbers of its own. Else all begin with the caller's random
                state. The caller goes on with that of part 0.

        Raises:
            BaseException: what a part raised, the first part's first; or what ``combine`` or ``missed`` made, in every
                part that waited.
        """
        self._random = [_random_state()] * self.parts
        seeds = _seeds(self.parts) if apart else []
        results: list[Any] = [None] * self.parts
        errors: dict[int, BaseException] = {}
        surrounded = self._turns.surrounded()

        def live(part: int) -> None:
            try:
                if self._kept is not None:
                    self._kept.put_on(part)
                self._go_on(part)
                if apart and part:
                    torch.manual_seed(seeds[part])
                results[part] = surrounded(work, part)
            except BaseException as error:
                errors[part] = error
            finally:
                self._random[part] = _random_state()
                if self._kept is not None:
                    self._kept.take_off(part)
                self._living.remove(part)

        self._living = list(range(self.parts))
        self._turns.begin(live, self.parts)
        try:
            while self._living:
                self._round()
        finally:
            # Also where the caller was interrupted: whoever still waits comes to an end.
            if self._living:
                self._stopped = InterruptedError("the caller went on without this part")
            self._turns.finish(self._living)
            _set_random_state(self._random[0])
            # What was made may hold a graph, and the graph this object: a circle that no collector sees.
            self._brought, self._made = [], []
        waited = self._stopped
        for part in sorted(errors, key=lambda part: (errors[part] is waited, part)):
            raise errors[part]
        if self._kept is not None:
            self._kept.put_on(self.parts - 1)
        return results

    def meet(self, brought: Any) -> Any:
        """Wait, in a part, until all parts have come; return what ``combine`` made for this one."""
        part = self._turns.part()
        assert part is not None, "only a part can meet the others"
        if self._stopped is not None:
            raise self._stopped
        self._brought[part] = (brought,)
        self._random[part] = _random_state()
        if self._kept is None:
            self._turns.wait(part)
        else:
            self._kept.take_off(part)
            try:
                self._turns.wait(part)
            finally:
                # Also where it may not wait, and where the others ended in an error: it has to clear away its own.
                self._kept.put_on(part)
        self._go_on(part)
        return self._made[part]

    def part(self) -> int | None:
        """Return the number of the part that this is called in, or None where it is called in none."""
        return self._turns.part()

    def _round(self) -> None:
        """Let each part go on until it meets or ends, and combine what they brought."""
        self._brought = [None] * self.parts
        self._turns.round(self._living)
        if not self._living or self._stopped is not None:
            return
        try:
            if len(self._living) < self.parts:
                raise self._missed([None if entry is None else entry[0] for entry in self._brought])
            self._made = self._combine([entry[0] for entry in self._brought])
        except BaseException as error:
            self._stopped = error

    def _go_on(self, part: int) -> None:
        if self._stopped is not None:
            raise self._stopped
        _set_random_state(self._random[part])


def _random_state() -> _RandomState:
    """Return the state of torch's generators; a GPU's where one was used."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), gpus


def _set_random_state(state: _RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _seeds(parts: int) -> list[int]:
    """Return a seed for each part that follows from the caller's random state and does not advance it."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    found: list[int] = torch.randint(2**62, (parts,), generator=generator).tolist()
    return found
