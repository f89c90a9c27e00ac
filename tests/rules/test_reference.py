"""The rule in batches is the rule one tensor after the other, on every form of tensor."""

import pytest
import torch
from torch import nn

from learned_opt import batches, infer_symmetry
from learned_opt.rules import reference
from learned_opt.rules.reference import Reference
from learned_opt.rules.whitened_polar import WhitenedPolar
from learned_opt.symmetry import Label, Leaf, Spec, Symmetry, independent
from tasks.conv import cnn
from tasks.mlp import mlp
from tasks.transformer import Transformer
from tests.inferred import infer
from tests.symmetry.infer.architectures import CASES


def case(name):
    model = CASES[name].build()
    return model, infer_symmetry(model, *CASES[name].inputs(), verify=False)


def built(model):
    return model, infer(model)


def transformer(**options):
    sizes = {"width": 8, "heads": 2, "depth": 2, "hidden": 12, "causal": True}
    return built(Transformer(nn.Embedding(7, 8), 6, 7, **(sizes | options)))


def module(tensors):
    holder = nn.Module()
    for n, shape in tensors.items():
        holder.register_parameter(n, nn.Parameter(torch.randn(shape)))
    return holder


def experts():
    """Three experts ``[E, out, in]`` whose hidden units are their own, with biases ``[E, out]``."""
    model = module({"up": (6, 8, 7), "up_bias": (6, 8), "down": (6, 7, 8)})
    e, h, d = Leaf(6, "e"), Leaf(8, "h"), Leaf(7, "d")
    specs = {
        "up": Spec((e, h, d), ("out", "out", "in")),
        "up_bias": Spec((e, h), ("out", "out")),
        "down": Spec((e, d, h), ("in", "out", "in")),
    }
    return model, Symmetry(specs, {"e": Label(6), "h": Label(8, ("e",)), "d": Label(7)})


def two_axes():
    """Matrices that read, or write, two axes, with biases."""
    model = module({"weight": (6, 5, 7), "bias": (6,), "a_weight": (5, 6, 8), "a_bias": (30,), "scalar": ()})
    leaf = {n: Leaf(n) for n in (5, 6, 7, 8)}
    from learned_opt.symmetry.axes import Prod

    hidden = (Leaf(5, "p"), Leaf(6, "q"))
    specs = {
        "weight": Spec((leaf[6], leaf[5], leaf[7]), ("out", "in", "in")),
        "bias": Spec((leaf[6],), ("out",)),
        "a_weight": Spec((*hidden, leaf[8]), ("out", "out", "in")),
        "a_bias": Spec((Prod(hidden),), ("out",)),
        "scalar": Spec((), ()),
    }
    return model, Symmetry(specs, {"p": Label(5), "q": Label(6)})


def alone(model):
    return model, independent(dict(model.named_parameters()))


NETWORKS = {
    "relu": lambda: built(mlp([9, 8, 8, 8, 6], "relu")),
    "rows padded": lambda: built(mlp([5, 260, 6, 6], "relu")),
    "tanh, thin": lambda: built(mlp([4, 8, 7, 3], "tanh")),
    "cnn with norm": lambda: built(cnn((6, 6, 6), (8, 8, 5), 5, "relu", norm=True)),
    "5x5 kernels": lambda: alone(nn.Sequential(nn.Conv2d(5, 6, 5), nn.ReLU(), nn.Conv2d(6, 7, 5), nn.BatchNorm2d(7))),
    "grouped": lambda: case("cnn_groups"),
    "depthwise": lambda: alone(nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3))),
    "transposed": lambda: case("conv_autoencoder"),
    "transformer, fused": lambda: transformer(activation="gelu"),
    "transformer, apart": lambda: transformer(activation="relu", fused=False),
    "gpt, another layout": lambda: case("gpt_view"),
    "lstm": lambda: case("lstm"),
    "lstm, bidirectional": lambda: case("lstm_bidirectional"),
    "llama": lambda: case("llama_by_hand"),
    "mamba": lambda: case("hf_mamba"),
    "embedding": lambda: case("mean_embedding"),
    "experts": experts,
    "two axes": two_axes,
    "experts, independent": lambda: alone(module({"up": (6, 8, 7), "down": (6, 7, 8), "bias": (6, 8)})),
    "independent": lambda: alone(mlp([9, 8, 8, 6], "relu")),
}


def compared(make, steps=25, missing=(), measure_lr=True, **options):
    """Run both on one trajectory; the largest distance of updates, relative to their size."""
    torch.manual_seed(0)
    model, symmetry = make()
    params = {n: p.detach().double() for n, p in model.named_parameters()}
    params = {n: p + 0.1 * torch.randn_like(p) for n, p in params.items()}
    rules = WhitenedPolar(measure_lr), Reference(measure_lr)
    states = [rule.init(params, symmetry) for rule in rules]
    always = {n: torch.randn_like(p) for n, p in params.items()}
    for t in range(steps):
        size = 50.0 if t == steps // 2 else 1.0  # one is clipped
        grads = {n: size * (0.3 * always[n] + torch.randn_like(p)) for n, p in params.items()}
        grads = {n: g for i, (n, g) in enumerate(grads.items()) if (t, i % 4) not in missing}
        if not grads:
            continue
        both = []
        for k, rule in enumerate(rules):
            updates, states[k] = rule(params, grads, states[k], symmetry, **options)
            both.append(updates)
        for n, u in both[0].items():
            error = (u - both[1][n]).norm() / both[1][n].norm().clamp(min=1e-30)
            assert error < 1e-10, f"step {t + 1}: {n} is {float(error):.1e} off"
        params = {n: p + both[0].get(n, torch.zeros_like(p)) for n, p in params.items()}
    for k in ("clock", "slope", "log_lr", "correlation", "beta1"):
        torch.testing.assert_close(states[0]["network"][k], states[1]["network"][k], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_form_of_tensor_steps_as_in_the_reference(network):
    compared(NETWORKS[network], steps=32, total_steps=30)


@pytest.mark.parametrize("weight_decay", [None, 0.0, 0.1])
@pytest.mark.parametrize("total", [None, 40, torch.tensor(40.0, dtype=torch.float64)])
@pytest.mark.parametrize("measure_lr", [True, False])
def test_every_horizon_and_weight_decay(total, weight_decay, measure_lr):
    options = {"total_steps": total, "weight_decay": weight_decay, "measure_lr": measure_lr}
    compared(NETWORKS["relu"], **options)


@pytest.mark.parametrize("total", [None, 150])
def test_a_long_run_with_its_rare_refreshes(total):
    compared(lambda: built(mlp([6, 7, 7, 5], "relu")), steps=160, total_steps=total)


@pytest.mark.parametrize("network", ["relu", "cnn with norm", "transformer, apart", "experts"])
def test_tensors_without_a_gradient_sit_out(network):
    missing = {(0, 0), (0, 1), (1, 2), (4, 3), (7, 0), (8, 0), (12, 1), (12, 2), (13, 1), (20, 0)}
    compared(NETWORKS[network], steps=26, missing=missing, total_steps=30)


@pytest.mark.parametrize("network", ["relu", "transformer, fused", "cnn with norm"])
def test_axes_of_too_many_units_have_a_diagonal(network, monkeypatch):
    for at in (batches, reference):
        monkeypatch.setattr(at, "BOUND", 7)
    compared(NETWORKS[network])


def test_an_axis_over_the_bound():
    compared(lambda: alone(nn.Linear(600, 6)), steps=12)


def test_one_weight_decay_for_each_name():
    names = [n for n, _ in NETWORKS["relu"]()[0].named_parameters()]
    compared(NETWORKS["relu"], weight_decay=dict(zip(names, [None, 0.1, 0.0, 0.3] * 2, strict=True)))
