"""Tasks with a file each, run in parallel processes; copies of one command on one folder share them.

A task whose file exists is not run again. So a command that is stopped, or asked for more, runs only what is missing. A
copy claims the tasks that it runs (`gapo.runs.claims`), and waits for those of others.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from gapo.runs.claims import POLL, Claims

Task = Any
Result = Any
Run = Callable[[Task], Result]


class Workers:
    """Processes of one thread each that load what the tasks need, once. With one worker it is this process.

    Args:
        count: number of processes; 0 for one per core.
        load: called once in each process with `arguments`; returns the function that runs a task. Picklable.
        arguments: of `load`; picklable.
        here: what `load` returned in this process.
    """

    def __init__(self, count: int, load: Callable[..., Run], arguments: tuple[Any, ...], here: Run) -> None:
        self.count = count or cores()
        self._load, self._arguments, self._here = load, arguments, here
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)

    def submit(self, task: Task) -> Future[Result]:
        """Run a task; with one worker, at once."""
        if self.count > 1:
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(
                    self.count, context, initializer=_start, initargs=(self._load, self._arguments)
                )
            return self._pool.submit(_run, task)
        done: Future[Result] = Future()
        done.set_result(self._here(task))
        return done


def run_missing(
    tasks: Mapping[Path, Task], workers: Workers, claims: Claims, write: Callable[[Path, Result], None], title: str
) -> None:
    """Run the tasks whose files are missing, with a progress bar; at the end every task has its file.

    Args:
        tasks: by their files.
        workers: run them.
        claims: of this copy of the command.
        write: writes the result of a task to its file, atomically.
        title: of the progress bar.
    """
    missing = _missing(tasks)
    with tqdm(total=len(tasks), initial=len(tasks) - len(missing), desc=title, smoothing=0.05) as bar:
        for path, result in _results(missing, workers, claims):
            write(path, result)
            claims.release(path)
            bar.update()
        bar.update(bar.total - bar.n)  # those of other copies


def _missing(tasks: Mapping[Path, Task]) -> dict[Path, Task]:
    written = {folder: set(os.listdir(folder)) for folder in {path.parent for path in tasks} if folder.is_dir()}
    return {path: task for path, task in tasks.items() if path.name not in written.get(path.parent, ())}


def _results(missing: Mapping[Path, Task], workers: Workers, claims: Claims) -> Iterator[tuple[Path, Result]]:
    """The files and results of the tasks that this copy runs, as they end."""
    running: dict[Future[Result], Path] = {}
    is_waiting = False
    while missing or running:
        missing = {path: task for path, task in _missing(missing).items() if path not in running.values()}
        for path, task in missing.items():
            if len(running) == workers.count:
                break
            if claims.take(path):
                if path.exists():  # since we looked
                    claims.release(path)
                else:
                    running[workers.submit(task)] = path
        if running:
            done = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)[0]
            yield from ((running.pop(future), future.result()) for future in done)
        elif missing:
            if not is_waiting:
                tqdm.write(f"waiting for runs of other copies of this command: {len(missing)}")
            is_waiting = True
            time.sleep(POLL)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker: dict[str, Run] = {}  # of a worker process


def _start(load: Callable[..., Run], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    one_thread()
    _worker["run"] = load(*arguments)


def _end_with_parent() -> None:
    """A killed command leaves no process behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(task: Task) -> Result:
    return _worker["run"](task)


def one_thread() -> int:
    """Compute with one thread from now on, so that processes do not get in each other's way and results do not depend
    on the number of cores; returns how many there were. The progress bars of transformers are silenced."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    threads: int = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads
