"""What a rank does on the hosts of tests/multi_node: python ep_ranks.py CHECK [JSON of arguments].

Prints one line of JSON, the result of the check; status 1 and a traceback if something is wrong.
"""

import json
import os
import sys
import time
from pathlib import Path

import cases
import ll_cases
import torch
import torch.distributed as dist
from cases import Case, World

import ep_kernels
from ep_kernels.config import Layout
from ep_kernels.errors import EPTimeoutError

RANK, NUM_RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NUM_LOCAL_RANKS = int(os.environ["LOCAL_WORLD_SIZE"])


def make_buffer(case, **options):
    buffer = ep_kernels.Buffer(num_experts=case.num_experts, pool_bytes=1 << 30, **options)
    assert buffer.topology.num_local_ranks == NUM_LOCAL_RANKS
    return buffer


def round_trips():
    """Both layouts, several types; nodes are found, not given."""
    for layout in Layout:
        for dtype, routing in (("bf16", "uniform"), ("fp8", "group_limited"), ("fp32", "zipf")):
            case = Case(
                num_ranks=NUM_RANKS,
                num_experts=4 * NUM_RANKS,
                num_topk=4,
                hidden=512,
                dtype=dtype,
                routing=routing,
                layout=layout,
            )
            with make_buffer(case, staging_bytes=100_000) as buffer:
                for seed in range(2):
                    cases.check_round_trip(buffer, World(case, RANK), seed=seed)


def low_latency_rounds():
    """Both wire formats; the experts of a token are anywhere."""
    for names in (dict(), dict(format="fp8", wire="fp8")):
        case = ll_cases.Case(num_ranks=NUM_RANKS, num_topk=4, num_experts=4 * NUM_RANKS, **names)
        with make_buffer(case, low_latency_bytes=case.hint) as buffer:
            ll_cases.check_round(buffer, ll_cases.World(case, RANK))


def link_bytes_sent():
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[8])
    raise RuntimeError("no eth0")


def measured(call, num_calls):
    """Seconds per call, and bytes that this host sent per call."""
    call()
    dist.barrier()
    sent, start = link_bytes_sent(), time.monotonic()
    for _ in range(num_calls):
        call()
    dist.barrier()
    return (time.monotonic() - start) / num_calls, (link_bytes_sent() - sent) / num_calls


def traffic(num_tokens, num_experts, num_topk, hidden, routing, num_calls):
    """Dispatch and combine against a flat all-to-all of the same tokens, one row per rank."""
    case = Case(
        num_ranks=NUM_RANKS,
        num_tokens=(num_tokens,) * NUM_RANKS,
        num_experts=num_experts,
        num_topk=num_topk,
        hidden=hidden,
        routing=routing,
        weights=None,
    )
    world = World(case, RANK)
    x, topk_idx = world.xs()[RANK], world.topk_idxs[RANK]
    with make_buffer(case) as buffer:
        is_in_rank = buffer.get_dispatch_layout(topk_idx).is_token_in_rank
        by_node = is_in_rank.view(num_tokens, -1, NUM_LOCAL_RANKS).any(dim=2)
        is_other = torch.arange(by_node.shape[1]) != buffer.topology.node
        before = buffer.scaleout_stats()
        result = buffer.dispatch(x, topk_idx)
        counted = buffer.scaleout_stats().chunk_bytes_sent - before.chunk_bytes_sent
        y = buffer.empty(*result.recv_x.shape, dtype=x.dtype).copy_(result.recv_x)
        found = {
            "row_bytes": hidden * x.element_size(),
            "choice_bytes": 4 * num_topk,
            "copies": int(by_node[:, is_other].sum()),
            "counted": counted,
            "dispatch": measured(lambda: buffer.dispatch(x, topk_idx), num_calls),
            "combine": measured(lambda: buffer.combine(y, result.handle), num_calls),
        }
    order = torch.cat([is_in_rank[:, dst].nonzero().flatten() for dst in range(NUM_RANKS)])
    sizes = is_in_rank.sum(0).tolist()
    recv_sizes = [None] * NUM_RANKS
    dist.all_gather_object(recv_sizes, sizes)
    recv_sizes = [sizes_of[RANK] for sizes_of in recv_sizes]
    sent, received = x[order], torch.empty(sum(recv_sizes), hidden, dtype=x.dtype)
    found["flat"] = measured(
        lambda: dist.all_to_all_single(received, sent, recv_sizes, sizes), num_calls
    )
    return found


def lost(timeout_s):
    """Dispatches until the network or a host is gone."""
    case = Case(num_ranks=NUM_RANKS, num_experts=12, hidden=7168, num_tokens=(64,) * NUM_RANKS)
    world = World(case, RANK)
    x, topk_idx = world.xs()[RANK], world.topk_idxs[RANK]
    buffer = make_buffer(case, timeout_s=timeout_s)
    result = buffer.dispatch(x, topk_idx)
    say("ready")
    try:
        while True:
            start = time.monotonic()
            buffer.dispatch(x, topk_idx)
            buffer.combine(result.recv_x, result.handle)
    except EPTimeoutError as error:
        seconds = time.monotonic() - start
        start = time.monotonic()
        buffer.destroy()
        return dict(
            peer=error.peer,
            text=str(error),
            seconds=seconds,
            destroy_seconds=time.monotonic() - start,
        )


def say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(check, arguments="{}"):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    say(json.dumps(globals()[check](**json.loads(arguments))))
    os._exit(0)  # the group may be broken


if __name__ == "__main__":
    main(*sys.argv[1:])
