"""Fixtures of the training entry's tests: programs, data, and Megatron in this process."""

import json
import random

import pytest
from moe_layers import import_megatron
from programs import TIMEOUT_S, Programs

TEXT = "each token goes to the experts that the router chose and comes back as one sum"
NUM_DOCUMENTS = 100
WORDS_PER_DOCUMENT = 400


@pytest.fixture(scope="session")
def megatron_here():
    """For tests that need Megatron-Core in the process of pytest."""
    import_megatron()


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
