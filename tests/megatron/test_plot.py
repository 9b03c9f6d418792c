"""Loss curves become a picture; files that cannot be drawn are named."""

import json

import pytest

from megatron_ep.plot import main

PNG = b"\x89PNG\r\n\x1a\n"


def write_metrics(path, num_steps=5, **extra):
    path.parent.mkdir(exist_ok=True)
    lines = [
        {"kind": "train", "iteration": step, "loss": 1 / step, **extra}
        for step in range(1, num_steps + 1)
    ]
    lines.append({"kind": "eval", "iteration": num_steps, "loss": 0.1})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def plot(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("extra", [{}, {"expert_load_max_over_mean": 1.5}], ids=["dense", "moe"])
def test_a_metrics_file_becomes_a_png(tmp_path, capsys, extra):
    picture = tmp_path / "loss.png"
    assert plot(write_metrics(tmp_path / "a" / "m.jsonl", **extra), "--output", picture) == 0
    assert picture.read_bytes().startswith(PNG)
    assert capsys.readouterr().out == f"{picture}\n"


def test_several_runs_share_a_picture(tmp_path):
    files = [write_metrics(tmp_path / name / "m.jsonl") for name in ("a", "b")]
    picture = tmp_path / "loss.svg"
    assert plot(*files, "--output", picture, "--label", "deepep", "alltoall") == 0
    assert "deepep: training" in picture.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "m.jsonl"),
        ("", "m.jsonl has no training losses"),
        ('{"kind": "eval", "iteration": 1, "loss": 2}\n', "m.jsonl has no training losses"),
        ('{"kind": "train", "iteration": 1}\nnonsense\n', "m.jsonl:2: not JSON"),
        ('{"loss": 2}\n', "m.jsonl:1: no report of a training run"),
        ("[1, 2]\n", "m.jsonl:1: no report of a training run"),
    ],
    ids=["missing", "empty", "only-validation", "not-json", "other-json", "list"],
)
def test_a_file_that_cannot_be_drawn_is_named(tmp_path, capsys, content, message):
    source = tmp_path / "m.jsonl"
    if content is not None:
        source.write_text(content)
    assert plot(source, "--output", tmp_path / "loss.png") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "loss.png").exists()


def test_the_number_of_labels_must_be_that_of_the_files(tmp_path, capsys):
    source = write_metrics(tmp_path / "m.jsonl")
    assert plot(source, "--output", tmp_path / "loss.png", "--label", "a", "b") == 1
    assert "2 labels for 1 files" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    source = write_metrics(tmp_path / "m.jsonl")
    assert plot(source, "--output", tmp_path / "nowhere" / "loss.png") == 1
    assert "nowhere" in capsys.readouterr().err
    assert plot(source, "--output", tmp_path / "loss.abc") == 1
    assert "abc" in capsys.readouterr().err
