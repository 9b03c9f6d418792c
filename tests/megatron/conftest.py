"""Fixtures of the training entry's tests: programs, data, and Megatron in this process.

Ranks work on the CPU, also where there is a GPU; a test marked over_devices runs on both.
"""

import contextlib
import json
import random

import moe_layers
import pytest
import rank_devices
import several_ranks
import torch
from programs import TIMEOUT_S, Programs

from ep_kernels.testing import RankPool

TEXT = "each token goes to the experts that the router chose and comes back as one sum"
NUM_DOCUMENTS = 100
WORDS_PER_DOCUMENT = 400


START_S = 180.0
"""Time for ranks to import Megatron and to find their device."""


def pytest_configure(config):
    config.addinivalue_line("markers", "over_devices: also runs on GPUs, where there is one")


def pytest_generate_tests(metafunc):
    is_meant = metafunc.definition.get_closest_marker("over_devices")
    if is_meant and torch.cuda.is_available() and "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", "cuda"])


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture(scope="session")
def pools(rank_server, session_pool):
    """Ranks by the device on which they work. Where there is a GPU, others of the common pool may
    have used it.
    """
    if not torch.cuda.is_available():
        yield {"cpu": session_pool}
        return
    with contextlib.ExitStack() as stack:
        yield {kind: stack.enter_context(RankPool(rank_server)) for kind in ("cpu", "cuda")}


@pytest.fixture
def ranks(pools, device, num_ranks):
    ranks = pools[device].get(num_ranks)
    ranks.run(rank_devices.use_device, device, deadline_s=START_S)
    return ranks


@pytest.fixture(scope="session")
def megatron_here():
    """For tests that need Megatron-Core in the process of pytest."""
    from megatron_ep.cpu_compat import enable_cpu

    enable_cpu()
    moe_layers.remove_compiler_folder()


@pytest.fixture
def programs(tmp_path):
    with Programs(tmp_path / "programs") as programs:
        yield programs


@pytest.fixture
def on_one_rank(launch):
    """Calls a function of single_rank.py on a fresh rank without a process group."""

    def call(function, *args):
        options = {"num_ranks": 1, "process_group": False, "deadline_s": TIMEOUT_S}
        (value,) = launch(function, *args, **options).values
        return value

    return call


@pytest.fixture
def train_on_ranks(launch, corpus, tmp_path):
    """Trains {name: flags} on fresh ranks, into tmp_path / name; see several_ranks.train.

    Returns what rank 0 gave.
    """

    def train(num_ranks, cases):
        stores = [
            torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            for _ in cases
        ]
        ports = [store.port for store in stores]
        arguments = (num_ranks, ports, corpus, tmp_path, cases)
        options = {"num_ranks": num_ranks, "process_group": False, "deadline_s": TIMEOUT_S}
        return launch(several_ranks.train, *arguments, **options).values[0]

    return train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, megatron_here):
    """Prefix of a data set of about 200 kB that a small model learns quickly."""
    from megatron_ep.preprocess import write_dataset
    from megatron_ep.tokenizer import ByteTokenizer

    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "text.jsonl"
    chooser = random.Random(0)
    with source.open("w") as lines:
        for _ in range(NUM_DOCUMENTS):
            text = " ".join(chooser.choices(TEXT.split(), k=WORDS_PER_DOCUMENT))
            lines.write(json.dumps({"text": text}) + "\n")
    write_dataset([source], folder / "corpus", ByteTokenizer())
    return folder / "corpus"
