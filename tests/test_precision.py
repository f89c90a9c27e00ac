"""Narrow, wide and mixed parameters, and gradients that are not finite."""

import copy
import warnings

import pytest
import torch

from tests.optimizer_contract import (
    assert_equal,
    backward,
    data,
    every_rule,
    make,
    make_model,
    train,
    weights,
)


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
        assert narrow_opt.state[p]["step"].dtype == torch.float32
        for slot, x in narrow_opt.state[p].items():
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
    assert {s["step"].dtype for s in optimizer.state.values()} == {torch.float64}
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@every_rule
def test_a_wide_tensor_that_is_not_trained_changes_no_precision(name):
    model, mirror = make_model(), make_model()
    model[2].double().requires_grad_(False)
    mirror[2].requires_grad_(False)
    for m in (model, mirror):
        optimizer = make(name, m)
        for _ in range(3):
            for p in m[0].parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert optimizer.state[mirror[0].weight]["step"].dtype == torch.float32
    torch.testing.assert_close(weights(model[0]), weights(mirror[0]), rtol=1e-6, atol=1e-7)


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
    assert_equal(optimizer.state[model[0].weight], state)
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


# ------------------------------------------------------------------------------------- state_dtype
@pytest.mark.parametrize("name", ["auto_lr", "whitened_polar", "learned"])
def test_state_dtype_narrows_what_is_as_large_as_weights(name):
    """Second moments stay wide. Steps are soon others, as directions with little momentum follow its rounding."""
    models, held = [make_model(), make_model()], []
    starts = [torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in models]
    for model, dtype in zip(models, (None, torch.bfloat16), strict=True):
        optimizer = make(name, model, state_dtype=dtype)
        train(model, optimizer, 4)
        held.append([optimizer.state[p] for p in model.parameters()])
    for wide, narrow in zip(*held, strict=True):
        assert wide.keys() == narrow.keys()
        assert all(x.isfinite().all() for x in narrow.values())
        assert {narrow["m"].dtype, narrow["last_update"].dtype} == {torch.bfloat16}
        assert narrow["step"].dtype == wide["m"].dtype == torch.float32
        assert {x.dtype for k, x in narrow.items() if k[:-1] == "moment"} <= {torch.float32}
    ways = [torch.nn.utils.parameters_to_vector(m.parameters()) - s for m, s in zip(models, starts, strict=True)]
    assert torch.cosine_similarity(*ways, dim=0) > 0.8


def test_narrow_state_resumes_bit_for_bit_and_takes_over_wide_state():
    model, other = make_model(), make_model()
    optimizer = make("auto_lr", model, state_dtype=torch.bfloat16)
    train(model, optimizer, 7)
    other.load_state_dict(model.state_dict())
    resumed = make("auto_lr", other, state_dtype=torch.bfloat16)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 9)
    train(other, resumed, 9)
    assert all(map(torch.equal, model.parameters(), other.parameters()))

    wide = make("auto_lr", other)
    wide.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, wide, 1)
    assert {s["m"].dtype for s in wide.state.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, "bfloat16"])
def test_state_dtypes_that_overflow_or_are_none_are_refused(dtype):
    with pytest.raises(ValueError, match="state_dtype"):
        make("auto_lr", make_model(), state_dtype=dtype)
