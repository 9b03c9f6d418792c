"""What dispatch and combine hand back.

Sizes used in the docstrings:
    R  ranks of the group               E  experts in total       L  experts on this rank
    T  tokens on this rank, before      K  choices per token      H  hidden, elements per token
    N  rows on this rank, after dispatch                          S  scales per token (fp8 rows)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ep_kernels.config import Layout
    from ep_kernels.event import Event


@dataclass(frozen=True, kw_only=True, eq=False)
class HostCounts:
    """What the host knows of a received batch.

    Attributes:
        num_rows: N.
        num_recv_tokens_per_expert, expert_offsets: as in DispatchResult, on the CPU.
    """

    num_rows: int
    num_recv_tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor

    @classmethod
    def of(cls, memory: RoutingMemory) -> HostCounts:
        """Those of a routing that lies on the CPU."""
        return cls(
            num_rows=int(memory.recv_sizes[0]),
            num_recv_tokens_per_expert=memory.num_recv_tokens_per_expert,
            expert_offsets=memory.expert_offsets,
        )


def routing_sizes(
    layout: Layout, *, num_ranks: int, num_local_experts: int, num_tokens: int, num_topk: int
) -> dict[str, int]:
    """The sizes of a RoutingMemory."""
    from ep_kernels.config import Layout

    return {
        "num_ranks": num_ranks,
        "num_local_experts": num_local_experts,
        "num_groups": num_local_experts if layout is Layout.EXPERT_MAJOR else 1,
        "num_tokens": num_tokens,
        "num_topk": num_topk,
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingMemory:
    """Where the compiled core keeps the routing of a dispatch, on the buffer's device.

    One int64 tensor holds, in this order: num_recv_tokens_per_expert [L], expert_offsets [L + 1],
    own_rows [G, 2] with G = L (EXPERT_MAJOR) or 1 (ranges of the received rows that this rank
    itself sent), recv_sizes [3] (rows with padding, without, and dropped for capacity),
    rank_counts [R, R] (tokens of each source rank for each destination); then, as int32,
    rows [T, K] (row of each choice on its rank) and routes [T, K] (its rank, and whether it carries
    the row, see `csrc/core/routing.h`), both -1 where there is none.
    """

    words: torch.Tensor
    num_ranks: int
    num_local_experts: int
    num_groups: int
    num_tokens: int
    num_topk: int

    @staticmethod
    def num_words(
        *, num_ranks: int, num_local_experts: int, num_groups: int, num_tokens: int, num_topk: int
    ) -> int:
        """Length of `words`."""
        counts = 2 * num_local_experts + 4 + 2 * num_groups + num_ranks**2
        return counts + num_tokens * num_topk

    def addresses(self) -> dict[str, int]:
        """Address of each part, by its name in `csrc/core/ht_args.h`."""
        base, local = self.words.data_ptr(), self.num_local_experts
        rows = base + 8 * self._rows_begin
        return {
            "num_recv_tokens_per_expert": base,
            "expert_offsets": base + 8 * local,
            "own_rows": base + 8 * (2 * local + 1),
            "recv_sizes": base + 8 * self._sizes_begin,
            "rank_counts": base + 8 * (self._sizes_begin + 3),
            "rows": rows,
            "routes": rows + 4 * self.num_tokens * self.num_topk,
        }

    @property
    def _sizes_begin(self) -> int:
        return 2 * self.num_local_experts + 1 + 2 * self.num_groups

    @property
    def _rows_begin(self) -> int:
        return self._sizes_begin + 3 + self.num_ranks**2

    @property
    def num_recv_tokens_per_expert(self) -> torch.Tensor:
        """[L] int64."""
        return self.words[: self.num_local_experts]

    @property
    def expert_offsets(self) -> torch.Tensor:
        """[L + 1] int64."""
        return self.words[self.num_local_experts : 2 * self.num_local_experts + 1]

    @property
    def recv_sizes(self) -> torch.Tensor:
        """[3] int64."""
        return self.words[self._sizes_begin : self._sizes_begin + 3]

    @property
    def rank_counts(self) -> torch.Tensor:
        """[R, R] int64."""
        counts = self.words[self._sizes_begin + 3 : self._rows_begin]
        return counts.view(self.num_ranks, self.num_ranks)


NUM_CALL_FIELDS = 6
"""Length of the second tensor of DispatchHandle.to_tensors()."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DispatchHandle:
    """The routing of one dispatch; opaque. combine() needs it, and dispatch() may reuse it.

    Attributes:
        owner: the buffer's identity; a handle works only with the buffer that made it.
        seq: number of the dispatch, the same on all ranks.
        num_rows: N, rows of the received tensors.
        memory: the routing itself.
        host: what the host knows; None if it did not wait for the counts.
    """

    owner: object
    seq: int
    layout: Layout
    expert_alignment: int
    capacity: int | None
    num_rows: int
    memory: RoutingMemory
    host: HostCounts | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.memory.num_tokens

    @property
    def num_topk(self) -> int:
        """K."""
        return self.memory.num_topk

    def to_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For code that can only carry tensors; Buffer.restore_handle() is the way back.

        Returns:
            memory.words; and, on the CPU, [6] int64: seq, 1 if the layout is EXPERT_MAJOR,
            expert_alignment, num_rows, num_tokens, num_topk.

        Raises:
            EPConfigError: the dispatch had no capacity.
        """
        import torch

        from ep_kernels.config import Layout
        from ep_kernels.errors import EPConfigError

        if self.capacity is None:
            raise EPConfigError("a handle of a dispatch without capacity is more than tensors")
        is_by_expert = int(self.layout is Layout.EXPERT_MAJOR)
        call = (self.seq, is_by_expert, self.expert_alignment, self.capacity)
        return self.memory.words, torch.tensor([*call, self.num_tokens, self.num_topk])

    @property
    def expert_offsets(self) -> torch.Tensor | None:
        """As in DispatchResult, but on the buffer's device in any case."""
        from ep_kernels.config import Layout

        return self.memory.expert_offsets if self.layout is Layout.EXPERT_MAJOR else None

    @property
    def rank_counts(self) -> torch.Tensor:
        """[R, R] int64 on the buffer's device: tokens of the rank of the row that have a choice on
        the rank of the column, before a capacity cuts any off.
        """
        return self.memory.rank_counts


@dataclass(frozen=True, kw_only=True)
class DispatchLayout:
    """Who gets how much of this rank's tokens; computed without communication.

    Attributes:
        num_tokens_per_rank: [R] int32, tokens with at least one choice on each rank.
        num_tokens_per_expert: [E] int32, tokens that chose each expert.
        is_token_in_rank: [T, R] bool, whether the token has a choice on the rank.
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class DispatchResult:
    """Rows that this rank received.

    Attributes:
        recv_x: [N, H], dtype of the rows sent.
        recv_scales: [N, S] scales of fp8 rows; None for other dtypes.
        recv_topk_idx: RANK_MAJOR: [N, K] int64, the choices as local expert ids, -1 where the
            choice is none or lives elsewhere. EXPERT_MAJOR, or routing from a cached handle: None.
        recv_topk_weights: RANK_MAJOR: [N, K], 0 where the choice is not on this rank.
            EXPERT_MAJOR: [N], 0 in padding rows. None when no weights were sent.
        num_recv_tokens_per_expert: [L] int64, rows per local expert without padding; the counts
            before `capacity` cuts anything off. On the CPU; with a capacity on the rows' device.
        expert_offsets: EXPERT_MAJOR: [L + 1] int64, first row of each local expert's group, then N;
            where num_recv_tokens_per_expert is. RANK_MAJOR: None.
        num_overflow: [1] int64, rows dropped here because of `capacity`.
        handle: pass to combine(), or to dispatch() to send other rows the same way.
        event: completes when the tensors above hold their contents.
    """

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    num_recv_tokens_per_expert: torch.Tensor
    expert_offsets: torch.Tensor | None
    num_overflow: torch.Tensor
    handle: DispatchHandle | Any
    event: Event | Any


@dataclass(frozen=True, kw_only=True)
class CombineResult:
    """Rows back on the rank of their tokens.

    Attributes:
        x: [T, H], for each token the sum of its rows, plus the bias.
        topk_weights: [T, K], for each choice the entry of the row that served it, 0 where the
            choice is none or its row was dropped; None when no weights were given.
        event: completes when the tensors above hold their contents.
    """

    x: torch.Tensor
    topk_weights: torch.Tensor | None
    event: Event | Any
