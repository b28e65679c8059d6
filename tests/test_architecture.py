"""The house holds: imports only go down, importing the library is light, and the public names are in order."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import normkit

ROOT = Path(__file__).parents[1]

# What `import normkit` must not pull in: compilers, plotting, data, the command line.
HEAVY = (
    "filelock", "jinja2", "joblib", "llvmlite", "matplotlib", "numba", "onnxscript", "pooch", "psutil", "rich",
    "safetensors", "scipy", "sklearn", "triton", "typer",
)  # fmt: skip

PUBLIC_MODULES = (
    "normkit",
    "normkit.axes",
    "normkit.cli",
    "normkit.errors",
    "normkit.lab.backends",
    "normkit.lab.charts",
    "normkit.lab.claim",
    "normkit.lab.claims",
    "normkit.lab.compare",
    "normkit.lab.data",
    "normkit.lab.grid",
    "normkit.lab.idx",
    "normkit.lab.ledger",
    "normkit.lab.networks",
    "normkit.lab.probes",
    "normkit.lab.record",
    "normkit.lab.results",
    "normkit.lab.rows",
    "normkit.lab.training",
    "normkit.lab.verdicts",
    "normkit.layers",
    "normkit.layers.catalog",
    "normkit.report.figures",
    "normkit.report.language",
    "normkit.report.markdown",
    "normkit.report.page",
    "normkit.report.settings",
)


def test_import_contract_holds():
    import_linter = pytest.importorskip("importlinter.cli", reason="import-linter is in the dependency group check")
    assert import_linter.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_import_of_normkit_loads_nothing_heavy():
    # torch itself may load some of these; only what normkit adds counts.
    program = """
import json, sys, torch
before = set(sys.modules)
import normkit
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = json.loads(done.stdout)
    added = {name.partition(".")[0] for name in names}
    assert "normkit" in added
    assert not added & set(HEAVY)
    assert not [name for name in names if name.startswith(("torch._dynamo", "torch._inductor"))]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_names_are_sorted_and_present(name):
    module = importlib.import_module(name)
    # The linter's order: constants, then classes, then functions.
    ranked = sorted(module.__all__, key=lambda public: (not public.isupper(), not public[0].isupper(), public))
    assert list(module.__all__) == ranked
    missing = [public for public in module.__all__ if not hasattr(module, public)]
    assert not missing


def test_every_source_file_is_short_enough():
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "src").rglob("*.py")}
    assert not {str(path): length for path, length in lengths.items() if length > 450}


def test_version_is_public():
    assert normkit.__version__.count(".") == 2
