"""The contract of NFNOpt: what a user of torch.optim expects, held by every rule."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from learned_opt.optimizer import NFNOpt, apply_rule
from learned_opt.rules import RULES
from learned_opt.symmetry import SymmetryError, independent
from learned_opt.symmetry.infer import infer_symmetry

LR = {"adam": 1e-2, "sgd": 1e-2, "muon": 1e-2}  # the others set their own rate

every_rule = pytest.mark.parametrize("name", sorted(RULES))


def make_rule(name):
    """The rule with theta away from its start, where the learned rules are the nominal one."""
    rule, generator = RULES[name](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return rule


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 5, generator=generator)
    return x.to(dtype), torch.sin(x[:, :3]).to(dtype)


def backward(model, scale=1.0):
    x, y = data(next(model.parameters()).dtype)
    loss = scale * (model(x) - y).square().mean()
    model.zero_grad()
    loss.backward()
    return loss


def make(name, model, **options):
    options = {"lr": LR.get(name, 1.0), "total_steps": 50, "symmetry": "independent", **options}
    return NFNOpt(model.named_parameters(), rule=make_rule(name), **options)


def train(model, optimizer, steps):
    for _ in range(steps):
        backward(model)
        optimizer.step()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def through_disk(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ----------------------------------------------------------------------------------------- the step
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shell_is_the_pure_rule(name, dtype):
    model = make_model(dtype)
    optimizer = make(name, model, weight_decay=0.1)
    rule, symmetry = make_rule(name).to(dtype), independent(weights(model))
    params = weights(model)
    state = rule.init(params)
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
        twice = NFNOpt([p, p], rule="sgd", lr=0.1)
    once = NFNOpt([q], rule="sgd", lr=0.1)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    twice.step()
    once.step()
    assert_equal(p.detach(), q.detach())


def test_integer_tensors_are_passed_over():
    w, n = nn.Parameter(torch.ones(3)), nn.Parameter(torch.arange(3), requires_grad=False)
    optimizer = NFNOpt([w, n], rule="sgd", lr=0.1)
    w.grad = torch.ones(3)
    optimizer.step()
    assert_equal(n.detach(), torch.arange(3))
    assert_equal(w.detach(), torch.full((3,), 0.9))


# ---------------------------------------------------------------------------------------- precision
@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_are_computed_in_float32_and_rounded_at_the_end(name, dtype):
    model, wide = make_model(dtype), make_model(dtype).float()
    narrow_opt, wide_opt = make(name, model), make(name, wide)
    backward(model)
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        q.grad = p.grad.float()
    narrow_opt.step()
    wide_opt.step()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert_equal(p.detach(), q.detach().to(dtype))
        for slot, x in narrow_opt.state[p].items():
            assert x.dtype == torch.float32
            assert_equal(x, wide_opt.state[q][slot])


@every_rule
def test_mixed_precisions_train_together(name):
    model = make_model()
    model[2].double()
    dtypes = [p.dtype for p in model.parameters()]
    optimizer, before = make(name, model), weights(model)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert [p.dtype for p in model.parameters()] == dtypes
    assert [optimizer.state[p]["step"].dtype for p in model.parameters()] == dtypes
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@every_rule
@pytest.mark.parametrize("where", ["double default", "autocast", "inference"])
def test_the_callers_modes_do_not_matter(name, where):
    model, mirror = make_model(), make_model()
    ours, theirs = make(name, model), make(name, mirror)
    for _ in range(3):
        backward(model)
        backward(mirror)
        theirs.step()
        if where == "double default":
            torch.set_default_dtype(torch.float64)
            try:
                ours.step()
            finally:
                torch.set_default_dtype(torch.float32)
        else:
            mode = torch.autocast("cpu") if where == "autocast" else torch.inference_mode()
            with mode:
                ours.step()
    assert_equal(weights(model), weights(mirror))
    assert not any(x.is_inference() for s in ours.state.values() for x in s.values())


@every_rule
def test_a_step_draws_no_random_numbers(name):
    model = make_model()
    optimizer = make(name, model)
    backward(model)
    before = torch.get_rng_state()
    optimizer.step()
    assert_equal(torch.get_rng_state(), before)


@every_rule
def test_memory_does_not_grow(name):
    model = make_model()
    optimizer = make(name, model)

    def footprint():
        train(model, optimizer, 3)
        return sum(x.numel() for s in optimizer.state.values() for x in s.values())

    first = footprint()
    assert all(x.grad_fn is None for s in optimizer.state.values() for x in s.values())
    assert footprint() == first


# ----------------------------------------------------------------------------- non-finite gradients
@every_rule
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_with_a_non_finite_gradient_sits_out(name, value):
    model = make_model()
    optimizer = make(name, model)
    train(model, optimizer, 2)
    backward(model)
    model[0].weight.grad[0, 0] = value
    before = weights(model)
    state = copy.deepcopy(optimizer.state[model[0].weight])
    with pytest.warns(UserWarning, match=r"0\.weight"):
        optimizer.step()
    assert_equal(weights(model)["0.weight"], before["0.weight"])
    of_the_network = {"clock", "slope", "gained", "moved"}  # these go on: there was a step, by nothing
    after = optimizer.state[model[0].weight]
    assert_equal(*({k: x for k, x in s.items() if k not in of_the_network} for s in (after, state)))
    assert not torch.equal(model[2].weight, before["2.weight"])
    assert optimizer.skipped_steps == {"0.weight": 1}
    model[0].weight.grad.fill_(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned once already
        optimizer.step()
    assert optimizer.skipped_steps == {"0.weight": 2}
    train(model, optimizer, 1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_raise_names_the_tensor_and_moves_nothing():
    model = make_model()
    optimizer = make("adam", model, nan_policy="raise")
    train(model, optimizer, 1)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    backward(model)
    model[2].bias.grad[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"2\.bias"):
        optimizer.step()
    assert_equal(weights(model), before)
    assert_equal(optimizer.state_dict()["state"], state["state"])


def test_propagate_checks_nothing():
    model = make_model()
    optimizer = make("adam", model, nan_policy="propagate")
    backward(model)
    model[2].bias.grad[0] = float("nan")
    optimizer.step()
    assert model[2].bias[0].isnan() and not optimizer.skipped_steps


def test_large_but_finite_gradients_are_not_taken_for_infinite():
    model = make_model()
    optimizer = make("muon", model, nan_policy="raise")
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e38)
    optimizer.step()


def test_grad_scaler_skips_a_step_that_overflowed():
    model = make_model()
    optimizer, before = make("adam", model), weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = data()
    scaler.scale((model(x) - y).square().mean() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_equal(weights(model), before)
    assert not optimizer.skipped_steps and scaler.get_scale() < 4.0
    optimizer.zero_grad()
    scaler.scale((model(x) - y).square().mean()).backward()
    scaler.step(optimizer)
    assert not torch.equal(model[0].weight, before["0.weight"])


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
        ({"rule": "adamw2"}, ValueError, "adamw2"),
        ({"nan_policy": "ignore"}, ValueError, "nan_policy"),
    ],
)
def test_wrong_arguments_are_refused(options, error, match):
    options = {"params": [nn.Parameter(torch.ones(2))], "rule": "adam", **options}
    with pytest.raises(error, match=match):
        NFNOpt(options.pop("params"), **options)


@pytest.mark.parametrize("group", [{"lr": -1.0}, {"weight_decay": -1.0}, {"total_steps": 7}, {"lr": torch.ones(2)}])
def test_wrong_options_of_a_group_are_refused(group):
    optimizer = NFNOpt([nn.Parameter(torch.ones(2))], rule="adam", total_steps=5)
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **group})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused_by_name():
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = NFNOpt([("phase", p)], rule="adam")
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="complex.*phase"):
        optimizer.step()


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = NFNOpt(embedding.named_parameters(), rule="adam")
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse.*weight"):
        optimizer.step()


def test_sharded_parameters_are_refused_by_name():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = make_model()
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        optimizer = NFNOpt(model.named_parameters())
        backward(model)
        with pytest.raises(RuntimeError, match=r"sharded.*0\.weight"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_a_run_that_outlasts_its_horizon_is_told_once_also_after_a_resume():
    model = make_model()
    optimizer = make("paced", model, total_steps=3)
    train(model, optimizer, 2)
    again = make("paced", model, total_steps=3)
    again.load_state_dict(optimizer.state_dict())
    train(model, again, 1)
    before = weights(model)
    with pytest.warns(UserWarning, match="step 4, but total_steps=3"):
        train(model, again, 1)
    assert_equal(weights(model), before)
    with warnings.catch_warnings(action="error"):
        train(model, again, 1)
        train(model, make("adam", model, total_steps=1), 2)  # has no schedule
    later = make("paced", model, total_steps=100)
    later.load_state_dict(again.state_dict())  # whose horizon it takes, as torch has it
    with pytest.warns(UserWarning, match="step 6, but total_steps=3"):
        train(model, later, 1)
    later.param_groups[0]["total_steps"] = 6
    with pytest.warns(UserWarning, match="step 7, but total_steps=6"):
        train(model, later, 2)


# ------------------------------------------------------------------------------- names and symmetry
def chain_symmetry(model):
    """Its hidden units are one label: what independent axes do not say."""
    from learned_opt.symmetry import Label, Spec, Symmetry
    from learned_opt.symmetry.axes import Leaf

    def leaf(label=None, size=6):
        return Leaf(size, label)

    return Symmetry(
        {
            "0.weight": Spec((leaf("h"), leaf(size=5)), ("out", "in")),
            "0.bias": Spec((leaf("h"),), ("out",)),
            "2.weight": Spec((leaf(size=3), leaf("h")), ("out", "in")),
            "2.bias": Spec((leaf(size=3),), ("out",)),
        },
        {"h": Label(6)},
    )


@every_rule
def test_every_way_to_pass_the_parameters_trains_alike(name):
    ways = [
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m.parameters()}],
        lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters()}],
        lambda m: [
            {"params": list(m.named_parameters())[:2]},
            {"params": m[2].named_parameters("2")},
        ],
    ]
    results = []
    for way in ways:
        model = make_model()
        symmetry = chain_symmetry(model)
        optimizer = NFNOpt(way(model), symmetry=symmetry, rule=make_rule(name), lr=LR.get(name, 1.0))
        train(model, optimizer, 3)
        results.append(weights(model))
    for other in results[1:]:
        assert_equal(other, results[0])


@every_rule
def test_a_network_relabelled_trains_relabelled(name):
    model, moved = make_model(torch.float64), make_model(torch.float64)
    symmetry = chain_symmetry(model)
    g = symmetry.sample(torch.Generator().manual_seed(0))
    moved.load_state_dict(symmetry.act(g, weights(model)))
    for m in (model, moved):
        train(m, make(name, m, symmetry=symmetry), 5)
    expected = symmetry.act(g, weights(model))
    tol = 1e-1 if name == "muon" else 1e-9  # Muon rounds to bfloat16, in another order of the rows
    torch.testing.assert_close(weights(moved), expected, rtol=tol, atol=tol)


def test_wrappers_prefixes_do_not_hide_a_name():
    model = make_model()
    wrapped = [(f"module._orig_mod.{n}", p) for n, p in model.named_parameters()]
    optimizer = NFNOpt(wrapped, symmetry=chain_symmetry(model), rule="adam")
    train(model, optimizer, 1)
    assert len(optimizer.state) == 4


def test_a_symmetry_may_describe_more_than_is_trained():
    model = make_model()
    optimizer = NFNOpt(
        [(n, p) for n, p in model.named_parameters() if n != "2.bias"],
        symmetry=chain_symmetry(model),
        rule="nominal",
    )
    before = weights(model)
    train(model, optimizer, 2)
    assert_equal(model[2].bias.detach(), before["2.bias"])
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_a_symmetry_that_does_not_fit_is_refused_with_names_and_shapes():
    model = make_model()
    symmetry = chain_symmetry(model)
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with pytest.raises(SymmetryError, match=r"0\.weight.*\(7, 5\).*\(6, 5\)"):
        NFNOpt(other.named_parameters(), symmetry=symmetry, rule="adam")
    with pytest.raises(SymmetryError, match="extra.*not described"):
        NFNOpt(
            [*model.named_parameters(), ("extra", nn.Parameter(torch.ones(2)))],
            symmetry=symmetry,
            rule="adam",
        )
    with pytest.raises(SymmetryError, match=r"several.*0\.bias"):
        NFNOpt(
            [("0.bias", model[0].bias), ("module.0.bias", other[0].bias)],
            symmetry=symmetry,
            rule="adam",
        )
    with pytest.raises(SymmetryError, match="named_parameters"):
        NFNOpt(list(model.parameters())[::-1], symmetry=symmetry, rule="adam")


def test_two_networks_with_the_same_names_fit_one_optimizer():
    a, b = make_model(seed=0), make_model(seed=1)
    optimizer = NFNOpt([*a.named_parameters(), *b.named_parameters()], rule="adam", lr=0.01)
    before = weights(a), weights(b)
    backward(a)
    backward(b)
    optimizer.step()
    assert not torch.equal(a[0].weight, before[0]["0.weight"])
    assert not torch.equal(b[0].weight, before[1]["0.weight"])


@pytest.mark.parametrize(("name", "most"), [("nominal", 0.3), ("paced", 0.9)])  # paced begins at a part of its rate
def test_the_schedule_goes_on_where_other_tensors_were_trained_before(name, most):
    model = make_model()
    optimizer = make(name, model, total_steps=10)
    model[0].requires_grad_(False)
    train(model, optimizer, 9)
    model[0].requires_grad_(True)
    model[2].requires_grad_(False)
    other = copy.deepcopy(model)
    before = weights(model)["0.weight"]
    train(model, optimizer, 1)
    train(other, make(name, other, total_steps=10), 1)
    last, first = (weights(m)["0.weight"] - before for m in (model, other))
    assert last.norm() < most * first.norm(), "the last of ten steps, though this tensor's first"
    assert [optimizer.state[model[i].weight]["clock"] for i in (0, 2)] == [10, 10]


@every_rule
def test_parameters_can_be_added_in_mid_training(name):
    model, lr = make_model(), LR.get(name, 1.0)
    optimizer = NFNOpt(model[0].named_parameters("0"), symmetry="independent", rule=make_rule(name), lr=lr)
    train(model, optimizer, 2)
    before = weights(model)
    optimizer.add_param_group({"params": model[2].named_parameters("2"), "lr": 0.5 * lr})
    train(model, optimizer, 2)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.state[model[0].weight]["step"] == 4
    assert optimizer.state[model[2].weight]["step"] == 2


def test_parameters_that_the_symmetry_lacks_are_not_added():
    model = make_model()
    optimizer = NFNOpt(model.named_parameters(), symmetry=chain_symmetry(model), rule="adam")
    with pytest.raises(SymmetryError, match="extra"):
        optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(2)))]})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, 1)


def test_tensors_swapped_inside_the_groups_are_followed():
    model = make_model()
    optimizer = make("adam", model, symmetry=chain_symmetry(model))
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())  # as accelerate does
    optimizer.param_groups[0]["params"][0] = model[0].weight
    before = weights(model)
    train(model, optimizer, 1)
    assert not torch.equal(model[0].weight, before["0.weight"])
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(SymmetryError, match=r"0\.weight"):
        optimizer.step()


@pytest.mark.parametrize(("change", "left"), [(lambda groups: groups.pop(0), 4), (lambda groups: groups.reverse(), 6)])
def test_tensors_keep_their_names_when_groups_change(change, left):
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    optimizer = NFNOpt([{"params": model[i].parameters()} for i in (0, 2, 4)])
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    change(optimizer.param_groups)
    optimizer.step()
    names = {e.name: e.param for e in optimizer._bind()[0]}
    assert len(names) == left
    assert all(model.get_parameter(n) is p for n, p in names.items())


def test_a_group_may_go_and_return_and_be_saved_at_once():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    optimizer = NFNOpt([{"params": model[i].parameters()} for i in (0, 2, 4)])
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    first = optimizer.param_groups.pop(0)
    for p in first["params"]:
        del optimizer.state[p]
    saved = NFNOpt([{"params": model[i].parameters()} for i in (2, 4)])
    saved.load_state_dict(optimizer.state_dict())
    for copied in (saved, copy.deepcopy(optimizer)):
        assert [e.name for e in copied._bind()[0]] == ["2.weight", "2.bias", "4.weight", "4.bias"]
    optimizer.step()
    optimizer.param_groups.append(first)
    optimizer.step()
    names = {e.name: e.param for e in optimizer._bind()[0]}
    assert len(names) == 6 and all(model.get_parameter(n) is p for n, p in names.items())


def test_running_statistics_do_not_count_as_positions():
    """A symmetry describes them; an optimizer has none."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    symmetry = infer_symmetry(model, torch.randn(2, 1, 4, 4))
    assert "1.running_mean" in symmetry.specs
    optimizer = NFNOpt(model.parameters(), symmetry=symmetry, rule="adam")
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    assert [e.name for e in optimizer._bind()[0]] == [n for n, _ in model.named_parameters()]


# ------------------------------------------------------------------------------- saving and loading
@every_rule
@pytest.mark.parametrize("named", [True, False])
def test_a_run_resumes_bit_for_bit_through_a_file(name, named):
    def build(model, **options):
        params = model.named_parameters() if named else model.parameters()
        return NFNOpt(params, rule=make_rule(name), **options)

    model = make_model()
    optimizer = build(
        model,
        lr=LR.get(name, 1.0),
        total_steps=20,
        weight_decay=0.1,
        symmetry=chain_symmetry(model),
    )
    train(model, optimizer, 5)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 5)

    resumed = make_model(seed=7)
    resumed.load_state_dict(saved["model"])
    fresh = build(resumed)
    fresh.load_state_dict(saved["optimizer"])
    train(resumed, fresh, 5)
    assert_equal(weights(resumed), weights(model))
    assert fresh.symmetry == optimizer.symmetry
    assert repr(fresh) == repr(optimizer)


def test_the_state_dict_has_torchs_form_and_is_not_changed_by_loading():
    model = make_model()
    optimizer = make("nfn", model)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"} and set(saved["state"]) == {0, 1, 2, 3}
    keys = [set(g) for g in saved["param_groups"]]
    optimizer.load_state_dict(state_dict=saved)
    assert [set(g) for g in saved["param_groups"]] == keys
    assert "theta" not in optimizer.param_groups[0]


@every_rule
def test_float32_state_of_narrow_parameters_survives_loading(name):
    model = make_model(torch.bfloat16)
    optimizer = make(name, model)
    train(model, optimizer, 3)
    fresh = make(name, model)
    fresh.load_state_dict(through_disk(optimizer.state_dict()))
    for p in model.parameters():
        assert all(x.dtype == torch.float32 for x in fresh.state[p].values())
        assert_equal(fresh.state[p], optimizer.state[p])


def test_theta_travels_with_the_state():
    model = make_model()
    optimizer = make("nfn", model)
    train(model, optimizer, 2)
    own = RULES["nfn"]()
    fresh = NFNOpt(model.named_parameters(), rule=own)
    start = {n: p.clone() for n, p in own.state_dict().items()}
    with pytest.warns(UserWarning, match="learned weights"):
        fresh.load_state_dict(optimizer.state_dict())
    assert_equal(dict(fresh.rule.state_dict()), dict(optimizer.rule.state_dict()))
    assert_equal(dict(own.state_dict()), start)


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda s: s["state"].__setitem__(0, {"step": torch.zeros(())}), "0.weight.*slots step"),
        (lambda s: s["state"][2].update(m=torch.zeros(2, 2)), r"2.weight.*\(2, 2\).*\(3, 6\)"),
        (lambda s: s["state"].update({9: s["state"][0]}), "unknown parameter 9"),
        (lambda s: s["param_groups"][0]["param_names"].reverse(), "0.weight here is 2.bias"),
        (lambda s: s["param_groups"][0].update(rule="Adam()"), r"Adam\(\)"),
        (lambda s: s["param_groups"][0]["theta"]["gate.bias"].add_(1), "altered"),
        (lambda s: s["param_groups"][0].update(theta_sha256="0" * 64, theta=None), "000000"),
        (lambda s: s["param_groups"][0]["params"].pop(), "size of optimizer's group"),
        (lambda s: s["param_groups"].pop(), "number of parameter groups"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_before_anything_changes(spoil, match):
    model = make_model()
    optimizer = make("nfn", model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for slots in saved["state"].values():
        slots["m"] = slots["m"] + 1
    saved["param_groups"][0]["lr"] = 123.0
    before = copy.deepcopy(optimizer.state_dict())
    rule = optimizer.rule
    spoil(saved)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert_equal(optimizer.state_dict()["state"], before["state"])
    assert optimizer.param_groups[0]["lr"] == 1.0 and optimizer.rule is rule


def test_another_symmetry_is_refused_and_infer_takes_that_of_the_state_dict():
    model = make_model()
    symmetry = chain_symmetry(model)
    saved = make("adam", model, symmetry=symmetry).state_dict()
    for choice in ("independent", independent(weights(model))):
        with pytest.raises(ValueError, match="another symmetry"):
            make("adam", model, symmetry=choice).load_state_dict(saved)
    plain = make("adam", model, symmetry="infer")
    assert plain.symmetry is None
    plain.load_state_dict(saved)
    assert plain.symmetry == symmetry


def test_older_state_dicts_load():
    model = make_model()
    optimizer = make("adam", model)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    for key in ("rule", "theta", "theta_sha256", "symmetry", "total_steps", "maximize"):
        del saved["param_groups"][0][key]
    saved["state"] = {k: {**s, "step": s["step"].item()} for k, s in saved["state"].items()}
    fresh = make("adam", model)
    fresh.load_state_dict(saved)
    train(model, fresh, 1)
    assert fresh.state[model[0].weight]["step"] == 3
    assert fresh.param_groups[0]["total_steps"] == 50


@pytest.mark.parametrize("names", [(True, False), (False, True)])
def test_names_may_be_missing_on_one_side(names):
    model = make_model()
    given = [model.named_parameters if named else model.parameters for named in names]
    optimizer = NFNOpt(given[0](), symmetry="independent")
    train(model, optimizer, 2)
    fresh = NFNOpt(given[1](), symmetry="independent")
    fresh.load_state_dict(optimizer.state_dict())
    assert_equal(fresh.state_dict()["state"], optimizer.state_dict()["state"])


def test_numbers_of_numpy_are_saved_as_plain_ones():
    model = make_model()
    optimizer = make("paced", model, total_steps=np.int64(9), weight_decay=np.float64(0.1))
    group = through_disk(optimizer.state_dict())["param_groups"][0]
    assert (group["total_steps"], group["weight_decay"]) == (9, 0.1)


def test_a_pre_hook_may_rename_before_names_are_checked():
    model = make_model()
    saved = make("adam", model).state_dict()
    saved["param_groups"][0]["param_names"] = [f"net.{n}" for n in saved["param_groups"][0]["param_names"]]
    optimizer = make("adam", model)
    with pytest.raises(ValueError, match=r"net\.0\.weight"):
        optimizer.load_state_dict(saved)

    def rename(_, state_dict):
        group = state_dict["param_groups"][0]
        group["param_names"] = [n.removeprefix("net.") for n in group["param_names"]]
        return state_dict

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.load_state_dict(saved)


@every_rule
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_continues_like_the_original(name, copier):
    model = make_model()
    optimizer = make(name, model, symmetry=chain_symmetry(model), nan_policy="raise")
    train(model, optimizer, 3)
    twin_model, twin = copier((model, optimizer))
    public = {k for k in vars(optimizer) if not k.startswith("_")}
    assert public == {k for k in vars(twin) if not k.startswith("_")}
    assert twin.nan_policy == "raise" and twin.symmetry == optimizer.symmetry
    train(model, optimizer, 3)
    train(twin_model, twin, 3)
    assert_equal(weights(twin_model), weights(model))


def test_the_first_load_of_accelerate_works():
    model = make_model()
    optimizer = make("nfn", model)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)


# ---------------------------------------------------------------- torch's distributed checkpointing
@every_rule
def test_the_dummy_step_makes_state_and_is_no_step(name):
    model = make_model()
    optimizer, before = make(name, model, weight_decay=0.1), weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure=None)
    assert_equal(weights(model), before)
    assert all(not x.any() for s in optimizer.state.values() for x in s.values())
    assert len(optimizer.state) == 4


@every_rule
@pytest.mark.parametrize("lr, scale", [(1e-3, 0.0), (0.0, 1.0)])
def test_only_zero_gradients_at_zero_rate_are_no_step(name, lr, scale):
    model = make_model()
    optimizer, before = make(name, model, lr=lr), weights(model)
    backward(model, scale)
    optimizer.step()
    assert_equal(weights(model), before)
    assert all(s["step"] == 1 for s in optimizer.state.values())


@every_rule
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_distributed_checkpointing_resumes(name, flatten, symmetric, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_model()
    symmetry = chain_symmetry(model) if symmetric else "independent"
    optimizer = make(name, model, symmetry=symmetry)
    train(model, optimizer, 3)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    torch.distributed.checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)

    resumed = copy.deepcopy(model)
    fresh = make(name, resumed, symmetry=symmetry)
    target = {"optimizer": get_optimizer_state_dict(resumed, fresh, options=options)}
    torch.distributed.checkpoint.load(target, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(resumed, fresh, target["optimizer"], options=options)
    train(model, optimizer, 3)
    train(resumed, fresh, 3)
    assert_equal(weights(resumed), weights(model))


@every_rule
def test_no_two_fresh_slots_are_one_tensor(name):
    """What loads a checkpoint in place would write both."""
    slots = [x for state in make_rule(name).init(weights(make_model())).values() for x in state.values() if x.numel()]
    assert len({x.data_ptr() for x in slots}) == len(slots)


# ------------------------------------------------------------------------------------- small things
def test_the_optimizer_has_no_modes():
    optimizer = make("nfn", make_model())
    assert not hasattr(optimizer, "train") and not hasattr(optimizer, "eval")


def test_repr_says_what_it_is():
    model = make_model()
    text = repr(make("adam", model, symmetry=chain_symmetry(model), lr=0.25))
    for part in ("NFNOpt", "Adam(", "4 tensors", "57 weights", "lr=0.25", "total_steps=50"):
        assert part in text


def test_apply_rule_leaves_its_arguments_alone():
    model = make_model()
    rule, params = make_rule("nfn"), weights(model)
    grads, state = {n: torch.ones_like(p) for n, p in params.items()}, rule.init(params)
    before = copy.deepcopy((params, grads, state))
    apply_rule(rule, params, grads, state, independent(params))
    assert_equal((params, grads, state), before)
