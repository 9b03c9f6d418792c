"""What ranks do in test_autograd.py: dispatch, experts, combine, and what the gradients must be.

The experts are `y = x * scale[expert]`, weighted by topk_weights, so that every gradient is known
in closed form without any communication:

    out[t]     = x[t] * sum over k of weight[t, k] * scale[expert(t, k)]
    d x[t]     = grad[t] * the same sum
    d weight   = sum over hidden of grad[t] * x[t] * scale[expert(t, k)]
    d scale[e] = sum over the tokens of all ranks that chose e of grad[t] * x[t] * weight
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import ep_kernels
from ep_kernels import Layout, reference
from ep_kernels.testing import make_routing
from megatron_ep import combine, dispatch

NUM_EXPERTS, HIDDEN, NUM_TOPK = 8, 8, 3
TOKENS = (9, 0, 5, 1)


def make_buffer(backend, num_experts=NUM_EXPERTS, group=None):
    return (reference if backend == "reference" else ep_kernels).Buffer(
        group, num_experts=num_experts
    )


def make_batch(rank, *, seed=0, dtype=torch.float64, num_tokens=None, routing="masked"):
    """x, topk_idx, topk_weights and the gradient of the output."""
    num_tokens = TOKENS[rank] if num_tokens is None else num_tokens
    generator = torch.Generator().manual_seed(100 * seed + rank)
    x, grad = (
        torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    topk_idx, _ = make_routing(routing, num_tokens, NUM_TOPK, NUM_EXPERTS, seed=100 * seed + rank)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(num_tokens, NUM_TOPK, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), topk_idx, weights.to(weight_dtype).requires_grad_(), grad


def make_scales():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(NUM_EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)


def run_experts(buffer, sent, scales, layout):
    """[N, H]: each row times the scales of its experts, weighted."""
    local = scales[buffer.local_experts].to(sent.recv_x.dtype)
    if layout is Layout.EXPERT_MAJOR:
        counts = sent.expert_offsets.diff()
        scale = local.repeat_interleave(counts, dim=0)
        return sent.recv_x * scale * sent.recv_topk_weights[:, None].to(sent.recv_x.dtype)
    weights = sent.recv_topk_weights.to(sent.recv_x.dtype)
    is_here = sent.recv_topk_idx >= 0
    chosen = local[sent.recv_topk_idx.clamp(min=0)] * is_here[..., None]
    return sent.recv_x * (chosen * weights[..., None]).sum(dim=1)


def moe(buffer, x, topk_idx, weights, scales, layout, **options):
    sent = dispatch(buffer, x, topk_idx, weights, layout=layout, **options)
    sent.event.wait()
    return combine(buffer, run_experts(buffer, sent, scales, layout), sent.handle).x


def expected_gradients(x, topk_idx, weights, grad, scales):
    """Output, d x, d weight, and this rank's part of d scale."""
    chosen = scales[topk_idx.clamp(min=0)] * (topk_idx >= 0)[..., None]
    factor = (weights[..., None] * chosen).sum(dim=1)
    d_weight = (grad[:, None] * x[:, None] * chosen).sum(dim=-1)
    d_chosen = grad[:, None] * x[:, None] * weights[..., None]
    d_scale = torch.zeros_like(scales)
    is_chosen = topk_idx >= 0
    d_scale.index_add_(0, topk_idx[is_chosen], d_chosen[is_chosen])
    return x * factor, grad * factor, d_weight, d_scale


def check_closed_form(rank, backend, layout, alignment):
    """Output and all gradients against the closed form."""
    with make_buffer(backend) as buffer:
        x, topk_idx, weights, grad = make_batch(rank)
        scales = make_scales().requires_grad_()
        options = {} if alignment == 1 else {"expert_alignment": alignment}
        out = moe(buffer, x, topk_idx, weights, scales, layout, **options)
        out.backward(grad)
        dist.all_reduce(scales.grad)
        with torch.no_grad():
            expected = expected_gradients(x, topk_idx, weights, grad, scales)
            dist.all_reduce(expected[3])
        for actual, wanted in zip((out, x.grad, weights.grad, scales.grad), expected):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def check_gradcheck(rank, backend, layout):
    """torch's own check of first and second derivatives, of each function and of both together.

    On one rank: it changes one input at a time, which peers would have to know.
    """
    with make_buffer(backend) as buffer:
        x, topk_idx, weights, _ = make_batch(rank, num_tokens=4)
        scales = make_scales()
        handle = buffer.dispatch(x.detach(), topk_idx, layout=layout).handle

        def send(x, weights):
            sent = dispatch(buffer, x, topk_idx, weights, layout=layout)
            return sent.recv_x, sent.recv_topk_weights

        rows, row_weights = (tensor.detach().requires_grad_() for tensor in send(x, weights))
        bias = tuple(torch.randn_like(x).requires_grad_() for _ in range(2))

        def bring_back(rows, row_weights, *bias):
            back = combine(buffer, rows, handle, topk_weights=row_weights, bias=bias)
            return back.x, back.topk_weights

        def both(x, weights):
            # Not linear in x: the backward of the backward has something to do.
            return moe(buffer, x.sin(), topk_idx, weights, scales, layout).square()

        for function, inputs in (
            (send, (x, weights)),
            (bring_back, (rows, row_weights, *bias)),
            (both, (x, weights)),
        ):
            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)


def check_adjoint(rank, backend, layout):
    """<dispatch(a), b> = <a, combine(b)> over all ranks, for rows and for weights."""
    with make_buffer(backend) as buffer:
        x, topk_idx, weights, _ = make_batch(rank)
        sent = dispatch(buffer, x, topk_idx, weights, layout=layout)
        b, b_weights = torch.randn_like(sent.recv_x), torch.randn_like(sent.recv_topk_weights)
        if layout is Layout.RANK_MAJOR:
            b_weights *= sent.recv_topk_idx >= 0
        back = buffer.combine(b, sent.handle, topk_weights=b_weights)
        torch.autograd.backward((sent.recv_x, sent.recv_topk_weights), (b, b_weights))
        assert torch.equal(x.grad, back.x)
        assert torch.equal(weights.grad, back.topk_weights)
        for there, here in (
            ((sent.recv_x * b).sum(), (x * back.x).sum()),
            ((sent.recv_topk_weights * b_weights).sum(), (weights * back.topk_weights).sum()),
        ):
            sums = torch.stack([there.detach(), here.detach()])
            dist.all_reduce(sums)
            torch.testing.assert_close(sums[0], sums[1], rtol=1e-13, atol=1e-13)


def check_nothing_saved(rank, backend, layout):
    """Inputs and outputs are freed between forward and backward, as the 1F1B schedule does."""
    with make_buffer(backend) as buffer:
        x, topk_idx, weights, _ = make_batch(rank)
        x_in, weights_in = (tensor.detach().clone().requires_grad_() for tensor in (x, weights))
        sent = dispatch(buffer, x_in, topk_idx, weights_in, layout=layout)
        grads = torch.ones_like(sent.recv_x), torch.ones_like(sent.recv_topk_weights)
        y = sent.recv_x.detach().clone().requires_grad_()
        back = combine(buffer, y, sent.handle)
        for node in (sent.recv_x.grad_fn, back.x.grad_fn):
            assert node.saved_tensors == ()
        outputs = sent.recv_x, sent.recv_topk_weights
        for tensor in (x_in, weights_in, y):
            tensor.untyped_storage().resize_(0)
        back.x.backward(torch.ones_like(x))
        torch.autograd.backward(outputs, grads)
        num_choices = (topk_idx >= 0).sum(dim=1, keepdim=True)
        if layout is Layout.RANK_MAJOR:
            is_token_in_rank = buffer.get_dispatch_layout(topk_idx).is_token_in_rank
            num_choices = is_token_in_rank.sum(dim=1, keepdim=True)
        assert torch.equal(x_in.grad, num_choices.expand_as(x).double())
        assert torch.equal(y.grad, torch.ones_like(y.grad))


def check_many_in_flight(rank, backend, layout):
    """Two layers, three batches; the backwards run in another order than the forwards."""
    with make_buffer(backend) as buffer, make_buffer(backend) as second:
        scales = make_scales()
        batches = [make_batch(rank, seed=seed) for seed in range(3)]
        outs = []
        for x, topk_idx, weights, _ in batches:
            hidden = moe(buffer, x, topk_idx, weights, scales, layout)
            outs.append(moe(second, hidden, topk_idx, weights, scales, layout))
        for index in (1, 2, 0):
            outs[index].backward(batches[index][3])
        for out, (x, topk_idx, weights, grad) in zip(outs, batches):
            with torch.no_grad():
                hidden, _, _, _ = expected_gradients(x, topk_idx, weights, grad, scales)
                wanted, d_hidden, d_weight, _ = expected_gradients(
                    hidden, topk_idx, weights, grad, scales
                )
                _, d_x, first_d_weight, _ = expected_gradients(
                    x, topk_idx, weights, d_hidden, scales
                )
            torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
            torch.testing.assert_close(x.grad, d_x, rtol=0, atol=1e-12)
            torch.testing.assert_close(weights.grad, d_weight + first_d_weight, rtol=0, atol=1e-12)


def check_parts(rank, backend, layout, dtype):
    """No weights; weights only; a cached routing; asynchronous calls; every dtype of rows."""
    with make_buffer(backend) as buffer:
        x, topk_idx, weights, grad = make_batch(rank, dtype=dtype)
        sent = dispatch(buffer, x, topk_idx, layout=layout)
        assert sent.recv_topk_weights is None
        sent.recv_x.mul_(2)  # results may be changed in place
        back = combine(buffer, sent.recv_x, sent.handle)
        back.x.mul_(2).backward(grad)
        factor = torch.tensor(4.0, dtype=dtype) * _num_rows(buffer, topk_idx, layout)
        torch.testing.assert_close(x.grad, grad * factor)

        cached = dispatch(buffer, x.detach(), None, weights, handle=sent.handle, async_op=True)
        cached.event.wait()
        cached.recv_topk_weights.sum().backward()
        assert torch.equal(weights.grad, (topk_idx >= 0).to(weights.dtype))


def _num_rows(buffer, topk_idx, layout):
    if layout is Layout.EXPERT_MAJOR:
        return (topk_idx >= 0).sum(dim=1, keepdim=True)
    return buffer.get_dispatch_layout(topk_idx).is_token_in_rank.sum(dim=1, keepdim=True)


def check_refusals(rank, backend):
    """What has no gradient is refused, before peers hear of it."""
    with make_buffer(backend) as buffer:
        x, topk_idx, weights, _ = make_batch(rank, num_tokens=4)
        rows = x.detach().to(torch.float8_e4m3fn), torch.ones(4, 1)
        with pytest.raises(TypeError, match="tuple"):
            dispatch(buffer, rows, topk_idx, weights)
        dispatch(buffer, x, topk_idx, weights)
