"""What training frameworks, schedulers and wrappers do with an optimizer."""

import contextlib
import logging
import math
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, update_bn

from learned_opt import NFNOpt, infer_symmetry
from tests.optimizer_contract import assert_equal, backward, data, make, make_model, through_disk, train, weights

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 20


def here(warning):
    """Whether a warning points at a line of the tests: not at one of torch's or ours."""
    return "tests" in warning.filename


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings(action="error"):
        yield


# ------------------------------------------------------------------------------------------- schedules
def falling(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / TOTAL))  # a Trainer's default


def warm(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 10))


def up_and_down(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=TOTAL, cycle_momentum=False)


def rare(optimizer):
    return lr_scheduler.StepLR(optimizer, 8)


def run(optimizer, model, schedule=None, steps=TOTAL):
    scheduler = None if schedule is None else schedule(optimizer)
    for _ in range(steps):
        train(model, optimizer, 1)
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("schedule", [falling, up_and_down, rare])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_schedule_beside_our_own_is_told_once(schedule, groups, kind):
    model, lr = make_model(), kind(1.0)
    parts = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = NFNOpt(parts if groups == 2 else model.parameters(), symmetry="independent", total_steps=TOTAL, lr=lr)
    with pytest.warns(UserWarning) as told:
        run(optimizer, model, schedule)
    (one,) = [str(w.message) for w in told]
    assert here(told[0])
    assert f"total_steps={TOTAL}" in one and "leave total_steps out" in one and "Leave lr constant" in one


@pytest.mark.parametrize(
    ("schedule", "total_steps", "rule"),
    [
        (warm, TOTAL, "auto_lr"),
        (None, TOTAL, "auto_lr"),
        (falling, None, "auto_lr"),
        (falling, TOTAL, "adam"),  # has no schedule of its own
        (lr_scheduler.ConstantLR, TOTAL, "auto_lr"),  # a third of lr in the first steps
    ],
)
def test_a_warm_up_and_a_single_schedule_are_right(schedule, total_steps, rule):
    model = make_model()
    optimizer = make(rule, model, total_steps=total_steps)
    with no_warning():
        run(optimizer, model, schedule)


@pytest.mark.parametrize("cycle", [lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR])
def test_schedulers_that_want_a_momentum_say_so_and_work_without(cycle):
    model = make_model()
    optimizer = make("auto_lr", model, total_steps=None)
    options = (
        {"max_lr": 1.0, "total_steps": TOTAL} if cycle is lr_scheduler.OneCycleLR else {"base_lr": 0.1, "max_lr": 1.0}
    )
    with pytest.raises(ValueError, match="momentum"):
        cycle(optimizer, **options)
    run(optimizer, model, lambda o: cycle(o, **options, cycle_momentum=False))
    assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------- the horizon
@pytest.mark.parametrize("own", [10, 40, torch.tensor(40)])
def test_a_run_resumed_with_another_horizon_has_its_own_and_says_so(own):
    model = make_model()
    optimizer = make("auto_lr", model, total_steps=TOTAL)
    train(model, optimizer, 5)
    saved = through_disk(optimizer.state_dict())
    again = make("auto_lr", model, total_steps=own)
    with pytest.warns(UserWarning, match=f"total_steps={int(own)} of this optimizer.*made with {TOTAL}"):
        again.load_state_dict(saved)
    assert [g["total_steps"] for g in again.param_groups] == [own]
    before = weights(model)
    train(model, again, 4)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert through_disk(again.state_dict())["param_groups"][0]["total_steps"] == own


@pytest.mark.parametrize(("own", "saved", "found"), [(None, TOTAL, TOTAL), (TOTAL, None, TOTAL), (TOTAL, TOTAL, TOTAL)])
def test_a_horizon_that_one_side_alone_has_is_kept(own, saved, found):
    model = make_model()
    state = make("auto_lr", model, total_steps=saved).state_dict()
    again = make("auto_lr", model, total_steps=own)
    with no_warning():
        again.load_state_dict(state)
    assert again.param_groups[0]["total_steps"] == found


# ------------------------------------------------------------------------------------------- resumed in another order
def square(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))


def test_parameters_without_names_in_another_order_are_refused_before_a_step():
    model = square(0)
    optimizer = NFNOpt(list(model.parameters()))

    def step(optimizer):
        optimizer.zero_grad()
        model(data()[0]).square().mean().backward()
        optimizer.step()

    step(optimizer)
    before, saved = weights(model), optimizer.state_dict()
    other = NFNOpt(list(model.parameters())[2:] + list(model.parameters())[:2])
    other.load_state_dict(saved)
    with pytest.raises(ValueError, match="another order: 0.weight where 2.weight is here"):
        step(other)
    assert_equal(weights(model), before)
    same = NFNOpt(list(model.parameters()))
    same.load_state_dict(saved)
    step(same)
    wrapped = nn.DataParallel(model)
    same = NFNOpt(list(wrapped.parameters()))
    same.load_state_dict(saved)
    wrapped(data()[0]).sum().backward()
    same.step()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_a_state_dict_of_a_wrapped_model_is_that_of_the_plain_one(named, given):
    def build(model):
        params = model.named_parameters() if named else model.parameters()
        return NFNOpt(params, symmetry=infer_symmetry(model, data()[0]) if given else "infer")

    plain, other = square(0), square(0)
    wrapped = nn.DataParallel(nn.Sequential(*(torch.compile(layer, backend="eager") for layer in other)))
    ours, theirs = build(plain), build(wrapped)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(data()[0]).square().mean().backward()
        optimizer.step()

    step(plain, ours)
    step(wrapped, theirs)
    saved = [through_disk(o.state_dict()) for o in (theirs, ours)]
    for model, state in zip((plain, wrapped), saved, strict=True):
        fresh = build(model)
        fresh.load_state_dict(state)
        step(model, fresh)
    torch.testing.assert_close(weights(plain), weights(other))


# ------------------------------------------------------------------------------------------- loss scaling
def test_a_loss_scaler_may_unscale_skip_and_go_on():
    plain, scaled = make_model(), make_model()
    optimizer, ours = (make("auto_lr", m, symmetry="infer") for m in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for i in range(6):
        loss = backward(plain)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        ours.zero_grad()
        x, y = data()
        scaler.scale((scaled(x) - y).square().mean()).backward()
        scaler.unscale_(ours)
        nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
        if i == 3:
            before, state = weights(scaled), ours.state_dict()["state"]
            scaled[0].weight.grad[0, 0] = math.inf
            scaler._per_optimizer_states[id(ours)]["found_inf_per_device"] = {torch.device("cpu"): torch.ones(1)}
        else:
            optimizer.step()
        scaler.step(ours)
        scaler.update()
        if i == 3:
            assert_equal(weights(scaled), before)
            assert_equal(ours.state_dict()["state"], state)
            assert not ours.skipped_steps
    assert loss.isfinite()
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- averages and closures
def test_averaged_models_follow_and_leave_the_symmetry(said):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    average = AveragedModel(model, use_buffers=True)
    optimizer = NFNOpt(model.parameters(), total_steps=TOTAL)
    for _ in range(4):
        train(model, optimizer, 1)
        average.update_parameters(model)
    update_bn([data()[0]], average)
    assert average(data()[0]).isfinite().all() and not said(logging.WARNING)
    assert optimizer.symmetry.specs["0.weight"].axes[0].label == optimizer.symmetry.specs["3.weight"].axes[1].label


@pytest.mark.parametrize("rule", ["auto_lr", "learned"])
def test_a_closure_may_climb_first(rule):
    """As sharpness-aware minimisation: the gradient is taken elsewhere, the step is taken here."""
    model = make_model()
    optimizer = make(rule, model, symmetry="infer")

    def closure():
        start = weights(model)
        backward(model)
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            for p in model.parameters():
                optimizer.state[p]["e_w"] = 0.05 * p.grad / norm
                p.add_(optimizer.state[p]["e_w"])
        loss = backward(model)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n])
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0] and optimizer.symmetry.specs.keys() == weights(model).keys()


def test_a_schedule_free_wrapper_trains_and_resumes():
    schedulefree = pytest.importorskip("schedulefree")

    def build(model):
        return schedulefree.ScheduleFreeWrapper(NFNOpt(model.parameters()), momentum=0.9)

    model = make_model()
    optimizer = build(model)
    optimizer.train()
    first = backward(model).item()
    train(model, optimizer, 15)
    optimizer.eval()
    saved, at = through_disk(optimizer.state_dict()), {n: x.clone() for n, x in model.state_dict().items()}
    assert backward(model).item() < first
    again = make_model(seed=3)
    again.load_state_dict(at)
    resumed = build(again)
    resumed.load_state_dict(saved)
    optimizer.train()
    resumed.train()
    train(model, optimizer, 2)
    train(again, resumed, 2)
    torch.testing.assert_close(weights(again), weights(model), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- an optimizer a parameter
@pytest.mark.parametrize("fails", [False, True])
def test_optimizers_in_the_backward_pass_ask_once(fails, asked, said):
    asked.error = RuntimeError("no") if fails else None
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(5, 5), nn.Tanh())))
    optimizers = {p: NFNOpt([p]) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = weights(model)
    for _ in range(3):
        model(data()[0]).square().mean().backward()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert len(asked) == 1 and len(said(logging.WARNING)) == fails
    if not fails:
        assert [o._bind()[0][0].name for o in optimizers.values()] == list(before)


def test_what_is_seen_at_another_time_is_asked_again(asked):
    """In another mode, with other data, or of another module."""
    model, x = make_model(), data()[0]
    first, second = NFNOpt(model.parameters()), NFNOpt(model.parameters())
    model(x).sum().backward()
    model.eval()
    third = NFNOpt(model.parameters())
    model(x).sum().backward()
    fourth = NFNOpt(model.parameters())
    model(x.clone()).sum().backward()
    for optimizer in (first, second, third, fourth):
        optimizer.step()
    assert [call[3][0] for call in asked] == [True, False, False]


# ------------------------------------------------------------------------------------------- no trace of looking
class Chancy(nn.Module):
    """Draws from every generator there is in its forward pass, and may read a number that depends on data."""

    def __init__(self, reads=False):
        super().__init__()
        self.a, self.b, self.reads = nn.Linear(5, 6), nn.Linear(6, 3), reads
        self.own = [random.Random(1), np.random.default_rng(1), np.random.RandomState(1), torch.Generator()]
        self.python, self.numpy, self.old, self.torch = self.own

    def forward(self, x):
        drawn = random.random() + float(np.random.rand()) + self.python.random() + float(self.numpy.random())
        x = self.a(x) + float(self.old.rand()) + drawn + torch.rand(6) + torch.rand(6, generator=self.torch)
        if self.reads and x.sum() > 0:
            x = 2 * x
        return self.b(torch.relu(x))

    def states(self):
        x, numpy = self.own[1].bit_generator.state, np.random.get_state()
        own = [self.python.getstate(), x, self.old.get_state()[1].tolist(), self.torch.get_state().tolist()]
        return [random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist(), *own]


@pytest.mark.parametrize("reads", [False, True])
def test_generators_are_after_an_inference_as_before(reads):
    model, x = Chancy(reads), data()[0]
    before = model.states()
    with contextlib.suppress(ValueError) if reads else contextlib.nullcontext():
        infer_symmetry(model, x)
    assert model.states() == before
    found = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with contextlib.suppress(ValueError):
            found.append(infer_symmetry(model, x))
    assert len(found) in (0, 2) and found[:1] == found[1:]


def test_torch_says_nothing_where_it_cannot_export(capfd):
    model = Chancy(reads=True)
    optimizer = NFNOpt(model.parameters())
    model(data()[0]).sum().backward()
    capfd.readouterr()
    optimizer.step()
    told = capfd.readouterr()
    assert "def forward" not in told.err and "torch/" not in told.err and not told.out
    assert "independent axes" in repr(optimizer)


# ------------------------------------------------------------------------------------------- what is said
def test_one_line_says_what_was_found(said):
    model = make_model()
    train(model, NFNOpt(model.parameters()), 2)
    (line,) = said(logging.INFO)
    for part in (
        "Sequential in ",
        " s: 4 tensors, 57 entries",
        "94.7 % of them on a label",
        "1 independent permutation",
    ):
        assert part in line
    assert not said(logging.WARNING)


def test_a_symmetry_that_was_given_is_said_too(said):
    model = make_model()
    optimizer = NFNOpt(model.named_parameters(), symmetry=infer_symmetry(model, data()[0]))
    train(model, optimizer, 2)
    (line,) = said(logging.INFO)
    assert "given: 4 tensors, 57 entries; 94.7 % of them on a label" in line


@pytest.mark.parametrize("habit", ["a rate", "past the end"])
def test_a_warning_points_at_the_line_of_the_user(habit):
    model = make_model()
    with pytest.warns(UserWarning) as told:
        optimizer = make("auto_lr", model, **({"lr": 1e-3} if habit == "a rate" else {"total_steps": 1}))
        train(model, optimizer, 3)
    assert len(told) == 1 and here(told[0])


class Penalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_a_penalty_on_the_weights_of_another_optimizer_is_seen(said):
    """Two optimizers share a forward pass: a scale of one is one of the other's weights too."""
    model = Penalised()
    kinds = [[p for n, p in model.named_parameters() if n.endswith(kind)] for kind in ("weight", "bias")]
    optimizers = [NFNOpt(params) for params in kinds]
    loss = model(data()[0]).square().mean() + 0.1 * model.first.bias.square().sum()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        assert not any(s.kind == "positive" for s in optimizer.symmetry.scales.values())
    assert "penalty" in said(logging.WARNING)[0]


@torch.library.custom_op("learned_opt_tests::strange", mutates_args=())
def strange(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


strange.register_fake(torch.empty_like)
strange.register_autograd(lambda _, g: g)


class Strange(nn.Module):
    """Most of its weights meet an operator that no rule knows."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(5, width), nn.Linear(width, 3)
        self.c = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.b(strange(self.a(x))) + self.c(x)


@pytest.mark.parametrize(("width", "warned"), [(30, 1), (3, 0)])
def test_operators_that_are_not_known_are_named_where_they_cost_most_of_the_symmetry(width, warned, said):
    model = Strange(width)
    train(model, NFNOpt(model.parameters()), 1)
    lines = said(logging.WARNING)
    assert len(lines) == warned and all("strange" in x and "register_rule" in x and " %" in x for x in lines)
    assert any("strange" in line and "not known" in line for line in said(logging.INFO))


def test_a_large_model_is_announced(asked, said):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    optimizer = NFNOpt(model.parameters())
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    assert "looking for the symmetry of Sequential (80 tensors)" in said(logging.INFO)[0]


class Branching(nn.Linear):
    """Reads a number that depends on data, so that it cannot be exported."""

    def forward(self, x):
        y = super().forward(x)
        return 2 * y if y.sum() > 0 else y


def test_a_model_whose_inference_failed_is_let_go():
    """What optimizers share of an inference holds no module, the error's traceback included.

    In a process of its own: torch keeps things of earlier exports.
    """
    program = """
import gc, weakref
from tests.test_frameworks import Branching, NFNOpt, data

model = Branching(5, 3)
optimizer = NFNOpt(model.parameters())
model(data()[0]).square().mean().backward()
optimizer.step()
gone = weakref.ref(model)
del model, optimizer
gc.collect()
assert gone() is None
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "inferring it failed" in ran.stderr, ran.stderr
