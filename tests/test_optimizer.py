"""The contract of NFNOpt: what a user of torch.optim expects, held by every rule."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

from learned_opt.functional import apply_rule
from learned_opt.optimizer import NFNOpt
from learned_opt.symmetry import independent
from tests.optimizer_contract import (
    LR,
    assert_equal,
    backward,
    chain_symmetry,
    every_rule,
    make,
    make_model,
    make_rule,
    train,
    weights,
)
from tests.rules.classic import SGD, Adam


# ----------------------------------------------------------------------------------------- the step
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shell_is_the_pure_rule(name, dtype):
    model = make_model(dtype)
    optimizer = make(name, model, weight_decay=0.1)
    rule, symmetry = make_rule(name).to(dtype), independent(weights(model))
    params = weights(model)
    state = rule.init(params, symmetry)
    for _ in range(5):
        backward(model)
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        with torch.no_grad():
            updates, state = rule(params, grads, state, symmetry, total_steps=50, weight_decay=0.1)
        params = {n: p.add(updates[n], alpha=LR.get(name, 1.0)) for n, p in params.items()}
        assert_equal(weights(model), params)


@every_rule
def test_the_loss_goes_down(name):
    model = make_model()
    optimizer = make(name, model)
    first = backward(model).item()
    train(model, optimizer, 40)
    assert backward(model).item() < 0.8 * first


@pytest.mark.filterwarnings("ignore:.*torch.compile")
def test_torch_compile_makes_no_graph_of_a_step():
    """Neither at first, nor for another rate, and the steps are the same."""
    torch._dynamo.reset()
    graphs, runs = CompileCounter(), []
    for compiled in (False, True):
        model = make_model()
        optimizer = make("auto_lr", model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        step = torch.compile(optimizer.step, backend=graphs) if compiled else optimizer.step
        for _ in range(4):
            backward(model)
            step()
            scheduler.step()
        runs.append(weights(model))
    assert graphs.frame_count == 0
    assert_equal(*runs)


@every_rule
def test_zero_gradients_move_nothing(name):
    model = make_model()
    optimizer, before = make(name, model), weights(model)
    for _ in range(3):
        backward(model, scale=0.0)
        optimizer.step()
    assert_equal(weights(model), before)


@every_rule
def test_a_tiny_learning_rate_moves_nothing(name):
    model = make_model()
    optimizer, before = make(name, model, lr=1e-28), weights(model)
    train(model, optimizer, 3)
    assert_equal(weights(model), before)


@every_rule
def test_gradients_are_never_written_to(name):
    model = make_model()
    optimizer = make(name, model, weight_decay=0.1, maximize=True)
    for _ in range(2):
        backward(model)
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert_equal([p.grad for p in model.parameters()], grads)


@every_rule
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15, 1e30])
def test_extreme_gradients_leave_weights_and_state_finite(name, scale):
    if scale > 1 and name == "sgd":
        pytest.skip("SGD's step is as large as its gradient, rightly")
    model = make_model()
    optimizer = make(name, model)
    for _ in range(3):
        backward(model)
        for p in model.parameters():
            p.grad.mul_(scale)
        before = weights(model)
        optimizer.step()
        assert all(x.isfinite().all() for s in optimizer.state.values() for x in s.values())
        step = max((p - before[n]).abs().max().item() for n, p in model.named_parameters())
        assert step < 1.0


def test_maximize_is_descent_of_the_negated_loss():
    model, mirror = make_model(), make_model()
    up = make("adam", model, maximize=True)
    down = make("adam", mirror)
    for _ in range(3):
        backward(model)
        up.step()
        backward(mirror, scale=-1.0)
        down.step()
    assert_equal(weights(model), weights(mirror))


@every_rule
def test_a_group_has_its_own_learning_rate_and_weight_decay(name):
    lr = LR.get(name, 1.0)

    def run(first, second):
        model = make_model()
        layers = [model[0], model[2]]
        groups = [
            {"params": list(layer.named_parameters(f"l{i}")), **options}
            for i, (layer, options) in enumerate(zip(layers, (first, second), strict=True))
        ]
        optimizer = NFNOpt(groups, rule=make_rule(name), lr=lr)
        train(model, optimizer, 1)
        return weights(model)

    start = weights(make_model())
    plain = run({}, {})
    other = run({"lr": 0.0}, {"lr": 0.5 * lr, "weight_decay": 0.1})
    decayed = run({}, {"weight_decay": 0.1})
    assert_equal(other["0.weight"], start["0.weight"])
    assert_equal(decayed["0.weight"], plain["0.weight"])
    half = start["2.weight"] + 0.5 * (decayed["2.weight"] - start["2.weight"])
    torch.testing.assert_close(other["2.weight"], half)
    pull = decayed["2.weight"] - plain["2.weight"]
    assert torch.nn.functional.cosine_similarity(pull.ravel(), start["2.weight"].ravel(), 0) < -0.9


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_learning_rate_is_that_number(shape):
    model, mirror = make_model(), make_model()
    ours = make("adam", model, lr=torch.full(shape, 0.01))
    theirs = make("adam", mirror, lr=0.01)
    train(model, ours, 3)
    train(mirror, theirs, 3)
    torch.testing.assert_close(weights(model), weights(mirror), rtol=1e-6, atol=1e-8)
    assert ours.param_groups[0]["lr"].shape == shape


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_schedulers_drive_the_learning_rate(lr):
    model, mirror = make_model(), make_model()
    ours = make("sgd", model, lr=lr)
    theirs = torch.optim.SGD(mirror.parameters(), lr=0.1, momentum=0.9)
    schedules = [
        torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
            ],
            milestones=[3],
        )
        for o in (ours, theirs)
    ]
    for _ in range(8):
        for m, o, s in zip((model, mirror), (ours, theirs), schedules, strict=True):
            backward(m)
            o.step()
            s.step()
    torch.testing.assert_close(weights(model), weights(mirror), rtol=1e-5, atol=1e-6)


def test_a_closure_runs_with_gradients_and_its_loss_comes_back():
    model = make_model()
    optimizer = make("adam", model)

    def closure():
        assert torch.is_grad_enabled()
        return backward(model)

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert optimizer.step() is None and optimizer.step(closure=None) is None


def test_hooks_run_in_order():
    model = make_model()
    optimizer, seen = make("adam", model), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))

    def closure():
        seen.append("closure")
        return backward(model)

    optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "closure", "after", "saved", "loading", "loaded"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(seen) == 9, "temporary hooks stayed"


@every_rule
def test_missing_gradients_and_frozen_tensors_stay_and_may_return(name):
    model = make_model()
    optimizer, before = make(name, model), weights(model)
    backward(model)
    model[0].weight.grad = None
    model[2].bias.requires_grad_(False)
    optimizer.step()
    after = weights(model)
    assert_equal(after["0.weight"], before["0.weight"])
    assert_equal(after["2.bias"], before["2.bias"])
    assert not torch.equal(after["2.weight"], before["2.weight"])
    assert model[0].weight not in optimizer.state and model[2].bias not in optimizer.state
    model[2].bias.requires_grad_(True)
    train(model, optimizer, 1)
    assert not torch.equal(model[2].bias, before["2.bias"])
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_without_any_gradient_a_step_does_nothing():
    model = make_model()
    optimizer, before = make("adam", model), weights(model)
    optimizer.step()
    assert_equal(weights(model), before)
    assert not optimizer.state


@every_rule
@settings(max_examples=8, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=5).map(tuple), min_size=1, max_size=4),
    split=st.integers(0, 3),
)
def test_every_shape_and_grouping_steps(name, shapes, split):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    groups = [{"params": g} for g in (params[:split], params[split:]) if g]
    optimizer = NFNOpt(groups, symmetry="independent", rule=make_rule(name), lr=LR.get(name, 1.0))
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    for p, start in zip(params, before, strict=True):
        assert p.isfinite().all() and p.shape == start.shape
        assert p.numel() == 0 or not torch.equal(p, start)


@every_rule
def test_layout_in_memory_changes_nothing_and_stays(name):
    def run(layout):
        torch.manual_seed(0)
        w = layout(torch.randn(4, 3, 3, 3))
        p = nn.Parameter(w)
        optimizer = NFNOpt([("w", p)], symmetry="independent", rule=make_rule(name), lr=LR.get(name, 1.0))
        for _ in range(3):
            p.grad = torch.randn(4, 3, 3, 3)
            optimizer.step()
        assert p.stride() == w.stride()
        return p.detach()

    plain = run(lambda x: x)
    last = run(lambda x: x.to(memory_format=torch.channels_last))
    transposed = run(lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(transposed, plain, rtol=1e-4, atol=1e-6)


def test_a_tied_tensor_is_updated_once():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate"):
        twice = NFNOpt([p, p], rule=SGD(), lr=0.1)
    once = NFNOpt([q], rule=SGD(), lr=0.1)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    twice.step()
    once.step()
    assert_equal(p.detach(), q.detach())


def test_integer_tensors_are_passed_over():
    w, n = nn.Parameter(torch.ones(3)), nn.Parameter(torch.arange(3), requires_grad=False)
    optimizer = NFNOpt([w, n], rule=SGD(), lr=0.1)
    w.grad = torch.ones(3)
    optimizer.step()
    assert_equal(n.detach(), torch.arange(3))
    assert_equal(w.detach(), torch.full((3,), 0.9))


# ----------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"params": []}, ValueError, "empty parameter list"),
        ({"params": nn.Parameter(torch.ones(2))}, TypeError, "iterable"),
        ({"params": [1.0]}, TypeError, "only optimize Tensors"),
        ({"params": [torch.ones(2, requires_grad=True) * 2]}, ValueError, "non-leaf"),
        ({"lr": -1.0}, ValueError, "lr=-1.0"),
        ({"lr": float("nan")}, ValueError, "lr=nan"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"total_steps": 0}, ValueError, "total_steps=0"),
        ({"total_steps": float("inf")}, ValueError, "total_steps=inf"),
        ({"total_steps": "100"}, TypeError, "total_steps='100'"),
        ({"lr": "1"}, TypeError, "lr='1'"),
        ({"lr": True}, TypeError, "lr=True"),
        ({"lr": None}, TypeError, "lr=None"),
        ({"lr": torch.tensor(True)}, TypeError, "lr=tensor"),
        ({"lr": torch.tensor(1j)}, TypeError, "lr=tensor"),
        ({"lr": [1.0]}, TypeError, "lr=.*of type list"),
        ({"weight_decay": False}, TypeError, "weight_decay=False"),
        ({"weight_decay": np.bool_(True)}, TypeError, "weight_decay=.*True"),
        ({"total_steps": True}, TypeError, "total_steps=True"),
        ({"total_steps": 0.5}, ValueError, "total_steps=0.5"),
        ({"maximize": "no"}, TypeError, "maximize='no'"),
        ({"rule": "adamw2"}, ValueError, "adamw2"),
        ({"rule": "muon"}, ValueError, "unknown rule 'muon'"),
        ({"rule": "nfn-permutation"}, ValueError, "unknown rule 'nfn-permutation'"),
        ({"nan_policy": "ignore"}, ValueError, "nan_policy"),
    ],
)
def test_wrong_arguments_are_refused(options, error, match):
    options = {"params": [nn.Parameter(torch.ones(2))], "rule": Adam(), **options}
    with pytest.raises(error, match=match):
        NFNOpt(options.pop("params"), **options)


@pytest.mark.parametrize(
    "group", [{"lr": -1.0}, {"lr": True}, {"weight_decay": -1.0}, {"total_steps": 7}, {"lr": torch.ones(2)}]
)
def test_wrong_options_of_a_group_are_refused(group):
    optimizer = NFNOpt([nn.Parameter(torch.ones(2))], rule=Adam(), total_steps=5)
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **group})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused_by_name():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = NFNOpt([("phase", p)], rule=Adam())
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="complex.*phase"):
        optimizer.step()


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = NFNOpt(embedding.named_parameters(), rule=Adam())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse.*weight"):
        optimizer.step()


def test_a_run_that_outlasts_its_horizon_is_told_once_also_after_a_resume():
    model = make_model()
    optimizer = make("auto_lr", model, total_steps=3)
    train(model, optimizer, 2)
    again = make("auto_lr", model, total_steps=3)
    again.load_state_dict(optimizer.state_dict())
    train(model, again, 1)
    before = weights(model)
    with pytest.warns(UserWarning, match="step 4, but total_steps=3"):
        train(model, again, 1)
    assert_equal(weights(model), before)
    with warnings.catch_warnings(action="error"):
        train(model, again, 1)
        train(model, make("adam", model, total_steps=1), 2)  # has no schedule
    later = make("auto_lr", model, total_steps=None)
    later.load_state_dict(again.state_dict())
    with pytest.warns(UserWarning, match="step 6, but total_steps=3"):
        train(model, later, 1)
    later.param_groups[0]["total_steps"] = 6
    with pytest.warns(UserWarning, match="step 7, but total_steps=6"):
        train(model, later, 2)


# ------------------------------------------------------------------------------------- small things
def test_the_optimizer_has_no_modes():
    optimizer = make("gated", make_model())
    assert not hasattr(optimizer, "train") and not hasattr(optimizer, "eval")


def test_repr_says_what_it_is():
    model = make_model()
    text = repr(make("adam", model, symmetry=chain_symmetry(model), lr=0.25))
    for part in ("NFNOpt", "Adam(", "4 tensors", "57 weights", "lr=0.25", "total_steps=50"):
        assert part in text


def test_apply_rule_leaves_its_arguments_alone():
    model = make_model()
    rule, params, symmetry = make_rule("auto_lr"), weights(model), independent(weights(model))
    grads, state = {n: torch.ones_like(p) for n, p in params.items()}, rule.init(params, symmetry)
    for _ in range(2):
        _, state = apply_rule(rule, params, grads, state, symmetry)
    before = copy.deepcopy((params, grads, state))
    apply_rule(rule, params, grads, state, symmetry)
    assert_equal((params, grads, state), before)


def test_a_learning_rate_by_habit_is_told():
    model = nn.Linear(5, 6)
    with pytest.warns(UserWarning, match="lr=0.001 multiplies the rate"):
        NFNOpt(model.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NFNOpt(model.parameters(), lr=0.3)
        NFNOpt(model.parameters(), lr=1e-3, rule=SGD())
