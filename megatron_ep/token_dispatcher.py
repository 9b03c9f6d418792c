"""Megatron-Core's token dispatcher on top of ep_kernels.

    method                hidden                      probs            what happens
    dispatch_preprocess   [S/TP, B, H] -> [T, H]      [T, E] -> [T, K] routing map -> topk_idx
    token_dispatch        [T, H] -> [N, H]            [T, K] -> [N]    rows travel
    dispatch_postprocess  [N, H]                      [N]              adds tokens per expert
    combine_preprocess    [N, H]                                       nothing
    token_combine         [N, H] -> [T, H]                             rows return and are summed
    combine_postprocess   [T, H] -> [S/TP, B, H]                       shared experts are added

Rows arrive grouped by expert, so that nothing has to be permuted on either side. The experts
multiply by the probabilities; combine is a plain sum, by ascending expert.

Symbols:
    T  tokens on this rank, S/TP * B     E  experts of the model
    K  most experts that a token of this rank has; ranks may differ in it
    N  rows on this rank                 L  experts on this rank
    expert_tp  ranks that share each expert (expert tensor parallel size)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.utils import get_pg_rank

from ep_kernels import CombineResult, DispatchResult, Layout
from megatron_ep.autograd import combine, dispatch
from megatron_ep.buffers import current_options, get_buffer
from megatron_ep.experts import GroupEnds
from megatron_ep.fp8_rows import check_fp8_hidden
from megatron_ep.recompute import (
    Transfers,
    keep,
    kept_transfers,
    may_run_again,
    take_transfers,
)
from megatron_ep.routing import place_slices, slice_experts, to_topk_idx, unslice_experts


class DeepEPTokenDispatcher(MoETokenDispatcher):
    """Sends tokens to their experts through the buffer of the expert (tensor x model) group.

    Any routing map is honoured as it is: a token may have any number of experts, and a probability
    of zero does not unselect one. So capacity limits, token dropping and padding to capacity, which
    the router does, need nothing here.

    With expert tensor parallelism, expert e is held in slices by `expert_tp` ranks, which all need
    its tokens and whose outputs add up. It is treated as that many experts,
    e * expert_tp + slice, each with one rank.

    A dispatcher belongs to a layer. Forwards of a layer follow one another, as Megatron makes them;
    between a forward and its backward any number of others may run.

    Args:
        num_local_experts: L.
        local_expert_indices: [L] global indices of this rank's experts, consecutive.
        config: of the layer.
        pg_collection: process groups; ep, expt_tp and tp_ep are used.

    Raises:
        ValueError: experts or ranks are not in the order that Megatron-Core gives them, or the
            hidden size does not suit fp8 rows, which the options ask for.

    Attributes:
        capacity_factor: as of configure(); None waits for the host to know how many rows come.
        overlap_num_sms: of transfers that overlap with experts, as of configure().
        overlaps_weight_gradients: as of configure().
        num_dropped: [1] int64 on the rows' device, rows that found no room here since it was last
            set to zero; None before the first.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: Any,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.num_experts: int = config.num_moe_experts
        self.expert_alignment = 1
        if config.moe_router_padding_for_quantization:
            self.expert_alignment = max(1, get_align_size_for_quantization(config))
        self._check_placement()
        self._num_topk = self._num_topk_of_graph()
        self.cudagraph_attrs = ["topk_idx"]
        options = current_options()
        self._recomputes_transfers = options.recompute_transfers
        self.sends_fp8 = options.fp8_dispatch
        if self.sends_fp8:
            check_fp8_hidden(getattr(config, "moe_latent_size", None) or config.hidden_size)
        self.capacity_factor = options.capacity_factor
        self.overlap_num_sms = options.overlap_num_sms
        self.overlaps_weight_gradients = options.overlap_weight_gradients
        self.num_dropped: torch.Tensor | None = None
        self._hands_out_ends = False
        # Between the calls of one forward; nothing that carries gradients:
        self.topk_idx: torch.Tensor | None = None
        self._hidden_shape: Any = None
        self.probs_dtype: Any = None
        self._delivered: DispatchResult | None = None
        self._handle: Any = None
        self._event: Any = None
        self._kept: Transfers | None = None
        self._to_keep: tuple[torch.Tensor, Any] | None = None

    def _check_placement(self) -> None:
        """Local experts are block `ep_rank`; group ranks count expert_tp first, then ep."""
        ep_rank, num_local = get_pg_rank(self.ep_group), self.num_local_experts
        expected = list(range(ep_rank * num_local, (ep_rank + 1) * num_local))
        if list(self.local_expert_indices) != expected:
            raise ValueError(
                f"local_expert_indices={self.local_expert_indices} on expert parallel rank "
                f"{ep_rank}: expected {expected}"
            )
        group_rank = get_pg_rank(self.tp_ep_group)
        if group_rank != ep_rank * self.tp_size + self.tp_rank:
            raise ValueError(
                f"rank {group_rank} of the expert tensor and model parallel group has expert "
                f"parallel rank {ep_rank} and expert tensor parallel rank {self.tp_rank} of "
                f"{self.tp_size}: expert parallelism must be the outer dimension"
            )

    def _num_topk_of_graph(self) -> int | None:
        """K if dispatch_preprocess becomes part of a CUDA graph, where no count can be read."""
        config = self.config
        if config.cuda_graph_impl == "none":
            return None
        parts = graphed_parts(config)
        if not parts or "moe" in parts or "full_iteration" in parts:
            raise ValueError(
                f"CUDA graphs of {parts or 'whole layers'} would capture the token dispatcher "
                "deepep, which reads counts on the host; capture at most moe_router and "
                "moe_preprocess of the MoE layer, or the layer by megatron_ep.capture_layer()"
            )
        if "moe_preprocess" not in parts:
            return None
        if config.moe_pad_expert_input_to_capacity:
            return self.num_experts
        return min(config.moe_router_topk, self.num_experts)

    def expect_topk(self, num_topk: int | None) -> None:
        """No token will have more than `num_topk` experts, which is an error from now on; None: any
        number, to be counted, for which the host waits.
        """
        self._num_topk = num_topk

    @property
    def knows_topk(self) -> bool:
        """Whether a token's number of experts needs no counting."""
        return self._num_topk is not None

    def hand_out_ends(self) -> None:
        """The experts take GroupEnds in place of tokens per expert, from now on."""
        self._hands_out_ends = True

    def set_shared_experts(self, shared_experts: Any) -> None:
        """Has the shared experts computed while tokens travel."""
        super().set_shared_experts(shared_experts)
        if shared_experts.use_shared_expert_gate:
            self.cudagraph_attrs.append("shared_experts.gate_score")
        self.cudagraph_attrs.append("shared_experts.cached_fc1_input")

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Brings the routing into the form of ep_kernels.

        Args:
            hidden_states: [S/TP, B, H].
            routing_map: [T, E] bool.
            probs: [T, E], entries outside of the map are ignored.

        Returns:
            [T, H] tokens and [T, K] probabilities (fp32 or fp64). Both own their memory: the 1F1B
            schedule frees them after token_dispatch.
        """
        self._hidden_shape, self.probs_dtype = hidden_states.shape, probs.dtype
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.shared_experts is not None:
            # NOTE: of `tokens`, so that gradients add up in the same order as in alltoall.
            self.shared_experts.pre_forward_comm(tokens.view(self._hidden_shape))
        kept = kept_transfers(self)
        if kept is None:
            topk_idx = to_topk_idx(routing_map, num_topk=self._num_topk)
        else:
            topk_idx = unslice_experts(kept.topk_idx, self.tp_size)
        topk_weights = probs.gather(1, topk_idx.clamp(min=0))
        if probs.dtype != torch.float64:
            topk_weights = topk_weights.float()
        if self.tp_size > 1:
            topk_idx, topk_weights = slice_experts(topk_idx, topk_weights, self.tp_size)
        self.topk_idx = topk_idx
        return tokens.clone(), topk_weights

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends the tokens and probabilities to the experts.

        Returns:
            [N, H] rows grouped by local expert and [N] probabilities.
        """
        topk_idx, self._kept = self.take_routing()
        delivered: list[DispatchResult] = []
        sent: Any = dispatch(
            self.buffer(hidden_states.device),
            hidden_states,
            topk_idx,
            probs,
            fp8=self.sends_fp8,
            kept=None if self._kept is None else self._kept.sent[0],
            delivered=delivered,
            layout=Layout.EXPERT_MAJOR,
            expert_alignment=self.expert_alignment,
            capacity=self.capacity(topk_idx),
            async_op=self.shared_experts is not None,
        )
        self._handle, self._event = sent.handle, sent.event
        self._delivered = delivered[0]
        if self._kept is None and self.keeps_transfers:
            self._to_keep = topk_idx, delivered[0]
        return sent.recv_x, sent.recv_topk_weights

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | GroupEnds, torch.Tensor]:
        """Hands the experts their rows, [L] int64 counts on the CPU or GroupEnds, and
        probabilities.

        With padding for quantisation, the padding rows (zeros) are counted.
        """
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(hidden_states)
            self._event.current_stream_wait()
        delivered, self._delivered = self._delivered, None
        assert delivered is not None, "token_dispatch() comes first"
        if self._kept is None:
            self.count_dropped(delivered)
        return hidden_states, self.groups(delivered), probs.to(self.probs_dtype)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing to do: rows go back from where the experts left them."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sends the experts' rows back: [N, H] -> [T, H], summed per token."""
        handle, self._handle = self._handle, None
        kept, self._kept = self._kept, None
        combined = combine(
            self.buffer(hidden_states.device),
            hidden_states.contiguous(),
            handle,
            kept=None if kept is None else kept.combined,
            async_op=self.shared_experts is not None,
        )
        self._event = combined.event
        if self._to_keep is not None:
            (topk_idx, sent), self._to_keep = self._to_keep, None
            self.keep(topk_idx, (sent,), combined)
        return combined.x

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Restores the shape and adds the output of overlapped shared experts."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
            self.shared_experts.post_forward_comm()
        if self._event is not None:
            self._event.current_stream_wait()
            self._event = None
        output = hidden_states.view(self._hidden_shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output

    def take_topk_idx(self) -> torch.Tensor:
        """The routing of the micro-batch whose dispatch_preprocess() came last, once."""
        topk_idx, self.topk_idx = self.topk_idx, None
        assert topk_idx is not None, "dispatch_preprocess() comes first"
        return topk_idx

    def take_routing(self) -> tuple[torch.Tensor, Transfers | None]:
        """take_topk_idx(), and what an earlier forward of this micro-batch kept for this one."""
        return self.take_topk_idx(), take_transfers(self)

    @property
    def keeps_transfers(self) -> bool:
        """Whether this forward may run again, and is to have its transfers then."""
        return not self._recomputes_transfers and may_run_again()

    def keep(self, topk_idx: torch.Tensor, sent: tuple[Any, ...], combined: CombineResult) -> None:
        """Keeps the transfers for the same forward again."""
        keep(Transfers(owner=self, topk_idx=topk_idx, sent=sent, combined=combined))

    def capacity(self, topk_idx: torch.Tensor) -> int | None:
        """Rows that a dispatch of this routing has room for; None: for all that come."""
        if self.capacity_factor is None:
            return None
        padding = self.num_local_experts * (self.expert_alignment - 1)
        return math.ceil(self.capacity_factor * topk_idx.numel()) + padding

    def count_dropped(self, sent: DispatchResult) -> None:
        """Adds the rows that found no room; the current stream has waited for the dispatch."""
        if self.capacity_factor is None:
            return
        if self.num_dropped is None:
            self.num_dropped = torch.zeros_like(sent.num_overflow)
        self.num_dropped += sent.num_overflow

    def groups(self, sent: DispatchResult) -> torch.Tensor | GroupEnds:
        """The rows of each local expert, with padding: [L] int64, or where they end.

        With ends the current stream has waited for the dispatch, and no host has.
        """
        if not self._hands_out_ends:
            return self._tokens_per_expert(sent)
        offsets = sent.handle.expert_offsets
        assert offsets is not None
        if self.capacity_factor is not None:  # offsets are those of all rows that were to come
            offsets = offsets.clamp(max=len(sent.recv_x))
        return GroupEnds(offsets[1:].to(torch.int32))

    def _tokens_per_expert(self, sent: DispatchResult) -> torch.Tensor:
        if self.expert_alignment > 1:
            assert sent.expert_offsets is not None
            return sent.expert_offsets.diff()
        return sent.num_recv_tokens_per_expert

    def buffer(self, device: torch.device) -> Any:
        """The buffer of the group, which all layers share."""
        num_slices = self.num_experts * self.tp_size
        expert_to_rank = None
        if self.tp_size > 1:
            expert_to_rank = place_slices(
                num_experts=self.num_experts, expert_tp=self.tp_size, ep_size=self.ep_size
            )
        return get_buffer(
            self.tp_ep_group, num_experts=num_slices, expert_to_rank=expert_to_rank, device=device
        )


def graphed_parts(config: Any) -> list[str]:
    """Names of the parts of a layer that become CUDA graphs; none: the whole layer.

    Megatron-Core calls the list cuda_graph_scope up to 0.16 and cuda_graph_modules later.
    """
    parts = getattr(config, "cuda_graph_modules", None) or getattr(config, "cuda_graph_scope", None)
    return [part.name for part in parts or []]
