"""A right kernel is timed with its errors, a wrong one is refused; nothing here looks at how long anything took."""

import gc
import json
import math
from functools import partial

import pytest
import torch

import normkit
import tolerances
from normkit.bench import correctness
from normkit.bench.cases import OURS, make_case, make_peers
from normkit.bench.document import new_document, read_document, reuse_memory, write_document
from normkit.bench.imports import measure_imports
from normkit.bench.measure import NotTimed, limit_threads, measure, measure_row
from normkit.bench.networks import BUILDERS, LeNet, ResNet
from normkit.bench.shapes import CHAINS, DTYPES, LAYOUTS, WORKS, Row, Shape
from normkit.bench.timing import interleave, summarize
from normkit.bench.training import CASES, TrainingCase, measure_training
from normkit.errors import ResultsError, RunError
from normkit.kernels.numba.channels import passes as channel_passes

TINY = Shape((3, 5, 7, 2))


def row(work="forward+backward", chain="bn+add+relu", dtype="float32", layout="contiguous", name="edge", shape=TINY):
    return Row(name, shape, dtype, layout, work, chain)


def compared(case, **more):
    return correctness.compare(case, {name: peer.results() for name, peer in make_peers(case, **more).items()})


def test_tolerances_are_those_of_the_tests():
    assert {dtype: tolerances.RELATIVE[dtype] for dtype in DTYPES.values()} == correctness.RELATIVE


# Every work and chain in float32; each half precision type once, with all that a row can hold.
COMPARED = (
    *((work, chain, "float32", layout, "edge") for layout in LAYOUTS for work in WORKS for chain in CHAINS),
    *((work, chain, "float32", "contiguous", "mobilenetv2") for work in WORKS for chain in CHAINS if chain != "bn"),
    ("forward+backward", "bn+add+relu", "bfloat16", "contiguous", "edge"),
    ("forward+backward", "bn+add+relu", "float16", "channels_last", "edge"),
)


@pytest.mark.parametrize(("work", "chain", "dtype", "layout", "name"), COMPARED)
def test_every_peer_of_a_row_agrees_with_the_reference(work, chain, dtype, layout, name):
    case = make_case(row(work, chain, dtype, layout, name))
    errors = compared(case)
    assert not correctness.faults(errors[OURS], DTYPES[dtype])
    # torch rounds to half precision after each of three operations, ours once.
    allowed = 4 * correctness.RELATIVE[DTYPES[dtype]]
    for peer, of in errors.items():
        assert max(of.by_name.values()) <= allowed, (peer, of)
    names = {"output"} if work == "eval" else {"output", "running_mean", "running_var"}
    if work == "forward+backward":
        names |= {"dx", "dweight", "dbias"} | ({"dresidual"} if case.residual is not None else set())
    assert errors[OURS].by_name.keys() == names


@pytest.mark.parametrize("sizes", [(4, 3), (4, 3, 5), (2, 1, 1), (2, 3, 2, 2, 3)])
def test_every_rank_is_checked_in_all_its_channels(sizes, monkeypatch):
    case = make_case(row(shape=Shape(sizes)))
    found = {name: peer.results() for name, peer in make_peers(case).items()}
    assert not correctness.faults(correctness.compare(case, found)[OURS], torch.float32)
    monkeypatch.setattr(correctness, "_VALUES", 1)  # one channel at a time
    found[OURS]["output"][:, -1] += 1
    (fault,) = correctness.faults(correctness.compare(case, found)[OURS], torch.float32)
    assert fault.startswith("output is off by ")


def test_case_is_laid_out_as_its_row_says():
    shape = Shape((2, 6, 4, 5))
    strides = {
        "contiguous": (120, 20, 5, 1), "channels_last": (120, 1, 30, 6), "sliced": (240, 20, 5, 1),
        "permuted": (120, 5, 30, 1),
    }  # fmt: skip
    for layout, expected in strides.items():
        case = make_case(row("forward", "bn", layout=layout, shape=shape))
        assert case.x.stride() == expected
        # The same numbers in every layout.
        assert torch.equal(case.x, make_case(row("forward", "bn", shape=shape)).x)


def test_cotangent_is_zero_next_to_the_kinks_and_elsewhere_not():
    case = make_case(row(name="mobilenetv2", chain="bn+relu", shape=Shape((16, 4, 32, 32))))
    z = torch.nn.functional.batch_norm(
        case.x.detach().double(), None, None, case.state["weight"].double(), case.state["bias"].double(), training=True
    )
    near = ((z.abs() < 5e-4) | ((z - 6).abs() < 5e-4)).nonzero(as_tuple=True)
    assert len(near[0])
    assert not case.dy[near].any()
    assert (case.dy != 0).float().mean() > 0.99


@pytest.mark.usefixtures("python_path")  # where the kernel is made wrong
@pytest.mark.parametrize("spoiled", ["output", "one value", "nan", "running", "gradient"])
def test_a_planted_wrong_kernel_is_named_and_not_timed(monkeypatch, spoiled):
    true_forward, true_backward = channel_passes.forward, channel_passes.backward

    def forward(x, layout, weight, bias, running_mean, *more):
        y, saved = true_forward(x, layout, weight, bias, running_mean, *more)
        if spoiled == "output":
            y += 1e-4
        elif spoiled == "one value":
            y.view(-1)[-1] += 1e-4
        elif spoiled == "nan":
            y.view(-1)[0] = math.nan
        elif spoiled == "running":
            running_mean[-1] += 1e-4
        return y, saved

    def backward(*arguments):
        dx, *rest = true_backward(*arguments)
        return (dx * 1.0001 if spoiled == "gradient" else dx, *rest)

    monkeypatch.setattr(channel_passes, "forward", forward)
    monkeypatch.setattr(channel_passes, "backward", backward)
    monkeypatch.setattr("normkit.bench.measure.interleave", lambda *_, **__: pytest.fail("a wrong kernel was timed"))
    named = {"running": "running_mean", "gradient": "dx"}.get(spoiled, "output")
    with pytest.raises(RunError, match=f"the numba kernel is wrong: {named} is off by"):
        measure_row(row(), seconds=0.0)


@pytest.mark.usefixtures("python_path")
def test_a_wrong_row_does_not_keep_the_others_from_being_timed(monkeypatch):
    true_forward = channel_passes.forward

    def forward(x, *more):
        y, saved = true_forward(x, *more)
        return (y + 1e-3 if x.dtype is torch.float32 else y), saved

    monkeypatch.setattr(channel_passes, "forward", forward)
    bad, good = measure([row("forward", "bn"), row("forward", "bn", "bfloat16")], seconds=0.0, least=1)
    assert (bad.row, bad.wrong) == (row("forward", "bn").name, True)
    assert "output is off by 0.000" in bad.reason
    assert good["peers"]["normkit"]["samples"] == 1


def test_a_sum_that_cancels_is_judged_by_what_its_terms_allow():
    case = make_case(row(chain="bn", shape=Shape((400, 1, 100))))
    case.dy[:] = torch.linspace(-1, 1, 100)  # sums to nothing; a typical sum of as many values is 200
    found = make_peers(case)[OURS].results()
    found["dbias"] = found["dbias"] + 3e-4
    assert not correctness.faults(correctness.compare(case, {OURS: found})[OURS], torch.float32)
    found["dbias"] = found["dbias"] + 3e-3
    (fault,) = correctness.faults(correctness.compare(case, {OURS: found})[OURS], torch.float32)
    assert fault.startswith("dbias is off by")


def test_a_measured_row_holds_what_a_document_needs(tmp_path):
    with limit_threads(1) as threads:
        found = list(measure([row(), row("eval", "bn")], seconds=0.0, least=2))
    document = new_document({"reuse_memory": False}, threads)
    document["rows"] = found
    path = tmp_path / "rows.json"
    write_document(path, document)
    assert read_document(path) == json.loads(json.dumps(document))
    first, second = found
    assert first["backend"] == "numba"
    assert list(first["peers"]) == ["torch", "normkit", "torch in place", "copy", "clone"]
    assert list(second["peers"]) == ["torch", "normkit", "copy", "clone"]
    ours, copy = first["peers"]["normkit"], first["peers"]["copy"]
    assert ours["samples"] == 2
    assert 0 < ours["low"] <= ours["median"] <= ours["high"]
    assert ours["ns_per_element"] == pytest.approx(ours["median"] * 1e9 / 210)
    assert ours["gb_per_second"] == pytest.approx(7 * 840 / ours["median"] / 1e9)
    assert copy["gb_per_second"] == pytest.approx(2 * 840 / copy["median"] / 1e9)
    assert ours["error"] <= 2e-6
    assert ours["gradient_error"] <= 2e-6
    assert second["peers"]["normkit"]["gradient_error"] is None
    assert copy["error"] is None
    assert {"cpu", "cores", "threads", "load"} <= document["machine"].keys()
    assert {"torch", "numba", "normkit"} <= document["versions"].keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "not written by"),
        ('{"schema": "normkit-bench/1"}', "'date' is missing"),
    ],
)
def test_a_file_that_is_no_document_is_refused(tmp_path, content, message):
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultsError, match=message):
        read_document(path)


def test_a_row_without_its_peers_is_refused(tmp_path):
    document = new_document({}, 1)
    document["rows"] = [{"set": "edge"}]
    write_document(tmp_path / "rows.json", document)
    with pytest.raises(ResultsError, match="row 0 is not complete"):
        read_document(tmp_path / "rows.json")


def test_a_row_that_does_not_fit_the_memory_is_left_out_with_a_word(monkeypatch):
    class Memory:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    (skipped,) = measure([row()], seconds=0.0)
    assert isinstance(skipped, NotTimed)
    assert not skipped.wrong
    assert "GB of memory" in skipped.reason
    assert skipped.row == row().name


def test_calls_are_interleaved_and_the_order_rotates():
    order = []
    timings = interleave({name: lambda name=name: order.append(name) for name in "abc"}, seconds=0.0, least=3)
    assert {name: timing.samples for name, timing in timings.items()} == dict.fromkeys("abc", 3)
    turns = [name for number, name in enumerate(order) if number == 0 or order[number - 1] != name]
    # Warmed one after another, then a-b-c, b-c-a, c-a-b; the same name at a seam is one turn here.
    assert "".join(turns).endswith("abcbcacab")
    assert gc.isenabled()


def test_quantiles_are_those_of_the_samples():
    timing = summarize([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (timing.low, timing.median, timing.high, timing.samples) == (2.0, 3.5, 5.0, 6)
    assert summarize([2.0]).high == 2.0


def test_threads_are_limited_inside_and_restored():
    before = torch.get_num_threads()
    with limit_threads(1) as count:
        assert count == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_training_compares_networks_with_the_same_weights():
    resnet = TrainingCase("ResNet", partial(ResNet, width=4), (4, 3, 8, 8), "channels_last")
    found = list(measure_training((resnet, TrainingCase("LeNet-5", LeNet, (16, 1, 28, 28))), seconds=0.0))
    assert [entry["network"] for entry in found] == ["ResNet", "LeNet-5"]
    for entry in found:
        assert list(entry["peers"]) == ["torch", "torch in place", "normkit", "normkit dropped in"]
        assert entry["loss_difference"] < 1e-4
        torch_time, ours = (entry["peers"][name]["median"] for name in ("torch", "normkit"))
        assert entry["ratio"] == pytest.approx(torch_time / ours)


@pytest.mark.parametrize(
    ("case", "count"), [(CASES[0], 4), (CASES[2], 15), (CASES[4], 2)], ids=["LeNet-5", "ResNet", "MLP"]
)
def test_training_uses_each_peers_own_layers(case, count):
    def kinds(builder):
        batch_norms = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
        fused = (normkit.BatchNormAct1d, normkit.BatchNormAct2d)
        found = [module for module in case.build(BUILDERS[builder]).modules() if isinstance(module, batch_norms)]
        ours = [module for module in found if type(module).__module__.startswith("normkit.")]
        held = [module for module in case.build(BUILDERS[builder]).modules() if isinstance(module, fused)]
        return len(found), len(ours), len(held)

    assert kinds("torch") == kinds("torch in place") == (count, 0, 0)
    assert kinds("normkit dropped in") == (count, count, 0)
    assert kinds("normkit") == (count, count, count)


def test_a_transformers_step_has_each_peers_own_layer_norm():
    for name, kind in (("torch", torch.nn.LayerNorm), ("torch in place", torch.nn.LayerNorm),
                       ("normkit", normkit.LayerNorm), ("normkit dropped in", normkit.LayerNorm)):  # fmt: skip
        found = [
            module for module in CASES[5].build(BUILDERS[name]).modules() if isinstance(module, torch.nn.LayerNorm)
        ]
        assert [type(module) for module in found] == [kind] * 3


def test_training_lays_images_and_filters_out_as_the_case_says():
    seen = []

    class Spied(ResNet):
        def forward(self, images):
            seen.append((images.stride(), self.conv.weight.stride()))
            return super().forward(images)

    case = TrainingCase("ResNet", partial(Spied, width=4), (2, 3, 8, 8), "channels_last")
    list(measure_training((case,), seconds=0.0))
    assert set(seen) == {((192, 1, 24, 3), (27, 1, 9, 3))}


def test_training_with_a_wrong_layer_is_refused():
    def wrong(*arguments):
        layer = BUILDERS["normkit"](*arguments)
        layer.register_forward_hook(lambda module, inputs, output: output * 1.1)
        return layer

    case = TrainingCase("ResNet", partial(ResNet, width=4), (4, 3, 8, 8))
    with pytest.raises(RunError, match="nothing was timed"):
        list(measure_training((case,), seconds=0.0, builders={"torch": BUILDERS["torch"], "normkit": wrong}))


def test_imports_are_interleaved_and_the_first_round_is_not_counted(monkeypatch):
    order = []

    def taken(module):
        order.append(module)
        return {"torch": 1.0, "normkit": 1.25}[module] + (10 if len(order) <= 2 else 0)

    monkeypatch.setattr("normkit.bench.imports._import", taken)
    found = measure_imports(2)
    assert found["overhead"] == pytest.approx(0.25)
    assert found["modules"]["torch"]["samples"] == 2
    assert order == ["normkit", "torch", "torch", "normkit", "normkit", "torch"]


def test_an_import_that_fails_is_named(monkeypatch):
    monkeypatch.setattr("normkit.bench.imports._MODULES", ("json", "absent_module"))
    with pytest.raises(RunError, match="import absent_module failed: ModuleNotFoundError"):
        measure_imports(1)


def test_memory_is_reused_only_where_the_library_can(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not reuse_memory()
