"""Hosts of a network on one machine: each is a set of Linux namespaces with its own address.

    with Network(num_hosts=2, link_rate="1gbit") as network:
        processes = [host.popen(["hostname"]) for host in network.hosts]

Every host has its own network (one interface eth0, one address), host name, process numbers,
/dev/shm and /etc/hosts; the file system is shared, as it is on a cluster. The hosts are plugged
into a switch, itself a set of namespaces with a bridge, so that nothing is added to the network of
the machine. Namespaces have no names: they and all their processes end with their first process,
which ends with the process that made the Network, however that one ends.

    host 0: eth0 10.77.0.1 ---- port0 |
    host 1: eth0 10.77.0.2 ---- port1 | bridge of the switch: 10.77.0.254
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUBNET = "10.77.0"
INTERFACE = "eth0"
PROGRAMS = ("ip", "tc", "unshare", "nsenter", "setpriv", "mount")
COMMAND_TIMEOUT_S = 30.0
_NAMESPACES = ("--net", "--uts", "--mount", "--ipc", "--pid")


@dataclass(frozen=True)
class LinkBytes:
    """Bytes that a host has sent and received over its link, frame headers included."""

    sent: int
    received: int

    def __sub__(self, earlier: LinkBytes) -> LinkBytes:
        return LinkBytes(self.sent - earlier.sent, self.received - earlier.received)


class Host:
    """Namespaces that act as one machine; made by Network.

    Attributes:
        name: host name; the hosts of the network know each other by it.
        address: IPv4 address of eth0.
        interface: eth0.
    """

    interface = INTERFACE

    def __init__(self, name: str, address: str, *, hosts_file: Path) -> None:
        self.name, self.address = name, address
        self.switch_port: tuple[Host, str] | None = None
        init = Path(__file__).with_name("host_init.py")
        # setpriv: ends with this process; --kill-child: so does the first process of the host.
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--fork", "--kill-child"]
            + ["--mount-proc", sys.executable, "-S", str(init), name, str(hosts_file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # unshare complains when its child is killed
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self._process.kill()
            _, reason = self._process.communicate()
            raise RuntimeError(f"{name}: the namespaces could not be made: {reason}")
        outer = self._process.pid
        self.pid = int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def popen(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Starts a program on the host; the options are those of subprocess.Popen.

        A signal to the process reaches nsenter, which waits for the program: use power_off() or
        signal the process group (start_new_session=True).
        """
        return subprocess.Popen([*self._enter(options), *map(str, command)], **options)

    def run(
        self, *command: str | Path, timeout: float = COMMAND_TIMEOUT_S, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program on the host; its output is kept.

        Raises:
            RuntimeError: it failed; the message has its output.
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        return _run([*self._enter(options), *map(str, command)], timeout=timeout, **options)

    def link_bytes(self) -> LinkBytes:
        """What went over the link so far."""
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == INTERFACE:
                values = counters.split()
                return LinkBytes(sent=int(values[8]), received=int(values[0]))
        raise RuntimeError(f"{self.name} has no {INTERFACE}")

    def processes(self) -> dict[int, str]:
        """Command lines of what runs on the host, by their process numbers outside of it."""
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(path / "ns/pid") == own:
                    words = (path / "cmdline").read_bytes().split(b"\0")
                    found[int(path.name)] = b" ".join(words).decode(errors="replace").strip()
        return found

    def unplug(self) -> None:
        """Takes the link down at the switch: packets are lost, nobody is told."""
        self._set_port("down")

    def plug(self) -> None:
        """Brings the link back."""
        self._set_port("up")

    def power_off(self) -> None:
        """Ends the host: kills all its processes at once, and its link is gone. Idempotent."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, 9)
        self._process.communicate(timeout=COMMAND_TIMEOUT_S)

    def _enter(self, options: dict[str, Any]) -> list[str]:
        """What precedes a command; with other mounts the working directory would be the root."""
        directory = options.get("cwd") or os.getcwd()
        return ["nsenter", "--target", str(self.pid), *_NAMESPACES, f"--wd={directory}", "--"]

    def _set_port(self, state: str) -> None:
        assert self.switch_port is not None
        switch, port = self.switch_port
        switch.run("ip", "link", "set", port, state)


class Network:
    """`num_hosts` hosts on one switch; a context manager.

    Args:
        num_hosts: number of hosts.
        link_rate: limit of every link in each direction, in the words of tc ("1gbit"); None has no
            limit.

    Attributes:
        hosts: the hosts, host 0 first.
        switch: where the bridge is; a host without processes of its own, reachable by all.
        directory: temporary files of the network; removed with it.
    """

    def __init__(self, *, num_hosts: int, link_rate: str | None = None) -> None:
        self.hosts: list[Host] = []
        self._stack = contextlib.ExitStack()
        with self._stack:
            directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ep-hosts-"))
            self.directory = Path(directory)
            names = {f"node{i}": f"{SUBNET}.{i + 1}" for i in range(num_hosts)}
            names["switch"] = f"{SUBNET}.254"
            hosts_file = self.directory / "hosts"
            lines = ["127.0.0.1 localhost", *(f"{ip} {name}" for name, ip in names.items())]
            hosts_file.write_text("\n".join(lines) + "\n")
            machines = []
            for name, address in names.items():
                machines.append(Host(name, address, hosts_file=hosts_file))
                self._stack.callback(machines[-1].power_off)
            *self.hosts, self.switch = machines
            self._connect(link_rate)
            self._stack = self._stack.pop_all()

    def _connect(self, link_rate: str | None) -> None:
        switch = self.switch
        switch.run("ip", "link", "add", "br0", "type", "bridge", "stp_state", "0")
        switch.run("ip", "address", "add", f"{switch.address}/24", "dev", "br0")
        switch.run("ip", "link", "set", "br0", "up")
        for i, host in enumerate(self.hosts):
            port = f"port{i}"
            # By process number: a host does not see the other namespaces.
            ends = ["ip", "link", "add", port, "netns", str(switch.pid), "type", "veth"]
            _run([*ends, "peer", "name", INTERFACE, "netns", str(host.pid)])
            host.switch_port = (switch, port)
            switch.run("ip", "link", "set", port, "master", "br0", "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.run("ip", "link", "set", INTERFACE, "up")
            if link_rate is not None:
                for end, device in ((host, INTERFACE), (switch, port)):
                    _limit_rate(end, device, link_rate)

    def close(self) -> None:
        """Ends all processes on the hosts, the hosts, and the files. Idempotent."""
        self._stack.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Finished:
    """A program that ran on a host: exit status (None: killed at the deadline) and its output."""

    status: int | None
    output: str


def run_on_hosts(
    hosts: Sequence[Host],
    command: Callable[[int], Sequence[str | Path]],
    *,
    timeout: float,
    **options: Any,
) -> list[Finished]:
    """Runs a program on every host at the same time.

    Args:
        hosts: where.
        command: from the index of the host to what it runs.
        timeout: seconds until programs that still run are killed.
        **options: of subprocess.Popen.
    """
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in hosts]
        processes = []
        for i, host in enumerate(hosts):
            process = host.popen(command(i), stdout=outputs[i], stderr=subprocess.STDOUT, **options)
            processes.append(stack.enter_context(_ended(process)))
        statuses: list[int | None] = []
        for process in processes:
            try:
                statuses.append(process.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                statuses.append(None)
        finished = []
        for status, output in zip(statuses, outputs):
            output.seek(0)
            finished.append(Finished(status, output.read()))
        return finished


def torchrun(
    network: Network, *, ranks_per_host: int, program: Sequence[str | Path], port: int = 29500
) -> Callable[[int], list[str]]:
    """The command of each host that starts `program` as ranks on all hosts; for run_on_hosts()."""

    def command(index: int) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run"]
        launcher += ["--nnodes", str(len(network.hosts)), "--node-rank", str(index)]
        launcher += ["--nproc-per-node", str(ranks_per_host)]
        launcher += ["--master-addr", network.hosts[0].address, "--master-port", str(port)]
        return [*launcher, *map(str, program)]

    return command


@functools.cache
def reason_unavailable() -> str | None:
    """Why there can be no hosts on this machine, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"missing programs (Debian: iproute2 util-linux): {', '.join(missing)}"
    try:
        with Network(num_hosts=1) as network:
            network.hosts[0].run("ip", "-brief", "address")
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return f"this system does not let us make network namespaces: {error}"
    return None


@contextlib.contextmanager
def _ended(process: subprocess.Popen[Any]) -> Any:
    """Kills what is left of a process that nsenter started, whose group is that of nsenter."""
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_descendants(process.pid)
            process.wait(timeout=COMMAND_TIMEOUT_S)


def kill_descendants(pid: int) -> None:
    """Sends SIGKILL to a process and all its descendants."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            kill_descendants(int(child))
        os.kill(pid, 9)


def _limit_rate(host: Host, device: str, rate: str) -> None:
    shape = ["tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate]
    host.run(*shape, "burst", "1mb", "latency", "50ms")


def _run(
    command: Sequence[str], *, timeout: float = COMMAND_TIMEOUT_S, **options: Any
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, **options
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done
