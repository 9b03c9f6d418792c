"""Times one MoE layer of Megatron-Core, forward and backward, under several dispatchers.

    torchrun --standalone --nproc-per-node 2 -m megatron_ep.bench

All layers run in turn, again and again; a time is that of the slowest rank, on GPUs by events on
the stream that calls the layer. `deepep/2` cuts the tokens into 2 chunks (see overlap.py). Every
layer is first compared with the first one. Ranks may share a GPU, under MPS (scripts/with_mps.sh);
the other dispatchers' collectives are gloo's then, through the host's memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_kernels.bench.timing import Stats, summarise, time_op
from megatron_ep.trace import Span, hidden_fraction, start_tracing, stop_tracing, write_trace

PASSES = ("forward", "forward + backward")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def make_layer(options: argparse.Namespace, dispatcher: str, num_chunks: int | str) -> Any:
    """A MoE layer. Its weights depend on the seed, and without --te on nothing else."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    import megatron_ep

    megatron_ep.configure(num_chunks=num_chunks)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=1,
        num_moe_experts=options.experts,
        moe_router_topk=options.topk,
        moe_ffn_hidden_size=options.ffn_hidden,
        moe_token_dispatcher_type=dispatcher,
        moe_router_load_balancing_type="none",
        expert_model_parallel_size=dist.get_world_size(),
        add_bias_linear=False,
        gated_linear_unit=True,
        bias_activation_fusion=False,
        moe_grouped_gemm=options.te,
        params_dtype=DTYPES[options.dtype],
    )
    model_parallel_cuda_manual_seed(options.seed, force_reset_rng=True)
    spec = get_moe_module_spec(
        use_te=options.te, num_experts=options.experts, moe_grouped_gemm=options.te
    )
    layer = build_module(spec, config=config)
    layer.set_layer_number(1)
    return layer.to(DTYPES[options.dtype]).train()


def make_passes(
    layer: Any, hidden: torch.Tensor, grad: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""

    def forward() -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = layer(hidden)[0]
        return output

    def both() -> torch.Tensor:
        layer.zero_grad()
        x = hidden.detach().requires_grad_()
        layer(x)[0].backward(grad)
        assert x.grad is not None
        return x.grad

    return dict(zip(PASSES, (forward, both), strict=True))


def check_agreement(passes: dict[str, dict[str, Callable[[], Any]]]) -> None:
    """Raises AssertionError unless all layers compute the same, up to rounding."""
    first, *others = passes
    for name in PASSES:
        want = passes[first][name]().double()
        for other in others:
            got = passes[other][name]().double()
            error = (got - want).norm() / want.norm()
            assert error < 0.02, f"{name}: {other} differs from {first} by {error:.3g}"


def make_all_passes(
    options: argparse.Namespace, variants: Sequence[str], device: torch.device
) -> dict[str, dict[str, Callable[[], Any]]]:
    """make_passes() of every variant, on the same input."""
    generator = torch.Generator().manual_seed(options.seed + dist.get_rank())
    hidden, grad = (
        torch.randn(options.tokens, 1, options.hidden, generator=generator).to(
            device, DTYPES[options.dtype]
        )
        for _ in range(2)
    )
    layers = [make_layer(options, *_parse_variant(variant)) for variant in variants]
    with torch.no_grad():  # a grouped GEMM of Transformer Engine draws its weights from elsewhere
        for layer in layers[1:]:
            for parameter, same in zip(layer.parameters(), layers[0].parameters(), strict=True):
                parameter.copy_(same)
    return {variant: make_passes(layer, hidden, grad) for variant, layer in zip(variants, layers)}


def time_pass(op: Callable[[], Any], device: torch.device) -> float:
    """Seconds from a common start of all ranks until the work of `op` is done on this rank."""
    if device.type == "cpu":
        return time_op(op)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def between_events() -> None:
        begin.record()
        op()
        end.record()

    torch.cuda.synchronize()
    time_op(between_events)
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def measure(
    options: argparse.Namespace, variants: Sequence[str], device: torch.device
) -> dict[str, dict[str, Stats]]:
    """Stats of every pass of every variant."""
    passes = make_all_passes(options, variants, device)
    check_agreement(passes)
    durations: dict[tuple[str, str], list[float]] = {}
    for iteration in range(-options.warmup, options.iterations):
        for variant in variants:
            for name in PASSES:
                seconds = time_pass(passes[variant][name], device)
                if iteration >= 0:
                    durations.setdefault((variant, name), []).append(seconds)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, durations)
    return {
        variant: {name: summarise([each[variant, name] for each in gathered]) for name in PASSES}
        for variant in variants
    }


def trace_variant(
    options: argparse.Namespace, variant: str, device: torch.device
) -> list[list[Span]]:
    """Spans of each rank in one forward and backward, in which nothing is timed."""
    import megatron_ep

    megatron_ep.reset_buffers()
    tracer = start_tracing()
    try:
        both = make_all_passes(options, [variant], device)[variant][PASSES[-1]]
        for _ in range(max(1, options.warmup)):
            both()
        with tracer.recording():
            both()
        spans_of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(spans_of_ranks, tracer.spans())
    finally:
        stop_tracing()
        megatron_ep.reset_buffers()
    return spans_of_ranks


def trace(options: argparse.Namespace, variants: Sequence[str], device: torch.device) -> None:
    """Writes a timeline of every variant of deepep, and prints how much of it is hidden."""
    for variant in variants:
        if _parse_variant(variant)[0] != "deepep":
            continue
        spans_of_ranks = trace_variant(options, variant, device)
        if dist.get_rank() == 0:
            name = variant.replace("/", "-")
            path = options.trace.with_name(f"{options.trace.stem}-{name}{options.trace.suffix}")
            write_trace(path, spans_of_ranks)
            hidden = [round(hidden_fraction(spans) or 0.0, 3) for spans in spans_of_ranks]
            line = {"dispatcher": variant, "hidden_of_communication": hidden, "trace": str(path)}
            sys.stdout.write(json.dumps(line) + "\n")


def _parse_variant(text: str) -> tuple[str, int | str]:
    """Example: "deepep/2" -> ("deepep", 2), "alltoall" -> ("alltoall", 1)."""
    dispatcher, _, chunks = text.partition("/")
    return dispatcher, int(chunks) if chunks.isdecimal() else chunks or 1


def report(results: dict[str, dict[str, Stats]]) -> None:
    """A table on standard output; ratios are to the first variant."""
    first = next(iter(results))
    sys.stdout.write(f"{'pass':20}{'dispatcher':14}{'median ms':>10}{'p95 ms':>10}{'speed':>8}\n")
    for name in PASSES:
        for variant, stats in results.items():
            median, p95 = stats[name].median, stats[name].p95
            ratio = results[first][name].median / median
            times = f"{median * 1e3:10.2f}{p95 * 1e3:10.2f}{ratio:7.2f}x"
            sys.stdout.write(f"{name:20}{variant:14}{times}\n")
    for variant, stats in results.items():
        line = {name: vars(stats[name]) for name in PASSES}
        sys.stdout.write(json.dumps({"dispatcher": variant, **line}) + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ep.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=2048, help="per rank (2048)")
    parser.add_argument("--hidden", type=int, default=1024, help="(1024)")
    parser.add_argument("--ffn-hidden", type=int, default=128, help="of an expert (128)")
    parser.add_argument("--topk", type=int, default=8, help="(8)")
    parser.add_argument("--experts", type=int, default=64, help="in total (64)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(bf16)")
    parser.add_argument("--te", action="store_true", help="Transformer Engine's grouped GEMM")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="(cuda if there is one)"
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="afterwards also write a timeline of each deepep, FILE with its name in it",
    )
    parser.add_argument("--iterations", type=int, default=10, help="(10)")
    parser.add_argument("--warmup", type=int, default=2, help="(2)")
    parser.add_argument("--seed", type=int, default=1234, help="(1234)")
    parser.add_argument(
        "--dispatchers",
        nargs="+",
        metavar="TYPE[/CHUNKS]",
        default=["alltoall", "deepep", "deepep/2", "deepep/4"],
        help="the first one is what the others are compared with",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Runs the command line on one rank; returns the exit status."""
    options = parse(arguments)
    import megatron_ep
    from megatron_ep.devices import choose_device, start_process_group

    try:
        device = choose_device(options.device)
    except ValueError as error:
        sys.stderr.write(f"error: --device {error}\n")
        return 2
    from megatron.core import parallel_state

    start_process_group(device)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=dist.get_world_size(), create_gloo_process_groups=False
    )
    megatron_ep.register()
    try:
        results = measure(options, options.dispatchers, device)
        if dist.get_rank() == 0:
            report(results)
        if options.trace is not None:
            trace(options, options.dispatchers, device)
    finally:
        megatron_ep.reset_buffers()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
