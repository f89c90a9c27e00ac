"""The scripts of experiments: each starts from the rule as it is, and what it changes counts."""

import dataclasses
import math
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from learned_opt.checkpoint import load_weights
from learned_opt.rules import make_rule, nominal
from learned_opt.rules.nominal import Nominal
from learned_opt.rules.paced import Paced
from meta_train.estimators import ES
from meta_train.loop import train
from tasks.data import digits
from tasks.mlp import classifier
from tests.states import assert_same, every_model, make, noise_like


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


@every_model
def test_the_variants_of_the_experiment_start_from_the_rule(kind, script_at):
    script = script_at("18-polar-step-variants/run.py")
    symmetry, params, grads, state = make(kind)
    rules = Nominal(), script.Variant(script.Options())
    ours, theirs = (rule(params, grads, state, symmetry, total_steps=50)[0] for rule in rules)
    for n in params:
        assert_same(theirs[n], ours[n])


@pytest.mark.parametrize(
    "kind, lacks",
    [
        ("mlp", {"normalised", "gain", "embedding", "thin", "power"}),
        ("cnn", {"vector", "embedding", "column"}),
        ("transformer", {"vector", "first", "early"}),
    ],
)
def test_every_option_of_the_experiment_changes_the_step(kind, lacks, script_at):
    script = script_at("18-polar-step-variants/run.py")
    symmetry, params, _, _ = make(kind)
    params = {n: 0.3 * p for n, p in params.items()}  # small weights, for the option of that name

    def norm(**told):
        rule = script.Variant(script.Options(**told))
        state = rule.init(params)
        for t in range(3):
            updates, state = rule(params, noise_like(params, t), state, symmetry, total_steps=50)
        return sum(float(u.norm()) for u in updates.values())

    told = {f.name: 0.5 * f.default or 0.4 for f in dataclasses.fields(script.Options) if f.type is float}
    told |= {
        "decay": "square",
        "frame": 0.0,
        "whiten": 0.0,
        "column": 0.0,
        "early": 0.0,
        "iterations": 5.0,
        "thin": 5.0,
    }
    as_it_is = norm()
    without = {name for name, value in told.items() if norm(**{name: value}) == pytest.approx(as_it_is, rel=1e-6)}
    assert without == {"momentum", "horizon", *lacks}  # the first two are of the run, not of the rule


@every_model
def test_the_corrections_of_the_experiment_start_from_the_rule_and_all_count(kind, script_at):
    script = script_at("32-first-order-corrections/run.py")
    symmetry, params, _, _ = make(kind)
    total = torch.tensor(50.0, dtype=torch.float64)

    def third_update(rule):
        state = rule.init(params)
        for t in range(3):
            updates, state = rule(params, noise_like(params, t), state, symmetry, total_steps=total)
        return updates

    as_it_is, names = third_update(Paced()), script.DEFAULT.split()
    corrected = script.Corrected(names).double()
    assert all(torch.allclose(u, as_it_is[n], rtol=1e-9, atol=1e-12) for n, u in third_update(corrected).items())
    for i in range(len(names)):
        with torch.no_grad():
            corrected.coefficients.zero_()[i] = 0.3
        assert any(not torch.allclose(u, as_it_is[n], rtol=1e-4) for n, u in third_update(corrected).items()), names[i]


def test_constants_are_others_in_the_runs_of_their_experiment_alone(script_at, monkeypatch, tmp_path, capsys):
    script = script_at("28-longer-momentum/constants.py")
    monkeypatch.setattr(script, "SEEDS", 2)
    task = classifier("small", digits(), [8], "relu", batch_size=8, steps=6)

    def run(constants):
        return script.losses("nominal", constants, task, 1.0)

    plain, other = run(""), run("nominal.RATE=0.02,nominal.VECTOR=1")
    assert len(plain) == 2 and other != plain
    assert run("") == plain and nominal.RATE == 0.01
    with pytest.raises(AttributeError, match="RATES"):
        run("nominal.RATES=0.02")

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
