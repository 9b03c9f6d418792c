"""One MoE layer with the dispatcher deepep computes what it computes with alltoall.

Output and the gradients of the input, the router and every expert: to 1e-12 in fp64, and on the CPU
to the last bit wherever the sums run in the same order, that is without expert tensor parallelism.
"""

import moe_layers as layers
import pytest
import torch
from moe_layers import Case, Grid

from ep_kernels import reference

ATOL = {torch.float64: 1e-12, torch.float32: 1e-4}

GRIDS = [
    (1, Grid()),
    (2, Grid(ep=2)),
    (2, Grid(tp=2, ep=2)),
    (2, Grid(tp=2, etp=2)),
    (4, Grid(ep=4)),
    (4, Grid(ep=2)),
    (4, Grid(tp=2, ep=2)),
    (4, Grid(tp=2, ep=4)),
    (4, Grid(tp=4, etp=4)),
    (4, Grid(tp=2, ep=2, etp=2)),
]

over_grids = pytest.mark.parametrize(
    ("num_ranks", "grid"), GRIDS, ids=[f"R{n}-{grid}" for n, grid in GRIDS]
)

SOME_GRIDS = [(2, Grid(ep=2)), (4, Grid(tp=2, ep=2, etp=2))]

over_some_grids = pytest.mark.parametrize(
    ("num_ranks", "grid"), SOME_GRIDS, ids=[f"R{n}-{grid}" for n, grid in SOME_GRIDS]
)


def check(ranks, grid, cases, *, atol, **buffer_options):
    by_rank = ranks.run(layers.compare_dispatchers, grid, cases, buffer_options)
    layers.assert_close(by_rank, cases, atol=atol, bitwise=grid.etp == 1)


@pytest.mark.over_devices
@over_grids
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_layer_agrees_with_alltoall(ranks, num_ranks, grid, dtype):
    cases = [Case(num_experts=e, topk=k, dtype=dtype) for e in (4, 8) for k in (1, 2, 4)]
    check(ranks, grid, cases, atol=ATOL[dtype])


@over_some_grids
def test_layer_agrees_on_the_reference_buffer(ranks, num_ranks, grid):
    check(ranks, grid, [Case()], atol=1e-12, buffer_class=reference.Buffer)


@pytest.mark.parametrize(
    ("num_ranks", "grid", "num_local_ranks"), [(4, Grid(ep=4), 2), (4, Grid(ep=2), 1)]
)
def test_layer_agrees_over_several_nodes(ranks, num_ranks, grid, num_local_ranks):
    """To the bit: two addends have one order."""
    cases = [Case(topk=k, dtype=torch.float32) for k in (1, 2)]
    check(ranks, grid, cases, atol=0, num_local_ranks=num_local_ranks)


@pytest.mark.over_devices
def test_layer_agrees_in_bf16_with_two_experts_per_token(ranks):
    """More would not: alltoall rounds after each addition, combine only once."""
    cases = [Case(num_experts=e, topk=k, dtype=torch.bfloat16) for e in (4, 8) for k in (1, 2)]
    check(ranks, Grid(ep=2), cases, atol=0)


@pytest.mark.over_devices
def test_ranks_may_have_different_numbers_of_tokens(ranks):
    cases = [Case(topk=k, seq_length=lengths) for k in (1, 3) for lengths in ((12, 5), (1, 9))]
    check(ranks, Grid(ep=2), cases, atol=1e-12)


ROUTERS = {
    "aux_loss": dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1),
    "seq_aux_loss": dict(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.1),
    "global_aux_loss": dict(
        moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.1
    ),
    "z_loss": dict(moe_z_loss_coeff=0.1),
    "sinkhorn": dict(moe_router_load_balancing_type="sinkhorn"),
    "sigmoid": dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    "groups": dict(
        moe_router_num_groups=2, moe_router_group_topk=1, moe_router_topk_scaling_factor=2.5
    ),
    "fp32": dict(moe_router_dtype="fp32"),
    "fp64": dict(moe_router_dtype="fp64"),
}


@pytest.mark.over_devices
@over_some_grids
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_is_served(ranks, device, num_ranks, grid, router):
    # With expert tensor parallelism alltoall adds partial outputs in the dtype of probs.
    atol = 1e-4 if router == "fp32" and grid.etp > 1 else 1e-12
    # On GPUs the router's GEMM may be Transformer Engine's, which cannot convert from fp64.
    dtype = torch.float32 if (device, router) == ("cuda", "fp32") else torch.float64
    check(ranks, grid, [Case(num_experts=8, dtype=dtype, options=ROUTERS[router])], atol=atol)


@pytest.mark.over_devices
@over_some_grids
@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("pad", [False, True], ids=["drop", "pad"])
def test_capacity_limits_of_the_router_are_honoured(ranks, num_ranks, grid, policy, pad):
    cases = [
        Case(
            topk=topk,
            options=dict(
                moe_expert_capacity_factor=factor,
                moe_token_drop_policy=policy,
                moe_pad_expert_input_to_capacity=pad,
                moe_router_load_balancing_type="aux_loss",
                moe_aux_loss_coeff=0.1,
            ),
        )
        for topk in (1, 2)
        for factor in (0.3, 1.0, 1.5)
    ]
    check(ranks, grid, cases, atol=1e-12)


@pytest.mark.over_devices
@over_some_grids
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("overlap", [False, True], ids=["apart", "overlapped"])
def test_shared_experts_are_added(ranks, num_ranks, grid, overlap, gate):
    options = dict(
        moe_shared_expert_intermediate_size=32,
        moe_shared_expert_overlap=overlap,
        moe_shared_expert_gate=gate,
    )
    check(ranks, grid, [Case(options=options)], atol=1e-12)


@pytest.mark.over_devices
def test_probs_may_be_applied_to_the_input(ranks):
    check(ranks, Grid(ep=2), [Case(topk=1, options=dict(moe_apply_probs_on_input=True))], atol=0)


@pytest.mark.over_devices
@over_some_grids
def test_layer_may_be_recomputed_in_the_backward(ranks, num_ranks, grid):
    options = dict(recompute_granularity="selective", recompute_modules=["moe"])
    check(ranks, grid, [Case(options=options)], atol=1e-12)


ORDERS = ["F0 B0", "F0 F1 B0 B1", "F0 F1 B1 B0", "F0 F1 B0 F2 B2 B1"]


@pytest.mark.over_devices
@over_some_grids
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "shared"])
def test_two_layers_and_several_micro_batches_in_flight(ranks, num_ranks, grid, overlap):
    options = {}
    if overlap:
        options = dict(moe_shared_expert_intermediate_size=32, moe_shared_expert_overlap=True)
    case = Case(options=options)
    by_rank = ranks.run(layers.compare_in_flight, grid, case, ORDERS)
    # Outputs of the second layer reach 100.
    layers.assert_close(by_rank, [case] * len(ORDERS), atol=1e-10, bitwise=grid.etp == 1)
