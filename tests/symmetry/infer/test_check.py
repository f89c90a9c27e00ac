"""Inference leaves the model as it was; its numeric check demotes what is wrong, its converse finds what was missed."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from learned_opt import NFNOpt, infer_symmetry
from learned_opt.symmetry.infer import InferenceError, missed_labels
from learned_opt.symmetry.infer.engine import Engine, Value
from learned_opt.symmetry.infer.operators import RULES
from learned_opt.symmetry.infer.verify import grouped_mm


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


class Noisy(nn.Module):
    """Adds noise of a generator of its own, or of the common one."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.body, self.own = tanh_mlp(), own

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + torch.rand(1, 2, generator=torch.Generator() if self.own else None)


@pytest.mark.parametrize("own", [False, True])
def test_noise_is_neither_used_up_nor_seeded(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "manual_seed_all")  # what is drawn on a GPU is the caller's as well
    model, x = Noisy(own), torch.randn(4, 3)
    noise = torch.get_rng_state()
    symmetry = infer_symmetry(model, x)
    assert torch.equal(noise, torch.get_rng_state())
    assert symmetry.notes == () and len(symmetry.labels) == len(symmetry.scales) == 2


def test_what_goes_wrong_is_told_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise AttributeError("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr("learned_opt.symmetry.infer.Check", fails)
        assert infer_symmetry(tanh_mlp(), torch.randn(4, 3)).notes == ("not verified: AttributeError: no such thing",)
    monkeypatch.setattr("learned_opt.symmetry.infer.Propagation", fails)
    with pytest.raises(InferenceError, match="Sequential cannot be inferred: AttributeError: no such thing"):
        infer_symmetry(tanh_mlp(), torch.randn(4, 3))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_are_described_whoever_reads_them(norm: Any, training: bool) -> None:
    layers = nn.Conv1d(3, 5, 2), norm(5, affine=True, track_running_stats=True), nn.ReLU(), nn.Conv1d(5, 2, 1)
    model, x = nn.Sequential(*layers).train(training), torch.randn(4, 3, 8)
    symmetry = infer_symmetry(model, x, verify=False)
    assert {"1.running_mean", "1.running_var"} <= symmetry.specs.keys() and symmetry.notes == ()
    assert [g.size for g in symmetry.labels.values() if not g.fixed] == [5]
    assert symmetry.check(model, x) < 1e-12  # which makes others of them


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


# ------------------------------------------------------------------------- what a forward pass leaves open
class Tasks(nn.Module):
    """One trunk, and a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(3, 5), nn.ModuleDict({"a": nn.Linear(5, 2), "b": nn.Linear(5, 4)})

    def forward(self, x: Tensor, *tasks: str) -> Tensor:
        h = self.trunk(x).relu()
        return torch.cat([self.heads[task](h) for task in tasks], -1)


@pytest.mark.parametrize("trained", [True, False])
def test_parameters_that_are_not_read_are_named(trained: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Tasks(), torch.randn(4, 3)
    model.heads["b"].requires_grad_(trained)
    optimizer = NFNOpt(model.parameters())
    model(x, "a").sum().backward()
    optimizer.step()
    assert optimizer.symmetry is not None and optimizer.symmetry.check(model, x, "b") > 1e-3
    assert "heads.b.weight, heads.b.bias: not read" in optimizer.symmetry.notes[0]
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == trained and all("heads.b.weight" in w and "independent" in w for w in warned)
    both = infer_symmetry(model, x, "a", "b")
    assert both.notes == () and both.check(model, x, "b") < 1e-12


def test_an_object_that_may_hold_the_output_is_not_left_out() -> None:
    class Held:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    class Holding(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return Held(super().forward(x)), x.sum()

    with pytest.raises(InferenceError, match="Held"):
        infer_symmetry(Holding(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3))


class Mixed(nn.Module):
    """Takes tensors, a number and None, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.read = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor, x: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
        y = self.read((self.table(ids) + x).tanh()) * scale
        return y if bias is None else y + bias


@pytest.mark.parametrize("order", ["scale x ids", "ids bias x", "none x ids", "ids x scale"])
def test_keywords_in_any_order_are_verified(order: str) -> None:
    given = {"ids": torch.arange(4), "x": torch.ones(4, 1), "scale": 2.0, "bias": torch.ones(3)}
    symmetry = infer_symmetry(Mixed(), **{"bias" if n == "none" else n: given.get(n) for n in order.split()})
    assert symmetry.notes == () and list(symmetry.labels) == ["table"]


@pytest.mark.filterwarnings("ignore:(?s).*was assigned during export")
@pytest.mark.parametrize("norm", [spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_what_writes_into_a_given_tensor_is_an_unknown_operator(norm: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its rule is not asked, which would fail; the decomposed graph has no such operators."""
    model = nn.Sequential(norm(nn.Linear(6, 10)), nn.ReLU(), nn.Linear(10, 3))
    assert infer_symmetry(model, torch.randn(4, 6)).notes == ()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("x", "w", "offs"),
    [
        ((48, 16), (3, 16, 32), [16, 32, 48]),
        ((16, 48), (48, 32), [16, 32, 48]),
        ((3, 16, 32), (32, 48), [16, 32, 48]),
        ((3, 16, 16), (3, 16, 32), None),
    ],
)
def test_grouped_products_in_float64_are_torchs(x: tuple[int, ...], w: tuple[int, ...], offs: list[int] | None) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(x, dtype=torch.bfloat16), torch.randn(w, dtype=torch.bfloat16)
    ends = None if offs is None else torch.tensor(offs, dtype=torch.int32)
    theirs = torch._grouped_mm(a, b, offs=ends).double()
    torch.testing.assert_close(grouped_mm(a.double(), b.double(), ends), theirs, rtol=0.02, atol=0.05)
