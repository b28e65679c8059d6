"""The defects of torch and its neighbours that these tools answer, each with the tests in which ours does better.

Each test named here first shows what the other tool does, or is about what it cannot do at all.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

ANSWERS = {
    "fx.optimization.fuse is silently wrong where one convolution is called twice": [
        "surgery/test_fold.py::test_convolution_called_twice_is_refused_where_torch_is_silently_wrong",
    ],
    "fuse_conv_bn_eval raises for grouped transposed convolutions": [
        "surgery/test_fold.py::test_grouped_transposed_convolution_is_folded_where_torch_raises",
    ],
    "update_bn wipes the statistics on an empty loader": [
        "surgery/test_recalibrate.py::test_empty_loader_changes_nothing_where_update_bn_wipes",
    ],
    "update_bn leaves momentum=None behind when the loader raises": [
        "surgery/test_recalibrate.py::test_failing_loader_changes_nothing_where_update_bn_leaves_momentum_none",
    ],
    "update_bn counts a short last batch as much as a full one": [
        "surgery/test_recalibrate.py::test_short_last_batch_counts_less_than_for_update_bn",
    ],
    "update_bn overwrites frozen layers": [
        "surgery/test_recalibrate.py::test_frozen_layer_is_left_where_update_bn_overwrites_it",
    ],
    "update_bn raises on batches that are dicts": [
        "surgery/test_recalibrate.py::test_dict_batches_work_where_update_bn_raises",
    ],
    "convert_sync_batchnorm drops subclasses and hooks, doubles shared modules, gives lazy ones no features": [
        "surgery/test_convert.py::test_hooks_sharing_and_subclasses_survive_where_torchs_sync_conversion_loses_them",
        "surgery/test_preserved.py::test_convert_keeps_what_a_model_has_or_refuses_the_layer",
    ],
    "one infinity poisons the running statistics for ever": [
        "surgery/test_repair.py::test_overflow_poisons_torchs_layer_for_ever",
        "surgery/test_repair.py::test_bad_layers_are_measured_again_and_only_those",
        "doctor/test_doctor_watch.py::test_watch_names_the_step_in_which_statistics_stopped_being_finite",
    ],
    "statistics in half precision stand still": [
        "surgery/test_repair.py::test_narrow_statistics_are_lifted_and_move_again",
    ],
    "group normalization with one value in a group gives zeros without a word": [
        "surgery/test_convert.py::test_forms_that_erase_vectors_are_refused_where_torch_gives_zeros",
        "doctor/test_doctor_scripts.py::test_mistake_is_found_and_cured_by_the_calls_that_are_named",
    ],
    "activation checkpointing updates the statistics twice": [
        "doctor/test_doctor_watch.py::test_watch_finds_recomputation_and_the_call_cures_it",
    ],
    "a momentum that is no momentum is accepted": [
        "doctor/test_doctor_rules.py::test_impossible_momentum_is_an_error",
    ],
    "requires_grad_(False) and eval() do not hold the statistics": [
        "surgery/test_freeze.py::test_torchs_own_ways_do_not_hold",
    ],
}


@pytest.mark.parametrize("defect", ANSWERS)
def test_defect_has_its_tests(defect):
    for answer in ANSWERS[defect]:
        file, _, name = answer.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, answer
