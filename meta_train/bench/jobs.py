"""Jobs that are done once: a pool of workers, a store of results on disk, and what is said of the progress.

A job is named by its ``key``. A finished job is one line of a JSON-lines file and is never done again, so what was
interrupted goes on where it stopped, and a second, larger call pays only for what is new.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from meta_train import jsonl
from meta_train.errors import UsageError


class Job(Protocol):
    """Plain data that say what to do."""

    @property
    def key(self) -> Hashable:
        """What tells jobs apart."""


def short_hash(*parts: Any) -> str:
    """12 hexadecimal digits that identify what the parts print as, one a line."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]


J = TypeVar("J", bound=Job)
A = TypeVar("A")
R = TypeVar("R")


# ---------------------------------------------------------------------------------------- the store


class Store(ABC, Generic[J, R]):
    """A file of one line a finished job, only ever appended to.

    Attributes:
        path: the file.
        runs: the results, by the keys of their jobs.

    Raises:
        UsageError: a line is of something else. One that a crash cut off is passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[Hashable, R] = {}
        for record in jsonl.read(path):
            try:
                self.take(record)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{path} is not {self.holds} ({error!r}). Name another folder.") from None

    def add(self, job: J, result: R) -> None:
        """A finished job."""
        self.runs[job.key] = result
        jsonl.append(self.path, self.record(job, result))

    holds = "of this kind of runs"

    @abstractmethod
    def take(self, record: dict[str, Any]) -> None:
        """Take over a line that was read."""

    @abstractmethod
    def record(self, job: J, result: R) -> dict[str, Any]:
        """The line of a finished job: plain data without infinities."""

    @abstractmethod
    def describe(self, job: J, result: R) -> str:
        """A finished job in a few words."""


# ----------------------------------------------------------------------------------------- the pool


class Execute(Protocol):
    """A map over jobs of any kind."""

    def __call__(self, function: Callable[[A], R], jobs: Sequence[A], /) -> Iterator[R]:
        """The results, as they finish."""


@contextmanager
def pool(workers: int) -> Iterator[Execute]:
    """A map over jobs, results as they finish; on an exception all workers stop at once."""
    if workers == 1:
        yield map
        return
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker)

    def execute(function: Callable[[A], R], jobs: Sequence[A], /) -> Iterator[R]:
        for future in as_completed([executor.submit(function, job) for job in jobs]):
            yield future.result()

    try:
        yield execute
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    executor.shutdown()


def begin_worker() -> None:
    """What a worker process does first: one thread, no Ctrl-C of its own, an end with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _end_with_the_parent() -> None:
    """Else the workers of a parent that was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# -------------------------------------------------------------------------------------- doing them


def do_missing(
    stage: str,
    jobs: Sequence[J],
    work: Callable[[J], R],
    store: Store[J, R],
    execute: Execute,
    progress: "JobProgress",
) -> None:
    """Do those of the jobs that are not in the store, each key once, begun in the order of the jobs."""
    missing = {job.key: job for job in jobs if job.key not in store.runs}
    progress.start(stage, len(missing), len({job.key for job in jobs}))
    for job, result in execute(partial(_with_job, work), list(missing.values())):
        store.add(job, result)
        progress.done(store.describe(job, result))


def _with_job(work: Callable[[J], R], job: J) -> tuple[J, R]:
    return job, work(job)


class JobProgress:
    """A rich progress bar, or a plain line a job where there is no terminal."""

    def __init__(self, say: Callable[[str], None], bar: Any = None) -> None:
        self.say, self.bar, self.task = say, bar, None
        self.stage, self.count, self.total = "", 0, 0

    def start(self, stage: str, todo: int, total: int) -> None:
        """A stage of ``total`` jobs, of which ``todo`` are left."""
        self.stage, self.count, self.total = stage, 0, todo
        if self.bar is not None:
            self.task = self.bar.add_task(stage, total=todo)
        elif todo < total:
            self.say(f"{stage}: {total - todo} of {total} are already there")

    def done(self, text: str) -> None:
        """One job more."""
        self.count += 1
        if self.bar is not None:
            self.bar.update(self.task, advance=1, description=f"{self.stage}  {text}")
        else:
            self.say(f"[{self.stage} {self.count}/{self.total}] {text}")


@contextmanager
def job_progress(say: Callable[[str], None] | None) -> Iterator[JobProgress]:
    """Progress that calls ``say``, draws a bar, or prints."""
    if say is not None:
        yield JobProgress(say)
        return
    from rich.console import Console

    from learned_opt.progress import progress_bar

    console = Console()
    if not console.is_terminal:
        yield JobProgress(partial(print, flush=True))
        return
    with progress_bar(console) as bar:
        yield JobProgress(bar.console.print, bar)
