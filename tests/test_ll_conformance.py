"""Low-latency dispatch is byte-exact and combine bit-exact against the specification."""

import hashlib
import os
from dataclasses import replace

import ll_cases
import pytest
import torch
from ll_cases import FP8_OPTIONS, Case, World

from ep_kernels import reference
from ep_kernels.testing import ROUTING_KINDS, assert_bitwise_equal
from ep_kernels.testing.assertions import as_bytes

pytestmark = pytest.mark.usefixtures("ll_backend")

RANKS = pytest.mark.parametrize("num_ranks", [1, 2, 4, 8], ids="R{}".format)
FORMATS = pytest.mark.parametrize("format", list(FP8_OPTIONS))


@RANKS
@pytest.mark.parametrize("num_topk", [1, 2, 3, "all"], ids="K={}".format)
@pytest.mark.parametrize("routing", ["uniform", "masked"])
def test_any_num_topk(ranks, num_ranks, num_topk, routing):
    num_topk = 8 if num_topk == "all" else num_topk
    ranks.run(ll_cases.run_case, Case(num_ranks=num_ranks, num_topk=num_topk, routing=routing))


@RANKS
@pytest.mark.parametrize("routing", list(ROUTING_KINDS))
def test_any_routing(ranks, num_ranks, routing):
    """one_expert: all tokens of all ranks go to expert 0."""
    ranks.run(ll_cases.run_case, Case(num_ranks=num_ranks, routing=routing, num_topk=4))


@RANKS
@pytest.mark.parametrize(
    "num_tokens",
    [(0,) * 8, (0, 9, 9, 9, 0, 0, 0, 9), (1,) * 8, (64,) * 8],
    ids=["none", "some", "one", "all"],
)
def test_any_number_of_tokens(ranks, num_ranks, num_tokens):
    ranks.run(ll_cases.run_case, Case(num_ranks=num_ranks, num_tokens=num_tokens))


@FORMATS
@pytest.mark.parametrize("hidden", [512, 7168])
def test_any_row_format(ranks, format, hidden):
    case = Case(num_tokens=(11, 16), most=16, format=format, hidden=hidden, num_topk=4)
    ranks.run(ll_cases.run_cases, [case, replace(case, wire="fp8")])


@pytest.mark.parametrize("hidden", [8, 24, 128, 2880])
def test_any_hidden_of_16_bytes(ranks, hidden):
    ranks.run(ll_cases.run_case, Case(num_tokens=(11, 30), most=32, hidden=hidden))


@pytest.mark.parametrize("hidden", [128, 384, 2944])
@pytest.mark.parametrize("format", ["fp8", "fp8 rounded"])
def test_fp8_needs_a_multiple_of_128(ranks, hidden, format):
    case = Case(num_tokens=(11, 30), most=32, hidden=hidden, format=format, wire="fp8")
    ranks.run(ll_cases.run_case, case)


def on_rank_in_place(rank, case):
    world = World(case, rank)
    with ll_cases.make_ll_buffer(case) as buffer:
        for _ in range(3):
            handle = ll_cases.dispatch(buffer, world).handle
            x = buffer.next_low_latency_combine_buffer(handle).copy_(world.ys[rank])
            idx, weights = world.topk_idxs[rank], world.topk_weights[rank]
            options = dict(wire_format=case.wire, zero_copy=False)
            ll_cases.check_combine(
                buffer.low_latency_combine(x, idx, weights, handle, **options), world
            )


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize("num_sms", [1, 3])
def test_rows_that_are_in_the_combine_buffer_may_be_copied_there(ranks, wire, num_sms):
    case = Case(num_tokens=(50, 33), hidden=1024, num_topk=3, wire=wire, num_sms=num_sms)
    ranks.run(on_rank_in_place, case)


@FORMATS
@pytest.mark.parametrize("num_sms", [2, 3])
def test_threads_change_nothing(ranks, format, num_sms):
    case = Case(num_tokens=(50, 33), hidden=512, format=format, num_topk=3, num_sms=num_sms)
    ranks.run(ll_cases.run_cases, [case, replace(case, wire="fp8")])


@pytest.mark.parametrize("placement", [(0, 1, 0, 1, 0), (2, 2, 2, 0, 2), (1, 1, 0)], ids=str)
def test_experts_may_lie_anywhere(rank_pool, placement):
    num_ranks = max(placement) + 1
    case = Case(num_ranks=num_ranks, num_experts=len(placement), placement=placement)
    rank_pool.get(num_ranks).run(ll_cases.run_case, case)


def test_1024_tokens(ranks):
    case = Case(num_tokens=(1024, 1000), most=1024, num_topk=4, num_experts=16)
    ranks.run(ll_cases.run_case, case, deadline_s=120.0)


# Bits of FP8


def every_bf16(seed):
    """[1024, 128]: every bit pattern twice, among others of all magnitudes and of its own."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(seed))
    return torch.cat([values[order], values]).view(torch.bfloat16).view(1024, 128)


def on_rank_all_patterns(rank, simd):
    if simd:
        os.environ["EP_KERNELS_SIMD"] = simd
    case = Case(num_ranks=1, num_experts=1, num_topk=1, num_tokens=(1024,), most=1024)
    topk_idx = torch.zeros(1024, 1, dtype=torch.int64)
    x = every_bf16(rank)
    with ll_cases.make_ll_buffer(case) as buffer:
        for options in FP8_OPTIONS.values():
            if not options or options.get("use_ue8m0"):
                continue
            result = buffer.low_latency_dispatch(
                x, topk_idx, num_max_tokens_per_rank=1024, num_experts=1, **options
            )
            rows, scales = reference.fp8_cast(x, round_scale=options.get("round_scale", False))
            assert_bitwise_equal(result.recv_x[0], rows, name="rows")
            assert_bitwise_equal(result.recv_scales[0].contiguous(), scales, name="scales")
            combined = buffer.low_latency_combine(
                x[None], topk_idx, torch.ones(1024, 1), result.handle, wire_format="fp8"
            )
            rows, scales = reference.fp8_cast(x)
            want = (0.0 + rows.float() * scales).bfloat16()
            want = want.masked_fill_(want.isnan(), float("nan"))
            assert_bitwise_equal(combined.x, want, name="combine")


@pytest.mark.parametrize("simd", ["", "scalar", "avx2"])
def test_the_fp8_cast_is_right_for_every_bf16(launch, simd, ll_backend):
    if simd and ll_backend == "cuda":
        pytest.skip("one path on the GPU")
    launch(on_rank_all_patterns, simd, num_ranks=1)


def test_the_reference_cast_keeps_its_error_bound():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    for options in ({}, {"round_scale": True}):
        rows, scales = reference.fp8_cast(x, **options)
        scale = scales.repeat_interleave(128, dim=1)
        error = (rows.float() * scale - x.float()).abs()
        assert (error <= torch.maximum(x.float().abs() / 16, scale / 1024)).all()


def test_ue8m0_scales_are_exponents_of_the_rounded_ones():
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, packed = reference.fp8_cast(x, round_scale=True, use_ue8m0=True)
    _, scales = reference.fp8_cast(x, round_scale=True)
    assert packed.shape == (4, 2)
    exponents = packed.view(torch.uint8).int() - 127
    assert torch.equal(torch.ldexp(torch.ones(4, 8), exponents), scales)


# The same bits every time


def on_rank_repeat(rank, case, repetitions):
    world = World(case, rank)
    digests = set()
    is_sent = world.rows[rank].src_rank >= 0
    with ll_cases.make_ll_buffer(case) as buffer:
        for _ in range(repetitions):
            result = ll_cases.dispatch(buffer, world)
            parts = [result.recv_x[is_sent]]
            if result.recv_scales is not None:
                parts.append(result.recv_scales[is_sent])
            out = ll_cases.combine(buffer, world, result.handle, zero_copy=case.wire == "bf16").x
            digest = hashlib.sha256()
            for part in (*parts, result.recv_count, out):
                digest.update(as_bytes(part).numpy().tobytes())
            digests.add(digest.hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize(("format", "wire"), [("bf16", "bf16"), ("fp8", "fp8")])
def test_repetitions_give_the_same_bytes(ranks, is_exhaustive, format, wire):
    case = Case(num_tokens=(50, 37), hidden=256, num_topk=4, format=format, wire=wire)
    ranks.run(on_rank_repeat, case, 10000 if is_exhaustive else 1000, deadline_s=120.0)
