"""The exceptions normkit raises on purpose.

NormkitError
├── ArgumentError (ValueError)          a setting outside what is allowed: eps, momentum, sizes, names
├── ShapeError (ValueError, RuntimeError)   a tensor of the wrong rank, channel count or number of values
├── DtypeError (TypeError, RuntimeError)    a tensor, or a mix of tensors, of a type that cannot be computed with
├── StatisticsError (ValueError, RuntimeError)   running statistics that this call cannot write or differentiate
├── BackendError (RuntimeError)         a kernel was asked for by name and cannot serve this call
├── DataError (ValueError)              a data set that is missing, damaged or cut short
├── ResultsError (ValueError)           a folder of results that is damaged or was made with other settings
├── RunError (RuntimeError)             an experiment that could not go on; what was finished is kept
└── SurgeryError (ValueError)           a change to a model that was refused; the model is as it was

Each also is the built-in exception that torch raises in the same place, so that code written for torch.nn catches it.
"""

from .printable import printable

__all__ = [
    "ArgumentError",
    "BackendError",
    "DataError",
    "DtypeError",
    "NormkitError",
    "ResultsError",
    "RunError",
    "ShapeError",
    "StatisticsError",
    "SurgeryError",
    "SyncError",
]


class NormkitError(Exception):
    """The base of every exception that normkit raises on purpose."""

    def __str__(self) -> str:
        """Return the message; names in it that come from files do not steer a terminal."""
        return printable(super().__str__())


class ArgumentError(NormkitError, ValueError):
    """A setting outside what is allowed: eps, momentum, a size, an unknown name."""


class ShapeError(NormkitError, ValueError, RuntimeError):
    """A tensor of the wrong rank, channel count or number of values."""


class DtypeError(NormkitError, TypeError, RuntimeError):
    """A tensor, or a mix of tensors, of a type that cannot be computed with."""


class StatisticsError(NormkitError, ValueError, RuntimeError):
    """Running statistics that this call cannot write, or cannot differentiate."""


class BackendError(NormkitError, RuntimeError):
    """A kernel was asked for by name and cannot serve this call."""


class DataError(NormkitError, ValueError):
    """A data set that is missing, damaged or cut short."""


class ResultsError(NormkitError, ValueError):
    """A folder of results that is damaged or was made with other settings."""


class RunError(NormkitError, RuntimeError):
    """An experiment that could not go on. What was finished is kept."""


class SurgeryError(NormkitError, ValueError):
    """A change to a model that was refused. The model is as it was before."""


class SyncError(NormkitError, RuntimeError):
    """Processes that share statistics did not call alike, or one of them is gone. No running statistic has moved."""
