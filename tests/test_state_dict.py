"""Saving, loading and copying an optimizer; torch's distributed checkpointing."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from learned_opt.optimizer import NFNOpt
from learned_opt.rules.whitening import unpacked
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
    through_disk,
    train,
    weights,
)
from tests.rules.classic import Gated


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
    optimizer = make("gated", model)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"} and set(saved["state"]) == {0, 1, 2, 3}
    keys = [set(g) for g in saved["param_groups"]]
    optimizer.load_state_dict(state_dict=saved)
    assert [set(g) for g in saved["param_groups"]] == keys
    assert "weights" not in optimizer.param_groups[0]


@every_rule
def test_float32_state_of_narrow_parameters_survives_loading(name):
    model = make_model(torch.bfloat16)
    optimizer = make(name, model)
    train(model, optimizer, 3)
    fresh = make(name, model)
    fresh.load_state_dict(through_disk(optimizer.state_dict()))
    for p in model.parameters():
        assert {k: x.dtype for k, x in fresh.state[p].items()} == {k: x.dtype for k, x in optimizer.state[p].items()}
        assert fresh.state[p]["step"].dtype == torch.float32
        assert_equal(fresh.state[p], optimizer.state[p])


def test_learned_weights_travel_with_the_state():
    model = make_model()
    optimizer = make("gated", model)
    train(model, optimizer, 2)
    own = Gated()
    fresh = NFNOpt(model.named_parameters(), rule=own)
    start = {n: p.clone() for n, p in own.state_dict().items()}
    with pytest.warns(UserWarning, match="learned weights"):
        fresh.load_state_dict(optimizer.state_dict())
    assert_equal(dict(fresh.rule.state_dict()), dict(optimizer.rule.state_dict()))
    assert_equal(dict(own.state_dict()), start)


@pytest.mark.parametrize(
    "name, spoil, match",
    [
        ("gated", lambda s: s["state"].__setitem__(0, {"step": torch.zeros(())}), "0.weight.*slots step"),
        ("gated", lambda s: s["state"][2].update(exp_avg=torch.zeros(2, 2)), r"2.weight.*\(2, 2\).*\(3, 6\)"),
        ("auto_lr", lambda s: s["state"][0].update(moment0=torch.zeros(2, 2)), r"0.weight.*\(2, 2\).*\(6, 4\)"),
        ("auto_lr", lambda s: s["state"][3].pop("v"), "2.bias: slots"),
        ("gated", lambda s: s["state"].update({9: s["state"][0]}), "unknown parameter 9"),
        ("gated", lambda s: s["param_groups"][0]["param_names"].reverse(), "0.weight here is 2.bias"),
        ("gated", lambda s: s["param_groups"][0].update(rule="Adam()"), r"Adam\(\)"),
        ("gated", lambda s: s["param_groups"][0]["weights"]["gate.bias"].add_(1), "altered"),
        ("gated", lambda s: s["param_groups"][0].update(weights_sha256="0" * 64, weights=None), "000000"),
        ("gated", lambda s: s["param_groups"][0]["params"].pop(), "size of optimizer's group"),
        ("gated", lambda s: s["param_groups"].pop(), "number of parameter groups"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_before_anything_changes(name, spoil, match):
    model = make_model()
    optimizer = make(name, model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for slots in saved["state"].values():
        slots["step"] = slots["step"] + 1
    saved["param_groups"][0]["lr"] = 123.0
    before = copy.deepcopy(optimizer.state_dict())
    rule, lr = optimizer.rule, optimizer.param_groups[0]["lr"]
    spoil(saved)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert_equal(optimizer.state_dict()["state"], before["state"])
    assert optimizer.param_groups[0]["lr"] == lr and optimizer.rule is rule
    train(model, optimizer, 1)


def test_a_state_dict_of_the_former_release_is_refused_in_a_sentence():
    """Its slots, and its names of the learned weights, were others."""
    model = make_model()
    optimizer = make("auto_lr", model)
    train(model, optimizer, 1)
    before = weights(model)
    saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    group |= {"rule": "Paced(frame=True)", "theta": group.pop("weights"), "theta_sha256": group.pop("weights_sha256")}
    del group["network"]
    old = ("m", "m_slow", "v", "moment", "root", "moved", "step", "clock", "slope", "gained", "agreed")
    saved["state"] = {i: dict.fromkeys(old, torch.zeros(())) for i in range(4)}
    with pytest.raises(ValueError, match=r"of rule Paced\(frame=True\), this one is WhitenedPolar"):
        optimizer.load_state_dict(saved)
    del group["rule"]
    with pytest.raises(ValueError, match="0.weight: slots agreed, clock.* instead of .*last_update"):
        optimizer.load_state_dict(saved)
    assert_equal(weights(model), before)
    train(model, optimizer, 1)


def test_second_moments_that_were_saved_as_whole_matrices_are_taken():
    """As all were before they were kept without their other half."""
    model, other = make_model(), make_model()
    optimizer = make("auto_lr", model)
    train(model, optimizer, 4)
    saved = optimizer.state_dict()
    for i, slots in saved["state"].items():
        saved["state"][i] = {k: unpacked(x) if k[:-1] == "moment" else x for k, x in slots.items()}
    assert saved["state"][0]["moment0"].shape == (6, 6)
    other.load_state_dict(model.state_dict())
    fresh = make("auto_lr", other)
    fresh.load_state_dict(through_disk(saved))
    train(model, optimizer, 8)  # at the tenth step roots are taken of them
    train(other, fresh, 8)
    assert_equal(weights(other), weights(model))


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


def test_state_dicts_without_what_is_optional_load():
    model = make_model()
    optimizer = make("adam", model)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    for key in ("rule", "weights", "weights_sha256", "symmetry", "network", "total_steps", "maximize"):
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
    optimizer = make("auto_lr", model, total_steps=np.int64(9), weight_decay=np.float64(0.1))
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
    optimizer = make("gated", model)
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
def test_no_two_fresh_slots_share_memory(name):
    """What loads a checkpoint in place would write both; numbers of a matrix and of its bias are the same anyway."""
    model = make_model()
    optimizer = make(name, model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    slots = [x for s in optimizer.state.values() for x in s.values() if x.numel()]
    for i, x in enumerate(slots):
        x.fill_(i)
    assert all(bool((x == i).all()) for i, x in enumerate(slots))


# ------------------------------------------------------------------------------ views of shared buffers
def shares_memory(optimizer):
    """Whether the weights of one shape have their momenta in one buffer."""
    one, other = (optimizer.state[p]["m"] for p in list(optimizer.state)[::2][:2])
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def square_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5))


def squared(model):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (model(x) - x.sin()).square().mean().backward()


def run(model, optimizer, steps):
    for _ in range(steps):
        squared(model)
        optimizer.step()


def copied(model, optimizer, how):
    if how == "load":
        twin = copy.deepcopy(model)
        fresh = make("auto_lr", twin)
        fresh.load_state_dict(through_disk(optimizer.state_dict()))
        return twin, fresh
    if how == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    twin, fresh = copy.deepcopy((model, optimizer))
    if how == "replaced":
        for s in fresh.state.values():
            s["m"] = s["m"].clone()
    return twin, fresh


@pytest.mark.parametrize("how", ["load", "deepcopy", "pickle", "replaced"])
def test_slots_are_views_of_shared_buffers_and_are_found_again(how):
    model = square_model()
    optimizer = make("auto_lr", model)
    run(model, optimizer, 4)
    assert shares_memory(optimizer)
    twin, fresh = copied(model, optimizer, how)
    run(model, optimizer, 4)
    run(twin, fresh, 4)
    assert shares_memory(fresh)
    assert_equal(weights(twin), weights(model))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_equal(fresh.state[q], optimizer.state[p])


def test_a_slot_that_is_written_to_is_the_one_that_steps():
    models = [square_model(), square_model()]
    for m, write in zip(models, (True, False), strict=True):
        optimizer = make("auto_lr", m)
        run(m, optimizer, 4)
        for p in m.parameters():
            if write:
                optimizer.state[p]["m"].zero_()
            else:
                optimizer.state[p]["m"] = torch.zeros_like(p)
        run(m, optimizer, 3)
    assert_equal(weights(models[0]), weights(models[1]))
    untouched = square_model()
    run(untouched, make("auto_lr", untouched), 7)
    assert not torch.equal(untouched[0].weight, models[0][0].weight)
