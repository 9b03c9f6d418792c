"""Prints how evenly experts are loaded, and how evenly they would be if they were placed anew.

python -m ep_kernels.placement STATS --num-ranks 8 [--num-nodes 2] [--num-slots 72] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ep_kernels.errors import EPConfigError
from ep_kernels.placement import linear_placement, measure, place_experts


def read_loads(path: Path) -> dict[str, list[float]]:
    """Loads of the experts of each layer.

    The file has JSON: the loads of one layer, a list of such lists, an object with one for each
    layer, or lines of objects whose "tokens_per_expert" is such an object (a metrics file of
    megatron_ep.pretrain with moe_per_layer_logging); lines add up.

    Raises:
        EPConfigError: it has something else.
    """
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise EPConfigError(f"{path} is not text: {error}") from None
    try:
        return _to_layers(json.loads(text))
    except json.JSONDecodeError:
        pass
    total: dict[str, list[float]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise EPConfigError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(record, dict) or "tokens_per_expert" not in record:
            continue
        for layer, loads in _to_layers(record).items():
            before = total.get(layer, [0.0] * len(loads))
            if len(loads) != len(before):
                raise EPConfigError(
                    f"{path}:{number}: layer {layer} has {len(loads)} loads, before {len(before)}"
                )
            total[layer] = [one + other for one, other in zip(before, loads)]
    if not total:
        raise EPConfigError(f"{path} has no line with tokens_per_expert")
    return total


def _to_layers(value: Any) -> dict[str, list[float]]:
    if isinstance(value, dict):
        value = value.get("tokens_per_expert", value)
    if isinstance(value, list) and value and not isinstance(value[0], list):
        value = [value]
    if isinstance(value, list):
        value = {str(layer): loads for layer, loads in enumerate(value, 1)}
    is_right = isinstance(value, dict) and all(
        isinstance(loads, list) and all(isinstance(load, (int, float)) for load in loads)
        for loads in value.values()
    )
    if not is_right or not value:
        raise EPConfigError("the statistics are not lists of numbers, one for each layer")
    return value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ep_kernels.placement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stats", type=Path, help="JSON, see read_loads()")
    parser.add_argument("--num-ranks", type=int, required=True)
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--num-slots", type=int, help="more than experts for replicas")
    parser.add_argument("--num-groups", type=int, help="blocks of experts that stay on one node")
    parser.add_argument("--output", type=Path, help="JSON: the expert of each slot, by layer")
    return parser.parse_args(arguments)


def report(options: argparse.Namespace) -> dict[str, list[int]]:
    """Prints the table; returns the expert of each slot, by layer."""
    placements: dict[str, list[int]] = {}
    sys.stdout.write(
        "layer  busiest rank / mean: now  placed anew   busiest node / mean: now  anew\n"
    )
    for layer, loads in read_loads(options.stats).items():
        now = linear_placement(len(loads), options.num_ranks)
        anew = place_experts(
            loads,
            num_ranks=options.num_ranks,
            num_nodes=options.num_nodes,
            num_slots=options.num_slots,
            num_groups=options.num_groups,
        )
        before = measure(now, loads, num_nodes=options.num_nodes)
        after = measure(anew, loads, num_nodes=options.num_nodes)
        sys.stdout.write(
            f"{layer:>5}  {before.ranks:24.3f} {after.ranks:12.3f}   {before.nodes:24.3f} "
            f"{after.nodes:5.3f}\n"
        )
        placements[layer] = list(anew.expert_of_slot)
    return placements


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parse(arguments)
    try:
        placements = report(options)
    except (EPConfigError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if options.output is not None:
        options.output.write_text(json.dumps({"expert_of_slot": placements}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
