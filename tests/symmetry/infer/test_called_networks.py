"""Networks that are trained together, in parts, or with what the export replaces: as in ``test_called``."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from learned_opt import NFNOpt, infer_symmetry
from tests.symmetry.infer.more_architectures import MORE
from tests.symmetry.infer.test_called import Net, l1, squared

pytestmark = pytest.mark.usefixtures("no_hook_is_left")


@pytest.mark.parametrize("first", ["critic", "generator"])
def test_two_networks_against_each_other(first: str, said: Any) -> None:
    generator, z = Net(), torch.randn(6, 4)
    critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    ours, theirs = NFNOpt(generator.parameters()), NFNOpt(critic.parameters())

    def generate() -> None:
        ours.zero_grad()
        F.softplus(-critic(generator(z))).mean().backward()
        ours.step()

    def criticise() -> None:
        theirs.zero_grad()
        (F.softplus(critic(generator(z).detach())) + F.softplus(-critic(torch.randn(6, 3)))).mean().backward()
        theirs.step()

    for step in (generate, criticise) if first == "generator" else (criticise, generate):
        step()
    for optimizer, model, x in ((ours, generator, z), (theirs, critic, torch.randn(6, 3))):
        assert optimizer.symmetry is not None and [g.size for g in optimizer.symmetry.labels.values()] == [8]
        assert len(optimizer.symmetry.scales) == 1 and optimizer.symmetry.check(model, x) < 1e-9
    assert not said(logging.WARNING)


def test_gradients_of_a_functional_transform_are_trained_with_a_true_symmetry(said: Any) -> None:
    model, x = Net(), torch.randn(6, 4)
    optimizer = NFNOpt(model.parameters())

    def loss(params: dict[str, Tensor]) -> Tensor:
        return squared(torch.func.functional_call(model, params, (x,))) + 10 * l1(params["a.weight"])

    for n, g in torch.func.grad(loss)(dict(model.named_parameters())).items():
        model.get_parameter(n).grad = g
    optimizer.step()
    assert optimizer.symmetry is not None and len(said(logging.WARNING)) == 1
    assert not [s for s in optimizer.symmetry.scales.values() if s.kind != "sign"]


def test_features_of_a_model_that_is_trained_with_its_head(said: Any) -> None:
    """The encoder is called by itself, and the whole as well."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Net(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).tanh())

    model, x = Whole(), torch.randn(6, 4)
    optimizer = NFNOpt(model.parameters())
    (squared(model(x)) + squared(model.encoder(x) - 1.0)).backward()
    optimizer.step()
    assert "independent axes" in repr(optimizer) and "used in another way" in said(logging.WARNING)[0]


OF_THE_ZOO = (
    *("packed_lstm", "packed_gru_unsorted", "cells_lstm", "cells_gru", "masked_encoder", "experts_sorted", "dora"),
    *("neural_operator", "written_step_by_step", "graph_attention", "bags_of_maxima", "hypernetwork"),
)


@pytest.mark.parametrize("name", OF_THE_ZOO)
def test_networks_are_trained_with_their_symmetry(name: str, said: Any) -> None:
    """What is replayed gives the outputs and the gradients of the training, whatever is replaced in the export."""
    torch.manual_seed(0)
    model, inputs = MORE[name].build().train(), MORE[name].inputs()
    optimizer = NFNOpt(model.parameters())
    squared(model(*inputs)).backward()
    optimizer.step()
    assert optimizer.symmetry is not None and optimizer.symmetry.notes == () and not said(logging.WARNING)
    assert any(not g.fixed for g in optimizer.symmetry.labels.values())
    with torch.no_grad():
        model.get_parameter(next(n for n, p in model.named_parameters() if p.ndim > 1)).mul_(1.1)
    optimizer = NFNOpt(model.parameters())
    (squared(model(*inputs)) + sum((p * torch.rand_like(p)).sum() for p in model.parameters())).backward()
    optimizer.step()
    assert "used in another way" in said(logging.WARNING)[-1]  # the comparison takes place


class LastStep(nn.Module):
    """A recurrent layer on padded sequences, and a linear map of its last output."""

    def __init__(self, layer: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.layer = layer(3, 5, batch_first=True, **settings)
        self.head = nn.Linear(5 * (2 if settings.get("bidirectional") else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}])
def test_padded_sequences_may_be_as_long_as_they_are(layer: type[nn.RNNBase], settings: dict[str, Any]) -> None:
    """Torch would trace every step of a layer: minutes for so many."""
    torch.manual_seed(0)
    model = LastStep(layer, **settings)
    short, long = (infer_symmetry(model, torch.randn(2, length, 3)) for length in (4, 3000))
    assert short.to_dict() == long.to_dict() and short.scales


class PackedState(LastStep):
    """The same on packed sequences: the last state."""

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([x.shape[1], x.shape[1] - 1]), batch_first=True)
        return self.head(self.layer(packed)[1][0][-1])


@pytest.mark.parametrize("model", [LastStep, PackedState])
def test_recurrent_layers_with_dropout_are_compared_under_the_same_noise(model: type[LastStep], said: Any) -> None:
    torch.manual_seed(0)
    net = model(nn.LSTM, num_layers=2, dropout=0.5)
    optimizer = NFNOpt(net.parameters())
    squared(net(torch.randn(2, 4, 3))).backward()
    optimizer.step()
    assert not said(logging.WARNING) and len(optimizer.symmetry.scales) == 2
