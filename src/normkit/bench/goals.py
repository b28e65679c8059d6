"""What normkit's speed is meant to reach beside torch's, and whether a run reached it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .summary import TABLE, Row, best_form, geometric_mean, of_copy, ratio

__all__ = ["TINY", "Slower", "Verdict", "slower", "verdicts"]

# Inputs of up to so many values cost what a call costs: there normkit may be level with torch.
TINY = 4096
# Slower than this share of torch's speed is slower.
_LEVEL = 0.95
_FEW_CHANNELS, _MANY_TIMES = 16, 10.0
_OVER_COMPILE, _OF_COPY, _STEP, _IMPORT = 1.3, 1.5, 1.05, 0.05


@dataclass(frozen=True)
class Verdict:
    """One goal beside what was found.

    Attributes:
        goal: what is aimed at.
        found: what was measured, in words.
        met: whether that is enough.
    """

    goal: str
    found: str
    met: bool


@dataclass(frozen=True)
class Slower:
    """What took longer with normkit than with torch.

    Attributes:
        name: the row, or the training step.
        ratio: the better of torch's forms over normkit; below one.
        beyond_noise: most of normkit's samples are slower than most of torch's.
    """

    name: str
    ratio: float
    beyond_noise: bool

    def __str__(self) -> str:
        """The share of torch's speed, and where."""
        return f"{self.ratio:.2f} of torch's speed{'' if self.beyond_noise else ', within noise'}: {self.name}"


def slower(document: Mapping[str, Any]) -> list[Slower]:
    """Return what is slower than the better of torch's forms: beyond noise first, and of those the slowest."""
    named = [(_name(row), row["peers"]) for row in document["rows"]]
    named += [(f"a training step, {_step(step)}", step["peers"]) for step in document["training"]]
    found = []
    for name, peers in named:
        ours = peers["normkit"]
        best = peers[best_form(peers)]
        ratio_to_best = float(best["median"] / ours["median"])
        if ratio_to_best < 1:
            found.append(Slower(name, ratio_to_best, bool(ours["low"] > best["high"])))
    return sorted(found, key=lambda one: (not one.beyond_noise, one.ratio))


def verdicts(document: Mapping[str, Any]) -> list[Verdict]:
    """Return every goal that this document's measurements can judge, besides those of the table of groups."""
    rows = document["rows"]
    found = [_few_channels(rows), *_over_compile(rows), _no_slower_shape(rows), _tiny(rows), _beside_copy(document)]
    found += [_training(document["training"]), _imports(document["imports"])]
    return [verdict for verdict in found if verdict is not None]


def _few_channels(rows: Sequence[Row]) -> Verdict | None:
    return _mean(
        f"training forward, float32 channels_last, C of {_FEW_CHANNELS} or fewer: {_MANY_TIMES:g} times torch",
        [
            ratio(row)
            for row in rows
            if (row["work"], row["chain"], row["dtype"], row["layout"]) == ("forward", "bn", "float32", "channels_last")
            and row["shape"][1] <= _FEW_CHANNELS
            and row["elements"] > TINY
        ],
        _MANY_TIMES,
    )


def _over_compile(rows: Sequence[Row]) -> list[Verdict | None]:
    groups: dict[tuple[str, ...], list[float]] = {key: [] for key in TABLE if not key[3].startswith("tiny")}
    for row in rows:
        key = (row["work"], row["chain"], row["dtype"], row["layout"])
        if key in groups and row["set"] != "tiny" and "torch.compile" in row["peers"]:
            groups[key].append(ratio(row, "torch.compile"))
    over = [_mean(f"{', '.join(key)}: ahead of torch.compile", ratios, 1.0) for key, ratios in groups.items()]
    everything = [one for ratios in groups.values() for one in ratios]
    return [*over, _mean(f"these together: {_OVER_COMPILE:g} times torch.compile", everything, _OVER_COMPILE)]


def _no_slower_shape(rows: Sequence[Row]) -> Verdict | None:
    large = [row for row in rows if row["elements"] > TINY]
    return _level(f"no shape above {TINY} values below {_LEVEL:g} of torch's speed, beyond noise", large)


def _tiny(rows: Sequence[Row]) -> Verdict | None:
    tiny = [row for row in rows if row["elements"] <= TINY]
    return _level(f"no input of up to {TINY} values below {_LEVEL:g} of torch's speed, beyond noise", tiny)


def _level(goal: str, rows: Sequence[Row]) -> Verdict | None:
    if not rows:
        return None
    slower = [row for row in rows if ratio(row) < _LEVEL and _apart(row)]
    mean, worst = geometric_mean(map(ratio, rows)), min(rows, key=ratio)
    found = f"{len(slower)} of {len(rows)} are; mean {mean:.2f}, least {ratio(worst):.2f} ({_name(worst)})"
    return Verdict(goal, found, not slower)


def _apart(row: Row) -> bool:
    """Whether most of normkit's samples are slower than most of torch's: otherwise the difference is noise."""
    peers = row["peers"]
    return bool(peers["normkit"]["low"] > peers[best_form(peers)]["high"])


def _name(row: Row) -> str:
    shape = "x".join(map(str, row["shape"]))
    return f"{row['set']} {shape} {row['dtype']} {row['layout']} {row['work']} {row['chain']}"


def _beside_copy(document: Mapping[str, Any]) -> Verdict | None:
    """Judge large training forwards, where no cache holds the tensor, against a copy into memory of the same kind."""
    cache = document["machine"].get("last_level_cache")
    kind = "copy" if document["settings"].get("reuse_memory") else "clone"
    times = [
        of_copy(row, kind)
        for row in document["rows"]
        if (row["work"], row["chain"]) == ("forward", "bn") and cache and row["bytes"] / 2 > cache
    ]
    if not times:
        return None
    words = "memory that is there" if kind == "copy" else "fresh memory"
    mean = geometric_mean(times)
    goal = f"training forward larger than the last cache: at most {_OF_COPY:g} times a copy into {words}"
    return Verdict(goal, f"{mean:.2f} over {len(times)} rows, at most {max(times):.2f}", mean <= _OF_COPY)


def _training(steps: Sequence[Mapping[str, Any]]) -> Verdict | None:
    if not steps:
        return None
    over = {_step(step): ratio(step) for step in steps}
    worst = min(over, key=lambda name: over[name])
    found = f"least {over[worst]:.2f} ({worst}); " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in over.items())
    goal = f"a training step at least {_STEP:g} times as fast as with torch.nn's layers, in place or not"
    return Verdict(goal, found, over[worst] >= _STEP)


def _step(step: Mapping[str, Any]) -> str:
    return f"{step['network']} {step['batch'][0]} {step['layout']}"


def _imports(imports: Sequence[Mapping[str, Any]]) -> Verdict | None:
    if not imports:
        return None
    overhead = max(found["overhead"] for found in imports)
    return Verdict(f"import normkit at most {_IMPORT:.0%} over import torch", f"{overhead:+.1%}", overhead <= _IMPORT)


def _mean(goal: str, ratios: Iterable[float], wanted: float) -> Verdict | None:
    ratios = list(ratios)
    if not ratios:
        return None
    mean = geometric_mean(ratios)
    return Verdict(goal, f"{mean:.2f} over {len(ratios)} rows, least {min(ratios):.2f}", mean >= wanted)
