"""A wheel that carries the native part: `NORMKIT_WHEEL_NATIVE=1 pip wheel --no-build-isolation --no-deps .`.

Without the variable the wheel is pure Python, and `normkit native build` makes the native part where it is installed.
With it the wheel holds one file for the torch, Python and processor it was built with; beside another torch it is not
loaded.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "NORMKIT_WHEEL_NATIVE"


class NativePart(BuildHookInterface[Any]):
    """Compile the native part and put it beside its sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the file to the wheel, which then fits one Python and one kind of machine."""
        if version != "standard" or os.environ.get(VARIABLE) != "1":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        try:
            from normkit.kernels.native import build
        except ModuleNotFoundError as error:
            raise SystemExit(
                "a wheel with the native part is built where normkit's dependencies are installed, and "
                f"{error.name} is not: install them and add --no-build-isolation, or leave out {VARIABLE}"
            ) from error
        self._made = tempfile.TemporaryDirectory()
        file = build.path() or build.build(Path(self._made.name))
        build_data["force_include"][str(file)] = f"normkit/kernels/native/{file.name}"
        build_data["pure_python"], build_data["infer_tag"] = False, True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the compiler left outside the wheel."""
        if hasattr(self, "_made"):
            self._made.cleanup()
