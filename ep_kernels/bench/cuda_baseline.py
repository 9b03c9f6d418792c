"""NCCL on the same tokens: its bare all-to-all, and baseline.py over it.

NCCL refuses two ranks on one GPU, so it runs with one rank per GPU only.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels.bench.baseline import Deduplicated, Expanded
from ep_kernels.bench.cuda_floors import RowCounts
from ep_kernels.bench.cuda_ops import CACHED, FRESH, Op
from ep_kernels.bench.transports import GroupTransport
from ep_kernels.bench.workload import Inputs, Workload


def why_no_nccl(num_ranks: int, num_gpus: int) -> str:
    """Why the baseline cannot run, or ""."""
    if num_ranks > num_gpus:
        return f"{num_ranks} ranks share {num_gpus} GPU(s), and NCCL wants one for each"
    return "" if dist.is_nccl_available() else "this torch has no NCCL"


def nccl_ops(
    workload: Workload, inputs: Inputs, counts: RowCounts, *, rank: int, timeout_s: float
) -> Iterator[Op]:
    """Collective, and to be used up by every rank alike."""
    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout_s))
    transport = GroupTransport("nccl", group)
    try:
        deduplicated = Deduplicated(transport, workload, inputs)
        yield from _bare_ops(transport, workload, inputs, counts.rows["rank_major"], rank)
        if "rank_major" in workload.layouts:
            yield from _pair(deduplicated, workload, "rank_major")
        if "expert_major" in workload.layouts:
            yield from _pair(deduplicated, workload, "expert_major")
            del deduplicated
            yield from _pair(Expanded(transport, workload, inputs), workload, "expert_major")
    finally:
        torch.cuda.synchronize()
        dist.destroy_process_group(group)


def _pair(way: Deduplicated | Expanded, workload: Workload, layout: str) -> Iterator[Op]:
    """Dispatch, then combine of the rows that it left, from and to the router's order."""
    dispatch, combine = (getattr(way, f"{op}_{layout}") for op in ("dispatch", "combine"))
    common: dict[str, Any] = {
        "layout": layout,
        "rows": workload.dtype,
        "by": f"nccl, {way.name}",
        "clock": "host",
        "row_bytes": workload.row_bytes,
        "num_sms": None,
    }
    yield Op(op="dispatch", routing=FRESH, call=dispatch, **common)
    rows = dispatch().clone()
    yield Op(op="combine", routing=CACHED, call=lambda: combine(rows), **common)


def _bare_ops(
    transport: GroupTransport,
    workload: Workload,
    inputs: Inputs,
    num_rows: list[list[int]],
    rank: int,
) -> Iterator[Op]:
    """All-to-alls of the deduplicated rows, there and back: no permute, no counts, no sums."""
    send, recv = num_rows[rank], [row[rank] for row in num_rows]
    sent = inputs.x.new_zeros(sum(send), workload.hidden)
    received = inputs.x.new_zeros(sum(recv), workload.hidden)
    common: dict[str, Any] = {
        "layout": "rank_major",
        "rows": workload.dtype,
        "routing": CACHED,
        "by": "nccl, all-to-all alone",
        "clock": "events",
        "row_bytes": workload.row_bytes,
        "num_sms": None,
    }
    yield Op(
        op="dispatch",
        call=lambda: transport.all_to_all(received, sent, recv=recv, send=send),
        **common,
    )
    yield Op(
        op="combine",
        call=lambda: transport.all_to_all(sent, received, recv=send, send=recv),
        **common,
    )
