"""The same care as callbacks of Lightning and of transformers' Trainer; neither is imported before one is asked for."""

from collections.abc import Collection, Iterator
from importlib import import_module
from typing import Any

from ..anatomy import Call
from ..anatomy.select import Where
from ..doctor import Diagnosis, Ledger
from ..errors import ArgumentError
from .care import Care, Moment, check_moments

__all__ = ["lightning_callback", "trainer_callback"]


class _Caring:
    """What both callbacks have: settings, and the care of the training under way."""

    def __init__(self, batches: Any, recalibrate: Collection[Moment], settings: dict[str, Any]) -> None:
        super().__init__()
        check_moments(recalibrate)
        self.given, self.moments, self.settings = batches, recalibrate, settings
        self.care: Care | None = None

    def start(self, model: Any, loader: Any) -> Care:
        """Begin to care, with the trainer's own training data where none were given."""
        batches = loader if self.given is None else self.given
        self.care = Care(model, batches, recalibrate=self.moments, **self.settings)
        self.care.begin()
        return self.care

    @property
    def ledger(self) -> Ledger:
        """The ledger of the writes."""
        return self._care().ledger

    def diagnosis(self) -> Diagnosis:
        """Return what the ledger found so far."""
        return self._care().diagnosis()

    def _care(self) -> Care:
        if self.care is None:
            raise ArgumentError("there is nothing to tell yet: training has not begun")
        return self.care


def lightning_callback(
    batches: Any = None,
    *,
    recalibrate: Collection[Moment] = ("validation", "end"),
    freeze: Where = None,
    watch: bool = True,
    samples: int = 2048,
    call: Call | None = None,
) -> Any:
    """Return a callback of Lightning that looks after normalization layers; see :class:`Care`.

    ::

        care = lightning_callback()
        Trainer(callbacks=[StochasticWeightAveraging(1e-2), care]).fit(module, loader, validation_loader)
        print(care.diagnosis())

    Put it behind callbacks that average weights: it measures statistics after they have put theirs in place.

    Args:
        batches: data to measure on; None takes the trainer's training loader.
        recalibrate: when, as for :class:`Care`.
        freeze: which layers to freeze, as for :class:`Care`.
        watch: keep the ledger.
        samples: measure on so many.
        call: ``lambda module, batch: ...``, where ``module.forward`` does not take the first part of a batch, as with
            several loaders in a ``CombinedLoader``.

    Raises:
        ArgumentError: neither ``lightning`` nor ``pytorch_lightning`` is installed, or a word names no moment. At the
            start of the training: several loaders are read together, and ``call`` does not say how.
    """
    base = _first_found(("lightning.pytorch", "pytorch_lightning"), "Callback", "lightning")

    class NormCare(_Caring, base):  # type: ignore[misc, valid-type]  # a class of a library that may be absent
        """Watch, freeze and recalibrate."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Begin."""
            loader = trainer.train_dataloader
            if self.given is None and isinstance(loader, dict | list | tuple):
                loader = _Combined(loader, trainer, call)
            self.start(pl_module, loader)

        def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            """Measure, unless this is the check before the training."""
            if self.care is not None and not trainer.sanity_checking:
                self.care.before_validation()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """End."""
            self._care().end()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """Take the hooks away."""
            if self.care is not None:
                self.care.stop()

    return NormCare(batches, recalibrate, {"freeze": freeze, "watch": watch, "samples": samples, "call": call})


class _Combined:
    """Batches of several loaders together, as Lightning gives them to ``training_step``.

    Args:
        loaders: a dict or sequence of loaders.
        trainer: knows in which mode they are combined.
        call: how to call the module on such a batch.

    Raises:
        ArgumentError: nobody said how.
    """

    def __init__(self, loaders: Any, trainer: Any, call: Call | None) -> None:
        if call is None:
            first = repr(next(iter(loaders))) if isinstance(loaders, dict) else "0"
            raise ArgumentError(
                f"training reads a {type(loaders).__name__} of {len(loaders)} loaders together; say how to call the "
                f"module on what training_step is given: call=lambda module, batch: module(batch[{first}]), or give "
                "batches= to measure on"
            )
        combined = getattr(trainer.fit_loop, "_combined_loader", None)
        self.loaders, self.mode = loaders, getattr(combined, "_mode", "max_size_cycle")

    def __iter__(self) -> Iterator[Any]:
        homes = ("lightning.pytorch.utilities", "pytorch_lightning.utilities")
        combine = _first_found(homes, "CombinedLoader", "lightning")
        # One of its own: the trainer is in the middle of reading its one.
        return (batch for batch, _, _ in combine(self.loaders, self.mode))


def trainer_callback(
    batches: Any = None,
    *,
    recalibrate: Collection[Moment] = ("validation", "end"),
    freeze: Where = None,
    watch: bool = True,
    samples: int = 2048,
    call: Call | None = None,
) -> Any:
    """Return a callback of transformers' ``Trainer`` that looks after normalization layers; see :class:`Care`.

    ::

        care = trainer_callback()
        Trainer(model, arguments, train_dataset=data, callbacks=[care]).train()
        print(care.diagnosis())

    Statistics are measured before each evaluation and before each checkpoint.

    Args:
        batches: data to measure on; None takes the trainer's training loader.
        recalibrate: when, as for :class:`Care`.
        freeze: which layers to freeze, as for :class:`Care`.
        watch: keep the ledger.
        samples: measure on so many.
        call: ``lambda model, batch: ...``, where the model is not called with the entries of a batch.

    Raises:
        ArgumentError: ``transformers`` is not installed, or a word names no moment.
    """
    base = _first_found(("transformers",), "TrainerCallback", "transformers")

    class NormCare(_Caring, base):  # type: ignore[misc, valid-type]  # a class of a library that may be absent
        """Watch, freeze and recalibrate."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Begin; accelerate's loader keeps count of who reads it, so the one inside is read."""
            loader = given.get("train_dataloader")
            self.start(given["model"], getattr(loader, "base_dataloader", loader))

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Measure where an evaluation or a checkpoint comes next."""
            if control.should_evaluate or control.should_save:
                self._care().before_validation()

        on_epoch_end = on_step_end

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """End."""
            self._care().end()

    return NormCare(batches, recalibrate, {"freeze": freeze, "watch": watch, "samples": samples, "call": call})


def _first_found(modules: tuple[str, ...], name: str, package: str) -> Any:
    """Return a class of the first of these modules that is installed.

    Raises:
        ArgumentError: none is.
    """
    for module in modules:
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
    raise ArgumentError(f"{package} is not installed: pip install {package}")
