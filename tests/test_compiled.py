"""Compiled steps: a trace of one step is the rule at every step, and nothing that goes wrong stops a training."""

import copy
import pickle

import pytest
import torch
from torch import nn

from learned_opt import compiled
from learned_opt.optimizer import NFNOpt
from learned_opt.rules import RULES
from learned_opt.rules.base import UpdateRule
from tests.inferred import infer
from tests.rules.classic import Adam
from tests.states import MODELS, noise_like

STEPS = 13  # roots of second moments are due at steps 1 to 3 and 10


class Scaled(UpdateRule):
    """Gradient descent whose rate is theta over the horizon."""

    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(0.1))

    def init(self, params, symmetry):
        return {n: {"step": torch.zeros(())} for n in params}

    def forward(self, params, grads, state, symmetry, *, total_steps=None, **_):
        return {n: -self.size / total_steps * g for n, g in grads.items()}, state


@pytest.fixture
def graphs(monkeypatch):
    """Calls of every graph that was compiled: by nothing, so that the traces run as they are."""
    calls = []

    def compiled(graph, **_):
        calls.append(0)
        mine = len(calls) - 1

        def run(*inputs):
            calls[mine] += 1
            return graph(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    return calls


def make(kind="mlp", rule=Adam, **options):
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    named, symmetry = model.named_parameters(), infer(model)
    rule = Adam() if rule is Adam else rule
    return model, NFNOpt(named, symmetry=symmetry, rule=rule, **{"total_steps": 20, **options})


def step(model, optimizer, seed, broken=()):
    named = dict(model.named_parameters())
    for n, g in noise_like(named, seed).items():
        named[n].grad = g * torch.nan if n in broken else g
    optimizer.step()


def train(model, optimizer, steps=STEPS):
    for t in range(steps):
        step(model, optimizer, t)
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_alike(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


SOME = [("tanh", "auto_lr", {"total_steps": None}), ("mlp", "whitened_polar", {"lr": torch.tensor(0.5)})]
ALL = [(kind, rule, {}) for kind in MODELS for rule in RULES]


@pytest.mark.parametrize("kind,rule,told", SOME + [pytest.param(*x, marks=pytest.mark.slow) for x in ALL])
def test_a_trace_of_the_second_step_is_every_step(kind, rule, told, graphs):
    theirs, ours = (train(*make(kind, rule, compile=c, weight_decay=0.1, **told)) for c in (False, True))
    assert_alike(ours, theirs)
    assert graphs == [STEPS]  # all but the first, and one to see that it works


@pytest.mark.filterwarnings("ignore:NFNOpt. non-finite")
def test_a_step_unlike_the_others_is_not_compiled(graphs):
    runs = []
    for c in (False, True):
        model, optimizer = make(compile=c)
        for t in range(STEPS):
            step(model, optimizer, t, broken=["0.weight"] if t == 5 else [])
        runs.append(dict(model.named_parameters()))
    assert_alike(*runs)
    assert graphs == [STEPS - 1]


def test_other_gradients_are_compiled_anew_another_theta_and_horizon_are_not(graphs):
    runs = []
    for c in (False, True):
        model, optimizer = make(rule=Scaled(), compile=c)
        train(model, optimizer, 3)
        model[0].weight.requires_grad_(False)
        for t in range(3):
            step(model, optimizer, t)
            model[0].weight.grad = None
        with torch.no_grad():
            optimizer.rule.size.add_(0.1)
        optimizer.param_groups[0]["total_steps"] = 2
        runs.append(train(model, optimizer, 2))
    assert_alike(*runs)
    assert len(graphs) == 2


def test_no_more_than_so_many_graphs_are_compiled(graphs, monkeypatch):
    monkeypatch.setattr(compiled, "MOST", 3)
    model, optimizer = make(compile=True)
    for t in range(2 * compiled.MOST + 4):
        optimizer.param_groups[0]["weight_decay"] = 0.01 * (t // 2)
        step(model, optimizer, t)
    assert len(graphs) == compiled.MOST


@pytest.mark.parametrize("when", ["compiling", "calling"])
def test_where_compilation_fails_training_goes_on_and_one_warning_says_why(when, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", fail if when == "compiling" else lambda *_, **__: fail)
    with pytest.warns(UserWarning, match="no compiler here") as said:
        ours = train(*make(compile=True))
    assert len([w for w in said if "could not be compiled" in str(w.message)]) == 1
    assert_alike(ours, train(*make()))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_compiles_for_itself(copier, graphs):
    model, optimizer = make(compile=True)
    train(model, optimizer, 3)
    both = copier((model, optimizer))
    assert_alike(train(*both), train(model, optimizer))
    assert len(graphs) == 2


@pytest.mark.slow
def test_inductor_computes_the_same():
    torch._dynamo.reset()
    theirs, ours = (train(*make(rule="auto_lr", compile=c)) for c in (False, True))
    assert_alike(ours, theirs)
