"""A program written for DeepEP: it knows nothing of ep_kernels. It spawns its ranks itself.

Usage: deep_ep_program.py NUM_RANKS PORT
"""

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from deep_ep import Buffer, Config, topk_idx_t
from deep_ep.utils import EventHandle, EventOverlap


def run_rank(rank, num_ranks, port):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks
    )
    group = dist.new_group(list(range(num_ranks)))
    config = Config(8, 16, 256)
    num_nvl_bytes = config.get_nvl_buffer_size_hint(512 * 2, group.size())
    buffer = Buffer(group, num_nvl_bytes, 0, explicitly_destroy=True)
    x = torch.randn(50 + rank, 512).bfloat16()
    topk_idx = torch.rand(len(x), 4 * num_ranks).topk(3).indices.to(topk_idx_t)
    weights = torch.rand(len(x), 3)
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        topk_idx, 4 * num_ranks, EventOverlap(EventHandle()), True, True
    )
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        config=config,
        previous_event=event,
        async_finish=True,
    )
    event.current_stream_wait()
    assert sum(counts) == (recv_idx >= 0).sum()
    combined, _, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights, config=config)
    expected = x.float() * in_rank.sum(dim=1, keepdim=True)
    torch.testing.assert_close(combined.float(), expected, rtol=0.01, atol=0.01)
    buffer.destroy()
    sys.stdout.write(f"rank {rank}: right\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run_rank, args=(int(sys.argv[1]), int(sys.argv[2])), nprocs=int(sys.argv[1]))
