"""A layer whose experts work in chunks computes what it computes in one piece.

Gradients of the experts' parameters are summed in another order, and a GEMM may choose another
kernel for fewer rows: 1e-12 in fp64 bounds both.
"""

import contextlib
from collections import Counter
from unittest import mock

import moe_layers as layers
import pytest
import torch
import torch.distributed as dist
from moe_layers import Case, Grid
from rank_devices import rank_device
from recompute_cases import counting

import megatron_ep
from megatron_ep import choose_chunks
from megatron_ep.chunk_run import GradientSums

pytestmark = pytest.mark.over_devices

ATOL = 1e-12

SOME_GRIDS = [(2, Grid(ep=2)), (4, Grid(tp=2, ep=2, etp=2))]

over_some_grids = pytest.mark.parametrize(
    ("num_ranks", "grid"), SOME_GRIDS, ids=[f"R{n}-{grid}" for n, grid in SOME_GRIDS]
)


def check(ranks, grid, cases, num_chunks, *, atol=ATOL):
    options = {"num_chunks": num_chunks}
    by_rank = ranks.run(layers.compare_dispatchers, grid, cases, options, deadline_s=120)
    layers.assert_close(by_rank, cases, atol=atol)


@over_some_grids
@pytest.mark.parametrize("num_chunks", [2, 3, 24, 50])
def test_any_number_of_chunks_gives_the_same_layer(ranks, num_ranks, grid, num_chunks):
    cases = [Case(topk=1), Case(num_experts=8, topk=4), Case(seq_length=(12, 5))]
    check(ranks, grid, cases, num_chunks)


OPTIONS = {
    "capacity": dict(
        moe_expert_capacity_factor=0.5,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.1,
    ),
    "padded": dict(
        moe_expert_capacity_factor=1.5,
        moe_pad_expert_input_to_capacity=True,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.1,
    ),
    "recomputed": dict(recompute_granularity="selective", recompute_modules=["moe"]),
    "shared": dict(moe_shared_expert_intermediate_size=32),
    "shared_overlap": dict(moe_shared_expert_intermediate_size=32, moe_shared_expert_overlap=True),
    "probs_on_input": dict(moe_apply_probs_on_input=True, moe_router_topk=1),
}


@over_some_grids
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_layer_are_kept(ranks, num_ranks, grid, name):
    topk = OPTIONS[name].get("moe_router_topk", 2)
    check(ranks, grid, [Case(topk=topk, options=OPTIONS[name])], 3)


def on_rank_count_calls(rank, num_chunks):
    """Calls of a forward, a backward and a forward without gradients, and how often a parameter's
    hook ran.
    """
    case, counts, hooks = Case(), Counter(), []
    with layers.megatron(Grid(ep=2), num_chunks=num_chunks):
        layer = layers.make_layer(case, Grid(ep=2), "deepep")
        with counting(layer.token_dispatcher.buffer(rank_device()), counts):
            parameter = next(layer.experts.parameters())
            parameter.register_post_accumulate_grad_hook(hooks.append)
            layers.run_layer(rank, layer, case)
            with torch.no_grad():
                layer(layers.make_input(rank, case)[0])
    return counts, len(hooks)


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_every_chunk_travels_once_and_a_parameter_gets_one_gradient(ranks, num_chunks):
    for counts, num_hooks in ranks.run(on_rank_count_calls, num_chunks):
        assert counts["dispatch"] == counts["combine"] == 3 * num_chunks
        assert counts["routing"] == 2 * (num_chunks - 1)
        assert num_hooks == 1


class SmsTaken(torch.nn.Module):
    """Experts that note how many SMs their GEMMs are told to leave free."""

    def __init__(self, experts):
        super().__init__()
        self.experts, self.left_free = experts, []

    def forward(self, rows, tokens_per_expert, probs):
        output, bias = self.experts(rows, tokens_per_expert, probs)
        if output.requires_grad:
            output.register_hook(self.note)
        self.note()
        return output, bias

    def note(self, *_):
        self.left_free.append(torch._C._get_sm_carveout_experimental())


def on_rank_free_sms(rank, num_chunks):
    """SMs that experts leave free, and num_sms of all transfers, in a forward and a backward."""
    case, taken = Case(), []
    with layers.megatron(Grid(ep=2), num_chunks=num_chunks, overlap_num_sms=3):
        layer = layers.make_layer(case, Grid(ep=2), "deepep")
        layer.experts = SmsTaken(layer.experts)
        buffer = layer.token_dispatcher.buffer(rank_device())
        with contextlib.ExitStack() as stack:
            for name in ("dispatch", "combine"):
                call = getattr(buffer, name)

                def noted(*arguments, call=call, name=name, **options):
                    taken.append((name, options.get("num_sms")))
                    return call(*arguments, **options)

                stack.enter_context(mock.patch.object(buffer, name, noted))
            layers.run_layer(rank, layer, case)
    return layer.experts.left_free, taken, torch._C._get_sm_carveout_experimental()


def test_experts_leave_sms_free_for_transfers_that_overlap(ranks):
    for left_free, taken, afterwards in ranks.run(on_rank_free_sms, 3):
        assert left_free == [3] * 6
        assert afterwards is None
        moved = [call for call in taken if call[1] == 3]
        assert Counter(moved) == {("dispatch", 3): 4, ("combine", 3): 4}
        assert taken[-1] == ("combine", None), "nothing overlaps with the last one"
    for left_free, taken, _ in ranks.run(on_rank_free_sms, 1):
        assert left_free == [None] * 2
        assert {num_sms for _, num_sms in taken} == {None}


class Padded(torch.nn.Module):
    """Experts that want to see groups of a size, and keep what they saw."""

    def __init__(self, experts):
        super().__init__()
        self.experts, self.counts = experts, []

    def forward(self, rows, tokens_per_expert, probs):
        self.counts.append(tokens_per_expert)
        return self.experts(rows, tokens_per_expert, probs)


def on_rank_padded(rank):
    """Gradients, and the sizes of groups, with groups that are padded to 16 rows."""
    case, results = Case(late_options=dict(moe_router_padding_for_quantization=True)), []
    for num_chunks in (1, 3):
        with layers.megatron(Grid(ep=2), num_chunks=num_chunks):
            layer = layers.make_layer(case, Grid(ep=2), "deepep")
            layer.token_dispatcher.expert_alignment = 16
            layer.experts = Padded(layer.experts)
            results.append((layers.run_layer(rank, layer, case), layer.experts.counts))
    (one, _), (other, counts) = results
    return [layers.compare(rank, one, other)], torch.stack(counts)


def test_every_chunk_has_groups_of_the_size_asked_for(ranks):
    for differences, counts in ranks.run(on_rank_padded):
        layers.assert_close([differences], [Case()], atol=ATOL)
        assert len(counts) == 3
        assert not (counts % 16).any()


def on_rank_auto(rank, choice):
    """Chunks of forwards with "auto", when the estimate chooses so; the times that it was given."""
    case, seen, times = Case(seq_length=(400,)), [], []

    def choose(given, *, rows_per_expert):
        times.append((given, rows_per_expert))
        return choice

    with (
        mock.patch.object(choose_chunks, "choose", choose),
        layers.megatron(Grid(ep=2), num_chunks="auto"),
    ):
        layer = layers.make_layer(case, Grid(ep=2), "deepep")
        for _ in range(choose_chunks.WARM_UP + choose_chunks.TIMED + 2):
            counts = Counter()
            with counting(layer.token_dispatcher.buffer(rank_device()), counts):
                layers.run_layer(rank, layer, case)
            seen.append(counts["combine"] // 2)
    return seen, times


def test_the_choice_is_made_once_and_all_ranks_are_given_the_same_times(ranks):
    by_rank = ranks.run(on_rank_auto, 3)
    assert by_rank[0] == by_rank[1]
    seen, ((times, rows),) = by_rank[0]
    num_before = choose_chunks.WARM_UP + choose_chunks.TIMED
    assert seen == [1] * num_before + [3] * 2
    assert rows == 800 * 2 // 2
    assert times.dispatch > 0
    assert times.experts > 0
    assert times.combine > 0
    assert times.call > 0


def on_rank_in_flight(rank, grid, case, orders):
    before = megatron_ep.configure(num_chunks=2)
    try:
        return layers.compare_in_flight(rank, grid, case, orders)
    finally:
        megatron_ep.configure(**vars(before))


def test_several_micro_batches_may_be_in_flight(ranks):
    case, orders = Case(), ["F0 F1 B1 B0", "F0 F1 B0 F2 B2 B1"]
    by_rank = ranks.run(on_rank_in_flight, Grid(ep=2), case, orders)
    layers.assert_close(by_rank, [case] * len(orders), atol=1e-10)


def test_gradients_are_summed_unless_a_gemm_has_done_so():
    shapes = [(2,), (3, 2), (1,), (4,)]
    parameters = [torch.zeros(shape) for shape in shapes]
    parameters[3].grad_added_to_main_grad = True
    sums = GradientSums(parameters)
    chunks = [[torch.full(shape, 10.0**chunk) for shape in shapes] for chunk in range(3)]
    chunks[0][1] = chunks[1][0] = None
    for grads in chunks:
        grads[2] = None
        sums.add(grads)
    assert sums.totals[2] is None
    means = [total.mean().item() for total in sums.totals if total is not None]
    assert means == [101.0, 110.0, 1.0]


class Transposed(torch.nn.Module):
    """Experts whose output is not contiguous."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *arguments):
        output, bias = self.experts(*arguments)
        return output.t().contiguous().t(), bias


def on_rank_transposed(rank):
    case, tensors = Case(), []
    for num_chunks in (1, 3):
        with layers.megatron(Grid(ep=2), num_chunks=num_chunks):
            layer = layers.make_layer(case, Grid(ep=2), "deepep")
            layer.experts = Transposed(layer.experts)
            tensors.append(layers.run_layer(rank, layer, case))
    return [layers.compare(rank, *tensors)]


def test_the_output_of_the_experts_may_have_any_strides(ranks):
    layers.assert_close(ranks.run(on_rank_transposed), [Case()], atol=ATOL)


def on_rank_frozen(rank):
    case, tensors = Case(), []
    for num_chunks in (1, 3):
        with layers.megatron(Grid(ep=2), num_chunks=num_chunks):
            layer = layers.make_layer(case, Grid(ep=2), "deepep")
            layer.experts.requires_grad_(False)
            tensors.append(layers.run_layer(rank, layer, case))
            assert all(parameter.grad is None for parameter in layer.experts.parameters())
    return [layers.compare(rank, *tensors)]


def test_experts_may_be_frozen(ranks):
    layers.assert_close(ranks.run(on_rank_frozen), [Case()], atol=ATOL)


def on_rank_errors(rank):
    for value in (0, -1, 1.5, True, "many", None):
        with pytest.raises(ValueError, match=f"num_chunks={value!r}"):
            megatron_ep.configure(num_chunks=value)
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    with layers.megatron(Grid(ep=2), num_chunks=2):
        for late_options, problem in (
            ({"delay_wgrad_compute": True}, "delay_wgrad_compute=False"),
            (
                {"overlap_moe_expert_parallel_comm": True},
                "overlap_moe_expert_parallel_comm=False, which takes the layer's steps apart",
            ),
            (recomputed, "moe_act among recompute_modules"),
        ):
            with pytest.raises(ValueError, match=problem):
                layers.make_layer(Case(late_options=late_options), Grid(ep=2), "deepep")
    dist.barrier()


def test_what_cannot_work_is_refused(ranks):
    ranks.run(on_rank_errors)
