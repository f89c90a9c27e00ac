"""The symmetry is one of the function that was trained, however that was called; or none is claimed, with a word.

The oracle does not know of the inference: the loss of the training step, computed in float64 at random weights, must
not change under random elements of the group.
"""

import logging
import random
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learned_opt import NFNOpt
from learned_opt.symmetry import randomised

pytestmark = pytest.mark.usefixtures("no_hook_is_left")
Step = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """8 hidden units behind a ReLU, and second methods that use the weights in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return self.a(x).relu()

    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        return self.b(getattr(self.a(x), act)())

    def with_tanh(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())

    def in_order(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).cumsum(-1))

    def loss(self, x: Tensor) -> Tensor:
        return self.in_order(x).square().mean()


class Outer(nn.Module):
    """As DistributedDataParallel: it calls what it holds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def redirected(method: str, wrap: bool) -> Step:
    """Lightning's strategies: ``forward`` is another method for one call, and puts itself back as it begins."""

    def step(model: Net, x: Tensor) -> Tensor:
        original = model.forward

        def instead(*args: Any) -> Any:
            model.forward = original
            return getattr(model, method)(*args)

        model.forward = instead
        try:
            outer = model.__dict__.setdefault("outer", [Outer(model)])[0] if wrap else model
            return outer(x).square().mean()
        finally:
            model.__dict__.pop("forward", None)

    return step


def replaced_in_the_class(model: Net, x: Tensor) -> Tensor:
    before = Net.forward
    Net.forward = Net.in_order
    try:
        return model(x).square().mean()
    finally:
        Net.forward = before


def replaced_in_a_submodule(model: Net, x: Tensor) -> Tensor:
    model.a.forward = types.MethodType(lambda m, x: F.linear(x, m.weight, m.bias).cumsum(-1), model.a)
    try:
        return model(x).square().mean()
    finally:
        del model.a.forward


def replaced_and_left(model: Net, x: Tensor) -> Tensor:
    model.forward = types.MethodType(Net.with_tanh, model)
    return model(x).square().mean()


def features(model: Net, x: Tensor) -> Tensor:
    """A hook takes out hidden units, which the loss compares with a target."""
    seen: list[Tensor] = []
    handle = model.a.register_forward_hook(lambda m, i, y: seen.append(y))
    y = model(x)
    handle.remove()
    return y.square().mean() + (seen[0] * torch.arange(8.0)).square().mean()


def hooked(kind: str) -> Step:
    def step(model: Net, x: Tensor) -> Tensor:
        if not model.b._forward_pre_hooks and not model.a._forward_hooks:
            if kind == "pre":
                model.b.register_forward_pre_hook(lambda m, i: (i[0].cumsum(-1),))
            else:
                model.a.register_forward_hook(lambda m, i, y: y.tanh())
        return model(x).square().mean()

    return step


def fast_weights(model: Net, x: Tensor) -> Tensor:
    """MAML: a step of gradient descent, and the loss behind it."""
    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(model(x).square().mean(), params, create_graph=True)
    fast = {n: p - 0.1 * g for n, p, g in zip(names, params, grads, strict=True)}
    return torch.func.functional_call(model, fast, (x,)).square().mean()


def masked(model: Net, x: Tensor) -> Tensor:
    mask = torch.arange(8)[:, None] % 2
    params = {n: p * mask if n == "a.weight" else p for n, p in model.named_parameters()}
    return torch.func.functional_call(model, params, (x,)).square().mean()


def physics(model: Net, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = model(x, "tanh").sum()
    (d,) = torch.autograd.grad(y, x, create_graph=True)
    return (d - 1).square().mean() + y.square()


def gradient_penalty_on_a_second_method(model: Net, x: Tensor) -> Tensor:
    return physics(model, x) + model.loss(x)


def squared(y: Tensor) -> Tensor:
    return y.square().mean()


def l1(p: Tensor) -> Tensor:
    return 0.1 * p.abs().sum()


def accumulated(model: Net, x: Tensor) -> Tensor:
    return sum((squared(model(x[i : i + 2])) for i in range(0, 6, 2)), torch.zeros(()).to(x)) / 3


def in_eval_too(model: nn.Module, x: Tensor) -> Tensor:
    y = squared(model.train()(x))
    z = squared(model.eval()(x))
    model.train()
    return y + z


class Moody(nn.Module):
    """Something else in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h.relu() if self.training else h.tanh())


class Noisy(nn.Sequential):
    """Dropout and noise."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


class Checkpointed(Net):
    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        return self.b(checkpoint(self.hidden, x, use_reentrant=False))


class Averaged(Net):
    """Adds a running mean of its hidden units, which is zero at first, and is written without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        h = self.a(x).relu()
        with torch.no_grad():
            self.seen.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.b(h + self.seen)


class Branching(Net):
    """Leaves a layer out by the toss of a coin."""

    def __init__(self, toss: Callable[[], float]) -> None:
        super().__init__()
        self.c, self.toss = nn.Linear(8, 8), toss

    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        h = self.a(x)
        return self.b(h.tanh() if self.toss() < 0.5 else self.c(h).cumsum(-1))


class Keeper(Net):
    """Leaves an auxiliary loss behind, which trains."""

    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        h = self.a(x).relu()
        self.kept = (h.mean(0) * torch.arange(8.0)).sum()
        return self.b(h)


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class StraightThrough(Net):
    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        return self.b(Rounded.apply(self.a(x)))


class Parametrized(nn.Module):
    def __init__(self, how: Callable[[nn.Module], nn.Module], width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(how(nn.Linear(4, width)), nn.ReLU(), how(nn.Linear(width, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TiedOutside(nn.Module):
    """A table with a narrow width, whose rows a head reads outside of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.wide = nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x @ self.table)


class Pair(nn.Module):
    """An encoder and a decoder, called one by one."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
        self.decoder = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
        if tied:
            self.decoder[0].weight = nn.Parameter(self.encoder[2].weight.detach().T.clone())
            self.encoder[2].weight = nn.Parameter(self.decoder[0].weight.detach())


def compiled(model: nn.Module, x: Tensor) -> Tensor:
    return squared(torch.compile(model, backend="eager")(x))


class Writing(Net):
    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        return super().forward(x.sub_(x.mean()).div_(3.0))


def _overwritten(model: Net, x: Tensor) -> Tensor:
    """Gradients are accumulated, with one buffer for all batches."""
    if x.dtype == torch.float32:
        squared(model(x)).backward()
    return squared(model(x.add_(1.0)))


def mixed(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
        y = model(x)
    return squared(y.to(x.dtype))


def nearly_another(model: Net, x: Tensor) -> Tensor:
    """Replaced in the class for the call: by a function that differs by more than the rounding of mixed precision."""
    before = Net.forward
    Net.forward = lambda m, x: m.b(m.hidden(x) + 0.02 * m.hidden(x).cumsum(-1))
    try:
        return mixed(model, x)
    finally:
        Net.forward = before


class Prepared(Net):
    """As accelerate and the Trainer of transformers: ``forward`` is called in mixed precision by what replaces it."""

    def __init__(self) -> None:
        super().__init__()
        inner = Net.forward

        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
                return inner(self, x).to(x.dtype)

        self.forward = forward


class Cancelling(Net):
    """What is left of large numbers: a tenth of it is rounding in mixed precision."""

    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        y = super().forward(x + 30.0, act)
        return y - y.mean(0)


@dataclass(frozen=True)
class Case:
    """``found``: "all" of the labels; "signs": no positive scale; "fixed": nothing moves; "none": independent axes."""

    step: Step
    found: str
    model: Callable[[], Any] = Net


CASES: dict[str, Case] = {
    "its forward": Case(lambda m, x: squared(m(x)), "all"),
    "forward redirected, wrapped": Case(redirected("with_tanh", True), "all"),
    "forward redirected": Case(redirected("in_order", False), "fixed"),
    "forward redirected to a loss": Case(redirected("loss", True), "all"),
    "replaced in the class": Case(replaced_in_the_class, "none"),
    "replaced in a submodule": Case(replaced_in_a_submodule, "fixed"),
    "replaced and left": Case(replaced_and_left, "all"),
    "a second method alone": Case(lambda m, x: m.loss(x), "none"),
    "a second method too": Case(lambda m, x: squared(m(x)) + m.loss(x), "none"),
    "a second method of the same symmetry": Case(lambda m, x: squared(m(x)) + squared(m.hidden(x)), "none"),
    "two arguments": Case(lambda m, x: squared(m(x)) + squared(m(x, "tanh")), "all"),
    "two modes": Case(in_eval_too, "all", Moody),
    "accumulated": Case(accumulated, "all"),
    "batches of several sizes": Case(lambda m, x: squared(m(x[:2])) + squared(m(x)), "all"),
    "a penalty in l1": Case(lambda m, x: squared(m(x)) + l1(m.a.weight), "signs"),
    "a penalty in l2": Case(lambda m, x: squared(m(x)) + sum(squared(p) for p in m.parameters()), "signs"),
    "a penalty on units": Case(lambda m, x: squared(m(x)) + (m.b.weight * torch.arange(8)).sum(), "none"),
    "features taken out": Case(features, "none"),
    "an auxiliary loss left behind": Case(lambda m, x: squared(m(x)) + m.kept, "none", Keeper),
    "more calls than are kept, and a penalty": Case(
        lambda m, x: sum((squared(m(x + k)) for k in range(12)), 10 * l1(m.a.weight)), "signs"
    ),
    "inputs that are written afterwards": Case(lambda m, x: _overwritten(m, x.clone()), "all"),
    "inputs that the model writes": Case(lambda m, x: squared(m(x.clone())), "all", lambda: Writing()),
    "called for nothing": Case(lambda m, x: m.loss(x) + 0 * m(x).sum(), "none"),
    "a mean that is written": Case(lambda m, x: squared(m(x)), "any", Averaged),
    "a coin of Python": Case(lambda m, x: squared(m(x)), "none", lambda: Branching(random.random)),
    "coins of its own": Case(
        lambda m, x: sum(squared(m(x)) for _ in range(6)), "none", lambda: Branching(random.Random(1).random)
    ),
    "coins of Python": Case(
        lambda m, x: sum(squared(m(x)) for _ in range(6)), "none", lambda: Branching(random.random)
    ),
    "coins of NumPy": Case(
        lambda m, x: sum(squared(m(x)) for _ in range(6)), "none", lambda: Branching(np.random.rand)
    ),
    "mixed precision": Case(mixed, "all"),
    "mixed precision and a penalty": Case(lambda m, x: mixed(m, x) + 10 * l1(m.a.weight), "signs"),
    "mixed precision of a function in whose place another ran": Case(nearly_another, "none"),
    "mixed precision of a difference": Case(mixed, "all", Cancelling),
    "mixed precision within": Case(lambda m, x: squared(m(x)), "all", Prepared),
    "straight through": Case(lambda m, x: squared(m(x)), "none", StraightThrough),
    "a hook on the output": Case(hooked("post"), "all"),
    "a hook on the input": Case(hooked("pre"), "fixed"),
    "fast weights": Case(fast_weights, "none"),
    "masked weights": Case(masked, "none"),
    "physics": Case(physics, "all"),
    "checkpointed": Case(lambda m, x: squared(m(x)), "all", Checkpointed),
    "compiled": Case(compiled, "all"),
    "compiled with dropout": Case(compiled, "all", Noisy),
    "dropout": Case(lambda m, x: squared(m(x)), "all", Noisy),
    "weight norm": Case(lambda m, x: squared(m(x)), "all", lambda: Parametrized(nn.utils.parametrizations.weight_norm)),
    "spectral norm": Case(
        lambda m, x: squared(m(x)), "any", lambda: Parametrized(nn.utils.parametrizations.spectral_norm)
    ),
    "orthogonal": Case(
        lambda m, x: squared(m(x)), "any", lambda: Parametrized(nn.utils.parametrizations.orthogonal, 4)
    ),
    "old weight norm": Case(lambda m, x: squared(m(x)), "any", lambda: Parametrized(nn.utils.weight_norm)),
    "a table read outside": Case(lambda m, x: squared(m(x)) + squared(m.table.cumsum(-1)), "none", TiedOutside),
    "an encoder and a decoder": Case(lambda m, x: squared(m.decoder(m.encoder(x)) - x), "all", Pair),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return CASES[name].model()


def parameters_of(name: str, model: nn.Module) -> Any:
    return [{"params": m.parameters()} for m in model.children()] if isinstance(model, Pair) else model.parameters()


@pytest.mark.parametrize("name", CASES)
def test_what_is_claimed_is_true_of_what_was_trained(name: str, said: Any) -> None:
    case, model = CASES[name], make(name)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    optimizer = NFNOpt(parameters_of(name, model))
    case.step(model, x).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    optimizer.step()
    symmetry = optimizer.symmetry
    assert symmetry is not None
    independent = "independent axes" in repr(optimizer)
    if case.found != "any":
        assert independent == (case.found == "none"), said(logging.WARNING)
        assert case.found != "signs" or (symmetry.labels and not {s.kind for s in symmetry.scales.values()} - {"sign"})
        assert any(not g.fixed for g in symmetry.labels.values()) == (case.found != "fixed")
    if case.found in ("none", "signs"):
        line = said(logging.WARNING)[-1]
        assert ("independent" if case.found == "none" else "scale") in line
    if not independent:
        assert change(name, model, symmetry, x) < 1e-9


def change(name: str, model: nn.Module, symmetry: Any, x: Tensor) -> float:
    """The relative change of the training loss under random elements of the group."""
    twin, x, g = make(name).double(), x.double(), torch.Generator().manual_seed(0)
    twin.load_state_dict(model.state_dict())
    prefix = {id(p): f"{i}/{n}" for i, m in enumerate(twin.children()) for n, p in m.named_parameters()}
    names = {prefix[id(p)] if isinstance(twin, Pair) else n: p for n, p in twin.named_parameters()}
    weights = {n: randomised(p.detach(), g) for n, p in names.items()}

    def loss(weights: dict[str, Tensor]) -> float:
        trial = make(name).double()
        trial.load_state_dict(twin.state_dict())
        for p, q in zip(trial.parameters(), twin.parameters(), strict=True):
            p.data = weights[next(n for n, r in names.items() if r is q)].clone()
        for m in trial.modules():
            if isinstance(m, nn.Dropout):  # the same in distribution
                m.p = 0.0
        return float(CASES[name].step(trial, x).detach())

    before = loss(weights)
    return max(abs(loss(symmetry.act(symmetry.sample(g), weights)) - before) for _ in range(4)) / abs(before)
