"""What holds for every test (one thread, fixed seeds, reproducible examples in CI), and shared fixtures."""

import gc
import logging
import os
import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.nn.modules import module as torch_modules

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

# The first example of a test pays for what torch sets up once, so there is no deadline.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The same global random state for each test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# ------------------------------------------------------------------------------- a stand-in for inference
class Asked(list):
    """The calls ``(model, args, kwargs, training)`` of the stand-in."""

    error: Exception | None = None


@pytest.fixture
def asked(monkeypatch):
    """``infer_symmetry`` replaced by one that knows linear layers: who asks what of it is the test's subject."""
    from learned_opt.symmetry import Leaf, Spec, Symmetry

    calls = Asked()

    def infer_symmetry(model, *args, keywords):
        calls.append((model, args, keywords, [m.training for m in model.modules()]))
        if calls.error is not None:
            raise calls.error
        specs = {
            n: Spec(tuple(Leaf(s) for s in p.shape), ("out", "in", "kernel", "kernel")[: p.ndim])
            for n, p in model.named_parameters()
        }
        return Symmetry(specs, notes=(f"asked about {type(model).__name__}",))

    stand_in = types.ModuleType("learned_opt.symmetry.infer")
    stand_in.infer_symmetry = infer_symmetry

    def infer_called(called):
        with called[0].as_it_ran():
            return infer_symmetry(called[0].module, *called[0].args, keywords=called[0].kwargs)

    stand_in.infer_called = infer_called
    monkeypatch.setitem(sys.modules, "learned_opt.symmetry.infer", stand_in)
    return calls


@pytest.fixture
def no_hook_is_left():
    from learned_opt.recorder import HOOK_WARNING, ForwardRecorder

    yield
    if torch_modules._global_forward_pre_hooks:
        gc.collect()
    assert not torch_modules._global_forward_pre_hooks and not torch_modules._global_forward_hooks
    assert not torch_modules._has_any_global_hook() and not list(ForwardRecorder._waiting)
    assert not [f for f in warnings.filters if getattr(f[1], "pattern", None) == HOOK_WARNING]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="learned_opt")

    def lines(level):
        return [r.getMessage() for r in caplog.records if r.name.startswith("learned_opt") and r.levelno == level]

    return lines
