"""Training on two ranks: the loss falls, and what happens is reported and saved."""

import math
import os
import signal
import time

import pytest
import training_runs as runs
from programs import TIMEOUT_S, Programs, module_command

from megatron_ep.checkpoint import latest_iteration
from megatron_ep.config import load_config

SAVE_INTERVAL = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """A run that has ended, and its output: (Done, folder)."""
    folder = tmp_path_factory.mktemp("pretrain")
    flags = ["--progress-bar", "--save-interval", SAVE_INTERVAL]
    with Programs(folder / "programs") as programs:
        done = runs.train(programs, corpus, folder / "run", *flags)
    return done, folder / "run"


@pytest.fixture
def output(finished):
    done, output = finished
    runs.check(done)
    return output


def test_the_loss_falls(output):
    losses = runs.losses(output)
    assert losses[0] == pytest.approx(math.log(257), abs=0.4)  # knows nothing
    assert losses[-1] < losses[0] - 0.3
    assert runs.losses(output, "eval")[-1] < losses[0] - 0.3


def test_the_metrics_file_has_a_line_for_each_step_and_evaluation(output):
    lines = [(line["kind"], line["iteration"]) for line in runs.records(output)]
    expected = [("train", step) for step in range(1, 9)]
    expected.insert(4, ("eval", 4))
    assert lines == [*expected, ("eval", 8)]
    for line in runs.records(output, "train"):
        assert line["consumed_samples"] == 4 * line["iteration"]
        assert line["lr"] > 0
        assert line["grad_norm"] > 0
        assert line["load_balancing_loss"] >= 0.9


@pytest.mark.parametrize("dispatcher", ["allgather", "flex"])
def test_the_other_dispatchers_train_alike(programs, corpus, output, tmp_path, dispatcher):
    flags = ["--moe-token-dispatcher-type", dispatcher, "--moe-router-dtype", "fp32"]
    runs.check(runs.train(programs, corpus, tmp_path / "run", *flags))
    assert runs.losses(tmp_path / "run") == pytest.approx(runs.losses(output), rel=1e-5)


def test_progress_and_throughput_are_reported(finished, output):
    printed = finished[0].output
    assert "2 ranks on cpu: TP 1, PP 1, EP 2, CP 1, DP 2" in printed
    assert "8 experts, top-2, dispatcher deepep" in printed
    assert f"{runs.NUM_STEPS}/{runs.NUM_STEPS}" in printed
    assert f"step 8: validation loss {runs.losses(output, 'eval')[-1]:.4f}" in printed
    for line in runs.records(output, "train"):
        seconds = line["step_time_ms"] / 1e3
        assert line["tokens_per_s"] * seconds == pytest.approx(runs.TOKENS_PER_STEP)


def test_every_choice_of_an_expert_is_counted(output):
    for line in runs.records(output, "train"):
        counts = line["tokens_per_expert"]
        assert sorted(counts) == [str(layer) for layer in range(1, runs.NUM_LAYERS + 1)]
        for of_layer in counts.values():
            assert len(of_layer) == runs.NUM_EXPERTS
            assert sum(of_layer) == runs.TOKENS_PER_STEP * runs.TOPK
        mean = runs.TOKENS_PER_STEP * runs.TOPK / runs.NUM_EXPERTS
        highest = max(max(of_layer) for of_layer in counts.values())
        lowest = min(min(of_layer) for of_layer in counts.values())
        assert line["expert_load_max_over_mean"] == highest / mean
        assert line["expert_load_min_over_mean"] == lowest / mean


def test_tensorboard_shows_the_same_numbers(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == {
        line["iteration"]: pytest.approx(line["loss"]) for line in runs.records(output, "train")
    }
    assert [event.step for event in events.Scalars("eval/loss")] == [4, 8]
    tags = events.Tags()["scalars"]
    assert {"train/tokens_per_s", "train/lr", "experts/max_over_mean/layer_2"} <= set(tags)


def test_checkpoints_are_complete_and_carry_their_settings(output):
    assert latest_iteration(output) == runs.NUM_STEPS
    names = sorted(path.name for path in output.iterdir() if path.is_dir())
    assert names == ["iter_0000004", "iter_0000008", "tensorboard"]
    config = load_config(output / "iter_0000008" / "config.yaml")
    assert config.model.hidden_size == 32
    assert config.checkpoint.save_interval == SAVE_INTERVAL


def test_a_finished_run_has_nothing_left_to_do(finished, output, programs, corpus):
    before = (output / "metrics.jsonl").read_bytes()
    runs.check(runs.train(programs, corpus, output))
    assert (output / "metrics.jsonl").read_bytes() == before


def start_endless(programs, corpus, output, *flags):
    """A run that has made some steps."""
    endless = ["--train-iters", 100_000, "--eval-interval", "none", *flags]
    arguments = runs.command(corpus, output, *endless)
    process = programs.start(*module_command(*arguments, num_ranks=2))
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, programs.log(process)
        assert time.monotonic() < deadline, programs.log(process)
        time.sleep(0.1)
    return process


def ranks_of(programs, process):
    """Process ids: torchrun makes each rank the leader of a session."""
    return [pid for pid in programs.living() if os.getsid(pid) == pid and pid != process.pid]


def test_sigterm_saves_and_stops(programs, corpus, tmp_path):
    process = start_endless(programs, corpus, tmp_path / "run")
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    done = programs.finish(process)
    last = runs.records(tmp_path / "run")[-1]["iteration"]
    assert f"stopped after step {last}" in done.output
    assert latest_iteration(tmp_path / "run") == last


def test_a_killed_rank_ends_the_run_and_leaves_nothing(programs, corpus, tmp_path):
    often = ["--save-interval", 2, "--keep-last", 1]  # saving starts processes
    process = start_endless(programs, corpus, tmp_path / "run", *often)
    os.kill(max(ranks_of(programs, process)), signal.SIGKILL)
    done = programs.finish(process)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.output


def test_settings_that_do_not_fit_end_the_run_with_a_message(programs, corpus, tmp_path):
    done = runs.train(programs, corpus, tmp_path / "run", "--expert-model-parallel-size", 3)
    assert done.returncode != 0
    assert "moe.num_experts = 8 is not divisible by parallelism.expert_model" in done.output
    assert "megatron_ep/pretrain.py" not in done.output  # no traceback of ours
    assert not (tmp_path / "run").exists()


def test_experts_of_torch_train_alike(programs, corpus, output, tmp_path):
    runs.check(runs.train(programs, corpus, tmp_path / "run", "--moe-experts", "torch"))
    assert runs.losses(tmp_path / "run") == runs.losses(output)


def test_rows_dropped_for_a_capacity_are_reported(programs, corpus, output, tmp_path):
    for factor in (4, 0.5):
        flags = ["--ep-capacity-factor", factor]
        runs.check(runs.train(programs, corpus, tmp_path / f"{factor}", *flags))
    dropped = [
        [line["dropped_rows"] for line in runs.records(tmp_path / name, "train")]
        for name in ("4", "0.5")
    ]
    assert not any(dropped[0])
    assert runs.losses(tmp_path / "4") == runs.losses(output)
    # At least half the rows find no room; on one rank of two, at most all of them.
    total = runs.TOKENS_PER_STEP * runs.TOPK * runs.NUM_LAYERS
    assert all(total / 2 <= number for number in dropped[1])
