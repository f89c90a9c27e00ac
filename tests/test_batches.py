"""The tensors of a network in batches: which vectors are columns of matrices, and that nothing is lost."""

import pytest
import torch
from torch import nn

from learned_opt import infer_symmetry
from learned_opt.batch_layout import batches_of
from learned_opt.symmetry import Spec, Symmetry, independent
from tests.inferred import infer
from tests.symmetry.infer.architectures import CASES


def layout_for(model, symmetry=None):
    names = tuple(n for n, _ in model.named_parameters())
    return batches_of(symmetry or infer(model), names, torch.device("cpu"))


def weights_of(layout):
    """The matrix of each bias that is one's column."""
    return {bias: n for b in layout.batches for n, bias in zip(b.names, b.biases, strict=False)}


# ------------------------------------------------------------------------------------------ which they are
@pytest.mark.parametrize(
    "case, alone",
    [
        ("mlp_bn_train", {"1.bias", "5.bias"}),  # of the normalisation; of three outputs
        ("mlp_shared", {"last.bias"}),
        ("cnn_groups", {"2.bias", "8.bias"}),  # groups' rows are no bias' rows
        ("conv_autoencoder", {"9.bias"}),  # of two outputs
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
    layout = layout_for(model, infer_symmetry(model, *inputs, verify=False))
    found = weights_of(layout)
    biases = {n for n in layout.names if "bias" in n}
    assert biases - found.keys() == alone
    assert all(weight == bias.replace("bias", "weight") for bias, weight in found.items())


def test_names_alone_do_not_make_a_bias():
    """A vector over other units, or over none, is not joined: its rows would not be permuted with the matrix's."""
    params = {"weight": torch.randn(6, 6), "bias": torch.randn(6)}
    alike = independent(params)
    assert not weights_of(batches_of(alike, tuple(params), torch.device("cpu")))  # two axes that may move apart
    rows = alike.specs["weight"].axes[:1]
    joined = Symmetry({**alike.specs, "bias": Spec(rows, ("out",))}, alike.labels, alike.scales)
    assert weights_of(batches_of(joined, tuple(params), torch.device("cpu"))) == {"bias": "weight"}


@pytest.mark.parametrize("case", ["cnn_groups", "conv_autoencoder", "lstm_bidirectional", "gpt_view", "llama_by_hand"])
def test_gather_and_scatter_are_inverse_and_every_tensor_is_in_one_batch(case):
    model = CASES[case].build()
    layout = layout_for(model, infer_symmetry(model, *CASES[case].inputs(), verify=False))
    values = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    back = {}
    for b in layout.all:
        found = b.scatter(b.gather(values))
        assert not found.keys() & back.keys()
        back |= found
    assert back.keys() == values.keys()
    assert all(torch.equal(x, values[n]) for n, x in back.items())


@pytest.mark.parametrize("case", ["cnn_groups", "lstm_bidirectional", "gpt_view", "llama_by_hand"])
def test_a_batch_is_cut_into_the_matrices_of_its_tensors(case):
    model = CASES[case].build()
    symmetry = infer_symmetry(model, *CASES[case].inputs(), verify=False)
    values = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for b in layout_for(model, symmetry).batches:
        x = b.gather(values)
        assert torch.equal(b.join(b.split(x)), x)
        if b.factored:
            continue
        ours = [m[..., : m.shape[-1] - bool(b.biases)] for part in b.split(x) for m in part]
        theirs = [m for n in b.names for part in symmetry.split(n, values[n]) for m in part]
        sizes = [sorted(float(m.square().sum()) for m in ms) for ms in (ours, theirs)]
        assert sizes[0] == pytest.approx(sizes[1])


def test_columns_go_back_where_they_come_from():
    """Some matrices of one form have a bias and some have none."""
    layers = [nn.Linear(6, 6, bias=i != 1) for i in range(4)]
    model = nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), *[m for x in layers for m in (x, nn.Tanh())], nn.Linear(6, 2)
    )
    layout = layout_for(model)
    values = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    assert len(weights_of(layout)) == 4
    for b in layout.batches:
        x = b.gather(values)
        for i, (n, bias) in enumerate(zip(b.names, b.biases, strict=False)):
            assert torch.equal(x[i, :, -1], values[bias]) and torch.equal(x[i, :, :-1], values[n])
