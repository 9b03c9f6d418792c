"""ep_kernels.placement: properties of every placement, and that tokens follow it."""

import json
import random
from collections import Counter

import cases
import pytest
import torch

from ep_kernels import EPConfigError
from ep_kernels.placement import __main__ as command
from ep_kernels.placement import linear_placement, measure, place_experts
from ep_kernels.placement.packing import pack_balanced, replicate

SHAPES = [  # experts, ranks, nodes, slots, groups
    (8, 2, 1, 8, None),
    (8, 4, 2, 8, 4),
    (16, 8, 2, 24, 4),
    (64, 8, 1, 64, None),
    (64, 16, 4, 80, 8),
    (256, 32, 4, 288, 8),
    (6, 6, 1, 12, None),
    (4, 4, 1, 16, None),
    (5, 1, 1, 5, None),
]

KINDS = ("uniform", "zipf", "one", "none", "few", "equal")

over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
over_kinds = pytest.mark.parametrize("kind", KINDS)


def make_loads(kind, num_experts, seed=0):
    rng = random.Random(f"{kind} {seed}")
    if kind == "uniform":
        return [rng.random() * 1000 for _ in range(num_experts)]
    if kind == "zipf":
        loads = [1e5 / (1 + rank) for rank in range(num_experts)]
        rng.shuffle(loads)
        return loads
    if kind == "few":
        return [float(rng.choice([0, 0, 0, 100])) for _ in range(num_experts)]
    return [{"one": float(e == 1), "none": 0.0, "equal": 3.0}[kind] for e in range(num_experts)]


def place(shape, loads):
    _, num_ranks, num_nodes, num_slots, num_groups = shape
    return place_experts(
        loads,
        num_ranks=num_ranks,
        num_nodes=num_nodes,
        num_slots=num_slots,
        num_groups=num_groups,
    )


@over_shapes
@over_kinds
def test_every_expert_has_a_slot_and_every_rank_equally_many(shape, kind):
    num_experts, num_ranks, _, num_slots, _ = shape
    placement = place(shape, make_loads(kind, num_experts))
    assert len(placement.expert_of_slot) == num_slots
    assert set(placement.expert_of_slot) == set(range(num_experts))
    assert placement.slots_per_rank * num_ranks == num_slots
    size = placement.slots_per_rank
    for rank in range(num_ranks):
        mine = placement.expert_of_slot[rank * size : (rank + 1) * size]
        assert list(mine) == sorted(mine)


@over_shapes
@over_kinds
def test_groups_and_replicas_stay_on_one_node(shape, kind):
    num_experts, _, num_nodes, num_slots, num_groups = shape
    placement = place(shape, make_loads(kind, num_experts))
    group_size = num_experts // (num_groups or num_experts)
    nodes_of_group = {}
    for slot, expert in enumerate(placement.expert_of_slot):
        node = slot // (num_slots // num_nodes)
        nodes_of_group.setdefault(expert // group_size, set()).add(node)
    assert all(len(nodes) == 1 for nodes in nodes_of_group.values())


@over_shapes
@over_kinds
def test_a_placement_is_never_worse_than_blocks_and_never_better_than_possible(shape, kind):
    num_experts, num_ranks, num_nodes, num_slots, _ = shape
    for seed in range(5):
        loads = make_loads(kind, num_experts, seed)
        placement = place(shape, loads)
        after = measure(placement, loads, num_nodes=num_nodes)
        assert min(after.ranks, after.nodes, after.slots) >= 1 - 1e-9
        if num_slots == num_experts:
            before = measure(linear_placement(num_experts, num_ranks), loads)
            assert after.ranks <= before.ranks + 1e-9
        if sum(loads):
            largest = max(load / len(placement.slots_of_expert[e]) for e, load in enumerate(loads))
            assert after.ranks >= largest * num_ranks / sum(loads) - 1e-9


def test_replicas_of_an_expert_keep_apart():
    for shape in SHAPES:
        placement = place(shape, make_loads("zipf", shape[0]))
        size = placement.slots_per_rank
        for rank in range(placement.num_ranks):
            counts = Counter(placement.expert_of_slot[rank * size : (rank + 1) * size])
            assert max(counts.values()) == 1, shape


def test_a_skewed_load_is_balanced():
    """256 experts, zipf-distributed; a ninth of the slots for replicas evens the ranks out."""
    loads = make_loads("zipf", 256)
    before = measure(linear_placement(256, 32), loads).ranks
    moved = measure(place_experts(loads, num_ranks=32), loads).ranks
    copied = measure(place_experts(loads, num_ranks=32, num_slots=288), loads).ranks
    assert before > moved > copied
    assert copied < 1.02


def test_the_same_loads_give_the_same_placement():
    loads = make_loads("few", 64)
    assert place(SHAPES[4], loads) == place(SHAPES[4], list(loads))


def test_packing_finds_the_best_of_small_cases():
    assert pack_balanced([9, 1, 5, 5], 2, labels=range(4)) == [[0, 1], [2, 3]]
    packs = pack_balanced([8, 7, 6, 5, 4, 4], 2, labels=range(6))
    assert sorted(sum([8, 7, 6, 5, 4, 4][i] for i in pack) for pack in packs) == [17, 17]
    assert replicate([8.0, 2.0, 2.0], 5, max_replicas=4) == [3, 1, 1]
    assert replicate([8.0, 2.0, 2.0], 5, max_replicas=2) == [2, 2, 1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(num_ranks=3), "num_ranks=3"),
        (dict(num_ranks=4, num_nodes=3), "num_nodes=3"),
        (dict(num_ranks=4, num_slots=4), "num_slots=4"),
        (dict(num_ranks=4, num_slots=36), "num_slots=36"),
        (dict(num_ranks=4, num_nodes=2, num_slots=20), "num_slots=20"),
        (dict(num_ranks=4, num_groups=3), "num_groups=3"),
        (dict(num_ranks=4, num_nodes=4, num_groups=2), "num_nodes=4"),
        (dict(num_ranks=0), "num_ranks=0"),
    ],
    ids=str,
)
def test_impossible_sizes_are_named(options, named):
    with pytest.raises(EPConfigError, match=named):
        place_experts([1.0] * 8, **options)


@pytest.mark.parametrize("load", [-1.0, float("nan"), float("inf")])
def test_impossible_loads_are_named(load):
    with pytest.raises(EPConfigError, match=r"loads\[1\]"):
        place_experts([1.0, load], num_ranks=2)


def test_choices_take_turns_among_replicas():
    placement = place_experts([6.0, 1.0, 1.0], num_ranks=2, num_slots=4)
    slots = placement.slots_of_expert[0]
    assert len(slots) == 2
    topk_idx = torch.tensor([[0, 1], [0, -1], [2, 0], [-1, -1]])
    chosen = placement.to_slots(topk_idx)
    assert chosen[:3, 0][:2].tolist() == slots
    assert chosen[2, 1] == slots[0]
    assert (chosen[topk_idx < 0] == -1).all()
    experts = torch.tensor(placement.expert_of_slot)
    assert torch.equal(experts[chosen.clamp(min=0)][topk_idx >= 0], topk_idx[topk_idx >= 0])
    with pytest.raises(EPConfigError, match="num_slots=4"):
        _ = placement.expert_to_rank


def dispatch_by_placement(rank):
    """The rows that ranks receive are those that measure() predicts."""
    loads = [40.0, 30.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    topk_idx = torch.multinomial(torch.tensor(loads), 2000, replacement=True)[:, None]
    x = topk_idx.float().expand(-1, 8).contiguous()
    counted = torch.bincount(topk_idx.flatten(), minlength=8).double().tolist()
    rows = []
    for placement in (linear_placement(8, 2), place_experts(counted, num_ranks=2, num_slots=10)):
        with cases.make_buffer("cpu", num_experts=placement.num_slots) as buffer:
            result = buffer.dispatch(x, placement.to_slots(topk_idx))
            slot = result.recv_topk_idx.flatten() + rank * placement.slots_per_rank
            experts = torch.tensor(placement.expert_of_slot)[slot]
            assert torch.equal(result.recv_x[:, 0], experts.float())
            out = buffer.combine(result.recv_x, result.handle).x
            assert torch.equal(out, x)
            rows.append(len(result.recv_x))
    return rows


def test_tokens_follow_a_placement_with_replicas(ranks):
    linear, placed = zip(*ranks.run(dispatch_by_placement))
    assert max(linear) / min(linear) > 5
    assert max(placed) / min(placed) < 1.1


def test_the_command_reads_statistics_and_writes_placements(tmp_path, capsys):
    stats, output = tmp_path / "stats.json", tmp_path / "placement.json"
    lines = [{"kind": "train", "tokens_per_expert": {"1": [60, 60, 1, 1]}}, {"kind": "eval"}]
    for text in (
        "[60, 60, 1, 1]",
        "[[60, 60, 1, 1]]",
        json.dumps({"1": [60, 60, 1, 1]}),
        "\n".join(map(json.dumps, lines)),
    ):
        stats.write_text(text)
        assert command.main([str(stats), "--num-ranks", "2", "--output", str(output)]) == 0
        assert json.loads(output.read_text()) == {"expert_of_slot": {"1": [0, 2, 1, 3]}}
        assert "1.967" in capsys.readouterr().out


UNLIKE_LINES = '{"tokens_per_expert": {"1": [1, 2]}}\n{"tokens_per_expert": {"1": [1, 2, 3, 4]}}'


@pytest.mark.parametrize(
    "text", ["{}", "[]", '["a"]', "nonsense", '{"kind": 1}\n{"kind": 2}', UNLIKE_LINES, "\xff"]
)
def test_the_command_names_what_it_cannot_read(tmp_path, capsys, text):
    stats = tmp_path / "stats.json"
    stats.write_bytes(text.encode("latin-1"))
    assert command.main([str(stats), "--num-ranks", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_training_reports_the_imbalance_of_ranks_now_and_placed_anew():
    from megatron_ep.expert_load import ExpertLoad, rank_imbalance

    loads = [ExpertLoad(layer=n, tokens_per_expert=t) for n, t in ((1, [9, 9, 1, 1]), (2, [5] * 4))]
    assert rank_imbalance(loads, num_ranks=2) == {
        "rank_load_max_over_mean_now": 1.8,
        "rank_load_max_over_mean_placed_anew": 1.0,
    }
    assert rank_imbalance([], num_ranks=2) == {}
