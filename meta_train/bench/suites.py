"""Suites of tasks by name, and what identifies a task."""

import copy
import difflib
import importlib
import inspect
import runpy
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from meta_train.bench.jobs import short_hash
from meta_train.errors import UnknownName, UsageError


def suite_named(name: str, data: str | None = None) -> Mapping[str, Callable[[], Any]]:
    """A suite of ``tasks.suites`` by its name alone, or a dict of functions that make tasks: ``package.module:DICT`` or
    ``path/to/file.py:DICT``.

    Some tasks of ``SEEN`` take their data from the folder ``data``.

    Raises:
        UnknownName: there is no such suite; the message lists those there are.
        UsageError: it is no dict of such functions, or there is no such folder.
    """
    module, _, attribute = name.rpartition(":")
    if module:
        try:
            found = _of_file(module)[attribute] if module.endswith(".py") else _of_module(module, attribute)
        except (ModuleNotFoundError, AttributeError, FileNotFoundError, KeyError) as error:
            raise UnknownName(f"no suite {name!r}: {error}. {_valid()}") from None
        if not (isinstance(found, Mapping) and all(map(_makes, found.values()))):
            raise UsageError(f"{name} is no suite: it must be a dict of functions without arguments, each of a task.")
        return found
    from tasks import suites

    if name not in suites.SUITES:
        raise UnknownName(f"unknown suite {name!r}. {_valid(name)}")
    if name != "SEEN":
        return suites.SUITES[name]
    try:
        return suites.seen(data)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None


@lru_cache(maxsize=8)
def _of_file(path: str) -> dict[str, Any]:
    return runpy.run_path(path)


def _of_module(module: str, attribute: str) -> Any:
    return getattr(importlib.import_module(module), attribute)


def _valid(name: str = "") -> str:
    from tasks import suites

    near = difflib.get_close_matches(name.upper(), suites.SUITES, 1)
    guess = f"Did you mean {near[0]}? " if near else ""
    return f"{guess}Valid suites: {', '.join(suites.SUITES)}, package.module:DICT or FILE.py:DICT."


def _makes(value: Any) -> bool:
    """Whether it can be called without arguments, unlike the families of a recipe."""
    try:
        inspect.signature(value).bind()
    except TypeError:
        return False
    return True


def source_of(suite: str, name: str, data: str | None = None) -> str:
    """What the data of a task are called, where they depend on the data folder; else an empty text."""
    from tasks import suites

    return suites.source_of(name, data) if suite == "SEEN" else ""


@lru_cache(maxsize=64)
def task_named(suite: str, name: str, data: str | None = None, steps: int | None = None) -> Any:
    """Build a task of a suite; ``steps`` replaces its own horizon."""
    table = suite_named(suite, data)
    if name not in table:
        raise UnknownName(f"unknown task {name!r} in {suite}. Valid tasks: {', '.join(table)}.")
    try:
        task = table[name]()
    except FileNotFoundError as error:  # of the data folder
        raise UsageError(f"{name}: {error}") from None
    if steps is not None:
        task = copy.copy(task)
        task.steps = steps
    return task


def task_fingerprint(task: Any) -> str:
    """Hash of the model, its initial weights, the data, their loss and the horizon of a task.

    The loss tells one code from another. Of it three digits and of each tensor four rounded numbers, so that another
    processor, which rounds logarithms and sines another way, takes this one's runs for what they are.
    """
    generator = torch.Generator().manual_seed(0)
    weights = task.init(generator)
    tensors = dict(weights)
    batches = {"batch": task.batch(generator), "train": task.train_eval(), "held": task.held_out()}
    for name, batch in batches.items():
        tensors |= {f"{name}.{k}": tensor for k, tensor in enumerate(batch)}
    seen = [f"{name} {tuple(x.shape)} {x.dtype} {_glimpse(x)}" for name, x in sorted(tensors.items())]
    with torch.no_grad():
        loss = float(task.loss(weights, batches["train"]))
    return short_hash(task.model, task.steps, f"{task.ceiling:.6g}", f"{loss:.2e}", *seen)


def _glimpse(x: torch.Tensor) -> str:
    """The norm, and over it the sum and two weighted sums, which tell one order of the entries from another."""
    x = x.detach().double().flatten()
    norm = torch.linalg.vector_norm(x)
    at = torch.arange(1, len(x) + 1, dtype=torch.float64)
    sums = [(x * wave).sum() / norm for wave in (torch.ones_like(at), torch.cos(at), torch.sin(at.square()))]
    return " ".join([f"{norm:.4e}", *(f"{s:.3f}" for s in sums)]) if norm > 0 else "0"
