"""The first process of a simulated host: prepares its namespaces, then reaps processes.

Usage: host_init.py NAME HOSTS_FILE. Runs in new namespaces of its own (see hosts.py), says "ready"
on standard output, and ends when it is killed, which ends every process of the host.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path


def main(name: str, hosts_file: str) -> None:
    # As process 1 it inherits orphans; those of a parent that ignores SIGCHLD leave no zombies.
    Path("/proc/sys/kernel/hostname").write_text(name)
    # Memory of its own, so that nothing can reach another host through shared memory by mistake.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm"], check=True)
    subprocess.run(["mount", "--bind", hosts_file, "/etc/hosts"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"ready\n")
    while True:
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
