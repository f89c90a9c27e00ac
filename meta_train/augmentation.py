"""Reparametrised tasks: the same function from other weights, so that a rule meets more scales than the tasks have.

units    the initial weights are moved by a random element of the network's own symmetry: its hidden units are
         permuted, rescaled and flipped. An equivariant rule cannot tell the difference.
global   the network sees ``s w`` for its weights ``w``, which start at ``w0 / s``: one ``s`` per task. Of Celo and
         VeLO (Metz et al. 2022), whose rules meet scales of 1e-3 to 1e3 in this way.
"""

from typing import Any

import torch
from torch import Generator, Tensor

from meta_train.symmetries import symmetry_of
from tasks.task import Batch, Task, Weights, log_uniform

AUGMENTATIONS = ("none", "units", "global")


def augmented(task: Task, kind: str, largest: float, generator: Generator) -> Task:
    """The task reparametrised; scales are log-uniform in ``[1 / largest, largest]``.

    Args:
        task: any task.
        kind: one of :data:`AUGMENTATIONS`.
        largest: at least 1.
        generator: of the task's own scale ("global"); those of the units are drawn with every run's initial weights.
    """
    if kind == "units":
        return UnitsMoved(task, largest)
    if kind == "global":
        return Rescaled(task, log_uniform(generator, 1 / largest, largest))
    return task


class _Same:
    """All of a task, to be overridden in part."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        if name == "task":  # not there yet while it is copied
            raise AttributeError(name)
        return getattr(self.task, name)


class UnitsMoved(_Same):
    """A task whose initial weights are moved by a random element of its model's symmetry."""

    def __init__(self, task: Task, largest: float) -> None:
        super().__init__(task)
        self.largest = largest

    def init(self, generator: Generator) -> Weights:
        """Fresh initial weights of the same function that the task's own have."""
        weights = self.task.init(generator)
        own = torch.Generator().set_state(generator.get_state())  # the data that follow are those of the task itself
        g = symmetry_of(self.task).sample(
            own, scale_range=(1 / self.largest, self.largest), dtype=next(iter(weights.values())).dtype
        )
        return symmetry_of(self.task).act(g, weights)


class Rescaled(_Same):
    """A task in the weights ``w / scale``."""

    def __init__(self, task: Task, scale: float) -> None:
        super().__init__(task)
        self.scale = scale

    def init(self, generator: Generator) -> Weights:
        """Fresh initial weights, over ``scale``."""
        return {n: w / self.scale for n, w in self.task.init(generator).items()}

    def loss(self, params: Weights, batch: Batch) -> Tensor:
        """The task's loss at ``scale`` times the weights."""
        return self.task.loss({n: self.scale * w for n, w in params.items()}, batch)
