"""Count the doctor's false alarms and misses over architectures of the zoo: the table of docs/doctor.md.

Weights are random and the statistics are measured on data (no downloads). Each model is examined on other data of the
same kind: as it is, slightly off, and with one planted fault after another. One line of JSON a model; what stands in
the file is not run again.

    python benchmarks/doctor_thresholds.py out.jsonl [names ...]
    python benchmarks/doctor_thresholds.py --table out.jsonl
"""

import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from zoo_models import Architecture, batches, build, named, of_batch

import normkit
from normkit.anatomy import NormLayer

# Small ones of each library and kind: a subset, since each is examined ten times.
SUBSET = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/mnasnet0_5",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/regnet_y_400mf",
    "timm/resnet10t",
    "timm/seresnet18",
    "timm/efficientnet_lite0",
    "timm/lcnet_050",
    "timm/ghostnet_050",
    "timm/tinynet_e",
    "timm/repvgg_a0",
    "timm/hgnetv2_b0",
    "segmentation_models_pytorch/FPN on resnet18",
    "segmentation_models_pytorch/Linknet on resnet18",
    "monai/UNet",
    "monai/BasicUNet",
    "transformers/ResNet",
    "transformers/PP-LCNet",
    "transformers/RT-DETR's ResNet",
    "ultralytics/yolov8n-cls",
    "ultralytics/yolov5n",
)


def slightly(model: nn.Module, layer: NormLayer) -> None:
    """Move all statistics a little, as an average over batches does."""
    generator = torch.Generator().manual_seed(1)
    for each in of_batch(model):
        noise = torch.randn(2, each.mean.numel(), generator=generator)
        each.mean.add_(0.1 * noise[0] * each.var.sqrt())
        each.var.mul_((0.1 * noise[1]).exp())


def mean_off(model: nn.Module, layer: NormLayer) -> None:
    """Move one layer's means by two deviations."""
    layer.mean.add_(2 * layer.var.sqrt())


def variance_off(model: nn.Module, layer: NormLayer) -> None:
    """Make one layer's variances eight times too small."""
    layer.var.div_(8)


def channel_mean_off(model: nn.Module, layer: NormLayer) -> None:
    """Move the mean of one channel by four deviations."""
    layer.mean[1].add_(4 * layer.var[1].sqrt())


def channel_variance_off(model: nn.Module, layer: NormLayer) -> None:
    """Make the variance of one channel a hundred times too small."""
    layer.var[1].div_(100)


def all_off(model: nn.Module, layer: NormLayer) -> None:
    """Make all variances four times too large."""
    for each in of_batch(model):
        each.var.mul_(4)


def lost(model: nn.Module, layer: NormLayer) -> None:
    """Lose the statistics of all layers, and train the affine part."""
    for each in of_batch(model):
        each.weight.data.mul_(1 + 0.1 * torch.randn(each.weight.shape))
        each.bias.data.add_(0.1 * torch.randn(each.bias.shape))
        each.mean.zero_()
        each.var.fill_(1)


def left_in_training(model: nn.Module, layer: NormLayer) -> None:
    """Leave one layer in training mode."""
    layer.module.train()


def dead(model: nn.Module, layer: NormLayer) -> None:
    """Take the weight of a fifth of one layer's channels."""
    layer.weight.data[: max(len(layer.weight) // 5, 1)] = 1e-9


def nonfinite(model: nn.Module, layer: NormLayer) -> None:
    """Put an infinity into one layer."""
    layer.var[0] = float("inf")


def foreign_momentum(model: nn.Module, layer: NormLayer) -> None:
    """Give all layers the momentum of Keras."""
    for each in of_batch(model):
        each.module.momentum = 0.99


# What is planted, and the check that finds it; the first two are to be silent.
PLANTED: dict[str, tuple[Callable[[nn.Module, NormLayer], None] | None, str]] = {
    "right": (None, ""),
    "slightly off": (slightly, ""),
    "one layer's means two deviations off": (mean_off, "drift"),
    "one layer's variances 8 times too small": (variance_off, "drift"),
    "one channel's mean four deviations off": (channel_mean_off, "drift"),
    "one channel's variance 100 times too small": (channel_variance_off, "drift"),
    "all variances 4 times too large": (all_off, "drift"),
    "statistics lost": (lost, "never-updated"),
    "one layer left in training": (left_in_training, "mode"),
    "a fifth of a layer dead": (dead, "dead-channel"),
    "one infinity": (nonfinite, "nonfinite"),
    "Keras momentum": (foreign_momentum, "ema-window"),
}


def examine(architecture: Architecture) -> dict[str, object]:
    """Try everything on one model."""
    began, name = time.perf_counter(), architecture.name
    model, other = build(architecture), batches(architecture, 1)
    normkit.recalibrate(model, batches(architecture, 0))
    layers = of_batch(model)
    row: dict[str, object] = {"model": name, "norms": len(layers)}
    for fault, (plant, check) in PLANTED.items():
        sick = copy.deepcopy(model)
        chosen = of_batch(sick)[len(layers) // 2]
        if plant is not None:
            with torch.no_grad():
                plant(sick, chosen)
        # What needs no data is asked without, which is quick.
        diagnosis = normkit.diagnose(sick, None if check in ("mode", "nonfinite", "ema-window") else other)
        severe = [finding for finding in diagnosis.findings if finding.severity != "info"]
        found = [finding for finding in severe if finding.check == check and chosen.path in finding.layers]
        row[fault] = {
            "found": bool(found),
            "others": sorted({finding.check for finding in severe if finding.check != check}),
            "lines": len(str(diagnosis).splitlines()),
        }
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


def table(path: Path) -> str:
    """Write the table of the documentation."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    done, failed = [row for row in rows if "error" not in row], [row for row in rows if "error" in row]
    lines = ["| planted | found | missed | models with another error or warning |", "|---|---|---|---|"]
    for fault, (_, check) in PLANTED.items():
        found = sum(row[fault]["found"] for row in done)
        other = [(row["model"], row[fault]["others"]) for row in done if row[fault]["others"]]
        said = f"{found} of {len(done)} | {len(done) - found}" if check else "nothing to find | "
        named = "; ".join(f"{model}: {', '.join(checks)}" for model, checks in other[:6])
        lines.append(f"| {fault} | {said} | {len(other)}{f' ({named})' if other else ''} |")
    lines += [f"\n{len(done)} models with {sum(row['norms'] for row in done)} layers."]
    lines += [f"\n{row['model']} was not examined: {row['error']}" for row in failed]
    return "\n".join(lines)


def main() -> None:
    """Run, or write the table."""
    if sys.argv[1] == "--table":
        print(table(Path(sys.argv[2])))
        return
    warnings.simplefilter("ignore")
    out = Path(sys.argv[1])
    known = {json.loads(line)["model"] for line in out.read_text().splitlines()} if out.exists() else set()
    for name in sys.argv[2:] or SUBSET:
        if name in known:
            continue
        try:
            row = examine(named(name))
        except Exception as error:  # one that cannot be built says so in the table
            row = {"model": name, "error": f"{type(error).__name__}: {str(error)[:200]}"}
        with out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{name}: {row.get('error') or row['seconds']}", flush=True)


if __name__ == "__main__":
    main()
