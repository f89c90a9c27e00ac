"""The scripts of experiments: each starts from the rule as it is, and what it changes counts."""

import dataclasses
import math
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from learned_opt.checkpoint import load_weights
from learned_opt.rules import auto_lr, make_rule
from meta_train.estimators import ES
from meta_train.loop import train
from tasks.data import digits
from tasks.mlp import classifier


@pytest.fixture
def script_at(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # scripts add the folder of what they share

    def load(place):
        file = Path(__file__).parents[1] / "experiments" / place
        spec = spec_from_file_location(file.stem, file)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_constants_are_others_in_the_runs_of_their_experiment_alone(script_at, monkeypatch, tmp_path, capsys):
    script = script_at("28-longer-momentum/constants.py")
    monkeypatch.setattr(script, "SEEDS", 2)
    task = classifier("small", digits(), [8], "relu", batch_size=8, steps=6)

    def run(constants):
        return script.losses("whitened_polar", constants, task, 1.0)

    plain, other = run(""), run("auto_lr.RATE=0.02,whitened_polar.VECTOR=1")
    assert len(plain) == 2 and other != plain
    assert run("") == plain and auto_lr.RATE == 0.01
    with pytest.raises(AttributeError, match="RATES"):
        run("auto_lr.RATES=0.02")

    runs = {"as it is": lambda task, multiple: plain, "other": lambda task, multiple: other}
    script.compare({"small": lambda: task}, runs, tmp_path)
    first = capsys.readouterr().out
    script.compare({"small": lambda: task}, dict.fromkeys(runs), tmp_path)  # what is there is not run again
    assert capsys.readouterr().out == first
    change = sum(math.log(b / a) for a, b in zip(plain, other, strict=True)) / 2
    assert first.splitlines()[1].startswith(f"other | {change:+.3f} |")


def test_the_recipe_trains_on_its_own_family_and_is_judged_on_networks_it_does_not_draw(script_at, tmp_path):
    script = script_at("46-limits-of-meta-training/residual_recipe.py")
    short = {"horizon": (2, 2), "outer_steps": 1, "estimator": ES(particles=2, sigma=0.05)}
    recipe = dataclasses.replace(script.recipe(), **short)
    _, theta, _ = load_weights(train(recipe, tmp_path, families=script.families, validation=script.validation))
    start = make_rule("learned").state_dict()
    assert any((theta[n] != start[n]).any() for n in start)
    drawn = {script.families["residual"](torch.Generator().manual_seed(s)).name for s in range(20)}
    assert drawn == {"res-12", "res-16", "res-32"} and list(script.validation) == ["res-24"]
