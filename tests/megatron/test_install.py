"""register() makes Megatron-Core know the dispatcher deepep everywhere it asks for names."""

import subprocess
import sys

import install_cases as cases
import moe_layers as layers
import pytest
import schedule_cases
from moe_layers import Case, Grid

one_rank = pytest.mark.parametrize("num_ranks", [1], ids=[""])


@one_rank
def test_register_can_be_repeated_and_undone(ranks, num_ranks):
    ranks.run(cases.check_round_trip)


@one_rank
def test_name_is_unknown_before_register_and_after_unregister(ranks, num_ranks):
    ranks.run(cases.check_unknown_without_register)


@one_rank
def test_unregister_refuses_to_undo_under_another_patch(ranks, num_ranks):
    ranks.run(cases.check_patched_by_others)


@one_rank
def test_command_line_flag_accepts_the_name(ranks, num_ranks):
    ranks.run(cases.check_flag)


@one_rank
def test_config_keeps_the_name(ranks, num_ranks):
    ranks.run(cases.check_name_is_kept)


@one_rank
@pytest.mark.parametrize("feature", cases.ACCEPTED)
def test_config_accepts(ranks, num_ranks, feature):
    ranks.run(cases.check_accepted, feature)


@one_rank
def test_layer_classes_stay_what_they_are(ranks, num_ranks):
    ranks.run(cases.check_layer_classes)


@one_rank
def test_layernorm_is_recomputed_beside_a_cuda_graph_as_with_alltoall(ranks, num_ranks):
    ranks.run(cases.check_layernorm_recompute)


@one_rank
def test_schedule_keeps_the_rows_that_experts_save(ranks, num_ranks):
    ranks.run(cases.check_freed_inputs)


@pytest.mark.parametrize("num_experts", [2, 4], ids=["one-local-expert", "two-local-experts"])
def test_1f1b_schedule_gives_what_plain_passes_give(ranks, num_experts):
    by_rank = ranks.run(schedule_cases.compare_1f1b, Grid(ep=2), num_experts)
    layers.assert_close(by_rank, [Case()], atol=0, bitwise=True)


def test_dispatcher_of_a_built_layer_may_be_replaced_without_register(ranks):
    by_rank = ranks.run(cases.compare_replaced_dispatcher, Grid(ep=2))
    layers.assert_close(by_rank, [Case()], atol=0, bitwise=True)


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys, megatron_ep\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'megatron', 'ep_kernels'}, loaded\n"
        "assert set(megatron_ep.__all__) <= set(dir(megatron_ep))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attributes_of_the_package_are_named():
    import megatron_ep

    with pytest.raises(AttributeError, match="megatron_ep.*'dispatcher'"):
        megatron_ep.dispatcher  # noqa: B018
