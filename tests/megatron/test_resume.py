"""A training that was interrupted ends exactly as one that was not: equal in every bit."""

import pytest
import single_rank
import training_runs as runs


def train(programs, corpus, output, *flags):
    runs.check(runs.train(programs, corpus, output, *flags))
    return runs.numbers(output)


def test_a_run_that_stopped_goes_on_where_it_was(programs, corpus, tmp_path):
    whole = train(programs, corpus, tmp_path / "whole")
    half = train(programs, corpus, tmp_path / "halves", "--exit-interval", 4)
    assert list(half) == [(1, "train"), (2, "train"), (3, "train"), (4, "train"), (4, "eval")]
    assert train(programs, corpus, tmp_path / "halves") == whole


@pytest.mark.parametrize(
    ("before", "after", "shared"),
    [
        ("deepep", "deepep", ["--use-distributed-optimizer"]),
        ("alltoall", "deepep", []),
    ],
    ids=["distributed-optimizer", "from-alltoall-to-deepep"],
)
def test_a_checkpoint_from_the_middle_gives_the_same_end(
    programs, corpus, tmp_path, before, after, shared
):
    whole = train(
        programs,
        corpus,
        tmp_path / "whole",
        *("--save-interval", 4, "--no-save-at-end"),
        *("--moe-token-dispatcher-type", before, *shared),
    )
    end = train(
        programs,
        corpus,
        tmp_path / "end",
        *("--load", tmp_path / "whole", "--ckpt-step", 4, "--no-save-at-end"),
        *("--moe-token-dispatcher-type", after, *shared),
    )
    assert end == {key: line for key, line in whole.items() if key[0] > 4}
    assert len(end) == 5


@pytest.mark.parametrize(("before", "after"), [("auto", "torch"), ("torch", "auto")])
def test_one_kind_of_experts_goes_on_from_another(programs, corpus, tmp_path, before, after):
    """Norms of gradients are sums over other tensors, in another order."""
    flags = ["--no-save-at-end", "--clip-grad", 0]
    whole = train(
        programs,
        corpus,
        tmp_path / "whole",
        *("--save-interval", 4, "--moe-experts", before, *flags),
    )
    end = train(
        programs,
        corpus,
        tmp_path / "end",
        *("--load", tmp_path / "whole", "--ckpt-step", 4, "--moe-experts", after, *flags),
    )
    assert len(end) == 5
    for key, line in end.items():
        want = whole[key]
        norms = [one.pop("grad_norm", None) for one in (line, want)]
        assert line == want
        assert norms == [None, None] or norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_a_run_that_began_elsewhere_goes_on_from_its_own_checkpoints(on_one_rank, corpus, tmp_path):
    begin = ["--load", tmp_path / "saved", "--eval-interval", "none", "--train-iters", 4]
    starts = {
        "finetune": [*begin, "--finetune", "--exit-interval", 2],
        "step": [*begin, "--ckpt-step", 2, "--no-load-optim", "--exit-interval", 3],
    }
    cases = [["--save", tmp_path / "saved", "--save-interval", 2, "--train-iters", 4]]
    for name, flags in starts.items():
        cases += [[*flags, "--save", tmp_path / name]] * 2
        cases += [[*flags, "--save", tmp_path / f"whole {name}", "--exit-interval", "none"]]
    results = on_one_rank(single_rank.try_to_train, corpus, tmp_path, cases)
    assert [status for status, _ in results] == [0] * len(cases), results
    for name, (_, printed) in zip(starts, results[2::3]):
        assert f"{tmp_path / name} has checkpoints of this run" in printed
        assert runs.numbers(tmp_path / name) == runs.numbers(tmp_path / f"whole {name}")


def test_a_run_goes_on_with_another_number_of_ranks(train_on_ranks, on_one_rank, corpus, tmp_path):
    flags = ["--global-batch-size", 8, "--hidden-dropout", 0]
    ((status, printed),) = train_on_ranks(4, {"four": [*flags, "--save-interval", 4]}).values()
    assert status == 0, printed
    begin = [*flags, "--load", tmp_path / "four", "--ckpt-step", 4, "--no-save-at-end"]
    ((status, printed),) = train_on_ranks(2, {"two": begin}).values()
    assert status == 0, printed
    assert "iter_0000004 has random states of 4 ranks, not 2" in printed
    assert runs.losses(tmp_path / "two") == pytest.approx(runs.losses(tmp_path / "four")[4:])
    results = on_one_rank(single_rank.try_to_train, corpus, tmp_path, [begin])
    ((status, printed),) = results
    assert status == 2, printed
    assert "as with another expert_model_parallel_size: checkpoint.no_load_optim" in printed


LONGER = ["--train-iters", 12]
FASTER = ["--lr", 4e-3]
OVERRIDE = ["--override-opt-param-scheduler"]


def test_another_schedule_is_refused_unless_it_is_to_override_the_old_one(
    on_one_rank, corpus, tmp_path
):
    saved = ["--save", tmp_path / "saved"]
    again = ["--load", tmp_path / "saved", "--no-save-at-end"]
    cases = [
        ([*saved, "--lr-warmup-iters", 1], None),
        ([*again, *LONGER], "training.train_iters = 12, in the checkpoint 8\n"),
        ([*again, *FASTER], "optimizer.lr = 0.004, in the checkpoint 0.003\n"),
        ([*again, "--lr-decay-style", "linear"], "style = linear, in the checkpoint cosine\n"),
        ([*again, *FASTER, *LONGER, *OVERRIDE], None),
        ([*FASTER, *LONGER, "--no-save-at-end"], None),
    ]
    flags = [flags for flags, _ in cases]
    results = on_one_rank(single_rank.try_to_train, corpus, tmp_path, flags)
    for (status, output), (_, message) in zip(results, cases):
        assert status == (0 if message is None else 2), output
        if message is not None:
            assert message in output
            assert "lr_schedule.override_opt_param_scheduler" in output
    resumed, whole = (
        [line["lr"] for line in runs.records(tmp_path / name, "train")] for name in ("4", "5")
    )
    assert resumed == whole[8:]


OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]


def test_weights_that_are_gathered_in_the_forward_pass_are_saved_up_to_date(
    train_on_ranks, tmp_path
):
    start = ["--use-distributed-optimizer", "--eval-interval", "none", "--train-iters", 3]
    start += ["--save-interval", 2]
    cases = {"plain": start, "overlap": start + OVERLAP}
    for name in ("plain", "overlap"):
        again = ["--load", tmp_path / name, "--finetune", "--no-save-at-end", "--train-iters", 2]
        cases[f"from {name}"] = [*start, *again]
    for status, printed in train_on_ranks(2, cases).values():
        assert status == 0, printed
    assert runs.losses(tmp_path / "overlap") == runs.losses(tmp_path / "plain")
    assert runs.losses(tmp_path / "from overlap") == runs.losses(tmp_path / "from plain")


VARIANTS = {
    "sgd": ["--optimizer", "sgd"],
    "sgd-without-momentum": ["--optimizer", "sgd", "--sgd-momentum", "0"],
    "bf16": ["--bf16", "--use-distributed-optimizer"],
    "reshardable": ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"],
    "torch": ["--moe-experts", "torch", "--use-distributed-optimizer"],
    "torch-reshardable": [
        *("--moe-experts", "torch", "--use-distributed-optimizer"),
        "--dist-ckpt-optim-fully-reshardable",
    ],
    "expert-bias": ["--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid"],
    "accumulation": ["--global-batch-size", "6", "--log-interval", "2"],
}


def test_every_optimizer_and_router_resumes_exactly(on_one_rank, corpus, tmp_path):
    wrong = on_one_rank(single_rank.compare_resumed, corpus, tmp_path, VARIANTS)
    assert wrong == {}
