"""Whole runs with several thetas from the same weights, with the same batches: what a change of theta is worth."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from meta_train.unroll import Unroll


class Ends(NamedTuple):
    """Logs of losses ``[copies, runs]`` at the end of runs, relative to the task's ceiling.

    Attributes:
        train: mean over the last tenth of the training batches.
        held_out: of the last weights.
    """

    train: Tensor
    held_out: Tensor


@torch.no_grad()
def paired_ends(
    unroll: Unroll, theta: Mapping[str, Tensor], copies: int, steps: int, generator: torch.Generator
) -> Ends:
    """How runs end.

    Args:
        unroll: the task and the rule. Losses count as its ``transform`` says, which should be "log".
        theta: of every run: tensors ``[copies * runs, ...]``, the first copy of all runs first. The copies of a run
            have the same weights and batches.
        copies: of every run.
        steps: of every run.
        generator: of weights and batches.
    """
    count = len(next(iter(theta.values())))
    particles = unroll.init(count, generator, copies=copies, common=True)
    after, trace = unroll(theta, particles, steps, generator, copies=copies, batched=True, resets=False)
    held_out = tuple(b.expand(count, *b.shape) for b in unroll.task.held_out())
    ends = trace.loss[-max(1, steps // 10) :].mean(0), unroll.losses(after["params"], held_out)
    return Ends(*(x.view(copies, -1) for x in ends))
