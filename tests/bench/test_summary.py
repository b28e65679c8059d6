"""The summary's numbers, worked out by hand."""

import pytest

from normkit.bench.summary import GOALS, geometric_mean, groups, markdown, of_copy, ratio


def peer(median, gb=1.0, error=1e-7):
    return {
        "median": median,
        "low": median,
        "high": median,
        "gb_per_second": gb,
        "error": error,
        "gradient_error": None,
    }


def made(shape, torch, ours, *, work="forward", chain="bn", dtype="float32", layout="contiguous", **more):
    peers = {"torch": peer(torch, error=1e-5), "normkit": peer(ours, gb=2.0), "copy": peer(1.0, gb=3.0),
             "clone": peer(1.0, gb=1.0), **more}  # fmt: skip
    return {
        "set": "edge", "shape": shape, "count": 1, "dtype": dtype, "layout": layout, "work": work, "chain": chain,
        "activation": None, "elements": 1, "bytes": 80, "backend": "numba", "kernel": "", "peers": peers,
    }  # fmt: skip


def document(**sections):
    return {
        "date": "2026-01-02T03:04:05+00:00", "complete": True, "settings": {"reuse_memory": False},
        "machine": {"cpu": "A processor", "vectors": "AVX512", "threads": 2, "cores": 4, "load": 0.1,
                    "last_level_cache": 32},
        "versions": {"torch": "2.13", "numba": "0.68", "normkit": "0.1.0"}, "commit": "0123456789abcdef",
        "rows": [], "skipped": [], "training": [], "imports": [], **sections,
    }  # fmt: skip


def test_geometric_mean_of_a_ratio_and_its_inverse_is_one():
    assert geometric_mean([8.0, 0.125]) == pytest.approx(1.0)
    assert geometric_mean([2.0, 4.0, 8.0]) == pytest.approx(4.0)


def test_groups_hold_mean_worst_shape_and_errors():
    rows = [made([4, 3], 8.0, 1.0), made([2, 1, 1], 1.0, 2.0), made([4, 3], 3.0, 1.0, dtype="bfloat16")]
    first, second = groups(rows)
    assert (first.key, first.rows) == (("forward", "bn", "float32", "contiguous"), 2)
    assert first.faster == {"torch": pytest.approx(2.0)}
    assert (first.worst, first.worst_shape) == (0.5, "edge 2x1x1")
    assert (first.error, first.torch_error) == (1e-7, 1e-5)
    assert (first.goal, second.goal) == (4.0, 2.0)
    assert ratio(rows[0]) == 8.0
    assert of_copy(rows[0]) == 1.5
    assert first.of_copy == pytest.approx(1.5)


def test_a_peer_that_some_rows_lack_has_no_mean():
    rows = [made([4, 3], 8.0, 1.0, **{"torch.compile": peer(2.0)}), made([2, 1], 1.0, 2.0)]
    (found,) = groups(rows)
    assert set(found.faster) == {"torch"}
    (found,) = groups(rows[:1])
    assert found.faster == {"torch": pytest.approx(8.0), "torch.compile": pytest.approx(2.0)}


def test_goals_are_those_of_eight_groups_and_of_bfloat16():
    assert len(GOALS) == 8
    (found,) = groups([made([4, 3], 1.0, 1.0, work="eval", dtype="bfloat16")])
    assert found.goal is None


def test_markdown_shows_machine_rows_copies_training_and_imports():
    steps = [{"network": "LeNet-5", "batch": [32, 1, 28, 28], "layout": "contiguous", "ratio": 1.25,
              "peers": {"torch": peer(0.005), "normkit": peer(0.004)}}]  # fmt: skip
    imports = [{"overhead": 0.031, "modules": {"torch": peer(1.5), "normkit": peer(1.55)}}]
    skipped = [{"row": "unet3d 2x32x128x128x128", "reason": "needs 9.0 GB"}]
    text = markdown([document(rows=[made([4, 3], 8.0, 1.0)], skipped=skipped, training=steps, imports=imports)])
    lines = text.splitlines()
    assert lines[0].startswith("A processor (AVX512), 2 of 4 cores, load 0.1 at the start; torch 2.13")
    assert "normkit 0123456789ab; memory as the system gives it; 2026-01-02." in lines[0]
    assert (
        "| forward | bn | float32 | contiguous | 1 | 8.00 | 4 | 1.50 | 8.00 (edge 4x3) | 1.0e-07 | 1.0e-05 |" in lines
    )
    assert any(line.endswith("1.50 times `copy_` into memory that is there, 0.50 times `clone`.") for line in lines)
    assert "| LeNet-5 | 32x1x28x28 | contiguous | 5.00 | 4.00 | 1.25 |" in lines
    assert "`import normkit` takes +3.1% over `import torch` (1.50 s)." in lines
    assert "Left out: unet3d 2x32x128x128x128 (needs 9.0 GB)." in lines


def test_an_unfinished_run_says_so():
    assert markdown([document(complete=False)]).endswith("The run was not finished.")
