"""The summary's numbers, worked out by hand."""

import pytest

from normkit.bench.goals import slower, verdicts
from normkit.bench.markdown import markdown
from normkit.bench.summary import TABLE, geometric_mean, groups, of_copy, ratio


def peer(median, gb=1.0, error=1e-7, noise=0.0):
    return {
        "median": median,
        "low": median - noise,
        "high": median + noise,
        "gb_per_second": gb,
        "error": error,
        "gradient_error": None,
    }


def made(shape, torch, ours, *, work="forward", chain="bn", dtype="float32", layout="contiguous", **more):
    noise = more.pop("noise", 0.0)
    peers = {"torch": peer(torch, error=1e-5, noise=noise), "normkit": peer(ours, gb=2.0, noise=noise),
             "copy": peer(1.0, gb=3.0), "clone": peer(1.0, gb=1.0)}  # fmt: skip
    row = {
        "set": "edge", "shape": shape, "count": 1, "dtype": dtype, "layout": layout, "work": work, "chain": chain,
        "activation": None, "elements": 10**6, "bytes": 80, "backend": "numba", "kernel": "",
    }  # fmt: skip
    rivals = {name: more.pop(name) for name in list(more) if isinstance(more[name], dict)}
    return {**row, "peers": peers | rivals, **more}


def document(**sections):
    return {
        "date": "2026-01-02T03:04:05+00:00", "complete": True, "settings": {"reuse_memory": False},
        "machine": {"cpu": "A processor", "vectors": "AVX512", "threads": 2, "cores": 4, "load": 0.1,
                    "last_level_cache": 32},
        "versions": {"torch": "2.13", "numba": "0.68", "normkit": "0.1.0"}, "commit": "0123456789abcdef",
        "rows": [], "wrong": [], "skipped": [], "training": [], "imports": [], **sections,
    }  # fmt: skip


def test_geometric_mean_of_a_ratio_and_its_inverse_is_one():
    assert geometric_mean([8.0, 0.125]) == pytest.approx(1.0)
    assert geometric_mean([2.0, 4.0, 8.0]) == pytest.approx(4.0)


def test_groups_hold_mean_worst_shape_and_errors():
    rows = [
        made([4, 3], 8.0, 1.0),
        made([2, 1, 1], 1.0, 2.0),
        made([4, 3], 3.0, 1.0, work="forward+backward", dtype="bfloat16"),
    ]
    first, second = groups(rows)
    assert (first.key, first.rows) == (("forward", "bn", "float32", "contiguous"), 2)
    assert first.faster == {"torch": pytest.approx(2.0)}
    assert (first.worst, first.worst_shape) == (0.5, "edge 2x1x1")
    assert (first.error, first.torch_error) == (1e-7, 1e-5)
    assert (first.goal, second.goal) == (4.0, 2.0)
    assert (first.met, second.met) == (False, True)
    assert ratio(rows[0]) == 8.0
    assert of_copy(rows[0]) == 1.5
    assert first.of_copy == pytest.approx(1.5)


def test_a_peer_that_some_rows_lack_has_no_mean():
    rows = [made([4, 3], 8.0, 1.0, **{"torch.compile": peer(2.0)}), made([2, 1], 1.0, 2.0)]
    (found,) = groups(rows)
    assert set(found.faster) == {"torch"}
    (found,) = groups(rows[:1])
    assert found.faster == {"torch": pytest.approx(8.0), "torch.compile": pytest.approx(2.0)}


def test_a_group_without_a_goal_is_not_judged():
    assert len(TABLE) == 18
    (found,) = groups([made([4, 3], 1.0, 1.0, work="eval", dtype="bfloat16")])
    assert found.goal is None
    assert found.met is None


def test_a_goal_is_judged_by_the_better_of_torchs_forms():
    goal = {"work": "forward+backward", "chain": "bn+relu"}
    (found,) = groups([made([4, 3], 6.0, 1.0, **goal, **{"torch in place": peer(2.9)})])
    assert (found.over_torch, found.worst) == (pytest.approx(2.9), pytest.approx(2.9))
    assert (found.goal, found.met) == (3.0, False)
    (found,) = groups([made([4, 3], 3.1, 1.0, **goal, **{"torch in place": peer(6.0)})])
    assert found.met
    assert "over torch in place" in markdown([document(rows=[made([4, 3], 6.0, 1.0, **{"torch in place": peer(2.9)})])])


def test_tiny_shapes_are_groups_of_their_own_with_goals_of_their_own():
    network, tiny = groups([made([4, 3], 8.0, 1.0), made([4, 3], 1.9, 1.0, set="tiny")])
    assert (network.rows, network.faster["torch"], network.goal) == (1, pytest.approx(8.0), 4.0)
    assert (tiny.key[3], tiny.goal, tiny.met) == ("tiny, contiguous", 2.0, False)


def judged(**sections):
    """The verdicts by their goals' first words."""
    return {verdict.goal[:20]: verdict for verdict in verdicts(document(**sections))}


def test_nothing_measured_is_not_judged():
    assert verdicts(document()) == []


def test_a_shape_is_slower_only_beyond_noise():
    slow, noisy = made([7, 3], 0.9, 1.0), made([5, 3], 0.9, 1.0, noise=0.06)
    for rows, met in (([noisy], True), ([noisy, slow], False), ([made([4, 3], 0.96, 1.0)], True)):
        assert judged(rows=rows)["no shape above 4096 "].met is met
        assert judged(rows=[{**row, "elements": 4096} for row in rows])["no input of up to 40"].met is met
    assert "1 of 2 are; mean 0.90, least 0.90 (edge" in judged(rows=[noisy, slow])["no shape above 4096 "].found


def test_what_is_slower_is_named_first_over_the_better_form_of_torch_and_beyond_noise_before_the_rest():
    rows = [
        made([4, 3], 1.5, 1.0),
        made([5, 3], 0.5, 1.0, noise=0.6),
        made([6, 3], 0.9, 1.0),
        made([7, 3], 2.0, 1.0, **{"torch in place": peer(0.75), "torch.compile": peer(0.1)}),
    ]
    step = {"network": "LeNet-5", "batch": [32, 1], "layout": "contiguous", "ratio": 0.95,
            "peers": {"torch": peer(0.95), "normkit": peer(1.0)}}  # fmt: skip
    found = slower(document(rows=rows, training=[step]))
    assert [(one.ratio, one.beyond_noise) for one in found] == [(0.75, True), (0.9, True), (0.95, True), (0.5, False)]
    assert str(found[0]) == "0.75 of torch's speed: edge 7x3 float32 contiguous forward bn"
    assert str(found[2]) == "0.95 of torch's speed: a training step, LeNet-5 32 contiguous"
    assert str(found[3]).startswith("0.50 of torch's speed, within noise: edge 5x3")
    _, first, second, *_ = markdown([document(rows=rows, training=[step])]).split("\n\n")
    assert first == "Slower than torch:"
    assert second.splitlines()[0] == f"- {found[0]}"
    assert "\n\nNothing is slower than torch.\n\n" in markdown([document(rows=rows[:1])])


def test_few_channels_are_judged_apart():
    few, many = made([4, 3], 12.0, 1.0, layout="channels_last"), made([4, 17], 2.0, 1.0, layout="channels_last")
    verdict = judged(rows=[few, many])["training forward, fl"]
    assert verdict.met
    assert verdict.found == "12.00 over 1 rows, least 12.00"
    assert not judged(rows=[made([4, 16], 9.9, 1.0, layout="channels_last")])["training forward, fl"].met


def test_compile_is_judged_in_each_row_of_the_table_and_together():
    def compiled(time, **more):
        return made([4, 3], 8.0, 1.0, **{"torch.compile": peer(time)}, **more)

    rows = [
        compiled(0.9),
        compiled(3.6, work="forward+backward"),
        compiled(2.5, work="eval"),
        compiled(0.1, work="eval", dtype="bfloat16"),
        compiled(0.1, set="tiny"),
    ]
    found = judged(rows=rows)
    assert not found["forward, bn, float32"].met
    assert found["forward+backward, bn"].met
    together = found["these together: 1.3 "]
    assert together.met
    assert together.found == "2.01 over 3 rows, least 0.90"


def test_a_large_forward_is_judged_by_a_copy_into_the_same_kind_of_memory():
    fresh, reused = (
        {verdict.goal: verdict for verdict in verdicts(document(rows=[made([4, 3], 8.0, 1.0)], settings=settings))}
        for settings in ({"reuse_memory": False}, {"reuse_memory": True})
    )
    goal = "training forward larger than the last cache: at most 1.5 times a copy into "
    assert fresh[f"{goal}fresh memory"].found == "0.50 over 1 rows, at most 0.50"
    assert fresh[f"{goal}fresh memory"].met
    assert reused[f"{goal}memory that is there"].found == "1.50 over 1 rows, at most 1.50"
    smaller = document(rows=[made([4, 3], 8.0, 1.0, bytes=64)])
    assert not [verdict for verdict in verdicts(smaller) if verdict.goal.startswith(goal)]


def step(network, torch, in_place, ours):
    peers = {"torch": peer(torch), "torch in place": peer(in_place), "normkit": peer(ours)}
    return {"network": network, "batch": [32, 1, 28, 28], "layout": "contiguous", "ratio": torch / ours, "peers": peers}


def test_a_training_step_must_beat_the_faster_of_torchs_two():
    won, lost = step("LeNet-5", 0.006, 0.005, 0.004), step("small ResNet", 0.006, 0.003, 0.004)
    assert judged(training=[won])["a training step at l"].met
    assert not judged(training=[step("LeNet-5", 0.0052, 0.00416, 0.004)])["a training step at l"].met
    verdict = judged(training=[won, lost])["a training step at l"]
    assert not verdict.met
    assert verdict.found.startswith("least 0.75 (small ResNet 32 contiguous); LeNet-5 32 contiguous 1.25")


@pytest.mark.parametrize(("overhead", "met"), [(0.05, True), (0.051, False)])
def test_an_import_may_cost_five_percent(overhead, met):
    assert judged(imports=[{"overhead": overhead, "modules": {"torch": peer(1.5)}}])["import normkit at mo"].met is met


def test_markdown_shows_machine_rows_copies_training_and_imports():
    steps = [step("LeNet-5", 0.005, 0.0045, 0.004)]
    imports = [{"overhead": 0.031, "modules": {"torch": peer(1.5), "normkit": peer(1.55)}}]
    wrong = [{"row": "edge 3x5", "reason": "off"}]
    skipped = [{"row": "unet3d 2x32x128x128x128", "reason": "needs 9.0 GB"}]
    text = markdown(
        [document(rows=[made([4, 3], 8.0, 1.0)], wrong=wrong, skipped=skipped, training=steps, imports=imports)]
    )
    lines = text.splitlines()
    assert lines[0].startswith("A processor (AVX512), 2 of 4 cores, load 0.1 at the start; torch 2.13")
    assert "normkit 0123456789ab; memory as the system gives it; 2026-01-02." in lines[0]
    assert (
        "| forward | bn | float32 | contiguous | 1 | 8.00 | 4 | yes | 1.50 | 8.00 (edge 4x3) | 1.0e-07 | 1.0e-05 |"
        in lines
    )
    assert "| LeNet-5 | 32x1x28x28 | contiguous | 5.00 | 4.50 | 4.00 | 1.25 |" in lines
    assert "| import normkit at most 5% over import torch | +3.1% | yes |" in lines
    assert "`import normkit` takes +3.1% over `import torch` (1.50 s)." in lines
    assert "Wrong, and not timed: edge 3x5 (off)." in lines
    assert "Left out: unet3d 2x32x128x128x128 (needs 9.0 GB)." in lines


def test_an_unfinished_run_says_so():
    assert markdown([document(complete=False)]).endswith("The run was not finished.")
