"""Every private name of torch that the package reads is in one list, and a torch without it is told at the import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normkit
from normkit import torch_versions

PACKAGE = Path(normkit.__file__).parent
READ = re.compile(r"\b(torch\.(?:\w+\.)*_[A-Za-z]\w*(?:\.\w+)*|forward_ad\._\w+)")
IMPORTED = re.compile(r"^\s*from torch(\.[\w.]+)? import ([^#\n(]+)", re.MULTILINE)


def private_names() -> set[str]:
    """Return the private names of torch in the source, without ``torch.``."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        read = READ.findall(IMPORTED.sub("", source))
        found |= {name.replace("forward_ad.", "torch.autograd.forward_ad.", 1) for name in read}
        for module, names in IMPORTED.findall(source):
            found |= {f"torch{module}.{name.split(' as ')[0].strip()}" for name in names.split(",")}
    private = re.compile(r"\._[A-Za-z]")
    return {name.removeprefix("torch.") for name in found if private.search(name) and not name.endswith("__")}


def test_every_private_name_is_in_the_list_and_none_is_left_over():
    # The compiler's module is looked for among those that are loaded, and never asked for.
    read = {name for name in private_names() if name not in ("_C", "_dynamo")}
    assert read == set(torch_versions.PRIVATE)


def test_this_torch_has_them():
    torch_versions.check()


@pytest.mark.parametrize("name", torch_versions.PRIVATE)
def test_a_torch_without_one_is_told(monkeypatch, name):
    monkeypatch.setattr(torch_versions, "PRIVATE", (f"{name}_gone",))
    with pytest.raises(ImportError, match=rf"normkit needs torch\.{name}_gone, which torch {torch.__version__[:4]}"):
        torch_versions.check()


def test_the_import_asks():
    program = "import torch; del torch._C._has_storage; import normkit"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: normkit needs torch._C._has_storage")
