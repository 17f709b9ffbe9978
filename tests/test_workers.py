"""Processes that run the jobs of a sweep."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from bipolar import workers


@pytest.fixture(scope="module", autouse=True)
def prepared():
    workers.prepare()


def leave(folder, number, seconds=0.0):
    """Say where task `number` was done."""
    time.sleep(seconds)
    facts = {
        "pid": os.getpid(),
        "has_torch": "torch" in sys.modules,
        "threads": os.environ["OMP_NUM_THREADS"],
        "cwd": str(Path.cwd()),
        "variable": os.environ.get("TEST_VARIABLE"),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    }
    with (folder / f"{number}.json").open("x") as file:  # once
        json.dump(facts, file)


def die(folder, number):
    os.kill(os.getpid(), signal.SIGKILL)


def done(folder):
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize(("tasks", "count"), [(1, 2), (5, 2), (7, 3)])
def test_every_task_is_done_once_in_as_many_processes_as_asked_for(tmp_path, tasks, count):
    workers.run_all([partial(leave, tmp_path, number, 0.2) for number in range(tasks)], count)
    found = done(tmp_path)
    assert sorted(found) == list(range(tasks))
    assert len({facts["pid"] for facts in found.values()} - {os.getpid()}) == min(tasks, count)


def test_what_a_worker_finds(tmp_path, monkeypatch):
    """Torch, its share of the cores, and the environment and folder that its parent has now."""
    monkeypatch.setenv("TEST_VARIABLE", "set after the workers' origin was started")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    workers.run_all([partial(leave, tmp_path, number) for number in range(2)], 2)
    for facts in done(tmp_path).values():
        assert facts["has_torch"]
        assert facts["threads"] == str(max(1, workers.cores() // 2))
        assert facts["cwd"] == str(tmp_path)
        assert facts["variable"] == os.environ["TEST_VARIABLE"]
        assert set(workers.STOP_SIGNALS) <= set(facts["blocked"])


def test_a_number_of_threads_that_the_user_set_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    workers.run_all([partial(leave, tmp_path, 0)], 2)
    assert done(tmp_path)[0]["threads"] == "7"


def test_the_others_go_on_when_a_worker_dies(tmp_path):
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        workers.run_all([partial(die, tmp_path, 0), *(partial(leave, tmp_path, n) for n in range(1, 6))], 2)
    assert sorted(done(tmp_path)) == [1, 2, 3, 4, 5]


def test_workers_take_no_further_task_when_their_parent_was_killed(tmp_path):
    code = (
        "from functools import partial; from pathlib import Path; from bipolar import workers; import test_workers\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "workers.run_all([partial(test_workers.leave, folder, number, 1.0) for number in range(100)], 2)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while not done_files(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(2.5)  # what was begun is done
    before = done_files(tmp_path)
    time.sleep(2.0)
    assert done_files(tmp_path) == before


def done_files(folder):
    return sorted(path.name for path in folder.glob("*.json"))


def test_a_call_returns_what_the_function_does():
    assert workers.call(partial(divmod, 7, 2)) == (3, 1)


def test_a_call_in_which_the_process_dies():
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        workers.call(partial(die, None, 0))


def test_the_users_signals_are_heard_again_afterwards():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with workers.deaf():
        assert set(workers.STOP_SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
