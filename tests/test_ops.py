"""The operators: the calls of the same name in graphs, with gradients."""

import contextlib
import gc
import shutil
import tempfile
from pathlib import Path

import cases
import pytest
import torch
import torch.distributed as dist
from backends import backends
from torch.library import opcheck

from ep_kernels import EPConfigError, Layout, ops
from ep_kernels.testing import RankPool, assert_bitwise_equal, make_routing

LAYOUTS = pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name)
DEVICES = backends("cpu", "nodes", "cuda")
NUM_EXPERTS, HIDDEN = 12, 32

# NOTE: without test_aot_dispatch_dynamic, which wants equal results from two calls, while a
# dispatch numbers itself. Compiled and eager calls with changing sizes are compared below.
CHECKS_OF_DISPATCH = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture(scope="module", name="rank_pool")
def rank_pool_of_module(rank_server):
    """Ranks of these tests only: the compiler keeps memory mapped, which other tests look for."""
    with RankPool(rank_server) as pool:
        yield pool


def make_inputs(buffer, num_tokens, dtype=torch.float64):
    """x, topk_idx with a few -1, topk_weights."""
    topk_idx, weights = make_routing("masked", num_tokens, 2, NUM_EXPERTS, seed=buffer.rank)
    generator = torch.Generator().manual_seed(buffer.rank)
    x = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    device = buffer.device
    return x.to(device, dtype), topk_idx.to(device), weights.to(device, torch.float64)


def make_buffer(backend):
    """With memory that is not zero by luck."""
    buffer = cases.make_buffer(backend, case=cases.Case(num_experts=NUM_EXPERTS))
    buffer = getattr(buffer, "unwrapped", buffer)
    buffer.empty(1 << 20, dtype=torch.uint8).fill_(0x7F)
    return buffer


@contextlib.contextmanager
def compiler_cache():
    """Removes what the compiler keeps for the next run, and forgets what it compiled, of which
    there is a limit."""
    yield
    torch._dynamo.reset()
    dist.barrier()  # the ranks share the folder, and another one may still compile
    for folder in Path(tempfile.gettempdir()).glob("torchinductor_*"):
        shutil.rmtree(folder, ignore_errors=True)


def compiled(function, compiler):
    return torch.compile(function, fullgraph=True, backend=compiler) if compiler else function


def layer(buffer, x, topk_idx, topk_weights, layout, capacity):
    sent = ops.dispatch(buffer, x, topk_idx, topk_weights, capacity=capacity, layout=layout)
    weights = sent.recv_topk_weights
    if layout is Layout.RANK_MAJOR:
        weights = weights.sum(dim=1)
    y = torch.tanh(sent.recv_x) * weights[:, None]
    return ops.combine(buffer, y, sent.handle)[0], sent.num_overflow


def local_layer(x, topk_idx, topk_weights):
    """The same layer without a transfer."""
    return torch.tanh(x) * topk_weights.masked_fill(topk_idx < 0, 0).sum(dim=1, keepdim=True)


def on_rank_gradients(rank, backend, layout, compiler):
    function = compiled(layer, compiler)
    with compiler_cache(), make_buffer(backend) as buffer:
        for num_tokens in (40, 7, 40):
            x, topk_idx, weights = make_inputs(buffer, num_tokens)
            inputs, local_inputs = (
                [tensor.clone().requires_grad_() for tensor in (x, weights)] for _ in range(2)
            )
            out, num_overflow = function(buffer, inputs[0], topk_idx, inputs[1], layout, 200)
            want = local_layer(local_inputs[0], topk_idx, local_inputs[1])
            torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
            assert num_overflow.item() == 0
            grad = torch.randn(out.shape, dtype=out.dtype).to(buffer.device)
            out.backward(grad)
            want.backward(grad)
            for got, local in zip(inputs, local_inputs):
                torch.testing.assert_close(got.grad, local.grad, rtol=1e-12, atol=1e-12)


@DEVICES
@LAYOUTS
@pytest.mark.parametrize("compiler", [None, "aot_eager"], ids=["eager", "compiled"])
def test_gradients_are_those_of_the_layer_without_a_transfer(ranks, backend, layout, compiler):
    ranks.run(on_rank_gradients, backend, layout, compiler, deadline_s=300)


@LAYOUTS
@pytest.mark.parametrize("num_ranks", [4])
def test_gradients_over_nodes_of_several_ranks(ranks, over_nodes, num_ranks, layout):
    ranks.run(on_rank_gradients, over_nodes, layout, None)


def on_rank_restored_from_copies(rank):
    """What crosses the network is kept beside the tensor, not in it."""
    with make_buffer("nodes") as buffer:
        x, topk_idx, weights = make_inputs(buffer, 5)
        sent = ops.dispatch(buffer, x, topk_idx, weights, capacity=10)
        handle = sent.handle
        want, _ = ops.combine(buffer, sent.recv_x, handle)
        alias = handle._replace(words=handle.words.view(-1))
        got, _ = ops.combine(buffer, sent.recv_x, alias)
        assert_bitwise_equal(got, want)
        copy, recv_x = handle._replace(words=handle.words.clone()), sent.recv_x
        del sent, handle, alias
        gc.collect()
        buffer.dispatch(x, topk_idx, capacity=10)
        with pytest.raises(EPConfigError, match=r"of dispatch 0.*a copy does not replace it"):
            ops.combine(buffer, recv_x, copy)
        buffer.barrier()


def test_over_nodes_a_handle_ends_with_its_tensor(ranks):
    ranks.run(on_rank_restored_from_copies)


@DEVICES
@LAYOUTS
@pytest.mark.exhaustive
def test_the_same_through_inductor(launch, backend, layout):
    launch(on_rank_gradients, backend, layout, "inductor", num_ranks=2, deadline_s=300)


def on_rank_overflow(rank, backend, layout):
    with compiler_cache(), make_buffer(backend) as buffer:
        x, topk_idx, weights = make_inputs(buffer, 40, torch.bfloat16)
        results = []
        for function in (layer, compiled(layer, "aot_eager")):
            inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
            out, num_overflow = function(buffer, inputs[0], topk_idx, inputs[1], layout, 20)
            out.float().sum().backward()
            results.append((out.detach(), num_overflow, inputs[0].grad, inputs[1].grad))
        assert results[0][1].item() > 0
        for want, got in zip(*results):
            assert want.isfinite().all()
            assert_bitwise_equal(got.cpu(), want.cpu(), name="compiled")


@DEVICES
@LAYOUTS
def test_rows_past_the_capacity_have_no_gradient(ranks, backend, layout):
    ranks.run(on_rank_overflow, backend, layout, deadline_s=300)


def on_rank_opcheck(rank, backend, layout):
    with compiler_cache(), make_buffer(backend) as buffer:
        x, topk_idx, weights = make_inputs(buffer, 9)
        for w in (None, weights.requires_grad_()):
            x = x.detach().requires_grad_()
            sent = ops.dispatch(buffer, x.detach(), topk_idx, w, capacity=50, layout=layout)
            handle, y = sent.handle, torch.randn_like(sent.recv_x).requires_grad_()
            recv_w = sent.recv_topk_weights
            recv_w = None if w is None else recv_w.detach().clone().requires_grad_()
            sizes = (handle.num_tokens, handle.num_topk, handle.recv_shape)
            routing = (handle.words, handle.call, buffer.name)
            operators = torch.ops.ep_kernels
            opcheck(
                operators.dispatch.default,
                (x, topk_idx, w, buffer.name, layout.value, 1, 50),
                test_utils=CHECKS_OF_DISPATCH,
            )
            again = (x, w, *routing, handle.recv_shape, handle.num_topk)
            opcheck(operators.dispatch_again.default, again)
            opcheck(operators.combine.default, (y, recv_w, *routing, *sizes))


@DEVICES
@LAYOUTS
def test_operators_pass_opcheck(ranks, backend, layout):
    ranks.run(on_rank_opcheck, backend, layout, deadline_s=300)


def on_rank_errors(rank, backend):
    with compiler_cache(), make_buffer(backend) as buffer:
        x, topk_idx, weights = make_inputs(buffer, 5)
        with pytest.raises(EPConfigError, match="topk_idx"):
            ops.dispatch(buffer, x, topk_idx.int(), weights, capacity=10)
        handle = ops.dispatch(buffer, x, topk_idx, weights, capacity=10).handle
        with pytest.raises(EPConfigError, match=r"words has shape \(3,\)"):
            ops.combine(buffer, x.repeat(2, 1), handle._replace(words=handle.words[:3]))
        with pytest.raises(EPConfigError, match="words has dtype torch.int32"):
            ops.combine(buffer, x.repeat(2, 1), handle._replace(words=handle.words.int()))
        with pytest.raises(EPConfigError, match=r"call has shape \(5,\)"):
            ops.combine(buffer, x.repeat(2, 1), handle._replace(call=handle.call[:5]))
        without = buffer.dispatch(x, topk_idx, weights).handle
        with pytest.raises(EPConfigError, match="without capacity"):
            without.to_tensors()
    with pytest.raises(EPConfigError, match="destroyed"):
        ops.dispatch(buffer, x, topk_idx, weights, capacity=10)


@DEVICES
def test_bad_arguments_are_refused(ranks, backend):
    ranks.run(on_rank_errors, backend)
