"""The architectures of the zoo: how each is built with random weights, and what data it takes. Nothing is downloaded.

Every norm gets a weight and a bias of its own, since many are built with weight 1 or 0 and bias 0, where much that is
wrong changes nothing. The statistics are then measured by forwards in training mode.
"""

import importlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normkit.anatomy import NormLayer, norm_layers, run

__all__ = ["ARCHITECTURES", "LIBRARIES", "Architecture", "batches", "build", "named", "of_batch", "prepare"]

LIBRARIES = ("torchvision", "timm", "segmentation_models_pytorch", "monai", "transformers", "ultralytics")


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: ``library/model``.
        make: builds it.
        shape: of one sample.
        count: samples in a batch.
        whole: the model takes a list of images, as detectors do.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 64, 64)
    count: int = 8
    whole: bool = False

    @property
    def library(self) -> str:
        """The package that it comes from."""
        return self.name.partition("/")[0]

    @property
    def call(self) -> Callable[[nn.Module, Any], Any] | None:
        """How a batch goes into the model, where it does not simply go in."""
        return (lambda model, batch: model(list(batch))) if self.whole else None


def _torchvision(name: str, group: str = "", **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = importlib.import_module("torchvision.models" + (f".{group}" if group else ""))
        given = {"weights": None, **settings}
        if group in ("segmentation", "detection"):
            given["weights_backbone"] = None
        made: nn.Module = getattr(models, name)(**given)
        return made

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = importlib.import_module("timm").create_model(name, pretrained=False)
        return made

    return make


def _segmentation(name: str, encoder: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = importlib.import_module("segmentation_models_pytorch")
        made: nn.Module = getattr(library, name)(encoder_name=encoder, encoder_weights=None)
        return made

    return make


def _monai(name: str, *args: Any, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = getattr(importlib.import_module("monai.networks.nets"), name)(*args, **settings)
        return made

    return make


def _transformers(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        made: nn.Module = getattr(library, model)(getattr(library, config)(**settings))
        return made

    return make


def _ultralytics(file: str, kind: str = "DetectionModel") -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        tasks = importlib.import_module("ultralytics.nn.tasks")
        made: nn.Module = getattr(tasks, kind)(file, verbose=False)
        return made

    return make


def _listed() -> Iterator[Architecture]:
    yield from _listed_torchvision()
    yield from _listed_timm()
    for name, encoder in (
        ("Unet", "resnet18"),
        ("UnetPlusPlus", "resnet18"),
        ("FPN", "resnet18"),
        ("Linknet", "resnet18"),
        ("PSPNet", "resnet18"),
        ("PAN", "resnet18"),
        ("MAnet", "resnet18"),
        ("DeepLabV3Plus", "mobilenet_v2"),
        ("UPerNet", "efficientnet-b0"),
        ("Unet", "vgg11_bn"),
    ):
        size = 128 if name == "PAN" else 64
        made = _segmentation(name, encoder)
        yield Architecture(f"segmentation_models_pytorch/{name} on {encoder}", made, (3, size, size))
    yield from _listed_monai()
    yield from _listed_transformers()
    for file, kind in (
        ("yolov5n.yaml", "DetectionModel"),
        ("yolov8n.yaml", "DetectionModel"),
        ("yolov8n-cls.yaml", "ClassificationModel"),
        ("yolov8n-seg.yaml", "SegmentationModel"),
        ("yolov9t.yaml", "DetectionModel"),
        ("yolov10n.yaml", "DetectionModel"),
        ("yolo11n.yaml", "DetectionModel"),
        ("yolo12n.yaml", "DetectionModel"),
        ("yolo26n.yaml", "DetectionModel"),
    ):
        yield Architecture(f"ultralytics/{Path(file).stem}", _ultralytics(file, kind))


def _listed_torchvision() -> Iterator[Architecture]:
    for name in [
        "resnet18",
        "resnet50",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "mnasnet0_5",
        "regnet_y_400mf",
        "densenet121",
        "efficientnet_b0",
    ]:
        yield Architecture(f"torchvision/{name}", _torchvision(name))
    with_init = {"init_weights": True}
    yield Architecture("torchvision/googlenet", _torchvision("googlenet", aux_logits=False, **with_init))
    yield Architecture("torchvision/inception_v3", _torchvision("inception_v3", **with_init), (3, 96, 96))
    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        yield Architecture(f"torchvision/{name}", _torchvision(name, "segmentation"))
    for name in ("r3d_18", "r2plus1d_18"):
        yield Architecture(f"torchvision/{name}", _torchvision(name, "video"), (3, 8, 48, 48))
    few = {"min_size": 96, "max_size": 128}
    for name, settings in (
        ("fasterrcnn_mobilenet_v3_large_320_fpn", few | {"box_score_thresh": 0.0}),
        ("retinanet_resnet50_fpn", few | {"score_thresh": 0.0}),
        ("ssdlite320_mobilenet_v3_large", {"score_thresh": 0.0}),
    ):
        made = _torchvision(name, "detection", **settings)
        yield Architecture(f"torchvision/{name}", made, (3, 96, 96), 4, whole=True)


def _listed_timm() -> Iterator[Architecture]:
    for name in [
        "resnet10t",
        "seresnet18",
        "skresnet18",
        "res2net50_14w_8s",
        "resnest14d",
        "cspresnet50",
        "efficientnet_lite0",
        "tf_efficientnet_b0",
        "tf_efficientnetv2_b0",
        "mobilenetv3_small_050",
        "mobilenetv4_conv_small",
        "mixnet_s",
        "regnetx_002",
        "repvgg_a0",
        "mobileone_s0",
        "repvit_m0_9",
        "fastvit_t8",
        "efficientvit_b0",
        "ghostnet_050",
        "dla34",
        "hrnet_w18_small",
        "tinynet_e",
        "lcnet_050",
        "ese_vovnet19b_dw",
        "dpn48b",
        "selecsls42b",
        "gernet_s",
        "resnetv2_50",
        "hgnetv2_b0",
        "starnet_s1",
        "rexnet_100",
        "mobilevit_xxs",
        "inception_next_atto",
    ]:
        yield Architecture(f"timm/{name}", _timm(name))
    for name, size in (("xception41", 64), ("levit_128s", 224), ("efficientformer_l1", 224)):
        yield Architecture(f"timm/{name}", _timm(name), (3, size, size), 4 if size > 200 else 8)


def _listed_monai() -> Iterator[Architecture]:
    plain = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
    steps = {"channels": (8, 16, 32), "strides": (2, 2)}
    for name, settings in (
        ("UNet", plain | steps | {"num_res_units": 2, "norm": "batch"}),
        ("AttentionUnet", plain | steps),
        ("BasicUNet", plain | {"features": (8, 8, 16, 32, 64, 8), "norm": "batch"}),
        ("SegResNet", plain | {"norm": "batch"}),
    ):
        yield Architecture(f"monai/{name}", _monai(name, **settings))
    yield Architecture("monai/EfficientNetBN b0", _monai("EfficientNetBN", "efficientnet-b0", pretrained=False))
    volumes = {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 2}
    yield Architecture("monai/resnet18 of volumes", _monai("resnet18", **volumes), (1, 32, 32, 32), 4)
    yield Architecture("monai/VNet", _monai("VNet", in_channels=1, out_channels=2), (1, 32, 32, 32), 4)


def _listed_transformers() -> Iterator[Architecture]:
    images = "ForImageClassification"
    for name, model, config, settings in (
        ("ResNet", f"ResNet{images}", "ResNetConfig", {"depths": [1, 1, 1, 1], "embedding_size": 16}),
        ("RegNet", f"RegNet{images}", "RegNetConfig", {"depths": [1, 1, 2, 1]}),
        ("MobileNetV1", f"MobileNetV1{images}", "MobileNetV1Config", {"depth_multiplier": 0.5}),
        ("MobileNetV2", f"MobileNetV2{images}", "MobileNetV2Config", {"depth_multiplier": 0.5}),
        (
            "EfficientNet",
            f"EfficientNet{images}",
            "EfficientNetConfig",
            {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
        ),
        ("MobileViT", f"MobileViT{images}", "MobileViTConfig", {"image_size": 64}),
        ("CvT", f"Cvt{images}", "CvtConfig", {"embed_dim": [16, 48, 96], "num_heads": [1, 3, 6]}),
        ("HGNetV2", f"HGNetV2{images}", "HGNetV2Config", {}),
        ("PP-LCNet", f"PPLCNet{images}", "PPLCNetConfig", {}),
        ("TextNet", f"TextNet{images}", "TextNetConfig", {}),
        ("RT-DETR's ResNet", "RTDetrResNetBackbone", "RTDetrResNetConfig", {"depths": [1, 1, 1, 1]}),
    ):
        yield Architecture(f"transformers/{name}", _transformers(model, config, **settings))
    swift = _transformers(f"SwiftFormer{images}", "SwiftFormerConfig", depths=[1, 1, 2, 1])
    yield Architecture("transformers/SwiftFormer", swift, (3, 64, 64))
    levit = _transformers(f"Levit{images}", "LevitConfig", image_size=64, hidden_sizes=[32, 48, 64], depths=[2, 2, 2])
    yield Architecture("transformers/LeViT", levit, (3, 64, 64))
    speech = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }
    conformer = _transformers("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", **speech)
    yield Architecture("transformers/Wav2Vec2 Conformer", conformer, (16000,))
    series = {"num_input_channels": 3, "context_length": 64, "prediction_length": 8, "d_model": 16, "ffn_dim": 32}
    patches = _transformers("PatchTSTForPrediction", "PatchTSTConfig", **series, num_attention_heads=2)
    yield Architecture("transformers/PatchTST", patches, (64, 3))


ARCHITECTURES = tuple(_listed())


def named(name: str) -> Architecture:
    """Return an architecture by its name."""
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


def batches(architecture: Architecture, seed: int, number: int = 5) -> list[Tensor]:
    """Make smooth random images, volumes or series: neighbours are alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        shape = (architecture.count, *architecture.shape)
        fine = torch.randn(shape, generator=generator)
        if len(shape) > 3:
            coarse = torch.randn(*shape[:2], *(8 for _ in shape[2:]), generator=generator)
            mode = "bilinear" if len(shape) == 4 else "trilinear"
            fine = functional.interpolate(coarse, size=shape[2:], mode=mode) + 0.3 * fine
        made.append(fine)
    return made


def of_batch(model: nn.Module) -> list[NormLayer]:
    """List the layers that keep statistics of the batch."""
    return [layer for layer in norm_layers(model) if layer.tracks and layer.kind not in ("instance",)]


def build(architecture: Architecture) -> nn.Module:
    """Build a model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    random.seed(0)
    return architecture.make().eval().requires_grad_(True)


def prepare(model: nn.Module, architecture: Architecture, *, affine: bool = True) -> nn.Module:
    """Give the norms weights and biases of their own, and statistics measured by forwards in training mode."""
    layers = of_batch(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in layers if affine else ():
            weight, bias = layer.weight, layer.bias
            if weight is not None:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))
            if bias is not None:
                bias.copy_(0.2 * torch.randn(bias.shape, generator=generator))
        momenta = [(layer.module, getattr(layer.module, "momentum", 0.1)) for layer in layers]
        for layer in layers:
            layer.module.train(layer.form is None or not layer.form.frozen)
            if isinstance(layer.module, nn.modules.batchnorm._BatchNorm):
                layer.module.momentum = None  # the plain average over the forwards
        for batch in batches(architecture, 0):
            run(model, batch, architecture.call)
    for module, momentum in momenta:
        if hasattr(module, "momentum"):
            module.momentum = momentum
    return model.eval()
