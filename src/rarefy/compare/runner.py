"""Runs a comparison: a process a run, each on its share of the cores, finished runs kept; or over machines by Ray."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rarefy.compare.plan import Comparison, Job, pending

#: What a run's process runs.
WORKER = ("-m", "rarefy.compare.worker")

#: What the caller is told after every run: the job, None or the error, how many are done of how many, seconds left.
Told = Callable[[Job, str | None, int, int, float], None]


def run(
    comparison: Comparison,
    folder: Path,
    *,
    jobs: int | None = None,
    ray_address: str | None = None,
    tell: Told | None = None,
) -> dict[str, str]:
    """Do every run that is not finished yet; gives the errors of those that failed, by the names of their folders.

    Args:
        comparison: what to run.
        folder: each run gets a folder of its own in it.
        jobs: how many at a time, each on cores of its own and with one thread of PyTorch: what a run has more than one
            core for is decoding pictures; None takes as many as there are cores.
        ray_address: run them through Ray instead, on the cluster at this address ("local" starts one here, "auto"
            finds one). Runs go to any machine, one core each, and their results come back into ``folder``.
        tell: called after each run.

    A failed run does not stop the others; the next call tries it again. Raises ValueError for less than one job and for
    a folder with a run of another recipe, and ImportError if Ray is asked for and not installed.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    todo = pending(comparison, folder)
    folder.mkdir(parents=True, exist_ok=True)
    began, done, failed = time.monotonic(), len(comparison.jobs) - len(todo), {}
    finished = 0
    source = _through_ray(todo, folder, ray_address, jobs) if ray_address else _local(todo, folder, jobs)
    for job, error in source:
        done, finished = done + 1, finished + 1
        if error is not None:
            failed[job.folder] = error
        if tell is not None:
            left = (time.monotonic() - began) / finished * (len(todo) - finished)
            tell(job, error, done, len(comparison.jobs), left)
    return failed


def _plain(job: Job) -> dict[str, Any]:
    """The recipe on one thread, whatever the cores: so that seconds compare."""
    return {**job.recipe.to_dict(), "threads": 1}


class _Processes:
    """The processes that are running, so that they can be ended together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def finish(self, command: list[str], standard_input: str) -> tuple[int, str]:
        """Run a command to its end: exit status and what it wrote to standard error."""
        with self._lock:
            if self._stopped:
                return -1, "stopped"
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
            self._running.add(process)
        try:
            error = process.communicate(standard_input)[1]
        finally:
            with self._lock:
                self._running.discard(process)
        return process.returncode, error

    def stop(self) -> None:
        """End what runs, and start nothing more; a run that is ended goes on after its last checkpoint next time."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


@contextmanager
def _ended(processes: _Processes) -> Iterator[None]:
    try:
        yield
    except BaseException:
        processes.stop()
        raise


def _local(todo: list[Job], folder: Path, jobs: int | None) -> Iterator[tuple[Job, str | None]]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    workers = jobs or len(cores) or os.cpu_count() or 1
    share = len(cores) // workers
    shares: queue.Queue[list[int]] = queue.Queue()
    for index in range(workers):
        shares.put(cores[index * share : (index + 1) * share])
    processes = _Processes()

    def begin() -> None:
        """Let a thread, and what it starts, have its share of the cores; where there are too few, all have all."""
        if own := shares.get():
            os.sched_setaffinity(0, own)

    def one(job: Job) -> str | None:
        command = [sys.executable, *WORKER, str(folder / job.folder)]
        status, error = processes.finish(command, json.dumps(_plain(job)))
        return None if status == 0 else _last_line(status, error)

    with ThreadPoolExecutor(workers, initializer=begin) as pool, _ended(processes):
        futures = {pool.submit(one, job): job for job in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _remote(plain: dict[str, Any], name: str, worker: tuple[str, ...]) -> dict[str, bytes]:
    """A run on whatever machine this is; gives the files of its folder that a comparison reads, or its error."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        status, error = _Processes().finish([sys.executable, *worker, str(path)], json.dumps(plain))
        if status:
            return {"error": _last_line(status, error).encode()}
        kept = ("summary.json", "environment.json", "metrics.jsonl", "recipe.yaml")
        return {file: (path / file).read_bytes() for file in kept}


def _last_line(status: int, error: str) -> str:
    lines = error.strip().splitlines()
    return lines[-1] if lines else f"ended with status {status}"


def _through_ray(todo: list[Job], folder: Path, address: str, jobs: int | None) -> Iterator[tuple[Job, str | None]]:
    try:
        import ray
    except ModuleNotFoundError as missing:
        raise ImportError("running a comparison over machines needs Ray: pip install ray") from missing
    if address == "local":
        ray.init(num_cpus=jobs, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=address, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=1, max_retries=2)(_remote)
        waiting = {remote.remote(_plain(job), job.folder, WORKER): job for job in todo}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready)
            try:
                files = ray.get(ready)
            except ray.exceptions.RayError as error:
                yield job, _last_line(1, str(error))
                continue
            if "error" in files:
                yield job, files["error"].decode()
                continue
            path = folder / job.folder
            path.mkdir(parents=True, exist_ok=True)
            # The summary last: it is what says that the run is finished.
            for name in sorted(files, key=lambda name: name == "summary.json"):
                (path / name).write_bytes(files[name])
            yield job, None
    finally:
        ray.shutdown()
