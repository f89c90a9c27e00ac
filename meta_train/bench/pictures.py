"""The pictures of an evaluation."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meta_train.bench.curves import CAP, iqm, iqm_interval
from meta_train.bench.outcomes import REFERENCE, Outcome, by_task, of_label, ranked
from meta_train.bench.output import COLOURS, new_figure, write_figure
from meta_train.bench.store import Plan


def draw_curves(plan: Plan, found: Sequence[Outcome], path: Path) -> None:
    """One panel a task: train loss solid, held-out dashed, bands from least to largest seed; one line a colour."""
    tasks = [task for task in plan.tasks if any(o.task == task for o in found)]
    figure, axes = _panels(tasks, 3.6)
    colours = colours_of(plan, found)
    for axis, task in zip(axes, tasks, strict=True):
        for label, colour in colours.items():
            curves = [o.curve for o in of_label(found, label) if o.task == task]
            if curves:
                _draw_seeds(axis, curves, colour)
        axis.set_yscale("log")
        axis.set_ylim(
            *_limits([o.curve for o in found if o.task == task and o.optimizer in colours], plan.tasks[task].ceiling)
        )
        axis.set_title(task)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.25)
    _legend_above(figure, colours, len(tasks), {"train": "-", "held-out": "--"})
    write_figure(figure, path)


def _panels(tasks: Sequence[str], height: float):
    """A figure, and an empty panel for each task."""
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = new_figure(5 * columns, height * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    return figure, list(axes.flat[: len(tasks)])


def _legend_above(figure, colours: Mapping[str, str], panels: int, styles: Mapping[str, Any] | None = None) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, label=label) for label, c in colours.items()]
    handles += [Line2D([], [], color="grey", linestyle=style, label=n) for n, style in (styles or {}).items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 3 * min(3, panels)))


def draw_seconds(plan: Plan, found: Sequence[Outcome], path: Path) -> bool:
    """One panel a task: train loss against the CPU seconds spent, bands from least to largest seed.

    False, and no picture, where no seconds were measured.
    """
    timed = [o for o in found if o.seconds is not None]
    tasks = [task for task in plan.tasks if any(o.task == task for o in timed)]
    if not tasks:
        return False
    figure, axes = _panels(tasks, 3.6)
    colours = colours_of(plan, found)
    for axis, task in zip(axes, tasks, strict=True):
        shown = [o for o in timed if o.task == task and o.optimizer in colours]
        for label, colour in colours.items():
            mine = [o for o in shown if o.optimizer == label]
            if mine and mine[0].seconds is not None:
                _draw_seeds(axis, [o.curve for o in mine], colour, mine[0].seconds.whole, ("train",))
        axis.set_yscale("log")
        axis.set_ylim(*_limits([o.curve for o in shown], plan.tasks[task].ceiling))
        axis.set_xlim(left=0)
        axis.set_title(task)
        axis.set_xlabel("CPU seconds of training, one thread")
        axis.set_ylabel("train loss")
        axis.grid(alpha=0.25)
    _legend_above(figure, colours, len(tasks))
    write_figure(figure, path)
    return True


STYLES = {"train": "-", "held_out": "--"}


def _draw_seeds(axis, curves, colour: str, per_step: float = 1.0, measures: Sequence[str] = tuple(STYLES)) -> None:
    """Lines of measures of the curves; a step is ``per_step`` long on the axis."""
    at = per_step * np.array(curves[0].at)
    for measure in measures:
        values = np.array([getattr(curve, measure) for curve in curves], dtype=float)
        values[~np.isfinite(values)] = np.nan  # a diverged run ends where it diverged
        there = ~np.isnan(values).any(axis=0)
        steps, values = at[there], values[:, there]
        if not len(steps):
            continue
        width = 1.8 if measure == "train" else 1.1
        axis.plot(steps, np.median(values, axis=0), STYLES[measure], color=colour, linewidth=width)
        if len(curves) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _limits(curves, ceiling: float) -> tuple[float, float]:
    """Of the loss axis: a run that blows up must not flatten all others."""
    values = np.array([x for c in curves for x in (*c.train, *c.held_out)], dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    low = float(values.min()) if len(values) else ceiling / 10
    high = min(float(values.max()) if len(values) else ceiling, 3 * ceiling)
    return 0.8 * low, 1.25 * max(high, 1.01 * low)


def draw_speed_ups(plan: Plan, found: Sequence[Outcome], path: Path) -> None:
    """A bar an optimizer: IQM of the speed-up, its interval, and a dot a task (median of seeds)."""
    labels = ranked(plan, found)[::-1]
    figure = new_figure(7.5, 0.45 * len(labels) + 1.4)
    axis = figure.subplots()
    colours = colours_of(plan, found)
    for row, label in enumerate(labels):
        strata = by_task(of_label(found, label), lambda o: o.speed_up)
        value, interval = iqm(np.concatenate(strata)), iqm_interval(strata)
        axis.barh(row, value, color=colours.get(label, "lightgrey"), height=0.62, alpha=0.8)
        if interval is not None:
            spread = [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
            axis.errorbar(value, row, xerr=spread, color="black", capsize=3, linewidth=1)
        dots = [np.median(s) for s in strata]
        axis.plot(dots, [row] * len(dots), "o", color="white", markeredgecolor="black", markersize=4.5)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    tuned = [f"{label} (tuned)" if plan.optimizers[label].grid else label for label in labels]
    axis.set_yticks(range(len(labels)), tuned)
    ticks = range(CAP + 1)
    axis.set_xticks(ticks, [f"{CAP}+" if k == CAP else str(k) for k in ticks])
    axis.set_xlim(0, CAP + 0.15)
    axis.set_xlabel("speed-up over LR-tuned Adam (bar: IQM and 95 % interval, dots: tasks)")
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    write_figure(figure, path)


def draw_profile(plan: Plan, found: Sequence[Outcome], path: Path) -> None:
    """Performance profiles (Dolan and More 2002; Dahl et al. 2023, AlgoPerf, section 4.2), a line an optimizer: the
    fraction of tasks whose speed-up (left), ratio of best held-out losses (right), median of seeds, is at least x."""
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    adam = {(o.task, o.seed): o.curve.best_held_out for o in of_label(found, REFERENCE)}

    def held_out(o: Outcome) -> float:
        return adam[o.task, o.seed] / max(o.curve.best_held_out, 1e-30)

    for axis, measure in ((left, lambda o: o.speed_up), (right, held_out)):
        for label, colour in colours_of(plan, found).items():
            medians = np.sort([np.median(s) for s in by_task(of_label(found, label), measure)])
            share = 1 - np.arange(len(medians) + 1) / len(medians)
            axis.step([0, *medians, medians[-1]], [1, *share], where="pre", color=colour, label=label)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.25)
    left.set_xlim(0, CAP)
    left.set_ylabel("fraction of tasks")
    left.set_xlabel(f"speed-up over LR-tuned Adam at least (cap {CAP})")
    right.set_xlim(0.5, 2)
    right.set_xlabel("best held-out loss: LR-tuned Adam's over its own, at least")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper")
    write_figure(figure, path)


def colours_of(plan: Plan, found: Sequence[Outcome]) -> dict[str, str]:
    """Of the labels that have lines of their own in pictures: the fastest and Adam, not with one rate for all tasks."""
    shown = [label for label in ranked(plan, found) if not plan.optimizers[label].shared]
    if REFERENCE in shown[len(COLOURS) :]:
        shown[len(COLOURS) - 1] = REFERENCE
    return dict(zip(shown, COLOURS, strict=False))
