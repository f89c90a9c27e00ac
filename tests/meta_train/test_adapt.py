"""Learning on a user's tasks: the verdict on tasks that were not learned from."""

import json

import pytest
import torch
from torch import nn

from learned_opt import NFNOpt
from learned_opt.checkpoint import load_weights
from learned_opt.rules import RULES
from meta_train.__main__ import main
from meta_train.adapt import Verdict, adapt, verdict_of
from meta_train.errors import UsageError
from meta_train.search import RULE, Result, Search
from tasks.task import Problem, mean_squared_error

FILE = """
from tests.meta_train.test_adapt import FAMILIES as families
"""


def sample(generator, count):
    x = torch.rand(count, 3, generator=generator)
    return x, x.square().sum(1, keepdim=True)


MODEL = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))


def squares(generator):
    def build():
        for layer in (MODEL[0], MODEL[2]):
            layer.reset_parameters()
        return MODEL

    return Problem(
        "squares", build, sample, lambda model, x, y: mean_squared_error(model(x), y), batch_size=16, steps=20
    )


FAMILIES = {"squares": squares}
TINY = Search(tasks=3, copies=4, runs=2)


def test_only_an_interval_below_zero_is_called_better():
    assert "Better than the default" in str(Verdict(-0.1, -0.2, -0.01, -0.1))
    assert "NOT shown" in str(Verdict(-0.1, -0.25, 0.05, -0.1))


def test_a_verdict_is_of_pairs_of_runs():
    each = ([0.0, 0.0, -0.1 + k, -0.3 + k] for k in (0.0, 0.02, -0.02))
    results = [Result("a", 10, [], train, [0.0, 0.0, 0.1, 0.1], 1.0) for train in each]
    verdict = verdict_of(results)
    assert (verdict.change, verdict.held_out) == pytest.approx((-0.2, 0.1))
    assert verdict.low < -0.2 < verdict.high and verdict.better


def test_what_changes_nothing_is_not_called_better():
    assert not verdict_of([Result("a", 10, [], [0.0] * 4, [0.0] * 4, 1.0)] * 3).better


def test_what_cannot_be_learned_from_is_refused(tmp_path):
    for families, minutes, workers, match in (
        ({}, 1.0, 1, "families"),
        ({"squares": 3}, 1.0, 1, "functions by name"),
        (FAMILIES, 0.0, 1, "positive time"),
        (FAMILIES, float("inf"), 1, "positive time"),
        (FAMILIES, 1.0, 0, "one worker"),
        (FAMILIES, 1.0, 2, "from a file"),
    ):
        with pytest.raises(UsageError, match=match):
            adapt(families, tmp_path, minutes, workers=workers)
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    for file, match in ((empty, "needs families"), (tmp_path / "none.py", "no file")):
        with pytest.raises(SystemExit, match=match):
            main(["adapt", str(file), "--out", str(tmp_path / "out")])


def test_a_run_is_not_gone_on_with_by_another_plan(tmp_path):
    plan = {"minutes": 20.0, "workers": 1, "search": repr(Search()), "families": ["squares", ""]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    other = {"cubes": squares}
    for families, minutes, search in (
        (FAMILIES, 5.0, Search()),
        (FAMILIES, 20.0, Search(seed=1)),
        (other, 20.0, Search()),
    ):
        with pytest.raises(UsageError, match="begun otherwise"):
            adapt(families, tmp_path, minutes, search)
    for broken in ("{", '{"minutes": 20.0, "seed": 0, "outer_steps": 9}'):
        (tmp_path / "plan.json").write_text(broken)
        with pytest.raises(UsageError, match="no plan of this version"):
            adapt(FAMILIES, tmp_path, 20.0)


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    adapt(FAMILIES, tmp_path / "whole", 1e-6, TINY, say=lambda text: None)

    def interrupt(text):
        if "round 2 of 3" in text and "2/3]" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(FAMILIES, tmp_path / "parts", 1e-6, TINY, say=interrupt)
    assert not (tmp_path / "parts" / "theta.safetensors").exists()
    said = []
    adapt(FAMILIES, tmp_path / "parts", 1e-6, TINY, say=said.append)
    assert "round 2 of 3: 2 of 3 are already there" in said
    whole, parts = (load_weights(tmp_path / k / "theta.safetensors")[1] for k in ("whole", "parts"))
    assert whole["tensor_controls.weight"].any() and all(torch.equal(whole[n], parts[n]) for n in whole)
    assert (tmp_path / "whole" / "verdict.json").read_text() == (tmp_path / "parts" / "verdict.json").read_text()


def test_there_are_as_many_rounds_as_there_is_time_for(tmp_path, monkeypatch):
    asked = []

    def searched(search, rounds_for, *rest):
        asked.append([rounds_for(took) for took in (1.0, 5.0, 1e3)])
        return (0.0,) * len(search.places(RULES[RULE]()))

    monkeypatch.setattr("meta_train.adapt.searched", searched)
    for minutes in (0.2, 1.0):
        verdict = adapt(FAMILIES, tmp_path / str(minutes), minutes, TINY, say=lambda text: None)
    (few, fewer, least), (many, more, least_too) = asked
    assert many > few > least == least_too and more > fewer
    assert not verdict.better and not (tmp_path / "1.0" / "runs.jsonl").exists()  # nothing found: nothing to judge


def test_tasks_are_judged_at_their_own_length_and_of_every_family(tmp_path, monkeypatch):
    monkeypatch.setattr("meta_train.adapt.searched", lambda search, *rest: (0.1,) * 11)
    drawn = []
    families = {f"{k:02}": lambda g, k=k: drawn.append(k) or squares(g) for k in range(14)}
    adapt(families, tmp_path, 1.0, Search(horizon=(5, 9)), say=lambda text: None)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert sorted(drawn) == list(range(14)) and {r["steps"] for r in runs} == {20}


def test_what_was_learned_is_a_rule_of_the_optimizer(tmp_path):
    adapt(FAMILIES, tmp_path, 1e-6, TINY, say=lambda text: None)
    optimizer = NFNOpt(MODEL, rule=tmp_path / "theta.safetensors", total_steps=20)
    assert optimizer.rule.tensor_controls.weight.any()


@pytest.mark.slow
def test_the_command_learns_and_judges_with_any_number_of_workers(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    for workers in ("1", "2"):
        main(["adapt", str(file), "--minutes", "1e-6", "--workers", workers, "--out", str(tmp_path / workers)])
        said = capsys.readouterr().out
        assert "Better than the default" in said or "NOT shown" in said
    one, two = (load_weights(tmp_path / k / "theta.safetensors")[1] for k in ("1", "2"))
    assert all(torch.equal(one[n], two[n]) for n in one)
