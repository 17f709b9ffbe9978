"""Processes that run the jobs of a sweep, forked from one that has imported torch.

To import torch takes longer than many a run. A process that is started for that alone does it once for all workers,
while the sweep's jobs are still being checked.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Task = Callable[[], Any]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare() -> None:
    """Begin to import torch in the process from which workers will be forked."""
    if METHOD == "forkserver":
        from multiprocessing import forkserver

        forkserver.set_forkserver_preload(["bipolar.preloaded"])
        with deaf():
            forkserver.ensure_running()


@contextmanager
def deaf() -> Iterator[None]:
    """Processes that are started inside leave the signals alone that ask a sweep to stop.

    Ctrl-C goes to every process of a terminal, and a job scheduler may send SIGTERM to all.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Python starts its resource tracker with the first worker otherwise, and unblocks the signals as it does.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def call(function: Callable[[], Any]) -> Any:
    """What `function`, which can be pickled and raises nothing, returns in a process of its own."""
    receiver, sender = _context().Pipe(duplex=False)
    process = _context().Process(target=_answer, args=(function, sender, dict(os.environ)))
    with deaf():
        process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a worker died with exit code {process.exitcode}") from None


def _answer(function: Callable[[], Any], sender: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sender.send(function())


def _context() -> Any:
    return multiprocessing.get_context(METHOD)


def run_all(tasks: Sequence[Task], count: int) -> None:
    """Run tasks, which can be pickled and raise nothing, in order in up to `count` processes.

    Raises:
        RuntimeError: a process died (of memory, perhaps). The others have gone on, and its task is not done.
    """
    count = min(count, len(tasks))
    taken = _context().Value("l", 0)
    environment = {"OMP_NUM_THREADS": str(max(1, cores() // count)), **os.environ}
    processes = [_context().Process(target=_work, args=(tasks, taken, environment)) for _ in range(count)]
    try:
        with deaf():
            for process in processes:
                process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            # not for ever: only between two calls does Python look at signals that another thread has received
            for sentinel in wait(list(running), POLL_SECONDS):
                running.pop(sentinel).join()
    except BaseException:
        for process in processes:
            if process.is_alive():
                process.kill()
        raise
    died = [process.exitcode for process in processes if process.exitcode]
    if died:
        raise RuntimeError(f"a worker died with exit code {died[0]}")


def _work(tasks: Sequence[Task], taken: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # which may have changed since the process was started that this one comes from
    parent = multiprocessing.parent_process()
    while parent is None or parent.is_alive():
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(tasks):
            return
        tasks[number]()
