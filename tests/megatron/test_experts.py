"""Experts on torch's grouped GEMM compute what Megatron's SequentialMLP computes: on the CPU to the
last bit, wherever GEMMs see the same rows.
"""

import expert_cases as cases
import moe_layers as layers
import pytest
import torch
import torch.nn.functional as F
from moe_layers import Case, Grid

from ep_kernels import reference
from megatron_ep import grouped_gemm
from megatron_ep.grouped_gemm import grouped_mm, has_kernel

GRIDS = [(1, Grid()), (2, Grid(ep=2)), (2, Grid(tp=2, etp=2)), (4, Grid(tp=2, ep=2, etp=2))]

over_grids = pytest.mark.parametrize(
    ("num_ranks", "grid"), GRIDS, ids=[f"R{n}-{grid}" for n, grid in GRIDS]
)

both_chunks = pytest.mark.parametrize("num_chunks", [1, 3])


def check(ranks, grid, of_cases, *, dispatcher="deepep", atol=0.0, options=None, **of_buffers):
    arguments = grid, of_cases, (dispatcher, dispatcher), options or {}, of_buffers
    by_rank = ranks.run(cases.compare_experts, *arguments)
    layers.assert_close(by_rank, of_cases, atol=atol)


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@over_grids
def test_experts_have_the_bits_of_sequential_experts(ranks, num_ranks, grid):
    sizes = [(4, 1), (4, 2), (8, 4)]
    check(ranks, grid, [Case(num_experts=e, topk=k, dtype=d) for d in DTYPES for e, k in sizes])


def test_experts_work_under_alltoall(ranks):
    check(ranks, Grid(ep=2), [Case(dtype=d) for d in DTYPES], dispatcher="alltoall")


def test_experts_work_on_the_reference_buffer(ranks):
    check(ranks, Grid(ep=2), [Case()], buffer_class=reference.Buffer)


ACTIVATIONS = {
    "gelu": dict(gated_linear_unit=False, activation_func=F.gelu),
    "geglu": dict(activation_func=F.gelu),
    "swiglu, fused": dict(activation_func=F.silu, bias_activation_fusion=True),
    "swiglu, clamped": dict(
        activation_func=F.silu, activation_func_clamp_value=0.5, glu_linear_offset=1.0
    ),
    "probs on input": dict(moe_apply_probs_on_input=True),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_that_of_megatron(ranks, name):
    case = Case(topk=1 if "probs" in name else 2, options=ACTIVATIONS[name])
    check(ranks, Grid(ep=2), [case])


def test_activations_may_be_recomputed(ranks):
    recomputed = dict(recompute_granularity="selective", recompute_modules=["moe_act"])
    check(ranks, Grid(ep=2), [Case(late_options=recomputed)])


def test_ranks_and_experts_may_have_no_rows(ranks):
    lengths = [(1, 1), (1, 9)]
    check(ranks, Grid(ep=2), [Case(num_experts=8, topk=1, seq_length=n) for n in lengths])


def test_chunks_work(ranks):
    check(ranks, Grid(ep=2), [Case(), Case(topk=4)], atol=1e-12, options={"num_chunks": 3})


LATE = {"overlap_weight_gradients": True}


@over_grids
def test_late_gradients_of_weights_have_the_same_bits(ranks, num_ranks, grid):
    of_cases = [*(Case(dtype=d) for d in DTYPES), Case(num_experts=8, topk=4)]
    check(ranks, grid, of_cases, options=LATE)


def test_late_gradients_of_weights_work_in_chunks(ranks):
    options = {"num_chunks": 3, **LATE}
    check(ranks, Grid(ep=2), [Case(), Case(topk=4)], atol=1e-12, options=options)


@both_chunks
def test_gradients_of_weights_are_computed_while_those_of_tokens_travel(ranks, num_chunks):
    for steps in ranks.run(cases.note_backward_steps, num_chunks):
        assert steps == ["dispatch"] * min(2, num_chunks) + [
            step
            for chunk in range(num_chunks)
            for step in (["dispatch"] if chunk + 2 < num_chunks else []) + ["combine", "weights"]
        ]


@pytest.mark.parametrize("fused", [False, True], ids=["hook", "fused"])
@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "late"])
@both_chunks
def test_gradients_add_up_in_main_grad(ranks, fused, num_chunks, is_late):
    ranks.run(cases.check_main_grads, fused, num_chunks, is_late)


@pytest.mark.parametrize("singleton", [False, True], ids=["stacked", "singleton"])
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("num_ranks", "grid"), [(2, Grid(ep=2)), (4, Grid(tp=2, ep=2, etp=2))], ids=["ep2", "ep2etp2"]
)
def test_checkpoints_are_those_of_sequential_experts(
    ranks, num_ranks, grid, tmp_path, is_gated, singleton
):
    ranks.run(cases.check_checkpoints, grid, tmp_path, is_gated, singleton, deadline_s=120)


# With a capacity


@both_chunks
@pytest.mark.parametrize(
    ("num_ranks", "grid"), [(2, Grid(ep=2)), (4, Grid(tp=2, ep=2, etp=2))], ids=["ep2", "ep2etp2"]
)
def test_with_room_for_all_rows_a_capacity_changes_no_bit(ranks, num_ranks, grid, num_chunks):
    for case in (Case(), Case(num_experts=8, topk=4, dtype=torch.bfloat16)):
        for differences, num_dropped in ranks.run(
            cases.compare_capacity, grid, case, 4.0, num_chunks
        ):
            layers.assert_close([differences], [case], atol=0.0, bitwise=True)
            assert num_dropped == 0


def test_rows_past_the_capacity_are_left_out_and_counted(ranks):
    by_rank = ranks.run(cases.drop_rows, Case(num_experts=8, topk=2), 0.8)
    assert sum(first for first, _ in by_rank) > 0
    assert all(both == 2 * first for first, both in by_rank)


def test_a_recomputed_forward_drops_the_same_rows_once(ranks):
    ranks.run(cases.check_recomputation_counts_once)


@pytest.mark.parametrize("num_ranks", [1])
def test_the_number_of_experts_adds_no_operator(ranks, num_ranks):
    ((few, many),) = ranks.run(cases.count_operators)
    assert few == many
    assert few["_grouped_mm"] == 6


@pytest.mark.over_devices
@both_chunks
def test_with_a_capacity_the_host_reads_nothing(ranks, device, num_chunks):
    ranks.run(cases.forward_and_backward_without_reading, num_chunks)


def test_what_cannot_be_is_refused(ranks):
    ranks.run(cases.check_refusals)


# On GPUs


def on_gpus(function):
    return pytest.mark.gpu(1)(pytest.mark.parametrize("device", ["cuda"])(function))


@on_gpus
@pytest.mark.parametrize("dispatcher", ["deepep", "alltoall"])
def test_experts_agree_with_sequential_experts_on_gpus(ranks, device, dispatcher):
    of_cases = [
        Case(num_experts=e, topk=k, dtype=torch.bfloat16, seq_length=n)
        for e, k, n in ((4, 2, (12,)), (8, 4, (100, 7)), (16, 1, (1, 1)))
    ]
    check(ranks, Grid(ep=2), of_cases, dispatcher=dispatcher)


@on_gpus
@both_chunks
def test_a_capacity_changes_no_bit_on_gpus(ranks, device, num_chunks):
    case = Case(num_experts=8, topk=4, dtype=torch.bfloat16)
    arguments = Grid(ep=2), case, 4.0, num_chunks
    for differences, num_dropped in ranks.run(cases.compare_capacity, *arguments):
        assert all(one.is_bitwise for one in differences[0])
        assert num_dropped == 0


@on_gpus
@both_chunks
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_captured_layer_replays_with_new_inputs(ranks, device, num_ranks, num_chunks):
    by_rank = ranks.run(cases.replay_and_compare, num_chunks)
    assert all(eager == replayed for eager, replayed in by_rank)
    assert num_ranks == 1 or sum(eager for eager, _ in by_rank) > 0


def test_a_captured_layer_hands_its_memory_in_and_out(ranks):
    by_rank = ranks.run(cases.replay_on_the_cpu)
    assert all(eager == replayed for eager, replayed in by_rank)
    assert sum(eager for eager, _ in by_rank) > 0


def test_what_cannot_be_captured_is_refused(ranks):
    ranks.run(cases.check_capture_refusals)


# The GEMM alone


@pytest.mark.parametrize("ends", [[4, 4, 17], [4, 4, 24], [0, 0, 0], [24, 24, 24]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loops", [False, True], ids=["kernel", "loop"])
def test_grouped_gemm_is_that_of_each_group(monkeypatch, ends, dtype, loops):
    if loops:
        monkeypatch.setattr(grouped_gemm, "has_kernel", lambda *_: False)
    torch.manual_seed(0)
    x, weight, grad = torch.randn(24, 16), torch.randn(3, 32, 16), torch.randn(24, 32)
    x, weight, grad = x.to(dtype), weight.to(dtype), grad.to(dtype)
    x[ends[-1] :] = grad[ends[-1] :] = torch.nan
    x.requires_grad_(), weight.requires_grad_()
    out = grouped_mm(x, weight, torch.tensor(ends, dtype=torch.int32))
    out.backward(grad)
    for group, (begin, end) in enumerate(zip([0, *ends], ends)):
        one = x[begin:end].detach().requires_grad_()
        matrix = weight[group].detach().requires_grad_()
        want = F.linear(one, matrix)
        want.backward(grad[begin:end])
        assert torch.equal(out[begin:end], want)
        assert torch.equal(x.grad[begin:end], one.grad)
        assert torch.equal(weight.grad[group], matrix.grad)


def test_grouped_gemm_takes_no_rows():
    x, weight = torch.empty(0, 16, requires_grad=True), torch.ones(2, 8, 16, requires_grad=True)
    grouped_mm(x, weight, torch.zeros(2, dtype=torch.int32)).sum().backward()
    assert not weight.grad.any()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(x=torch.ones(3, 5)), r"x of shape \(3, 5\)"),
        (dict(x=torch.ones(3, 4).double()), "x has dtype torch.float64"),
        (dict(ends=torch.tensor([1, 3])), "torch.int64 on cpu"),
        (dict(ends=torch.tensor([3]).int()), r"ends of shape \(1,\)"),
    ],
)
def test_grouped_gemm_refuses_what_does_not_fit(change, word):
    arguments = dict(
        x=torch.ones(3, 4), weight=torch.ones(2, 4, 4), ends=torch.tensor([1, 3]).int()
    )
    with pytest.raises(ValueError, match=word):
        grouped_mm(**(arguments | change))


def test_torch_here_has_the_kernel():
    """Otherwise none of these tests would call it."""
    assert has_kernel(torch.device("cpu"), torch.bfloat16)
