"""``bench step``: what is counted, what is held, who steps when, and what the table says of it."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn

from meta_train.__main__ import main
from meta_train.bench import step
from meta_train.bench.optimizers import hidden_matrices
from meta_train.bench.step import CASES, Case, StepCost, bench_step, memory, operations_per_step, table
from meta_train.errors import UnknownName, UsageError


def tiny():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return model, torch.randn(8, 3), lambda out, g: (out - torch.randn(8, 2, generator=g)).square().mean()


class Counting(torch.optim.SGD):
    """Calls one operation a step, and five in every second step."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        for _ in range(5 if self.calls % 2 == 0 else 1):
            torch.zeros(3)


class Greedy(torch.optim.SGD):
    """Keeps 1000 bytes from its first step on, and 4000 more while it steps."""

    kept = None

    def step(self, closure=None):
        if self.kept is None:
            self.kept = torch.zeros(1000, dtype=torch.uint8)
        torch.zeros(4000, dtype=torch.uint8)


def parameters(count=250):
    p = nn.Parameter(torch.zeros(count))
    p.grad = torch.ones(count)
    return [p]


def test_operations_are_a_mean_over_steps():
    assert operations_per_step(Counting(parameters()), 4) == 3


def test_memory_is_what_was_allocated_and_not_freed():
    assert memory(lambda: Greedy(parameters(), 0.1)) == (1000 + 2 * 1000, 5000 + 2 * 1000)  # with weights and gradients
    given = parameters()
    assert memory(lambda: Greedy(given, 0.1)) == (1000, 5000)
    assert memory(lambda: torch.optim.SGD(given, 0.1, foreach=False)) == (0, 0)
    held, peak = memory(lambda: torch.optim.Adam(given, foreach=False))
    assert held == 2 * 1000 + 4 and peak > held  # two moments, and the number of steps


def test_gradients_of_large_cases_are_drawn_once():
    model, x, _ = tiny()
    case = Case("tiny", tiny, large=True)
    training = step.Training(case, model, x, None, lambda m: torch.optim.SGD(m.parameters(), 1.0))
    before = [p.detach().clone() for p in training.model.parameters()]
    gradients = [p.grad.clone() for p in training.model.parameters()]
    for _ in range(2):
        training()
    for p, start, gradient in zip(training.model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p, start - 2 * gradient)
    assert all(p.grad is None for p in model.parameters())


def test_optimizers_take_turns_on_copies_of_one_network(monkeypatch):
    log = []

    def logged(name):
        class Logged(torch.optim.SGD):
            def step(self, closure=None):
                log.append((name, float(self.param_groups[0]["params"][0].detach().sum())))
                super().step(closure)

        return lambda model: Logged(model.parameters(), 0.1)

    names = ("a", "b")
    monkeypatch.setattr(step, "makers", lambda case, model, x, names: {n: logged(n) for n in names})
    monkeypatch.setattr(step, "operations_per_step", lambda optimizer, steps: 7.0)
    monkeypatch.setattr(step, "memory", lambda make: (26 * 2, 26 * 3))
    weights, costs = step.measure(Case("tiny", tiny), names, 50, lambda text: None)
    assert weights == 26 and list(costs) == ["a", "b"]
    turns = ["".join(n for n, _ in log[k : k + 5]) for k in range(0, len(log), 5)]
    assert turns[:6] == ["aaaaa", "bbbbb", "bbbbb", "aaaaa", "aaaaa", "bbbbb"] and len(turns) == 2 * 11
    assert [w for n, w in log if n == "a"] == [w for n, w in log if n == "b"]  # each trained its own copy
    assert all((c.operations, c.held, c.peak) == (7, 2, 3) and c.step > 0 and c.gradient > 0 for c in costs.values())


def cost(milliseconds, gradient=0.002):
    return StepCost(milliseconds / 1e3, 1e-5, gradient, 12.0, 8.0, 12.5)


def shown(case, costs, width=100):
    console = Console(width=width)
    with console.capture() as text:
        console.print(table(case, 1234, costs))
    return text.get()


def test_the_table_relates_each_optimizer_to_three():
    costs = {"adamw": cost(2), "muon": cost(4), "soap": cost(8), "nfnopt": cost(6, gradient=0.004)}
    text = shown(Case("Tiny", tiny), costs)
    (row,) = (line.split() for line in text.splitlines() if "nfnopt" in line)
    # 6 ms over 2, 4 and 8 ms; 4 + 6 ms over 2 + 2 ms
    assert row == ["nfnopt", "6", "±", "0.01", "3.00", "1.50", "0.75", "2.50", "12", "8.0", "12.5"]
    assert "Tiny (1,234 weights)" in text and max(map(len, text.splitlines())) <= 100
    alone = shown(Case("Tiny", tiny, single=True), {"nfnopt": cost(6)})
    (row,) = (line.split() for line in alone.splitlines() if "nfnopt" in line)
    assert row[4:8] == ["-", "-", "-", "-"]
    assert max(map(len, shown(Case("Tiny", tiny), costs, width=80).splitlines())) <= 80


def test_the_command_measures_what_is_asked_for_and_writes_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CASES, "tiny", Case("Tiny", tiny))
    main(["bench", "step", "--only", "tiny", "--optimizers", "adamw", "muon,nfnopt", "--out", str(tmp_path / "a.json")])
    said = capsys.readouterr().out
    assert "Tiny (26 weights)" in said and "torch.optim.AdamW" in said
    written = json.loads((tmp_path / "a.json").read_text())
    assert list(written["cases"]) == ["tiny"] and written["cases"]["tiny"]["weights"] == 26
    costs = written["cases"]["tiny"]["optimizers"]
    assert list(costs) == ["adamw", "muon", "nfnopt"]
    assert costs["adamw"]["held"] == pytest.approx((26 * 8 + 4 * 4) / 26)  # two moments; a count for each of 4 tensors


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(UnknownName, match="unknown case gpt-3. Valid: mlp-small, mlp, gpt, matrix-1024"):
        bench_step(only=["gpt-3"])
    with pytest.raises(UnknownName, match="unknown optimizer 'adamm'"):
        bench_step(only=["mlp"], optimizers=["adamm"])
    for wrong in (0, 70):
        with pytest.raises(UsageError, match="must be"):
            bench_step(only=["mlp"], steps=wrong)


@pytest.mark.parametrize("name, weights", [("mlp-small", 26_122), ("mlp", 1_025_450), ("gpt", 3_323_648)])
def test_networks_have_the_sizes_that_their_names_say(name, weights):
    model, x, loss = CASES[name].make()
    assert sum(p.numel() for p in model.parameters()) == weights
    generator = torch.Generator().manual_seed(0)
    first, second = (loss(model(x), generator) for _ in range(2))
    first.backward()
    assert all(p.grad is not None for p in model.parameters()) and first != second


def test_a_tied_head_is_no_hidden_matrix():
    model, _, _ = step._gpt(11, 8, 2, 1, (2, 4), tied=True)
    inside = {f"blocks.0.{n}.weight" for n in ("attn.q", "attn.k", "attn.v", "attn.proj", "fc1", "fc2")}
    assert hidden_matrices(model) == inside
