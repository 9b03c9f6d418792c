"""Buffer.memory_pool(): what torch allocates in the block, combine reads where it is.

Functions named `on_rank_...` run on every rank; each belongs to the test below it.
"""

import contextlib

import cases
import pytest
import torch
import torch.distributed as dist
from cases import Case, World
from host_view import on_host

from ep_kernels import _native_cuda, cuda_memory_pool
from ep_kernels.errors import EPConfigError
from ep_kernels.testing import assert_bitwise_equal

gpu = pytest.mark.gpu(1)
CASE = Case(num_tokens=(37, 64), num_topk=3, hidden=1024)


def gpu_buffer(**options):
    buffer = cases.make_buffer("cuda", case=CASE, **options).unwrapped
    torch.cuda.set_device(buffer.device)
    return buffer


def is_in_pool(buffer, tensor):
    return buffer._usable_backend().pool_offset(tensor) is not None


def on_rank_any_backend(rank, backend):
    world = World(CASE, rank)
    ys = world.ys()
    with cases.make_buffer(backend, case=CASE) as buffer:
        want = world.combine_result(ys, buffer=buffer)
        handle = cases.dispatch(buffer, world, world.xs()).handle
        with buffer.memory_pool(), buffer.memory_pool():
            y = ys[rank] * 1
        assert_bitwise_equal(buffer.combine(y, handle).x, want.x, name="combine")
    with pytest.raises(EPConfigError, match="destroyed"), buffer.memory_pool():
        pass


def test_the_same_code_runs_on_every_backend(ranks, backend):
    ranks.run(on_rank_any_backend, backend)


def on_rank_stages_nothing(rank):
    """The pool of the second block's buffer is not that of the first's."""
    world = World(CASE, rank)
    xs, ys = world.xs(), world.ys()
    with gpu_buffer() as buffer, gpu_buffer() as other:
        want = world.combine_result(ys)
        sent = buffer.dispatch(
            xs[rank].to(buffer.device),
            world.topk_idxs[rank].to(buffer.device),
            world.topk_weights[rank].to(buffer.device),
            **CASE.dispatch_options,
        )
        source = ys[rank].to(buffer.device)
        for async_op in (False, True):
            with buffer.memory_pool():
                first = source * 1
                with other.memory_pool(), buffer.memory_pool(), other.memory_pool():
                    second = source * 1
                third = source * 1
            outside = source * 1
            for tensor, owner in ((first, buffer), (second, other), (third, buffer)):
                assert is_in_pool(owner, tensor)
            assert not is_in_pool(other, first)
            assert not is_in_pool(buffer, second)
            assert not is_in_pool(buffer, outside)
            torch.cuda.synchronize()
            result = None  # of the round before
            buffer._usable_backend().poll()  # what finished calls kept
            live = buffer.pool_stats()["num_live"]
            result = buffer.combine(third, sent.handle, async_op=async_op)
            result.event.wait()
            taken = buffer.pool_stats()["num_live"] - live
            assert taken == 1, f"{taken} blocks were taken for a result"
            for y in (first, second, outside):
                assert_bitwise_equal(
                    on_host(buffer.combine(y, sent.handle).x), want.x, name="combine"
                )
            assert_bitwise_equal(on_host(result.x), want.x, name="combine of the pool's")


@gpu
def test_rows_allocated_in_the_block_are_not_copied(ranks):
    ranks.run(on_rank_stages_nothing)


def on_rank_full(rank):
    with gpu_buffer(pool_bytes=32 << 20) as buffer:
        with buffer.memory_pool():
            kept = torch.ones(12 << 20, dtype=torch.uint8, device=buffer.device)
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(64 << 20, dtype=torch.uint8, device=buffer.device)
            again = torch.ones(12 << 20, dtype=torch.uint8, device=buffer.device)
        assert is_in_pool(buffer, kept)
        assert is_in_pool(buffer, again)
        del again
        with buffer.memory_pool():  # torch's cache, since the pool has no 12 MiB besides
            again = torch.ones(12 << 20, dtype=torch.uint8, device=buffer.device)
        assert is_in_pool(buffer, again)
        assert int(kept.sum()) == int(again.sum()) == 12 << 20
        buffer.barrier()


@gpu
def test_a_full_pool_is_out_of_memory(ranks):
    ranks.run(on_rank_full)


def on_rank_after_destroy(rank):
    buffer = gpu_buffer()
    with buffer.memory_pool():
        kept = torch.full((1 << 20,), 7.0, device=buffer.device)
        buffer.destroy()
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(64 << 20, dtype=torch.uint8, device=kept.device)
    dist.barrier()
    with gpu_buffer() as later:
        with later.memory_pool():
            other = torch.zeros_like(kept)
        assert is_in_pool(later, other)
        assert float(kept.sum()) == 7.0 * (1 << 20)
        device = later.device
        later.barrier()
    del kept, other
    torch.cuda.empty_cache()
    torch.ones(1 << 20, device=device).sum().item()


@gpu
def test_tensors_outlive_their_buffer(ranks):
    ranks.run(on_rank_after_destroy)


class FakeTorch:
    """What torch and the core are told, in order; torch refuses a pool that is in use."""

    def __init__(self, monkeypatch):
        self.told = []
        self.open = []
        monkeypatch.setattr(_native_cuda, "cuda_library", lambda: self)
        monkeypatch.setattr(torch.cuda, "use_mem_pool", self.use_mem_pool)
        monkeypatch.setattr(
            cuda_memory_pool.TorchPools, "_pool", lambda pools: f"pool of {pools._device}"
        )

    def ep_cuda_torch_choose(self, core):
        self.told.append(core)

    @contextlib.contextmanager
    def use_mem_pool(self, pool, device):
        assert not self.open, "torch would go on with the pool that began first"
        self.open.append(pool)
        yield
        self.open.remove(pool)


def test_nested_blocks_allocate_for_the_innermost_buffer(monkeypatch):
    fake = FakeTorch(monkeypatch)
    first, second = (cuda_memory_pool.TorchPools(f"cuda:{i}") for i in range(2))
    fails = contextlib.suppress(KeyError)
    with first.use(1):
        assert (fake.told[-1], fake.open) == (1, ["pool of cuda:0"])
        with fails, second.use(2), second.use(2):
            assert (fake.told[-1], fake.open) == (2, ["pool of cuda:1"])
            with first.use(1):
                assert (fake.told[-1], fake.open) == (1, ["pool of cuda:0"])
            assert (fake.told[-1], fake.open) == (2, ["pool of cuda:1"])
            raise KeyError
        assert (fake.told[-1], fake.open) == (1, ["pool of cuda:0"])
    assert (fake.told[-1], fake.open) == (None, [])


def test_a_block_that_torch_refuses_leaves_the_one_around_it_open(monkeypatch):
    fake = FakeTorch(monkeypatch)
    first, second = (cuda_memory_pool.TorchPools(f"cuda:{i}") for i in range(2))
    with first.use(1):
        works = torch.cuda.use_mem_pool

        def refuse(pool, device):
            if pool == "pool of cuda:1":
                raise RuntimeError("no such pool")
            return works(pool, device)

        monkeypatch.setattr(torch.cuda, "use_mem_pool", refuse)
        with pytest.raises(RuntimeError, match="no such pool"), second.use(2):
            pass
        assert (fake.told[-1], fake.open) == (1, ["pool of cuda:0"])
    assert (fake.told[-1], fake.open) == (None, [])
