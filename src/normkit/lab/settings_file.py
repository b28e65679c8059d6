"""A settings file: one's own data, network and training for ``normkit lab run --settings FILE``.

::

    [data]
    module = "my.package:load"      # called without arguments

    [network]
    module = "my.package:build"     # called with the name of a norm

    [training]                      # what is left out is the claim's own
    epochs = 20
    learning_rate = 0.01

Modules are looked for beside the file first.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..spelling import alternatives
from .own import function_of, searched

__all__ = ["SettingsFile", "read_settings"]

# Each key's type, by table. A whole number is taken where a fraction may stand.
KEYS: Mapping[str, Mapping[str, type]] = {
    "data": {"module": str},
    "network": {"module": str},
    "training": {
        "epochs": int, "batch_size": int, "optimizer": str, "learning_rate": float, "momentum": float,
        "weight_decay": float, "train_images": int, "test_images": int,
    },
}  # fmt: skip
LEAST = {
    "epochs": 1, "batch_size": 1, "learning_rate": 0.0, "momentum": 0.0, "weight_decay": 0.0, "train_images": 1,
    "test_images": 1,
}  # fmt: skip
OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True, kw_only=True)
class SettingsFile:
    """What a settings file says.

    Attributes:
        folder: where modules are looked for.
        data: the function that loads the data, or ``None``.
        network: the function that builds the network, or ``None``.
        training: the fields of `TrainingSettings` that it sets.
    """

    folder: str
    data: str | None = None
    network: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


def read_settings(path: Path) -> SettingsFile:
    """Read a settings file and check every key and value of it, and that its functions are there.

    Raises:
        ArgumentError: the file cannot be read, is no TOML, or holds what is not allowed; the message names file, key,
            what came and what is allowed.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ArgumentError(f"--settings {path}: cannot be read ({reason})") from error
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"--settings {path}: not TOML: {error}") from error
    _check_names(path, "table", content, KEYS)
    for name, table in content.items():
        if not isinstance(table, dict):
            raise ArgumentError(f"--settings {path}: {name} = {table!r}; expected a table, [{name}]")
        _check_names(path, f"key in [{name}]", table, KEYS[name])
        for key, value in table.items():
            _check_value(f"--settings {path}: [{name}] {key}", key, value, KEYS[name][key])
    found = SettingsFile(
        folder=str(path.resolve().parent),
        data=_module(path, content, "data"),
        network=_module(path, content, "network"),
        training=content.get("training", {}),
    )
    searched(found.folder)
    for function in (found.data, found.network):
        if function is not None:
            function_of(function)
    return found


def _check_names(path: Path, what: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise ArgumentError(f"--settings {path}: unknown {what}: {name}; {alternatives(name, known)}")


def _check_value(where: str, key: str, value: Any, kind: type) -> None:
    fits = type(value) in ((int, float) if kind is float else (kind,))
    if not fits:
        words = {str: "text", int: "a whole number", float: "a number"}[kind]
        raise ArgumentError(f"{where} = {value!r}: expected {words}")
    if key in LEAST and not value >= LEAST[key]:
        raise ArgumentError(f"{where} = {value!r}: expected {LEAST[key]:g} or more")
    if key == "optimizer" and value not in OPTIMIZERS:
        raise ArgumentError(f"{where} = {value!r}: {alternatives(value, OPTIMIZERS)}")


def _module(path: Path, content: Mapping[str, Any], table: str) -> str | None:
    if table not in content:
        return None
    if "module" not in content[table]:
        raise ArgumentError(f'--settings {path}: [{table}] lacks module = "package.module:function"')
    named: str = content[table]["module"]
    return named
