"""The comparison of training runs: its numbers, and when it says that they differ."""

import json

import pytest

from megatron_ep import compare_losses


def write_run(folder, losses):
    folder.mkdir()
    lines = [
        {"kind": "train", "iteration": step, "loss": loss, "step_time_ms": 10.0 * step}
        for step, loss in enumerate(losses, 1)
    ]
    lines.insert(1, {"kind": "eval", "iteration": 1, "loss": 100.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "first", [4.0, 2.0, 1.0]),
        write_run(tmp_path / "second", [4.0, 2.5, 0.9, 0.5]),
    ]


def test_differences_are_relative_to_the_first_run(runs, capsys):
    assert compare_losses.main(runs) == 0
    *table, same, other = capsys.readouterr().out.splitlines()
    assert json.loads(same)["largest"] == 0
    other = json.loads(other)
    assert other["name"] == "second"
    assert other["num_steps"] == 3
    assert other["last_loss"] == 0.9
    assert other["largest"] == pytest.approx(0.25)
    assert other["at_end"] == pytest.approx(-0.1)
    assert other["step_time_ms"] == 25
    assert table[2].split() == ["2", "2.000000", "2.500000"]


@pytest.mark.parametrize(("bound", "status"), [("0.3", 0), ("0.2", 1)])
def test_a_bound_decides_the_exit_status(runs, bound, status, capsys):
    assert compare_losses.main([*runs, "--within", bound]) == status
    assert ("not within 0.2: second" in capsys.readouterr().err) == bool(status)


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    empty = write_run(tmp_path / "empty", [])
    for path in (empty, str(tmp_path / "nowhere")):
        assert compare_losses.main([path]) == 2
        assert path in capsys.readouterr().err
