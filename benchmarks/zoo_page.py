"""Write docs/models.md from the results of the zoo. Every number on the page is counted from them."""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from zoo_models import ARCHITECTURES

__all__ = ["page"]

Row = dict[str, Any]
ROUNDINGS = 10  # times its own rounding that a changed model may be off: normkit.surgery.verify.ROUNDINGS
FLOOR = 1e-5  # where ten roundings are less: the tolerance in float32


def page(rows: list[Row]) -> str:
    """Return the page."""
    trained = [row for row in rows if row["name"].startswith("trained/")]
    rows = [row for row in rows if row not in trained]
    rows = sorted(rows, key=lambda row: (_order(row), row["name"].lower()))
    done = [row for row in rows if "failed" not in row]
    parts = [
        "# Models of other libraries",
        _opening(rows, done),
        "## In short",
        _table(("", "of", ""), _short(done)),
        "\n".join(_beyond(done)),
        "## One by one",
        _ONE_BY_ONE,
        _table(_HEAD, (_line(row) for row in done)),
        "## Beside other tools",
        _BESIDE,
        _table(("", "architectures", "norms folded", "by `fold` there", "not fused, and why"), _others(done)),
        "## What is left, and why",
        "\n".join(_left(rows)),
        "## What the doctor says",
        "\n".join(_said(done)),
        "## Trained weights that packages bring along" if trained else "",
        "\n\n".join(_trained(row) for row in trained),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# What was judged by hand of findings that are above *info* though the statistics are right.
_JUDGED = {
    ("transformers/MobileNetV1", "ema-window"): "true: Keras' momentum, which weighs the old value",
    ("transformers/MobileNetV2", "ema-window"): "true: Keras' momentum, which weighs the old value",
    ("transformers/EfficientNet", "ema-window"): "true: Keras' momentum, which weighs the old value",
    ("torchvision/ssdlite320_mobilenet_v3_large", "dead-channel"): "true: eps, 1e-3 there, takes nearly all of them",
    ("timm/repvgg_a0", "dead-channel"): "true: channels that are off behind their ReLU from construction on",
}
_DETECTOR = """Judged: a detector drops and sorts boxes, and which ones hangs on the last bits; in float64 both models
keep the same. `compare=` is for such outputs."""
_JUDGED_CHANGES = {
    f"torchvision/{name}": _DETECTOR
    for name in (
        "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"
    )
}  # fmt: skip
_JUDGED_TRAINED = {
    "torchcrepe tiny": """Judged: right. Tones that were made for this page have the statistics that the network was
trained with. Its norms stand between a ReLU and a maximum, so that nothing can be folded; momentum 0 means nothing in a
network that only predicts.""",
    "efficientnet-lite0": """Judged: the drifts are the data's and not the network's fault: 96 pieces of two photographs
are not what it was trained on. The dead channels stand in the statistics that the package brings, whatever the data
are.""",
}

_ONE_BY_ONE = """`adjacent`: norms of which one run shows that a layer with a weight stands directly before or after
them; `folded` of all norms. `exact`: the largest change in float64, folded (converted). `change`: in the model's own
type, from the original in float64, beside the original's own rounding. Changes are relative to the largest value of
each output, on data that the operation did not see. Seconds are the processor's, on one thread."""

_BESIDE = """torch's is `torch.fx.experimental.optimization.fuse`, timm's `reparameterize_model`, ultralytics'
`model.fuse()`; the first was tried on all architectures, the others on those of their library. A norm counts as fused
where it is gone from the model. timm's takes only blocks that it has a rule for, and removes whole branches where it
does."""


def _order(row: Row) -> int:
    names = ("torchvision", "timm", "segmentation_models_pytorch", "monai", "transformers", "ultralytics")
    return names.index(row["name"].partition("/")[0])


def _opening(rows: list[Row], done: list[Row]) -> str:
    versions: dict[str, set[str]] = {}
    for row in rows:
        for package, version in row.get("versions", {}).items():
            versions.setdefault(package, set()).add(version)
    named = ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in versions.items())
    norms = sum(row["norms"] for row in done)
    known = {architecture.name for architecture in ARCHITECTURES}
    run = sum(row["name"] in known for row in rows)
    return textwrap.fill(
        f"{len(rows)} architectures with {norms:,} batch norms, {run} of the {len(known)} that the command knows, "
        "with random weights, weights and biases of their norms "
        "drawn at random and statistics measured on smooth random data; written by `python benchmarks/zoo.py "
        f"results.jsonl`, which can repeat it and downloads nothing. On the CPU, {named}." + _states(rows),
        width=120,
    )


def _states(rows: list[Row]) -> str:
    """Say how many rows each state of the code gave, where that stands in them."""
    found = Counter(row["state"] for row in rows if "state" in row)
    if not found:
        return ""
    said = ", ".join(f"{count} at {state}" for state, count in found.most_common())
    return f" Not all of one state of the code, by its commits: {said}." if len(found) > 1 else f" All of {said}."


def _short(done: list[Row]) -> Iterator[tuple[str, str, str]]:
    norms = [row for row in done if row["norms"]]
    folds = [row["fold"] for row in norms]
    adjacent, taken = sum(row["adjacent"] for row in norms), sum(fold.get("adjacent", 0) for fold in folds)
    yield "adjacent norms folded", f"{taken:,} of {adjacent:,}", _share(taken, adjacent)
    some = sum(fold.get("done", 0) > 0 for fold in folds)
    yield "architectures of which `fold` takes some", f"{some} of {len(folds)}", _share(some, len(folds))
    whole = sum(row["convert"].get("done") == row["norms"] for row in norms)
    yield (
        'architectures that `convert(to="normkit")` takes whole',
        f"{whole} of {len(norms)}",
        _share(whole, len(norms)),
    )
    back = sum(row["convert"].get("back") == 0.0 and row["convert"].get("names", False) for row in norms)
    yield (
        "converted back: the same bits, the same names in the state",
        f"{back} of {len(norms)}",
        _share(back, len(norms)),
    )
    for name in ("fold", "convert"):
        tried = [row for row in norms if "change" in row[name]]
        right = sum(_is_right(row, name) for row in tried)
        words = f"`{name}`: changes within 1e-9 in float64, and {ROUNDINGS} roundings or {FLOOR:g}"
        yield words, f"{right} of {len(tried)}", _share(right, len(tried))
    exported = [fold["export"] for fold in folds if "export" in fold]
    good = sum(export.get("change", math.inf) <= FLOOR for export in exported)
    yield (
        "folded models that `torch.export` takes, with the same output",
        f"{good} of {len(exported)}",
        _share(good, len(exported)),
    )
    for name, words in (("recalibrate", "recalibrated whole"), ("freeze", "frozen whole, and still in training mode")):
        tried = [row for row in norms if name in row]
        right = sum(row[name].get("done") == row["norms"] and not row[name].get("moved") for row in tried)
        yield words, f"{right} of {len(tried)}", _share(right, len(tried))
    quiet = sum(not row["diagnose"].get("loud", True) for row in norms)
    yield (
        "`diagnose` with right statistics: nothing above *info*",
        f"{quiet} of {len(norms)}",
        _share(quiet, len(norms)),
    )


def _beyond(done: list[Row]) -> Iterator[str]:
    """Name the changes that are larger than what is allowed."""
    for name in ("fold", "convert"):
        for row in done:
            if "change" in row[name] and not _is_right(row, name):
                yield (
                    f"Beyond that, `{name}` of {row['name']}: {_number(row[name].get('exact'))} in float64, "
                    f"{_number(row[name]['change'])} in its own type, where its own rounding was "
                    f"{_number(row['rounding'])}. {_JUDGED_CHANGES.get(row['name'], 'Not judged.')}"
                )


def _is_right(row: Row, name: str) -> bool:
    tried, rounding = row[name], row["rounding"]
    allowed = FLOOR if rounding is None else max(FLOOR, ROUNDINGS * rounding)
    return bool(tried["change"] <= allowed and tried.get("exact", 0.0) <= 1e-9)


_HEAD = ("", "adjacent", "folded", "exact", "change", "rounding", "s", "fused by `convert`", "s", "export", "alarms")


def _line(row: Row) -> tuple[str, ...]:
    fold, convert = row["fold"], row["convert"]
    export = fold.get("export", {})
    return (
        row["name"].replace("segmentation_models_pytorch", "smp"),
        f"{fold.get('adjacent', 0)} of {row['adjacent']}",
        f"{fold['done']} of {row['norms']}" if "done" in fold else "no",
        f"{_number(fold.get('exact'))} ({_number(convert.get('exact'))})",
        f"{_number(fold.get('change'))} ({_number(convert.get('change'))})",
        _number(row["rounding"]),
        f"{fold['seconds']:.1f}",
        f"{convert['fused']} of {row['norms']}" if "fused" in convert else "no",
        f"{convert['seconds']:.1f}",
        "yes" if export.get("change", math.inf) <= FLOOR else "no",
        str(len(row["diagnose"].get("loud", ()))) if "loud" in row["diagnose"] else "failed",
    )


def _others(done: list[Row]) -> Iterator[tuple[str, ...]]:
    for name in ("torch", "timm", "ultralytics"):
        tried = [row for row in done if name in row and not row[name].get("absent")]
        if not tried:
            continue
        good = [row for row in tried if "done" in row[name]]
        norms = sum(row["norms"] for row in tried)
        failed = Counter(_brief(row[name].get("error", row[name].get("refused whole", ""))) for row in tried)
        failed.pop("", None)
        why = "; ".join(f"{count} times {reason}" for reason, count in failed.most_common(4))
        yield (
            f"{name}'s",
            f"{sum(row[name]['done'] > 0 for row in good)} of {len(tried)}",
            f"{sum(row[name]['done'] for row in good):,} of {norms:,}",
            f"{sum(row['fold'].get('done', 0) for row in tried):,} of {norms:,}",
            why or "none",
        )


def _left(rows: list[Row]) -> Iterator[str]:
    """Write each reason with the architectures in which it was given."""
    failed = [row for row in rows if "failed" in row]
    for row in failed:
        yield f"- {row['name']} could not be tried: {row['failed']}"
    run = {row["name"] for row in rows}
    absent = [architecture.name for architecture in ARCHITECTURES if architecture.name not in run]
    if absent:
        yield f"- not run for this page: {', '.join(absent)}"
    done = [row for row in rows if "failed" not in row]
    yield from _reasons("`fold` leaves adjacent norms", done, lambda row: row["fold"].get("apart", {}).values())
    yield from _reasons("`fold` leaves norms that stand beside no layer with a weight", done, _beside_none)
    yield from _reasons("`fold` as a whole", done, lambda row: _whole(row["fold"]))
    yield from _reasons("`convert` leaves", done, lambda row: row["convert"].get("refused", {}))
    yield from _reasons("`convert` as a whole", done, lambda row: _whole(row["convert"]))
    yield from _reasons("exports", done, lambda row: _whole(row["fold"].get("export", {})))
    for name in ("recalibrate", "freeze"):
        yield from _reasons(f"`{name}`", done, lambda row, name=name: _whole(row[name]))  # type: ignore[misc]
        yield from _reasons(f"`{name}` leaves", done, lambda row, name=name: row[name].get("refused", {}))  # type: ignore[misc]


def _beside_none(row: Row) -> Iterable[str]:
    apart = set(row["fold"].get("apart", {}).values())
    return [reason for reason in row["fold"].get("refused", {}) if reason not in apart]


def _whole(tried: Row) -> list[str]:
    return [str(tried[key]) for key in ("refused whole", "error") if key in tried]


def _reasons(title: str, done: list[Row], read: Callable[[Row], Iterable[str]]) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for row in done:
        for reason in {_brief(reason) for reason in read(row)}:
            found.setdefault(reason, []).append(row["name"].partition("/")[2])
    if found:
        yield f"\n{title}:\n"
    for reason, names in sorted(found.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        yield f"- {reason} ({shown})"


def _said(done: list[Row]) -> Iterator[str]:
    loud = [(row["name"], row["diagnose"]["loud"]) for row in done if row["diagnose"].get("loud")]
    lines = [row["diagnose"]["lines"] for row in done if "lines" in row["diagnose"]]
    yield (
        "Statistics were measured by `recalibrate` on data of one kind and examined on other data of the same kind, so "
        f"that nothing is wrong with them. The longest report has {max(lines, default=0)} lines."
    )
    if loud:
        yield ""
    for name, findings in loud:
        yield f"- {name}: " + "; ".join(_finding(name, *finding) for finding in findings[:3])
    for row in done:
        if "loud" not in row["diagnose"]:
            yield f"- {row['name']}: {_brief(str(_whole(row['diagnose'])[:1]))}"


def _finding(name: str, check: str, layers: int, text: str) -> str:
    judged = _JUDGED.get((name, check))
    return f"`{check}` in {layers} layers: {text}" + (f" ({judged})" if judged else "")


def _trained(row: Row) -> str:
    """Write what was found of one model with trained weights."""
    name = row["name"].partition("/")[2]
    versions = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
    loud = [f"{severity} `{check}` in {layers} layers: {text}" for severity, check, layers, text in row["said"]]
    said = "the doctor says nothing" if not loud else "the doctor says: " + "; ".join(loud[:6])
    folded = f"`fold` takes {row['folded']} of {row['norms']} norms"
    if row["folded"]:
        folded += (
            f", with a change of {row['exact']:.0e} in float64 and {row['change']:.0e} in float32, "
            f"where the model's own rounding is {row['rounding']:.0e}"
        )
    elif row.get("refused"):
        folded += f" ({_brief(row['refused'])})"
    return f"**{name}** ({versions}): {said}. {folded}. {_JUDGED_TRAINED.get(name, '')}".strip()


def _brief(reason: str) -> str:
    """Shorten a reason to what it says of a kind: names of layers and numbers of a model go."""
    reason = re.sub(r"\(\d+(, \d+)*\)", "(...)", reason)
    reason = re.sub(r"\b[\w-]+(\.[\w-]+)*\.\d+(\.[\w-]+)*\b", "...", reason)
    reason = re.sub(r"\b[a-z_]\w*(\.[a-z_0-9]\w*)+\b(?!\()", "...", reason)
    reason = re.sub(r"\s+", " ", reason).replace("|", "/")
    return reason if len(reason) <= 230 else reason[:227] + "..."


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else "differs in form" if math.isinf(value) else f"{value:.0e}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
