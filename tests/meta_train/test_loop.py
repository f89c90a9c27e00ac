import gc
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image as plt_image
import pytest
import torch
from safetensors import safe_open
from torch import nn

from learned_opt.checkpoint import CheckpointError, load_weights, save_weights
from learned_opt.rules import RULES
from meta_train import checkpoint
from meta_train.__main__ import main
from meta_train.estimators import ES, ESTIMATORS, PES, TBPTT
from meta_train.lengths import Lengths
from meta_train.loop import Run, _fingerprints, estimate, outer_step, train
from meta_train.processes import Processes
from meta_train.progress import GracefulShutdown
from meta_train.recipes import RECIPES, Recipe, RecipeError
from meta_train.throughput import throughput
from meta_train.validation import score
from tasks.task import TaskError
from tests.meta_train.test_unroll import LearnedSGD, Regression


class Slow(LearnedSGD):
    """Starts at a rate that is much too low."""

    parts = {"momentum": (("momentum", slice(None)),)}

    def __init__(self):
        super().__init__(1e-3, torch.float32)


class Wide(Regression):
    def __init__(self, generator):
        super().__init__(torch.float32)
        width = int(torch.randint(2, 6, (), generator=generator))
        self.model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def train_eval(self):
        return self.held_out()


class Easy(Wide):
    """A target that a few steps at a sensible rate come close to."""

    def batches(self, generator, n):
        x, _ = super().batches(generator, n)
        return x, 0.5 * x.sum(-1, keepdim=True)


class Harder(Wide):
    """The same networks and examples, compared in another way."""

    def loss(self, params, batch):
        return 3 * super().loss(params, batch)


class Negative(Wide):
    """Losses as of a density."""

    def loss(self, params, batch):
        return super().loss(params, batch) - 1e3


class Mined(Wide):
    """Runs that start with a large bias see NaN."""

    def loss(self, params, batch):
        poison = torch.where(params["2.bias"][0] > 1.0, torch.nan, 1.0)
        return super().loss(params, batch) * poison


class Barren(Wide):
    """Every loss is NaN."""

    def loss(self, params, batch):
        return super().loss(params, batch) * torch.nan


TABLES = {
    "rules": {"slow": Slow},
    "families": {"wide": Wide, "easy": Easy, "mined": Mined, "barren": Barren},
    "validation": {"valid": lambda: Easy(torch.Generator().manual_seed(7))},
}
RECIPE = Recipe(
    rule="slow",
    families={"wide": 1.0},
    estimator=PES(particles=4, truncation=5, sigma=0.05),
    lengths=Lengths(every=2, tasks=2, particles=2, steps=10),
    horizon=(8, 20),
    workers=3,
    tasks_per_step=2,
    resample=3,
    outer_steps=6,
    checkpoint_every=2,
    validate_every=2,
    clip=100.0,
)


def run(recipe, out, **options):
    return train(recipe, out, **TABLES, **options)


def log_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def same_run(a, b):
    theta_a, theta_b = (
        load_weights(a / "theta.safetensors")[1],
        load_weights(b / "theta.safetensors")[1],
    )
    same = all(theta_a[n].numpy().tobytes() == theta_b[n].numpy().tobytes() for n in theta_a)
    last = [checkpoint.load(checkpoint.list_all(out)[-1])["run"] for out in (a, b)]
    for n, t in last[0]["theta"].items():
        assert torch.equal(t, last[1]["theta"][n])
    return same and log_of(a) == log_of(b)


@pytest.mark.parametrize("kind", list(ESTIMATORS))
def test_meta_training_lowers_the_loss(kind, tmp_path):
    estimator = ESTIMATORS[kind](particles=4)
    estimator = estimator if kind == "ES" else replace(estimator, truncation=8)
    estimator = replace(estimator, between=2, cool_down=4) if kind == "CoolDown" else estimator
    recipe = replace(
        RECIPE,
        families={"easy": 1.0},
        estimator=estimator,
        horizon=(10, 10),
        resample=50,
        outer_steps=30,
        lr=0.1,
        ema=0.0,
        validate_every=10,
        lengths=None,
    )
    path = run(recipe, tmp_path)
    name, theta, provenance = load_weights(path)
    assert name == "slow" and theta["log_rate"] > Slow().log_rate + 0.3
    scores = [x["loss"] for x in provenance["validation"]]
    assert min(scores) < scores[0] - 0.1, "better than where it started"
    assert provenance["chosen"]["loss"] == min(scores)
    assert Recipe.from_dict(provenance["recipe"]) == recipe
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert len(checkpoint.list_all(tmp_path)) == 2


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import meta_train.loop as module
from learned_opt.rules import RULES
from tests.meta_train.test_loop import RECIPE, run
number, function = int(sys.argv[2]), getattr(module, sys.argv[3])
def deadly(*args):
    state = args[5] if sys.argv[3] == "estimate" else args[1].step
    if state == 3:
        os.kill(os.getpid(), number)
    return function(*args)
setattr(module, sys.argv[3], deadly)
run(RECIPE, Path(sys.argv[1]))
"""


TOGETHER = """
import sys
from pathlib import Path
from tests.meta_train.test_loop import PAIR, run
run(PAIR, Path(sys.argv[1]))
"""
PAIR = replace(RECIPE, families={"wide": 1.0, "easy": 1.0}, workers=4, tasks_per_step=3)


def test_two_processes_take_the_steps_of_one(tmp_path):
    (tmp_path / "script.py").write_text(TOGETHER)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "two")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    run(PAIR, tmp_path / "one")
    assert same_run(tmp_path / "one", tmp_path / "two")
    assert load_weights(tmp_path / "two" / "theta.safetensors")[2]["processes"] == 2
    run(replace(PAIR, outer_steps=8), tmp_path / "two")  # and one goes on where two stopped
    assert log_of(tmp_path / "two")[-1]["step"] == 8


def test_work_is_dealt_once_and_evenly():
    cost = {0: 5.0, 1: 1.0, 2: 1.0, 3: 2.0, 4: 1.0}
    dealt = [Processes(rank, 2).deal(range(5), cost) for rank in (0, 1)]
    assert sorted(dealt[0] + dealt[1]) == list(range(5)) and dealt[0] == [0]


def killed(out, number, where):
    """Run until a signal arrives in outer step 3."""
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out), str(int(number)), where],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_resume_is_exact_after_kill_9(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(RECIPE, whole)
    assert killed(parts, signal.SIGKILL, "outer_step").returncode == -signal.SIGKILL
    assert checkpoint.list_all(parts)[-1].name == "step-00000002.ckpt"
    assert log_of(parts)[-1]["step"] == 3, "the log is ahead of the checkpoint"
    run(RECIPE, parts)
    assert same_run(whole, parts)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(number, tmp_path):
    result = killed(tmp_path / "parts", number, "estimate")
    assert result.returncode == 128 + number, result.stderr
    assert "The same command continues" in result.stdout
    last = checkpoint.list_all(tmp_path / "parts")[-1]
    assert last.name == "step-00000003.ckpt", "every finished step is kept"
    if number == signal.SIGINT:
        run(RECIPE, tmp_path / "parts")
        run(RECIPE, tmp_path / "whole")
        assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_signal_ends_at_once(monkeypatch):
    shutdown = GracefulShutdown()
    shutdown._handle(signal.SIGINT, None)  # not inside work that may end: only noted
    assert shutdown.signal == signal.SIGINT
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    shutdown._handle(signal.SIGINT, None)
    assert ended == [130]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(RECIPE, whole)
    run(RECIPE, parts)
    (parts / "theta.safetensors").unlink()
    before, last = checkpoint.list_all(parts)
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="sha256") as caught:
        checkpoint.load(last)
    assert caught.value.path == last
    capsys.readouterr()
    run(RECIPE, parts)
    said = capsys.readouterr().out
    assert str(last) in said and "Falling back" in said and before.name in said
    assert same_run(whole, parts)
    for path in checkpoint.list_all(parts):
        path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="another folder"):
        run(RECIPE, parts)


def test_checkpoints_hold_tensors_and_plain_data(tmp_path):
    path = checkpoint.save(tmp_path, 3, {"a": [torch.ones(2), 1.5], "b": {"c": "d"}})
    loaded = checkpoint.load(path)  # weights_only
    assert torch.equal(loaded["a"][0], torch.ones(2)) and loaded["b"] == {"c": "d"}
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file is left"
    for step in (4, 5, 6):
        checkpoint.save(tmp_path, step, {})
    assert [p.stem for p in checkpoint.list_all(tmp_path)] == ["step-00000005", "step-00000006"]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    recipe = replace(RECIPE, validate_every=0, outer_steps=2, lengths=None)
    run(recipe, tmp_path)
    with pytest.raises(ValueError, match="differs in lr.*another folder.*--resume never"):
        run(replace(recipe, lr=0.5), tmp_path)
    run(replace(recipe, lr=0.5), tmp_path, resume="never")
    assert min(x["lr"] for x in log_of(tmp_path)) > 0.01, "the old log is gone"
    longer = run(replace(recipe, lr=0.5, outer_steps=4), tmp_path)
    assert load_weights(longer)[2]["outer_steps"] == 4


def test_starting_anew_deletes_the_old_result_but_not_what_it_starts_from(tmp_path):
    recipe = replace(RECIPE, validate_every=0, outer_steps=1)
    result = run(recipe, tmp_path)
    again = replace(recipe, start=str(result), lr=0.5)
    with pytest.raises(RecipeError, match="to start from, is the result to delete"):
        run(again, tmp_path, resume="never")
    assert result.exists()
    with pytest.raises(TaskError):
        train(recipe, tmp_path, resume="never", **TABLES | {"families": {"wide": Negative}})
    assert not result.exists() and not (tmp_path / "training.png").exists()


def test_a_run_does_not_go_on_with_other_tasks(tmp_path):
    recipe = replace(RECIPE, validate_every=0, outer_steps=2)
    run(recipe, tmp_path)
    other = TABLES | {"families": {"wide": Harder}}
    for outer_steps in (2, 4):  # one that is over, too
        with pytest.raises(RecipeError, match="tasks of wide are not those of .*another folder.*--resume never"):
            train(replace(recipe, outer_steps=outer_steps), tmp_path, **other)
    path = checkpoint.list_all(tmp_path)[-1]
    state = checkpoint.load(path)
    del state["families"]  # as of a version that did not write them
    checkpoint.save(tmp_path, 2, state)
    train(replace(recipe, outer_steps=3), tmp_path, **other)
    assert log_of(tmp_path)[-1]["step"] == 3


def test_looking_at_the_tasks_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    _fingerprints(RECIPE, TABLES["families"])
    assert torch.equal(torch.get_rng_state(), before)


def test_other_validation_tasks_choose_anew_and_none_choose_nothing(tmp_path):
    tables = TABLES | {"validation": TABLES["validation"] | {"other": lambda: Wide(torch.Generator().manual_seed(3))}}

    def chosen_by(**changes):
        return load_weights(train(replace(RECIPE, **changes), tmp_path, **tables))[2]["chosen"]

    old = chosen_by(validation=("valid",))
    state = checkpoint.load(checkpoint.list_all(tmp_path)[-1])
    state["run"]["best"]["loss"] = -1e9  # what the other task cannot have
    checkpoint.save(tmp_path, RECIPE.outer_steps, state)
    assert chosen_by(validation=("valid",))["loss"] == -1e9
    new = chosen_by(validation=("other",))
    assert old["by"] == new["by"] == "validation" and new["loss"] not in (old["loss"], -1e9)
    assert new["step"] == RECIPE.outer_steps and log_of(tmp_path)[-1]["tasks"].keys() == {"other", "held_out/other"}
    assert chosen_by(validation=("other",), validate_every=0) == {"by": "last average", "step": RECIPE.outer_steps}


def test_validation_tasks_are_made_only_to_be_used(tmp_path):
    def fail():
        raise AssertionError("made")

    train(replace(RECIPE, validate_every=0, outer_steps=1), tmp_path, **TABLES | {"validation": {"valid": fail}})


def test_a_log_that_is_lost_is_begun_anew(tmp_path):
    run(replace(RECIPE, validate_every=0, lengths=None, outer_steps=2), tmp_path)
    (tmp_path / "log.jsonl").unlink()
    run(replace(RECIPE, validate_every=0, lengths=None, outer_steps=4), tmp_path)
    assert [x["step"] for x in log_of(tmp_path)] == [3, 4]


def test_a_validation_run_that_diverged_has_the_worst_held_out_loss():
    task = Easy(torch.Generator().manual_seed(7))
    recipe = replace(RECIPE, validation_steps=10, clip=1.5)
    for log_rate, worst in ((400.0, True), (-3.0, False)):
        theta = {"log_rate": torch.tensor(log_rate), "momentum": torch.tensor([0.0])}
        found = score(recipe, Slow(), theta, "valid", task)["held_out/valid"]
        assert (found == pytest.approx(math.log(1.5))) == worst


def test_diverging_runs_are_counted_and_theta_stays_finite(tmp_path):
    recipe = replace(RECIPE, families={"mined": 1.0}, validate_every=0, lengths=None)
    for name, estimator in {"pes": RECIPE.estimator, "tbptt": TBPTT(6, 5, outlier=3.0)}.items():
        path = run(replace(recipe, estimator=estimator), tmp_path / name)
        assert sum(x["diverged"] for x in log_of(tmp_path / name)) > 0
        assert all(t.isfinite().all() for t in load_weights(path)[1].values())


def test_families_without_a_gradient_move_nothing(tmp_path):
    recipe = replace(RECIPE, families={"barren": 1.0}, validate_every=0, weight_decay=0.0, lengths=None)
    theta = load_weights(run(replace(recipe, estimator=TBPTT(4, 5)), tmp_path))[1]
    torch.testing.assert_close(theta, dict(Slow().state_dict()))
    assert {x["diverged"] for x in log_of(tmp_path)} == {1.0}


def test_the_curve_is_drawn_at_the_end_and_from_the_log(tmp_path, capsys):
    run(RECIPE, tmp_path)
    picture = tmp_path / "training.png"
    picture.unlink()  # that is there
    main(["report", str(tmp_path)])
    assert str(picture) in capsys.readouterr().out
    assert plt_image.imread(picture).std() > 0
    (tmp_path / "log.jsonl").write_text("")
    picture.unlink()
    main(["report", str(tmp_path)])
    assert "nothing to draw" in capsys.readouterr().out and not picture.exists()


def test_non_finite_meta_gradients_are_skipped_and_counted():
    rule = Slow()
    theta = {n: p.detach() for n, p in rule.named_parameters()}
    state = Run.begin(RECIPE, theta)
    parts = [estimate(RECIPE, rule, theta, TABLES["families"], state.workers[n], 0) for n in (0, 1)]
    parts[0].gradient["log_rate"] = torch.tensor(float("nan"))
    metrics = outer_step(RECIPE, state, parts)
    assert metrics["skipped"] == 1 and metrics["gradient_norm"] > 0
    assert all(t.isfinite().all() for t in state.theta.values())
    assert not torch.equal(state.theta["log_rate"], theta["log_rate"])


@pytest.mark.slow
def test_memory_does_not_grow():
    rule = Slow().requires_grad_(False)
    recipe = replace(RECIPE, resample=100)
    for estimator in (TBPTT(4, 5), TBPTT(4, 5, detach=False), ES(4), recipe.estimator):
        now = replace(recipe, estimator=estimator)
        state, counts = Run.begin(now, dict(rule.named_parameters())), []
        for step in range(7):
            parts = [estimate(now, rule, state.theta, TABLES["families"], state.workers[n], step) for n in range(3)]
            outer_step(now, state, parts)
            del parts
            if step in (3, 6):
                gc.collect()
                counts.append(sum(type(x) is torch.Tensor for x in gc.get_objects()))
        assert counts[0] == counts[1], estimator


def test_the_learned_rule_on_the_real_tasks(tmp_path):
    name, theta, provenance = load_weights(train(RECIPES["tiny"](), tmp_path))
    start = RULES[name]().state_dict()
    assert theta.keys() == start.keys()
    assert any(not torch.equal(theta[n], start[n]) for n in theta)
    assert provenance["outer_steps"] == 4 and provenance["skipped_gradients"] == 0


def test_time_limit_ends_with_a_result(tmp_path):
    path = run(replace(RECIPE, minutes=0.0, validate_every=0), tmp_path)
    assert load_weights(path)[2]["outer_steps"] == 0


def test_start_from_a_theta(tmp_path):
    theta = {"log_rate": torch.tensor(-1.0), "momentum": torch.tensor([0.2])}
    save_weights(tmp_path / "a.safetensors", "slow", theta, {})
    recipe = replace(RECIPE, start=str(tmp_path / "a.safetensors"), minutes=0.0, validate_every=0)
    assert torch.equal(load_weights(run(recipe, tmp_path / "b"))[1]["momentum"], theta["momentum"])
    save_weights(tmp_path / "a.safetensors", "other", theta, {})
    with pytest.raises(CheckpointError, match="of rule 'other'"):
        run(recipe, tmp_path / "c")


def test_throughput_counts_the_products():
    told = []
    result = throughput(RECIPE, rules=TABLES["rules"], families=TABLES["families"], say=told.append)
    assert all(any(line.startswith(name) for line in told) for name in RECIPE.families)
    row = result.families["wide"]
    assert row["flop"] > 0 and row["rate"] > 0 and result.peak > row["flop"]
    assert "wide" in str(result)


def test_theta_files_are_validated(tmp_path):
    path = tmp_path / "theta.safetensors"
    theta = {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.5)}
    save_weights(path, "slow", theta, {"seed": 3})
    name, loaded, provenance = load_weights(path)
    assert name == "slow" and provenance == {"seed": 3}
    torch.testing.assert_close(loaded, theta)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["rule"] == "slow"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for content, reason in (
        (whole[:-4], "whole safetensors"),
        (bytes(flipped), "sha256"),
        (b"", "whole safetensors"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_weights(path)
        assert caught.value.path == path and reason in caught.value.reason
    with pytest.raises(CheckpointError, match="no such file"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="non-finite values in w"):
        save_weights(path, "slow", {"w": torch.tensor([torch.inf])}, {})
