"""What a forward leaves on modules is each micro-batch's own while they take turns; what lies elsewhere is refused."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import normkit
from normkit.errors import ArgumentError
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("turns")
SPLIT = (4, 1, 7)


class Net(nn.Module):
    """An encoder, two norms, and a head."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.enter, self.first, self.middle, self.second = nn.Linear(5, 8), norm(8), nn.Linear(8, 8), norm(8)
        self.leave = nn.Linear(8, 3)

    def forward(self, x):
        return self.leave(self.second(self.middle(self.first(self.enter(x)).relu())).relu())


class Skip(Net):
    """The encoder leaves its skip on the module, as many U-Nets do."""

    def forward(self, x):
        self.skip = self.enter(x)
        z = self.second(self.middle(self.first(self.skip).relu()))
        z, self.deep = z + self.skip, z
        return self.leave(z)


class Auxiliary(Net):
    """A loss on the module, deleted and counted."""

    def forward(self, x):
        if hasattr(self, "calls"):
            self.calls += 1
        h = self.enter(x)
        self.middle.kept = h.pow(2).mean()
        z = self.leave(self.second(self.middle(self.first(h).relu())).relu())
        self.auxiliary = self.middle.kept
        del self.middle.kept
        return z


def data(samples=12):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 5, generator=generator).double() + torch.linspace(-2, 2, samples).double()[:, None]
    return x, torch.randint(3, (samples,), generator=generator)


def network(make=Net):
    torch.manual_seed(1)
    model = make().double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


def micro(x, y, split=SPLIT):
    return list(zip(x.split(split), y.split(split), strict=True))


def plain_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def assert_is_the_large_batch(model, loss):
    """Compare loss, gradients and buffers with the large batch's, and return both models."""
    (x, y), large = data(), copy.deepcopy(model)
    expected = loss(large, (x, y))
    expected.backward()
    got = normkit.accumulate(model, micro(x, y), loss, kind="exact")
    assert_close(got, expected.detach(), dtype=torch.float64, what="loss")
    for (name, value), other in zip(model.named_parameters(), large.parameters(), strict=True):
        assert (value.grad is None) == (other.grad is None), name
        if other.grad is not None:
            assert_close(value.grad, other.grad, dtype=torch.float64, what=f"gradient of {name}")
    for (name, value), other in zip(model.named_buffers(), large.buffers(), strict=True):
        assert_close(value, other, dtype=torch.float64, what=name)
    return model, large


def test_what_a_forward_keeps_on_its_modules_is_each_micro_batchs_own():
    model, _ = assert_is_the_large_batch(network(Skip), plain_loss)
    # What the last one left stays, as after plain accumulation.
    assert len(model.skip) == len(model.deep) == SPLIT[-1]

    def with_auxiliary(model, batch):
        return plain_loss(model, batch) + model.auxiliary

    model = network(Auxiliary)
    model.calls = 7
    model, large = assert_is_the_large_batch(model, with_auxiliary)
    assert model.calls == large.calls == 8
    assert not hasattr(model.middle, "kept")


def test_hooks_modes_and_parameters_to_learn_are_each_micro_batchs_own():
    def loss(model, batch):
        found = {}
        handle = model.enter.register_forward_hook(lambda module, given, y: found.setdefault("y", y))
        assert model.middle.training
        model.middle.eval()
        model.leave.requires_grad_(False)
        calm = model(batch[0])
        assert not model.middle.training
        handle.remove()
        model.middle.train()
        model.leave.requires_grad_(True)
        return plain_loss(model, batch) + calm.pow(2).mean() + found["y"].pow(4).mean()

    model, _ = assert_is_the_large_batch(network(), loss)
    assert not model.enter._forward_hooks
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, normkit.BatchNorm1d, normkit.SyncBatchNorm])
def test_functional_call_is_exact_and_leaves_the_parameters(norm):
    model = network(lambda: Net(norm))
    before = dict(model.named_parameters())

    def loss(model, batch):
        scaled = {name: value * (1.1 + batch[0].mean() * 0) for name, value in model.named_parameters()}
        return F.cross_entropy(torch.func.functional_call(model, scaled, (batch[0],)), batch[1])

    assert_is_the_large_batch(model, loss)
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    assert all(isinstance(value, nn.Parameter) for value in after.values())


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_functional_call_with_activation_residual_and_buffers_of_its_own(activation):
    class Fused(Net):
        def __init__(self):
            super().__init__(lambda channels: normkit.BatchNormAct1d(channels, activation=activation))

        def forward(self, x):
            h = self.enter(x)
            return self.leave(self.second(self.middle(self.first(h)), h))

    model = network(Fused)
    own = {name: value.clone() for name, value in model.named_buffers()}
    others = {name: value.clone() for name, value in model.named_buffers()}

    def loss(model, batch, buffers=own):
        scaled = {name: value * 1.1 for name, value in model.named_parameters()}
        return F.cross_entropy(torch.func.functional_call(model, (scaled, buffers), (batch[0],)), batch[1])

    large, (x, y) = copy.deepcopy(model), data()
    loss(large, (x, y), others).backward()
    normkit.accumulate(model, micro(x, y), loss, kind="exact")
    for (name, value), other in zip(model.named_parameters(), large.parameters(), strict=True):
        assert_close(value.grad, other.grad, dtype=torch.float64, what=name)
    for name, value in model.named_buffers():
        assert torch.equal(value, large.get_buffer(name)), name
        assert_close(own[name], others[name], dtype=torch.float64, what=name)
        assert not torch.equal(value, own[name])


def test_cached_parametrizations_of_each_micro_batch():
    model = network()
    parametrizations.weight_norm(model.middle)

    def loss(model, batch):
        with parametrize.cached():
            return plain_loss(model, batch) + model.middle.weight.pow(2).mean()

    assert_is_the_large_batch(model, loss)
    assert not parametrize._cache
    assert not parametrize._cache_enabled


def test_after_an_error_modules_are_as_they_were():
    model, (x, y) = network(Auxiliary), data()
    model.calls = 7
    before = {name: dict(vars(module)) for name, module in model.named_modules()}

    def loss(model, batch):
        model.extra, model.leave.training = batch, False
        value = plain_loss(model, batch)
        if len(batch[1]) == 1:
            raise OverflowError
        return value

    with pytest.raises(OverflowError):
        normkit.accumulate(model, micro(x, y), loss, kind="exact")
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def refused(model, loss, match, split=SPLIT):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    (x, y), before = data(), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=match):
        normkit.accumulate(model, micro(x, y, split), loss, kind="exact")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


class Elsewhere:
    """What is kept outside of modules, where all micro-batches meet."""

    def __init__(self):
        self.one, self.stack = {}, []

    def by_a_hook(self, model, batch):
        handle = model.enter.register_forward_hook(lambda module, given, y: self.one.__setitem__("y", y))
        value = plain_loss(model, batch)
        handle.remove()
        return value + self.one["y"].pow(2).mean()

    def read_before_a_norm(self, model, batch):
        self.one["y"] = model.enter(batch[0])
        h = model.first(self.one["y"])
        return F.cross_entropy(model.leave(model.second(model.middle(h) + self.one["y"])), batch[1])

    def of_a_norm(self, model, batch):
        self.one["y"] = model.first(model.enter(batch[0]))
        z = model.second(model.middle(self.one["y"]))
        return F.cross_entropy(model.leave(z + self.one["y"]), batch[1])

    def stacked(self, model, batch):
        self.stack.append(model.middle(batch[0].repeat(1, 2)[:, :8]))
        h = model.second(model.first(model.enter(batch[0])))
        return F.cross_entropy(model.leave(h + self.stack.pop().mean(0)), batch[1])


@pytest.mark.parametrize("way", ["by_a_hook", "read_before_a_norm", "of_a_norm", "stacked"])
def test_what_is_kept_elsewhere_is_refused(way, turns):
    split = (4, 4, 4)
    if way == "stacked" and turns == "threads":
        pytest.skip("each is used once, by another: in threads nothing tells whose it was")
    said = r"micro-batch \d used what micro-batch \d computed.*outside the modules.*kind=\"statistics\""
    refused(network(), getattr(Elsewhere(), way), said, split)


def test_a_residual_of_another_micro_batch_is_refused():
    model = network(lambda: Net(normkit.BatchNormAct1d))
    kept = {}

    def loss(model, batch):
        kept["h"] = model.enter(batch[0])
        h = model.first(kept["h"])
        return F.cross_entropy(model.leave(model.second(model.middle(h), kept["h"])), batch[1])

    refused(model, loss, "used what micro-batch", (4, 4, 4))


def test_what_was_computed_before_is_no_micro_batchs(turns):
    if turns == "threads":
        pytest.skip("told apart by order, which threads do not have in common")
    model = network()

    def loss_with(model):
        scale = model.leave.weight.pow(2).mean() + 1
        return lambda model, batch: plain_loss(model, batch) * scale

    large, (x, y) = copy.deepcopy(model), data()
    loss_with(large)(large, (x, y)).backward()
    normkit.accumulate(model, micro(x, y), loss_with(model), kind="exact")
    assert_close(model.leave.weight.grad, large.leave.weight.grad, dtype=torch.float64)


def test_casts_that_autocast_keeps_are_no_micro_batchs():
    model, (x, y) = network().float(), data()
    with torch.autocast("cpu", torch.bfloat16):
        normkit.accumulate(model, micro(x.float(), y), plain_loss, kind="exact")
    assert all(parameter.grad is not None for parameter in model.parameters())


@contextlib.contextmanager
def averaged(model, averages, way):
    """Put averages in the place of a model's weights, as exponential moving averages are evaluated."""
    kept = [parameter.detach().clone() for parameter in model.parameters()]

    def put(values):
        for parameter, value in zip(model.parameters(), values, strict=True):
            if way == "another storage":
                parameter.data = value.clone()
            else:
                (parameter.data if way == "through data" else parameter.detach()).copy_(value)

    put(averages)
    try:
        yield
    finally:
        put(kept)


@pytest.mark.parametrize("way", ["counted", "through data", "another storage"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("readable", [("cpu",), ()], ids=["read", "by operations"])
def test_weights_that_are_changed_around_a_norm_are_refused_and_come_back(way, layout, readable, monkeypatch):
    monkeypatch.setattr("normkit.parts.weights._READABLE", readable)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)
    )
    model = model.to(memory_format=layout)
    averages = [parameter.detach() * 0.9 for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(model, x):
        with torch.no_grad(), averaged(model, averages, way):
            wished = model(x).softmax(1)
        return F.cross_entropy(model(x), wished)

    x = torch.randn(8, 2, 6, 6)
    said = r"0\.weight was changed inside loss, in micro-batch 0.*before 1 \(BatchNorm2d\).*functional_call"
    with pytest.raises(ArgumentError, match=said):
        normkit.accumulate(model, x.split(4), loss, kind="exact")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    # Where no norm of the batch's stands between, nobody else sees it.
    def without_norms(model, x):
        model.eval()
        with torch.no_grad(), averaged(model, averages, way):
            wished = model(x).softmax(1)
        model.train()
        return F.cross_entropy(model(x), wished)

    if way != "counted":
        normkit.accumulate(model, x.split(4), without_norms, kind="exact")
        assert all(parameter.grad is not None for parameter in model.parameters())
    else:
        # Autograd counts the writes into what the first micro-batch's backward is to use.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            normkit.accumulate(model, x.split(4), without_norms, kind="exact")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_an_embedding_that_keeps_its_rows_short_is_taken():
    class Words(Net):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(3, 5, max_norm=0.5)

        def forward(self, x):
            return super().forward(x + self.words((x.sum(1) > 0).long()))

    model, _ = assert_is_the_large_batch(network(Words), plain_loss)
    assert (model.words.weight[:2].norm(dim=1) < 0.51).all()


def test_a_weight_that_stays_changed_is_refused_at_the_end():
    def loss(model, batch):
        value = plain_loss(model, batch)
        model.leave.bias.data.add_(1)
        return value

    with pytest.raises(ArgumentError, match=r"leave\.bias was changed inside loss, in micro-batch 0.*at its end"):
        normkit.accumulate(network(), micro(*data()), loss, kind="exact")


@pytest.mark.parametrize("readable", [("cpu",), ()], ids=["read", "by operations"])
def test_weights_of_every_type_and_size_can_be_probed(readable, monkeypatch):
    monkeypatch.setattr("normkit.parts.weights._READABLE", readable)

    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.none, self.one = nn.Parameter(torch.empty(0)), nn.Parameter(torch.tensor(float("nan")))
            self.narrow, self.turned = nn.Parameter(torch.ones(7).half()), nn.Parameter(torch.ones(3, 5).t())
            self.complex = nn.Parameter(torch.ones(3, dtype=torch.complex64))
            self.nowhere = nn.Parameter(torch.empty(3, device="meta"))
            self.expanded = nn.Parameter(torch.ones(1).expand(4, 3), requires_grad=False)

    (x, y), model = data(), Odd()
    normkit.accumulate(model, micro(x.float(), y), plain_loss, kind="exact")

    def loss(model, batch):
        model.narrow.data.mul_(2)
        return plain_loss(model, batch)

    with pytest.raises(ArgumentError, match="narrow was changed"):
        normkit.accumulate(model, micro(x.float(), y), loss, kind="exact")


def test_a_buffer_that_is_replaced_in_every_forward_is_told_of():
    class Average(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.zeros(()))

        def forward(self, x):
            self.average = self.average * 0.9 + x.detach().mean()
            return super().forward(x)

    with pytest.warns(UserWarning, match="average changed in the forwards of 3 micro-batches"):
        normkit.accumulate(network(Average), micro(*data()), plain_loss, kind="exact")


def test_what_is_registered_where_nothing_was_is_each_micro_batchs_own():
    def loss(model, batch):
        assert "seen" not in model.middle._buffers
        assert not model.leave._forward_pre_hooks
        model.middle.register_buffer("seen", batch[0])
        model.leave.register_forward_pre_hook(lambda module, given: (given[0] * len(batch[0]),))
        value = plain_loss(model, batch)
        assert len(model.leave._forward_pre_hooks) == 1
        return value

    model, (x, y) = network(), data()
    normkit.accumulate(model, micro(x, y), loss, kind="exact")
    assert len(model.middle.seen) == SPLIT[-1]


@pytest.mark.parametrize("activation", [None, "relu"])
def test_weights_of_a_norm_that_differ_from_one_micro_batch_to_the_next(activation):
    norm = normkit.BatchNormAct1d(5, activation=activation).double()
    (x, _), factors = data(), torch.arange(1, 13).double()

    def loss(norm, batch):
        own = {"weight": norm.weight * batch[1][0], "bias": norm.bias + batch[1][0]}
        return torch.func.functional_call(norm, own, (batch[0],)).pow(3).mean()

    normkit.accumulate(norm, list(zip(x.split(SPLIT), factors.split(SPLIT), strict=True)), loss, kind="exact")
    weight, bias = (torch.full((5,), value).double().requires_grad_() for value in (1.0, 0.0))
    scale = torch.cat([each[:1].expand(len(each)) for each in factors.split(SPLIT)])[:, None]
    y = F.batch_norm(x, None, None, training=True) * weight * scale + bias + scale
    (y.relu() if activation else y).pow(3).mean().backward()
    assert_close(norm.weight.grad, weight.grad, dtype=torch.float64)
    assert_close(norm.bias.grad, bias.grad, dtype=torch.float64)


def test_a_model_that_loss_puts_into_training_mode_is_synchronized():
    model, (x, y) = network(lambda: Net(normkit.SyncBatchNorm)).eval(), data()
    large, ranks = copy.deepcopy(model).train(), normkit.simulate(model, ranks=2)

    def loss(model, batch):
        return plain_loss(model.train(), batch)

    plain_loss(large, (x, y))
    step = lambda model, x, y: normkit.accumulate(model, micro(x, y, 2), loss, kind="exact")  # noqa: E731
    ranks.run(step, x.split(6), y.split(6))
    assert_close(ranks.models[1].first.running_mean, large.first.running_mean, dtype=torch.float64)
    assert_close(ranks.models[1].second.running_var, large.second.running_var, dtype=torch.float64)


class Scripted(nn.Module):
    """Weights, a buffer that the forward reads, and no norm."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("shift", torch.ones(5))

    def forward(self, x):
        return self.linear(x).relu() + self.shift


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_a_scripted_part_takes_its_share_of_the_large_batch():
    torch.manual_seed(0)
    model = nn.Sequential(torch.jit.script(Scripted()), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x = torch.randn(12, 5, dtype=torch.float64)

    def loss(model, x):
        return model(x).square().mean()

    normkit.accumulate(model, x.split(SPLIT), loss, kind="exact")
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss(model, x).backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert_close(gradient, parameter.grad, dtype=torch.float64, what="gradient")


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        if x.size(0) > 0:
            self.seen = x.size(0)
        return x * self.seen


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_a_scripted_part_that_keeps_what_it_saw_is_refused():
    model = nn.Sequential(nn.Linear(5, 5), torch.jit.script(Counting()), nn.BatchNorm1d(5))
    with pytest.raises(ArgumentError, match=r"1 is a ScriptModule that assigns an attribute.*or kind=.statistics"):
        normkit.accumulate(model, torch.randn(12, 5).split(SPLIT), lambda model, x: model(x).sum(), kind="exact")
