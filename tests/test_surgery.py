"""What others do to an optimizer and its parameters: other tensors in its groups, other slots in its state, no data."""

import copy
import logging

import pytest
import torch
from torch import nn

from learned_opt import NFNOpt
from learned_opt.rules import RULES
from tests.optimizer_contract import assert_equal, backward, chain_symmetry, make_model, through_disk, train, weights

SYMMETRIES = {"inferred": lambda m: "infer", "given": chain_symmetry, "independent": lambda m: "independent"}
every_symmetry = pytest.mark.parametrize("symmetry", SYMMETRIES)


def optimizer_of(model, symmetry="inferred", named=True, **options):
    params = model.named_parameters() if named else model.parameters()
    return NFNOpt(params, symmetry=SYMMETRIES[symmetry](model), **options)


def finite(optimizer):
    return all(x.isfinite().all() for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))


def replace(model, optimizer, name, tensor, pop):
    """Another tensor in the model and in its place in the group, as those do who grow or prune networks."""
    module, _, last = name.rpartition(".")
    old, new = model.get_parameter(name), nn.Parameter(tensor)
    setattr(model.get_submodule(module), last, new)
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if pop:
        optimizer.state.pop(old, None)
    return old, new


# ------------------------------------------------------------------------------------- other tensors in a group
GROWN = {"0.weight": (8, 5), "0.bias": (8,), "2.weight": (3, 8)}
PRUNED = {"0.weight": (4, 5), "0.bias": (4,), "2.weight": (3, 4)}


@every_symmetry
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("pop", [True, False])
def test_tensors_of_other_shapes_take_the_places_of_old_ones(symmetry, named, pop, said):
    model = make_model()
    optimizer = optimizer_of(model, symmetry, named)
    train(model, optimizer, 3)
    for shapes in (GROWN, PRUNED):
        for name, shape in shapes.items():
            replace(model, optimizer, name, torch.randn(shape), pop)
        before = weights(model)
        train(model, optimizer, 3)
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters()) and finite(optimizer)
        assert [optimizer.state[p]["step"] for p in model.parameters()][:3] == [3, 3, 3]  # they are young
    lines = said(logging.WARNING)
    assert len(lines) == (symmetry != "independent")
    assert all("0.weight" in line and "moves by itself" in line for line in lines)
    assert optimizer.symmetry.specs[optimizer._bind()[0][0].name].shape == model[0].weight.shape
    again = make_model()
    for name, p in model.named_parameters():
        module, _, last = name.rpartition(".")
        setattr(again.get_submodule(module), last, nn.Parameter(p.detach().clone()))
    resumed = NFNOpt(again.named_parameters() if named else again.parameters(), symmetry="infer")
    resumed.load_state_dict(through_disk(optimizer.state_dict()))
    train(model, optimizer, 2)
    train(again, resumed, 2)
    assert_equal(weights(again), weights(model))


@every_symmetry
def test_one_larger_table_leaves_the_other_tensors_their_symmetry_and_state(symmetry, said):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    given = "infer" if symmetry != "independent" else "independent"
    optimizer = NFNOpt(model.parameters(), symmetry=given)

    def step(n):
        optimizer.zero_grad()
        model(torch.randint(n, (8,))).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step(10)
    labels = {n: [a.label for a in s.axes] for n, s in optimizer.symmetry.specs.items()}
    replace(model, optimizer, "0.weight", torch.randn(14, 6), pop=True)
    for _ in range(2):
        step(14)
    now = {n: [a.label for a in s.axes] for n, s in optimizer.symmetry.specs.items()}
    assert all(now[n] == labels[n] for n in labels if not n.startswith("0"))
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [2, 5, 5, 5, 5]


@every_symmetry
def test_data_of_another_shape_in_the_same_tensor(symmetry):
    model = make_model()
    optimizer = optimizer_of(model, symmetry)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    for name, shape in GROWN.items():
        model.get_parameter(name).data = torch.randn(shape)
    before = weights(model)
    train(model, optimizer, 2)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters()) and finite(optimizer)


@every_symmetry
def test_tensors_leave_a_group_and_others_join_whose_names_nobody_gave(symmetry):
    model = make_model()
    optimizer = optimizer_of(model, symmetry)
    train(model, optimizer, 2)
    group = optimizer.param_groups[0]
    first = group["params"].pop(0)  # and not its name
    before = weights(model)
    train(model, optimizer, 2)
    assert torch.equal(first, before["0.weight"])
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p is not first)
    if symmetry != "independent":
        names = {e.name: e.param for e in optimizer._bind()[0]}
        assert len(names) == 3 and all(model.get_parameter(n) is p for n, p in names.items())
    if symmetry == "given":
        return
    extra = nn.Parameter(torch.ones(3))
    group["params"] += [first, extra]
    extra.grad = torch.ones(3)
    train(model, optimizer, 1)
    assert not torch.equal(first, before["0.weight"]) and (extra != 1).all()


def test_old_code_that_pads_every_slot_gets_fresh_state(said):
    """gsplat pads all slots but "step" along the first axis, whatever they are."""
    points = nn.Parameter(torch.randn(6, 3))
    optimizer = NFNOpt([("points", points)], symmetry="independent")
    for n in (6, 9):
        points.grad = torch.randn(n, 3)
        optimizer.step()
        old = optimizer.state.pop(points)
        padded = {k: torch.cat([v, v.new_zeros(3, *v.shape[1:])]) for k, v in old.items() if v.ndim}
        points = nn.Parameter(torch.cat([points.detach(), torch.randn(3, 3)]))
        optimizer.param_groups[0]["params"] = [points]
        optimizer.state[points] = {**old, **padded}
    points.grad = torch.randn(12, 3)
    optimizer.step()
    assert points.isfinite().all() and optimizer.state[points]["step"] == 1


def test_state_of_tensors_that_are_gone_is_not_saved():
    model = make_model()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    old, _ = replace(model, optimizer, "0.weight", torch.randn(6, 5), pop=False)
    saved = optimizer.state_dict()
    assert set(saved["state"]) == {1, 2, 3} and old in optimizer.state


def test_a_model_in_another_dtype_goes_on():
    model = make_model()
    optimizer = optimizer_of(model)
    train(model, optimizer, 12)
    model.double()
    before = weights(model)
    model.zero_grad()
    train(model, optimizer, 2)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters()) and finite(optimizer)


@pytest.mark.parametrize("late", ["0.bias", "0.weight"])
def test_a_bias_has_the_age_of_its_matrix(late):
    model = make_model()
    optimizer = optimizer_of(model)
    model.get_parameter(late).requires_grad_(False)
    train(model, optimizer, 3)
    model.get_parameter(late).requires_grad_(True)
    before = weights(model)
    train(model, optimizer, 2)
    assert not torch.equal(model.get_parameter(late), before[late]) and finite(optimizer)
    assert optimizer.state[model[0].weight]["step"] == optimizer.state[model[0].bias]["step"] == 5 - 3 * ("w" in late)


# ------------------------------------------------------------------------------------- slots of others
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_slots_that_a_wrapper_keeps_beside_ours_stay_and_change_nothing(rule, when):
    plain, wrapped = make_model(), make_model()
    ours, theirs = optimizer_of(plain, rule=rule), optimizer_of(wrapped, rule=rule)
    foreign = {}

    def put():
        for p in wrapped.parameters():
            foreign[p] = {"z": p.detach().clone(), "count": 3, "note": None, "sam": {"e_w": 1}}
            theirs.state[p].update(foreign[p])

    for i in range(4):
        if i == (0 if when == "before" else 2):
            put()
        train(plain, ours, 1)
        train(wrapped, theirs, 1)
    assert_equal(weights(wrapped), weights(plain))
    assert all(theirs.state[p][k] is v for p, own in foreign.items() for k, v in own.items())
    fresh_model = make_model()
    fresh_model.load_state_dict(wrapped.state_dict())
    fresh = optimizer_of(fresh_model, rule=rule)
    fresh.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert fresh.state[fresh_model[0].weight]["count"] == 3 and fresh.state[fresh_model[0].bias]["note"] is None
    train(plain, ours, 2)
    train(fresh_model, fresh, 2)
    assert_equal(weights(fresh_model), weights(plain))


def test_slots_of_others_alone_are_saved_and_loaded():
    model = make_model()
    optimizer = optimizer_of(model)
    for p in model.parameters():
        optimizer.state[p]["ema"] = p.detach().clone()
    fresh = optimizer_of(model)
    fresh.load_state_dict(through_disk(optimizer.state_dict()))
    assert torch.equal(fresh.state[model[2].bias]["ema"], model[2].bias)
    train(model, fresh, 2)
    assert fresh.state[model[0].weight]["step"] == 2


@pytest.mark.parametrize("slot", ["m", "step", "moment0", None])
@pytest.mark.parametrize("value", ["gone", 7, "text", torch.zeros(2)])
def test_a_slot_that_is_lost_or_overwritten_is_made_again(slot, value):
    """``None``: all of them."""
    model = make_model()
    optimizer = optimizer_of(model)
    train(model, optimizer, 3)
    state = optimizer.state[model[0].weight]
    for key in list(state) if slot is None else [slot]:
        if isinstance(value, str) and value == "gone":
            del state[key]
        else:
            state[key] = value
    before = weights(model)
    train(model, optimizer, 2)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters()) and finite(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [2, 2, 5, 5]  # a matrix and its bias


# ------------------------------------------------------------------------------------- tensors without data
class Offloaded(nn.Module):
    """A trained network beside frozen parts that are on the meta device and not called."""

    def __init__(self):
        super().__init__()
        self.net = make_model()
        self.rest = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.BatchNorm1d(4, device="meta"))
        self.rest.requires_grad_(False)
        self.register_buffer("table", torch.empty(3, device="meta"))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("groups", [True, False])
def test_frozen_tensors_on_the_meta_device_are_passed_over(named, groups):
    alone, model = make_model(), Offloaded()
    optimizer = NFNOpt(alone.named_parameters())
    params = list(model.named_parameters() if named else model.parameters())
    parts = [{"params": params[:4]}, {"params": params[4:]}][:: -1 if groups else 1] if groups else params
    beside = NFNOpt(parts)
    train(alone, optimizer, 3)
    train(model, beside, 3)
    assert_equal(weights(model.net), weights(alone))
    assert not any(p in beside.state for p in model.rest.parameters()) and "tensors" in repr(beside)
    saved = through_disk(beside.state_dict())
    resumed = NFNOpt(parts)
    resumed.load_state_dict(saved)
    train(alone, optimizer, 2)
    train(model, resumed, 2)
    assert_equal(weights(model.net), weights(alone))


def test_a_frozen_tensor_elsewhere_does_not_hide_the_module(said):
    model = make_model()
    optimizer = NFNOpt([*model.parameters(), nn.Parameter(torch.empty(4, 4, device="meta"), requires_grad=False)])
    train(model, optimizer, 2)
    assert optimizer.symmetry.specs["0.weight"].axes[0].label == optimizer.symmetry.specs["2.weight"].axes[1].label
    assert not said(logging.WARNING)


def test_tensors_without_data_are_not_trained_in_silence():
    with torch.device("meta"):
        model = make_model()
    optimizer = NFNOpt(model.parameters())
    real = model.to_empty(device="cpu")
    if next(real.parameters()) is not optimizer.param_groups[0]["params"][0]:  # else torch has swapped the data
        for p in real.parameters():
            p.data.normal_()
        backward(real)
        with pytest.raises(RuntimeError, match="no parameter has a gradient.*device meta.*Make the optimizer after"):
            optimizer.step()
    with torch.device("meta"):
        lost = nn.Linear(3, 3)
    optimizer = NFNOpt(lost.named_parameters())
    lost.weight.grad = torch.empty_like(lost.weight)
    with pytest.raises(RuntimeError, match="weight is on the meta device.*Make the optimizer after"):
        optimizer.step()
