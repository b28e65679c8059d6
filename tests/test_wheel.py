"""The wheel: pure Python, or with the native part of this torch and Python where that is asked for."""

import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from normkit.kernels.native import build

ROOT = Path(__file__).parents[1]


def wheel(folder: Path) -> zipfile.ZipFile:
    (file,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(file)


def libraries(made: zipfile.ZipFile) -> list[str]:
    return [name for name in made.namelist() if name.endswith(".so")]


def test_the_wheel_is_pure_python(tmp_path, monkeypatch):
    monkeypatch.delenv("NORMKIT_WHEEL_NATIVE", raising=False)
    made = wheel(tmp_path)
    assert not libraries(made)
    assert made.filename.endswith("-py3-none-any.whl")
    assert "normkit/kernels/native/module.cpp" in made.namelist()


@pytest.mark.skipif(build.path() is None, reason="the native part is not built here")
def test_a_wheel_with_the_native_part_fits_this_python_alone_and_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_WHEEL_NATIVE", "1")
    made = wheel(tmp_path)
    (library,) = libraries(made)
    assert library == f"normkit/kernels/native/{build.filename()}"
    assert not made.filename.endswith("-any.whl")
    # Where a user's cache is empty, the file that the wheel brought is the one that is taken.
    made.extractall(tmp_path / "site")
    monkeypatch.setattr(build, "_HERE", tmp_path / "site" / "normkit" / "kernels" / "native")
    monkeypatch.setenv(build.FOLDER_VARIABLE, str(tmp_path / "empty"))
    assert build.path() == tmp_path / "site" / library
    assert build.load().__file__ == str(tmp_path / "site" / library)


def test_a_wheel_with_the_native_part_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_WHEEL_NATIVE", "1")
    monkeypatch.setitem(sys.modules, "normkit.kernels.native", None)
    with pytest.raises(SystemExit, match="add --no-build-isolation, or leave out NORMKIT_WHEEL_NATIVE"):
        wheel(tmp_path)
    assert not list(tmp_path.glob("*.whl"))
