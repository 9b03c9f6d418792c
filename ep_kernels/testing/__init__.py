"""What tests, benchmarks and examples of expert-parallel code share.

routing     generators of topk_idx and topk_weights
assertions  comparisons of tensors and results, byte by byte
launch      rank processes on one machine, with deadlines and leak checks
"""

from ep_kernels.testing.assertions import assert_bitwise_equal
from ep_kernels.testing.launch import LaunchResult, RankError, RankPool, Ranks, RankServer, launch
from ep_kernels.testing.leaks import LeakCheck
from ep_kernels.testing.routing import ROUTING_KINDS, make_routing

__all__ = [
    "ROUTING_KINDS",
    "LaunchResult",
    "LeakCheck",
    "RankError",
    "RankPool",
    "RankServer",
    "Ranks",
    "assert_bitwise_equal",
    "launch",
    "make_routing",
]
