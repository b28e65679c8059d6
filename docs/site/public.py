"""Which objects are public: what the `__all__` of the public modules lists, read without an import of torch."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]

# By page of the reference: its title, what it is about, and the modules whose `__all__` it shows.
PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "layers": (
        "Layers",
        "Modules for `torch.nn.Sequential` and the like. Where torch has the class ours is a subclass with the same "
        "`state_dict`. Formula and conventions stand at the function of the same name.",
        ("normkit.layers", "normkit.layers.catalog"),
    ),
    "functional": (
        "Functions",
        "One function per method: the formula, the shapes, the conventions.",
        ("normkit.functional", "normkit.functional.batch_steps"),
    ),
    "doctor": ("Doctor", "Look at a model and change nothing.", ("normkit.doctor",)),
    "surgery": ("Surgery", "Change a model, provably: all or nothing, verified, with a record.", ("normkit.surgery",)),
    "training": ("Training", "Where training happens.", ("normkit.training",)),
    "parts": (
        "Micro-batches and ranks",
        "One batch in parts: micro-batches of a step, and ranks computed in one process.",
        ("normkit.parts",),
    ),
    "anatomy": (
        "Anatomy and kernels",
        "Find a model's normalization layers and what serves them.",
        ("normkit.anatomy", "normkit.kernels.dispatch:use_backend,Explanation", "normkit.native"),
    ),
    "testing": ("Testing", "For those who write normalization layers.", ("normkit.testing",)),
    "reference": (
        "Reference",
        "The mathematics in NumPy float64: forward and backward, every intermediate named.",
        ("normkit.reference", "normkit.axes"),
    ),
    "errors": (
        "Errors",
        "Each also is the built-in exception that torch raises in the same place.",
        ("normkit.errors",),
    ),
}


def listed(module: str) -> list[str]:
    """Return the names in a module's `__all__`, or those that are written out behind a colon."""
    module, _, named = module.partition(":")
    if named:
        return named.split(",")
    path = ROOT / "src" / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise LookupError(f"{module} has no __all__")


def identifiers(page: str) -> list[str]:
    """Return what a page shows: each public object once, by its shortest public path."""
    top = set(top_level())
    shown = []
    for module in PAGES[page][2]:
        home = module.partition(":")[0]
        for name in listed(module):
            shared = name in top and home not in ("normkit.reference", "normkit.functional", "normkit.layers.catalog")
            shown.append(f"normkit.{name}" if shared else f"{home}.{name}")
    # What is called stands before what it returns.
    return sorted(
        dict.fromkeys(shown), key=lambda identifier: identifier.rpartition(".")[2][0].isupper() and page != "layers"
    )


def top_level() -> list[str]:
    """Return the names of `normkit` itself that are no rooms."""
    return [name for name in listed("normkit") if not (ROOT / "src" / "normkit" / name).is_dir()]


def every_identifier() -> list[str]:
    """Return all that must have an entry: what the pages show, and every name of `normkit` itself."""
    shown = [identifier for page in PAGES for identifier in identifiers(page)]
    return list(dict.fromkeys([*(f"normkit.{name}" for name in top_level()), *shown]))
