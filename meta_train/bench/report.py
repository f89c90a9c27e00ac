"""Tables and pictures from ``runs.jsonl``, the file that :mod:`meta_train.bench.evaluate` writes, and the curve of a
meta-training from its ``log.jsonl``."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from meta_train import jsonl
from meta_train.bench.curves import CAP, iqm, iqm_interval
from meta_train.bench.evaluate import HORIZON_CAP, REFERENCE, Outcome, outcomes
from meta_train.bench.optimizers import UnknownName
from meta_train.bench.store import Plan, Store

# Okabe and Ito's colours, which colour-blind readers tell apart too; without yellow (too light).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")


def report(folder: Path) -> str:
    """Write ``report.md``, ``curves.png``, ``speedups.png``, ``profile.png`` into ``folder``; return the Markdown.

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
    found = outcomes(store.plan, store.runs)
    if not found:
        raise UnknownName(
            f"{len(store.runs)} runs in {folder}, but no optimizer has all that its measures need. "
            "Run the same evaluate command again: it goes on where it stopped."
        )
    hours = sum(c.cpu_seconds for c in store.runs.values()) / 3600
    text = (
        markdown(store.plan, found) + f"\n{len(store.runs)} runs: {hours:.1f} hours of processor time in their steps.\n"
    )
    _write(folder / "report.md", lambda temporary: temporary.write_text(text))
    draw_curves(store.plan, found, folder / "curves.png")
    draw_speed_ups(store.plan, found, folder / "speedups.png")
    draw_profile(store.plan, found, folder / "profile.png")
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
    parts += [summary_table(plan, found), "", _legend(plan), ""]
    parts += ["## Speed-up per task (median over seeds)", "", speed_up_table(plan, found), ""]
    for label, other in plan.horizon:
        parts += [f"## Horizon speed-up of {label} over {other} (median over seeds)", ""]
        parts += [horizon_table(plan, found, label, other), ""]
    parts += ["## Final train loss per task", "", loss_table(plan, found, "final_train"), ""]
    parts += ["## Final held-out loss per task", "", loss_table(plan, found, "final_held_out"), ""]
    parts += ["## Best held-out loss per task", "", loss_table(plan, found, "best_held_out"), ""]
    parts += ["## Learning rates", "", rate_table(plan, found), ""]
    return "\n".join(parts)


def summary_table(plan: Plan, found: Sequence[Outcome]) -> str:
    """One row an optimizer, the fastest first; interquartile means over task x seed."""
    header = ["optimizer", "tuned", "speed-up [95 %]", "loss ratio [95 %]", "held-out final"]
    header += ["held-out best", "diverged", "time per step"]
    opponents = list(dict.fromkeys(other for _, other in plan.horizon))
    header += [f"horizon speed-up over {other}" for other in opponents]
    rows = []
    for label in _ranked(plan, found):
        mine = _of(found, label)
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
        rows.append(row)
    return table(header, rows)


def _horizon(opponent: str, outcome: Outcome) -> float:
    return outcome.horizon_speed_ups[opponent]


def _legend(plan: Plan) -> str:
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
        f"Tuned: by the mean final train loss of the first {plan.tuning_seeds} of these seeds.",
    ]
    if any(o.shared for o in plan.optimizers.values()):
        lines.append("@all: one learning rate for all tasks, with the least mean of the logarithm of that loss.")
    if plan.horizon:
        lines.append(
            "Horizon speed-up: 1/r for the multiple r of the steps with which the optimizer, told that horizon, "
            "ends at the other's final train loss, interpolated between the horizons that were run; below 1 where "
            "it needs longer than the other, 0 if twice as long is not enough. Of one that is not told: where "
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
    """Median over seeds, of one optimizer over another."""
    over = [o for o in found if o.optimizer == label and other in o.horizon_speed_ups]

    def cell(mine: Sequence[Outcome]) -> str:
        return _number(float(np.median([o.horizon_speed_ups[other] for o in mine])), HORIZON_CAP)

    return _task_table(plan, over, cell, [label])


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
    for label in _ranked(plan, found):
        if labels is None or label in labels:
            cells = [[o for o in _of(found, label) if o.task == task] for task in plan.tasks]
            rows.append([label, *(cell(mine) if mine else "-" for mine in cells)])
    return table(["optimizer", *plan.tasks], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded so that it also reads as plain text."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _of(found: Sequence[Outcome], label: str) -> list[Outcome]:
    return [o for o in found if o.optimizer == label]


def _ranked(plan: Plan, found: Sequence[Outcome]) -> list[str]:
    """Labels that have outcomes, by falling speed-up, then loss ratio."""

    def rank(label: str) -> tuple[float, float]:
        mine = _of(found, label)
        return -iqm([o.speed_up for o in mine]), -iqm([o.loss_ratio for o in mine])

    return sorted((label for label in plan.optimizers if _of(found, label)), key=rank)


def _strata(mine: Sequence[Outcome], measure: Callable[[Outcome], float]) -> list[list[float]]:
    by_task: dict[str, list[float]] = {}
    for outcome in mine:
        by_task.setdefault(outcome.task, []).append(measure(outcome))
    return list(by_task.values())


def _number(value: float, cap: float | None) -> str:
    return f"{cap:g}+" if cap is not None and value >= cap else f"{value:.2f}"


def _iqm_text(mine: Sequence[Outcome], measure: Callable[[Outcome], float], cap: float | None = None) -> str:
    strata = _strata(mine, measure)
    value = iqm(np.concatenate(strata))
    text = _number(value, cap)
    interval = iqm_interval(strata)
    return text if interval is None else f"{text} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _against_adam(found: Sequence[Outcome], mine: Sequence[Outcome], measure: str) -> str:
    adam = {(o.task, o.seed): getattr(o.curve, measure) for o in _of(found, REFERENCE)}
    ratios = []
    for outcome in mine:
        reference, value = adam[outcome.task, outcome.seed], getattr(outcome.curve, measure)
        ratios.append(0.0 if math.isinf(value) else reference / max(value, 1e-30))
    return f"{iqm(ratios):.2f}"


def _step_seconds(outs: Sequence[Outcome], task: str) -> float:
    return float(np.median([o.curve.cpu_seconds / max(o.curve.ran, 1) for o in outs if o.task == task]))


def _time_ratio(found: Sequence[Outcome], mine: Sequence[Outcome]) -> str:
    adam = _of(found, REFERENCE)
    tasks = {o.task for o in mine}
    ratios = [_step_seconds(mine, t) / max(_step_seconds(adam, t), 1e-12) for t in tasks]
    return f"{np.median(ratios):.1f}x"


# ---------------------------------------------------------------------------------------- pictures


def draw_curves(plan: Plan, found: Sequence[Outcome], path: Path) -> None:
    """One panel a task: train loss solid, held-out dashed, bands from least to largest seed; one line a colour."""
    from matplotlib.lines import Line2D

    tasks = [task for task in plan.tasks if any(o.task == task for o in found)]
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = _figure(5 * columns, 3.6 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    colours = _colours(plan, found)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for label, colour in colours.items():
            curves = [o.curve for o in _of(found, label) if o.task == task]
            if curves:
                _draw_seeds(axis, curves, colour, label)
        axis.set_yscale("log")
        axis.set_ylim(
            *_limits([o.curve for o in found if o.task == task and o.optimizer in colours], plan.tasks[task].ceiling)
        )
        axis.set_title(task)
        axis.set_xlabel("step")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.25)
    handles = [Line2D([], [], color=c, label=label) for label, c in colours.items()]
    handles += [
        Line2D([], [], color="grey", linestyle="-", label="train"),
        Line2D([], [], color="grey", linestyle="--", label="held-out"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 3 * columns))
    _write(path, lambda temporary: figure.savefig(temporary, dpi=100))


def _draw_seeds(axis, curves, colour: str, label: str) -> None:
    at = curves[0].at
    for measure, style in (("train", "-"), ("held_out", "--")):
        values = np.array([getattr(curve, measure) for curve in curves], dtype=float)
        values[~np.isfinite(values)] = np.nan  # a diverged run ends where it diverged
        there = ~np.isnan(values).any(axis=0)
        steps, values = np.array(at)[there], values[:, there]
        if not len(steps):
            continue
        width = 1.8 if measure == "train" else 1.1
        axis.plot(steps, np.median(values, axis=0), style, color=colour, linewidth=width)
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
    labels = _ranked(plan, found)[::-1]
    figure = _figure(7.5, 0.45 * len(labels) + 1.4)
    axis = figure.subplots()
    colours = _colours(plan, found)
    for row, label in enumerate(labels):
        strata = _strata(_of(found, label), lambda o: o.speed_up)
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
    _write(path, lambda temporary: figure.savefig(temporary, dpi=100))


def draw_profile(plan: Plan, found: Sequence[Outcome], path: Path) -> None:
    """Performance profiles (Dolan and More 2002; Dahl et al. 2023, AlgoPerf, section 4.2), a line an optimizer: the
    fraction of tasks whose speed-up (left), ratio of best held-out losses (right), median of seeds, is at least x."""
    figure = _figure(11, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    adam = {(o.task, o.seed): o.curve.best_held_out for o in _of(found, REFERENCE)}

    def held_out(o: Outcome) -> float:
        return adam[o.task, o.seed] / max(o.curve.best_held_out, 1e-30)

    for axis, measure in ((left, lambda o: o.speed_up), (right, held_out)):
        for label, colour in _colours(plan, found).items():
            medians = np.sort([np.median(s) for s in _strata(_of(found, label), measure)])
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
    _write(path, lambda temporary: figure.savefig(temporary, dpi=100))


def draw_training(folder: Path) -> bool:
    """Draw ``training.png`` from ``log.jsonl``: meta-loss by outer step, families, running mean, validation.

    False if the log has no outer step with a finite loss yet.
    """
    lines = [line for line in jsonl.read(folder / "log.jsonl") if "step" in line]
    steps = [line for line in lines if line.get("loss") is not None]
    if not steps:
        return False
    figure = _figure(7.5, 4.2)
    axis = figure.subplots()
    families = sorted({k for line in steps for k in line if k.startswith("loss/")})
    for k, family in enumerate(families):
        there = [line for line in steps if line.get(family) is not None]
        colour, name = COLOURS[k % len(COLOURS)], family.removeprefix("loss/")
        mark = ".x"[k // len(COLOURS) % 2]
        axis.plot([x["step"] for x in there], [x[family] for x in there], mark, color=colour, label=name)
    losses, width = np.array([line["loss"] for line in steps]), max(1, len(steps) // 10)
    mean = np.convolve(losses, np.ones(width) / width, "valid")
    axis.plot([x["step"] for x in steps][width - 1 :], mean, color="black", label=f"mean of {width} steps")
    checks = [line for line in lines if line.get("validation") is not None]
    if checks:
        axis.plot([x["step"] for x in checks], [x["validation"] for x in checks], "k--", label="validation")
    axis.set_xlabel("outer step")
    axis.set_ylabel("meta-loss")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right upper")
    _write(folder / "training.png", lambda temporary: figure.savefig(temporary, dpi=100))
    return True


def _colours(plan: Plan, found: Sequence[Outcome]) -> dict[str, str]:
    """Of the labels that have lines of their own in pictures: the fastest and Adam, not with one rate for all tasks."""
    shown = [label for label in _ranked(plan, found) if not plan.optimizers[label].shared]
    if REFERENCE in shown[len(COLOURS) :]:
        shown[len(COLOURS) - 1] = REFERENCE
    return dict(zip(shown, COLOURS, strict=False))


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # not pyplot: no global state, no display (Agg)

    return Figure(figsize=(width, height), layout="constrained")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    write(temporary)
    os.replace(temporary, path)
