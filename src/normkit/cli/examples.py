"""What ``--help`` shows below the options: commands to type, and the names that an argument may have."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from typer.core import TyperCommand

__all__ = ["EXAMPLES", "explained"]

# By command; each is run by a test, with what stands in capitals or under `app` put in place.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "doctor": (
        "normkit doctor demo:stale",
        "normkit doctor demo:stale --html diagnosis.html",
        "normkit doctor app.models:build --weights model.safetensors --data app.data:batches",
        "normkit doctor model.safetensors",
    ),
    "plan": (
        "normkit plan demo:small-batch --batch-size 4 --samples 1001",
        "normkit plan demo:small-batch --batch-size 4 --html plan.html",
        "normkit plan app.models:build --data app.data:batches --batch-size 64 --ranks 8 --json",
    ),
    "recalibrate": (
        "normkit recalibrate demo:stale --out cured.safetensors",
        "normkit recalibrate app.models:build --data app.data:batches --out cured.safetensors",
    ),
    "fold": (
        "normkit fold demo:stale --out folded.safetensors",
        "normkit fold app.models:build --weights model.safetensors --shape 1,3,32,32 --out folded.pt2",
    ),
    "convert": (
        "normkit convert demo:stale --to group --out grouped.safetensors",
        "normkit convert app.models:build --to normkit --shape 2,3,32,32 --out fused.safetensors",
    ),
    "repair": ("normkit repair demo:poisoned --out sound.safetensors",),
    "bench": ("normkit bench --quick --shapes lenet --json rows.json", "normkit bench --summary rows.json"),
    "native status": ("normkit native status",),
    "lab list": ("normkit lab list",),
    "lab run": (
        "normkit lab run identity --data digits --seeds 2 --out runs/identity",
        "normkit lab run convergence --data fashion-mnist --seeds 5 --epochs 5 --out runs/fashion",
        "normkit lab run all --data fashion-mnist --until-decided --budget 120 --out runs/all",
    ),
    "lab report": ("normkit lab report runs/identity --lang zh",),
    "lab compare": ("normkit lab compare runs/identity runs/again",),
}


def _demos() -> str:
    from ..doctor.demos import DEMOS

    return f"demo:NAME is one of {', '.join(demo.name for demo in DEMOS)}."


def _claims() -> str:
    from ..lab.claims import all_claims

    return f"CLAIM is one of {', '.join(claim.id for claim in all_claims())}."


_NAMES: dict[str, Callable[[], str]] = dict.fromkeys(
    ("doctor", "plan", "recalibrate", "fold", "convert", "repair"), _demos
)
_NAMES["lab run"] = _claims


def explained(command: str) -> type[TyperCommand]:
    """Return the class of a command whose help ends with its examples and names; they are looked up when shown."""

    class Explained(TyperCommand):
        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            """Write the examples as they are typed, then the names."""
            with formatter.section("Examples"):
                for line in EXAMPLES[command]:
                    formatter.write(f"{' ' * formatter.current_indent}{line}\n")
            if command in _NAMES:
                formatter.write(f"\n{_filled(_NAMES[command](), formatter.width)}\n")

    return Explained


def _filled(text: str, width: int) -> str:
    """Break lines between words alone."""
    lines: Sequence[str] = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)
