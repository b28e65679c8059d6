"""torch.ao quantizes our layers as it does torch's: eager mode and graph mode, after and during training."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao
from torch.ao.quantization import quantize_fx

import normkit
from normkit.errors import ArgumentError
from tolerances import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.ao.quantization"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*are deprecated:UserWarning"),
]

RANKS = {1: (4, 3, 9), 2: (4, 3, 9, 8), 3: (2, 3, 5, 6, 7)}


def conv_net(library, rank: int, *, relu: bool = True, **settings) -> nn.Sequential:
    conv = getattr(nn, f"Conv{rank}d")(3, 6, 3)
    return nn.Sequential(conv, getattr(library, f"BatchNorm{rank}d")(6, **settings), *([nn.ReLU()] if relu else []))


def twins(make, shape) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """One network with our layers and one with torch's, of one state."""
    ours, theirs, x = make(normkit), make(nn), torch.randn(shape)
    for value in theirs.parameters():
        nn.init.normal_(value, 0.5, 0.3)
    theirs(x * 2 + 1)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, x


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("rank", RANKS)
def test_fuse_modules_takes_ours_as_torchs(rank, relu):
    ours, theirs, x = twins(lambda library: conv_net(library, rank, relu=relu), RANKS[rank])
    names = ["0", "1", *(["2"] if relu else [])]
    before = copy.deepcopy(ours.state_dict())
    fused, others = (ao.fuse_modules(copy.deepcopy(net.eval()), [names]) for net in (ours, theirs))
    assert [type(part) for part in fused] == [type(part) for part in others]
    assert_close(fused(x).detach(), others(x).detach(), dtype=torch.float32)
    assert type(ours[1]).__module__.startswith("normkit")
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda library: nn.Sequential(nn.Linear(3, 6), library.BatchNorm1d(6)), (5, 3)),
        (lambda library: nn.Sequential(nn.ConvTranspose2d(3, 6, 3), library.BatchNorm2d(6)), (2, 3, 5, 5)),
        (lambda library: nn.Sequential(library.BatchNorm2d(3), nn.ReLU()), (2, 3, 5, 5)),
    ],
    ids=["linear", "transposed", "relu alone"],
)
def test_fuse_modules_takes_the_other_patterns(make, shape):
    ours, theirs, x = twins(make, shape)
    fused, others = (ao.fuse_modules(net.eval(), [["0", "1"]]) for net in (ours, theirs))
    assert [type(part) for part in fused] == [type(part) for part in others]
    assert_close(fused(x).detach(), others(x).detach(), dtype=torch.float32)


@pytest.mark.parametrize("activation", ["relu", None])
def test_fuse_modules_takes_a_layer_that_brings_its_activation(activation):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), normkit.BatchNormAct2d(6, activation=activation))
    x = torch.randn(4, 3, 7, 7)
    net(x * 2)
    fused = ao.fuse_modules(net.eval(), [["0", "1"]])
    assert type(fused[1]) is nn.Identity
    assert_close(fused(x).detach(), net(x).detach(), dtype=torch.float32)
    net[1].activation = "silu"
    with pytest.raises(ArgumentError, match=r"activation='silu'.*convert\(model, to='torch'\)"):
        ao.fuse_modules(net, [["0", "1"]])


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.3}], ids=str)
def test_training_fused_moves_the_statistics_as_torchs(settings):
    ours, theirs, x = twins(lambda library: conv_net(library, 2, **settings), RANKS[2])
    found = []
    for net in (ours, theirs):
        fused = ao.fuse_modules_qat(net.train(), [["0", "1", "2"]])
        fused.qconfig = ao.get_default_qat_qconfig("onednn")
        prepared = ao.prepare_qat(fused)
        for scale in (1, 2):
            prepared(x * scale).sum().backward()
        found.append([prepared[0].bn.running_mean, prepared[0].bn.running_var, prepared[0].weight.grad])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, dtype=torch.float32)


def test_training_with_the_biased_variance_is_refused():
    net = conv_net(normkit, 2, unbiased=False)
    kept = copy.deepcopy(net.state_dict())
    for fuse in (
        lambda: ao.fuse_modules_qat(net, [["0", "1", "2"]]),
        lambda: ao.fuse_modules_qat(net.eval(), [["0", "1", "2"]]),
        lambda: quantize_fx.prepare_qat_fx(net.train(), mapping(qat=True), torch.randn(RANKS[2])),
    ):
        with pytest.raises(ArgumentError, match=r"unbiased=False.*eval\(\).*unbiased=True"):
            fuse()
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    ao.fuse_modules(net.eval(), [["0", "1", "2"]])


def mapping(qat: bool = False):
    make = ao.get_default_qat_qconfig_mapping if qat else ao.get_default_qconfig_mapping
    return make("onednn")


def whole(library) -> nn.Sequential:
    return nn.Sequential(
        *conv_net(library, 2), library.BatchNorm2d(6), nn.Conv2d(6, 6, 1), library.InstanceNorm2d(6, affine=True),
        library.GroupNorm(2, 6), nn.Flatten(2), library.LayerNorm(42), nn.Linear(42, 4),
    )  # fmt: skip


@pytest.fixture
def onednn():
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    yield
    torch.backends.quantized.engine = engine


@pytest.mark.usefixtures("onednn")
def test_graph_mode_after_training():
    ours, theirs, x = twins(whole, RANKS[2])
    kinds = [type(part) for part in ours]
    found = []
    for net in (ours.eval(), theirs.eval()):
        prepared = quantize_fx.prepare_fx(net, mapping(), x)
        prepared(x), prepared(x * 2)
        quantized = quantize_fx.convert_fx(prepared)
        found.append((quantized(x), [node.op for node in quantized.graph.nodes], type(quantized.get_submodule("0"))))
    assert found[0][1:] == found[1][1:]
    assert_close(found[0][0], found[1][0], dtype=torch.float32)
    assert [type(part) for part in ours] == kinds


@pytest.mark.usefixtures("onednn")
def test_graph_mode_during_training():
    ours, theirs, x = twins(lambda library: conv_net(library, 2), RANKS[2])
    found = []
    for net in (ours.train(), theirs.train()):
        prepared = quantize_fx.prepare_qat_fx(net, mapping(qat=True), x)
        prepared(x).sum().backward()
        fused = prepared.get_submodule("0")
        found.append([fused.bn.running_mean, fused.bn.running_var, fused.weight.grad])
        found[-1].append(quantize_fx.convert_fx(prepared.eval())(x))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, dtype=torch.float32)


# oneDNN speaks of the processor's accuracy where it has no instructions for products of bytes.
@pytest.mark.filterwarnings("ignore:Default qconfig of oneDNN backend:UserWarning")
@pytest.mark.usefixtures("onednn")
def test_eager_mode_converts_the_layers_that_stand_alone():
    def net(library):
        return nn.Sequential(ao.QuantStub(), library.BatchNorm2d(3), library.GroupNorm(3, 3), library.LayerNorm(8),
                             library.InstanceNorm2d(3, affine=True), ao.DeQuantStub())  # fmt: skip

    ours, theirs, x = twins(net, RANKS[2])
    found = []
    for each in (ours.eval(), theirs.eval()):
        each.qconfig = ao.get_default_qconfig("onednn")
        prepared = ao.prepare(each)
        prepared(x)
        quantized = ao.convert(prepared)
        found.append((quantized(x), [type(part) for part in quantized]))
    assert found[0][1] == found[1][1]
    assert_close(found[0][0], found[1][0], dtype=torch.float32)


def test_the_tables_hold_torchs_rows_unchanged():
    from torch.ao.quantization import fuser_method_mappings as mappings

    rows = mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD
    assert rows[nn.Conv2d, nn.BatchNorm2d] is mappings.fuse_conv_bn
    assert rows[nn.Conv2d, nn.BatchNorm2d, nn.ReLU] is mappings.fuse_conv_bn_relu
    entered = [types for types in rows if any(kind.__module__.startswith("normkit") for kind in types)]
    assert len(entered) == 17


def test_a_form_shares_state_and_owns_its_tables():
    layer = normkit.BatchNorm2d(3)
    form = layer.torch_form
    assert type(form) is nn.BatchNorm2d
    assert form.weight is layer.weight
    assert form.running_var is layer.running_var
    form.bias = None
    assert layer.bias is not None


def pt2e_network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), norm(4))


@pytest.mark.filterwarnings("ignore")  # of torchao about its own parts
def test_exported_graphs_are_quantized_as_torchs():
    """PT2E: after training, in training by torch's layers, and back into evaluation."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batches = [torch.randn(16, 3, 10, 10) * 2 + 1 for _ in range(4)]

    def quantizer(training):
        chosen = x86.X86InductorQuantizer()
        return chosen.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=training))

    after, during = [], []
    for norm in (nn.BatchNorm2d, normkit.BatchNorm2d):
        model = pt2e_network(norm)
        for x in batches:
            model(x)
        exported = torch.export.export(copy.deepcopy(model), (batches[0],)).module()
        pt2e.move_exported_model_to_eval(exported)
        wanted = model.eval()(batches[0]).detach()
        assert_close(exported(batches[0]).detach(), wanted, dtype=torch.float32)
        prepared = quantize_pt2e.prepare_pt2e(torch.export.export(model, (batches[0],)).module(), quantizer(False))
        for x in batches:
            prepared(x)
        quantized = quantize_pt2e.convert_pt2e(prepared)
        assert not [node for node in quantized.graph.nodes if "batch_norm" in str(node.target)]
        after.append(quantized(batches[0]).detach())
        assert (after[-1] - wanted).abs().max() < 0.05 * wanted.abs().max()

        trained = pt2e_network(norm).train()
        trained = normkit.convert(trained, to="torch").model if norm is normkit.BatchNorm2d else trained
        prepared = quantize_pt2e.prepare_qat_pt2e(torch.export.export(trained, (batches[0],)).module(), quantizer(True))
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
        for x in batches:
            optimizer.zero_grad()
            prepared(x).square().mean().backward()
            optimizer.step()
        pt2e.move_exported_model_to_eval(prepared)
        quantized = quantize_pt2e.convert_pt2e(prepared)
        during.append(quantized(batches[0]).detach())
    # A value between two steps of the grid may fall on either side: no more than one of a few hundred.
    assert ((after[0] - after[1]).abs() > 1e-5).double().mean() < 0.01
    assert torch.equal(during[0], during[1])
