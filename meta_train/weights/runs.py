"""A grid of (method, dataset, seed) jobs -> measures -> a table and a picture.

Every finished job is one line of ``runs.jsonl``. A job that is there is never done again, so an interrupted grid goes
on where it stopped, and a larger one pays only for what is new.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from learned_opt.checkpoint import digest, write_atomically
from meta_train.bench import jobs
from meta_train.bench.jobs import do_missing, job_progress, pool, short_hash
from meta_train.bench.output import COLOURS, new_figure, table, write_figure
from meta_train.errors import UnknownName, UsageError, at_least_one
from tasks.zoo.zoo import Zoo

Measures = dict[str, float]
Published = Mapping[tuple[str, str], float | str]  # (method, dataset) -> the paper's number


@dataclass(frozen=True)
class Grid:
    """The options that all experiments have.

    Attributes:
        out: folder of runs.jsonl, table.md, table.json and the picture; the same command goes on where it stopped.
        seeds: runs of every method on every dataset.
        methods: what to compare, by name; all if not given.
        datasets: on what, by name; all if not given.
        workers: processes, each with one thread.
        device: cpu or cuda.
    """

    out: Path
    seeds: int = 3
    methods: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    workers: int = 1
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        at_least_one(seeds=self.seeds, workers=self.workers)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: this machine has no GPU that PyTorch can use. Leave it out.")

    def choose(self, methods: Sequence[str], datasets: Sequence[str]) -> tuple[list[str], list[str]]:
        """The chosen methods and datasets, of those there are, in the order of these.

        Raises:
            UnknownName: one that is not there.
        """
        return _chosen("method", self.methods, methods), _chosen("dataset", self.datasets, datasets)


def _chosen(what: str, asked: Sequence[str], known: Sequence[str]) -> list[str]:
    names = [part for name in asked for part in name.split(",") if part]
    wrong = [n for n in names if n not in known]
    if wrong:
        raise UnknownName(f"unknown {what} {', '.join(wrong)}; there are {', '.join(known)}")
    return [n for n in known if n in names or not names]


# ------------------------------------------------------------------------------------------ jobs
@dataclass(frozen=True)
class Job:
    """One run. ``settings`` is plain data that the result depends on besides the names (epochs, zoo, ...)."""

    method: str
    dataset: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells jobs apart."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Run:
    """A finished job: its measures, and the processor time in seconds."""

    job: Job
    measures: Measures
    seconds: float


def zoo_digest(zoo: Zoo) -> str:
    """A short hash of a zoo for the settings of its jobs: results of another zoo are other results."""
    tensors = {f"weights.{name}": x for name, x in zoo.weights.items()}
    tensors |= {f"split.{name}": x for name, x in zoo.splits.items()} | {"targets": zoo.targets}
    columns = json.dumps({name: list(column) for name, column in zoo.columns.items()}, sort_keys=True)
    return short_hash(f"{digest(tensors)} {columns}")


class Store(jobs.Store[Job, Run]):
    """``runs.jsonl`` of a grid: one line a finished run; measures that are not finite are null."""

    holds = "of a grid of weight-space runs"

    def take(self, record: dict[str, Any]) -> None:
        """A run."""
        measures = {n: math.nan if x is None else x for n, x in record["measures"].items()}
        run = Run(Job(**record["job"]), measures, record["seconds"])
        self.runs[run.job.key] = run

    def record(self, job: Job, result: Run) -> dict[str, Any]:
        """Its line."""
        measures = {n: x if math.isfinite(x) else None for n, x in result.measures.items()}
        return {"job": asdict(job), "measures": measures, "seconds": round(result.seconds, 2)}

    def describe(self, job: Job, result: Run) -> str:
        """Method, dataset, seed and measures."""
        measured = "  ".join(f"{n} {x:.4g}" for n, x in result.measures.items())
        return f"{job.method}  {job.dataset}  seed {job.seed}  {measured}  ({result.seconds:.1f} s)"


def run_grid(
    jobs: Sequence[Job],
    work: Callable[[Job], Measures],
    path: Path,
    *,
    workers: int = 1,
    say: Callable[[str], None] | None = None,
) -> list[Run]:
    """Do all jobs that are not in ``path`` yet.

    Args:
        jobs: what there is to do, in order.
        work: does one; with several workers a function of a module, or ``functools.partial`` of one.
        path: the ``runs.jsonl``.
        workers: processes with one thread each, which end with this one; 1 works in this process.
        say: gets one line a finished job; None for a progress bar, or lines when there is no TTY.

    Returns:
        The runs of ``jobs``, in order.

    Raises:
        UsageError: there are no jobs.
    """
    if not jobs:
        raise UsageError("there is nothing to run: no method that is chosen has a dataset that is left.")
    store = Store(path)
    left = len({job.key for job in jobs} - store.runs.keys())
    with pool(max(1, min(workers, left))) as execute, job_progress(say) as progress:
        do_missing("runs", jobs, partial(_do, work), store, execute, progress)
    return [store.runs[job.key] for job in jobs]


def _do(work: Callable[[Job], Measures], job: Job) -> Run:
    began = time.process_time()
    measures = work(job)
    return Run(job, measures, time.process_time() - began)


# ------------------------------------------------------------------------------------------ table and picture
@dataclass(frozen=True)
class Cell:
    """Mean and standard error over seeds of one measure; ``error`` is None for a single run."""

    mean: float
    error: float | None
    seeds: int
    seconds: float

    @classmethod
    def of(cls, runs: Sequence[Run], measure: str) -> "Cell":
        """Of the runs of one method on one dataset."""
        values = [run.measures[measure] for run in runs]
        n, mean = len(values), sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
        return cls(mean, spread, n, sum(run.seconds for run in runs) / n)

    def text(self, digits: int) -> str:
        """``mean +- standard error``."""
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


def cells(runs: Iterable[Run], measure: str) -> dict[tuple[str, str], Cell]:
    """(method, dataset) -> its cell."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.job.method, run.job.dataset), []).append(run)
    return {key: Cell.of(group, measure) for key, group in groups.items()}


def _order(found: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Methods and datasets in the order of their first appearance."""
    keys = list(found)
    return list(dict.fromkeys(m for m, _ in keys)), list(dict.fromkeys(d for _, d in keys))


def markdown(
    found: Mapping[tuple[str, str], Cell],
    published: Published,
    *,
    digits: int = 3,
    titles: Mapping[str, str] | None = None,
) -> str:
    """One row per method, one column per dataset (by its title); published numbers in brackets."""
    methods, datasets = _order(found)
    heads = [(titles or {}).get(d, d) for d in datasets]
    rows = []
    for m in methods:
        cells_ = [found[m, d].text(digits) if (m, d) in found else "-" for d in datasets]
        theirs = [f" ({published[m, d]})" if (m, d) in published else "" for d in datasets]
        rows.append([m, *(a + b for a, b in zip(cells_, theirs, strict=True))])
    return table(["", *heads], rows)


def write_results(
    out: Path,
    runs: Sequence[Run],
    measure: str,
    *,
    title: str,
    note: str = "",
    published: Published | None = None,
    digits: int = 3,
    titles: Mapping[str, str] | None = None,
    about: Mapping[str, Any] | None = None,
    name: str = "table",
) -> str:
    """Write ``table.md`` and ``table.json`` into ``out``; returns the Markdown.

    Args:
        out: the folder.
        runs: finished runs.
        measure: which of their measures.
        title: heading of the table.
        note: a paragraph under it (what the numbers are, and where the published ones come from).
        published: numbers to put beside.
        digits: after the point.
        titles: how datasets are called in the heading, where not by their names.
        about: plain data for the JSON (settings, commit).
        name: of the files.

    Raises:
        UsageError: there are no runs; files that are there stay.
    """
    if not runs:
        raise UsageError(f"there are no runs to report in {out} with these options.")
    published = published or {}
    found = cells(runs, measure)
    text = (
        f"# {title}\n\n"
        + (f"{note}\n\n" if note else "")
        + markdown(found, published, digits=digits, titles=titles)
        + "\n"
    )
    rows = [
        {"method": m, "dataset": d, "measure": measure, **asdict(cell), "published": published.get((m, d))}
        for (m, d), cell in found.items()
    ]
    write_atomically(out / f"{name}.md", text.encode())
    write_atomically(out / f"{name}.json", json.dumps({"about": dict(about or {}), "cells": rows}, indent=1).encode())
    return text


def draw(
    path: Path,
    found: Mapping[tuple[str, str], Cell],
    published: Published | None = None,
    *,
    label: str,
    lines: bool = False,
    title: str = "",
    titles: Mapping[str, str] | None = None,
) -> None:
    """Write a picture: a group of bars per dataset, or (``lines``) a line per method over the datasets in order.

    Error bars are standard errors; published numbers are hollow marks in the method's colour.
    """
    published = published or {}
    methods, datasets = _order(found)
    figure = new_figure(max(6.5, 1.3 * len(datasets) + 3), 3.6)
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for k, m in enumerate(methods):
        shift = 0.0 if lines else (k - (len(methods) - 1) / 2) * width
        at = [(i + shift, found[m, d]) for i, d in enumerate(datasets) if (m, d) in found]
        x, y, error = [a for a, _ in at], [c.mean for _, c in at], [c.error or 0.0 for _, c in at]
        if lines:
            axes.errorbar(x, y, error, marker="o", capsize=2, label=m, color=COLOURS[k % len(COLOURS)])
        else:
            axes.bar(x, y, width, yerr=error, capsize=2, label=m, color=COLOURS[k % len(COLOURS)])
        theirs = [(i + shift, published[m, d]) for i, d in enumerate(datasets) if (m, d) in published]
        marks = [(a, float(v)) for a, v in theirs if not isinstance(v, str)]
        if marks:
            axes.plot(*zip(*marks, strict=True), "o", markerfacecolor="none", markeredgecolor=COLOURS[k % len(COLOURS)])
    axes.set_xticks(range(len(datasets)), [(titles or {}).get(d, d).replace(", ", "\n", 1) for d in datasets])
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")  # outside: it would cover bars
    write_figure(figure, path, dpi=120)
