"""What torch asks of its own optimizers, asked of NFNOpt, of a module and of bare tensors.

The checks are those of PyTorch's ``test/test_optim.py``, written anew. Not asked, as NFNOpt has none of it:
``foreach``, ``fused``, ``capturable`` and ``differentiable`` (parity, memory and errors of each); complex parameters
and sparse gradients are refused by name (``test_optimizer.py``). NFNOpt's options have their own meaning: ``lr=1`` is
right, and ``weight_decay=None`` is the rule's own decay, so where gradients are zero a check asks for 0.
"""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_flatten

from learned_opt import NFNOpt
from tests.optimizer_contract import assert_equal, through_disk

common = pytest.importorskip("torch.testing._internal.common_optimizers")  # torch's own, which may move


def inputs(device, dtype=None):
    """The configurations of NFNOpt, as torch lists those of its optimizers."""
    base = {"total_steps": 40}
    return [
        common.OptimizerInput(params=None, kwargs=base | kwargs, desc=desc)
        for kwargs, desc in [
            ({}, "default"),
            ({"lr": 0.5}, "non-default lr"),
            ({"lr": torch.tensor(0.5)}, "Tensor lr"),
            ({"weight_decay": 0.1}, "nonzero weight_decay"),
            ({"weight_decay": 0.0}, "no weight_decay"),
            ({"maximize": True}, "maximize"),
            ({"weight_decay": 0.1, "maximize": True}, "weight_decay, maximize"),
            ({"total_steps": None}, "no horizon"),
            ({"rule": "whitened_polar"}, "whitened_polar"),
            ({"rule": "learned"}, "learned"),
        ]
    ]


def error_inputs(device, dtype):
    """What every optimizer refuses, in torch's words, and what is wrong for NFNOpt alone."""
    tensor = torch.rand(2, 3, device=device, dtype=dtype)

    def refused(kwargs, error, regex, params=None):
        made = common.OptimizerInput(params=[tensor] if params is None else params, kwargs=kwargs)
        return common.ErrorOptimizerInput(made, error_type=error, error_regex=regex)

    return [
        *common.get_error_inputs_for_all_optims(device, dtype),
        refused({"lr": -1.0}, ValueError, "lr=-1"),
        refused({"weight_decay": -1.0}, ValueError, "weight_decay=-1"),
        refused({"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
        refused({"total_steps": 0}, ValueError, "total_steps=0"),
        refused({}, ValueError, "empty parameter list", params=[]),
    ]


INFO = common.OptimizerInfo(
    NFNOpt,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    supported_impls=(),
    not_og_supported_flags=("maximize", "weight_decay", "total_steps"),
    supports_complex=False,
)
GPUS = torch.cuda.device_count()
every_input = pytest.mark.parametrize("options", INFO.optim_inputs_func("cpu"), ids=lambda x: x.desc)


class Problem:
    """A loss of some tensors: ``tensors`` in their order, and what an optimizer is given for them."""

    def __init__(self, given, tensors, loss):
        self.given, self.tensors, self.loss = given, tensors, loss

    def backward(self):
        """The loss, with gradients."""
        for p in self.tensors:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, optimizer, steps):
        for _ in range(steps):
            self.backward()
            optimizer.step()


def of_a_module(named=False):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 6)), torch.randn(8, 5)
    given = model.named_parameters() if named else model.parameters()
    return Problem(given, list(model.parameters()), lambda: model(x).square().sum())


def of_tensors(named=False, contiguous=True):
    torch.manual_seed(0)
    weight = torch.randn(10, 5) if contiguous else torch.randn(10, 5, 2)[..., 0]
    bias = torch.randn(10) if contiguous else torch.randn(10, 2)[..., 0]
    weight, bias, x = nn.Parameter(weight), nn.Parameter(bias), torch.randn(5)
    given = [("weight", weight), ("bias", bias)] if named else [weight, bias]
    return Problem(given, [weight, bias], lambda: (weight.mv(x) + bias).square().sum())


every_problem = pytest.mark.parametrize("problem", [of_a_module, of_tensors], ids=["module", "tensors"])


def values(problem):
    return [p.detach().clone() for p in problem.tensors]


def trained(problem, options, steps=10):
    made = problem()
    optimizer = NFNOpt(made.given, **options.kwargs)
    made.train(optimizer, steps)
    return made, optimizer


def assert_same(a, b):
    """Of state dicts, which hold more than tensors: bit for bit."""
    (found, form), (wanted, same) = tree_flatten(a), tree_flatten(b)
    assert form == same
    for x, y in zip(found, wanted, strict=True):
        assert type(x) is type(y) and (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y)


def stepwise(optimizer):
    return StepLR(optimizer, gamma=0.9, step_size=10)


def assert_moved_well(options, before, after):
    assert after > before if options.kwargs.get("maximize") else after < before


# ------------------------------------------------------------------------------------------ construction
def test_the_listed_inputs_leave_torchs_flags_alone():
    flags = {"foreach", "fused", "differentiable", "capturable"}
    assert not any(flags & options.kwargs.keys() for options in INFO.optim_inputs_func("cpu"))


@pytest.mark.parametrize("wrong", error_inputs("cpu", torch.float32), ids=lambda x: x.error_regex[:30])
def test_errors(wrong):
    made = wrong.optimizer_error_input
    check = pytest.warns if issubclass(wrong.error_type, Warning) else pytest.raises
    with check(wrong.error_type, match=wrong.error_regex):
        NFNOpt(made.params, **made.kwargs)


@every_input
def test_it_can_be_printed(options):
    text = repr(NFNOpt([nn.Parameter(torch.randn(2, 3)) for _ in range(2)], **options.kwargs))
    assert text.startswith("NFNOpt") and "total_steps=" in text


# ------------------------------------------------------------------------------------------ steps
@every_input
@pytest.mark.parametrize(
    ("contiguous", "scheduler"), [(True, None), (False, None), (True, stepwise), (True, ReduceLROnPlateau)]
)
def test_it_goes_the_right_direction(options, contiguous, scheduler):
    problem = of_tensors(contiguous=contiguous)
    optimizer = NFNOpt(problem.given, **options.kwargs)
    schedule = scheduler and scheduler(optimizer)
    before = problem.backward().item()
    for _ in range(20):
        loss = optimizer.step(problem.backward)
        if schedule is not None:
            schedule.step(loss.item()) if scheduler is ReduceLROnPlateau else schedule.step()
    assert_moved_well(options, before, problem.backward().item())


@every_input
def test_a_module_goes_the_right_direction(options):
    problem = of_a_module()
    optimizer = NFNOpt(problem.given, **options.kwargs)
    before = problem.backward().item()
    problem.train(optimizer, 20)
    assert_moved_well(options, before, problem.backward().item())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cpu", "cpu"),  # that what follows is right where there is no GPU
        pytest.param("cuda:0", "cpu", marks=pytest.mark.skipif(GPUS < 1, reason="takes a GPU")),
        pytest.param("cuda:0", "cuda:1", marks=pytest.mark.skipif(GPUS < 2, reason="takes two GPUs")),
    ],
)
def test_tensors_of_two_devices_train_together(one, other):
    weight, bias = nn.Parameter(torch.randn(10, 5, device=one)), nn.Parameter(torch.randn(10, device=other))
    x = torch.randn(5, device=one)
    problem = Problem([weight, bias], [weight, bias], lambda: (weight.mv(x).to(other) + bias).square().sum())
    optimizer, before = NFNOpt(problem.given), problem.backward().item()
    problem.train(optimizer, 20)
    assert problem.backward().item() < before


@every_input
def test_a_group_without_weight_decay(options):
    problem = of_tensors()
    weight, bias = problem.tensors
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
    optimizer, before = NFNOpt(groups, **options.kwargs), problem.backward().item()
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    problem.train(optimizer, 20)
    assert_moved_well(options, before, problem.backward().item())


@every_input
def test_a_group_at_another_rate(options):
    problem, other = of_tensors(), nn.Parameter(torch.randn(2, 2))
    kept = other.detach().clone()
    lr = options.kwargs.get("lr", 1.0)
    with pytest.warns(UserWarning, match="lr="):
        optimizer = NFNOpt(
            [{"params": problem.given, "lr": lr}, {"params": [other]}], **(options.kwargs | {"lr": 1e-28})
        )
    before = problem.backward().item()
    for _ in range(20):
        problem.backward()
        other.grad = torch.rand_like(other)
        optimizer.step()
    assert_moved_well(options, before, problem.backward().item())
    torch.testing.assert_close(other.detach(), kept)


@every_input
def test_lr_as_a_tensor_is_lr_as_a_number(options):
    lr = float(options.kwargs.get("lr", 1.0))
    runs = []
    for value in (lr, torch.tensor(lr), torch.tensor([lr])):
        problem = of_tensors()
        optimizer = NFNOpt(problem.given, **(options.kwargs | {"lr": value}))
        problem.train(optimizer, 7)
        if isinstance(value, torch.Tensor):
            assert optimizer.param_groups[0]["lr"] is value and float(value) == lr
        runs.append(values(problem))
    torch.testing.assert_close(runs[0], runs[1])
    torch.testing.assert_close(runs[0], runs[2])


@every_input
def test_without_gradients_a_step_is_none(options):
    params = [torch.randn(2, 3) for _ in range(2)]
    old = [p.clone() for p in params]
    assert NFNOpt(params, **options.kwargs).step(lambda: torch.tensor([1.0])) == 1
    assert_equal(params, old)


@every_input
@pytest.mark.parametrize("shape", [(5, 1), (6, 5), (5,)])
def test_zero_gradients_move_nothing(options, shape):
    param = nn.Parameter(torch.randn(shape))
    old = param.detach().clone()
    optimizer = NFNOpt([param], **({"weight_decay": 0.0} | options.kwargs))
    if options.kwargs.get("weight_decay"):
        pytest.skip("weights decay whatever the gradient is")
    param.grad = torch.zeros_like(param)
    optimizer.step(lambda: torch.tensor([1.0]))
    assert_equal(param.detach(), old)


@every_input
def test_gradients_are_never_written_to(options):
    param = nn.Parameter(torch.randn(6, 5))
    optimizer = NFNOpt([param], **options.kwargs)
    param.grad = torch.rand_like(param)
    version, kept = param.grad._version, param.grad.clone()
    for _ in range(5):
        optimizer.step()
        assert param.grad._version == version
    assert_equal(param.grad, kept)


@every_input
def test_a_step_more_without_gradients_and_an_empty_tensor(options):
    problem, scalar, empty = of_a_module(), nn.Parameter(torch.randn(())), nn.Parameter(torch.empty(0, 3))
    scalar.grad, empty.grad = torch.rand(()), torch.empty(0, 3)
    optimizer = NFNOpt([*problem.tensors, scalar, empty], **options.kwargs)
    for i in range(7):
        for p in problem.tensors:
            p.grad = None
        if i != 3:
            problem.backward()
        before = values(problem)
        optimizer.step()
        changed = [not torch.equal(a, b) for a, b in zip(before, values(problem), strict=True)]
        assert any(changed) == (i != 3)


def test_the_default_precision_changes_nothing():
    runs = []
    for dtype in (torch.float32, torch.float64):
        problem = of_tensors()
        try:
            torch.set_default_dtype(dtype)
            problem.train(NFNOpt(problem.given, total_steps=40), 5)
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append(values(problem))
    assert_equal(*runs)


# ------------------------------------------------------------------------------------------ state dicts
def without_names(state):
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group.pop("param_names", None)
    return state


@every_problem
@pytest.mark.parametrize("named", [(False, False), (True, True), (True, False), (False, True)])
def test_a_state_dict_is_deterministic(problem, named):
    one, other = problem(named[0]), problem(named[1])
    first = NFNOpt(one.given, symmetry="independent", total_steps=40)
    one.train(first, 10)
    with torch.no_grad():
        for a, b in zip(other.tensors, one.tensors, strict=True):
            a.copy_(b)
    second = NFNOpt(other.given, symmetry="independent", total_steps=40)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(5):
        one.train(first, 1)
        other.train(second, 1)
        assert_equal(values(one), values(other))
    if named[0] == named[1]:
        assert_same(without_names(first.state_dict()), without_names(second.state_dict()))
    else:  # names are those of the state dict, where it has some
        assert_same(first.state_dict()["state"], second.state_dict()["state"])
    # groups that are there twice are written alike
    second.param_groups.extend(second.param_groups)
    groups = second.state_dict()["param_groups"]
    assert groups[0]["params"] == groups[1]["params"]


@every_input
@every_problem
def test_saved_and_loaded_with_weights_only_it_goes_on_alike(options, problem):
    one, first = trained(problem, options)
    other = problem()
    with torch.no_grad():
        for a, b in zip(other.tensors, one.tensors, strict=True):
            a.copy_(b)
    second = NFNOpt(other.given, **options.kwargs)
    second.load_state_dict(through_disk(first.state_dict()))
    for made, optimizer in ((one, first), (other, second)):
        made.train(optimizer, 5)
    assert_equal(values(one), values(other))
    assert_same(first.state_dict(), second.state_dict())


@every_input
def test_an_older_state_dict_loads(options):
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2)), torch.rand(1, 4, 16, 16)
    problem = Problem(model.parameters(), list(model.parameters()), lambda: model(x).sum())
    optimizer = NFNOpt(problem.given, **options.kwargs)
    problem.train(optimizer, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["maximize"] == options.kwargs.get("maximize", False)
    problem.train(optimizer, 1)


@every_input
def test_steps_that_are_plain_numbers_load(options):
    runs = []
    for plain in (False, True):
        problem, optimizer = trained(of_tensors, options, steps=3)
        state = copy.deepcopy(optimizer.state_dict())
        for slots in state["state"].values() if plain else ():
            slots["step"] = slots["step"].item()
        optimizer.load_state_dict(state)
        problem.train(optimizer, 2)
        runs.append(values(problem))
    assert_equal(*runs)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(GPUS < 1, reason="takes a GPU"))]
)
@every_input
def test_a_state_dict_of_the_cpu_loads_beside_parameters_of_any_device(options, device):
    problem, optimizer = trained(of_tensors, options, steps=3)
    moved = [nn.Parameter(p.detach().clone().to(device)) for p in problem.tensors]
    other, state = NFNOpt(moved, **options.kwargs), copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(state)
    assert_same(state, optimizer.state_dict())
    for _ in range(5):
        for p, q in zip(problem.tensors, moved, strict=True):
            q.grad = p.grad.to(device, copy=True)
        optimizer.step()
        other.step()
        torch.testing.assert_close([p.detach().to(device) for p in problem.tensors], [q.detach() for q in moved])


@every_input
@every_problem
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_all_public_attributes_and_state(options, problem, copier):
    _, optimizer = trained(problem, options, steps=3)
    copied = copier(optimizer)

    def public(x):
        return {k for k in vars(x) if not k.startswith("_")}

    assert public(copied) == public(optimizer)
    assert_same(copied.state_dict(), optimizer.state_dict())


def test_an_optimizer_is_collected_with_its_last_reference():
    _, optimizer = trained(of_tensors, INFO.optim_inputs_func("cpu")[0])
    seen = weakref.ref(optimizer)
    del optimizer
    assert seen() is None


# ------------------------------------------------------------------------------------------ groups and hooks
@every_input
def test_parameters_are_added_in_mid_training(options):
    problem = of_tensors()
    weight, bias = problem.tensors
    optimizer = NFNOpt([weight], **options.kwargs)
    before = problem.backward().item()
    problem.train(optimizer, 3)
    optimizer.add_param_group({"params": [bias]})
    assert optimizer.param_groups[1]["lr"] == optimizer.param_groups[0]["lr"]
    kept = bias.detach().clone()
    problem.train(optimizer, 10)
    assert not torch.equal(kept, bias)
    assert_moved_well(options, before, problem.backward().item())


def test_step_hooks_run_around_a_step_and_go_when_removed():
    problem, said = of_tensors(), []
    optimizer = NFNOpt(problem.given)
    handles = [
        optimizer.register_step_pre_hook(lambda *_: said.append("before")),
        optimizer.register_step_post_hook(lambda *_: said.append("after")),
        register_optimizer_step_pre_hook(lambda *_: said.append("any before")),
        register_optimizer_step_post_hook(lambda *_: said.append("any after")),
    ]
    try:
        optimizer.step(lambda: said.append("closure"))
    finally:
        for handle in handles:
            handle.remove()
    assert said == ["any before", "before", "closure", "after", "any after"]
    optimizer.step(problem.backward)
    assert len(said) == 5


def test_a_step_pre_hook_may_change_the_arguments():
    problem = of_tensors()
    optimizer = NFNOpt(problem.given)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7), {}))
    assert optimizer.step() == 7


def test_state_dict_hooks_see_and_may_replace_what_is_saved():
    problem, optimizer = trained(of_tensors, INFO.optim_inputs_func("cpu")[0], steps=2)
    said = []
    optimizer.register_state_dict_pre_hook(lambda o: said.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: state | {"mark": 1})
    saved = optimizer.state_dict()
    assert said == ["pre"] and saved["mark"] == 1
    optimizer.load_state_dict({k: v for k, v in saved.items() if k != "mark"})
    problem.train(optimizer, 1)


def test_load_hooks_run_in_order_and_may_replace_what_is_loaded():
    _, source = trained(of_tensors, INFO.optim_inputs_func("cpu")[0], steps=2)
    problem, said = of_tensors(), []
    optimizer = NFNOpt(problem.given, total_steps=40)

    def halved(_, state):
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.5
        said.append("second")
        return state

    optimizer.register_load_state_dict_pre_hook(halved)
    optimizer.register_load_state_dict_pre_hook(lambda *_: said.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: said.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(source.state_dict())
    assert said == ["first", "second", 0.5]
    problem.train(optimizer, 1)


def test_hooks_travel_with_nothing_but_the_optimizer():
    problem, optimizer = trained(of_tensors, INFO.optim_inputs_func("cpu")[0], steps=1)
    said = []
    optimizer.register_step_post_hook(lambda *_: said.append("after"))
    copy.deepcopy(optimizer).step()
    assert not said
    problem.train(optimizer, 1)
    assert said == ["after"]
