"""What the processes of a group compute, by name."""

import contextlib
import copy
import functools
import os
import pickle
import random
import time
import warnings
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normkit
from normkit.errors import SyncError

from .cases import CASES, names, of_rank
from .forms import FORMS
from .forms import names as form_name
from .forms import of_rank as form_of_rank
from .processes import asked, started


def matrix(rank: int, ranks: int):
    """Every case, each in a group of as many ranks as it asks for."""
    groups = {size: distributed.new_group(list(range(size))) for size in range(1, ranks + 1)}
    found = {}
    for case in asked(CASES):
        if rank < case.ranks:
            layer = case.layer(sync=True, process_group=groups[case.ranks])
            found[names(case)] = of_rank(case, layer, rank)
    return found


def words(call) -> str:
    """Return the type and message of what a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _net(**given) -> nn.Module:
    torch.manual_seed(0)
    norms = [normkit.SyncBatchNorm(4, **given), normkit.SyncBatchNorm(2, **given)]
    # A bias before a norm would have a gradient of rounding alone.
    return nn.Sequential(nn.Linear(3, 4, bias=False), norms[0], nn.Tanh(), nn.Linear(4, 2, bias=False), norms[1])


def _share(rank: int, ranks: int) -> torch.Tensor:
    data = torch.randn(3 * ranks + 2, 3, generator=torch.Generator().manual_seed(5))
    return data[3 * rank : 3 * rank + 3] if rank < ranks - 1 else data[3 * rank :]


def _state(net: nn.Module) -> dict:
    gradients = {f"grad {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {name: value.clone() for name, value in net.state_dict().items()} | gradients


def _collectives(call) -> int:
    """Count what a call exchanges."""
    before = distributed.all_gather
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return before(*args, **kwargs)

    distributed.all_gather = counted
    try:
        call()
    finally:
        distributed.all_gather = before
    return count


def around(rank: int, ranks: int):
    """A net among what else torch does: checkpointing, data parallelism, compilation, evaluation."""
    x = _share(rank, ranks)
    cotangent = torch.linspace(-1, 1, 2 * len(x)).reshape(-1, 2) + rank
    found = {}

    def trained(net, forward=None):
        net.zero_grad()
        ((forward or net)(x) * cotangent).sum().backward()

    plain = _net()
    trained(plain)  # the first call agrees on the layers
    found["plain"] = _state(plain)
    trained(plain)  # and the second on their order
    found["exchanges"] = _collectives(lambda: trained(plain))
    for reentrant in (False, True):
        net = _net()

        def forward(x, net=net, reentrant=reentrant):
            x = x.clone().requires_grad_()
            first, last = net[:3], net[3:]
            hidden = checkpoint(first, x, use_reentrant=reentrant)
            return checkpoint(last, hidden, use_reentrant=reentrant)

        trained(net, forward)
        found[f"checkpoint {reentrant}"] = _state(net)
        trained(net, forward)
        found[f"exchanges of checkpoint {reentrant}"] = _collectives(functools.partial(trained, net, forward))
    net = _net()
    compiled = torch.compile(net, backend="aot_eager")
    with warnings.catch_warnings():
        # torch's own, where its graph goes on after a layer with a tensor that is no leaf.
        warnings.filterwarnings("ignore", message="The .grad attribute")
        trained(net, compiled)
    found["compiled"] = _state(net)
    net = _net()
    parallel = DistributedDataParallel(net)
    with parallel.no_sync():
        trained(net, parallel)
    found["no_sync"] = _state(net)
    trained(net, parallel)
    found["parallel"] = _state(net)
    plain.eval()
    found["exchanges of evaluation"] = _collectives(lambda: plain(x))
    found["copied"] = torch.equal(copy.deepcopy(plain)(x), plain(x))
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        net = fully_shard(_net(), mesh=mesh)
        trained(net)
        found["sharded"] = {name: value.clone() for name, value in net.named_buffers()}
    except Exception as error:
        found["sharded"] = f"{type(error).__name__}: {error}"
    return found


def mistakes(rank: int, ranks: int):
    """What is called wrongly: on every rank an error, and no buffer has moved."""
    last, said = rank == ranks - 1, {}
    x = _share(rank, ranks)

    def tried(name, call, *layers):
        before = [{key: value.clone() for key, value in layer.state_dict().items()} for layer in layers]
        said[name] = words(call)
        same = all(
            torch.equal(value, state[key])
            for layer, state in zip(layers, before, strict=True)
            for key, value in layer.state_dict().items()
        )
        said[f"{name}: still"] = same

    norm, other = normkit.SyncBatchNorm(3), normkit.SyncBatchNorm(3)
    norm(x), other(x)
    tried("channels", lambda: norm(x[:, :2] if last else x), norm)
    tried("types", lambda: norm(x.bfloat16() if last else x), norm)
    tried("rank of input", lambda: norm(x[0] if last else x), norm)

    def unrecorded():
        with torch.set_grad_enabled(not last):
            norm(x)

    tried("modes", unrecorded, norm)
    tried("layers", lambda: (other if last else norm)(x), norm, other)

    def momentum():
        norm.momentum = 0.3 if last else 0.1
        norm(x)

    tried("settings", momentum, norm)
    norm.momentum = 0.1
    tried("sizes", lambda: normkit.SyncBatchNorm(3 if last else 2)(x))
    tried("one value", lambda: norm(x[:1] if last else x[:0]), norm)
    tried("nothing", lambda: norm(x[:0]), norm)
    tried("transform", lambda: torch.func.vmap(norm)(x[None]), norm)
    y = norm(x.clone().requires_grad_())
    tried("ways", lambda: norm(x) if last else y.sum().backward(), norm)
    group = distributed.new_group([0])
    outside = normkit.SyncBatchNorm(3, process_group=group)
    tried("outside", lambda: outside(x), outside)
    before = norm.running_mean.clone()
    norm(x)
    said["goes on"] = not torch.equal(norm.running_mean, before)
    return said


def late(rank: int, ranks: int):
    """One rank leaves out a call, and one calls in evaluation mode, which exchanges nothing."""
    norm = normkit.SyncBatchNorm(3)
    x = _share(rank, ranks)
    norm(x)
    norm.timeout = 1.0
    before, started = norm.running_mean.clone(), time.monotonic()
    norm.train(rank != ranks - 1)
    said = words(lambda: norm(x))
    waited = time.monotonic() - started
    return {"said": said, "waited": waited, "still": torch.equal(before, norm.running_mean)}


def _killed(rank: int, ranks: int, round: str):
    net, rounds = _net(timeout=4.0), int(round)
    x = _share(rank, ranks)
    generator = random.Random(rounds)
    dies, step, phase = generator.randrange(ranks), generator.randrange(4), generator.randrange(3)
    for turn in range(50):
        ends = turn == step and rank == dies
        begun = time.monotonic()
        if ends and phase == 0:
            os._exit(9)
        try:
            if ends and phase == 1:
                net[1].register_forward_hook(lambda *_: os._exit(9))
            y = net(x)
            if ends:
                os._exit(9)
            y.square().sum().backward()
        except SyncError as error:
            # Four seconds, what the roll call takes, and what a busy machine does.
            waited = time.monotonic() - begun
            # Without goodbye: the group is broken.
            os._exit(0 if waited < 12 and "SyncBatchNorm" in str(error) else 6)
    os._exit(5)


def killed(ranks: int, folder: Path):
    """Twenty times one of the ranks dies at a random moment; the others must end by themselves, with an error."""
    for turns in range(0, 20, 5):
        rounds = [started(_killed, ranks, folder, f"kill{turn}", (str(turn),)) for turn in range(turns, turns + 5)]
        for processes in rounds:
            ended = [process.join(60) or process.exitcode for process in processes]
            assert sorted(ended, key=str) == [0] * (ranks - 1) + [9], ended


killed.forks = True


def accumulated(rank: int, ranks: int):
    """Micro-batches on each rank, under data parallelism: all of them are one batch."""
    x, low = torch.cat([_share(place, ranks) for place in range(ranks)]).double(), (0, 3, 6, 11)
    mine = x[low[rank] : low[rank + 1]]
    torch.manual_seed(2)
    net = _net().double()
    # It would send buffers round in every forward, of which ranks have different numbers.
    with warnings.catch_warnings():
        # Newer versions of torch have another word for it.
        warnings.simplefilter("ignore", FutureWarning)
        parallel = DistributedDataParallel(net, broadcast_buffers=False)
    # Data parallelism averages over ranks, whose shares are not of one size.
    share = len(mine) * ranks / len(x)
    for _ in range(2):
        net.zero_grad()
        normkit.accumulate(parallel, list(mine.split(2)), lambda net, x: net(x).pow(3).mean() * share, kind="exact")
    return _state(net)


def buckets(rank: int, ranks: int):
    """Gradients that lie in the memory into which data parallelism gathers the next ones: steps, and one that fails."""
    mine, found = torch.cat([_share(place, ranks) for place in range(ranks)]).double().tensor_split(ranks)[rank], {}
    for kind in ("exact", "statistics"):
        for views in (False, True):
            torch.manual_seed(2)
            net = _net().double()
            parallel = DistributedDataParallel(net, gradient_as_bucket_view=views)

            micro, steps = list(mine.split(2)), []
            for step in range(4):
                if step == 2:
                    net.zero_grad(set_to_none=False)
                normkit.accumulate(parallel, micro, _cubed, kind=kind)
                steps.append([parameter.grad.clone() for parameter in net.parameters()])
            with contextlib.suppress(RuntimeError):
                normkit.accumulate(parallel, micro, _failing, kind=kind)
            found[kind, views] = [*steps, [parameter.grad.clone() for parameter in net.parameters()]]
    return found


def _cubed(net, x):
    return net(x).pow(3).mean()


def _failing(net, x):
    value = _cubed(net, x)
    value.register_hook(_refuse)
    return value


def _refuse(gradient):
    raise RuntimeError("no gradient")


class _Block(nn.Module):
    """A norm between two layers, in one module to be sharded."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4, bias=False), norm, nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return x + self.last(self.norm(self.first(x)).tanh())


def blocks(norm: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(_Block(norm(4)), norm(3), _Block(norm(4))).double()


def sharded(rank: int, ranks: int):
    """Micro-batches of a net whose weights the ranks share out, whole, by blocks and by layers."""
    mesh = init_device_mesh("cpu", (ranks,))
    data = torch.randn(8 * ranks, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mine = data[8 * rank : 8 * rank + 8]
    found = {"data": data}
    for how in ("whole", "blocks", "layers", "let go"):
        for kind in ("exact", "statistics"):
            net = blocks(normkit.SyncBatchNorm)
            for block in (net[0], net[2]):
                if how == "layers":
                    for layer in (block.first, block.last):
                        fully_shard(layer, mesh=mesh)
                elif how != "whole":
                    fully_shard(block, mesh=mesh, reshard_after_forward=how == "let go")
            fully_shard(net, mesh=mesh)
            parts = list(mine.split([3, 5]))
            step = functools.partial(normkit.accumulate, net, parts, lambda net, x: net(x).pow(3).mean(), kind=kind)
            said = words(step)
            if said == "nothing":
                step()  # adds to the gradients that there are
                gradients = {f"grad {name}": p.grad.full_tensor() for name, p in net.named_parameters()}
                found[f"{kind} {how}"] = gradients | {name: value.clone() for name, value in net.named_buffers()}
            else:
                none = all(p.grad is None for p in net.parameters())
                found[f"{kind} {how}"] = (
                    said,
                    none and all(int(n.num_batches_tracked) == 0 for n in (net[1], net[0].norm)),
                )
    return found


def sizes(rank: int, ranks: int):
    """Layers of different sizes, rows of whose lengths a transport would not survive; one that is new on some ranks."""
    layers = [normkit.SyncBatchNorm(size) for size in (3, 64, 5)]
    inputs = [torch.randn(4, size, requires_grad=True) for size in (3, 64, 5)]

    def step():
        for layer, x in zip(layers[:2], inputs, strict=False):
            layer(x).sum().backward()

    counts = [_collectives(step) for _ in range(4)]
    before = [layer.running_mean.clone() for layer in layers]
    found = {"counts": counts}
    found["apart"] = words(lambda: layers[rank % 2](inputs[rank % 2]))
    found["new"] = words(lambda: layers[1 + rank % 2](inputs[1 + rank % 2]))
    bare = functools.partial(normkit.functional.sync_batch_norm, training=True)
    found["bare"] = words(lambda: bare(inputs[rank % 2], None, None))
    found["still"] = all(map(torch.equal, before, [layer.running_mean for layer in layers]))
    step()  # and all goes on where nothing else happened
    found["again"] = [int(layer.num_batches_tracked) for layer in layers]
    return found


class _Skipping(nn.Module):
    """Blocks of equal layers, of which one may be left out."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), normkit.SyncBatchNorm(3)) for _ in range(4))

    def forward(self, x, skip: int = -1):
        for place, block in enumerate(self.blocks):
            if place != skip:
                x = x + block(x)
        return x


def cold(rank: int, ranks: int):
    """Layers of equal settings that were never called before: swapped, skipped, one in evaluation; and alike ones."""
    x, said = _share(rank, ranks), {}

    def tried(name, net, call):
        before = {key: value.clone() for key, value in net.state_dict().items()}
        said[name] = words(call)
        said[f"{name}: still"] = all(torch.equal(value, before[key]) for key, value in net.state_dict().items())

    swapped = nn.Sequential(normkit.SyncBatchNorm(3), normkit.SyncBatchNorm(3))
    tried("swapped", swapped, lambda: swapped[rank % 2](x))
    depth = _Skipping()
    tried("depth", depth, lambda: depth(x, rank))
    asleep = _Skipping()
    asleep.blocks[0][1].train(rank != 1)
    tried("mode", asleep, lambda: asleep(x))
    depth.eval().train()
    depth(x)
    depth.blocks[1][1].train(rank != 1)
    before = depth.blocks[1][1].running_mean.clone()
    said["warm mode"] = words(lambda: depth(x))
    said["warm mode: still"] = torch.equal(before, depth.blocks[1][1].running_mean)
    # What is one layer, however each rank holds it.
    net = _Skipping()
    held = (lambda: net, lambda: DistributedWrapper(net), lambda: pickle.loads(pickle.dumps(net)))[rank % 3]()
    said["held otherwise"] = words(lambda: held(x))
    if rank == 0:
        said["copies"] = [copy.deepcopy(held), nn.ModuleList([held]), nn.ModuleList([held.blocks[2]])]
    said["held twice"] = words(lambda: held(x))
    said["copies"] = None
    alone = [normkit.SyncBatchNorm(3) for _ in range(2)]
    said["alone"] = words(lambda: [layer(x) for layer in alone])
    return said


class DistributedWrapper(nn.Module):
    """What a wrapper around a model is."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def detailed(rank: int, ranks: int):
    """The same with torch's own debugging."""
    layers = [normkit.SyncBatchNorm(size) for size in (3, 64)]
    inputs = [torch.randn(4, size) for size in (3, 64)]
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
    before = layers[rank].running_mean.clone()
    said = words(lambda: layers[rank](inputs[rank]))
    still = torch.equal(before, layers[rank].running_mean)
    return {"said": said, "still": still, "exchanges": _collectives(lambda: layers[0](inputs[0]))}


def forms(rank: int, ranks: int):
    """Every masked and ghost batch of the table; what is exchanged for them, and what is called wrongly."""
    groups = {size: distributed.new_group(list(range(size))) for size in range(1, ranks + 1)}
    found = {}
    for form in asked(FORMS):
        if rank < form.ranks:
            layer = form.layer(process_group=groups[form.ranks])
            found[form_name(form)] = form_of_rank(form, layer, rank)
    x, mask = torch.randn(4, 3, 5 + rank), torch.ones(4, 5 + rank, dtype=torch.bool)
    layers = {"masked": normkit.SyncBatchNorm(3), "ghost": normkit.SyncBatchNorm(3, ghost_size=2)}
    for name, layer in layers.items():
        given = (mask,) if name == "masked" else ()

        def step(layer=layer, given=given):
            layer(x.clone().requires_grad_(), *given).pow(2).sum().backward()

        def again(layer=layer, given=given):
            hidden = x.clone().requires_grad_()
            checkpoint(lambda x: layer(x, *given).pow(2), hidden, use_reentrant=False).sum().backward()

        step(), step(), again()
        count = int(layer.num_batches_tracked)
        found[f"exchanges of {name}"] = [_collectives(step), _collectives(again)]
        found[f"batches of {name}"] = int(layer.num_batches_tracked) - count
        evaluation = copy.deepcopy(layer).eval()
        found[f"exchanges of {name}"].append(_collectives(functools.partial(evaluation, x)))
    last = rank == ranks - 1

    def tried(name, call, layer):
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        found[name] = words(call)
        found[f"{name}: still"] = all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())

    masked, ghost = layers["masked"], layers["ghost"]
    tried("mask shape", lambda: masked(x, mask[:, :2] if last else mask), masked)
    tried("mask type", lambda: masked(x, mask.int() if last else mask), masked)
    single = torch.zeros_like(mask)
    single[0, 0] = last
    tried("one valid", lambda: masked(x, single), masked)
    tried("none valid", lambda: masked(x, mask & False), masked)
    vectors = normkit.SyncBatchNorm(3, ghost_size=2)
    tried("part of one", lambda: vectors(x[:1, :, 0] if last else x[..., 0]), vectors)
    ghost.ghost_size = 3 if last else 2
    tried("sizes", lambda: ghost(x), ghost)
    ghost.ghost_size = 2
    tried("both", lambda: ghost(x, mask), ghost)
    model = nn.Sequential(normkit.SyncBatchNorm(3, ghost_size=2, momentum=1.0)).double()
    data = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    loss = normkit.accumulate(model, list(data.split([5, 3])), lambda model, x: model(x).pow(3).mean())
    found["accumulated"] = (data, model[0].running_var.clone(), int(model[0].num_batches_tracked), loss)
    refused = words(lambda: normkit.accumulate(model, [data], lambda model, x: model(x).mean(), kind="exact"))
    found["accumulated exactly"] = refused
    masks = torch.rand(8, 4, generator=torch.Generator().manual_seed(9 + rank)) < 0.7
    norm = normkit.SyncBatchNorm(3, momentum=1.0).double()
    parts = list(zip(data.split([5, 3]), masks.split([5, 3]), strict=True))
    loss = normkit.accumulate(norm, parts, lambda norm, part: norm(*part).pow(3).mean(), kind="exact")
    found["accumulated masked"] = (masks, norm.running_var.clone(), norm.weight.grad.clone(), loss)
    return found
