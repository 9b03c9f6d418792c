"""Ranks that die, stop, leave early or never say goodbye.

The others raise EPTimeoutError naming the rank: at once if its process has ended, after timeout_s
if it is silent; on a GPU, where nobody watches processes, after timeout_s in any case. The buffer
refuses further use, what was received before stays valid, torch goes on computing on the GPU, and
neither /dev/shm nor the survivors' memory maps hold anything after destroy (`launch` checks what is
left when all have gone).

Functions named `on_rank_...` run on every rank; each belongs to the tests below it. Nobody collects
the exit codes of killed ranks before the survivors are through, so the dead are zombies meanwhile.
"""

import gc
import os
import random
import resource
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import torch
import torch.distributed as dist
from backends import backends
from cases import Case, World
from host_view import on_host

from ep_kernels.errors import EPDeviceError, EPError, EPTimeoutError
from ep_kernels.testing.leaks import shm_mappings

VICTIM = 2
CASE = Case(num_ranks=3, num_tokens=(40, 30, 50), num_topk=3)
LONG_S = 30.0  # a timeout that no test waits for
SOON_S = 3.0  # "at once" on a busy machine
LOSS = {"cpu": (LONG_S, SOON_S), "cuda": (3.0, 2 * 3.0 + SOON_S)}
"""A timeout of buffers, and how long it then takes until a rank is named whose process has ended. A
call on a GPU has two waits, one after the other."""

DEVICES = backends("cpu", "cuda")
WITHOUT_MPS = pytest.mark.without_mps
OPERATIONS = pytest.mark.parametrize(
    "operation", ["dispatch", "cached dispatch", "combine", "barrier"]
)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(delay_s):
    """SIGKILL from another thread; calls into the core do not hold the interpreter's lock."""
    timer = threading.Timer(delay_s, die)
    timer.daemon = True
    timer.start()


class Group:
    """A buffer with one result received, and the calls that the tests interrupt."""

    def __init__(self, rank, backend, case=CASE, **options):
        self.rank, self.backend, self.world = rank, backend, World(case, rank)
        self.buffer = cases.make_buffer(backend, case=case, **options)
        self.async_buffer = cases.device_results(self.buffer)
        self.xs, self.ys = self.world.xs(), self.world.ys()
        self.result = cases.dispatch(self.async_buffer, self.world, self.xs)
        cases.check_combine(self.buffer, self.world, self.result.handle)

    def call(self, operation, **options):
        buffer = self.async_buffer if options.get("async_op") else self.buffer
        if operation == "barrier":
            return buffer.barrier()
        if operation == "combine":
            return buffer.combine(self.ys[self.rank], self.result.handle, **options)
        if operation == "cached dispatch":
            return buffer.dispatch(self.xs[self.rank], handle=self.result.handle, **options)
        return buffer.dispatch(
            self.xs[self.rank],
            self.world.topk_idxs[self.rank],
            **self.world.case.dispatch_options,
            **options,
        )

    def check_failed(self, error, culprits=(VICTIM,)):
        """Everything that has to hold on a survivor after `error`."""
        assert isinstance(error, EPTimeoutError), repr(error)
        assert isinstance(error, TimeoutError)
        assert error.peer in culprits, (error.peer, str(error))
        assert error.rank == self.rank
        assert f"rank {error.peer}" in str(error)
        assert error.phase
        for operation in ("dispatch", "combine", "barrier"):
            start = time.monotonic()
            refusal = error_of(self.call, operation)
            assert time.monotonic() - start < 1.0, operation
            assert any(f"rank {culprit}" in str(refusal) for culprit in culprits), str(refusal)
        cases.check_dispatch_result(
            on_host(self.result), self.world, self.xs, name="received before"
        )
        self.check_gpu()
        self.destroy()

    def check_gpu(self):
        if self.backend == "cuda":
            numbers = torch.arange(1000, device=self.buffer.device)
            assert int((2 * numbers).sum()) == 999_000
            torch.cuda.synchronize()

    def destroy(self):
        start = time.monotonic()
        self.buffer.destroy()
        assert time.monotonic() - start < SOON_S
        self.result = None
        gc.collect()
        if self.backend == "cpu":  # CUDA has mappings of its own
            assert not shm_mappings(), shm_mappings()


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except EPError as error:
        # The traceback would keep the call's tensors, and so the pool, alive.
        return error.with_traceback(None)
    raise AssertionError("no error")


def timed_error_of(function, *args, **kwargs):
    start = time.monotonic()
    return error_of(function, *args, **kwargs), time.monotonic() - start


def on_rank_without_threads(rank, operation):
    """The system gives one rank no thread, in the middle of a call."""
    group = Group(rank, "cpu", timeout_s=LONG_S, num_sms=1)
    dist.barrier()
    if rank == VICTIM:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + (4 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        error, seconds = timed_error_of(group.call, operation, num_sms=16)
        assert isinstance(error, EPDeviceError), repr(error)
        assert "failed" in str(error_of(group.call, "barrier"))
        return
    error, seconds = timed_error_of(group.call, operation)
    assert seconds < SOON_S
    group.check_failed(error)


@pytest.mark.parametrize("operation", ["dispatch", "cached dispatch", "combine"])
def test_a_rank_that_fails_by_itself_is_named_and_sends_no_garbage(launch, operation):
    launch(on_rank_without_threads, operation, num_ranks=3)


def on_rank_killed_before(rank, backend, operation):
    timeout_s, soon_s = LOSS[backend]
    group = Group(rank, backend, timeout_s=timeout_s)
    if rank == VICTIM:
        die()
    error, seconds = timed_error_of(group.call, operation)
    assert seconds < soon_s
    group.check_failed(error)


@DEVICES
@OPERATIONS
def test_a_rank_that_died_before_the_call_is_named(launch, backend, operation):
    result = launch(on_rank_killed_before, backend, operation, num_ranks=3, lost=[VICTIM])
    assert result.exit_codes == [0, 0, -signal.SIGKILL]


def on_rank_killed_inside(rank, backend, operation, is_async):
    """Rank 0 comes late: when the victim dies it has announced the call, and waits for rank 0."""
    timeout_s, soon_s = LOSS[backend]
    group = Group(rank, backend, timeout_s=timeout_s)
    if rank == VICTIM:
        die_after(0.2)
        group.call(operation)
    if rank == 0:
        time.sleep(0.4)

    def call():
        if is_async:
            group.call(operation, async_op=True).event.wait()
        else:
            group.call(operation)

    error, seconds = timed_error_of(call)
    assert seconds < soon_s
    group.check_failed(error)


@WITHOUT_MPS
@DEVICES
@OPERATIONS
def test_a_rank_that_dies_inside_the_call_is_named(launch, backend, operation):
    launch(on_rank_killed_inside, backend, operation, False, num_ranks=3, lost=[VICTIM])


@WITHOUT_MPS
@DEVICES
@pytest.mark.parametrize("operation", ["dispatch", "cached dispatch", "combine"])
def test_the_event_of_an_asynchronous_call_names_the_dead_rank(launch, backend, operation):
    launch(on_rank_killed_inside, backend, operation, True, num_ranks=3, lost=[VICTIM])


def on_rank_killed_at_some_time(rank, backend, case, delay_s):
    """Dispatch and combine in a loop until the victim is no more."""
    timeout_s, soon_s = LOSS[backend]
    group = Group(rank, backend, case, timeout_s=timeout_s)
    dist.barrier()
    if rank == VICTIM:
        die_after(delay_s)
    end = time.monotonic() + delay_s + 2 * soon_s

    def work():
        while time.monotonic() < end:
            group.call("dispatch")
            group.call("combine")

    group.check_failed(error_of(work))


@WITHOUT_MPS
@DEVICES
@pytest.mark.parametrize("number", range(8))
def test_a_rank_that_dies_at_any_moment_is_named(launch, backend, number, is_exhaustive):
    """Large rows in the odd tests: the victim dies while it copies."""
    rng = random.Random(number)
    case = replace(CASE, seed=number, capacity=(200, 200, 200) if number & 2 else None)
    if number & 1:
        case = replace(case, hidden=7168, num_tokens=(150, 150, 150))
    if number & 1 and case.capacity:
        case = replace(case, capacity=(400, 400, 400))
    for _ in range(10 if is_exhaustive else 1):
        delay_s = rng.uniform(0.001, 0.1)
        launch(on_rank_killed_at_some_time, backend, case, delay_s, num_ranks=3, lost=[VICTIM])


def on_rank_two_killed(rank, backend, victims):
    timeout_s, soon_s = LOSS[backend]
    group = Group(rank, backend, Case(num_ranks=4, num_experts=8), timeout_s=timeout_s)
    if rank in victims:
        die()
    error, seconds = timed_error_of(group.call, "dispatch")
    assert seconds < soon_s
    group.check_failed(error, culprits=victims)


@DEVICES
@pytest.mark.parametrize("victims", [(0, 3), (1, 2, 3)], ids=str)
def test_of_several_dead_ranks_one_is_named(launch, backend, victims):
    launch(on_rank_two_killed, backend, victims, num_ranks=4, lost=victims)


def on_rank_all_killed(rank, backend):
    group = Group(rank, backend, timeout_s=LONG_S)
    die_after(0.05)
    while True:
        group.call("dispatch")


@WITHOUT_MPS
@DEVICES
def test_when_all_ranks_are_killed_nothing_is_left(launch, backend):
    result = launch(on_rank_all_killed, backend, num_ranks=3, lost=[0, 1, 2])
    assert result.exit_codes == [-signal.SIGKILL] * 3


TIMEOUT_S = {"cpu": 1.0, "cuda": 2.0}


def on_rank_stopped(rank, backend, operation):
    timeout_s = TIMEOUT_S[backend]
    group = Group(rank, backend, timeout_s=timeout_s)
    if rank == VICTIM:
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    time.sleep(0.1)
    error, seconds = timed_error_of(group.call, operation)
    clock_error_s = 0.05 if backend == "cuda" else 0.0
    assert timeout_s - clock_error_s <= seconds < timeout_s + SOON_S, seconds
    group.check_failed(error)


@DEVICES
@OPERATIONS
def test_a_silent_rank_is_named_after_the_timeout_and_not_before(launch, backend, operation):
    launch(on_rank_stopped, backend, operation, num_ranks=3, lost=[VICTIM])


def on_rank_resumed(rank, backend):
    """The victim, which would wait for long, wakes up when the others have given up on it."""
    group = Group(rank, backend, timeout_s=LONG_S if rank == VICTIM else TIMEOUT_S[backend])
    pids = [None] * 3
    dist.all_gather_object(pids, os.getpid())
    if rank == VICTIM:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.1)
    error, seconds = timed_error_of(group.call, "dispatch")
    if rank == VICTIM:
        assert isinstance(error, EPTimeoutError)
        assert "gave up" in str(error)
        assert seconds < SOON_S
    else:
        assert error.peer == VICTIM
    if rank == 0:
        os.kill(pids[VICTIM], signal.SIGCONT)
    dist.barrier()  # until then nobody destroys the buffer
    if rank == VICTIM:
        group.destroy()
    else:
        group.check_failed(error)


@DEVICES
def test_a_rank_that_wakes_up_after_the_others_gave_up_learns_it_at_once(launch, backend):
    launch(on_rank_resumed, backend, num_ranks=3)


def on_rank_slow(rank, backend, operation):
    group = Group(rank, backend, timeout_s=TIMEOUT_S[backend])
    for _ in range(2):
        if rank == VICTIM:
            time.sleep(0.7 * TIMEOUT_S[backend])
        group.call(operation)
    cases.check_round_trip(group.buffer, group.world)
    group.destroy()


@DEVICES
@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_a_rank_that_is_late_by_less_than_the_timeout_is_waited_for(launch, backend, operation):
    launch(on_rank_slow, backend, operation, num_ranks=3)


def on_rank_destroys_early(rank, backend, operation):
    group = Group(rank, backend, timeout_s=LONG_S)
    if rank == VICTIM:
        time.sleep(0.1)
        group.destroy()
        dist.barrier()  # it lives on
        return
    error, seconds = timed_error_of(group.call, operation)
    assert seconds < SOON_S
    assert f"rank {VICTIM}" in str(error)
    assert "destroyed" in str(error)
    group.check_failed(error)
    dist.barrier()


@DEVICES
@OPERATIONS
def test_a_rank_that_destroyed_its_buffer_is_named_at_once(launch, backend, operation):
    launch(on_rank_destroys_early, backend, operation, num_ranks=3)


def on_rank_leaves(rank, backend, how):
    timeout_s, soon_s = (LONG_S, SOON_S) if how == "sys.exit" else LOSS[backend]
    group = Group(rank, backend, timeout_s=timeout_s)
    if rank == VICTIM:
        time.sleep(0.1)
        if how == "sys.exit":
            sys.exit(0)
        os._exit(0)
    error, seconds = timed_error_of(group.call, "dispatch")
    assert seconds < soon_s
    group.check_failed(error)


@DEVICES
@pytest.mark.parametrize("how", ["sys.exit", "os._exit"])
def test_a_rank_that_leaves_python_is_named(launch, backend, how):
    launch(on_rank_leaves, backend, how, num_ranks=3, lost=[VICTIM])


_kept = []  # objects that are alive when the interpreter ends


def on_rank_never_destroys(rank, backend, what):
    group = Group(rank, backend, timeout_s=LONG_S)
    _kept.append(group)
    if what == "asynchronous calls":
        _kept.extend(group.call("combine", async_op=True) for _ in range(4))
    if what == "a cycle":
        group.itself = group
        _kept.clear()
    if what == "threads":
        thread = threading.Thread(target=time.sleep, args=(0.2,))
        thread.start()


@DEVICES
@pytest.mark.parametrize("what", ["results", "asynchronous calls", "a cycle", "threads"])
def test_python_may_end_without_destroy(launch, backend, what):
    """`launch` checks the exit codes, and that nothing is left."""
    launch(on_rank_never_destroys, backend, what, num_ranks=3, end_python=True)


def on_rank_destroys_under_way(rank, backend):
    """Rank 0 destroys its buffer while the others have not even made the calls."""
    group = Group(rank, backend, timeout_s=LONG_S)
    if rank > 0:
        time.sleep(0.3)
    results = [group.call("combine", async_op=True) for _ in range(3)]
    want = group.world.combine_result(group.ys)
    group.buffer.destroy()
    for result in results:
        result.event.wait()
        assert torch.equal(on_host(result.x), want.x)


@DEVICES
def test_destroy_waits_for_the_calls_under_way(launch, backend, request):
    if backend == "cpu":
        reason = "destroy() refuses the calls that it should wait for"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    launch(on_rank_destroys_under_way, backend, num_ranks=3)


def on_rank_other_buffers(rank, backend):
    """The group of ranks 0 and 1 does not notice that rank 2 is dead."""
    pair = dist.new_group([0, 1])
    everyone = Group(rank, backend, timeout_s=LOSS[backend][0])
    if rank == VICTIM:
        die()
    world = World(Case(), rank)
    with cases.make_buffer(backend, group=pair, case=world.case) as buffer:
        cases.check_round_trip(buffer, world)
        error = error_of(everyone.call, "dispatch")
        cases.check_round_trip(buffer, world)
    everyone.check_failed(error)


@DEVICES
def test_a_failed_buffer_leaves_the_others_alone(launch, backend):
    launch(on_rank_other_buffers, backend, num_ranks=3, lost=[VICTIM])
