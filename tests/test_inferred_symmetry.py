"""NFNOpt infers the symmetry of what it trains, or says that it cannot, and keeps it when it is saved or copied."""

import copy
import io
import logging
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from learned_opt import NFNOpt
from learned_opt.symmetry import Spec, Symmetry
from learned_opt.symmetry.axes import Leaf
from tests.inferred import infer
from tests.rules.classic import Adam
from tests.test_equivariance import distance, element, transformer, weights
from tests.test_recorder import WAYS, Net, batch, hooks, names, net, train

pytestmark = pytest.mark.usefixtures("no_hook_is_left")


# ------------------------------------------------------------------------------------- where it cannot
def lone(model):
    return [nn.Parameter(p.detach().clone()) for p in model.parameters()]


def test_without_a_forward_pass_axes_are_independent_and_one_warning_says_so(asked, said):
    model = net()
    weight = model.head.weight
    for forward in (lambda: None, lambda: nn.functional.linear(batch() @ model.body[0].weight.T, weight)):
        optimizer = NFNOpt(list(model.parameters()), rule=Adam(), lr=1e-2)
        forward()
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert optimizer.state[model.head.weight]["step"] == 2
        assert "independent axes" in repr(optimizer) and optimizer.symmetry.specs["0"].axes[0].label == "0.0"
    assert not asked and len(said(logging.WARNING)) == 2  # one for each optimizer
    assert all("symmetry=learned_opt.infer_symmetry(model" in line for line in said(logging.WARNING))


def test_an_inference_that_fails_does_not_stop_training(asked, said):
    asked.error = RuntimeError("data-dependent control flow")
    model = net()
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = NFNOpt(model.named_parameters(), rule=Adam(), lr=1e-2)
    train(model, optimizer, steps=3)
    (line,) = said(logging.WARNING)
    assert "RuntimeError: data-dependent control flow" in line and "infer_symmetry" in line
    assert len(asked) == 1 and all(m.training for m in model.modules())
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_a_symmetry_of_other_shapes_is_an_inference_that_failed(monkeypatch, asked, said):
    wrong = Symmetry({"weight": Spec((Leaf(4), Leaf(4)), ("out", "in"))})
    monkeypatch.setattr(sys.modules["learned_opt.symmetry.infer"], "infer_called", lambda _: wrong)
    model = nn.Linear(5, 3)
    train(model, NFNOpt(model, rule=Adam()))
    assert len(said(logging.WARNING)) == 1 and "(3, 5)" in said(logging.WARNING)[0]


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
def test_scripted_modules_are_trained_and_passed_by(asked, said):
    scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.ReLU()))
    model = net()
    optimizer = NFNOpt(model, rule=Adam())
    model(scripted(batch())).sum().backward()
    optimizer.step()
    assert len(asked) == 1 and not said(logging.WARNING)
    optimizer = NFNOpt(scripted.parameters(), rule=Adam(), lr=1e-2)
    before = scripted(batch())
    before.square().sum().backward()
    optimizer.step()
    assert (scripted(batch()) != before).any()
    assert len(asked) == 1 and len(said(logging.WARNING)) == 1


def test_independent_asks_nobody(asked, said):
    model = net()
    optimizer = NFNOpt(model.parameters(), symmetry="independent", rule=Adam())
    assert optimizer._binding.recorder is None and optimizer.symmetry is not None
    assert "independent axes" in repr(optimizer)
    train(model, optimizer)
    assert not asked and not said(logging.INFO) and not said(logging.WARNING)
    with pytest.raises(ValueError, match="'guess'"):
        NFNOpt(model.parameters(), symmetry="guess")


# ------------------------------------------------------------------------------- saving, loading, copying
def through_disk(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("extra", [False, True])
def test_a_resumed_run_keeps_its_symmetry_and_asks_nobody(extra, asked):
    def build(model):
        beside = [{"params": [model.beside]}] if extra else []
        return NFNOpt([{"params": model.parameters()}, *beside], rule="whitened_polar")

    def fresh(seed):
        model = net(seed)
        object.__setattr__(model, "beside", nn.Parameter(torch.ones(3)))
        return model

    model = fresh(0)
    optimizer = build(model)
    train(lambda x: model(x) * model.beside, optimizer, steps=2)
    saved = through_disk([model.state_dict(), optimizer.state_dict(), model.beside.detach()])
    train(lambda x: model(x) * model.beside, optimizer, steps=2)
    asked.clear()
    resumed = fresh(1)
    again = build(resumed)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.beside.data.copy_(saved[2])
    assert again.symmetry == optimizer.symmetry and names(again) == names(optimizer)
    train(lambda x: resumed(x) * resumed.beside, again, steps=2)
    assert not asked and not torch_modules._global_forward_pre_hooks
    torch.testing.assert_close(dict(resumed.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)


def test_what_was_inferred_before_gives_way_to_what_is_loaded(asked):
    model = net()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    train(model, optimizer)
    saved = optimizer.state_dict()
    other = NFNOpt(model.parameters(), symmetry="independent", rule=Adam())
    train(model, other)
    late = NFNOpt(list(model.parameters()), rule=Adam())
    train(model, late)
    late.load_state_dict(other.state_dict())
    assert "independent axes" in repr(late)
    late.load_state_dict(saved)
    assert late.symmetry == optimizer.symmetry
    with pytest.raises(ValueError, match="another symmetry"):
        other.load_state_dict(saved)


def test_independent_axes_for_want_of_better_are_kept_too(asked, said):
    asked.error = RuntimeError("no")
    model = net()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    train(model, optimizer)
    again = NFNOpt(model.parameters(), rule=Adam())
    again.load_state_dict(through_disk(optimizer.state_dict()))
    train(model, again)
    assert len(asked) == 1 and len(said(logging.WARNING)) == 1 and "independent axes" in repr(again)


def test_a_state_dict_from_before_the_first_step_leaves_it_open(asked):
    model = net()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()  # no gradients: not a step
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()  # nor is this: distributed checkpointing asks for state
    assert optimizer.symmetry is None and len(optimizer.state) == 4
    optimizer.param_groups[0]["lr"] = 0.01
    train(model, optimizer)
    assert len(asked) == 1 and optimizer.symmetry is not None


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_copy_knows_or_finds_out(copier, steps, asked, said):
    model = net()
    optimizer = NFNOpt(model.parameters(), rule=Adam())
    train(model, optimizer, steps=steps)
    twin_model, twin = copier((model, optimizer))
    assert not any(hooks(twin_model))
    train(twin_model, twin)
    train(model, optimizer)
    assert [c[0] for c in asked] == ([model] if steps else [twin_model, model]) and not said(logging.WARNING)
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin_model.named_parameters()), rtol=0, atol=0)
    assert twin.symmetry == optimizer.symmetry


def test_a_given_symmetry_needs_no_forward_pass(asked):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = NFNOpt(model, symmetry=infer(model), rule=Adam())
    assert optimizer._binding.recorder is None and optimizer.symmetry == infer(model)


# --------------------------------------------------------------------------------- with the real inference
def cnn():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, 10),
    )


def resnet18():
    return pytest.importorskip("torchvision").models.resnet18(num_classes=10)


def pictures(size, step):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, size, size, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 10, (8,), generator=g)


def tokens(step):
    x = torch.randint(0, 7, (6, 6), generator=torch.Generator().manual_seed(step))
    return x, (x + x.roll(1, -1)) % 7


SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))
THEOREM = {
    "gpt": (lambda: transformer(activation="gelu"), tokens),
    "cnn": (cnn, lambda step: pictures(8, step)),
    # 64 x 64 and 8: with 2 pictures of 32 x 32 the last norms see two numbers each, which may all but coincide: any
    # rounding grows 1e5 times per step then, under Adam too (experiments, 13)
    "resnet18": (resnet18, lambda step: pictures(64, step)),
}


def deviation(kind, **options):
    """As in test_equivariance, of an optimizer that is told nothing."""
    from learned_opt import infer_symmetry

    make, data = THEOREM[kind]
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) * (p.std() if p.std() > 0 else 1))
    moved, start = copy.deepcopy(model), weights(model)
    symmetry = infer_symmetry(model, data(0)[0])
    g = element(symmetry)
    moved.load_state_dict(symmetry.act(g, model.state_dict()))
    for m in (model, moved):
        optimizer = NFNOpt(m.parameters(), total_steps=3, **options)
        for step in range(3):
            x, y = data(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()
    assert options or {n: s.axes for n, s in optimizer.symmetry.specs.items()} == {
        n: s.axes for n, s in symmetry.specs.items()
    }
    assert distance(start, weights(model), symmetry) > 0.01, "hardly trained: nothing was tested"
    return distance(weights(model), symmetry.act(symmetry.invert(g), weights(moved)), symmetry)


@pytest.mark.parametrize("kind", ["gpt", "cnn", pytest.param("resnet18", marks=SLOW)])
def test_told_nothing_a_transformed_network_trains_transformed(kind):
    assert deviation(kind) < 1e-8
    assert deviation(kind, symmetry="independent") > 1e-2


def test_the_model_is_left_as_it_is(said):
    model = nn.Sequential(cnn(), nn.Dropout(0.5))
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    registered = hooks(model)
    optimizer = NFNOpt(model.parameters(), lr=0.0)
    model(pictures(8, 0)[0].float()).square().mean().backward()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    rng, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    optimizer.step()
    assert optimizer.symmetry is not None and not said(logging.WARNING), "nothing was inferred"
    assert torch.equal(torch.get_rng_state(), rng) and hooks(model) == registered
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(dict(model.state_dict()), dict(before[0]), rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], before[1], rtol=0, atol=0)


def test_an_inference_is_no_forward_pass_for_an_optimizer_that_waits(said):
    model = net()
    optimizer = NFNOpt(list(model.parameters()), rule=Adam())
    model(batch()).sum().backward()
    others = [NFNOpt(how(model), rule=Adam()) for how in (WAYS["list"], WAYS["parameters"])]
    optimizer.step()
    assert not any(o._binding.recorder.calls for o in others) and len(torch_modules._global_forward_pre_hooks) == 2
    train(model, others[0])
    assert others[0].symmetry == optimizer.symmetry and len(optimizer.symmetry.labels) == 1
    assert not said(logging.WARNING)


def test_what_cannot_be_exported_is_trained_all_the_same(said):
    class Branch(Net):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else -super().forward(x)

    model = Branch()
    optimizer = NFNOpt(model.parameters(), rule=Adam(), lr=1e-2)
    train(model, optimizer, steps=2)
    assert "independent axes" in repr(optimizer) and optimizer.state[model.head.weight]["step"] == 2
    assert len(said(logging.WARNING)) == 1 and "InferenceError" in said(logging.WARNING)[0]
