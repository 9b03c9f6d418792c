"""All-to-all of rows over gloo and over MPI, behind one interface."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

MAX_MPI_BYTES = 2**31 - 1


class Transport(Protocol):
    """What the baselines need of a communication library."""

    name: str

    def exchange_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """[R, n] int64: row r goes to rank r; row s of the result came from rank s."""

    def all_to_all(
        self, out: torch.Tensor, rows: torch.Tensor, *, recv: list[int], send: list[int]
    ) -> None:
        """Sends `rows` [sum(send), ...] into `out` [sum(recv), ...], by rank, both contiguous."""


class GroupTransport:
    """torch.distributed.all_to_all_single over gloo for CPU tensors, NCCL for CUDA ones."""

    def __init__(self, name: str, group: Any = None) -> None:
        self.name, self._group = name, group

    def exchange_counts(self, counts: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(counts)
        dist.all_to_all_single(out, counts, group=self._group)
        return out

    def all_to_all(
        self, out: torch.Tensor, rows: torch.Tensor, *, recv: list[int], send: list[int]
    ) -> None:
        dist.all_to_all_single(out, rows, recv, send, group=self._group)


class MpiTransport:
    """MPI_Alltoallv of bytes."""

    name = "mpi"

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def exchange_counts(self, counts: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(counts)
        self._comm.Alltoall(counts.numpy(), out.numpy())
        return out

    def all_to_all(
        self, out: torch.Tensor, rows: torch.Tensor, *, recv: list[int], send: list[int]
    ) -> None:
        self._comm.Alltoallv(_message(rows, send), _message(out, recv))


def _message(rows: torch.Tensor, counts: list[int]) -> list[Any]:
    """Buffer, counts, displacements and type, as mpi4py takes them."""
    from mpi4py import MPI

    if rows.nbytes > MAX_MPI_BYTES:
        raise ValueError(f"{rows.nbytes} bytes in one Alltoallv; MPI counts end at 2^31")
    row_bytes = rows[0].nbytes if rows.shape[0] else 0
    num_bytes = [count * row_bytes for count in counts]
    offsets = [sum(num_bytes[:rank]) for rank in range(len(counts))]
    return [rows.view(torch.uint8).numpy(), (num_bytes, offsets), MPI.BYTE]
