"""Text becomes Megatron's data files, byte for byte; input that cannot is named."""

import json

import pytest

from megatron_ep.preprocess import main
from megatron_ep.tokenizer import ByteTokenizer, padded_vocab_size

pytestmark = pytest.mark.usefixtures("megatron_here")

AWKWARD = "tab\there, \r\n ünïcödé 漢字 \U0001f600 \x00 end"


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "made" / "data"  # the folder is made on the way


def preprocess(prefix, *arguments):
    return main(["--output", str(prefix), "--no-progress-bar", *map(str, arguments)])


def read(prefix):
    """The documents, as lists of token ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert len(dataset.document_indices) == len(dataset) + 1
    return [dataset[i].tolist() for i in range(len(dataset))]


def texts(prefix):
    tokenizer = ByteTokenizer()
    documents = read(prefix)
    assert all(ids[-1] == tokenizer.eod for ids in documents)
    return [tokenizer.detokenize(ids) for ids in documents]


def write_lines(path, *lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def error_of(prefix, capsys, *arguments):
    """What is said; afterwards nothing is left of the output."""
    assert preprocess(prefix, *arguments) == 1
    assert not prefix.parent.exists() or list(prefix.parent.iterdir()) == []
    return capsys.readouterr().err


def test_text_files_read_back_through_megatron_as_they_were(tmp_path, prefix, capsys):
    (tmp_path / "b.txt").write_bytes(AWKWARD.encode())
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "c.md").write_text("not asked for")
    assert preprocess(prefix, "--input", tmp_path) == 0
    assert texts(prefix) == ["short", AWKWARD]  # a directory is read in sorted order
    num_tokens = sum(map(len, read(prefix)))
    assert f"2 documents, {num_tokens} tokens" in capsys.readouterr().out
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["data.bin", "data.idx"]


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path, prefix):
    lines = [json.dumps({"body": text}).encode() for text in ("one", AWKWARD, "three")]
    source = write_lines(tmp_path / "a.jsonl", lines[0], b"", lines[1] + b"\r", lines[2])
    assert preprocess(prefix, "--input", source, "--json-key", "body") == 0
    assert texts(prefix) == ["one", AWKWARD, "three"]


def test_text_and_jsonl_mix_and_suffixes_choose(tmp_path, prefix):
    (tmp_path / "a.py").write_text("code")
    (tmp_path / "b.txt").write_text("text")
    source = write_lines(tmp_path / "c.jsonl", b'{"text": "line"}')
    assert preprocess(prefix, "--input", tmp_path, source, "--suffix", ".py") == 0
    assert texts(prefix) == ["code", "line"]


def test_documents_may_go_without_an_end_mark(tmp_path, prefix):
    (tmp_path / "a.txt").write_text("abc")
    assert preprocess(prefix, "--input", tmp_path / "a.txt", "--no-append-eod") == 0
    assert read(prefix) == [[97, 98, 99]]


def test_documents_without_text_are_counted_as_skipped(tmp_path, prefix, capsys):
    (tmp_path / "empty.txt").touch()
    source = write_lines(tmp_path / "a.jsonl", b'{"text": ""}', b'{"text": "x"}')
    assert preprocess(prefix, "--input", tmp_path / "empty.txt", source) == 0
    assert texts(prefix) == ["x"]
    assert "1 documents, 2 tokens, 2 skipped" in capsys.readouterr().out


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path, prefix, capsys):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert "a.txt: not UTF-8 at byte 3" in error_of(prefix, capsys, "--input", tmp_path / "a.txt")


def test_a_line_that_is_not_utf8_is_named(tmp_path, prefix, capsys):
    source = write_lines(tmp_path / "a.jsonl", b'{"text": "fine"}', b'{"text": "\xff"}')
    assert "a.jsonl:2: not UTF-8 at byte 10" in error_of(prefix, capsys, "--input", source)


def test_undecodable_files_and_lines_can_be_passed_over(tmp_path, prefix, capsys):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    lines = [b'{"text": "before"}', b'{"text": "\xff"}', b'{"text": "after"}']
    source = write_lines(tmp_path / "a.jsonl", *lines)
    assert preprocess(prefix, "--skip-undecodable", "--input", tmp_path / "bad.txt", source) == 0
    assert texts(prefix) == ["before", "after"]
    assert "2 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "not JSON"),
        (b'{"body": "x", "id": 3}', "no text under 'text' (there is: body, id)"),
        (b'{"text": 3}', "no text under 'text'"),
        (b'["text"]', "no text under 'text' (there is: list)"),
        (b'{"text": "\\ud800"}', "half a surrogate pair, \\ud800"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, prefix, capsys, line, message):
    source = write_lines(tmp_path / "a.jsonl", b'{"text": "fine"}', b"", line)
    error = error_of(prefix, capsys, "--input", source, "--skip-undecodable")
    assert f"a.jsonl:3: {message}" in error


def test_a_missing_input_is_named(tmp_path, prefix, capsys):
    error = error_of(prefix, capsys, "--input", tmp_path / "nowhere.txt")
    assert "nowhere.txt: no such file or directory" in error


def test_a_directory_without_a_matching_file_is_named(tmp_path, prefix, capsys):
    error = error_of(prefix, capsys, "--input", tmp_path, "--suffix", ".rst", ".md")
    assert f"no file with suffix .rst or .md in {tmp_path}" in error


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_input_without_text_is_refused(tmp_path, prefix, capsys, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    error = error_of(prefix, capsys, "--input", tmp_path / "a.jsonl")
    assert "the input contains no text" in error


def test_a_failure_leaves_earlier_data_as_it_was(tmp_path, prefix, capsys):
    (tmp_path / "a.txt").write_text("first")
    assert preprocess(prefix, "--input", tmp_path / "a.txt") == 0
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert preprocess(prefix, "--input", tmp_path / "a.txt", tmp_path / "b.txt") == 1
    assert texts(prefix) == ["first"]
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["data.bin", "data.idx"]


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    assert preprocess(tmp_path / "a.txt" / "data", "--input", tmp_path / "a.txt") == 1
    assert "a.txt" in capsys.readouterr().err


def test_a_huggingface_tokenizer_without_its_package_says_what_to_install(
    tmp_path, prefix, capsys, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.txt").write_text("text")
    flags = ["--tokenizer-type", "huggingface", "--tokenizer-model", "some/model"]
    error = error_of(prefix, capsys, "--input", tmp_path / "a.txt", *flags)
    assert "pip install transformers" in error


def test_the_byte_tokenizer_gives_back_any_text():
    tokenizer = ByteTokenizer()
    ids = tokenizer.tokenize(AWKWARD)
    assert ids == list(AWKWARD.encode())
    assert tokenizer.detokenize([*ids, tokenizer.eod]) == AWKWARD
    assert tokenizer.detokenize([0xC3]) == "\ufffd"  # half a character


@pytest.mark.parametrize(("ranks", "size"), [(1, 320), (2, 384), (4, 512)])
def test_the_vocabulary_is_padded_to_equal_shares(ranks, size):
    assert padded_vocab_size(257, divisible_by=64, tensor_parallel_size=ranks) == size


def test_the_program_prints_one_line(programs, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    flags = ["--input", tmp_path / "a.txt", "--output", tmp_path / "data", "--no-progress-bar"]
    done = programs.run("megatron_ep.preprocess", *flags)
    assert (done.returncode, done.output) == (
        0,
        f"{tmp_path}/data.bin/.idx: 1 documents, 5 tokens\n",
    )
