"""What a training does for its normalization layers: watch, freeze, and measure statistics when they count."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Any, Literal, Self, get_args

import torch
from torch import nn

from ..anatomy import Call, iterate, sample_count
from ..anatomy.programs import unwrapped
from ..anatomy.select import Where
from ..doctor import Diagnosis, Ledger, watch
from ..errors import ArgumentError
from ..spelling import alternatives
from ..surgery import Recalibration, freeze, recalibrate

__all__ = ["Care", "Moment"]

Moment = Literal["validation", "end"]


class Care:
    """Look after the normalization layers of a model while it trains.

    In a loop of one's own::

        with Care(model, loader) as care:
            for epoch in range(epochs):
                train(model, loader)
                care.before_validation()
                validate(model)
        print(care.diagnosis())

    Args:
        model: the model that trains, or its wrapper.
        batches: training data to measure statistics on, which can be read again and again; a loader.
        recalibrate: when running statistics are replaced by measured ones: before each ``"validation"``, at the
            ``"end"`` (after averaged weights were put in place, before an export). Empty for never.
        freeze: layers to freeze from the start, as ``where=`` of :func:`normkit.freeze`.
        watch: keep the ledger of who writes the statistics.
        samples: measure on so many.
        call: ``lambda model, batch: ...``, where the model is not called with the first part of a batch.

    Raises:
        ArgumentError: a moment is none of these, samples is no number above 0, or there are no batches to measure on,
            or such as can be read only once.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> batches = [torch.randn(16, 2) for _ in range(4)]
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with Care(model, batches) as care:
    ...     for batch in batches:
    ...         optimizer.zero_grad()
    ...         model(batch).square().mean().backward()
    ...         optimizer.step()
    >>> care.diagnosis().healthy, care.ledger.steps, [moment for moment, _ in care.records]
    (True, 4, ['end'])
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any = None,
        *,
        recalibrate: Collection[Moment] = ("validation", "end"),
        freeze: Where = None,
        watch: bool = True,
        samples: int = 2048,
        call: Call | None = None,
    ) -> None:
        check_moments(recalibrate)
        if recalibrate and batches is None:
            raise ArgumentError("recalibrate= needs batches of training data; give them, or recalibrate=()")
        if recalibrate and isinstance(batches, Iterator):
            raise ArgumentError(
                f"batches is a {type(batches).__name__}, which can be read once, and statistics are measured again and "
                "again; give a DataLoader or a list, or recalibrate=()"
            )
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise ArgumentError(f"samples={samples!r}: give a whole number above 0")
        self.records: list[tuple[Moment, Recalibration[nn.Module]]] = []
        self._model, _ = unwrapped(model)
        self._batches, self._call, self._samples = batches, call, samples
        self._moments, self._freeze, self._watch = frozenset(recalibrate), freeze, watch
        self._ledger: Ledger | None = None
        self._open = ExitStack()

    @property
    def ledger(self) -> Ledger:
        """The ledger of the writes.

        Raises:
            ArgumentError: the training has not begun, or was not to be watched.
        """
        if self._ledger is None:
            raise ArgumentError("there is no ledger: training has not begun, or watch=False was given")
        return self._ledger

    def diagnosis(self) -> Diagnosis:
        """Return what the ledger found so far."""
        return self.ledger.diagnosis()

    def begin(self) -> None:
        """Freeze what is to be frozen, and begin to watch."""
        if self._freeze is not None:
            freeze(self._model, self._freeze)
        if self._watch:
            self._ledger = self._open.enter_context(watch(self._model))

    def before_validation(self, model: nn.Module | None = None) -> Recalibration[nn.Module] | None:
        """Measure the statistics, if that was asked for; of another model, such as averaged weights, where it is given.

        Returns:
            The record, or None where nothing was done.
        """
        return self._measure("validation", model)

    def end(self, model: nn.Module | None = None) -> Recalibration[nn.Module] | None:
        """Stop watching, and measure the statistics if that was asked for; the same as leaving the block."""
        self._open.close()
        return self._measure("end", model)

    def stop(self) -> None:
        """Stop watching and do no more: the training failed."""
        self._open.close()

    def _measure(self, moment: Moment, model: nn.Module | None) -> Recalibration[nn.Module] | None:
        if moment not in self._moments:
            return None
        chosen = self._model if model is None else unwrapped(model)[0]
        # A framework may validate in inference mode, in which nothing of the model may be written.
        with torch.inference_mode(False):
            record = recalibrate(chosen, _Few(self._batches, self._samples), call=self._call)
        self.records.append((moment, record))
        return record

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.end()
        else:
            self.stop()


def check_moments(moments: Collection[Moment]) -> None:
    """Refuse words that name no moment.

    Raises:
        ArgumentError: a word is none, or one word was given for a collection of them.
    """
    known = get_args(Moment)
    if isinstance(moments, str):
        raise ArgumentError(f"recalibrate={moments!r} is one word; give a tuple, such as recalibrate=('end',)")
    for moment in moments:
        if moment not in known:
            raise ArgumentError(f"recalibrate= names the moment {moment!r}; {alternatives(moment, known)}")


class _Few:
    """Batches up to a number of samples: a loader may hold many more, or fewer, and both are well."""

    def __init__(self, batches: Any, samples: int) -> None:
        self.batches, self.samples = batches, samples

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for batch in iterate(self.batches):
            yield batch
            seen += sample_count(batch)
            if seen >= self.samples:
                return
