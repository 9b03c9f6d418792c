"""The device of a rank, and the process group that suits where the ranks' devices are.

ranks                        backend of the default process group
on CPUs                      gloo
each with a GPU of its own   nccl
several on one GPU           gloo, which carries CUDA tensors too: NCCL refuses such ranks
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep.cpu_compat import define_fused_names, enable_cpu

_DEVICE_KEY = "megatron_ep/device_of_rank"


def choose_device(wanted: str = "auto") -> torch.device:
    """This rank's device, made current; Megatron-Core is prepared for it.

    Ranks of a node take its GPUs in turn, so that several share one if there are fewer GPUs.

    Args:
        wanted: "cpu", "cuda" or "auto": cuda where it is available.

    Raises:
        ValueError: the device cannot be had.
    """
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise ValueError("'cuda', but torch finds no CUDA device")
        enable_cpu()
        return torch.device("cpu")
    if wanted == "cpu":
        raise ValueError("'cpu': CUDA is in use already in this process")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    define_fused_names()
    return torch.device("cuda", index)


def start_process_group(
    device: torch.device, *, backend: str = "auto", timeout: timedelta = timedelta(minutes=30)
) -> None:
    """Makes the default process group; torchrun sets the environment, one rank needs none.

    Args:
        device: of this rank.
        backend: one of torch.distributed; "auto" takes that of the table above.
        timeout: of its collectives.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" in os.environ:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    else:  # a single rank, without torchrun
        store, rank, world_size = dist.HashStore(), 0, 1
    store.set_timeout(timeout)
    if backend == "auto":
        backend = "gloo"
        if device.type == "cuda" and _has_device_of_its_own(store, rank, world_size, device):
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if device.type == "cuda" and backend == "gloo":
        reduce_gradients_one_by_one()


class _Nothing:
    """What is left to wait for after collectives that were waited for one by one."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def _one_by_one(
    group: Any = None, device: Any = None, async_ops: bool = False
) -> Iterator[_Nothing]:
    """In place of torch's context that makes one collective of several."""
    if async_ops:
        raise ValueError(
            "overlap_grad_reduce or overlap_param_gather is set: ranks that share a GPU exchange "
            "gradients and parameters over gloo, one after the other"
        )
    yield _Nothing()


def reduce_gradients_one_by_one() -> None:
    """gloo cannot coalesce all-reduces of CUDA tensors, which Megatron-Core would have it do."""
    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer._coalescing_manager = _one_by_one


def _has_device_of_its_own(
    store: dist.Store, rank: int, world_size: int, device: torch.device
) -> bool:
    """Whether no two ranks of the whole run have the same GPU; all ranks get the same answer.

    NOTE: a GPU is known by its UUID. Its index says nothing where every rank sees one GPU only.
    """
    mine = str(torch.cuda.get_device_properties(device).uuid)
    store.set(f"{_DEVICE_KEY}/{rank}", mine)
    everyones = store.multi_get([f"{_DEVICE_KEY}/{other}" for other in range(world_size)])
    return len(set(everyones)) == world_size
