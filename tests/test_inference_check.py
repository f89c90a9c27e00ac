"""Inference leaves the model as it was; its numeric check demotes what is wrong, its converse finds what was missed."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from learned_opt import infer_symmetry
from learned_opt.inference import missed_labels
from learned_opt.inference.engine import Engine, Value
from learned_opt.inference.operators import RULES


class Counting(nn.Module):
    """Counts its calls in a buffer, without gradients, and drops out units."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls.add_(1)
        return self.body(x)


def tanh_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))


def test_the_model_is_left_as_it_was() -> None:
    model, x = Counting().train(), torch.randn(4, 3)
    model(x).sum().backward()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    noise = torch.get_rng_state()
    symmetry = infer_symmetry(model, x, verify=True)
    assert [g.size for g in symmetry.labels.values()] == [5]  # dropout in training: claimed all the same
    assert torch.equal(noise, torch.get_rng_state())
    for n, t in model.state_dict().items():
        assert torch.equal(t, before[n]), n
    for n, p in model.named_parameters():
        assert torch.equal(p.grad, grads[n]), n


def test_a_wrong_scale_is_demoted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "tanh", partial(lambda t, x: t.unary(x, 1, "odd")))  # says that tanh(2 x) = 2 tanh(x)
    model, x = tanh_mlp(), torch.randn(4, 3)
    assert infer_symmetry(model, x, verify=False).check(model, x) > 1e-3
    with pytest.warns(UserWarning, match="scale 0 changed the function"):
        symmetry = infer_symmetry(model, x)
    assert symmetry.check(model, x) < 1e-12
    assert set(symmetry.labels) == {"0", "2"} and set(symmetry.scales) == {"2"}
    assert any("numeric check" in note for note in symmetry.notes)


def test_a_wrong_permutation_is_demoted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).roll(1, -1)).relu())

    monkeypatch.setitem(RULES, "roll", lambda t, x, *args: x)
    model, x = Rolled(), torch.randn(4, 3)
    with pytest.warns(UserWarning, match="label a"):
        symmetry = infer_symmetry(model, x)
    assert symmetry.labels["a"].fixed and not symmetry.labels["b"].fixed
    assert symmetry.check(model, x) < 1e-12


def test_the_converse_finds_what_a_rule_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tanh_mlp(), torch.randn(4, 3)
    assert missed_labels(model, x) == []

    def timid(t: Engine, x: Value) -> Value:
        t.kill(x, "tanh")
        return t.unary(x, None, "odd")

    monkeypatch.setitem(RULES, "tanh", timid)
    assert set(infer_symmetry(model, x).labels) == {"2"}
    assert missed_labels(model, x) == ["0"]


def test_an_unknown_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "tanh")
    symmetry = infer_symmetry(tanh_mlp(), torch.randn(4, 3))
    assert set(symmetry.labels) == {"2"} and "tanh" in symmetry.notes[0]


def test_outputs_that_are_not_finite_leave_the_symmetry_unverified() -> None:
    class Infinite(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 0.0

    symmetry = infer_symmetry(Infinite(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3))
    assert any("not verified" in note for note in symmetry.notes)
