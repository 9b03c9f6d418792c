"""Times graphs of low-latency calls on GPUs, for `cuda_low_latency`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels.buffer import Buffer

TIMEOUT_S = 20.0
WARM_UP = 5
FLUSH_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is timed: R ranks, T = M tokens each, K of E experts, hidden H.

    Attributes:
        num_local_ranks: of each node; None: all ranks are on one.
    """

    num_ranks: int
    num_tokens: int
    num_experts: int
    num_topk: int
    hidden: int
    num_sms: int | None
    flush: bool
    repetitions: int
    num_local_ranks: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line of the report; times in microseconds, of the slowest rank in each repetition."""

    operation: str
    what: str
    p50: float
    p95: float
    setting: Setting

    def text(self) -> str:
        at = self.setting
        return (
            f"EP{at.num_ranks} T={at.num_tokens:<4} E={at.num_experts:<4} "
            f"{self.operation:<14} {self.what:<8} p50 {self.p50:9.2f}  p95 {self.p95:9.2f}"
        )

    def record(self) -> dict[str, Any]:
        """For a line of JSON, in the names of the other benchmarks; `by` is what was timed."""
        op, _, rows = self.operation.partition(" ")
        unit = "" if self.what == "ratio" else "_us"
        times = {f"p50{unit}": self.p50, f"p95{unit}": self.p95}
        return {"op": op, "rows": rows, "by": self.what, **times, **asdict(self.setting)}


Graph = torch.cuda.CUDAGraph


class Timer:
    """Buffers, inputs and graphs of one setting on one rank."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        self.sizes: dict[str, Any] = dict(
            num_max_tokens_per_rank=setting.num_tokens, num_experts=setting.num_experts
        )
        self.buffer = Buffer(
            num_experts=setting.num_experts,
            device=device,
            pool_bytes=(1 if setting.num_local_ranks is None else 64) << 20,
            num_local_ranks=setting.num_local_ranks,
            timeout_s=TIMEOUT_S,
            num_sms=setting.num_sms,
            low_latency_bytes=Buffer.low_latency_size_hint(
                hidden=setting.hidden, num_ranks=setting.num_ranks, **self.sizes
            ),
        )
        generator = torch.Generator().manual_seed(dist.get_rank())
        scores = torch.rand(setting.num_tokens, setting.num_experts, generator=generator)
        self.idx = scores.topk(setting.num_topk, dim=1).indices.to(device)
        self.weights = torch.full(self.idx.shape, 1 / setting.num_topk, device=device)
        x = torch.randn(setting.num_tokens, setting.hidden, generator=generator)
        self.x = x.bfloat16().to(device)
        self.out = torch.empty_like(self.x)
        self.flushed = torch.empty(FLUSH_BYTES if setting.flush else 0, dtype=torch.uint8).to(
            device
        )
        self.stream = torch.cuda.Stream(device)

    def dispatch(self, *, hook: bool = False, **options: Any) -> Any:
        return self.buffer.low_latency_dispatch(
            self.x, self.idx, return_recv_hook=hook, **self.sizes, **options
        )

    def combine(self, handle: Any, *, hook: bool = False) -> Any:
        rows = self.buffer.next_low_latency_combine_buffer(handle)
        return self.buffer.low_latency_combine(
            rows,
            self.idx,
            self.weights,
            handle,
            zero_copy=True,
            out=self.out,
            return_recv_hook=hook,
        )

    def capture(self, function: Callable[[], Any]) -> tuple[Graph, Any]:
        """A graph of what the function enqueues, and what it returns."""
        graph = Graph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = function()
        return graph, result

    def stamps(self) -> torch.Tensor:
        """See CudaLowLatency.stamps()."""
        low_latency: Any = self.buffer._low_latency
        stamps: torch.Tensor = low_latency._region.stamps()
        return stamps

    def warm_up(self) -> None:
        with torch.cuda.stream(self.stream):
            for options in ({}, {"use_fp8": True}):
                result = self.dispatch(**options)
                self.combine(result.handle).event.wait()
        torch.cuda.synchronize(self.device)

    def time_graphs(self, graphs: list[Graph]) -> list[list[float]]:
        """[repetition][graph] microseconds on this rank; the graphs are replayed in turn."""
        marks = []
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP + self.setting.repetitions):
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * len(graphs))]
                for i, graph in enumerate(graphs):
                    self.flushed.zero_()
                    events[2 * i].record()
                    graph.replay()
                    events[2 * i + 1].record()
                marks.append(events)
        self.stream.synchronize()
        return [
            [1e3 * events[2 * i].elapsed_time(events[2 * i + 1]) for i in range(len(graphs))]
            for events in marks[WARM_UP:]
        ]

    def measure(self, names: list[tuple[str, str]], graphs: list[Graph]) -> Iterator[Measurement]:
        dist.barrier()
        times = slowest(self.time_graphs(graphs))
        for (operation, what), column in zip(names, times.T):
            yield self.measurement(operation, what, column)

    def measurement(self, operation: str, what: str, values: torch.Tensor) -> Measurement:
        p50, p95 = values.quantile(torch.tensor([0.5, 0.95], dtype=values.dtype)).tolist()
        return Measurement(operation=operation, what=what, p50=p50, p95=p95, setting=self.setting)


def slowest(times: list[list[float]]) -> torch.Tensor:
    """[repetition, graph]: the slowest rank of each."""
    table = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return table
