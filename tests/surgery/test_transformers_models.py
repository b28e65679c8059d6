"""Models of transformers as people have them: what fold, convert and the doctor make of them.

Weights are random and nothing is downloaded; what is asked of each is what docs/models.md says of the large ones.
"""

import copy

import pytest
import torch
from torch.nn import functional

import normkit
from normkit.anatomy import norm_layers, run

transformers = pytest.importorskip("transformers")

IMAGES = "ForImageClassification"
SPEECH = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SMALL = {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 32, 64, 64], "embedding_size": 16}
WIDTHS = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "image_size": 64}
HEADS = {"embed_dim": [16, 48, 96], "num_heads": [1, 3, 6]}
LEVELS = {"image_size": 64, "hidden_sizes": [32, 48, 64], "depths": [1, 1, 1], "num_attention_heads": [2, 3, 4]}
# Name: (model, settings of its config, norms of a batch, true alarms: Keras' momentum, which weighs the old value).
MODELS = {
    "ResNet": (f"ResNet{IMAGES}", STAGES, 17, ()),
    "RegNet": (f"RegNet{IMAGES}", STAGES | {"groups_width": 8}, 17, ()),
    "MobileNetV1": (f"MobileNetV1{IMAGES}", {"depth_multiplier": 0.5, "layer_norm_eps": 1e-5}, 27, ("ema-window",)),
    "MobileNetV2": (f"MobileNetV2{IMAGES}", {"depth_multiplier": 0.5}, 52, ("ema-window",)),
    "EfficientNet": (f"EfficientNet{IMAGES}", SMALL, 22, ("ema-window",)),
    "MobileViT": (f"MobileViT{IMAGES}", WIDTHS, 32, ()),
    "CvT": (f"Cvt{IMAGES}", HEADS, 39, ()),
    "PP-LCNet": (f"PPLCNet{IMAGES}", {"scale": 0.5}, 27, ()),
    "TextNet": (f"TextNet{IMAGES}", {"stem_out_channels": 16, "hidden_sizes": [16, 16, 32, 32, 32]}, 51, ()),
    "RT-DETR's ResNet": ("RTDetrResNetBackbone", STAGES, 19, ()),
    "SwiftFormer": (f"SwiftFormer{IMAGES}", {"depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32]}, 14, ()),
    "LeViT": (f"Levit{IMAGES}", LEVELS, 27, ()),
    "Wav2Vec2 Conformer": ("Wav2Vec2ConformerModel", SPEECH, 2, ()),
}


def built(name):
    model, settings, *_ = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, model)
    return cls(cls.config_class(**settings)).eval()


def batches(name, seed, number=12):
    """Make smooth random images, as photographs are, or noise where a model hears."""
    generator = torch.Generator().manual_seed(seed)
    if name == "Wav2Vec2 Conformer":
        return [torch.randn(2, 4000, generator=generator) for _ in range(number)]
    made = []
    for _ in range(number):
        fine = torch.randn(8, 3, 64, 64, generator=generator)
        coarse = torch.randn(8, 3, 8, 8, generator=generator)
        made.append(functional.interpolate(coarse, size=(64, 64), mode="bilinear") + 0.3 * fine)
    return made


def of_batch(model):
    return [layer for layer in norm_layers(model) if layer.tracks and layer.kind != "instance"]


def measured(name):
    """Give the norms of a model weights and biases of their own, and the data's statistics."""
    model = built(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in of_batch(model):
            layer.weight.copy_(0.5 + torch.rand(layer.weight.shape, generator=generator))
            layer.bias.copy_(0.2 * torch.randn(layer.bias.shape, generator=generator))
    normkit.recalibrate(model, batches(name, 0))
    return model


def outputs(model, batch):
    with torch.no_grad():
        return [value for value in run(model, batch).to_tuple() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_fold_and_convert_and_are_examined(name):
    norms, alarms = MODELS[name][2:]
    model = measured(name)
    example, fresh = batches(name, 2, 1)[0], batches(name, 3, 1)[0]
    before = copy.deepcopy(model.state_dict())
    assert len(of_batch(model)) == norms

    record = normkit.fold(model, example)
    # SwiftFormer's last norm stands behind a sum, and two heads read it.
    assert len(record.touched) == norms - (name == "SwiftFormer"), record.refused
    assert record.verdict.exact <= 1e-9
    exact = outputs(copy.deepcopy(model).double(), fresh.double())
    for kept, own, changed in zip(exact, outputs(model, fresh), outputs(record.model, fresh), strict=True):
        allowed = max(1e-5 * kept.abs().max(), 10 * (kept - own).abs().max())
        assert (kept - changed).abs().max() <= allowed

    converted = normkit.convert(model, "normkit", example)
    assert set(converted.touched) == {layer.path for layer in of_batch(model)}
    back = normkit.convert(converted.model, "torch").model
    assert list(back.state_dict()) == list(before)
    assert all(
        torch.equal(first, second) for first, second in zip(outputs(model, fresh), outputs(back, fresh), strict=True)
    )

    loud = {
        finding.check for finding in normkit.diagnose(model, batches(name, 4)).findings if finding.severity != "info"
    }
    assert loud == set(alarms)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
