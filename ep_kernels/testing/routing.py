"""Routing generators for tests, benchmarks and examples.

Every generator returns `(topk_idx, topk_weights)`:
    topk_idx      [T, K] int64, distinct global expert ids in a row, -1 = no expert
    topk_weights  [T, K] float32, positive and summing to 1 over the experts of a row, 0 where -1

T num_tokens, K num_topk, E num_experts. The same arguments and seed give the same routing on every
machine, so that a rank can reproduce the routing of its peers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Routing = tuple[torch.Tensor, torch.Tensor]


def uniform(num_tokens: int, num_topk: int, num_experts: int, *, seed: int) -> Routing:
    """Every expert is equally likely, independently for every token.

    Example:
        >>> topk_idx, topk_weights = uniform(3, 2, 4, seed=0)
        >>> topk_idx.shape, topk_weights.dtype
        (torch.Size([3, 2]), torch.float32)
    """
    generator = _generator(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    return _choose(scores, num_topk, generator)


def zipf(
    num_tokens: int, num_topk: int, num_experts: int, *, exponent: float = 1.0, seed: int
) -> Routing:
    """Expert e is drawn with a weight of 1 / (e + 1) ** exponent: expert 0 is the hottest.

    A row's experts are drawn without replacement (Gumbel top-k), so they are distinct.
    """
    generator = _generator(seed)
    log_popularity = -exponent * torch.arange(1, num_experts + 1).log()
    uniform_noise = torch.rand(num_tokens, num_experts, generator=generator)
    gumbel_noise = -(-uniform_noise.clamp(min=1e-12).log()).log()
    return _choose(log_popularity + gumbel_noise, num_topk, generator)


def group_limited(
    num_tokens: int,
    num_topk: int,
    num_experts: int,
    *,
    num_groups: int,
    topk_group: int,
    seed: int,
) -> Routing:
    """Node-limited routing as in DeepSeek-V3: a token's experts come from `topk_group` groups.

    Experts are split into `num_groups` equal blocks. A group's score is the sum of its two best
    expert scores; the `topk_group` best groups stay, and the top-k experts among them are chosen.

    Raises:
        ValueError: the groups are not equal, or the chosen groups have fewer than K experts.
    """
    if num_experts % num_groups:
        raise ValueError(f"num_experts={num_experts} is not divisible by num_groups={num_groups}")
    group_size = num_experts // num_groups
    if num_topk > topk_group * group_size:
        raise ValueError(
            f"num_topk={num_topk} exceeds topk_group={topk_group} groups of {group_size} experts"
        )
    generator = _generator(seed)
    scores = torch.rand(num_tokens, num_groups, group_size, generator=generator)
    group_scores = scores.topk(min(2, group_size), dim=-1).values.sum(-1)
    chosen_groups = group_scores.topk(topk_group, dim=-1).indices
    is_chosen = torch.zeros(num_tokens, num_groups, dtype=torch.bool)
    is_chosen.scatter_(1, chosen_groups, True)
    scores = scores.masked_fill(~is_chosen[:, :, None], -1.0)
    return _choose(scores.reshape(num_tokens, num_experts), num_topk, generator)


def masked(
    num_tokens: int, num_topk: int, num_experts: int, *, probability: float, seed: int
) -> Routing:
    """`uniform`, with each choice replaced by -1 with the given probability.

    A row may keep all, some or none of its choices, and -1 may stand anywhere in it.
    """
    topk_idx, topk_weights = uniform(num_tokens, num_topk, num_experts, seed=seed)
    # NOTE: another stream than uniform's, or the mask would follow the scores.
    generator = _generator(seed + 1_000_003)
    is_masked = torch.rand(topk_idx.shape, generator=generator) < probability
    topk_idx = topk_idx.masked_fill(is_masked, -1)
    return topk_idx, _normalised(topk_weights.masked_fill(is_masked, 0.0))


def empty(num_tokens: int, num_topk: int, num_experts: int, *, seed: int = 0) -> Routing:
    """No token chooses anything: all entries are -1, all weights 0. `num_tokens` may be 0."""
    del num_experts, seed  # Taken so that all generators can be called alike.
    topk_idx = torch.full((num_tokens, num_topk), -1, dtype=torch.int64)
    return topk_idx, torch.zeros(num_tokens, num_topk)


def one_expert(
    num_tokens: int, num_topk: int, num_experts: int, *, expert: int = 0, seed: int
) -> Routing:
    """Every token chooses `expert` and nothing else, at a random position of its row."""
    if not 0 <= expert < num_experts:
        raise ValueError(f"expert={expert} is outside [0, num_experts={num_experts})")
    topk_idx, topk_weights = empty(num_tokens, num_topk, num_experts)
    position = torch.randint(num_topk, (num_tokens, 1), generator=_generator(seed))
    return topk_idx.scatter_(1, position, expert), topk_weights.scatter_(1, position, 1.0)


def make_routing(
    kind: str, num_tokens: int, num_topk: int, num_experts: int, *, seed: int
) -> Routing:
    """The generator called `kind` with its usual options; `ROUTING_KINDS` lists the names."""
    return ROUTING_KINDS[kind](num_tokens, num_topk, num_experts, seed=seed)


def _half_masked(num_tokens: int, num_topk: int, num_experts: int, *, seed: int) -> Routing:
    return masked(num_tokens, num_topk, num_experts, probability=0.5, seed=seed)


def _two_groups(num_tokens: int, num_topk: int, num_experts: int, *, seed: int) -> Routing:
    """Group-limited with the smallest groups, of 2 experts or more, two of which hold K experts."""
    num_groups = max(
        (n for n in range(1, num_experts + 1) if _fits_two_groups(n, num_topk, num_experts)),
        default=1,
    )
    return group_limited(
        num_tokens,
        num_topk,
        num_experts,
        num_groups=num_groups,
        topk_group=min(2, num_groups),
        seed=seed,
    )


def _fits_two_groups(num_groups: int, num_topk: int, num_experts: int) -> bool:
    group_size, remainder = divmod(num_experts, num_groups)
    return not remainder and group_size >= 2 and num_topk <= min(2, num_groups) * group_size


ROUTING_KINDS: dict[str, Callable[..., Routing]] = {
    "uniform": uniform,
    "zipf": zipf,
    "group_limited": _two_groups,
    "masked": _half_masked,
    "empty": empty,
    "one_expert": one_expert,
}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _choose(scores: torch.Tensor, num_topk: int, generator: torch.Generator) -> Routing:
    """Top-k of scores [T, E], with fresh weights."""
    if num_topk > scores.shape[1]:
        raise ValueError(f"num_topk={num_topk} exceeds num_experts={scores.shape[1]}")
    topk_idx = scores.topk(num_topk, dim=1).indices
    # NOTE: 1 - rand lies in (0, 1]: a weight of 0 would look like "not chosen" in a test.
    weights = 1.0 - torch.rand(topk_idx.shape, generator=generator)
    return topk_idx, _normalised(weights)


def _normalised(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
