"""Recipes: plain data, what they say of each outer step, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learned_opt.checkpoint import load_weights
from learned_opt.rules import SHIPPED
from meta_train import checkpoint
from meta_train.__main__ import _defined, main
from meta_train.recipes import RECIPES, Recipe, chosen, families_of_workers, horizon_at, lr_at
from tests.meta_train.test_loop import RECIPE, run


def test_schedules():
    recipe = replace(RECIPE, outer_steps=100, horizon=(10, 1000), curriculum=0.5, warmup=0.1, lr=1.0)
    assert horizon_at(recipe, 0)[1] < 12 and horizon_at(recipe, 24) == (10, 100)
    assert horizon_at(recipe, 49) == horizon_at(recipe, 99) == (10, 1000)
    rates = [lr_at(recipe, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(recipe.final_lr)


def test_workers_take_turns_and_families_their_shares():
    recipe = replace(RECIPE, workers=7, tasks_per_step=2, families={"wide": 2.0, "mined": 1.0})
    assert sorted(families_of_workers(recipe)).count("wide") == 5
    turns = [n for step in range(70) for n in chosen(recipe, step)]
    counts = [turns.count(n) for n in range(7)]
    assert max(counts) - min(counts) <= 6 and len(turns) >= 130
    assert chosen(recipe, 5) == chosen(recipe, 5)


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_plain_data(name):
    recipe = RECIPES[name]()
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_impossible_recipes_and_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="horizon"):
        replace(RECIPE, horizon=(5, 2))
    with pytest.raises(ValueError, match="tasks_per_step"):
        replace(RECIPE, tasks_per_step=9)
    with pytest.raises(ValueError, match="unknown rule x. Choose from slow"):
        run(replace(RECIPE, rule="x"), tmp_path)
    with pytest.raises(ValueError, match="unknown task family x"):
        run(replace(RECIPE, families={"x": 1.0}), tmp_path)


def test_the_documented_recipe_fine_tunes_the_shipped_theta(tmp_path):
    document = (Path(__file__).parents[2] / "docs" / "meta_training.md").read_text(encoding="utf-8")
    mine = tmp_path / "my_recipe.py"
    mine.write_text(document.split("```python\n")[1].split("```")[0])
    quick = ["--outer-steps", "1", "--horizon", "3", "4", "--checkpoint-every", "1"]
    validated = ["--validate-every", "1", "--validation", "sines-48", "--validation-steps", "5"]
    main(
        [
            "train",
            str(mine),
            "--out",
            str(tmp_path / "out"),
            *quick,
            *validated,
            "estimator:es",
            "--estimator.particles",
            "4",
        ]
    )
    name, _, provenance = load_weights(tmp_path / "out" / "theta.safetensors")
    shipped = load_weights(SHIPPED / f"{name}.safetensors")[1]
    # after the outer step, which validation may not choose
    theta = checkpoint.load(checkpoint.list_all(tmp_path / "out")[-1])["run"]["theta"]
    moved = {n.split(".")[0] for n in theta if not torch.equal(theta[n], shipped[n])}
    assert moved and moved <= set(provenance["recipe"]["trained"])
    assert [x["step"] for x in provenance["validation"]] == [0, 1]
    mine.write_text(mine.read_text() + "\nfamilies = [1]\n")
    _defined.cache_clear()
    with pytest.raises(SystemExit, match="families in .* must be a dict"):
        main(["train", str(mine), "--out", str(tmp_path / "out")])
