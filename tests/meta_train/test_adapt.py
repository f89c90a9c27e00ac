"""Learning on a user's tasks: the verdict on tasks that were not learned from."""

import json

import pytest
import torch
from torch import nn

from learned_opt.rules import RULES
from learned_opt.rules.learned import CONTROLS, FEATURES
from meta_train.__main__ import main
from meta_train.adapt import Verdict, adapt, judge
from meta_train.errors import UsageError
from meta_train.recipes import adapted, fresh_rule
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
TOO_SHORT = torch.zeros(len(CONTROLS), len(FEATURES) + 8)  # steps
TOO_SHORT[0, :4] = -9.0


def verdict_of(theta, tasks=3):
    recipe = adapted(FAMILIES, 4)
    rule = fresh_rule(recipe, RULES)
    return judge(recipe, rule, dict(rule.named_parameters()) | theta, FAMILIES, tasks)


def test_the_hand_made_rule_is_no_better_than_itself():
    verdict = verdict_of({})
    assert (verdict.change, verdict.held_out) == pytest.approx((0.0, 0.0), abs=1e-3)  # but for rounding


def test_steps_that_are_much_too_short_are_not_better():
    verdict = verdict_of({"tensor_controls.weight": TOO_SHORT})
    assert verdict.change > 0.1 and verdict.low < verdict.change < verdict.high
    assert not verdict.better


def test_only_an_interval_below_zero_is_called_better():
    assert "Better than the default" in str(Verdict(-0.1, -0.2, -0.01, -0.1))
    assert "NOT shown" in str(Verdict(-0.1, -0.25, 0.05, -0.1))


def test_nothing_to_learn_from_is_refused(tmp_path):
    with pytest.raises(UsageError, match="families"):
        adapt({}, tmp_path, 1.0)
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(SystemExit, match="defines no families"):
        main(["adapt", str(empty), "--out", str(tmp_path / "out")])


def test_a_run_is_not_gone_on_with_by_another_plan(tmp_path):
    (tmp_path / "plan.json").write_text('{"minutes": 20.0, "seed": 0, "outer_steps": 9}')
    for minutes, seed in ((5.0, 0), (20.0, 1)):
        with pytest.raises(UsageError, match="begun with minutes=20 and seed=0"):
            adapt(FAMILIES, tmp_path, minutes, seed)


@pytest.mark.slow
def test_the_command_learns_judges_and_goes_on(tmp_path, capsys):
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text(FILE)
    main(["adapt", str(file), "--minutes", "0.2", "--out", str(out)])
    said = capsys.readouterr().out
    assert "Better than the default" in said or "NOT shown" in said
    first = json.loads((out / "verdict.json").read_text())
    assert (out / "theta.safetensors").exists() and -2 < first["change"] < 2
    main(["adapt", str(file), "--minutes", "0.2", "--out", str(out)])  # all is done: the same verdict
    assert json.loads((out / "verdict.json").read_text()) == first
