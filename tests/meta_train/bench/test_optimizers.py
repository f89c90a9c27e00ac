"""The optimizers that are compared, what identifies them, and what identifies a task."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

import learned_opt
from meta_train.bench import curves as cv
from meta_train.bench import evaluate as ev
from meta_train.bench import optimizers as op
from meta_train.bench.suites import task_fingerprint
from meta_train.errors import UnknownName
from tests.meta_train.bench.tiny import GRIDS, Quadratic, Regression, measure

# -------------------------------------------------------------------------------------- optimizers


def test_every_baseline_lowers_the_loss_and_has_a_grid_of_half_decades():
    for name, (factory, grid, package, _) in op.OPTIMIZERS.items():
        assert grid is not None and len(grid) >= 7
        assert np.diff(np.log10(grid)) == pytest.approx(0.5, abs=0.01)
        if package is not None:
            pytest.importorskip(package)
        lr = 1.0 if name.startswith("prodigy") else 1e-2
        c = cv.run(Regression(), lambda m, steps, f=factory, lr=lr: f(m, lr, steps), 0, 30)
        assert c.final_train < c.train[0], name
        if name.endswith("-cosine"):
            assert op.OPTIMIZERS[name.removesuffix("-cosine")].grid == grid


def test_schedule_free_is_measured_at_its_averages():
    """And trains on from where it was: measuring changes nothing."""
    schedulefree = pytest.importorskip("schedulefree")
    task = Regression()
    c = cv.run(task, lambda m, steps: op.schedule_free(m, 0.03, steps), 0, 20)
    generator = torch.Generator().manual_seed(0)
    weights = {n: w.requires_grad_() for n, w in task.init(generator).items()}
    optimizer = schedulefree.AdamWScheduleFree(weights.values(), lr=0.03)
    optimizer.train()
    for _ in range(20):
        optimizer.zero_grad()
        task.loss(weights, task.batch(generator)).backward()
        optimizer.step()
    with torch.no_grad():
        during = float(task.loss(weights, cv.evaluation_batches(task)[0]))
        optimizer.eval()
        averaged = float(task.loss(weights, cv.evaluation_batches(task)[0]))
    assert c.final_train == pytest.approx(averaged, rel=1e-4) != pytest.approx(during, rel=1e-4)


def test_a_missing_package_is_named_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(op.importlib.util, "find_spec", lambda name: None)
    op.optimizer_named.cache_clear()
    with pytest.raises(UnknownName, match=r"learned-opt\[benchmark\]"):
        ev.evaluate(["soap"], tmp_path, tasks=["mlp-digits-sin"])
    op.optimizer_named.cache_clear()


def test_muon_takes_hidden_matrices_only():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.pos = nn.Parameter(torch.zeros(3, 4))
            self.norm = nn.LayerNorm(4)
            self.conv = nn.Conv2d(4, 4, 3)
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
            self.head = nn.Linear(4, 5)

    assert op.hidden_matrices(Block()) == {"fc1.weight", "fc2.weight"}
    assert op.hidden_matrices(Regression().model) == {"2.weight"}
    assert op.hidden_matrices(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))) == set()
    joined, _ = op.muon(Regression().model, 1e-2, 10)
    assert [type(part).__name__ for part in joined.parts] == ["AdamW", "Muon"]
    assert [p.shape for p in joined.param_groups[1]["params"]] == [(8, 8)]


def test_cosine_reaches_zero_in_every_part():
    model = Regression().model
    optimizer, scheduler = op.OPTIMIZERS["muon-cosine"].factory(model, 1e-2, 10)
    for _ in range(10):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.0, 0.0]


def test_tuning_picks_the_right_rate_on_a_quadratic(tmp_path):
    # Momentum 0.9, curvatures 1, 0.5, 0.25, 40 steps: too small a rate is slow, 10 diverges.
    rates = (1e-3, 1e-2, 1e-1, 10.0)
    found = measure(tmp_path, ["sgdm"], grids={**GRIDS, "sgdm": rates})
    losses = {}
    for lr in rates:
        curves = [cv.run(Quadratic(), lambda m, steps, lr=lr: op.sgdm(m, lr, steps), s, 40) for s in (0, 1)]
        losses[lr] = sum(c.final_train for c in curves)
    assert min(losses, key=losses.get) == 1e-1
    assert {o.lr for o in found if o.optimizer == "sgdm"} == {1e-1}
    assert not any(o.at_edge for o in found if o.optimizer == "sgdm")


def test_a_task_is_identified_but_for_rounding():
    task = Quadratic()
    found = task_fingerprint(task)

    def changed(change):
        other = Quadratic()
        start, held = other.init, other.held_out
        other.init = lambda g: {n: change(x) for n, x in start(g).items()}
        other.held_out = lambda: tuple(change(x) for x in held())
        return task_fingerprint(other)

    assert changed(lambda x: x * (1 + 1e-7)) == found
    assert changed(lambda x: x * 1.01) != found
    assert changed(lambda x: x.flatten().flip(0).reshape(x.shape)) != found


@pytest.mark.parametrize(("factor", "same"), [(1 + 1e-7, True), (1.02, False)])
def test_a_task_is_identified_by_what_it_computes(factor, same):
    task = Regression()
    task.loss = lambda params, batch: factor * Regression.loss(task, params, batch)
    assert (task_fingerprint(task) == task_fingerprint(Regression())) == same


@pytest.mark.slow
@pytest.mark.parametrize("name, value", [("AFTER", 1.3), ("LONGER", 0.06), ("NOISE_LR", 0.6)])
def test_a_rule_is_identified_by_its_later_steps_too(monkeypatch, name, value):
    from learned_opt.rules import auto_lr, make_rule

    before = op.rule_fingerprint(make_rule("auto_lr"))
    monkeypatch.setattr(auto_lr, name, value)  # of steps after the 12th, the 50th and the 36th
    assert op.rule_fingerprint(make_rule("auto_lr")) != before


@pytest.mark.slow
def test_a_learned_optimizer_is_identified_by_what_it_does(tmp_path):
    from learned_opt import make_rule, save_weights

    rule = make_rule("learned")
    assert op.rule_fingerprint(rule) == op.rule_fingerprint(make_rule("learned"))
    assert op.rule_fingerprint(rule) != op.rule_fingerprint(make_rule("whitened_polar"))
    save_weights(tmp_path / "s@me.safetensors", "learned", rule.state_dict(), {})
    with torch.no_grad():
        next(rule.parameters()).add_(0.1)
    save_weights(tmp_path / "other.safetensors", "learned", rule.state_dict(), {})
    _, same = op.optimizer_named(f"nfn:{tmp_path / 's@me.safetensors'}")
    _, other = op.optimizer_named(f"nfn:{tmp_path / 'other.safetensors'}")
    assert same == op.optimizer_named("nfn:learned")[1] != other


def test_learned_optimizers_are_evaluated_untuned_under_their_labels(tmp_path):
    found = measure(tmp_path, ["mine=nfnopt", "polar=nfn:whitened_polar"], tasks=["regression"])
    mine = [o for o in found if o.optimizer in ("mine", "polar")]
    assert [o.lr for o in mine] == [None] * 4
    assert all(o.curve.final_train < o.curve.train[0] for o in mine)
    with pytest.raises(UnknownName, match="whitened_polar"):
        measure(tmp_path, ["nfn:whitened_polarr"])


@pytest.mark.slow
def test_a_rule_is_run_at_a_multiple_of_its_rate_or_without_its_horizon():
    model = torch.nn.Linear(3, 2)

    def group(name):
        return op.optimizer_named(name)[0].factory(model, None, steps=7)[0].param_groups[0]

    assert (group("nfn:whitened_polar")["lr"], group("nfn:whitened_polar")["total_steps"]) == (1, 7)
    assert (group("nfn:whitened_polar@lr=0.3")["lr"], group("nfn:whitened_polar@lr=0.3")["total_steps"]) == (0.3, 7)
    free = "nfn:whitened_polar@without-total-steps"
    assert (group(f"{free}@lr=3")["lr"], group(free)["total_steps"]) == (3, None)
    plan = ev.make_plan(
        "VALID", ["vit-digits"], ["low=nfn:whitened_polar@lr=0.3", "nfn:whitened_polar@lr=3"], 1, 1, (), None, 9, None
    )
    assert [o.name for o in plan.optimizers.values()] == [
        "adam",
        "nfn:whitened_polar@lr=0.3",
        "nfn:whitened_polar@lr=3",
    ]
    assert list(plan.optimizers) == ["adam", "low", "nfn:whitened_polar@lr=3"]
    names = (free, *(f"nfn:whitened_polar{option}" for option in ("", "@lr=3", "@lr=0.3")))
    thetas = {op.optimizer_named(name)[1] for name in names}
    assert len(thetas) == 4  # else one would take the other's runs for its own
    default = inspect.signature(learned_opt.NFNOpt).parameters["rule"].default
    assert op.optimizer_named("nfnopt@lr=2")[1] == op.optimizer_named("nfn:auto_lr@lr=2")[1]
    assert f"nfn:{default}" == op.DEFAULT
    for wrong in ("lr", "lr=fast", "told", "without-total-steps=1", "0.3"):
        with pytest.raises(UnknownName, match="@lr=NUMBER"):
            op.optimizer_named(f"nfn:whitened_polar@{wrong}")


@pytest.mark.parametrize("shape", [(12, 8), (8, 40)])
def test_muon_in_float32_is_torchs_muon(monkeypatch, shape):
    monkeypatch.setattr(op, "has_bfloat16", lambda device: False)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs.grad = ours.grad.clone()
    for make, p in ((op.Muon, ours), (torch.optim.Muon, theirs)):
        make([p], 0.1).step()
    assert 0 < (ours - theirs).abs().max() < 0.05 * (theirs - 1).abs().max()
