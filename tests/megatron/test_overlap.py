"""A layer whose experts work in chunks computes what it computes in one piece.

Gradients of the experts' parameters are summed in another order, and a GEMM may choose another
kernel for fewer rows: 1e-12 in fp64 bounds both.
"""

import moe_layers as layers
import pytest
import torch
import torch.distributed as dist
from moe_layers import Case, Grid
from rank_devices import rank_device

import megatron_ep

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


def test_few_tokens_are_not_cut_automatically(ranks):
    check(ranks, Grid(ep=2), [Case()], "auto", atol=0)


def on_rank_count_calls(rank, num_chunks):
    """Dispatches and combines of a forward and a backward, and how often a parameter's hook ran."""
    case, counts = Case(seq_length=(400,)), {"dispatch": 0, "combine": 0, "hook": 0}
    with layers.megatron(Grid(ep=2), num_chunks=num_chunks):
        layer = layers.make_layer(case, Grid(ep=2), "deepep")
        buffer = layer.token_dispatcher.buffer(rank_device())

        def count(name, function):
            def counted(*args, **options):
                counts[name] += 1
                return function(*args, **options)

            return counted

        buffer.dispatch = count("dispatch", buffer.dispatch)
        buffer.combine = count("combine", buffer.combine)
        parameter = next(layer.experts.parameters())
        parameter.register_post_accumulate_grad_hook(count("hook", lambda _: None))
        layers.run_layer(rank, layer, case)
        with torch.no_grad():
            layer(layers.make_input(rank, case)[0])
    return counts


@pytest.mark.parametrize(("num_chunks", "expected"), [(1, 1), (3, 3), ("auto", 3)])
def test_every_chunk_travels_once_and_a_parameter_gets_one_gradient(ranks, num_chunks, expected):
    # 800 tokens with 2 of 4 experts each: at least 3 * 256 rows for each expert, with this seed
    for counts in ranks.run(on_rank_count_calls, num_chunks):
        assert counts == {"dispatch": 3 * expected, "combine": 3 * expected, "hook": 1}


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
            (recomputed, "moe_act among recompute_modules"),
        ):
            with pytest.raises(ValueError, match=problem):
                layers.make_layer(Case(late_options=late_options), Grid(ep=2), "deepep")
    dist.barrier()


def test_what_cannot_work_is_refused(ranks):
    ranks.run(on_rank_errors)
