"""Dispatch and combine between hosts with networks of their own: same bits as on one node, one copy
of a token per node on the link, faster than a flat all-to-all, and errors when the network is lost.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest

TESTS = Path(__file__).resolve().parents[1]
FRAMES = 0.05  # what headers and acknowledgements may add to the bytes of the messages


class Job:
    """Ranks of ep_ranks.py on all hosts of a network."""

    def __init__(self, network, num_local_ranks, check, **arguments):
        paths = [str(TESTS.parent), str(TESTS)]
        command = [sys.executable, Path(__file__).with_name("ep_ranks.py"), check]
        command.append(json.dumps(arguments))
        self.processes, self.num_local_ranks = [], num_local_ranks
        for node, host in enumerate(network.hosts):
            for local_rank in range(num_local_ranks):
                environment = {
                    "RANK": node * num_local_ranks + local_rank,
                    "LOCAL_RANK": local_rank,
                    "WORLD_SIZE": len(network.hosts) * num_local_ranks,
                    "LOCAL_WORLD_SIZE": num_local_ranks,
                    "MASTER_ADDR": network.hosts[0].address,
                    "MASTER_PORT": 29511,
                    "GLOO_SOCKET_IFNAME": host.interface,
                    "OMP_NUM_THREADS": 1,
                    "PYTHONPATH": os.pathsep.join(paths),
                }
                environment = os.environ | {key: str(value) for key, value in environment.items()}
                log = network.directory / f"rank{len(self.processes)}.log"
                with log.open("w") as stderr:
                    process = host.popen(
                        command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
                    )
                process.log = log
                self.processes.append(process)

    def wait_until_ready(self):
        for process in self.processes:
            assert process.stdout.readline() == "ready\n", process.log.read_text()

    def results(self, ranks=None, *, timeout=120.0):
        """Of the ranks given, all by default."""
        end = time.monotonic() + timeout
        found = []
        for rank, process in enumerate(self.processes):
            if ranks is not None and rank not in ranks:
                continue
            output, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
            assert process.returncode == 0, f"rank {rank}: {process.log.read_text()}"
            found.append(json.loads(output.splitlines()[-1]))
        return found

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                hosts.kill_descendants(process.pid)
            process.stdout.close()
            process.wait()


@pytest.fixture
def run_ranks():
    with contextlib.ExitStack() as stack:

        def run(*args, **kwargs):
            job = Job(*args, **kwargs)
            stack.callback(job.kill)
            return job

        yield run


@pytest.mark.parametrize(("num_hosts", "num_local_ranks"), [(2, 2), (3, 2)])
def test_results_are_those_of_one_node(make_network, run_ranks, num_hosts, num_local_ranks):
    run_ranks(make_network(num_hosts=num_hosts), num_local_ranks, "round_trips").results()


def test_low_latency_results_are_those_of_one_node(make_network, run_ranks):
    run_ranks(make_network(num_hosts=3), 2, "low_latency_rounds").results()


TRAFFIC = dict(num_tokens=256, hidden=7168, num_calls=4)


def sums(results, num_local_ranks, name):
    """Of the ranks of each host."""
    values = [result[name] for result in results]
    return [
        sum(values[first : first + num_local_ranks])
        for first in range(0, len(values), num_local_ranks)
    ]


@pytest.mark.parametrize("routing", ["uniform", "group_limited"])
@pytest.mark.parametrize(("num_hosts", "num_local_ranks"), [(2, 2), (3, 2)])
def test_a_token_crosses_the_link_once_per_node(
    make_network, run_ranks, num_hosts, num_local_ranks, routing
):
    """Both routings have 4 experts per token; group-limited ones are on one host or two."""
    network = make_network(num_hosts=num_hosts)
    job = run_ranks(
        network, num_local_ranks, "traffic", **TRAFFIC, routing=routing, num_experts=24, num_topk=4
    )
    results = job.results()
    copies = sums(results, num_local_ranks, "copies")
    row_bytes, choice_bytes = results[0]["row_bytes"], results[0]["choice_bytes"]
    for result in results:
        assert result["counted"] == result["copies"] * (row_bytes + choice_bytes)
    for node in range(num_hosts):
        _, sent = results[node * num_local_ranks]["dispatch"]
        expected = copies[node] * (row_bytes + choice_bytes)
        assert expected <= sent <= (1 + FRAMES) * expected
    # Combine: every host sends a sum for each copy that it got.
    sent = sum(results[node * num_local_ranks]["combine"][1] for node in range(num_hosts))
    assert sum(copies) * row_bytes <= sent <= (1 + FRAMES) * sum(copies) * row_bytes


@pytest.mark.benchmark
@pytest.mark.parametrize("num_hosts", [2, 3])
def test_it_is_faster_than_a_flat_all_to_all_by_the_bytes_saved(make_network, run_ranks, num_hosts):
    network = make_network(num_hosts=num_hosts, link_rate="1gbit")
    arguments = dict(TRAFFIC, num_tokens=512, routing="uniform", num_experts=48, num_topk=8)
    results = run_ranks(network, 2, "traffic", **arguments).results(timeout=300.0)
    seconds, sent = results[0]["dispatch"]
    flat_seconds, flat_sent = results[0]["flat"]
    print(f"{num_hosts} hosts of 2 ranks: {results[0]}")  # noqa: T201
    assert flat_seconds / seconds >= 0.8 * flat_sent / sent


TIMEOUT_S = 3.0


def check_lost(results, ranks_of_lost_hosts):
    for result in results:
        assert result["peer"] in ranks_of_lost_hosts, result["text"]
        assert f"rank {result['peer']}" in result["text"]
        assert result["seconds"] < 1.1 * TIMEOUT_S + 3.0
        assert result["destroy_seconds"] < 2.0


def test_both_sides_of_a_link_that_goes_down_name_the_other_node(make_network, run_ranks):
    network = make_network(num_hosts=2)
    job = run_ranks(network, 2, "lost", timeout_s=TIMEOUT_S)
    job.wait_until_ready()
    time.sleep(0.3)
    network.hosts[1].unplug()
    results = job.results()
    check_lost(results[:2], {2, 3})
    check_lost(results[2:], {0, 1})


def test_every_survivor_names_the_node_that_disappeared(make_network, run_ranks):
    network = make_network(num_hosts=3)
    job = run_ranks(network, 2, "lost", timeout_s=TIMEOUT_S)
    job.wait_until_ready()
    time.sleep(0.3)
    network.hosts[1].unplug()
    network.hosts[1].power_off()
    check_lost(job.results(ranks=[0, 1, 4, 5]), {2, 3})
