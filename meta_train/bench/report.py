"""``report.md`` and its pictures, from the ``runs.jsonl`` that :mod:`meta_train.bench.evaluate` writes."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from learned_opt.checkpoint import write_atomically
from meta_train.bench.curves import CAP, iqm, iqm_interval
from meta_train.bench.outcomes import HORIZON_CAP, REFERENCE, Outcome, by_task, of_label, outcomes, ranked
from meta_train.bench.output import duration, table
from meta_train.bench.pictures import draw_curves, draw_profile, draw_seconds, draw_speed_ups
from meta_train.bench.store import Plan, Store
from meta_train.bench.timing import PERIOD, WARM_UP, StepSeconds, TimingStore
from meta_train.errors import UnknownName


def report(folder: Path) -> str:
    """Write ``report.md`` and the pictures ``curves.png``, ``speedups.png``, ``profile.png``, and ``seconds.png`` where
    seconds were measured, into ``folder``; return the Markdown.

    The last plan in ``runs.jsonl`` decides what is shown; of an unfinished one, what is there.

    Raises:
        UnknownName: there is no evaluation in ``folder``, or not one optimizer is finished yet.
    """
    folder = Path(folder)
    store = Store(folder / "runs.jsonl")
    if store.plan is None:
        raise UnknownName(
            f"no evaluation in {folder}: it holds no runs.jsonl, or one without a plan. "
            f"Make one with: python -m meta_train evaluate --out {folder}"
        )
    found = outcomes(store.plan, store.runs, TimingStore(store.path))
    if not found:
        raise UnknownName(
            f"{len(store.runs)} runs in {folder}, but no optimizer has all that its measures need. "
            "Run the same evaluate command again: it goes on where it stopped."
        )
    used = duration(sum(c.cpu_seconds for c in store.runs.values()))
    text = markdown(store.plan, found) + f"\n{len(store.runs)} runs: {used} of processor time in their steps.\n"
    write_atomically(folder / "report.md", text.encode())
    draw_curves(store.plan, found, folder / "curves.png")
    draw_speed_ups(store.plan, found, folder / "speedups.png")
    draw_profile(store.plan, found, folder / "profile.png")
    draw_seconds(store.plan, found, folder / "seconds.png")
    return text


# ------------------------------------------------------------------------------------------ tables


def markdown(plan: Plan, found: Sequence[Outcome]) -> str:
    """The whole report."""
    expected = len(plan.tasks) * len(plan.optimizers) * plan.seeds
    parts = [f"# Evaluation on {plan.suite}", ""]
    if len(found) < expected:
        parts += [
            f"**Incomplete: {len(found)} of {expected} (task, optimizer, seed) are there.**",
            "",
        ]
    parts += [summary_table(plan, found), "", *_data(plan), _legend(plan, found), ""]
    parts += ["## Speed-up per task (median over seeds)", "", speed_up_table(plan, found), ""]
    for label, other in plan.horizon:
        parts += [f"## Horizon speed-up of {label} over {other} (median over seeds)", ""]
        parts += [horizon_table(plan, found, label, other), ""]
    if any(o.seconds for o in found):
        parts += ["## Milliseconds of a training step: data + gradient + optimizer", "", step_table(plan, found), ""]
        parts += [f"## CPU seconds until the optimizer has made its first {WARM_UP} steps", ""]
        parts += [_seconds_table(plan, found, lambda s: f"{s.first:.2f}"), ""]
    parts += ["## Final train loss per task", "", loss_table(plan, found, "final_train"), ""]
    parts += ["## Final held-out loss per task", "", loss_table(plan, found, "final_held_out"), ""]
    parts += ["## Best held-out loss per task", "", loss_table(plan, found, "best_held_out"), ""]
    parts += ["## Learning rates", "", rate_table(plan, found), ""]
    return "\n".join(parts)


def _data(plan: Plan) -> list[str]:
    """A line on the data of those tasks whose data depend on a folder."""
    by_source: dict[str, list[str]] = {}
    for name, task in plan.tasks.items():
        if task.source:
            by_source.setdefault(task.source, []).append(name)
    parts = [f"{source} ({', '.join(names)})" for source, names in by_source.items()]
    return [f"Data: {'; '.join(parts)}.", ""] if parts else []


def summary_table(plan: Plan, found: Sequence[Outcome]) -> str:
    """One row an optimizer, the fastest first; interquartile means over task x seed."""
    header = ["optimizer", "tuned", "speed-up [95 %]", "loss ratio [95 %]", "held-out final"]
    header += ["held-out best", "diverged", "time per step"]
    opponents = list(dict.fromkeys(other for _, other in plan.horizon))
    header += [f"horizon speed-up over {other}" for other in opponents]
    timed = any(o.seconds for o in found)
    header += ["time speed-up", *(f"time speed-up over {other}" for other in opponents)] if timed else []
    rows = []
    for label in ranked(plan, found):
        mine = of_label(found, label)
        tuned = "learning rate" if plan.optimizers[label].grid else "no"
        row = [label, tuned]
        row += [_iqm_text(mine, lambda o: o.speed_up, CAP), _iqm_text(mine, lambda o: o.loss_ratio)]
        row += [
            _against_adam(found, mine, "final_held_out"),
            _against_adam(found, mine, "best_held_out"),
        ]
        row += [f"{sum(o.curve.diverged for o in mine)} of {len(mine)}", _time_ratio(found, mine)]
        for other in opponents:
            there = all(other in o.horizon_speed_ups for o in mine)
            row += [_iqm_text(mine, partial(_horizon, other), HORIZON_CAP) if there else "-"]
        if timed:
            row += [_iqm_text(mine, _time_speed_up) if all(o.time_speed_up is not None for o in mine) else "-"]
        for other in opponents if timed else ():
            there = all(other in o.time_speed_ups for o in mine)
            row += [_iqm_text(mine, partial(_time, other)) if there else "-"]
        rows.append(row)
    return table(header, rows)


def _horizon(opponent: str, outcome: Outcome) -> float:
    return outcome.horizon_speed_ups[opponent]


def _time(opponent: str, outcome: Outcome) -> float:
    return outcome.time_speed_ups[opponent]


def _time_speed_up(outcome: Outcome) -> float:
    assert outcome.time_speed_up is not None  # asked for where it is there
    return outcome.time_speed_up


_TIME = (
    "Time speed-up: CPU seconds, on one thread, of Adam's steps to the optimizer's final train loss over those of the "
    "optimizer's run (a lower bound where the speed-up has a plus). Over another: CPU seconds of the other's run over "
    "those that the optimizer needs to its final train loss: its horizon speed-up, times the other's seconds of a "
    "training step, over its own. Below 1 the optimizer is slower. Seconds of a step are means over whole multiples of "
    f"{PERIOD} steps, which all optimizers made in turns, in one process; the first {WARM_UP} steps are reported apart."
)


def _legend(plan: Plan, found: Sequence[Outcome]) -> str:
    lines = [
        f"Interquartile means over task x seed ({len(plan.tasks)} tasks, {plan.seeds} seeds), with "
        "95 % bootstrap intervals that resample seeds within tasks, not tasks (with three seeds a task they "
        "cover about 89 %). Speed-up: steps that LR-tuned "
        "constant-rate Adam needs to reach the optimizer's final train loss, over the optimizer's "
        f"own steps; {CAP}+ if Adam does not get there in {CAP} times the steps; 0 if it diverged. "
        "Loss ratio: tuned Adam's final train loss over the optimizer's. Held-out: the same ratio "
        "of held-out losses, at the end and at the best point of the run (above 1 beats Adam). "
        "Time per step: processor time of a training step (data, gradient, optimizer; one thread) "
        "over Adam's, median over tasks.",
        *([_TIME] if any(o.seconds for o in found) else []),
        f"Tuned: by the mean final train loss of the first {plan.tuning_seeds} of these seeds.",
    ]
    if any(o.shared for o in plan.optimizers.values()):
        lines.append("@all: one learning rate for all tasks, with the least mean of the logarithm of that loss.")
    if plan.horizon:
        lines.append(
            "Horizon speed-up: 1/r for the multiple r of the steps with which the optimizer, given that `total_steps`, "
            "ends at the other's final train loss, interpolated between the horizons that were run; below 1 where "
            "it needs longer than the other, 0 if twice as long is not enough. Of one without `total_steps`: where "
            f"its curve first has that loss. {HORIZON_CAP:g}+ if the shortest run is enough, as it is where the other "
            "diverged and none of its own did; 0 where both did."
        )
    return "\n".join(lines)


def speed_up_table(plan: Plan, found: Sequence[Outcome]) -> str:
    """Median over seeds; the cap with a plus where most seeds are at it."""

    def cell(mine: Sequence[Outcome]) -> str:
        value = float(np.median([o.speed_up for o in mine]))
        reached_cap = sum(o.capped for o in mine) * 2 > len(mine)
        return f"{CAP}+" if reached_cap else f"{value:.2f}"

    return _task_table(plan, found, cell)


def horizon_table(plan: Plan, found: Sequence[Outcome], label: str, other: str) -> str:
    """Medians over seeds, of one optimizer over another: in steps, in time, and where it is slower in time."""
    over = [o for o in found if o.optimizer == label and other in o.horizon_speed_ups]
    timed = [o for o in over if other in o.time_speed_ups]
    rows, slower = [["in steps"], ["in time"]], []
    for task in plan.tasks:
        steps = [o.horizon_speed_ups[other] for o in over if o.task == task]
        times = [o.time_speed_ups[other] for o in timed if o.task == task]
        rows[0].append(_number(float(np.median(steps)), HORIZON_CAP) if steps else "-")
        rows[1].append(f"{np.median(times):.2f}" if times else "-")
        slower += [task] if times and np.median(times) < 1 else []
    text = table([label, *plan.tasks], rows if timed else rows[:1])
    if timed:
        text += f"\n\nIn time slower than {other} on: {', '.join(slower) or 'no task'}."
    return text


def step_table(plan: Plan, found: Sequence[Outcome]) -> str:
    """Milliseconds of the three parts of a training step, and the spread of their sum."""

    def cell(s: StepSeconds) -> str:
        parts = " + ".join(f"{1e3 * x:.3g}" for x in (s.data, s.gradient, s.step))
        return f"{parts} (± {1e3 * s.spread:.2g})"

    return _seconds_table(plan, found, cell) + f"\n\n±: standard deviation of the sum over periods of {PERIOD} steps."


def _seconds_table(plan: Plan, found: Sequence[Outcome], text: Callable[[StepSeconds], str]) -> str:
    def cell(mine: Sequence[Outcome]) -> str:
        return "-" if mine[0].seconds is None else text(mine[0].seconds)

    return _task_table(plan, found, cell)


def loss_table(plan: Plan, found: Sequence[Outcome], measure: str) -> str:
    """Median over seeds of ``measure`` (a property of Curve)."""

    def cell(mine: Sequence[Outcome]) -> str:
        value = float(np.median([getattr(o.curve, measure) for o in mine]))
        return f"{value:.4g}" if math.isfinite(value) else "diverged"

    return _task_table(plan, found, cell)


def rate_table(plan: Plan, found: Sequence[Outcome]) -> str:
    """The rates chosen; a star where it is an end of the grid: a better one may lie outside."""
    tuned = [label for label in plan.optimizers if plan.optimizers[label].grid]

    def cell(mine: Sequence[Outcome]) -> str:
        return f"{mine[0].lr:g}" + (" *" if mine[0].at_edge else "")

    stars = any(o.at_edge for o in found)
    note = "\n\n`*`: an end of the grid; a better rate may lie outside it." if stars else ""
    return _task_table(plan, found, cell, tuned) + note


def _task_table(
    plan: Plan,
    found: Sequence[Outcome],
    cell: Callable[[Sequence[Outcome]], str],
    labels: Sequence[str] | None = None,
) -> str:
    rows = []
    for label in ranked(plan, found):
        if labels is None or label in labels:
            cells = [[o for o in of_label(found, label) if o.task == task] for task in plan.tasks]
            rows.append([label, *(cell(mine) if mine else "-" for mine in cells)])
    return table(["optimizer", *plan.tasks], rows)


def _number(value: float, cap: float | None) -> str:
    return f"{cap:g}+" if cap is not None and value >= cap else f"{value:.2f}"


def _iqm_text(mine: Sequence[Outcome], measure: Callable[[Outcome], float], cap: float | None = None) -> str:
    strata = by_task(mine, measure)
    value = iqm(np.concatenate(strata))
    text = _number(value, cap)
    interval = iqm_interval(strata)
    return text if interval is None else f"{text} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _against_adam(found: Sequence[Outcome], mine: Sequence[Outcome], measure: str) -> str:
    adam = {(o.task, o.seed): getattr(o.curve, measure) for o in of_label(found, REFERENCE)}
    ratios = []
    for outcome in mine:
        reference, value = adam[outcome.task, outcome.seed], getattr(outcome.curve, measure)
        ratios.append(0.0 if math.isinf(value) else reference / max(value, 1e-30))
    return f"{iqm(ratios):.2f}"


def _step_seconds(outs: Sequence[Outcome], task: str, interleaved: bool) -> float:
    own = [o for o in outs if o.task == task]
    if interleaved and own[0].seconds is not None:
        return own[0].seconds.whole
    return float(np.median([o.curve.cpu_seconds / max(o.curve.ran, 1) for o in own]))


def _time_ratio(found: Sequence[Outcome], mine: Sequence[Outcome]) -> str:
    adam = of_label(found, REFERENCE)
    tasks = {o.task for o in mine}
    timed = all(o.seconds for o in (*mine, *adam))
    ratios = [_step_seconds(mine, t, timed) / max(_step_seconds(adam, t, timed), 1e-12) for t in tasks]
    return f"{np.median(ratios):.1f}x"
