"""The processes of a run: this one alone, or those that ``torchrun`` started, on one machine or several.

    torchrun --nproc-per-node 2 -m meta_train train general

Every process makes the estimates it is dealt; one collective per outer step gives all of them to all, and each then
takes the same step. Which process makes an estimate does not change it, so neither does their number change the run.
"""

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
PATIENCE = timedelta(hours=24)
"""How long a process waits for the others; one that dies is noticed at once."""


def under_torchrun() -> bool:
    """Whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class Processes:
    """This process among those of the run.

    Attributes:
        rank: number of this process; 0 writes the files.
        count: how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    def gather(self, mine: T) -> list[T]:
        """What every process passed, in the order of their ranks; ``mine`` itself among it."""
        if self.count == 1:
            return [mine]
        everyone: list[T] = [mine] * self.count
        dist.all_gather_object(everyone, mine)
        everyone[self.rank] = mine
        return everyone

    def from_first(self, make: Callable[[], T]) -> T:
        """``make()`` of process 0; elsewhere a copy of it. An error there is raised everywhere."""
        value: Any = None  # of type T, once it is made or received
        error: Exception | None = None
        if self.rank == 0:
            try:
                value = make()
            except Exception as raised:
                value, error = None, raised
        if self.count > 1:
            sent = [(value, None if error is None else (type(error), error.args))]
            dist.broadcast_object_list(sent, src=0)
            value, failed = sent[0]
            if self.rank and failed is not None:
                raise SystemExit(1)  # process 0 says why
        if error is not None:
            raise error
        return value

    def deal(self, things: Sequence[K], cost: Mapping[K, float]) -> list[K]:
        """Those of ``things`` that are this process's: dearest first, each to whom has least to do so far."""
        load = [0.0] * self.count
        mine = []
        for thing in sorted(things, key=lambda t: -cost.get(t, 1.0)):
            rank = load.index(min(load))
            load[rank] += cost.get(thing, 1.0)
            mine += [thing] if rank == self.rank else []
        return mine


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """The processes of this run; joins those of ``torchrun`` and leaves them at the end."""
    if not under_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
