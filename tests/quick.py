"""Which tests `make test` leaves to `make test-all`, by two rules: `pytest --quick`.

1. What is slow for a reason that stands beside it in `SLOW`: a process is killed, a disk fills up, kernels are compiled
   again; and what opens a browser. Of what starts processes in each case, `FEW`, the first case and the last stay.
2. Of a test with many cases the first, the last and every few of those between, so that each function is still tested
   in each room, and each case is run by `make test-all`.
"""

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

import pytest

__all__ = ["parted"]

# Patterns of node ids, and why they are left out.
SLOW = {
    "tests/lab/test_many_machines.py::*": "clusters of processes",
    "tests/cli/test_lab_failures.py::*": "runs that are killed, disks that are full",
    "tests/cli/test_lab_run.py::*killed*": "runs that are killed",
    "tests/cli/test_lab_run.py::*ctrl_c*": "runs that are interrupted",
    "tests/bench/test_measure.py::*": "timing",
    "tests/cli/test_bench_command.py::test_quick_run*": "timing",
    "tests/cli/test_bench_command.py::test_*interrupted*": "timing",
    "tests/doctor/test_planning.py::*predicted_gap*": "nets that are trained",
    "tests/cli/test_help.py::test_an_example_of_the_help_runs*bench*": "timing",
    "tests/kernels/test_kernel_cache.py::*": "kernels compiled again in processes of their own",
    "tests/kernels/test_guard_pages.py::*": "kernels compiled again in processes of their own",
    "tests/kernels/test_native.py::*same_bits*": "every kernel compiled for every type",
    "tests/kernels/test_numba_samples.py::test_fused_activation*group*": "kernels compiled that no other test asks for",
    "tests/kernels/test_processor.py::*True?": "kernels compiled again in processes of their own",
    "tests/layers/test_graphs.py::*onnxruntime?[02]?": "an export of every layer; that in one dimension stays",
    "tests/differential/*": "many drawn inputs; `make fuzz` draws more",
    "tests/functional/test_matrix_root.py::*eighth*": "derivatives to the eighth order",
    "tests/parts/test_accumulate.py::*thousand_steps*": "a thousand steps",
    "tests/kernels/test_native_memory.py::*process_grow*": "a thousand steps",
    "tests/lab/test_settings_file.py::*run_to_a_verdict*": "nets that are trained",
    "tests/kernels/test_native_memory.py::*one_share*": "processes that keep memory",
    "tests/cli/test_lab_run.py::*two_processes*": "a run by two processes",
    "tests/functional/test_paths.py::*is_gone*": "layers that are made until memory is used again",
}
FEW = {
    "tests/ranks/test_simulate.py::test_the_simulator_equals_processes*": "processes",
    "tests/ranks/test_sync_forms.py::test_ghost_batches*": "processes",
    "tests/ranks/test_sync_forms.py::test_forms_equal_one_process": "processes",
    "tests/surgery/test_transformers_models.py::*": "models of another library are built",
}
# Cases that a test keeps whole, and of how many more one is kept.
KEPT, EVERY = 3, 12


def parted(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return what a quick run tests, and what it leaves out."""
    cases = Counter(_function(item) for item in items)
    seen: Counter[str] = Counter()
    kept, left = [], []
    for item in items:
        function = _function(item)
        place, seen[function] = seen[function], seen[function] + 1
        slow = any(fnmatchcase(item.nodeid, pattern) for pattern in SLOW) or item.get_closest_marker("browser")
        if any(fnmatchcase(function, pattern) for pattern in FEW):
            slow = slow or place not in (0, cases[function] - 1)
        many = cases[function] > KEPT + 2 and not (
            place < KEPT or place == cases[function] - 1 or (place - KEPT) % EVERY == 0
        )
        (left if slow or many else kept).append(item)
    return kept, left


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]
