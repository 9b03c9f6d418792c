"""What ranks do to check the interface of DeepEP row by row; functions of ranks, like in cases.py.

Tensors are on the backend's device. A row of the input is the number of its rank, so that a
received row tells where it is from.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import ep_kernels
from ep_kernels import EPConfigError, deep_ep
from ep_kernels.testing import make_routing

NUM_EXPERTS, NUM_TOPK, HIDDEN = 8, 3, 256
NUM_TOKENS = (37, 0, 64, 1)

MAX_DIFF_BF16, MAX_DIFF_WEIGHTS = 5e-6, 1e-9


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - 2<a, b> / (|a|^2 + |b|^2): 0 for equal tensors."""
    a, b = a.double(), b.double()
    norms = (a * a + b * b).sum()
    return float(1 - 2 * (a * b).sum() / norms) if norms else 0.0


@dataclass
class Batch:
    """One rank's input, and its layout. `marked`: every element is the rank's number."""

    x: torch.Tensor
    marked: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    layout: dict[str, torch.Tensor | None]

    @property
    def is_token_in_rank(self) -> torch.Tensor:
        in_rank = self.layout["is_token_in_rank"]
        assert in_rank is not None
        return in_rank

    @property
    def routing(self) -> dict[str, Any]:
        return {**self.layout, "topk_idx": self.topk_idx, "topk_weights": self.topk_weights}


@contextlib.contextmanager
def buffer_and_batch(rank: int, backend: str) -> Iterator[tuple[deep_ep.Buffer, Batch]]:
    device = torch.device(backend, rank % torch.cuda.device_count() if backend == "cuda" else None)
    buffer = deep_ep.Buffer(dist.group.WORLD, int(1e6), 0, explicitly_destroy=True)
    num_tokens = NUM_TOKENS[rank]
    topk_idx, topk_weights = make_routing("masked", num_tokens, NUM_TOPK, NUM_EXPERTS, seed=rank)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16().to(device)
    topk_idx = topk_idx.to(device, deep_ep.topk_idx_t)
    names = (
        "num_tokens_per_rank",
        "num_tokens_per_rdma_rank",
        "num_tokens_per_expert",
        "is_token_in_rank",
    )
    *layout, _ = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
    yield (
        buffer,
        Batch(
            x=x,
            marked=torch.full_like(x, rank),
            topk_idx=topk_idx,
            topk_weights=topk_weights.float().to(device),
            layout=dict(zip(names, layout)),
        ),
    )
    buffer.destroy()


def sum_over_ranks(counts: torch.Tensor) -> torch.Tensor:
    total = counts.cpu().clone()
    dist.all_reduce(total)
    return total


def check_marked_rows(recv_x: torch.Tensor, handle: deep_ep.DispatchHandle, rank: int) -> None:
    """Rows of each source rank are together, constant, and where the prefix matrix says."""
    prefix, begin = handle[0], 0
    num_ranks = dist.get_world_size()
    assert prefix.shape == (num_ranks, num_ranks)
    assert prefix.dtype == torch.int32
    for src in range(num_ranks):
        end = int(prefix[src][rank])
        assert (recv_x[begin:end] == src).all(), f"rows {begin} to {end} are not of rank {src}"
        begin = end
    assert begin == len(recv_x)


# Rows of the table


def check_layout(rank: int, backend: str) -> None:
    with buffer_and_batch(rank, backend) as (buffer, batch):
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            batch.topk_idx, NUM_EXPERTS, previous_event=buffer.capture(), async_finish=True
        )
        event.current_stream_wait()
        ranks = batch.topk_idx.div(
            NUM_EXPERTS // dist.get_world_size(), rounding_mode="floor"
        ).masked_fill(batch.topk_idx < 0, -1)
        for dst in range(dist.get_world_size()):
            assert torch.equal(in_rank[:, dst], (ranks == dst).any(dim=1))
        assert per_rank.dtype == per_expert.dtype == torch.int32
        assert torch.equal(per_rank, in_rank.sum(0).int())
        chosen = batch.topk_idx[batch.topk_idx >= 0]
        assert torch.equal(per_expert, chosen.bincount(minlength=NUM_EXPERTS).int())
        assert per_node is None


def check_dispatch(rank: int, backend: str, with_topk: bool, options: dict[str, Any]) -> None:
    """Rows, choices, weights and counts; with top-k and without it, asynchronously and not."""
    with buffer_and_batch(rank, backend) as (buffer, batch):
        routing = batch.routing if with_topk else batch.layout
        if options.get("async_finish"):
            options = {**options, "previous_event": buffer.capture()}
        recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            batch.marked, **routing, **options
        )
        event.current_stream_wait()
        check_marked_rows(recv_x, handle, rank)
        per_rank = sum_over_ranks(batch.layout["num_tokens_per_rank"])
        per_expert = sum_over_ranks(batch.layout["num_tokens_per_expert"])
        assert len(recv_x) == per_rank[rank]
        num_local = NUM_EXPERTS // dist.get_world_size()
        alignment = options.get("expert_alignment", 1)
        mine = per_expert[rank * num_local : (rank + 1) * num_local]
        assert counts == [-(-count // alignment) * alignment for count in mine.tolist()]
        if not with_topk:
            assert recv_idx is None
            assert recv_weights is None
            return
        assert recv_idx.dtype == torch.int64
        assert ((recv_idx >= -1) & (recv_idx < num_local)).all()
        received = recv_idx[recv_idx >= 0].bincount(minlength=num_local)
        assert torch.equal(received.cpu(), mine.long())
        assert (recv_idx >= 0).any(dim=1).all()
        assert torch.equal(recv_weights > 0, recv_idx >= 0)


def check_cached_dispatch(rank: int, backend: str) -> None:
    with buffer_and_batch(rank, backend) as (buffer, batch):
        first, _, _, _, handle, _ = buffer.dispatch(batch.x, **batch.routing)
        again, *nothing, event = buffer.dispatch(
            batch.x, handle=handle, async_finish=True, previous_event=buffer.capture()
        )
        event.current_stream_wait()
        assert nothing == [None] * 4
        assert torch.equal(first, again)
        with contextlib.suppress(EPConfigError):
            buffer.dispatch(batch.x, handle=handle, topk_idx=batch.topk_idx)
            raise AssertionError("topk_idx is accepted beside a handle")


def check_worst_case_dispatch(rank: int, backend: str) -> None:
    with buffer_and_batch(rank, backend) as (buffer, batch):
        exact = buffer.dispatch(batch.x, **batch.routing)
        num_rows, limit = len(exact[0]), sum(NUM_TOKENS) + 5
        recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            batch.x,
            **batch.routing,
            num_worst_tokens=limit,
            async_finish=True,
            previous_event=buffer.capture(),
            allocate_on_comm_stream=True,
        )
        with event:
            assert counts == []
            assert len(recv_x) == len(recv_idx) == len(recv_weights) == limit
        assert torch.equal(recv_x[:num_rows], exact[0])
        assert torch.equal(recv_idx[:num_rows], exact[1])
        assert torch.equal(recv_weights[:num_rows], exact[2])
        assert (recv_idx[num_rows:] == -1).all()
        combined, _, _ = buffer.combine(recv_x, handle)
        assert torch.equal(combined, buffer.combine(exact[0], exact[4])[0])
        with contextlib.suppress(EPConfigError):
            buffer.dispatch(batch.x, **batch.layout, num_worst_tokens=limit)
            raise AssertionError("num_worst_tokens is accepted without top-k")


def check_fp8_dispatch(rank: int, backend: str) -> None:
    """Scales come column by column, as fp8 GEMMs want them."""
    with buffer_and_batch(rank, backend) as (buffer, batch):
        groups = batch.x.float().view(-1, HIDDEN // 128, 128)
        scales = groups.abs().amax(dim=2).clamp(min=1e-4) / 448
        rows = (groups / scales[:, :, None]).to(torch.float8_e4m3fn).view(-1, HIDDEN)
        pair = rows, scales.T.contiguous().T
        (recv_rows, recv_scales), _, _, _, handle, _ = buffer.dispatch(pair, **batch.routing)
        recv_x, *_ = buffer.dispatch(batch.x, handle=handle)
        assert recv_scales.shape == (len(recv_x), HIDDEN // 128)
        restored = recv_rows.float().view(-1, HIDDEN // 128, 128) * recv_scales[:, :, None]
        assert difference(restored.view(-1, HIDDEN), recv_x) < 9e-4
        again, *_ = buffer.dispatch(pair, handle=handle)
        assert torch.equal(again[0].view(torch.uint8), recv_rows.view(torch.uint8))
        assert torch.equal(again[1], recv_scales)


def check_combine(rank: int, backend: str, num_biases: int, is_async: bool) -> None:
    """What was dispatched comes back as often as it has ranks."""
    with buffer_and_batch(rank, backend) as (buffer, batch):
        recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(batch.x, **batch.routing)
        biases = tuple(torch.full_like(batch.x, 0.5) for _ in range(num_biases))
        options: dict[str, Any] = {}
        if is_async:
            options = dict(async_finish=True, previous_event=buffer.capture())
        combined, weights, event = buffer.combine(
            recv_x,
            handle,
            topk_weights=recv_weights,
            bias={0: None, 1: biases[0] if biases else None, 2: biases}[num_biases],
            config=buffer.get_combine_config(2),
            **options,
        )
        event.current_stream_wait()
        in_rank = batch.is_token_in_rank.sum(dim=1, keepdim=True)
        got = (combined.float() - 0.5 * num_biases) / in_rank.clamp(min=1)
        want = batch.x.float() * (in_rank > 0)
        assert difference(got, want) < (MAX_DIFF_BF16 if num_biases == 0 else 1e-4)
        want_weights = batch.topk_weights.masked_fill(batch.topk_idx < 0, 0)
        assert difference(weights, want_weights) < MAX_DIFF_WEIGHTS


def check_events(rank: int, backend: str) -> None:
    with buffer_and_batch(rank, backend) as (buffer, batch):
        event = buffer.capture()
        recv_x, _, _, _, handle, event = buffer.dispatch(
            batch.x, **batch.routing, previous_event=event, async_finish=True
        )
        combined, _, after = buffer.combine(
            recv_x, handle, previous_event=event, async_finish=True, allocate_on_comm_stream=True
        )
        with after:
            pass
        with deep_ep.utils.EventOverlap(deep_ep.utils.EventHandle(), (combined,)) as overlap:
            assert overlap.extra_tensors == (combined,)
        deep_ep.EventOverlap().current_stream_wait()
        assert torch.equal(combined, buffer.combine(recv_x, handle)[0])
        with contextlib.suppress(EPConfigError):
            buffer.combine(recv_x, handle, allocate_on_comm_stream=True)
            raise AssertionError("allocate_on_comm_stream is accepted alone")


def check_statics(rank: int, backend: str) -> None:
    config = deep_ep.Config(24, 8, 512, 8, 512)
    assert (config.num_sms, config.nvl_recv, config.rdma_recv) == (24, 512, 512)
    assert config.get_nvl_buffer_size_hint(14336, 8) >= 0
    assert config.get_rdma_buffer_size_hint(14336, 8) >= 0
    assert deep_ep.Config(num_max_nvl_chunked_send_tokens=16).nvl_send == 16
    before = deep_ep.Buffer.num_sms
    deep_ep.Buffer.set_num_sms(before + 2)
    try:
        assert deep_ep.Buffer.get_dispatch_config(8).num_sms == before + 2
        assert deep_ep.Buffer.get_combine_config(8).num_sms == before + 2
    finally:
        deep_ep.Buffer.set_num_sms(before)
    assert deep_ep.Buffer.is_sm90_compiled()
    for wrong in (
        lambda: deep_ep.Buffer.set_num_sms(3),
        lambda: deep_ep.Config(0),
        lambda: deep_ep.Config(num_chunks=3),
        lambda: deep_ep.Buffer.get_dispatch_config(0),
    ):
        with contextlib.suppress(EPConfigError):
            wrong()
            raise AssertionError("a wrong argument is accepted")


def check_others(rank: int, backend: str) -> None:
    with buffer_and_batch(rank, backend) as (buffer, batch):
        assert buffer.get_comm_stream() is not None
        memory = buffer.get_local_buffer_tensor(torch.float32)
        assert memory.shape == (250_000,)
        memory[2] = 7
        part = buffer.get_local_buffer_tensor(torch.float32, torch.Size((2, 3)), offset=8)
        assert part.shape == (2, 3)
        assert part[0, 0] == 7
        assert buffer.get_local_buffer_tensor(torch.int64, use_rdma_buffer=True).shape == (0,)
        buffer.destroy()
        buffer.destroy()
        with contextlib.suppress(EPConfigError):
            buffer.get_dispatch_layout(batch.topk_idx, NUM_EXPERTS)
            raise AssertionError("a destroyed buffer can be used")


def check_several_numbers_of_experts(rank: int, backend: str) -> None:
    """Layers with different numbers of experts share a buffer, and their calls may interleave."""
    with buffer_and_batch(rank, backend) as (buffer, batch):
        recv_x, _, _, _, handle, _ = buffer.dispatch(batch.x, **batch.routing)
        fewer = batch.topk_idx.masked_fill(batch.topk_idx >= NUM_EXPERTS // 2, -1)
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(fewer, NUM_EXPERTS // 2)
        other, _, _, _, other_handle, _ = buffer.dispatch(
            batch.x, None, per_rank, None, in_rank, per_expert, fewer, batch.topk_weights
        )
        for rows, its_handle, ranks in (
            (other, other_handle, in_rank),
            (recv_x, handle, batch.is_token_in_rank),
        ):
            combined, _, _ = buffer.combine(rows, its_handle)
            assert difference(combined, batch.x * ranks.sum(1, keepdim=True)) < MAX_DIFF_BF16


def check_two_nodes(rank: int) -> None:
    """Ranks of one machine taken for two nodes."""
    num_local_ranks = dist.get_world_size() // 2
    on_nodes = functools.partial(ep_kernels.Buffer, num_local_ranks=num_local_ranks)
    with (
        mock.patch.object(ep_kernels, "Buffer", on_nodes),
        buffer_and_batch(rank, "cpu") as (buffer, batch),
    ):
        per_node, in_rank = batch.layout["num_tokens_per_rdma_rank"], batch.is_token_in_rank
        for node in range(2):
            its_ranks = slice(node * num_local_ranks, (node + 1) * num_local_ranks)
            assert per_node[node] == in_rank[:, its_ranks].any(dim=1).sum()
        recv_x, _, _, _, handle, _ = buffer.dispatch(batch.marked, **batch.routing)
        check_marked_rows(recv_x, handle, rank)
        recv_x, *_ = buffer.dispatch(batch.x, handle=handle)
        combined, _, _ = buffer.combine(recv_x, handle)
        want = batch.x * in_rank.sum(dim=1, keepdim=True)
        assert difference(combined, want) < MAX_DIFF_BF16


def check_missing_layout(rank: int, backend: str) -> str:
    with buffer_and_batch(rank, backend) as (buffer, batch):
        try:
            buffer.dispatch(batch.x, topk_idx=batch.topk_idx)
        except EPConfigError as error:
            return str(error)
    return "accepted"


def check_refusals_of_one_rank(rank: int, backend: str) -> None:
    """What the adapter refuses is refused on all ranks, whose next calls belong together."""
    with buffer_and_batch(rank, backend) as (buffer, batch):
        first, _, _, _, handle, _ = buffer.dispatch(batch.x, **batch.routing)
        for wrong in (
            dict(handle=handle, topk_idx=batch.topk_idx),
            dict(batch.routing, is_token_in_rank=None),
            dict(batch.routing, topk_idx=None, topk_weights=None, num_worst_tokens=9),
            dict(batch.routing, allocate_on_comm_stream=True),
        ):
            arguments = wrong if rank == 1 else batch.routing
            if "handle" in wrong and rank != 1:
                arguments = dict(handle=handle)
            refusal = "accepted"
            try:
                buffer.dispatch(batch.x, **arguments)
            except EPConfigError as error:
                refusal = str(error)
            assert refusal != "accepted", wrong
            assert rank == 1 or "rank 1 refused this call" in refusal, refusal
            assert torch.equal(buffer.dispatch(batch.x, **batch.routing)[0], first)


def round_trip_over(comm: Any) -> None:
    """Of a rank under MPI: a communicator instead of a group."""
    rank, size = comm.Get_rank(), comm.Get_size()
    buffer = deep_ep.Buffer(None, comm=comm)
    assert (buffer.rank, buffer.group_size) == (rank, size)
    x = torch.full((4, HIDDEN), rank, dtype=torch.bfloat16)
    topk_idx = torch.arange(size).repeat(4, 1)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, size)
    recv_x, _, _, counts, handle, _ = buffer.dispatch(
        x, None, per_rank, None, in_rank, per_expert, topk_idx, torch.ones(4, size)
    )
    assert counts == [4 * size]
    combined, _, _ = buffer.combine(recv_x, handle)
    assert torch.equal(combined, x * size)
    buffer.destroy()


# Low-latency calls

LL_TOKENS, LL_MAX_TOKENS, LL_HIDDEN = (9, 0, 12, 1), 12, 512
LL_MAX_DIFF = {False: 1e-5, True: 9e-4}  # by whether anything travels in fp8


@contextlib.contextmanager
def low_latency_buffer(rank: int, **options: Any) -> Iterator[tuple[deep_ep.Buffer, Batch]]:
    size = dist.get_world_size()
    num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        LL_MAX_TOKENS, LL_HIDDEN, size, NUM_EXPERTS
    )
    buffer = deep_ep.Buffer(
        dist.group.WORLD, 0, num_bytes, low_latency_mode=True, explicitly_destroy=True, **options
    )
    num_tokens = LL_TOKENS[rank]
    topk_idx, weights = make_routing("masked", num_tokens, NUM_TOPK, NUM_EXPERTS, seed=rank)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(num_tokens, LL_HIDDEN, generator=generator).bfloat16()
    yield (
        buffer,
        Batch(
            x=x,
            marked=torch.full_like(x, rank),
            topk_idx=topk_idx,
            topk_weights=weights.float(),
            layout={},
        ),
    )
    buffer.destroy()


def ll_dispatch(buffer: deep_ep.Buffer, batch: Batch, **options: Any) -> Any:
    """A low-latency dispatch, waited for: rows as bf16, counts, handle."""
    packed, counts, handle, event, hook = buffer.low_latency_dispatch(
        batch.x, batch.topk_idx, LL_MAX_TOKENS, NUM_EXPERTS, **options
    )
    if options.get("return_recv_hook"):
        hook()
    event.current_stream_wait()
    return (packed if torch.is_tensor(packed) else dequantized(*packed)), counts, handle


def dequantized(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16 rows; scales are column-major floats or packed exponents."""
    assert scales.stride(-2) == 1
    if scales.dtype == torch.int32:
        packed = scales.clone(memory_format=torch.contiguous_format)
        exponents = packed.view(torch.uint8).to(torch.int32)
        scales = (exponents << 23).view(torch.float32)
    groups = rows.float().unflatten(-1, (-1, 128)) * scales[..., None]
    return groups.flatten(-2).bfloat16()


def check_low_latency(rank: int, dispatch: dict[str, Any], combine: dict[str, Any]) -> None:
    """Rows come back as the weighted sum of what every expert got, and counts are everybody's."""
    use_fp8 = dispatch.get("use_fp8", True)
    num_local = NUM_EXPERTS // dist.get_world_size()
    with low_latency_buffer(rank) as (buffer, batch):
        stats = torch.zeros(num_local, dtype=torch.int32)
        waited = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        rows, counts, handle = ll_dispatch(
            buffer,
            batch,
            cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=waited,
            **dispatch,
        )
        assert rows.shape == (num_local, dist.get_world_size() * LL_MAX_TOKENS, LL_HIDDEN)
        chosen = batch.topk_idx[batch.topk_idx >= 0].bincount(minlength=NUM_EXPERTS)
        mine = sum_over_ranks(chosen)[rank * num_local : (rank + 1) * num_local]
        assert torch.equal(counts.long(), mine)
        assert torch.equal(stats, counts)
        if combine.get("zero_copy"):
            place = buffer.get_next_low_latency_combine_buffer(handle)
            place.copy_(rows)
            rows = place
        out = torch.empty_like(batch.x) if combine.pop("out", False) else None
        combined, event, hook = buffer.low_latency_combine(
            rows, batch.topk_idx, batch.topk_weights, handle, out=out, **combine
        )
        if combine.get("return_recv_hook"):
            hook()
        event.current_stream_wait()
        assert out is None or combined.data_ptr() == out.data_ptr()
        weights = batch.topk_weights.masked_fill(batch.topk_idx < 0, 0).sum(1, keepdim=True)
        is_lossy = use_fp8 or combine.get("use_logfmt", False)
        limit = LL_MAX_DIFF[is_lossy] * (2 if use_fp8 and combine.get("use_logfmt") else 1)
        assert difference(combined, batch.x.float() * weights) < limit


def check_low_latency_memory(rank: int) -> None:
    with low_latency_buffer(rank) as (buffer, batch):
        buffer.clean_low_latency_buffer(LL_MAX_TOKENS, LL_HIDDEN, NUM_EXPERTS)
        with contextlib.suppress(EPConfigError):
            buffer.clean_low_latency_buffer(LL_MAX_TOKENS, 4 * LL_HIDDEN, NUM_EXPERTS)
            raise AssertionError("a shape that does not fit is accepted")
        with contextlib.suppress(EPConfigError):
            buffer.low_latency_query_mask_buffer(torch.zeros(2, dtype=torch.int32))
            raise AssertionError("masks are there without enable_shrink")
    plain = deep_ep.Buffer(dist.group.WORLD, 0, 1000)
    with contextlib.suppress(EPConfigError):
        plain.low_latency_dispatch(batch.x, batch.topk_idx, LL_MAX_TOKENS, NUM_EXPERTS)
        raise AssertionError("low-latency calls are there without the mode")


def check_masks(rank: int) -> None:
    """A rank that the others mask is left out until they take it back."""
    size, masked = dist.get_world_size(), dist.get_world_size() - 1
    status = torch.full((size,), 7, dtype=torch.int32)
    with low_latency_buffer(rank, enable_shrink=True) as (buffer, batch):
        ll_dispatch(buffer, batch, use_fp8=False)
        dist.barrier()
        if rank != masked:
            buffer.low_latency_update_mask_buffer(masked, True)
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [0] * masked + [1]
            _, counts, _ = ll_dispatch(buffer, batch, use_fp8=False)
            chosen = batch.topk_idx[batch.topk_idx >= 0].bincount(minlength=NUM_EXPERTS)
            assert (counts <= sum(LL_TOKENS[:masked])).all()
            assert len(chosen) == NUM_EXPERTS
        dist.barrier()
        buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * size
