"""The runner of programs leaves no process behind, whatever a test does."""

import signal
import time

import pytest
from programs import Programs

DAEMON = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("started", flush=True)
time.sleep(float(sys.argv[1]))
"""


def wait_until_started(programs, process):
    while "started" not in programs.log(process):
        assert process.poll() is None, programs.log(process)
        time.sleep(0.01)


def test_a_program_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    programs = Programs(tmp_path / "programs")
    process = programs.start("-c", DAEMON, 600)
    wait_until_started(programs, process)
    assert len(programs.living()) == 2
    with pytest.raises(AssertionError, match="still running after 0.1 s:\nstarted"):
        programs.finish(process, timeout_s=0.1)
    assert process.returncode == -signal.SIGKILL
    assert programs.living() == []


def fail(programs):
    wait_until_started(programs, programs.start("-c", DAEMON, 600))
    raise ZeroDivisionError


def test_programs_are_ended_when_a_test_fails(tmp_path):
    programs = Programs(tmp_path / "programs")
    with pytest.raises(ZeroDivisionError), programs:
        fail(programs)
    assert programs.living() == []


def test_a_process_that_outlives_its_program_is_reported_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("programs.EXIT_S", 0.1)
    with (
        pytest.raises(AssertionError, match="left behind:\nprocess"),
        Programs(tmp_path / "programs") as programs,
    ):
        programs.finish(programs.start("-c", DAEMON, 0))
    assert programs.living() == []


def test_a_temporary_file_is_reported(tmp_path):
    with (
        pytest.raises(AssertionError, match="temporary file .*tmp/forgotten"),
        Programs(tmp_path / "programs") as programs,
    ):
        (programs.tmp / "forgotten").touch()


def test_processes_of_others_are_left_alone(tmp_path):
    with Programs(tmp_path / "theirs") as theirs:
        process = theirs.start("-c", DAEMON, 600)
        wait_until_started(theirs, process)
        with Programs(tmp_path / "ours") as ours:
            ours.finish(ours.start("-c", "pass"))
        assert process.poll() is None
        theirs.kill()
        assert process.wait() == -signal.SIGKILL
