"""Biases as columns of their matrices: which these are, and that a step is the one of the joined matrix."""

import pytest
import torch
from torch import nn

from learned_opt import infer_symmetry
from learned_opt.layout import layout_of
from learned_opt.rules.biases import NOISE, SIZE, biases_of, weights_of
from learned_opt.rules.nominal import RATE, Nominal, polar_size, schedule
from learned_opt.rules.polar import newton_schulz
from learned_opt.symmetry import Spec, Symmetry, independent
from tasks.mlp import mlp
from tests.inferred import infer
from tests.states import noise_like
from tests.symmetry.infer.architectures import CASES


def layout_for(model, symmetry=None):
    names = tuple(n for n, _ in model.named_parameters())
    return layout_of(symmetry or infer(model), names, torch.device("cpu"))


# ------------------------------------------------------------------------------------------ which they are
@pytest.mark.parametrize(
    "case, alone",
    [
        ("mlp_bn_train", {"1.bias", "5.bias"}),  # of the normalisation; of three outputs
        ("mlp_shared", {"last.bias"}),
        ("cnn_groups", {"2.bias", "8.bias"}),  # groups' rows are no bias' rows
        ("conv_autoencoder", {"7.bias", "9.bias"}),  # transposed convolutions write their second axis
        ("lstm", {"head.bias"}),
        (
            "gpt_split",
            {f"blocks.{i}.ln{k}.bias" for i in (0, 1) for k in (1, 2)} | {"ln_f.bias"},
        ),
        ("encoder_relu_post", {f"1.layers.{i}.norm{k}.bias" for i in (0, 1) for k in (1, 2)} | {"2.bias"}),
    ],
)
def test_a_bias_belongs_to_the_matrix_beside_it(case, alone):
    model = CASES[case].build()
    inputs = CASES[case].inputs()
    layout = layout_for(model, infer_symmetry(model, *inputs))
    found = weights_of(layout)
    biases = {n for n in layout.names if "bias" in n}
    assert biases - found.keys() == alone
    assert all(weight == bias.replace("bias", "weight") for bias, weight in found.items())


def test_names_alone_do_not_make_a_bias():
    """A vector over other units, or over none, is not joined: its rows would not be permuted with the matrix's."""
    params = {"weight": torch.randn(6, 6), "bias": torch.randn(6)}
    alike = independent(params)
    assert not weights_of(layout_of(alike, tuple(params), torch.device("cpu")))  # two axes that may move apart
    rows = alike.specs["weight"].axes[:1]
    joined = Symmetry({**alike.specs, "bias": Spec(rows, ("out",))}, alike.labels, alike.scales)
    assert weights_of(layout_of(joined, tuple(params), torch.device("cpu"))) == {"bias": "weight"}


def test_columns_go_back_where_they_come_from():
    """Some matrices of a stack have a bias and some have none, and vectors are not in the order of the matrices."""
    layers = [nn.Linear(6, 6, bias=i != 1) for i in range(4)]
    model = nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), *[m for x in layers for m in (x, nn.Tanh())], nn.Linear(6, 2)
    )
    layout = layout_for(model)
    biases = biases_of(layout)
    values = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    stacks = layout.gather(values)
    columns = biases.columns(dict(enumerate(stacks)))
    at = [i for i, stack in enumerate(layout.stacks) if stack.shape[1:] == (6, 6)]
    assert at == [i for i in columns if layout.stacks[i].shape[1:] == (6, 6)]
    for (name, _, _), column in zip(layout.stacks[at[0]].members, columns[at[0]], strict=True):
        expected = values.get(name.replace("weight", "bias"), torch.zeros(6))
        torch.testing.assert_close(column[:, 0], expected, rtol=0, atol=0)
    back = layout.scatter(biases.replaced(stacks, {i: 2 * c for i, c in columns.items()}))
    joined = weights_of(layout)
    assert len(joined) == 4
    for name, value in values.items():
        torch.testing.assert_close(back[name], 2 * value if name in joined else value, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ the step
def reference(rule, params, grads, new, total):
    """The update of 0.bias and 2.bias of a tanh MLP, by the equation and one matrix after the other."""
    age, updates = float(new["0.bias"]["step"]), {}
    for layer in ("0", "2"):
        w, b = f"{layer}.weight", f"{layer}.bias"
        whole = rule.whiten and layer == "2"  # both axes hidden

        def momentum(name, whole=whole):
            s = new[name]
            v = s["v"] / (1 - 0.99**age)
            return (0.9 * s["m"] + 0.1 * grads[name]) * (1 if whole else (v + 1e-16 * v.mean()) ** -0.25)

        rows = new[w]["root0"] if rule.whiten else torch.eye(len(params[b]), dtype=torch.float64)
        cols = new[w]["root1"] if whole else torch.eye(params[w].shape[1], dtype=torch.float64)
        n, n_b = rows @ momentum(w) @ cols, rows @ momentum(b)
        polar = newton_schulz(torch.cat([n, SIZE * n_b[:, None]], -1)[None], 4)[0]
        d, p = rows @ polar[:, :-1] @ cols, polar[:, :-1]
        column = rows @ polar[:, -1] * p.norm() / d.norm()
        v = new[b]["v"] / (1 - 0.99**age)
        adam = new[b]["m"] / (1 - 0.9**age) / (v + 1e-16 * v.mean()).sqrt()
        heard = min(1.0, float(adam.square().mean().sqrt()) / NOISE)
        small = min(1.0, float(params[w].square().mean().sqrt()) * params[w].shape[1] ** 0.5 / 0.5)
        rate = RATE * float(schedule(torch.tensor(age), total))
        updates[b] = -rate * SIZE * small * polar_size(params[w]) * heard * column
    return updates


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("whiten", [True, False])
def test_a_bias_moves_as_the_last_column_of_its_matrix(whiten, alternating):
    model = mlp([8, 6, 7, 5], "tanh").double()
    symmetry = infer(mlp([8, 6, 7, 5], "tanh"))
    params = {n: p.detach() for n, p in model.named_parameters()}
    rule = Nominal()
    rule.whiten = whiten
    state = rule.init(params)
    for t in range(30):
        grads = noise_like(params, t)
        if alternating:
            grads = {n: g + 20 * (-1) ** t if n == "2.bias" else g for n, g in grads.items()}
        updates, state = rule(params, grads, state, symmetry, total_steps=50)
    expected = reference(rule, params, grads, state, 50)
    for name, update in expected.items():
        torch.testing.assert_close(updates[name], update, rtol=1e-6, atol=1e-10)
    adam = state["2.bias"]["m"] / (1 - 0.9**30) / (state["2.bias"]["v"] / (1 - 0.99**30)).sqrt()
    assert (adam.square().mean().sqrt() < 0.5 * NOISE) == alternating  # so that both cases of the shortening are tested


def test_a_bias_that_moves_alone_takes_twice_adams_direction():
    """Where the matrix is frozen, and so has no gradient."""
    model = mlp([8, 6, 7, 5], "tanh").double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    grads = {n: g for n, g in noise_like(params, 0).items() if n != "2.weight"}
    updates, _ = Nominal()(params, grads, Nominal().init(params), infer(mlp([8, 6, 7, 5], "tanh")), total_steps=800)
    torch.testing.assert_close(updates["2.bias"], -RATE * 2 * grads["2.bias"].sign(), rtol=1e-6, atol=1e-9)
