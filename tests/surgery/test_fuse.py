"""convert(to="normkit") fuses what comes after a batch norm where nobody sees it, and to="torch" takes it apart."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import normkit
from normkit import convert, fold
from normkit.anatomy import fingerprint, norm_layers
from normkit.errors import SurgeryError
from normkit.surgery import fuse as fuse_module
from normkit.surgery.training_step import training_change
from tolerances import assert_close

from .nets import NETS
from .networks import Failure, failing, leaves, randomize

EXAMPLE = torch.linspace(-3, 5, 3 * 4 * 6 * 5).reshape(3, 4, 6, 5).sin()


class BasicBlock(nn.Module):
    """torchvision's: one ReLU module for two places, and a sum in place."""

    def __init__(self, channels=4, outputs=4, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet():
    stem = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return randomize(nn.Sequential(stem, BasicBlock(), BasicBlock(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def one_step(model, example):
    """Outputs, gradients by their names in the state, and the state, of one training step in float64."""
    model = copy.deepcopy(model).double().train()
    input = example.double().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        output = model(input)
        output.backward(torch.randn(output.shape, dtype=output.dtype))
    gradients = {name.replace(".norm.", "."): parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output.detach(), "input": input.grad, **gradients, **model.state_dict()}


def same_step(first, second, example=EXAMPLE):
    one, two = one_step(first, example), one_step(second, example)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if value is None:
            assert two[name] is None
        else:
            assert_close(two[name], value, dtype=torch.float64)


def test_resnet_is_fused_and_trains_as_before():
    model = resnet().train()
    before = fingerprint(model)
    record = convert(model, "normkit", EXAMPLE)
    assert fingerprint(model) == before
    assert record.fused == {
        "0.1": "relu", "1.bn1": "relu", "1.bn2": "residual and relu", "2.bn1": "relu", "2.bn2": "residual and relu",
    }  # fmt: skip
    assert record.unfused == {"2.downsample.1": "it is added in place to a tensor that others may read"}
    assert record.exactness == "exact"
    assert record.largest_change <= 1e-5
    assert "5 batch norms compute the activation after them too, 2 of them also a sum" in str(record)
    same_step(model, record.model)
    other = torch.randn(2, 4, 9, 7)
    assert_close(record.model.eval()(other), model.eval()(other), dtype=torch.float32)


class Chained(nn.Module):
    """What one fusion ends with is the shortcut of the next, in the same forward."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + y)


def test_shortcut_may_be_what_an_earlier_fusion_ends_with():
    model = randomize(Chained())
    record = convert(model, "normkit", EXAMPLE)
    assert record.fused == {"bn1": "relu", "bn2": "residual and relu"}
    same_step(model, record.model)


def test_fused_layers_do_the_work_and_the_rest_is_not_called():
    calls = []
    fused = convert(resnet(), "normkit", EXAMPLE).model.eval()
    for path, module in fused.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    sums = []

    class Sums(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.add_, torch.Tensor.__iadd__, torch.Tensor.add, torch.Tensor.__add__):
                sums.append(function)
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        fused(EXAMPLE)
        code = "".join(module.program.source for module in fused.modules() if hasattr(module, "program"))
    assert calls == []
    assert "residual = " in code
    assert "+=" not in code


def test_there_and_back_leaves_the_classes_and_every_bit():
    model = resnet()
    there = convert(model, "normkit", EXAMPLE).model
    assert list(there.state_dict()) == list(model.state_dict())
    assert isinstance(there[1], BasicBlock)
    assert type(there[1]).__name__ == "FusedBasicBlock"
    back = convert(there, "torch").model
    assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())
    assert back[0][2].inplace
    assert torch.equal(back.eval()(EXAMPLE), model.eval()(EXAMPLE))


def test_part_of_a_model_is_taken_apart_by_where():
    model = resnet()
    there = convert(model, "normkit", EXAMPLE).model
    record = convert(there, "torch", where="1.bn1")
    assert record.touched == ("1.bn1",)
    assert type(record.model[1]) is BasicBlock
    assert type(record.model[2]).__name__ == "FusedBasicBlock"
    assert type(record.model[1].bn2) is normkit.BatchNorm2d
    same_step(model, record.model)


def test_only_chosen_layers_are_fused_and_fusing_can_be_declined():
    record = convert(resnet(), "normkit", EXAMPLE, where="1.bn1")
    assert record.fused == {"1.bn1": "relu"}
    declined = convert(resnet(), "normkit", EXAMPLE, fuse=False)
    assert declined.fused == {}
    assert type(declined.model[1]) is BasicBlock
    without = convert(resnet(), "normkit")
    assert without.fused == {}
    assert "give example=" in without.notes[0]


def test_layers_that_are_ours_already_are_fused():
    model = convert(resnet(), "normkit", fuse=False).model
    record = convert(model, "normkit", EXAMPLE)
    assert len(record.fused) == 5
    assert set(record.fused) <= set(record.touched)
    with pytest.raises(SurgeryError, match="no layer to work on"):
        convert(record.model, "normkit", EXAMPLE)


def test_checkpoints_load_both_ways():
    model, other = resnet(), resnet()
    fused = convert(model, "normkit", EXAMPLE).model
    other.load_state_dict(fused.state_dict())
    fused.load_state_dict(resnet().state_dict())
    assert torch.equal(other.eval()(EXAMPLE), model.eval()(EXAMPLE))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_fused_model_is_copied_and_pickled(again):
    fused = convert(resnet(), "normkit", EXAMPLE).model
    other = again(fused)
    assert type(other[1]) is type(fused[1])
    same_step(fused, other)


def test_fused_model_is_folded_frozen_and_exported():
    model = resnet().eval()
    fused = convert(model, "normkit", EXAMPLE).model
    with torch.no_grad():
        expected = model(EXAMPLE)
        folded = fold(fused, EXAMPLE)
        assert not norm_layers(folded.model)
        assert_close(folded.model(EXAMPLE), expected, dtype=torch.float32)
        exported = torch.export.export(fused, (EXAMPLE,)).module()
        assert_close(exported(EXAMPLE), expected, dtype=torch.float32)
    normkit.freeze(fused, "1.bn1")
    before = fused[1].bn1.norm.running_mean.clone()
    fused.train()(EXAMPLE)
    assert torch.equal(fused[1].bn1.norm.running_mean, before)


@pytest.mark.parametrize(("name", "count"), [("resnet", 5), ("densenet", 5), ("mobilenet", 5), ("unet", 2)])
def test_networks_of_the_field_keep_their_training_step(name, count):
    model, example = randomize(NETS[name][0]()), torch.randn(3, 3, 16, 16)
    record = convert(model, "normkit", example)
    assert len(record.fused) == count
    same_step(model, record.model, example)
    assert [type(module) for module in convert(record.model, "torch").model.modules()] == [
        type(module) for module in model.modules()
    ]


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (nn.ReLU6(), "relu6"), (nn.SiLU(), "silu"), (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.3), None), (nn.GELU(), None),
    ],
)  # fmt: skip
def test_activations_of_the_kernels_are_fused_and_no_others(layer, word):
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), layer))
    record = convert(model, "normkit", EXAMPLE)
    assert record.fused == ({"1": word} if word else {})
    same_step(model, record.model)


class Plain(nn.Module):
    """A norm and a ReLU in code; the others below say it another way."""

    same_in_training = True

    def __init__(self):
        super().__init__()
        self.bn, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.seen = 0

    def forward(self, x):
        return torch.relu(self.bn(x))


class Tapped(Plain):
    def forward(self, x):
        hidden = self.bn(x)
        return torch.relu(hidden) + hidden


class TappedSum(Plain):
    def forward(self, x):
        total = self.bn(x) + x
        return torch.relu(total) + total


class Broadcast(Plain):
    def forward(self, x):
        return torch.relu(self.bn(x) + self.scale)


class IntoTheInput(Plain):
    def forward(self, x):
        x = x * 1
        y = x
        y += self.bn(x.detach() * 1)
        return torch.relu(y) + x


class InputWrittenBetween(Plain):
    same_in_training = False  # autograd refuses to go back through it

    def forward(self, x):
        x = x * 1
        hidden = self.bn(x.detach())
        x.mul_(2)
        return torch.relu(hidden + x)


class Twice(Plain):
    def forward(self, x):
        return torch.relu(self.bn(torch.relu(self.bn(x))))


class WithoutGradients(Plain):
    def forward(self, x):
        with torch.no_grad():
            hidden = torch.relu(self.bn(x))
        return hidden * self.scale


class DecoratedPart(Plain):
    @torch.no_grad()
    def part(self, x):
        return torch.relu(self.bn(x))

    def forward(self, x):
        return self.part(x) * self.scale


class Decorated(Plain):
    @torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)
    def forward(self, x):
        return torch.relu(self.bn(x))


class Checkpointed(Plain):
    same_in_training = False  # recomputation moves torch's statistics a second time, and not those of our layer

    def forward(self, x):
        return torch.relu(checkpoint(self.bn, x, use_reentrant=False))


class Counting(Plain):
    def forward(self, x):
        self.seen += 1
        return torch.relu(self.bn(x))


class FromOutside(Plain):
    def forward(self, x):
        return torch.relu(self.bn(x)) * EXAMPLE.new_tensor(0.5)


class OfItsOwn(Plain):
    """The same tensor as a buffer, which a graph holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, x):
        return torch.relu(self.bn(x)) * self.factor


class Gambling(Plain):
    def forward(self, x):
        return torch.relu(self.bn(x)) * (1.0 if torch.rand(()) < 2 else 0.0)


class Optional(Plain):
    def forward(self, x, skip=None):
        hidden = self.bn(x)
        return torch.relu(hidden) if skip is None else hidden + skip


class ByMode(Plain):
    def forward(self, x):
        hidden = self.bn(x)
        return torch.relu(functional.dropout(hidden, 0.5, self.training))


class ByValue(Plain):
    def forward(self, x):
        return torch.relu(self.bn(x)) if x.sum() > -1e9 else x


REFUSED = [
    (Tapped, "goes to 2 places"),
    (TappedSum, "the sum after it goes to 2 places"),
    (Broadcast, "another shape or type"),
    (IntoTheInput, "added in place to a tensor that others may read"),
    (InputWrittenBetween, "written in place between"),
    (Twice, "called several times"),
    (WithoutGradients, "enters no_grad"),
    (DecoratedPart, "enters no_grad"),
    (Decorated, "wrapped or was replaced"),
    (Checkpointed, "checkpointing"),
    (Counting, "writes attributes"),
    (FromOutside, "uses a tensor that is no parameter, buffer or attribute of a layer; make it a buffer"),
    (Gambling, "draws random numbers"),
    (Optional, "optional argument skip"),
    (ByMode, "one thing in training and another"),
    (ByValue, "cannot be traced"),
]


@pytest.mark.parametrize(("cls", "why"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_graph_does_not_hold_is_left_alone_with_the_reason(cls, why):
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), cls(), nn.Conv2d(4, 2, 1)))
    record = convert(model, "normkit", EXAMPLE)
    assert record.fused == {}
    assert why in record.unfused["1.bn"]
    assert type(record.model[1]) is cls
    assert record.model[1].seen == 0
    with torch.no_grad():
        assert_close(record.model.eval()(EXAMPLE), model.eval()(EXAMPLE), dtype=torch.float32)
    if cls.same_in_training:
        same_step(model, record.model)


def test_a_tensor_from_outside_is_no_obstacle_as_a_buffer():
    assert convert(OfItsOwn(), "normkit", EXAMPLE).fused == {"bn": "relu"}


def test_hooks_are_left_their_view():
    model, seen = randomize(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(float(output.detach().min())))
    model[3].register_forward_hook(lambda module, args, output: seen.append(float(output.detach().min())))
    record = convert(model, "normkit", EXAMPLE)
    assert record.fused == {}
    assert "hooks" in record.unfused["0"]
    seen.clear()
    record.model(EXAMPLE)
    assert seen[0] < 0 == seen[1]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        self.unused = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.used(x) if len(x) > 0 else self.unused(x)


def test_a_frozen_layer_is_left_unfused_and_the_reason_is_what_helps():
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    normkit.freeze(model)
    record = convert(model, "normkit", EXAMPLE)
    assert record.unfused == {"1": "it is frozen; normkit.unfreeze it first"}
    normkit.unfreeze(model)
    assert convert(model, "normkit", EXAMPLE).fused == {"1": "relu"}


def test_branch_that_the_example_does_not_reach_is_left_alone():
    record = convert(randomize(Branches()), "normkit", EXAMPLE)
    assert record.fused == {"used.0": "relu"}
    assert "unused.0" in record.unfused


class IndexesItsParts(nn.Module):
    """Reads what stands between the norm and the activation of a container, past the container's forward."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        if float(x.detach().sum()) > -1e9:
            hidden = self.features[1](self.features[0](x))
        return self.features[2](hidden) - hidden


def test_container_that_is_read_in_parts_is_left_alone():
    model = randomize(IndexesItsParts())
    record = convert(model, "normkit", EXAMPLE)
    assert record.fused == {}
    same_step(model, record.model)


@pytest.mark.parametrize("path", leaves(resnet()))
def test_exception_in_any_layer_leaves_the_model_bit_identical(path):
    for model, to in ((resnet(), "normkit"), (convert(resnet(), "normkit", EXAMPLE).model, "torch")):
        names = dict(model.named_modules())
        with failing(names.get(path, names.get(f"{path}.norm"))):
            before = fingerprint(model)
            if "relu" in path and to == "torch":
                continue  # nobody calls it any more
            with pytest.raises(Failure):
                convert(model, to, EXAMPLE)
            assert fingerprint(model) == before


def test_exception_between_two_fusions_leaves_the_model_bit_identical(monkeypatch):
    for failing_call in range(2):
        model, calls = resnet(), []

        def explode(block, program, calls=calls, failing_call=failing_call):
            calls.append(block)
            if len(calls) > failing_call:
                raise MemoryError

        before = fingerprint(model)
        with monkeypatch.context() as patch:
            patch.setattr(fuse_module, "rewrite", explode)
            with pytest.raises(MemoryError):
                convert(model, "normkit", EXAMPLE)
        assert fingerprint(model) == before


def test_fusion_that_is_measured_to_be_wrong_is_taken_apart(monkeypatch):
    monkeypatch.setattr(fuse_module, "training_change", lambda *_: 1.0)
    model = resnet()
    record = convert(model, "normkit", EXAMPLE)
    assert record.fused == {}
    assert "measured to differ by 1" in record.unfused["1.bn2"]
    assert type(record.model[1]) is BasicBlock
    assert type(record.model[0][2]) is nn.ReLU
    same_step(model, record.model)


class WritesItsList(nn.Module):
    """As HRNet's stages: gets a list and writes into it."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])

    def forward(self, x):
        for place, part in enumerate(self.parts):
            x[place] = part(x[place])
        return x[0] + x[1]


class GivesAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.inner = nn.BatchNorm2d(4), WritesItsList()

    def forward(self, x):
        y = torch.relu(self.bn(x))
        return self.inner([y, y])


def test_block_whose_parts_write_into_the_list_they_get_is_fused():
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), GivesAList()))
    record = convert(model, "normkit", EXAMPLE)
    assert record.fused == {"1.bn": "relu"}
    same_step(model, record.model)


def test_graph_that_does_not_run_is_a_reason_and_no_crash(monkeypatch):
    def fails(self, node):
        raise RuntimeError("no way")

    monkeypatch.setattr(torch.fx.Interpreter, "run_node", fails)
    record = convert(randomize(nn.Sequential(nn.Conv2d(4, 4, 1), Plain())), "normkit", EXAMPLE)
    assert record.touched == ("1.bn",)
    assert "does not run on what it was given (RuntimeError: no way)" in record.unfused["1.bn"]


class NeedsTargets(nn.Module):
    """Takes lists, and asserts in training that there are targets, as torchvision's detectors do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, images, targets=None):
        if self.training:
            torch._assert(targets is not None, "targets should not be none when in training mode")
        return [{"scores": self.body(image[None]).flatten()} for image in images]


def test_a_model_that_cannot_be_trained_on_the_example_is_no_crash():
    model = randomize(NeedsTargets()).eval()
    images = [torch.randn(3, 7, 7), torch.randn(3, 5, 9)]
    record = convert(model, "normkit", images, call=lambda model, images: model(images))
    assert record.fused == {"body.1": "relu"}
    assert_close(record.model(images)[1]["scores"], model(images)[1]["scores"], dtype=torch.float32)


def test_a_changed_model_that_does_not_train_is_infinitely_far():
    def refuse(module, *_):
        raise TypeError

    before, after = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    after.register_forward_hook(refuse)
    assert training_change(before, after, torch.randn(4, 3), None) == float("inf")
