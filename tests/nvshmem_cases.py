"""Exchanges over NVSHMEM lanes, and what must come of them.

Every rank can compute the inputs of all ranks, so expected results need no other exchange.
"""

import os
from dataclasses import dataclass, replace

import torch

from ep_kernels.bootstrap import make_bootstrap
from ep_kernels.nvshmem import NvshmemLane, NvshmemOptions
from ep_kernels.testing import assert_bitwise_equal
from ep_kernels.topology import Topology

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """Exchanges on one lane.

    Attributes:
        num_nodes: each of one rank.
        pattern: who sends how much to whom, see counts_of().
        most: tokens from one rank to another.
        num_tokens: rows that each rank has to choose from.
        row_bytes: of each section.
        num_exchanges: one after another.
    """

    num_nodes: int = 4
    pattern: str = "uneven"
    most: int = 40
    num_tokens: int = 64
    row_bytes: tuple[int, ...] = (512, 16, 12, 6)
    num_exchanges: int = 3
    staging_bytes: int = 2 * MIB
    num_blocks: int = 2
    num_slots: int = 3
    is_direct: bool = False

    def __str__(self):
        changed = [
            f"{name}={value}" for name, value in vars(self).items() if value != DEFAULT[name]
        ]
        return ",".join(changed).replace(" ", "") or "default"

    @property
    def options(self):
        return NvshmemOptions(
            staging_bytes=self.staging_bytes,
            num_blocks=self.num_blocks,
            num_slots=self.num_slots,
            is_direct=self.is_direct,
        )


DEFAULT = {field.name: field.default for field in Case.__dataclass_fields__.values()}


def counts_of(case, step):
    """[from][to] tokens."""
    nodes = range(case.num_nodes)
    random = torch.Generator().manual_seed(1000 + step)
    patterns = {
        "none": lambda src, dst: 0,
        "one": lambda src, dst: 1,
        "even": lambda src, dst: case.most,
        "ring": lambda src, dst: case.most if dst == (src + 1 + step) % case.num_nodes else 0,
        "to_last": lambda src, dst: case.most if dst == case.num_nodes - 1 else 0,
        "uneven": lambda src, dst: int(torch.randint(case.most + 1, (), generator=random)),
    }
    count = patterns[case.pattern]
    return [[count(src, dst) if src != dst else 0 for dst in nodes] for src in nodes]


def inputs_of(case, step, node, num_sent):
    """Sections [num_tokens, bytes] and the tokens to send, of one rank."""
    random = torch.Generator().manual_seed(step * 100 + node)
    sections = [
        torch.randint(256, (case.num_tokens, size), generator=random, dtype=torch.uint8)
        for size in case.row_bytes
    ]
    tokens = torch.randint(case.num_tokens, (sum(num_sent),), generator=random, dtype=torch.int32)
    return sections, tokens


def expected_of(case, step, node, counts):
    """What `node` receives: sections [rows, bytes]."""
    parts = [[] for _ in case.row_bytes]
    for src in range(case.num_nodes):
        sections, tokens = inputs_of(case, step, src, counts[src])
        begin = sum(counts[src][:node])
        chosen = tokens[begin : begin + counts[src][node]].long()
        for part, section in zip(parts, sections, strict=True):
            part.append(section[chosen])
    return [torch.cat(part) for part in parts]


def share_gpu(num_ranks):
    """Before CUDA begins: ranks that share a GPU may have equal parts of it. Ranks past the number
    of GPUs share those."""
    os.environ.setdefault("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(100 // num_ranks))


def make_lane(rank, case, *, num_local_ranks=1, timeout_s=20.0):
    num_ranks = case.num_nodes * num_local_ranks
    share_gpu(num_ranks)
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return NvshmemLane(
        make_bootstrap(None),
        Topology(rank=rank, num_ranks=num_ranks, num_local_ranks=num_local_ranks),
        device=torch.device("cuda", torch.cuda.current_device()),
        timeout_s=timeout_s,
        options=case.options,
    )


def start_exchange(lane, case, step):
    """Enqueues exchange `step`; returns destinations [rows, bytes] on the GPU."""
    node, counts = lane.topology.node, counts_of(case, step)
    sections, tokens = inputs_of(case, step, node, counts[node])
    num_received = [counts[src][node] for src in range(case.num_nodes)]
    sources = [section.to(lane.device) for section in sections]
    shape = (sum(num_received),)
    destinations = [
        torch.full((*shape, size), 0xEE, dtype=torch.uint8, device=lane.device)
        for size in case.row_bytes
    ]
    lane.exchange(
        list(zip(sources, destinations, strict=True)),
        counts[node],
        num_received,
        tokens=tokens.to(lane.device),
    )
    return destinations


def check_received(lane, case, step, received):
    node = lane.topology.node
    expected = expected_of(case, step, node, counts_of(case, step))
    for place, (got, want) in enumerate(zip(received, expected, strict=True)):
        assert_bitwise_equal(got.cpu(), want, name=f"{case}: exchange {step}, section {place}")


def check_exchanges(lane, case):
    """All exchanges of a case, enqueued one behind the other."""
    received = [start_exchange(lane, case, step) for step in range(case.num_exchanges)]
    lane.wait()
    for step, sections in enumerate(received):
        check_received(lane, case, step, sections)


PATTERNS = [Case(pattern=pattern) for pattern in ("none", "one", "even", "ring", "to_last")]

SIZES = [
    Case(),
    Case(row_bytes=(16,), most=500, num_tokens=300),
    Case(row_bytes=(5760, 16), most=70),
    Case(row_bytes=(14336, 224, 32, 32), most=50, staging_bytes=8 * MIB),
    Case(row_bytes=(1, 2, 3), most=100),
    Case(row_bytes=(4, 7168), most=33, num_blocks=1),
]

RINGS = [
    Case(num_blocks=1, num_slots=1, staging_bytes=256 << 10, most=400, num_exchanges=4),
    Case(num_blocks=4, num_slots=2, staging_bytes=512 << 10, most=300, num_exchanges=4),
    Case(num_blocks=8, num_slots=4, most=1000),
    Case(num_blocks=3, num_slots=5, most=777, num_exchanges=10),
]

CASES = [*PATTERNS, *SIZES, *RINGS]
CASES += [replace(case, is_direct=True) for case in (Case(), SIZES[3], RINGS[0], RINGS[1])]
