"""Calls on a GPU and the work around them: streams, events, memory that is used again, graphs.

Functions named `on_rank_...` run on every rank, on one GPU; each belongs to the test below it. They
hand a Buffer tensors of its device, and look at results on the stream that may.
"""

import gc
import time
from dataclasses import replace

import cases
import pytest
import torch
import torch.distributed as dist
from cases import Case, World
from host_view import move, on_host

from ep_kernels.config import Layout
from ep_kernels.testing import assert_bitwise_equal

pytestmark = pytest.mark.gpu(1)
LAYOUTS = pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name)

CYCLES_PER_S = 2e9
"""At most: a pause may last longer, not less long."""


def pause(seconds):
    """Keeps the current stream busy."""
    torch.cuda._sleep(int(seconds * CYCLES_PER_S))


def mark():
    """The point that the current stream has reached."""
    event = torch.cuda.Event()
    event.record()
    return event


def make_buffer(case, **options):
    """A Buffer that takes tensors of its device, on the current one."""
    buffer = cases.make_buffer("cuda", case=case, **options).unwrapped
    torch.cuda.set_device(buffer.device)
    return buffer


def capacity_case(**options):
    return Case(num_tokens=(37, 64), capacity=(70, 90), num_topk=3, hidden=1024, **options)


class Batch:
    """The inputs of one rank on its device."""

    def __init__(self, case, rank, device, *, seed=0):
        self.world, self.rank = World(replace(case, seed=case.seed + seed), rank), rank
        self.xs, self.ys = self.world.xs(), self.world.ys()
        self.x, self.y = move(self.xs[rank], device), self.ys[rank].to(device)
        self.topk_idx = self.world.topk_idxs[rank].to(device)
        self.weights = self.world.topk_weights[rank].to(device)
        torch.cuda.synchronize()

    def dispatch(self, buffer, **options):
        case = self.world.case
        capacity = case.capacity_of(self.rank)
        options = dict(case.dispatch_options, capacity=capacity, **options)
        return buffer.dispatch(self.x, self.topk_idx, self.weights, **options)

    def check_dispatch(self, result, **options):
        """On the current stream, which has to come after the call."""
        cases.check_dispatch_result(on_host(result), self.world, self.xs, **options)

    def check_combine(self, result):
        want = self.world.combine_result(self.ys)
        assert_bitwise_equal(on_host(result.x), want.x, name="combine")


def on_rank_other_stream(rank, case, wait):
    """The caller's stream is late, and so is the call; its results are used on another stream."""
    with make_buffer(case) as buffer:
        batches = [Batch(case, rank, buffer.device, seed=i) for i in range(5)]
        side = torch.cuda.Stream()
        for batch in batches:
            pause(0.02)
            result = batch.dispatch(buffer, async_op=True)
            combined = buffer.combine(batch.y, result.handle, async_op=True)
            with torch.cuda.stream(side):
                getattr(result.event, wait)()
                batch.check_dispatch(result)
                getattr(combined.event, wait)()
                batch.check_combine(combined)
        torch.cuda.synchronize()


@LAYOUTS
@pytest.mark.parametrize("wait", ["wait", "current_stream_wait"])
@pytest.mark.parametrize("capacity", [None, (70, 90)], ids=["exact", "capacity"])
def test_results_may_be_used_on_any_stream_that_waits(ranks, layout, wait, capacity):
    case = replace(capacity_case(layout=layout), capacity=capacity)
    ranks.run(on_rank_other_stream, case, wait)


def on_rank_inputs_on_other_stream(rank, case):
    """A call comes after the work of the stream it is made on, which writes its inputs late."""
    with make_buffer(case) as buffer:
        batch = Batch(case, rank, buffer.device)
        side = torch.cuda.Stream()
        late = [torch.zeros_like(t) for t in (batch.x, batch.topk_idx, batch.weights, batch.y)]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            pause(0.1)
            for tensor, source in zip(late, (batch.x, batch.topk_idx, batch.weights, batch.y)):
                tensor.copy_(source)
            batch.x, batch.topk_idx, batch.weights, batch.y = late
            result = batch.dispatch(buffer)
            combined = buffer.combine(batch.y, result.handle)
            batch.check_dispatch(result)
            batch.check_combine(combined)


@LAYOUTS
@pytest.mark.parametrize("capacity", [None, (70, 90)], ids=["exact", "capacity"])
def test_a_call_comes_after_the_work_of_its_stream(ranks, layout, capacity):
    case = replace(capacity_case(layout=layout), capacity=capacity)
    ranks.run(on_rank_inputs_on_other_stream, case)


def on_rank_freed_inputs(rank, case):
    """Nobody keeps the inputs but the buffer; whatever takes their memory is overwritten."""
    with make_buffer(case) as buffer:
        side = torch.cuda.Stream()
        batches = [Batch(case, rank, buffer.device, seed=i) for i in range(4)]
        for i in range(20):
            batch = batches[i % len(batches)]
            sent = batch.x.clone(), batch.topk_idx.clone(), batch.weights.clone()
            kept = batch.x, batch.topk_idx, batch.weights
            batch.x, batch.topk_idx, batch.weights = sent
            if i % 5 == rank:
                time.sleep(0.02)  # the other rank's call has to wait
            result = batch.dispatch(buffer, async_op=True)
            shapes = [(tensor.shape, tensor.dtype) for tensor in sent]
            batch.x, batch.topk_idx, batch.weights = kept
            del sent
            y = batch.y.clone()
            shapes.append((y.shape, y.dtype))
            combined = buffer.combine(y, result.handle, async_op=True)
            del y
            for stream in (torch.cuda.current_stream(), side):
                with torch.cuda.stream(stream):
                    litter = [
                        torch.full(shape, 3, dtype=of, device=buffer.device) for shape, of in shapes
                    ]
                    del litter
            result.event.current_stream_wait()
            combined.event.current_stream_wait()
            batch.check_dispatch(result)
            batch.check_combine(combined)


@LAYOUTS
def test_inputs_may_be_freed_as_soon_as_a_call_returns(ranks, layout):
    ranks.run(on_rank_freed_inputs, capacity_case(layout=layout))


def on_rank_freed_results(rank, case):
    """A stream still reads results that the host has freed; the next call, or a tensor of empty(),
    takes their memory.
    """
    with make_buffer(case, pool_bytes=4 << 20) as buffer:
        batches = [Batch(case, rank, buffer.device, seed=i) for i in range(3)]
        side, seen = torch.cuda.Stream(), []
        for i in range(12):
            batch = batches[i % len(batches)]
            result = batch.dispatch(buffer, async_op=i % 2 == 0)
            event = result.event
            with torch.cuda.stream(side):
                event.current_stream_wait()
                pause(0.02)
                seen.append((batch, result.recv_x.clone()))
                del result
            event.wait()  # the call is over, and keeps nothing
            if i % 3 == 0:
                buffer.empty(90, case.hidden, dtype=torch.bfloat16).fill_(-1)
        torch.cuda.synchronize()
        for batch, recv_x in seen:
            num_rows = batch.world.rows[rank].num_rows
            want = batch.world.dispatch_result(batch.xs).recv_x
            assert_bitwise_equal(on_host(recv_x[:num_rows]), want[:num_rows], name="recv_x")


def test_results_may_be_freed_while_a_stream_reads_them(ranks):
    ranks.run(on_rank_freed_results, capacity_case())


def on_rank_busy_stream(rank, case, is_under_way):
    """The caller's stream is busy for long; a call that follows an earlier event is not."""
    with make_buffer(case) as buffer:
        batch = Batch(case, rank, buffer.device)
        warm = batch.dispatch(buffer)
        in_pool = buffer.empty(*batch.y.shape, dtype=batch.y.dtype)
        in_pool.copy_(batch.y)
        kept = [warm, buffer.combine(in_pool, warm.handle), batch.dispatch(buffer, async_op=True)]
        torch.cuda.synchronize()
        dist.barrier()
        if is_under_way and rank == 1:
            time.sleep(0.2)
        first = batch.dispatch(buffer, async_op=True)
        if not is_under_way:
            first.event.wait()
        pause(1.5)
        busy = mark()
        options = dict(previous_event=first.event, async_op=True)
        fresh = batch.dispatch(buffer, **options)
        cached = buffer.dispatch(
            batch.x, topk_weights=batch.weights, handle=first.handle, **options
        )
        combined = buffer.combine(in_pool, first.handle, **options)
        for result in (fresh, cached, combined):
            result.event.wait()
        assert not busy.query(), "the calls were late, or the pause was short"
        with torch.cuda.stream(torch.cuda.Stream()):
            batch.check_dispatch(fresh)
            batch.check_dispatch(cached, is_cached=True)
            batch.check_combine(combined)
        torch.cuda.synchronize()
        del kept


@LAYOUTS
@pytest.mark.parametrize("is_under_way", [False, True], ids=["over", "under way"])
def test_a_call_with_an_event_waits_for_nothing_else(ranks, layout, is_under_way):
    ranks.run(on_rank_busy_stream, capacity_case(layout=layout), is_under_way)


def on_rank_memory_in_use(rank, case):
    """The caller's stream will write to memory that torch holds to be free; the call, which does
    not wait for that stream, keeps away from it.
    """
    with make_buffer(case) as buffer:
        batch = Batch(case, rank, buffer.device)
        first = batch.dispatch(buffer, async_op=True)
        first.event.wait()
        num_words = first.handle.memory.words.numel()
        for i in range(5):
            in_use = [
                torch.zeros(num_words, dtype=torch.int64, device=buffer.device) for _ in range(8)
            ]
            pause(0.1)
            for tensor in in_use:
                tensor.fill_(-7)
            del tensor, in_use
            result = batch.dispatch(buffer, previous_event=first.event, async_op=True)
            result.event.wait()
            torch.cuda.synchronize()
            batch.check_dispatch(result, name=f"dispatch {i}")
            batch.check_combine(buffer.combine(batch.y, result.handle))


@LAYOUTS
def test_a_call_with_an_event_takes_no_memory_that_is_in_use(ranks, layout):
    ranks.run(on_rank_memory_in_use, capacity_case(layout=layout))


def on_rank_no_host_wait(rank, case):
    with make_buffer(case) as buffer:
        batch = Batch(case, rank, buffer.device)
        bias = batch.world.bias().to(buffer.device)
        in_pool = buffer.empty(*batch.y.shape, dtype=batch.y.dtype)
        in_pool.copy_(batch.y)
        handle = batch.dispatch(buffer).handle
        calls = {
            "dispatch": lambda **options: batch.dispatch(buffer, **options),
            "cached dispatch": lambda **options: buffer.dispatch(
                batch.x, topk_weights=batch.weights, handle=handle, **options
            ),
            "combine": lambda **options: buffer.combine(batch.y, handle, bias=bias, **options),
            "combine from the pool": lambda **options: buffer.combine(in_pool, handle, **options),
        }
        results = [call() for call in calls.values() for _ in range(2)]
        buffer.get_dispatch_layout(batch.topk_idx)
        torch.cuda.synchronize()
        dist.barrier()
        for async_op in (False, True):
            for name, call in calls.items():
                pause(0.3)
                busy = mark()
                results.append(call(async_op=async_op))
                assert not busy.query(), f"{name} has waited for the GPU"
                torch.cuda.synchronize()
        pause(0.3)
        busy = mark()
        buffer.get_dispatch_layout(batch.topk_idx)
        assert not busy.query(), "get_dispatch_layout has waited for the GPU"
        torch.cuda.synchronize()
        batch.check_dispatch(results[-4])
        batch.check_dispatch(results[-3], is_cached=True)
        batch.check_combine(results[-1])


@LAYOUTS
def test_the_host_does_not_wait_where_sizes_are_known(ranks, layout):
    ranks.run(on_rank_no_host_wait, capacity_case(layout=layout))


def on_rank_several_buffers(rank, case):
    """Calls of three buffers are under way at once; one is destroyed, its results are used."""
    with make_buffer(case) as first, make_buffer(case) as second:
        third = make_buffer(case)
        batches = [Batch(case, rank, first.device, seed=i) for i in range(3)]
        results = []
        for _ in range(4):
            pause(0.01)
            started = [
                batch.dispatch(buffer, async_op=True)
                for batch, buffer in zip(batches, (first, second, third))
            ]
            sums = [
                buffer.combine(batch.y, result.handle, async_op=True)
                for batch, buffer, result in zip(batches, (first, second, third), started)
            ]
            results.append((started, sums))
        third.destroy()
        del third
        gc.collect()
        for started, sums in results:
            for batch, result, combined in zip(batches, started, sums):
                result.event.current_stream_wait()
                combined.event.current_stream_wait()
                batch.check_dispatch(result)
                batch.check_combine(combined)


def test_buffers_of_one_process_work_at_the_same_time(ranks):
    ranks.run(on_rank_several_buffers, capacity_case())


class Layer:
    """Dispatch, experts, combine over tensors that stay where they are."""

    def __init__(self, buffer, case, rank):
        num_tokens, device = case.num_tokens[rank], buffer.device
        self.buffer, self.case, self.rank = buffer, case, rank
        self.x = torch.zeros(num_tokens, case.hidden, dtype=torch.bfloat16, device=device)
        self.topk_idx = torch.full((num_tokens, case.num_topk), -1, device=device)
        self.weights = torch.zeros(num_tokens, case.num_topk, device=device)

    def set_inputs(self, seed):
        """Those of all ranks, for the specification."""
        world = World(replace(self.case, seed=seed), self.rank)
        xs = [
            cases.spread_values(len(idx), self.case.hidden, dtype=torch.bfloat16, seed=seed + src)
            for src, idx in enumerate(world.topk_idxs)
        ]
        self.x.copy_(xs[self.rank])
        self.topk_idx.copy_(world.topk_idxs[self.rank])
        self.weights.copy_(world.topk_weights[self.rank])
        return world, xs

    def __call__(self):
        capacity, options = self.case.capacity_of(self.rank), self.case.dispatch_options
        sent = self.buffer.dispatch(
            self.x, self.topk_idx, self.weights, capacity=capacity, **options
        )
        y = 2 * sent.recv_x
        combined = self.buffer.combine(
            y, sent.handle, topk_weights=sent.recv_topk_weights, bias=self.x
        )
        return sent, combined


def capture(layer):
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            layer()
    torch.cuda.synchronize()
    layer()  # its results are freed at once, on this stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = layer()
    return graph, results


def on_rank_graph(rank, case):
    """Replays and eager calls take turns; 100 eager calls lie between the capture and the first."""
    with make_buffer(case, timeout_s=10.0) as buffer:
        layer = Layer(buffer, case, rank)
        layer.set_inputs(seed=1)
        graph, (sent, combined) = capture(layer)
        for _ in range(50):
            layer()
        for i in range(20):
            world, xs = layer.set_inputs(seed=1000 * i)
            graph.replay()
            cases.check_dispatch_result(on_host(sent), world, xs, name=f"replay {i}")
            got = on_host(combined)
            _, want = layer()
            assert_bitwise_equal(got, on_host(want), name=f"replay {i}")
        for _ in range(100):
            graph.replay()
        torch.cuda.synchronize()
        assert_bitwise_equal(on_host(combined), got, name="the last of many replays")
        del graph, sent, combined, want


def on_rank_graph_and_fresh_calls(rank, case, larger):
    """Fresh dispatches right behind replays that are still running, once for each record of the
    host; some have more tokens than the graph, whose scratch memory must stay.
    """
    with make_buffer(case, timeout_s=10.0) as buffer:
        layer = Layer(buffer, case, rank)
        layer.set_inputs(seed=1)
        graph, (_, combined) = capture(layer)
        graph.replay()
        torch.cuda.synchronize()
        want = on_host(combined)
        worlds = [World(one, rank) for one in (replace(case, capacity=None), larger)]
        for i in range(70):
            graph.replay()
            world = worlds[i % 7 == 0]
            rows, idx = world.xs()[rank].to(buffer.device), world.topk_idxs[rank]
            result = buffer.dispatch(rows, idx.to(buffer.device), layout=case.layout)
            out = buffer.combine(result.recv_x, result.handle)
            out.event.wait()
            assert_bitwise_equal(on_host(combined), want, name=f"replay {i}")
        del graph, combined, result, out


@LAYOUTS
def test_fresh_calls_follow_replays_that_still_run(ranks, layout):
    case = capacity_case(num_ranks=2, layout=layout)
    larger = replace(case, capacity=None, num_tokens=tuple(40 * n for n in case.num_tokens))
    ranks.run(on_rank_graph_and_fresh_calls, case, larger, deadline_s=120)


@LAYOUTS
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("capacity", [(300, 300), (70, 90)], ids=["enough", "overflow"])
def test_a_graph_gives_the_results_of_eager_calls(ranks, num_ranks, layout, capacity):
    case = replace(capacity_case(num_ranks=num_ranks, layout=layout), capacity=capacity)
    case = replace(case, expert_alignment=8 if layout is Layout.EXPERT_MAJOR else 1)
    ranks.run(on_rank_graph, case, deadline_s=120)
