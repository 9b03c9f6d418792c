"""scripts/slurm on a real SLURM: trains, is killed, requeues, resumes; refuses what cannot run."""

import os
import re
import signal
import time

import pytest
import training

# A step takes about 50 ms; under load, starting takes most of the time.
START_TIMEOUT_S = 120.0
DISPATCHER = "deepep"
FLAGS = ["--train-iters", "80", "--save-interval", "5", "--lr-warmup-iters", "5"]
FLAGS += ["--moe-token-dispatcher-type", DISPATCHER]
SUBMIT = training.ROOT / "scripts/slurm/submit.sh"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return training.make_data(tmp_path_factory.mktemp("data"))


def submit(slurm, directory, *options, flags):
    """Submits the small configuration as two nodes with a rank each; returns what is printed."""
    command = [SUBMIT, "--network", "tcp", "--interface", "eth0", "--venv", "none", "--nodes", "2"]
    command += [*options, training.CONFIGS / "small_1x2.yaml", "--", "--ranks-per-node", "1"]
    return slurm.run(
        *command, *flags, cwd=directory, env=training.environment(), timeout=START_TIMEOUT_S
    )


def wait_for_step(run, step):
    deadline = time.monotonic() + START_TIMEOUT_S
    while training.last_step(run) < step:
        assert time.monotonic() < deadline, f"step {step} is not reached"
        time.sleep(0.02)


def kill_a_rank(host):
    for pid, command in host.processes().items():
        if re.match(r"\S*python\S* -u -m megatron_ep\.pretrain", command):
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError(f"no rank on {host.name}: {host.processes()}")


def test_a_killed_job_resumes_from_the_last_checkpoint_with_the_losses_of_an_undisturbed_run(
    slurm, data, tmp_path
):
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    flags = [*FLAGS, "--data-path", str(data)]
    job = int(submit(slurm, tmp_path, flags=[*flags, "--save", str(run)]).split()[-1])
    log = tmp_path / f"ep-pretrain-{job}.log"

    wait_for_step(run, 7)
    slurm.run("scancel", f"{job}.0")
    slurm.restart(job, restarts=1, timeout=START_TIMEOUT_S)
    wait_for_step(run, 22)
    kill_a_rank(slurm.network.hosts[1])
    slurm.restart(job, restarts=2, timeout=START_TIMEOUT_S)
    wait_for_step(run, 42)
    slurm.run("scancel", "--batch", "--signal=USR1", str(job))  # as near the time limit
    slurm.restart(job, restarts=3, timeout=START_TIMEOUT_S)
    shown = slurm.wait_for(job, "COMPLETED", "FAILED", timeout=START_TIMEOUT_S)

    text = log.read_text()
    assert shown["JobState"] == "COMPLETED", text
    # Attempts go on from the newest checkpoint; the last one saved when it was asked to stop.
    resumed = [int(step) for step in re.findall(r"going on after step (\d+)", text)]
    loaded = [int(step) for step in re.findall(r"loaded \S*/iter_0*(\d+)", text)]
    assert resumed == loaded
    assert len(resumed) == 3
    assert resumed[0] >= 5
    assert resumed[1] >= 20
    assert resumed[2] >= 42
    assert "time is nearly up: saving" in text
    training.run_here(
        2, ["--config", str(training.CONFIGS / "small_1x2.yaml"), *flags, "--save", undisturbed]
    )
    assert training.losses(run) == training.losses(undisturbed)
    assert len(training.losses(run)) == 80


def test_a_cancelled_job_stays_cancelled(slurm, tmp_path):
    script = training.ROOT / "scripts/slurm/pretrain.sbatch"
    environment = training.environment() | {"EP_ROOT": str(training.ROOT), "EP_NETWORK": "tcp"}
    # The check of the configuration takes seconds, in which the job is cancelled.
    environment["EP_VENV"] = "none"
    config = training.CONFIGS / "small_1x2.yaml"
    job = slurm.submit(script, "--nodes=2", cwd=tmp_path, env=environment, arguments=[config])
    slurm.wait_for(job, "RUNNING", timeout=START_TIMEOUT_S)
    slurm.run("scancel", str(job))
    shown = slurm.wait_for(job, "CANCELLED", "PENDING", timeout=START_TIMEOUT_S)
    assert shown["JobState"] == "CANCELLED"
    assert shown["Restarts"] == "0"


def test_submit_refuses_what_this_cluster_cannot_run(slurm, tmp_path):
    with pytest.raises(RuntimeError) as refused:
        submit(
            slurm,
            tmp_path,
            *["--partition", "debug"],
            flags=["--num-nodes", "3", "--data-path", "nowhere"],
        )
    message = str(refused.value)
    assert "3 ranks are not divisible by" in message
    assert "no file nowhere.bin" in message
    assert "--partition debug: the partitions are test" in message
