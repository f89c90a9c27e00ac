"""NFNOpt finds the module it trains, however it gets the parameters and however that is called."""

import copy
import gc
import itertools
import logging
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.modules import module as torch_modules

from learned_opt import NFNOpt
from learned_opt.recorder import ForwardRecorder, modules_behind
from learned_opt.symmetry import SymmetryError
from learned_opt.symmetry.axes import Leaf
from tests.rules.classic import Adam

pytestmark = pytest.mark.usefixtures("no_hook_is_left")


class Net(nn.Module):
    """Its hidden units are one label, which independent axes do not say; ``scale`` is a keyword argument."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x, *, scale=1.0):
        return scale * self.head(self.body(x))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def batch(seed=0):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))


def train(call, optimizer, steps=1, **kwargs):
    for step in range(steps):
        optimizer.zero_grad()
        call(batch(step), **kwargs).square().mean().backward()
        optimizer.step()


def names(optimizer):
    return [e.name for e in optimizer._bind()[0]]


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


class Wrapper(nn.Module):
    """As DistributedDataParallel: it holds the model as ``module`` and calls it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


# ------------------------------------------------------------------------------------ every way to call
def decay_groups(m):
    return [
        {"params": [p for p in m.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in m.parameters() if p.ndim <= 1]},
    ]


WAYS = {
    "module": lambda m: m,
    "parameters": lambda m: m.parameters(),
    "generator expression": lambda m: (p for p in m.parameters()),
    "named_parameters": lambda m: m.named_parameters(),
    "list": lambda m: list(m.parameters()),
    "filter": lambda m: filter(lambda p: p.requires_grad, m.parameters()),
    "map": lambda m: map(lambda p: p, m.parameters()),
    "chain": lambda m: itertools.chain(m.body.parameters(), m.head.parameters()),
    "dict values": lambda m: dict(m.named_parameters()).values(),
    "other names": lambda m: [(f"net.{n}", p) for n, p in m.named_parameters()],
    "group": lambda m: [{"params": m.parameters()}],
    "group of a module": lambda m: [{"params": m}],
    "groups of submodules": lambda m: [{"params": m.body.parameters()}, {"params": m.head.parameters(), "lr": 0.5}],
    "named groups": lambda m: [{"params": m.body.named_parameters("a")}, {"params": m.head.named_parameters("b")}],
    "decay and no decay": decay_groups,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_module_is_found_however_the_parameters_are_passed(way, asked, said):
    model = net()
    optimizer = NFNOpt(WAYS[way](model), rule=Adam(), lr=1e-2)
    assert optimizer.symmetry is None and "to be inferred at the first step" in repr(optimizer) and not asked
    train(model, optimizer, steps=3, scale=2.0)
    ((found, args, kwargs, _),) = asked
    assert found is model and kwargs == {"scale": 2.0}
    torch.testing.assert_close(args, (batch(0),))
    known = {id(p): n for n, p in model.named_parameters()}
    assert names(optimizer) == [known[id(p)] for g in optimizer.param_groups for p in g["params"]]
    assert list(optimizer.symmetry.specs) == [n for n, _ in model.named_parameters()]
    assert "symmetry of 4 tensors" in repr(optimizer)
    assert not said(logging.WARNING) and len(said(logging.INFO)) == 2  # what was found, and its note
    assert "asked about Net" in said(logging.INFO)[1]


def compiled_in_place(m, counter):
    m.compile(backend=counter, fullgraph=True)
    return m


COMPILED = {
    "compile": lambda m, c: torch.compile(m, backend=c, fullgraph=True),
    "in place": compiled_in_place,
    "wrapped": lambda m, c: torch.compile(nn.DataParallel(m), backend=c),
    "wrapper around": lambda m, c: nn.DataParallel(torch.compile(m, backend=c)),
}


@pytest.mark.filterwarnings("error:Using .torch.compile")
@pytest.mark.parametrize("make", [net, lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))])
@pytest.mark.parametrize("when", ["before", "before, through the wrapper", "after"])
@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_is_found_and_compiled_once(make, when, how, asked, said):
    if (how, when) == ("in place", "after"):
        pytest.skip("seen by nobody: the test below")
    frames = {}
    for ours in (False, True):
        torch._dynamo.reset()
        counter, model = CompileCounter(), make()
        call = COMPILED[how](model, counter) if when != "after" else None
        params = call.parameters() if when == "before, through the wrapper" else model.parameters()
        optimizer = NFNOpt(params, rule=Adam()) if ours else torch.optim.Adam(params)
        call = COMPILED[how](model, counter) if call is None else call
        train(call, optimizer, steps=3)
        frames[ours] = counter.frame_count
    assert frames[True] == frames[False] >= 1
    ((found, args, _, _),) = asked
    assert found is model and not said(logging.WARNING)
    torch.testing.assert_close(args, (batch(0),))


def test_a_model_compiled_in_place_later_is_not_seen_which_is_said(asked, said):
    model = net()
    optimizer = NFNOpt(model, rule=Adam())
    model.compile(backend="eager")
    train(model, optimizer, steps=2)
    assert not asked and len(said(logging.WARNING)) == 1 and "compiled" in said(logging.WARNING)[0]


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("wrap", [nn.DataParallel, Wrapper])
def test_a_wrapped_model_is_found(wrap, through, asked, said):
    model = net()
    wrapped = wrap(model)
    optimizer = NFNOpt((wrapped if through else model).parameters(), rule=Adam())
    train(wrapped, optimizer, steps=2, scale=2.0)
    ((found, args, kwargs, _),) = asked
    assert found is (model if wrap is nn.DataParallel else wrapped) and kwargs == {"scale": 2.0} and len(args) == 1
    assert names(optimizer)[0] == ("" if wrap is nn.DataParallel else "module.") + "body.0.weight"
    assert not said(logging.WARNING)


@pytest.mark.parametrize("other", [False, True])
def test_a_functional_call_is_seen(other, asked, said):
    """Also with other tensors in the place of the parameters, if the optimizer was told the module."""
    model = net()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    params = {n: p * 1.0 if other else p for n, p in model.named_parameters()}
    torch.func.functional_call(model, params, (batch(),), {"scale": 2.0}).square().mean().backward()
    optimizer.step()
    assert asked[0][0] is model and asked[0][2] == {"scale": 2.0} and not said(logging.WARNING)


def test_the_outermost_module_is_taken():
    """The body has every parameter, and does not show that the head reads one of them."""

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6))

        def forward(self, tokens):
            return self.body(tokens) @ self.body[0].weight.T

    model = Language()
    for params in (model.parameters(), list(model.parameters()), model.body.parameters()):
        optimizer = NFNOpt(params, rule=Adam())
        model(torch.tensor([1, 2])).sum().backward()
        assert [c.module for c in optimizer._binding.recorder.release()] == [model]


def test_generators_tell_their_module():
    def more(m):
        yield from m.parameters()

    m = net()
    assert modules_behind(more(m)) == []  # not started: it has no generator yet
    started = more(m)
    next(started)
    assert modules_behind(started) == [m]
    assert modules_behind([{"params": m.body.parameters()}, {"params": m.parameters()}]) == [m]
    used = m.parameters()
    list(used)
    assert modules_behind(used) == modules_behind(list(m.parameters())) == modules_behind(3) == []


# ------------------------------------------------------------------------------------- what is captured
def test_only_the_call_that_is_trained_counts_in_its_modes(asked):
    model = net()
    model.body.eval()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    with torch.no_grad():
        model(batch(7))
    with torch.inference_mode():
        model(batch(8))
    loss = model(batch(9)).square().mean()
    model.eval()
    loss.backward()
    optimizer.step()
    ((_, (x,), _, training),) = asked
    assert torch.equal(x, batch(9)) and not x.requires_grad
    assert training == [True, False, False, False, True] and not any(m.training for m in model.modules())


def test_inputs_are_detached_and_let_go(asked):
    model, x = net(), batch().requires_grad_()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    features = x * 2
    seen = weakref.ref(features)
    model(features).sum().backward()
    assert not optimizer._binding.recorder.calls[0].args[0].requires_grad
    optimizer.step()
    asked.clear()
    del features
    gc.collect()
    assert seen() is None and optimizer._binding.recorder is None


def test_gradients_may_accumulate_first(asked):
    model = net()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    for k in range(3):
        model(batch(k)).sum().backward()
    optimizer.step()
    assert len(asked) == 1 and torch.equal(asked[0][1][0], batch(0))


def test_a_forward_pass_inside_of_the_step_counts(asked, said):
    model = net()
    optimizer = NFNOpt(model.parameters(), rule=Adam(), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = model(batch()).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert len(asked) == 1 and losses[-1] < losses[0] and not said(logging.WARNING)


def test_a_forward_pass_that_fails_may_be_repeated(asked):
    model = net()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    with pytest.raises(RuntimeError):
        model(torch.ones(4, 9))
    train(model, optimizer)
    assert torch.equal(asked[0][1][0], batch(0)) and not any(hooks(model))


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_are_gone_after_the_first_step_and_for_compiled_models_after_the_first_forward_pass(compiled, asked):
    model = net()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    assert len(torch_modules._global_forward_pre_hooks) == 1 and not any(hooks(model))
    loss = (torch.compile(model, backend="eager") if compiled else model)(batch()).sum()
    assert not torch_modules._global_forward_pre_hooks and any(hooks(model)) != compiled
    loss.backward()
    optimizer.step()
    assert not any(hooks(model)) and not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_copy_has_no_hooks_of_ours(asked):
    model = net()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    model(batch()).sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(batch(1)).sum().backward()
    assert len(optimizer._binding.recorder.calls) == 1
    optimizer.step()
    assert len(asked) == 1


@pytest.mark.parametrize("forward", [False, True])
def test_an_optimizer_that_is_dropped_leaves_nothing(forward):
    model = net()
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    assert model._compiled_call_impl is not compiled
    if forward:
        model(batch())
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None, "a reference cycle keeps it"
    finally:
        gc.enable()
    assert model._compiled_call_impl is compiled and not torch_modules._global_forward_pre_hooks


# ------------------------------------------------------------------------------- several, shared, missing
def test_two_optimizers_find_their_own_models(asked, said):
    generator, critic = nn.Sequential(nn.Linear(5, 5)), net()
    ours = NFNOpt(generator.parameters(), rule=Adam()), NFNOpt(list(critic.parameters()), rule=Adam())
    fake = generator(batch())
    critic(fake).sum().backward()
    for optimizer in ours:
        optimizer.step()
    assert [c[0] for c in asked] == [generator, critic] and not said(logging.WARNING)


def test_two_optimizers_may_share_a_model(asked, said):
    model = net()
    first, second = NFNOpt(model.body.parameters(), rule=Adam()), NFNOpt(model.head.parameters(), rule=Adam())
    model(batch()).sum().backward()
    first.step()
    second.step()
    assert [c[0] for c in asked] == [model] and not said(logging.WARNING)
    assert len(said(logging.INFO)) == 2  # the symmetry and its note
    assert names(first) == ["body.0.weight", "body.0.bias"] and names(second) == ["head.weight", "head.bias"]
    assert first.symmetry == second.symmetry and len(first.symmetry.specs) == 4


def test_a_shared_parameter_has_its_first_name(asked):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    optimizer = NFNOpt(list(model.parameters()), rule=Adam())
    train(model, optimizer, steps=2)
    assert names(optimizer) == ["0.weight", "0.bias", "1.bias"]


def test_what_the_module_lacks_stands_beside_it(asked, said):
    model, temperature = net(), nn.Parameter(torch.ones(2))
    optimizer = NFNOpt([{"params": model.parameters()}, {"params": [temperature]}], rule=Adam(), lr=1e-2)
    (model(batch()).sum() * temperature.sum()).backward()
    optimizer.step()
    assert names(optimizer)[:1] == ["body.0.weight"] and names(optimizer)[4:] == ["4"]
    assert optimizer.symmetry.specs["4"].axes == (Leaf(2, "own:4.0"),)
    assert not torch.equal(temperature, torch.ones(2))
    assert not said(logging.WARNING) and any("4: not in the symmetry" in line for line in said(logging.INFO))


def test_what_is_added_later_stands_beside_it(asked, said):
    model, more = net(), nn.Linear(3, 2)
    optimizer = NFNOpt(model.parameters(), rule=Adam(), lr=1e-2)
    train(model, optimizer)
    optimizer.add_param_group({"params": more})
    train(lambda x: more(model(x)), optimizer, steps=2)
    assert len(asked) == 1 and len([x for x in said(logging.INFO) if "4, 5: not in" in x]) == 1
    assert names(optimizer)[4:] == ["4", "5"] and optimizer.state[more.weight]["step"] == 2
    assert optimizer.state[model.head.weight]["step"] == 3


def test_what_is_added_before_the_first_step_is_looked_for_too(asked):
    model = net()
    optimizer = NFNOpt(model.body.parameters(), rule=Adam())
    optimizer.add_param_group({"params": model.head.parameters()})
    train(model, optimizer)
    assert asked[0][0] is model and len(names(optimizer)) == len(optimizer.symmetry.specs) == 4


def test_a_module_that_was_called_before_it_was_added_is_looked_for_too(asked):
    model = net()
    optimizer = NFNOpt([nn.Parameter(torch.ones(2))], rule=Adam())
    model(batch())  # none of its parameters are the optimizer's yet
    optimizer.add_param_group({"params": model.parameters()})
    train(model, optimizer)
    assert asked[0][0] is model and {x.split(".")[0] for x in names(optimizer)} == {"0", "body", "head"}


class Steps(nn.Module):
    """A module whose parts are called by a method that is no ``forward``."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6))
        self.head = nn.Linear(6, 3)

    def training_step(self, x):
        return self.head(self.encoder(x))


PASSED_IN_PARTS = {
    "the parent's": lambda m: m.parameters(),
    "a list": lambda m: list(m.parameters()),
    "groups": lambda m: [{"params": m.encoder.parameters()}, {"params": m.head.parameters()}],
    "named": lambda m: m.named_parameters(),
}


@pytest.mark.parametrize("way", PASSED_IN_PARTS)
def test_modules_that_are_called_one_by_one_are_inferred_one_by_one(way, said):
    """Their own hidden units move together; what may be units between them stays in place, or by itself."""
    m = Steps()
    optimizer = NFNOpt(PASSED_IN_PARTS[way](m), rule=Adam())
    for _ in range(2):
        train(m.training_step, optimizer)
    assert not said(logging.WARNING)
    first, _, last, *_ = optimizer.symmetry.specs.values()
    assert first.axes[0].label == last.axes[1].label is not None and last.axes[0].label is None
    assert len(optimizer.symmetry.specs) == 6


def test_a_piece_that_is_called_alone_first_counts_as_a_part_of_its_part():
    m = Steps()
    optimizer = NFNOpt(m.parameters(), rule=Adam())
    m.encoder[0](batch())
    train(m.training_step, optimizer)
    first, _, last, *_ = optimizer.symmetry.specs.values()
    assert first.axes[0].label == last.axes[1].label is not None


OTHER_USES = {
    "a piece is called by hand": lambda m, x: m.encoder[0](x).square().mean(),
    "a function of a weight": lambda m, x: (x @ m.encoder[0].weight.T).abs().mean(),
    "more passes than are kept": lambda m, x: sum(m.training_step(x + i).square().mean() for i in range(10)),
}


@pytest.mark.parametrize("use", OTHER_USES)
def test_of_parts_nothing_is_claimed_that_their_gradients_do_not_show(use, said):
    m = Steps()
    optimizer = NFNOpt(m.parameters(), rule=Adam())
    (m.training_step(batch()).square().mean() + OTHER_USES[use](m, batch())).backward()
    optimizer.step()
    assert optimizer.symmetry.specs.keys() == dict.fromkeys(map(str, range(6))).keys()
    assert "the symmetry is not known" in said(logging.WARNING)[0]


def test_parts_that_share_a_tensor_of_nobody_are_refused(said):
    head = nn.Linear(6, 3).requires_grad_(False)
    a, b = (nn.Sequential(nn.Linear(5, 6), nn.Tanh(), head) for _ in range(2))
    optimizer = NFNOpt([p for m in (a, b) for p in m[0].parameters()], rule=Adam())
    train(lambda x: a(x) + b(x), optimizer)
    assert "shares a parameter" in said(logging.WARNING)[0]


@pytest.mark.parametrize("known", [False, True])
def test_a_part_that_is_compiled_in_place_is_recorded_once(known):
    m = Steps()
    m.encoder.compile(backend="eager")
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    recorder = ForwardRecorder(optimizer, [m.encoder, m.head] if known else [])
    for _ in range(5):
        m.encoder(batch())
    assert len(recorder.release()) <= 1


def test_a_module_that_is_called_alone_first_counts_as_a_part_of_the_whole(asked):
    m = net()
    optimizer = NFNOpt(m.parameters(), rule=Adam())
    m.body(batch())
    train(m, optimizer)
    assert [c[0] for c in asked] == [m]


def test_modules_without_hidden_units_of_their_own_say_nothing(asked, said):
    a, b = nn.Linear(5, 6), nn.Linear(6, 3)
    optimizer = NFNOpt([*a.parameters(), *b.parameters()], rule=Adam())
    train(lambda x: b(a(x).tanh()), optimizer)
    assert "one by one" in said(logging.WARNING)[0] and optimizer.symmetry.specs["0"].axes[0].label is not None


def call_of(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    recorder = ForwardRecorder(optimizer)
    module(batch())
    return recorder.release()


def test_sharing_between_called_modules_is_refused(asked):
    from learned_opt.params import infer_map, named_params

    a, b = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
    b.weight = a.weight
    entries = named_params([{"params": list(a.parameters())}])
    with pytest.raises(SymmetryError, match="shares a parameter"):
        infer_map([*call_of(a), *call_of(b)], entries)
