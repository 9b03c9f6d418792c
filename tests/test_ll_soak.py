"""Back-to-back low-latency pairs: random token counts and sizes, random delays between the ranks,
both halves at once, hooks or events, one or two results alive. Every byte is compared.
"""

import random
import time

import ll_cases
import pytest
import torch
from ll_cases import Case, World

pytestmark = pytest.mark.usefixtures("ll_backend")

NUM_BATCHES = 16


def batches(num_ranks, seed):
    rng = random.Random(seed)
    for _ in range(NUM_BATCHES):
        hidden = rng.choice([8, 128, 256, 1024])
        is_fp8 = hidden >= 128 and rng.random() < 0.5
        yield Case(
            num_ranks=num_ranks,
            num_tokens=tuple(rng.choice([0, 1, 5, 16, 32]) for _ in range(num_ranks)),
            most=32,
            num_topk=rng.randint(1, min(6, 3 * num_ranks)),
            num_experts=3 * num_ranks,
            hidden=hidden,
            routing=rng.choice(["uniform", "zipf", "masked", "one_expert"]),
            format=rng.choice(["fp8", "fp8 rounded"]) if is_fp8 else "bf16",
            wire=rng.choice(["bf16", "fp8"]) if is_fp8 else "bf16",
            seed=rng.randrange(2**20),
        )


class Batch:
    """A world with the bytes that have to arrive, in the order in which they lie."""

    def __init__(self, case, rank):
        self.world = World(case, rank)
        rows = self.world.rows[rank]
        self.is_sent = rows.src_rank >= 0
        self.recv_count = rows.recv_count
        self.recv_x = rows.recv_x[self.is_sent].view(torch.uint8)
        self.recv_scales = None
        if rows.recv_scales is not None:
            self.recv_scales = rows.recv_scales[self.is_sent].view(torch.int32)
        self.sums = self.world.sums().view(torch.int16)

    def check_dispatch(self, result):
        assert torch.equal(result.recv_count, self.recv_count)
        assert torch.equal(result.recv_x[self.is_sent].view(torch.uint8), self.recv_x)
        if self.recv_scales is not None:
            scales = result.recv_scales[self.is_sent].view(torch.int32)
            assert torch.equal(scales, self.recv_scales)

    def check_combine(self, result):
        assert torch.equal(result.x.view(torch.int16), self.sums)


class Program:
    """One rank's run. `rng` is the same on all ranks, `pace` is not."""

    def __init__(self, rank, num_ranks, seed):
        self.rng, self.pace = random.Random(seed), random.Random(f"{seed} {rank}")
        self.batches = [Batch(case, rank) for case in batches(num_ranks, seed)]
        hint = max(batch.world.case.hint for batch in self.batches)
        case = self.batches[0].world.case
        num_sms = self.pace.choice([1, 2])
        self.buffer = ll_cases.make_ll_buffer(case, low_latency_bytes=hint, num_sms=num_sms)

    def mode(self):
        """How this rank makes a call; a matter of its own."""
        return self.pace.choice([{}, {}, {"return_recv_hook": True}, {"async_op": True}])

    def delay(self):
        if self.pace.random() < 0.05:
            time.sleep(self.pace.uniform(0, 0.001))

    def finish(self, result):
        self.delay()
        if result.hook is not None:
            result.hook()
        result.event.wait()

    def dispatch(self):
        batch = self.rng.choice(self.batches)
        self.delay()
        return batch, ll_cases.dispatch(self.buffer, batch.world, **self.mode())

    def combine(self, batch, result):
        self.finish(result)
        batch.check_dispatch(result)
        zero_copy = batch.world.case.wire == "bf16" and self.pace.random() < 0.5
        return batch, ll_cases.combine(
            self.buffer, batch.world, result.handle, zero_copy=zero_copy, **self.mode()
        )

    def check(self, batch, result):
        self.finish(result)
        batch.check_combine(result)

    def run(self, num_pairs):
        pairs_left = num_pairs
        while pairs_left > 0:
            num_results = self.rng.choice([1, 1, 2])  # alive at once
            results = [self.dispatch() for _ in range(num_results)]
            sums = [self.combine(*each) for each in results]
            for each in sums:
                self.check(*each)
            pairs_left -= num_results
        self.buffer.destroy()


def on_rank_pairs(rank, num_ranks, seed, num_pairs):
    Program(rank, num_ranks, seed).run(num_pairs)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4], ids="R{}".format)
def test_many_pairs_at_different_paces(ranks, num_ranks, is_exhaustive):
    """With --exhaustive 100,000 pairs of 2 ranks."""
    num_pairs = 100_000 if is_exhaustive and num_ranks == 2 else 1000
    ranks.run(on_rank_pairs, num_ranks, 7 + num_ranks, num_pairs, deadline_s=3600.0)
