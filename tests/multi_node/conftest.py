"""Fixtures of the tests with several hosts, and a summary that says what could not run and why.

make_network  builds hosts (hosts.py), ended after the test
slurm         a SLURM cluster of two such hosts (slurm_cluster.py), for the whole session
"""

import contextlib

import hosts
import pytest
import slurm_cluster

REASONS = ("hosts: ", "SLURM: ")
"""How reasons begin for which a test could not run here."""


@pytest.fixture
def make_network():
    if reason := hosts.reason_unavailable():
        pytest.skip(f"{REASONS[0]}{reason}")
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(hosts.Network(**options))


@pytest.fixture(scope="session")
def slurm():
    if reason := hosts.reason_unavailable() or slurm_cluster.reason_unavailable():
        pytest.skip(f"{REASONS[1]}{reason}")
    with slurm_cluster.SlurmCluster(num_nodes=2) as cluster:
        yield cluster


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    lines = {}
    for report in skipped:
        if "multi_node" in report.nodeid and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if reason.startswith(REASONS):  # others were not asked for
                lines[reason] = None
    for line in lines:
        terminalreporter.write_line(f"**** NOT TESTED: several hosts: {line}", yellow=True)
