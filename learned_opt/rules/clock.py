"""The schedule of the expensive parts of a step: step counts are known numbers, or under ``vmap`` one per run."""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from learned_opt.rules.auto_lr import Number

EVERY_MOMENTS, EVERY_FRAME, EVERY_ROOTS = 5, 10, 10  # steps; in the first three always
EVERY_SLOPE, SLOPES_LATER = 5, 51  # the slope is read every few steps, at every one of the first
LATER = 1.2  # after ROOTS_LATER steps, roots are taken anew when the run is this much longer
ROOTS_LATER = 50

Due = bool | Tensor


class Clock:
    """Which expensive parts of a step to compute now: each property is True, False, or a bool tensor, one per run.

    Args:
        t: the network's step, counted from 1 (0-d).
        step: of every tensor.
        moving: those of the tensors that move, which say what is due.
        ages: the values of ``t`` and ``moving``, if they are known; in a batch of runs, those of all.
    """

    def __init__(self, t: Tensor, step: Tensor, moving: Tensor, ages: Collection[int] | None) -> None:
        if ages is None:
            try:
                ages = {int(t), *map(int, moving.tolist())}
            except RuntimeError:  # in a batch there is no single value
                ages = None
        self.t, self.ages = t, ages
        self._moving = moving
        self._apart = ages is not None and len(ages) > 1 and _is_batch(t)
        self.now: Number = t if ages is None or self._apart else float(max(ages))  # the network's step
        self.age: Number = float(min(ages)) if ages is not None and len(ages) == 1 else step  # of every tensor

    def ages_of(self, counts: list[int]) -> Sequence[Number]:
        """Of the tensors of every batch: one number where all have the same, else those of each."""
        return [self.age] * len(counts) if isinstance(self.age, float) else self.age.split(counts)

    def _known(self, due: Callable[[int], bool]) -> bool | None:
        """Whether something is due at any of these ages; None: runs of a batch differ, or nothing is known of them."""
        if self.ages is None:
            return None
        found = [due(t) for t in self.ages]
        return None if self._apart and any(found) and not all(found) else any(found)

    def _due(self, every: int) -> Due:
        known = self._known(lambda t: t <= 3 or t % every == 0)
        if known is not None:
            return known
        t = torch.cat([self.t[None], self._moving])
        return ((t <= 3) | (t % every == 0)).any()

    @property
    def frame(self) -> Due:
        """Frame, and sizes of weights."""
        return self._due(EVERY_FRAME)

    @property
    def moments(self) -> Due:
        """Second moments."""
        return self._due(EVERY_MOMENTS)

    @property
    def roots(self) -> Due:
        """Roots of second moments: every ten steps, and more and more rarely after 50."""
        known = self._known(_roots_are_due)
        if known is not None:
            return known
        t = torch.cat([self.t[None], self._moving])
        stage, before = (
            torch.floor(torch.log(x.clamp(min=1) / ROOTS_LATER) / math.log(LATER) + 1e-6) for x in (t, t - 1)
        )
        due = (t <= 3) | ((t % EVERY_ROOTS == 0) & (t <= ROOTS_LATER)) | ((t > ROOTS_LATER) & (stage > before))
        return due.any()

    @property
    def slope(self) -> Due:
        """The slope along the last step: at every step first, then every few."""
        return self._slope(0)

    @property
    def before_slope(self) -> Due:
        """Whether the next step reads this one's update."""
        return self._slope(1)

    def _slope(self, ahead: int) -> Due:
        if self.ages is not None and not self._apart:
            now = max(self.ages) + ahead
            return now <= SLOPES_LATER or now % EVERY_SLOPE == 0
        t = self.t + ahead
        return (t <= SLOPES_LATER) | (t % EVERY_SLOPE == 0)

    def between(self, low: Number, high: Number) -> Due:
        """Whether the network's step is above ``low`` and at most ``high``."""
        if self.ages is not None and not self._apart and not isinstance(low, Tensor):
            return low < max(self.ages) <= high
        return (self.t > low) & (self.t <= high)


def _is_batch(t: Tensor) -> bool:
    """Whether a 0-d tensor has one value for each run of a batch (``torch.func.vmap``)."""
    try:
        int(t)
    except RuntimeError:
        return True
    return False


def _roots_are_due(t: int) -> bool:
    if t <= ROOTS_LATER:
        return t <= 3 or t % EVERY_ROOTS == 0
    stage = [math.floor(math.log(x / ROOTS_LATER) / math.log(LATER) + 1e-6) for x in (t, t - 1)]
    return stage[0] > stage[1]


def when(due: Due, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where it is due, else ``old``."""
    if isinstance(due, bool):
        return new if due else old
    return torch.where(due, new, old)
