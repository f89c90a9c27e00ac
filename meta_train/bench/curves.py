"""One run: an ordinary ``torch.optim`` loop, the curve that it gives, and what is measured on curves."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meta_train.bench.optimizers import MakeOptimizer, load_weights
from tasks.task import check_losses

POINTS = 50  # evaluation points of a run of the task's own length
EVAL_BATCHES = 8  # examples of an evaluation, in training batches
CAP = 6  # Adam is run on to CAP times the steps; a speed-up is at most CAP
DIVERGED = 3.0  # a final train loss above DIVERGED x ceiling counts as divergence


@dataclass(frozen=True)
class Curve:
    """What one run measured. ``train`` and ``held_out`` are losses (nats or squared error) at the
    steps ``at``, infinite from divergence on; ``seconds`` is the wall clock of the training steps
    alone, ``cpu_seconds`` their processor time (which other processes on the machine do not
    stretch), ``ran`` how many of them were taken."""

    at: list[int]
    train: list[float]
    held_out: list[float]
    seconds: float
    cpu_seconds: float
    ran: int
    diverged: bool

    @property
    def final_train(self) -> float:
        return self.train[-1]

    @property
    def final_held_out(self) -> float:
        return self.held_out[-1]

    @property
    def best_held_out(self) -> float:
        return min(self.held_out)

    def until(self, steps: int, ceiling: float) -> "Curve":
        """The first ``steps`` steps: what a shorter run would measure (at a constant rate)."""
        n = self.at.index(steps) + 1
        ran = min(self.ran, steps)
        train = self.train[:n]
        part = ran / max(self.ran, 1)
        return Curve(
            at=self.at[:n],
            train=train,
            held_out=self.held_out[:n],
            seconds=part * self.seconds,
            cpu_seconds=part * self.cpu_seconds,
            ran=ran,
            diverged=_bad(train[-1], ceiling),
        )


def run(task: Any, make_optimizer: MakeOptimizer, seed: int, steps: int) -> Curve:
    """Train ``task.model`` for ``steps`` steps with an optimizer, in the loop that users write.

    For a given task and seed the initial weights and the order of the data are the same for every
    optimizer, whatever the number of steps.

    Args:
        task: see ``tasks.task.Task``.
        make_optimizer: ``(model, steps=steps) -> (optimizer, scheduler or None)``.
        seed: of the initial weights and the data.
        steps: how many steps to take; also the optimizer's ``total_steps``.

    Raises:
        TaskError: a measured loss is below zero.
    """
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(task.model).train()
    load_weights(model, task.init(generator))
    optimizer, scheduler = make_optimizer(model, steps=steps)
    params = dict(model.named_parameters())
    evals = evaluation_batches(task)

    at = evaluation_steps(steps, task.steps)
    train, held_out = [], []
    seconds, cpu_seconds, ran, finite = 0.0, 0.0, 0, True
    for previous, now in zip([0, *at], at, strict=False):
        _switch(optimizer, "train")
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(previous, now):
            batch = task.batch(generator)
            optimizer.zero_grad()
            loss = task.loss(params, batch)
            finite = bool(loss.isfinite())
            if not finite:
                break
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            ran += 1
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
        _switch(optimizer, "eval")
        if finite:
            with torch.no_grad():
                measured = [float(task.loss(params, batch)) for batch in evals]
            check_losses(task, torch.tensor(measured, dtype=torch.float64))
            finite = math.isfinite(measured[0])
        if not finite:
            break
        train.append(measured[0])
        held_out.append(measured[1] if math.isfinite(measured[1]) else math.inf)
    missing = [math.inf] * (len(at) - len(train))
    train, held_out = train + missing, held_out + missing
    diverged = _bad(train[-1], task.ceiling)
    return Curve(at, train, held_out, seconds, cpu_seconds, ran, diverged)


def _switch(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Schedule-Free optimizers keep other weights in training than those that are to be measured."""
    getattr(optimizer, mode, lambda: None)()


def evaluation_batches(task: Any) -> list[tuple[Tensor, ...]]:
    """The task's fixed train and held-out batches, cut to evenly spaced examples.

    ``EVAL_BATCHES`` training batches of examples, but 256 at least: all of them would cost several
    times the training where a batch is a few sequences.
    """
    batch_size = len(task.batch(torch.Generator().manual_seed(0))[0])
    most = max(256, EVAL_BATCHES * batch_size)

    def cut(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        n = len(batch[0])
        if n <= most:
            return batch
        rows = torch.arange(most) * n // most
        return tuple(part[rows] for part in batch)

    return [cut(task.train_eval()), cut(task.held_out())]


def evaluation_steps(steps: int, horizon: int) -> list[int]:
    """Steps at which a run is measured: 0, the last, and ``POINTS`` a horizon in between.

    A run beyond ``horizon`` keeps the spacing, so that its beginning has the points of a short run.
    """
    every = max(1.0, min(steps, horizon) / POINTS)
    return sorted({min(steps, round(k * every)) for k in range(math.ceil(steps / every) + 1)})


def _bad(loss: float, ceiling: float) -> bool:
    return not loss <= DIVERGED * ceiling


# ---------------------------------------------------------------------------------------- measures


def speed_up(adam_long: Curve, curve: Curve) -> tuple[float, bool]:
    """``(steps Adam needs to reach curve's final train loss / curve's steps, never reached)``.

    Where Adam never arrives the value is ``CAP``; divergence is 0.
    """
    if curve.diverged:
        return 0.0, False
    step = first_reaching(adam_long, curve.final_train)
    return (float(CAP), True) if step is None else (min(float(CAP), step / curve.at[-1]), False)


def first_reaching(curve: Curve, target: float) -> float | None:
    """The step at which a curve arrives at a train loss, None if it never does.

    The curve is smoothed (median of three points), made a running minimum and interpolated between the points.
    """
    best = np.minimum.accumulate(_median_of_three(np.array(curve.train)))
    reached = np.isfinite(best) & (best <= target)
    if not reached[-1]:
        return None
    k = int(np.argmax(reached))
    if k == 0:
        return float(curve.at[0])
    done = (best[k - 1] - target) / (best[k - 1] - best[k])
    return curve.at[k - 1] + done * (curve.at[k] - curve.at[k - 1])


def reaches(loss: float, target: float) -> bool:
    """Whether a final loss is at or below another; an infinite one never is, though the other diverged too."""
    return math.isfinite(loss) and loss <= target


def horizon_speed_up(losses: Mapping[float, float], target: float) -> float:
    """``1 / r`` for the multiple r of a task's steps that, as its ``total_steps``, take an optimizer to ``target``.

    Args:
        losses: final train loss by the multiple of the steps. Between the shortest run that reaches the target and
            the next shorter one r is interpolated, its logarithm linearly in that of the loss.
        target: the final train loss to reach; infinite if the other diverged, then any finite loss reaches it.

    Returns:
        0 where no run reaches the target, ``1 / r`` of the shortest run where every run does.
    """
    reached = [r for r, loss in losses.items() if reaches(loss, target)]
    if not reached:
        return 0.0
    above = min(reached)
    below = max((r for r in losses if r < above), default=above)
    if below == above or not math.isfinite(losses[below]):
        return 1 / above
    worse, better, wanted = (math.log(max(x, 1e-30)) for x in (losses[below], losses[above], target))
    if worse == better:
        return 1 / above
    done = (worse - wanted) / (worse - better)
    return math.exp(-(math.log(below) + done * (math.log(above) - math.log(below))))


def _median_of_three(x: np.ndarray) -> np.ndarray:
    padded = np.concatenate([x[:1], x, x[-1:]])
    return np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def loss_ratio(adam_final: float, curve: Curve, ceiling: float) -> float:
    """Tuned Adam's final train loss over the optimizer's; above 1 beats Adam, 0 is diverged."""
    if curve.diverged:
        return 0.0
    return min(adam_final, DIVERGED * ceiling) / max(curve.final_train, 1e-30)


def iqm(values: Any, axis: int = 0) -> Any:
    """Interquartile mean: the mean of the middle half."""
    from scipy.stats import trim_mean

    return trim_mean(values, 0.25, axis=axis)


def iqm_interval(strata: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """95 % interval of the IQM over all values, by a percentile bootstrap of the seeds within each task.

    As rliable has it (Agarwal et al. 2021): tasks are not resampled, so it says how the number varies with the seeds
    on these tasks. It is too narrow with few seeds: of 19 simulated tasks with three seeds each it covers the truth
    in about 89 % of cases.

    None with fewer than two seeds on some task, where there is nothing to resample.
    """
    from scipy.stats import bootstrap

    if min(map(len, strata)) < 2:
        return None
    values = np.concatenate([np.asarray(s) for s in strata])
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    interval = bootstrap(
        [np.asarray(s) for s in strata],
        lambda *samples, axis: iqm(np.concatenate(samples, axis=axis), axis=axis),
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
