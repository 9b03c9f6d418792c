"""A real SLURM on the hosts of a Network: a controller on the switch, one slurmd on each host.

    with SlurmCluster(num_nodes=2) as cluster:
        job = cluster.submit("job.sbatch")
        cluster.wait_for(job, "COMPLETED", timeout=60)

Needs Debian's packages slurm-wlm and munge (or their like). Its files, munge's key and socket among
them, are in a temporary directory; nothing of the machine's own SLURM is read or changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from hosts import Host, Network

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "sinfo", "scancel", "squeue")
START_TIMEOUT_S = 30.0
POLL_S = 0.2
REQUEUE_S = 3.0
PARTITION = "test"

_CONFIGURATION = """
ClusterName=eptest
SlurmctldHost=switch({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=5
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
MpiDefault=none
SlurmdParameters=config_overrides
"""


class SlurmCluster:
    """SLURM with `num_nodes` nodes; a context manager.

    Attributes:
        network: the hosts.
        directory: configuration, state and logs.
    """

    def __init__(self, *, num_nodes: int, cpus_per_node: int = 4) -> None:
        self._stack = contextlib.ExitStack()
        self._daemons: list[subprocess.Popen[Any]] = []
        with self._stack:
            self.network = self._stack.enter_context(Network(num_hosts=num_nodes))
            self.directory = self.network.directory / "slurm"
            self.environment = dict(os.environ, SLURM_CONF=str(self.directory / "slurm.conf"))
            self._configure(cpus_per_node)
            self._start()
            self._stack = self._stack.pop_all()

    def _configure(self, cpus_per_node: int) -> None:
        directory, network = self.directory, self.network
        for name in ("munge", "state", *(f"spool-{host.name}" for host in network.hosts)):
            (directory / name).mkdir(parents=True)
        # Any user may connect; munge insists that nobody else can write on the way to its files.
        network.directory.chmod(0o755)
        key = directory / "munge/key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        lines = [_CONFIGURATION.format(controller=network.switch.address, directory=directory)]
        for host in network.hosts:
            lines.append(
                f"NodeName={host.name} NodeAddr={host.address} CPUs={cpus_per_node} "
                "RealMemory=4000 State=UNKNOWN"
            )
        nodes = ",".join(host.name for host in network.hosts)
        lines.append(f"PartitionName={PARTITION} Nodes={nodes} Default=YES MaxTime=INFINITE")
        (directory / "slurm.conf").write_text("\n".join(lines) + "\n")
        (directory / "mpi.conf").write_text("")

    def _start(self) -> None:
        munge, switch = self.directory / "munge", self.network.switch
        options = [f"--socket={munge}/socket", f"--key-file={munge}/key", "--force"]
        options += [
            f"--pid-file={munge}/pid",
            f"--log-file={munge}/log",
            f"--seed-file={munge}/seed",
        ]
        self._daemon(switch, ["munged", "--foreground", *options])
        self._until((munge / "socket").exists, "munged did not start")
        self._daemon(switch, ["slurmctld", "-D", "-c"])
        for host in self.network.hosts:
            self._daemon(host, ["slurmd", "-D", "-N", host.name])
        self._until(self._all_idle, "the nodes did not come up")

    def _daemon(self, host: Host, command: list[str]) -> None:
        with (self.directory / f"{command[0]}-{host.name}.out").open("w") as output:
            self._daemons.append(
                host.popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )

    def _until(self, condition: Any, problem: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{problem}:\n{self.logs()}")
            time.sleep(POLL_S)

    def _all_idle(self) -> bool:
        try:
            idle = self.run("sinfo", "--noheader", "--states=idle", "--format=%D").strip()
        except RuntimeError:  # the controller does not answer yet
            return False
        return idle == str(len(self.network.hosts))

    def run(self, *command: str | Path, timeout: float = 30.0, **options: Any) -> str:
        """Runs a command of SLURM where the controller is; returns what it prints.

        Raises:
            RuntimeError: it failed.
        """
        environment = self.environment | options.pop("env", {})
        done = self.network.switch.run(*command, timeout=timeout, env=environment, **options)
        return done.stdout

    def submit(self, script: str | Path, *options: str, **settings: Any) -> int:
        """Calls sbatch with options for it, and arguments for the script; returns the job."""
        arguments = settings.pop("arguments", [])
        output = self.run("sbatch", "--parsable", *options, script, *arguments, **settings)
        return int(output.split(";")[0])

    def show(self, job: int) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ExitCode and so on."""
        text = self.run("scontrol", "show", "job", str(job))
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for(self, job: int, *states: str, timeout: float) -> dict[str, str]:
        """Waits until the job has one of the states; returns show().

        Raises:
            TimeoutError: it has not, in `timeout` seconds; the message has the logs.
        """
        deadline = time.monotonic() + timeout
        while True:
            shown = self.show(job)
            if shown["JobState"] in states:
                return shown
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {shown['JobState']}, not {states}: {self.logs()}")
            time.sleep(POLL_S)

    def restart(self, job: int, *, restarts: int, timeout: float) -> None:
        """Waits until the job is requeued for the given time, and spares it the wait in the queue.

        SLURM lets a requeued job wait for two minutes. A few seconds are needed: nodes refuse the
        job as one that was killed while the clock shows the second of the kill.
        """
        deadline, pending_since = time.monotonic() + timeout, None
        while True:
            # NOTE: on its way back into the queue a job looks failed for a moment.
            shown = self.show(job)
            if int(shown["Restarts"]) >= restarts and shown["JobState"] == "RUNNING":
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {shown['JobState']}: {self.logs()}")
            if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime":
                pending_since = pending_since or time.monotonic()
                if time.monotonic() - pending_since > REQUEUE_S:
                    self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(POLL_S)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        parts = []
        for path in sorted(self.directory.glob("*.out")):
            parts.append(f"== {path.name}\n" + "\n".join(path.read_text().splitlines()[-25:]))
        return "\n".join(parts)

    def close(self) -> None:
        """Ends all jobs, daemons and hosts. Idempotent."""
        self._stack.close()
        for daemon in self._daemons:
            daemon.wait(timeout=START_TIMEOUT_S)

    def __enter__(self) -> SlurmCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reason_unavailable() -> str | None:
    """Why SLURM cannot be started on this machine, or None."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"missing programs (Debian: slurm-wlm munge): {', '.join(missing)}"
    return None
