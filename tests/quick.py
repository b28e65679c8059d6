"""Which tests `make test` leaves to `make test-all`, by three rules: `pytest --quick`.

1. What is slow for a reason that stands beside it in `SLOW`: a process is killed, a disk fills up, kernels are compiled
   again; and what opens a browser. Of what starts processes in each case, `FEW`, the first case and the last stay.
2. Of a test with many cases the first, the last and every few of those between, so that each function is still tested
   in each room, and each case is run by `make test-all`.
3. Of the half precisions bfloat16 alone: float16's kernels differ in how a value is read and written, and compiling
   them takes longer than running all that they are tested by.
"""

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

import pytest
import torch

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
    "tests/differential/*": "many drawn inputs; `make fuzz` draws more",
    "tests/functional/test_matrix_root.py::*eighth*": "derivatives to the eighth order",
    "tests/parts/test_accumulate.py::*thousand_steps*": "a thousand steps",
    "tests/kernels/test_native_memory.py::*process_grow*": "a thousand steps",
    "tests/lab/test_settings_file.py::*run_to_a_verdict*": "nets that are trained",
    "tests/kernels/test_native_memory.py::*one_share*": "processes that keep memory",
    "tests/cli/test_lab_run.py::*two_processes*": "a run by two processes",
    "tests/functional/test_paths.py::*is_gone*": "layers that are made until memory is used again",
    "tests/kernels/test_numba_channels.py::*is_streamed*dtype[1-9]*": "kernels compiled that no other test asks for",
    "tests/functional/test_batch_inplace.py::*out_of_place?(2,*leaky_relu?": "kernels compiled for channels-last",
    "tests/cli/test_bench_command.py::test_training_steps*": "timing",
    "tests/kernels/test_processor.py::*": "kernels compiled again for processors that are not here",
    "tests/kernels/test_triton_*::*compile_for_a_gpu*": "every Triton kernel compiled",
    "tests/layers/test_repeated_forwards.py::test_data_parallel_processes*": "processes",
    "tests/layers/test_graphs.py::*second_size_behind_a_convolution*": "torch's compiler with its search for the best",
    "tests/ranks/test_sync.py::*dies_leaves_no_other*": "processes that are killed",
    "tests/ranks/test_sync.py::*does_not_come_is_named*": "processes that wait",
    "tests/ranks/test_sync.py::*checkpointing_data_parallelism_and_compilation*": "a net compiled on every rank",
    "tests/ranks/test_sync.py::*of_a_sharded_net*": "a sharded net on every rank",
    "tests/ranks/test_sync.py::*detailed_debugging*": "processes that wait",
    "tests/surgery/test_recalibrate_ranks.py::*unequal_shares*": "processes",
    "tests/doctor/test_doctor_chance.py::*sixty_models*": "sixty models examined",
    "tests/doctor/test_doctor_chance.py::*of_few_samples*": "many models examined",
    "tests/doctor/test_doctor_chance.py::*many_layers_moderately_off*": "many models examined",
    "tests/lab/test_ghost_batches.py::*can_be_judged_and_shown*": "nets that are trained",
    "tests/lab/test_skip_init.py::*can_be_judged_and_shown*": "nets that are trained",
    "tests/lab/test_small_batch.py::*in_proportion*": "nets that are trained",
    "tests/lab/test_until_decided.py::*rows_are_those_of_one_run*": "nets that are trained, twice",
    "tests/lab/test_until_decided.py::*folder_of_another_machine*": "nets that are trained, twice",
    "tests/report/test_kept_ledger.py::*names_the_norm_once*": "the whole ledger's page, drawn",
    "tests/report/test_diagnosis_page.py::*of_sixty_layers*": "sixty layers drawn",
    "tests/test_notebooks.py::*shows_its_last_values?doctor*": "a net that is trained",
    "tests/cli/test_help.py::*reader_that_leaves*": "processes",
    "tests/cli/test_surgery_commands.py::*runs_as_a_process*": "processes",
    "tests/surgery/test_export.py::*disk_that_takes_no_more*": "disks that are full",
    "tests/testing/test_conformance.py::test_every_check_runs*": "the whole kit over all layers",
    "tests/doctor/test_doctor_ranks.py::*cured*": "processes",
    "tests/kernels/test_memory.py::*end_in_silence": "processes",
    "tests/kernels/test_native_memory.py::*end_in_silence": "processes",
    "tests/parts/test_accumulate.py::*many_steps_leave*": "many steps",
    "tests/surgery/test_transformers_models.py::*": "models of another library are built",
}
FEW = {
    "tests/ranks/test_simulate.py::test_the_simulator_equals_processes*": "processes",
    "tests/ranks/test_sync_forms.py::test_ghost_batches*": "processes",
    "tests/ranks/test_sync_forms.py::test_forms_equal_one_process": "processes",
    "tests/surgery/test_fold_graphs.py::*": "the laboratory's nets are built and exported",
    "tests/layers/test_graphs.py::*": "torch's compiler",
    "tests/layers/test_repeated_forwards.py::*": "torch's compiler, and kernels of every type",
    "tests/layers/test_running_statistics.py::*two_shares*": "torch's compiler",
    "tests/kernels/test_operators.py::*": "torch's compiler",
    "tests/kernels/test_triton_*::*": "kernels interpreted",
    "tests/parts/test_module_state.py::*buffers_of_its_own": "kernels compiled for each activation",
    "tests/functional/test_saved_tensors.py::*do_not_depend_on_the_form*": "kernels compiled for each form",
    "tests/functional/test_batch_inplace.py::*": "kernels compiled for each activation",
    "tests/functional/test_odd_memory.py::*right_numbers": "kernels compiled for each form",
    "tests/kernels/test_numba_*::test_fused_activation*": "kernels compiled for each activation",
    "tests/kernels/test_citizens.py::test_activation_and_residual*": "kernels compiled for each layout",
    "tests/kernels/test_citizens.py::test_autocast*": "kernels compiled for each layout",
    "tests/kernels/test_native_memory.py::*": "processes",
    "tests/functional/test_derivatives.py::*": "derivatives of derivatives",
    "tests/doctor/test_doctor_chance.py::*": "many models examined",
    "tests/doctor/test_doctor_joined.py::test_one_call*": "nets that are trained",
    "tests/ranks/test_sync.py::*": "processes",
    "tests/test_manners.py::test_a_room_is_there*": "processes",
    "tests/cli/test_help.py::*": "processes",
    "tests/cli/test_doctor_command.py::test_cure_that_is_printed*": "processes",
}
# Cases that a test keeps whole, and of how many more one is kept.
KEPT, EVERY = 1, 24


def parted(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return what a quick run tests, and what it leaves out."""
    cases = Counter(_function(item) for item in items)
    seen: Counter[str] = Counter()
    kept, left = [], []
    for item in items:
        function = _function(item)
        place, seen[function] = seen[function], seen[function] + 1
        slow = any(fnmatchcase(item.nodeid, pattern) for pattern in SLOW) or item.get_closest_marker("browser")
        slow = slow or _takes(torch.float16, item)
        if any(fnmatchcase(function, pattern) for pattern in FEW):
            slow = slow or place not in (0, cases[function] - 1)
        many = cases[function] > KEPT + 2 and not (
            place < KEPT or place == cases[function] - 1 or (place - KEPT) % EVERY == 0
        )
        (left if slow or many else kept).append(item)
    return kept, left


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _takes(dtype: torch.dtype, item: pytest.Item) -> bool:
    case = getattr(item, "callspec", None)
    return case is not None and any(value is dtype for value in case.params.values())
