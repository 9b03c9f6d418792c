"""Where a fresh EXPERT_MAJOR dispatch spends its time: `python scripts/probe_fresh.py 8` under MPS.

Medians in us: host clock of the whole call, of Buffer.dispatch() alone, of the
device from first stamp to last, and between stamps.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist

from ep_kernels import Buffer, Layout
from ep_kernels.bench.cuda_ops import device_barrier
from ep_kernels.testing.routing import make_routing


def rank_main(rank: int, num_ranks: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/r", rank=rank, world_size=num_ranks
    )
    torch.cuda.set_device(rank % torch.cuda.device_count())
    topk_idx, weights = make_routing("uniform", 4096, 8, 256, seed=rank)
    x = torch.randn(4096, 7168).to("cuda", torch.bfloat16)
    topk_idx, weights = topk_idx.cuda(), weights.cuda()
    with Buffer(num_experts=256, device="cuda", pool_bytes=3 << 30, num_sms=16) as buffer:
        align, times = device_barrier(buffer, 256), {}
        for step in range(25):
            buffer.barrier()
            torch.cuda.synchronize()
            align()
            torch.cuda.synchronize()
            begin = time.perf_counter_ns()
            result = buffer.dispatch(x, topk_idx, weights, layout=Layout.EXPERT_MAJOR)
            called = time.perf_counter_ns()
            torch.cuda.synchronize()
            end = time.perf_counter_ns()
            stamps = list(buffer._backend.stamps(result.handle.seq).items())
            found = {"host": end - begin, "call": called - begin}
            found["device"] = stamps[-1][1] - stamps[0][1]
            found |= {b[0]: b[1] - a[1] for a, b in zip(stamps, stamps[1:])}
            if step >= 5:
                for name, value in found.items():
                    times.setdefault(name, []).append(value / 1e3)
            del result
        gathered = [None] * num_ranks
        dist.all_gather_object(gathered, times)
        if rank == 0:
            for name in times:
                steps = list(zip(*[one[name] for one in gathered]))
                mean = statistics.median(statistics.mean(step) for step in steps)
                print(f"{name:8} mean {mean:7.1f} max {statistics.median(map(max, steps)):7.1f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__]
            environment = os.environ | {"PYTHONPATH": os.getcwd()}
            ranks = [
                subprocess.Popen([*command, str(r), sys.argv[1], folder], env=environment)
                for r in range(int(sys.argv[1]))
            ]
            for one in ranks:
                one.wait(timeout=120)
