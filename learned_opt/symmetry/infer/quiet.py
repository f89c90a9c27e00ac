"""Looking at a model without a trace: no output of torch's, no random number drawn."""

import logging
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.export._trace as torch_trace
from torch import nn

from learned_opt.symmetry.lock import EXPORT_LOCK


@contextmanager
def silent() -> Iterator[None]:
    """torch says nothing in this thread: no log lines, no warnings, no graph of an export that failed.

    What goes wrong is in the exception.
    """
    thread = threading.get_ident()
    names = ["torch", *(n for n in list(logging.root.manager.loggerDict) if n.startswith("torch."))]
    handlers = {h for n in names for h in logging.getLogger(n).handlers}

    def others(_: logging.LogRecord) -> bool:
        return threading.get_ident() != thread

    for handler in handlers:
        handler.addFilter(others)
    vars(torch_trace)["print"] = lambda *_, **__: None  # the graph goes to stderr by `print`
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        vars(torch_trace).pop("print", None)
        for handler in handlers:
            handler.removeFilter(others)


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """The generators of Python, NumPy and torch, and those that the model's modules hold, are afterwards as before.

    Inside, the global ones start from fixed seeds: nothing depends on the caller's noise. One thread at a time.
    """
    with EXPORT_LOCK, _same_random_numbers(model):
        yield


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    owned = [x for m in model.modules() for x in vars(m).values() if isinstance(x, _GENERATORS)]
    states = [_state(x) for x in owned]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for x, state in zip(owned, states, strict=True):
                _restore(x, state)


_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def _state(x: Any) -> Any:
    if isinstance(x, random.Random):
        return x.getstate()
    return x.bit_generator.state if isinstance(x, np.random.Generator) else x.get_state()


def _restore(x: Any, state: Any) -> None:
    if isinstance(x, random.Random):
        x.setstate(state)
    elif isinstance(x, np.random.Generator):
        x.bit_generator.state = state
    else:
        x.set_state(state)
