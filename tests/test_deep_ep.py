"""ep_kernels.deep_ep is the interface of DeepEP V1: a test for each row of its table."""

import socket
import subprocess
import sys
from pathlib import Path

import deep_ep_cases as cases
import pytest
import torch

from ep_kernels import deep_ep

TESTS = Path(__file__).resolve().parent

BACKENDS = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

over_ranks = pytest.mark.parametrize("num_ranks", [1, 2, 4], ids="R{}".format)


@over_ranks
def test_get_dispatch_layout_counts_tokens(ranks, backend, num_ranks):
    ranks.run(cases.check_layout, backend)


@over_ranks
@pytest.mark.parametrize("with_topk", [True, False], ids=["topk", "no-topk"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expert_alignment": 16},
        {"async_finish": True},
        {"async_finish": True, "allocate_on_comm_stream": True},
        {"config": deep_ep.Config(8, 4, 128)},
    ],
    ids=["sync", "aligned", "async", "comm-stream", "config"],
)
def test_dispatch_delivers_rows_by_source_rank(ranks, backend, num_ranks, with_topk, options):
    ranks.run(cases.check_dispatch, backend, with_topk, options)


@over_ranks
def test_dispatch_with_a_handle_repeats_the_routing(ranks, backend, num_ranks):
    ranks.run(cases.check_cached_dispatch, backend)


@over_ranks
def test_dispatch_with_num_worst_tokens_marks_unused_rows(ranks, backend, num_ranks):
    ranks.run(cases.check_worst_case_dispatch, backend)


@over_ranks
def test_dispatch_takes_fp8_rows_with_scales(ranks, backend, num_ranks):
    ranks.run(cases.check_fp8_dispatch, backend)


@over_ranks
@pytest.mark.parametrize("num_biases", [0, 1, 2])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_combine_sums_over_ranks_without_weights(ranks, backend, num_ranks, num_biases, is_async):
    ranks.run(cases.check_combine, backend, num_biases, is_async)


def test_events_order_transfers(ranks, backend):
    ranks.run(cases.check_events, backend)


def test_statics_and_configs(ranks, backend):
    ranks.run(cases.check_statics, backend)


def test_memory_stream_and_destroy(ranks, backend):
    ranks.run(cases.check_others, backend)


def test_a_buffer_serves_several_numbers_of_experts(ranks, backend):
    ranks.run(cases.check_several_numbers_of_experts, backend)


@pytest.mark.parametrize("num_ranks", [2, 4], ids="R{}".format)
def test_groups_may_span_nodes(ranks, backend, num_ranks):
    if backend == "cpu":
        ranks.run(cases.check_two_nodes)


def test_a_missing_layout_is_named(ranks, backend):
    for message in ranks.run(cases.check_missing_layout, backend):
        assert "num_tokens_per_rank" in message


def test_what_one_rank_refuses_all_ranks_learn(ranks, backend):
    ranks.run(cases.check_refusals_of_one_rank, backend)


# Low-latency calls, on the CPU

LL_DISPATCHES = {
    "bf16": {"use_fp8": False},
    "fp8": {},
    "round_scale": {"round_scale": True},
    "ue8m0": {"round_scale": True, "use_ue8m0": True},
    "hook": {"return_recv_hook": True},
    "async": {"async_finish": True},
}

LL_COMBINES = {
    "plain": {},
    "logfmt": {"use_logfmt": True},
    "zero_copy": {"zero_copy": True},
    "out": {"out": True},
    "hook": {"return_recv_hook": True},
    "async": {"async_finish": True},
}


@over_ranks
@pytest.mark.parametrize("name", list(LL_DISPATCHES))
def test_low_latency_dispatch_delivers_rows_and_counts(ranks, backend, num_ranks, name):
    if backend == "cpu":
        ranks.run(cases.check_low_latency, LL_DISPATCHES[name], {})


@over_ranks
@pytest.mark.parametrize("name", list(LL_COMBINES))
def test_low_latency_combine_sums_with_weights(ranks, backend, num_ranks, name):
    if backend == "cpu":
        ranks.run(cases.check_low_latency, LL_DISPATCHES["bf16"], LL_COMBINES[name])


def test_low_latency_memory_is_checked(ranks, backend):
    if backend == "cpu":
        ranks.run(cases.check_low_latency_memory)


@pytest.mark.parametrize("num_ranks", [2, 4], ids="R{}".format)
def test_masked_ranks_are_left_out(ranks, backend, num_ranks):
    if backend == "cpu":
        ranks.run(cases.check_masks)


# Programs that import deep_ep


def test_a_program_for_deep_ep_runs_unchanged_and_may_spawn_ranks(backend):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(TESTS / "programs" / "deep_ep_program.py")
    done = run_python("-m", "ep_kernels.deep_ep", program, "2", str(port))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 2


def test_the_runner_tells_how_it_is_used(backend):
    assert run_python("-m", "ep_kernels.deep_ep", "--help").returncode == 0
    assert "usage" in run_python("-m", "ep_kernels.deep_ep").stderr
    missing = run_python("-m", "ep_kernels.deep_ep", "nowhere.py")
    assert missing.returncode == 2
    assert "nowhere.py" in missing.stderr


INSTALLING = """
import sys
from ep_kernels import EPConfigError
from ep_kernels import deep_ep as ours
ours.install()
ours.install()
import deep_ep, deep_ep.utils
from deep_ep import Buffer, Config, topk_idx_t
from deep_ep.utils import EventHandle, EventOverlap
assert deep_ep is ours and deep_ep.utils is ours.utils and Buffer is ours.Buffer
ours.uninstall()
try:
    import deep_ep
except ImportError:
    pass
else:
    raise AssertionError("still there")
sys.modules["deep_ep"] = sys
try:
    ours.install()
except EPConfigError as error:
    assert "imported before" in str(error)
else:
    raise AssertionError("another deep_ep was replaced")
"""


def test_install_can_be_repeated_and_undone_and_replaces_nobody(backend):
    done = run_python("-c", INSTALLING)
    assert done.returncode == 0, done.stderr


def run_python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
