"""The hosts that other tests run on: apart from each other, countable, and gone afterwards."""

import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest

PROCESSES = Path("/proc")

RECEIVE = """
import socket
server = socket.create_server(("0.0.0.0", 9000))
print("listening", flush=True)
connection, _ = server.accept()
connection.settimeout(10)
size = 0
while part := connection.recv(1 << 20):
    size += len(part)
print(size, flush=True)
"""

SEND = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 9000), timeout=10)
connection.sendall(bytes(int(sys.argv[2])))
"""


def start_receiver(host):
    receiver = host.popen([sys.executable, "-S", "-c", RECEIVE], stdout=subprocess.PIPE, text=True)
    assert receiver.stdout.readline() == "listening\n"
    return receiver


def send(host, to, num_bytes):
    host.run(sys.executable, "-S", "-c", SEND, to, str(num_bytes))


def finish(receiver):
    output, _ = receiver.communicate(timeout=10)
    return int(output)


def host_processes():
    """Numbers of the first processes of hosts, zombies left out."""
    return {
        path.parent.name
        for path in PROCESSES.glob("[0-9]*/cmdline")
        if b"host_init.py" in _read(path)
    }


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("num_hosts", [2, 3])
def test_every_host_has_its_own_name_address_and_shared_memory(make_network, num_hosts):
    network = make_network(num_hosts=num_hosts)
    for i, host in enumerate(network.hosts):
        assert host.run("hostname").stdout == f"node{i}\n"
        assert f"{host.address}/24" in host.run("ip", "-brief", "address").stdout
        host.run("touch", f"/dev/shm/of-host-{i}")
    for i, host in enumerate(network.hosts):
        assert host.run("ls", "/dev/shm").stdout == f"of-host-{i}\n"
    assert not list(Path("/dev/shm").glob("of-host-*"))


def test_the_link_counts_what_one_host_sends_another_by_name(make_network):
    network = make_network(num_hosts=3)
    sender, bystander, target = network.hosts
    receiver = start_receiver(target)
    before = [host.link_bytes() for host in network.hosts]
    send(sender, "node2", 4_000_000)
    assert finish(receiver) == 4_000_000
    sent, unrelated, received = (
        host.link_bytes() - earlier for host, earlier in zip(network.hosts, before)
    )
    assert 4_000_000 <= sent.sent < 4_000_000 * 1.05
    assert 4_000_000 <= received.received < 4_000_000 * 1.05
    assert sent.received < 200_000
    assert unrelated.sent + unrelated.received < 10_000


def test_a_link_rate_holds_in_both_directions(make_network):
    network = make_network(num_hosts=2, link_rate="100mbit")
    for sender, target in (network.hosts, network.hosts[::-1]):
        receiver = start_receiver(target)
        begin = time.monotonic()
        send(sender, target.address, 8_000_000)
        assert finish(receiver) == 8_000_000
        seconds = time.monotonic() - begin
        assert seconds > (8_000_000 - 2 * 1_048_576) * 8 / 100e6


def test_an_unplugged_host_hears_nothing_until_it_is_plugged_in(make_network):
    network = make_network(num_hosts=2)
    receiver = start_receiver(network.hosts[1])
    network.hosts[1].unplug()
    sender = network.hosts[0].popen(
        [sys.executable, "-S", "-c", SEND, "node1", "1000"], stderr=subprocess.DEVNULL
    )
    with pytest.raises(subprocess.TimeoutExpired):
        receiver.wait(0.5)
    assert sender.poll() is None
    network.hosts[1].plug()
    assert finish(receiver) == 1000
    assert sender.wait(10) == 0


def test_power_off_ends_every_process_of_the_host_and_no_other(make_network):
    network = make_network(num_hosts=2)
    sleepers = [host.popen(["sh", "-c", "sleep 1000 & sleep 1000"]) for host in network.hosts]
    network.hosts[0].power_off()
    assert sleepers[0].wait(5) != 0
    assert sleepers[1].poll() is None
    network.close()
    assert sleepers[1].wait(5) != 0


def test_nothing_is_left_after_an_exception(make_network):
    earlier = host_processes()
    networks = []

    def fail():
        with hosts.Network(num_hosts=2) as network:
            networks.append(network)
            network.hosts[0].popen(["sleep", "1000"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert host_processes() <= earlier
    assert not networks[0].directory.exists()


def test_hosts_end_with_a_test_program_that_is_killed(make_network):
    program = (
        "import hosts, os, signal\n"
        "network = hosts.Network(num_hosts=2)\n"
        "network.hosts[0].popen(['sleep', '1000'])\n"
        "print(network.directory, *(host.pid for host in network.hosts), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=30,
    )
    directory, *pids = done.stdout.split()
    try:
        deadline = time.monotonic() + 5
        while any(_read(PROCESSES / pid / "cmdline") for pid in pids):
            assert time.monotonic() < deadline, "a host outlives its test"
            time.sleep(0.05)
    finally:
        subprocess.run(["rm", "-rf", directory], check=True)


def test_output_and_status_of_every_host_come_back_and_a_slow_one_is_killed(make_network):
    network = make_network(num_hosts=2)
    finished = hosts.run_on_hosts(
        network.hosts, lambda i: ["sh", "-c", f"hostname; sleep {i * 1000}; exit 3"], timeout=1
    )
    assert finished == [hosts.Finished(3, "node0\n"), hosts.Finished(None, "node1\n")]
