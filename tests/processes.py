"""Several processes of ``torch.distributed``, for tests: started once, they run one function after the other."""

import gc
import logging
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

PATIENCE = 60  # seconds that ranks wait for each other


class Outcome(NamedTuple):
    """What a rank's call returned, or the text of its error, and what it logged and warned."""

    value: Any
    error: str
    said: str

    def get(self) -> Any:
        assert not self.error, self.error
        return self.value


class Ranks:
    """``ranks(function, *args, count=n)`` calls ``function(rank, *args)`` on n ranks of a gloo group."""

    def __init__(self, most: int = 4, preload: Sequence[str] = ("tests.test_distributed",)) -> None:
        context = multiprocessing.get_context("forkserver")  # what they import is imported once
        context.set_forkserver_preload([*preload, "learned_opt.symmetry.infer"])
        self.pipes, self.processes = [], []
        self.folder = tempfile.TemporaryDirectory()
        self.calls = 0
        for _ in range(most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Any, *args: Any, count: int = 2) -> list[Outcome]:
        self.calls += 1
        store = str(Path(self.folder.name) / str(self.calls))
        for rank, pipe in enumerate(self.pipes[:count]):
            pipe.send((store, rank, count, function, args))
        found = []
        for pipe in self.pipes[:count]:
            assert pipe.poll(2 * PATIENCE), "a rank hangs"
            found.append(Outcome(*pipe.recv()))
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        self.folder.cleanup()


@pytest.fixture(scope="session")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        store, rank, count, function, args = pipe.recv()
        records = _Records()
        logging.getLogger("learned_opt").addHandler(records)
        value, error = None, ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(store, count),
                    rank=rank,
                    world_size=count,
                    timeout=timedelta(seconds=PATIENCE),
                )
                torch.manual_seed(0)
                value = function(rank, *args)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}\n{traceback.format_exc()}"
            gc.unfreeze()
            if dist.is_initialized():
                dist.destroy_process_group()
        logging.getLogger("learned_opt").removeHandler(records)
        pipe.send((value, error, "\n".join(records.texts + [str(w.message) for w in caught])))


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
