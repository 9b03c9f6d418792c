"""DeepEP's Buffer: its names, argument order and results, on ep_kernels.Buffer."""

from __future__ import annotations

from ep_kernels.deep_ep.high_throughput import HighThroughputCalls
from ep_kernels.deep_ep.low_latency import LowLatencyCalls


class Buffer(HighThroughputCalls, LowLatencyCalls):
    """Dispatch and combine over the ranks of a group, called as DeepEP V1 is called.

    See BufferBase for the constructor's arguments.

    Example:
        >>> buffer = Buffer(group)
        >>> per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        >>> recv_x, recv_topk_idx, recv_topk_weights, counts, handle, _ = buffer.dispatch(
        ...     x, None, per_rank, None, in_rank, per_expert, topk_idx, topk_weights)
        >>> out, _, _ = buffer.combine(recv_x, handle)
    """
