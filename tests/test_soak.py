"""Random programs of calls: every rank runs the same program at its own pace.

Rows of several batches are under way, calls are refused now and then, results are kept for a random
time, buffers come and go; every result is compared with the specification.
"""

import random
import time
from collections import deque
from dataclasses import replace

import cases
import pytest
from backends import OVER_NODES, backends
from cases import Case, World

from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError
from ep_kernels.testing import assert_bitwise_equal

NUM_BATCHES = 6
MAX_PENDING = 10


def batches(num_ranks, seed):
    """Cases that one buffer can serve: same experts, everything else differs."""
    rng = random.Random(seed)
    base = Case(num_ranks=num_ranks, num_experts=3 * num_ranks)
    for i in range(NUM_BATCHES):
        case = replace(
            base,
            num_tokens=tuple(rng.choice([0, 1, 9, 40, 100]) for _ in range(num_ranks)),
            num_topk=rng.randint(1, min(6, base.num_experts)),
            hidden=16 * rng.choice([1, 5, 64]),
            dtype=rng.choice(["bf16", "fp16", "fp32", "fp8"]),
            routing=rng.choice(["uniform", "zipf", "masked", "one_expert"]),
            layout=rng.choice(list(Layout)),
            num_biases=rng.randint(0, 2),
            seed=rng.randrange(2**20),
        )
        if case.layout is Layout.EXPERT_MAJOR:
            case = replace(case, expert_alignment=rng.choice([1, 8]))
        if i % 2:
            case = replace(case, capacity=tuple(rng.choice([20, 500]) for _ in range(num_ranks)))
        yield case


class Program:
    """One rank's run. `rng` is the same on all ranks, `pace` is not."""

    def __init__(self, rank, backend, num_ranks, seed):
        self.rank, self.backend = rank, backend
        self.rng, self.pace = random.Random(seed), random.Random(f"{seed} {rank}")
        self.worlds = [World(case, rank) for case in batches(num_ranks, seed)]
        self.xs = [world.xs() for world in self.worlds]
        self.ys = [world.ys() for world in self.worlds]
        self.buffer = self.make_buffer()
        self.wanted = [
            world.combine_result(ys, buffer=self.buffer, bias=world.bias())
            for world, ys in zip(self.worlds, self.ys)
        ]
        self.handles, self.pending = {}, deque()

    def make_buffer(self):
        case = self.worlds[0].case
        return cases.make_buffer(self.backend, case=case, num_sms=self.pace.choice([1, 2, 3]))

    def run(self, num_steps):
        steps = {
            self.dispatch: 5,
            self.cached_dispatch: 3,
            self.combine: 8,
            self.refused: 2,
            self.barrier: 1,
            self.new_buffer: 0.3,
        }
        for _ in range(num_steps):
            if self.pace.random() < 0.1:
                time.sleep(self.pace.uniform(0, 0.003))
            self.rng.choices(list(steps), list(steps.values()))[0]()
            while len(self.pending) > MAX_PENDING or (self.pending and self.pace.random() < 0.4):
                self.pending.popleft()()
        self.finish()
        self.buffer.destroy()

    def finish(self):
        while self.pending:
            self.pending.popleft()()

    def choose(self):
        index = self.rng.randrange(NUM_BATCHES)
        return index, self.worlds[index], self.xs[index]

    def later(self, result, check):
        def finish():
            result.event.wait()
            check()

        self.pending.append(finish)

    def dispatch(self):
        index, world, xs = self.choose()
        result = self.buffer.dispatch(
            xs[self.rank],
            world.topk_idxs[self.rank],
            world.topk_weights[self.rank],
            capacity=world.case.capacity_of(self.rank),
            async_op=self.pace.random() < 0.5,
            **world.case.dispatch_options,
        )
        self.handles[index] = result.handle
        self.later(result, lambda: cases.check_dispatch_result(result, world, xs))

    def cached_dispatch(self):
        index, world, xs = self.choose()
        if index not in self.handles:
            return
        result = self.buffer.dispatch(
            xs[self.rank],
            topk_weights=world.topk_weights[self.rank],
            handle=self.handles[index],
            async_op=self.pace.random() < 0.5,
        )
        self.later(result, lambda: cases.check_dispatch_result(result, world, xs, is_cached=True))

    def combine(self):
        index, world, _ = self.choose()
        if index not in self.handles:
            return
        y = self.ys[index][self.rank].clone()
        if self.pace.random() < 0.5:
            y = self.buffer.empty(*y.shape, dtype=y.dtype).copy_(y)
        result = self.buffer.combine(
            y,
            self.handles[index],
            bias=world.bias(),
            async_op=self.pace.random() < 0.5,
            num_sms=self.pace.choice([None, 1, 2]),
        )
        want = self.wanted[index].x

        def check():
            y.fill_(float("nan"))  # once the call is over, nobody reads the rows any more
            assert_bitwise_equal(result.x, want, name="combine")

        self.later(result, check)

    def refused(self):
        index, world, xs = self.choose()
        culprit = self.rng.randrange(world.case.num_ranks)
        topk_idx = world.topk_idxs[self.rank]
        if self.rank == culprit:
            topk_idx = topk_idx.float()
        who = "" if self.rank == culprit else f"rank {culprit}.*"
        with pytest.raises(EPConfigError, match=f"(?s){who}topk_idx"):
            self.buffer.dispatch(xs[self.rank], topk_idx)

    def barrier(self):
        self.buffer.barrier()

    def new_buffer(self):
        self.finish()
        old, self.buffer = self.buffer, self.make_buffer()
        old.destroy()
        self.handles.clear()


def on_rank_program(rank, backend, num_ranks, seeds, num_steps):
    for seed in seeds:
        try:
            Program(rank, backend, num_ranks, seed).run(num_steps)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8], ids="R{}".format)
@backends("cpu", "nodes", "cuda")
def test_random_programs_at_different_paces(ranks, backend, num_ranks, is_exhaustive):
    seeds = range(40 if is_exhaustive else 2 if backend in OVER_NODES else 3)
    ranks.run(on_rank_program, backend, num_ranks, seeds, 150, deadline_s=80.0 * len(seeds))
