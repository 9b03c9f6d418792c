"""The decisions of scripts/slurm, with stand-ins for SLURM's commands and for the training."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/slurm"

# Each stand-in notes how it was called. `srun` is the training: it does what the test wrote.
STANDINS = {
    "python": """
case "$*" in
  *megatron_ep.check*) echo "$CHECK_OUTPUT"; exit "${CHECK_STATUS:-0}" ;;
  *find_spec*) exit "${LACKS_PACKAGES:-0}" ;;
esac""",
    "srun": "[ ! -f training.sh ] || . ./training.sh",
    "scontrol": "case $1 in show) echo node0 ;; esac",
    "scancel": "",
    "sinfo": 'cat "$SINFO_OUTPUT"',
    "sbatch": 'echo "Submitted batch job 7"',
}
# srun is a child of a subshell of the batch script; the fourth field is the parent.
SIGNAL_BATCH = "signal() { kill -$1 $(cut -d' ' -f4 /proc/$PPID/stat); }; signal"
TWO_NODES = "test*|2|gpu:4|idle\nsmall|1|(null)|idle\nsmall|3|(null)|down*\n"


@pytest.fixture
def job(tmp_path):
    for name, body in STANDINS.items():
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
        script.chmod(0o755)
    (tmp_path / "bin/python3").symlink_to("python")
    (tmp_path / "sinfo").write_text(TWO_NODES)
    (tmp_path / "run.yaml").write_text("model: {}\n")
    return Job(tmp_path)


class Job:
    """The environment of a batch script; run() starts one and returns its status and output."""

    def __init__(self, directory):
        self.directory = directory
        self.environment = {
            "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(directory / "calls"),
            "SINFO_OUTPUT": str(directory / "sinfo"),
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_CPUS_ON_NODE": "4",
            "SLURM_SUBMIT_DIR": str(directory),
            "EP_ROOT": str(SCRIPTS.parents[1]),
            "EP_VENV": "none",
            "EP_NETWORK": "tcp",
        }
        self.says()

    def says(self, **values):
        """What megatron_ep.check answers."""
        defaults = {"num_nodes": 2, "ranks_per_node": 4, "uses_gpus": "yes", "train_iters": 10}
        defaults |= {"saved_iteration": 0, "save_directory": str(self.directory / "saved")}
        values = defaults | values
        lines = [f"{name}={value}" for name, value in values.items()]
        self.environment["CHECK_OUTPUT"] = "\n".join(lines)

    def trains(self, script, checkpoint=None):
        """What the training does, and the checkpoint that it leaves."""
        (self.directory / "training.sh").write_text(script)
        if checkpoint is not None:
            saved = self.directory / "saved"
            saved.mkdir(exist_ok=True)
            (saved / "latest_checkpointed_iteration.txt").write_text(f"{checkpoint}\n")

    def run(self, *command, script="pretrain.sbatch", **environment):
        done = subprocess.run(
            ["bash", str(SCRIPTS / script), *command],
            cwd=self.directory,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.returncode, done.stdout + done.stderr

    @property
    def calls(self):
        path = self.directory / "calls"
        return path.read_text() if path.exists() else ""


def test_one_task_on_each_node_starts_torchrun_with_all_cores(job):
    assert job.run("run.yaml", "--lr", "1e-3")[0] == 0
    call = next(line for line in job.calls.splitlines() if line.startswith("srun"))
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=4" in call
    assert "-m megatron_ep.pretrain --config run.yaml --lr 1e-3" in job.calls
    assert "scontrol requeue" not in job.calls


def test_a_failed_step_is_requeued_with_the_checkpoint_it_goes_on_from(job):
    job.trains("exit 137", checkpoint=5)
    status, output = job.run("run.yaml")
    assert status == 0
    assert "ended with status 137" in output
    assert "going on after step 5" in output
    assert "scontrol requeue 7" in job.calls


def test_a_configuration_that_cannot_run_is_not_requeued(job):
    status, output = job.run("run.yaml", CHECK_STATUS="2")
    assert status == 2
    assert "not started" in output
    assert "srun" not in job.calls
    assert "scontrol requeue" not in job.calls


def test_failures_without_a_new_checkpoint_end_the_job(job):
    job.trains("exit 1", checkpoint=5)
    for attempt in range(2):
        assert job.run("run.yaml", SLURM_RESTART_COUNT=str(attempt))[0] == 0
    job.trains("exit 1", checkpoint=6)
    assert job.run("run.yaml", SLURM_RESTART_COUNT="2")[0] == 0
    assert job.run("run.yaml", SLURM_RESTART_COUNT="3")[0] == 0
    status, output = job.run("run.yaml", SLURM_RESTART_COUNT="4")
    assert status == 1
    assert "giving up: 3 failures in a row after step 6" in output
    assert job.calls.count("scontrol requeue") == 4


def test_without_checkpoints_a_failure_is_final(job):
    job.says(save_directory="''")
    job.trains("exit 1")
    status, output = job.run("run.yaml")
    assert status == 1
    assert "nothing could be resumed" in output
    assert "scontrol requeue" not in job.calls


def test_near_the_time_limit_ranks_are_asked_to_save_and_the_job_goes_on_later(job):
    job.trains(f"{SIGNAL_BATCH} USR1; sleep 0.5; exit 1", checkpoint=3)
    status, output = job.run("run.yaml", EP_MAX_STALLED="1")
    assert status == 0
    assert "time is nearly up" in output
    assert "scancel --signal=USR1 7" in job.calls
    assert "scontrol requeue 7" in job.calls


def test_a_cancelled_job_is_not_requeued(job):
    job.trains(f"{SIGNAL_BATCH} TERM; sleep 0.5; exit 143", checkpoint=3)
    status, output = job.run("run.yaml")
    assert status == 143
    assert "cancelled" in output
    assert "scontrol requeue" not in job.calls


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("ib", {"NCCL_IB_HCA": "mlx5", "NVSHMEM_REMOTE_TRANSPORT": "ibrc"}),
        ("roce", {"NCCL_IB_GID_INDEX": "3", "NVSHMEM_IB_TRAFFIC_CLASS": "7"}),
        ("efa", {"FI_PROVIDER": "efa", "NVSHMEM_REMOTE_TRANSPORT": "libfabric"}),
        ("tcp", {"NCCL_IB_DISABLE": "1", "GLOO_SOCKET_IFNAME": "eth0"}),
    ],
)
def test_a_network_sets_its_variables_and_those_of_the_user_win(job, network, expected):
    job.trains("env >training.env")
    status, _ = job.run(
        "run.yaml", EP_NETWORK=network, EP_INTERFACE="eth0", NVSHMEM_IB_TRAFFIC_CLASS="7"
    )
    assert status == 0
    lines = (job.directory / "training.env").read_text().splitlines()
    for name, value in expected.items():
        assert f"{name}={value}" in lines


def test_an_unknown_network_is_refused(job):
    status, output = job.run("run.yaml", EP_NETWORK="pigeon")
    assert status == 2
    assert "EP_NETWORK=pigeon: expected ib, roce, efa or tcp" in output


def test_a_container_takes_the_place_of_the_environment(job):
    job.run("run.yaml", EP_CONTAINER="registry#image:1")
    assert job.calls.count("--container-image=registry#image:1") == 2


def submit(job, *options, **environment):
    return job.run("--venv", "none", *options, script="submit.sh", **environment)


def test_submit_asks_for_the_nodes_and_gpus_of_the_configuration(job):
    status, output = submit(job, "--time", "1:00:00", "run.yaml", "--", "--lr", "1e-3")
    assert status == 0
    assert "Submitted batch job 7" in output
    call = job.calls.splitlines()[-1]
    assert call.startswith("sbatch --nodes=2 --time=1:00:00 --gpus-per-node=4 ")
    assert call.endswith(f"pretrain.sbatch {job.directory}/run.yaml --lr 1e-3")


def test_a_dry_run_shows_the_command_and_only_asks_whether_it_would_do(job):
    status, output = submit(job, "--dry-run", "run.yaml")
    assert status == 0
    assert "sbatch --nodes=2" in output
    calls = [line for line in job.calls.splitlines() if line.startswith("sbatch")]
    assert len(calls) == 1
    assert "--test-only" in calls[0]


def test_ranks_on_cpus_need_no_gpus(job):
    job.says(ranks_per_node=8, uses_gpus="no")
    assert submit(job, "run.yaml")[0] == 0
    assert "--gpus-per-node" not in job.calls


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        (["--partition", "none"], {}, "--partition none: the partitions are small test"),
        (["--partition", "small"], {}, "small has 1 usable nodes, launch.num_nodes = 2"),
        ([], {"num_nodes": 3}, "test has 2 usable nodes, launch.num_nodes = 3"),
        ([], {"ranks_per_node": 8}, "test has 0 nodes with 8 GPUs, launch.num_nodes = 2"),
        (["--venv", "/nowhere"], {}, "--venv /nowhere: no virtual environment"),
        (["--container", "/no/image.sqsh"], {}, "--container /no/image.sqsh: no such file"),
    ],
)
def test_submit_says_what_the_cluster_lacks(job, options, values, message):
    job.says(**values)
    status, output = submit(job, *options, "run.yaml")
    assert status == 2
    assert "not submitted" in output
    assert message in output
    assert "sbatch" not in job.calls


def test_submit_passes_on_why_a_configuration_cannot_run(job):
    body = "#!/bin/bash\necho 'data.data_path: no file data/x.bin' >&2\nexit 2\n"
    (job.directory / "bin/python").write_text(body)
    status, output = submit(job, "run.yaml")
    assert status == 2
    assert "  data.data_path: no file data/x.bin" in output


def test_submit_checks_in_the_container_what_the_login_node_cannot(job):
    options = ["--partition", "test", "--container", "registry#image:1", "run.yaml"]
    assert submit(job, *options)[0] == 0
    assert "srun" not in job.calls
    job.trains('echo "$CHECK_OUTPUT"')
    status, output = submit(job, *options, LACKS_PACKAGES="1", CHECK_STATUS="1")
    assert status == 0, output
    (call,) = (line for line in job.calls.splitlines() if line.startswith("srun"))
    assert "--partition=test --container-image=registry#image:1" in call
    assert f"python -m megatron_ep.check --shell --config {job.directory}/run.yaml" in call
    job.trains("echo 'data.data_path: no file data/x.bin' >&2; exit 2")
    status, output = submit(job, *options, LACKS_PACKAGES="1")
    assert status == 2
    assert "  data.data_path: no file data/x.bin" in output


def test_submit_needs_a_login_node(job):
    for name in ("sinfo", "sbatch"):
        (job.directory / "bin" / name).unlink()
    for name in ("bash", "dirname", "realpath", "mktemp", "rm"):
        (job.directory / "bin" / name).symlink_to(shutil.which(name))
    status, output = submit(job, "run.yaml", PATH=str(job.directory / "bin"))
    assert status == 2
    assert "not a login node" in output


@pytest.mark.parametrize("option", [["--no-such-option"], ["--nodes"], [], ["a.yaml", "b.yaml"]])
def test_submit_refuses_a_command_line_that_it_does_not_understand(job, option):
    status, output = job.run(*option, script="submit.sh")
    assert status == 2
    assert "submit.sh: " in output
