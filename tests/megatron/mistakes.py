"""Buffers that make one mistake each. The calls of a layer tell the passes apart:

forward     dispatch(x, topk_idx, topk_weights)      combine(y, handle)
backward    dispatch(grad, handle=...)               combine(grad, handle, topk_weights=...)
"""

from dataclasses import replace

import torch

import ep_kernels


class NoMistake(ep_kernels.Buffer):
    """Hooks that do nothing."""

    def change_routing(self, topk_idx):
        return topk_idx

    def change_recv_grad(self, grad):
        return grad

    def change_combined(self, x):
        return x

    def change_combined_grad(self, grad):
        return grad

    def change_weights_grad(self, grad):
        return grad

    def dispatch(self, x, topk_idx=None, topk_weights=None, **options):
        if topk_idx is not None:
            topk_idx = self.change_routing(topk_idx)
            return super().dispatch(x, topk_idx, topk_weights, **options)
        result = super().dispatch(x, None, topk_weights, **options)
        return replace(result, recv_x=self.change_recv_grad(result.recv_x))

    def combine(self, x, handle, *, topk_weights=None, **options):
        result = super().combine(x, handle, topk_weights=topk_weights, **options)
        if topk_weights is None:
            return replace(result, x=self.change_combined(result.x))
        return replace(
            result,
            x=self.change_combined_grad(result.x),
            topk_weights=self.change_weights_grad(result.topk_weights),
        )


class WrongRank(NoMistake):
    """Every row goes to the expert with the same local number on the next rank."""

    def change_routing(self, topk_idx):
        shifted = (topk_idx + self.num_local_experts) % self.num_experts
        return shifted.where(topk_idx >= 0, -1)


class OneRowToWrongRank(NoMistake):
    """One row of rank 0 does."""

    def change_routing(self, topk_idx):
        topk_idx = topk_idx.clone()
        if self.rank == 0:
            row = topk_idx[0]
            others = [e for e in range(self.num_experts) if e not in row.tolist()]
            far = [e for e in others if abs(e - int(row[0])) >= self.num_local_experts]
            row[0] = (far or others)[0]
        return topk_idx


class SwappedLocalExperts(NoMistake):
    """Each rank's experts 0 and 1, 2 and 3, ... get each other's rows."""

    def change_routing(self, topk_idx):
        return (topk_idx ^ 1).where(topk_idx >= 0, -1)


class DroppedRow(NoMistake):
    """The first choice of rank 0's last token is not sent."""

    def change_routing(self, topk_idx):
        topk_idx = topk_idx.clone()
        if self.rank == 0:
            topk_idx[-1, 0] = -1
        return topk_idx


class DroppedOutputRow(NoMistake):
    """Rank 0's last token gets nothing back."""

    def change_combined(self, x):
        return _without_last_row(x) if self.rank == 0 else x


class DroppedGradientRow(NoMistake):
    """Rank 0's last token gets no gradient back."""

    def change_combined_grad(self, grad):
        return _without_last_row(grad) if self.rank == 0 else grad


class NoGradientToProbs(NoMistake):
    def change_weights_grad(self, grad):
        return torch.zeros_like(grad)


class HalfGradientToProbs(NoMistake):
    def change_weights_grad(self, grad):
        return grad / 2


class SwappedGradientsToProbs(NoMistake):
    """The gradients of a token's choices are exchanged; their sum is right."""

    def change_weights_grad(self, grad):
        return grad.flip(1)


class ScaledGradientToTokens(NoMistake):
    """The backward of dispatch is 1 % too large."""

    def change_combined_grad(self, grad):
        return grad * 1.01


class ScaledGradientToExperts(NoMistake):
    """The backward of combine is 1 % too large."""

    def change_recv_grad(self, grad):
        return grad * 1.01


def _without_last_row(x):
    return torch.cat([x[:-1], torch.zeros_like(x[-1:])])
