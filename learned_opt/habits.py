"""Warnings of what is right with other optimizers: their learning rates, and schedules beside the rule's own."""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_OURS = tuple(f"{Path(str(at)).parent}{os.sep}" for at in (__file__, torch.__file__))


def warn(text: str) -> None:
    """A warning that points at the line of the user, not at torch's or at one of ours."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def warn_of_habit(lr: float | Tensor) -> None:
    """Warn of a learning rate as of other optimizers, where a rule sets its own, which ``lr`` multiplies."""
    if 0 < float(lr) < 0.03:
        warn(
            f"NFNOpt: lr={float(lr):g} multiplies the rate that the rule sets itself, so steps are {1 / float(lr):.3g} "
            "times shorter than it measures. Leave lr out (it is 1)."
        )


class ScheduleWatch:
    """Warns once of a run beyond its ``total_steps``, and where ``lr`` falls though these already let the rate end.

    A warm-up, which only rises, is no such schedule; nor is a rate that was low from the start.

    Args:
        outlasted: the horizon that a run was said to be beyond.
    """

    def __init__(self, outlasted: float | None = None) -> None:
        self.outlasted = outlasted
        self._highest: dict[int, float] = {}  # by group
        self._told = False

    def see(self, groups: Sequence[Mapping[str, Any]], step: int) -> None:
        """Look at a step, and at its rates (of those that are on a GPU at none: that would wait for it)."""
        total = groups[0]["total_steps"]
        if not total:
            return
        if step >= float(total) + 1 and self.outlasted != float(total):
            self.outlasted = float(total)
            warn(
                f"NFNOpt: step {step}, but total_steps={float(total):g}: the schedule has ended, and weights stay "
                "where they are. Pass the number of optimizer steps, epochs times batches."
            )
        if self._told:
            return
        for i, group in enumerate(groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                continue
            highest = self._highest[i] = max(float(lr), self._highest.get(i, 0.0))
            if float(lr) < 0.99 * highest and not self._told:
                self._told = True
                warn(
                    f"NFNOpt: lr has fallen from {highest:g} to {float(lr):g} (a learning rate scheduler?), and "
                    f"total_steps={float(total):g} already lets the rate decay to zero: their product decays too fast. "
                    "Leave lr constant (lr_scheduler_type='constant' in a Trainer of transformers), "
                    "or leave total_steps out."
                )
