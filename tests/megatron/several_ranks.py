"""The training entry on several ranks, called as a function several times in their processes.

These functions run on ranks without a process group, see `on_ranks`; main() makes its own, as it
does under torchrun, whose part of the environment is set here.
"""

import os

import single_rank
import training_runs as runs

from megatron_ep import pretrain


def train(rank, num_ranks, ports, corpus, folder, cases):
    """Trains {name: flags} one after the other, each into the folder of its name, over the store of
    the test that listens at its port.

    Returns:
        {name: (exit status, what the rank printed)}
    """
    results = {}
    for port, (name, flags) in zip(ports, cases.items()):
        environment = {
            "RANK": rank,
            "WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        _, *arguments = runs.command(corpus, folder / name, *flags)
        results[name] = single_rank.call(pretrain.main, *arguments, environment=environment)
    for name in environment:
        del os.environ[name]
    return results
